"""A second opinion on direct logit attribution: each source is taken out of the stream before the frozen final norm.

Imports torch and what `raw_families` and `raw_paths` read. The share of a source is what the difference of two logits
loses where the vector that it wrote is taken out of the last stream, the norm's mean and deviation staying those of the
whole stream. What no source wrote is the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from tests.oracles import raw_families, raw_paths
from tests.oracles.raw_paths import Change, Place


class Parts:
    """A model with what it computes of some tokens: each part's vector, and the logits through the frozen norm."""

    def __init__(self, model: Any, tokens: Tensor, changes: Sequence[tuple[Place, Change]] = ()) -> None:
        self.model, self.tokens, self.changes = model, tokens, changes
        self.gpt2 = model.config.model_type == "gpt2"
        self.raw = raw_paths if self.gpt2 else raw_families
        self.blocks = model.transformer.h if self.gpt2 else attrgetter(raw_families.anatomy(model).blocks)(model)
        self.norm = model.transformer.ln_f if self.gpt2 else _last_norm(model)
        bias = getattr(model.lm_head, "bias", None)
        self.unembed = model.lm_head.weight.detach().double()
        self.bias = torch.zeros(len(self.unembed)).double() if bias is None else bias.detach().double()
        self.stream = self.read(len(self.blocks) - 1, "resid_post").double()
        self.deviation = _deviation(self.norm, self.stream)

    def read(self, layer: int, component: str, head: int | None = None) -> Tensor:
        return self.several([Place(layer, component, head)])[0]

    def several(self, places: Sequence[Place]) -> list[Tensor]:
        """What is at places, of one forward pass."""
        seen: dict[str, Tensor] = {}
        self.raw.run(self.model, self.tokens, [*self.changes, *(self.raw._reader(seen, place) for place in places)])
        return [seen[str(place)] for place in places]

    def matrix(self, layer: int, last: str) -> Tensor:
        """Of ``(input, output)``: ``"out"`` of attention or ``"down"`` of the MLP."""
        own = None if self.gpt2 else raw_families.anatomy(self.model)
        path = {"out": own.out, "down": own.matrices[1]} if own else {"out": "attn.c_proj", "down": "mlp.c_proj"}
        weight = attrgetter(path[last])(self.blocks[layer]).weight.detach()
        return weight if self.gpt2 else weight.T

    def rows(self, layer: int, head: int) -> Tensor:
        """``W_O`` of a head."""
        matrix, heads = self.matrix(layer, "out"), self.model.config.num_attention_heads
        return matrix.unflatten(0, (heads, -1))[head]

    @torch.no_grad()
    def logits(self, value: Tensor) -> Tensor:
        """The logits of a stream, by the deviation of the whole one."""
        return _frozen(self.norm, value, self.deviation) @ self.unembed.T + self.bias

    def lost(self, vector: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
        """What ``logit[plus] - logit[minus]`` loses where a vector is taken out of the stream."""
        logits = self.logits(self.stream) - self.logits(self.stream - vector.double())
        return (logits.gather(-1, plus[..., None]) - logits.gather(-1, minus[..., None]))[..., 0]

    def moved(self, layer: int, head: int) -> Tensor:
        """What a head moves from each key to each query, ``(example, query, key, d_model)``; the bias of v with it."""
        group = self.model.config.num_attention_heads // (1 if self.gpt2 else raw_families.heads_of(self.model)[1])
        values = self.read(layer, "v", head if self.gpt2 else head // group)
        written = values @ self.rows(layer, head)
        pattern = self.read(layer, "pattern", head).clone()  # as q and k make it: no read sees a change of the same one
        for place, change in self.changes:
            if place[:3] == (layer, "pattern", head):
                at = slice(None) if place.positions is None else [*place.positions]
                pattern[:, at] = change(pattern[:, at])
        return pattern[..., None] * written[:, None]


def shares(model: Any, tokens: Tensor, plus: Tensor, minus: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Source to its share ``(example, position)`` of ``logit[plus] - logit[minus]``, and that difference itself.

    `plus` and `minus` are token ids ``(example, position)``.
    """
    known = Parts(model, tokens)
    vectors = _written(known)
    found = {name: known.lost(vector, plus, minus) for name, vector in vectors.items()}
    whole, logits = known.logits(known.stream), known.raw.run(model, tokens).double()
    assert (whole - logits).abs().max() < 1e-3  # the norm that is written below is the model's
    said = (logits.gather(-1, plus[..., None]) - logits.gather(-1, minus[..., None]))[..., 0]
    summed = (whole.gather(-1, plus[..., None]) - whole.gather(-1, minus[..., None]))[..., 0]
    return found | {"bias": summed - sum(found.values())}, said


def shares_under(
    model: Any,
    tokens: Tensor,
    plus: Tensor,
    minus: Tensor,
    changes: Sequence[tuple[Place, Change]],
    added: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """`shares` with changes, the source ``intervention`` behind it; the whole; and the vector of that source.

    `added` are vectors that are written into the stream in the name of a source, which no read shows.
    """
    clean, known = Parts(model, tokens), Parts(model, tokens, changes)
    bias = clean.stream - sum(_written(clean).values())  # the same vector everywhere
    vectors = _written(known)
    for name, vector in (added or {}).items():
        vectors[name] = vectors[name] + vector
    rest = known.stream - sum(vectors.values()) - bias
    found = {name: known.lost(vector, plus, minus) for name, vector in vectors.items()}
    logits = known.logits(bias)  # with the biases of the norm and of the unembedding
    found["bias"] = (logits.gather(-1, plus[..., None]) - logits.gather(-1, minus[..., None]))[..., 0]
    logits = known.raw.run(model, tokens, changes).double()
    said = (logits.gather(-1, plus[..., None]) - logits.gather(-1, minus[..., None]))[..., 0]
    return found | {"intervention": known.lost(rest, plus, minus)}, said, rest


def _written(known: Parts) -> dict[str, Tensor]:
    """The vector that each source writes into the stream, ``(example, position, d_model)``."""
    model = known.model
    vectors: dict[str, Tensor] = {"embed": known.read(0, "embed")}
    if model.config.model_type == "gemma":
        vectors["embed"] = known.read(0, "resid_pre")  # the embedding, scaled
    if known.gpt2 or raw_families.anatomy(model).pos_embed:
        vectors["pos_embed"] = known.read(0, "pos_embed").expand_as(vectors["embed"])
    heads, layers = range(model.config.num_attention_heads), range(len(known.blocks))
    places = {f"L{layer}H{head}": Place(layer, "z", head) for layer in layers for head in heads}
    outputs = {f"L{layer}.mlp": Place(layer, "mlp_out") for layer in layers}
    seen = dict(zip((*places, *outputs), known.several([*places.values(), *outputs.values()]), strict=True))
    for layer in layers:
        vectors |= {f"L{layer}H{head}": seen[f"L{layer}H{head}"] @ known.rows(layer, head) for head in heads}
        vectors[f"L{layer}.mlp"] = seen[f"L{layer}.mlp"]
    return vectors


def shares_inside(
    model: Any,
    tokens: Tensor,
    plus: Tensor,
    minus: Tensor,
    layer: int,
    head: int,
    changes: Sequence[tuple[Place, Change]] | None = None,
    added: Tensor | None = None,
) -> dict[str, Tensor]:
    """The same of each neuron of a layer, of the bias of its MLP, and of what a head moves from each key.

    With `changes` also of what these do not write of the MLP's output and of the head's, to which `added` is written.
    """
    known, clean = Parts(model, tokens, changes or ()), Parts(model, tokens)
    post, down = known.read(layer, "mlp_post"), known.matrix(layer, "down")
    vectors = {f"L{layer}N{one}": post[..., one, None] * down[one] for one in range(len(down))}
    vectors[f"L{layer}.mlp bias"] = bias = clean.read(layer, "mlp_out") - clean.read(layer, "mlp_post") @ down
    if changes is not None:
        vectors[f"L{layer}.mlp intervention"] = known.read(layer, "mlp_out") - post @ down - bias
    moved = known.moved(layer, head)
    vectors |= {f"L{layer}H{head} from {key}": moved[:, :, key] for key in range(tokens.shape[1])}
    if changes is not None:
        written = known.read(layer, "z", head) @ known.rows(layer, head) + (0 if added is None else added)
        vectors[f"L{layer}H{head} intervention"] = written - moved.sum(2)
    return {name: known.lost(vector, plus, minus) for name, vector in vectors.items()}


def head_logits(model: Any, tokens: Tensor, changes: Sequence[tuple[Place, Change]] = ()) -> Tensor:
    """The logits that each head alone adds, ``(layer, head, example, position, token)``; the unembedding's bias too."""
    known, layers = Parts(model, tokens, changes), []
    for layer in range(len(known.blocks)):
        each = range(model.config.num_attention_heads)
        written = [known.read(layer, "z", head) @ known.rows(layer, head) for head in each]
        nothing = torch.zeros_like(known.stream)  # through the norm this is the norm's bias
        layers.append(torch.stack([known.logits(one.double()) - known.logits(nothing) + known.bias for one in written]))
    return torch.stack(layers)


def _last_norm(model: Any) -> Any:
    body = model.base_model
    return next(getattr(body, name) for name in ("norm", "final_layer_norm", "ln_f") if hasattr(body, name))


def _deviation(norm: Any, stream: Tensor) -> Tensor:
    """What the norm divides by."""
    if isinstance(norm, torch.nn.LayerNorm):
        return (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return (stream.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _frozen(norm: Any, value: Tensor, deviation: Tensor) -> Tensor:
    """The norm of `value`, divided by a given deviation."""
    if isinstance(norm, torch.nn.LayerNorm):
        return (value - value.mean(-1, keepdim=True)) / deviation * norm.weight.double() + norm.bias.double()
    gain = norm.weight.double() + (1 if type(norm).__name__.startswith("Gemma") else 0)
    return value / deviation * gain
