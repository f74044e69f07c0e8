"""Owns the second opinion on AtP* and RelP of edges, on top of `raw_edges`: each from its definition, edge by edge.

Takes the models that `raw_edges` takes, in float64. Nothing here is quick: every dropped part is a forward pass of its
own, and every pattern is written out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .raw_edges import Parts, Run, Score, edges, estimated_scores, forward

Edge = tuple[str, str]


def slopes_in(run: Run, score: Score) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Slopes of the score by what each receiver read, and by what each sender wrote; 0 where nothing depends on it."""
    places = [*run.read.values(), *run.sent.values()]
    wanted = [place for place in places if place.requires_grad]
    found = iter(torch.autograd.grad(score(run.logits).sum(), wanted, allow_unused=True))
    slopes = [next(found) if place.requires_grad else None for place in places]
    filled = [torch.zeros_like(place) if one is None else one for place, one in zip(places, slopes, strict=True)]
    return dict(zip(run.read, filled, strict=False)), dict(zip(run.sent, filled[len(run.read) :], strict=True))


def pattern_of(parts: Parts, q: Tensor, k: Tensor) -> Tensor:
    """Causal attention of one head, (example, query, key)."""
    scores = q @ k.transpose(1, 2) / parts.d_head**0.5
    return scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def of_receiver(receiver: str) -> tuple[int, str, int]:
    """Layer, q, k or v, and head."""
    place, which = receiver[1:-3].split(".h"), receiver[-2]
    return int(place[0]), which, int(place[1])


def fixed_pattern_score(parts: Parts, run: Run, written: dict[str, Tensor], edge: Edge, change: Tensor) -> Tensor:
    """What an edge into q or k changes: the pattern anew, times the slope by the pattern."""
    layer, which, head = of_receiver(edge[1])
    group, total = parts.heads // parts.kv_heads, torch.tensor(0.0)
    for reader in [head] if which == "q" else range(head * group, (head + 1) * group):
        key_head = reader // group
        names = {"q": f"a{layer}.h{reader}<q>"} | {one: f"a{layer}.h{key_head}<{one}>" for one in "kv"}
        heads = {"q": reader, "k": key_head, "v": key_head}
        made = {one: parts.project(layer, one, heads[one], run.read[names[one]]) for one in "qkv"}
        before = pattern_of(parts, made["q"], made["k"])
        made[which] = parts.project(layer, which, heads[which], run.read[names[which]] + change)
        after = pattern_of(parts, made["q"], made["k"])
        moves = parts.write(layer, reader, made["v"])  # what a weight of 1 on a key writes
        slope = written[f"a{layer}.h{reader}"] @ moves.transpose(1, 2)
        total = total + ((after - before) * slope).sum((1, 2))
    return total


def atp_star_scores(model: Any, tokens: Tensor, corrupted: Tensor, score: Score) -> dict[Edge, Tensor]:
    """AtP* of edges: the mean over dropped parts of absolute estimates, with the sign of the estimate without a drop.

    An estimate is the change at the receiver times the slope there, and of q and k what the pattern changes by, times
    the slope by the pattern. A part is the attention or the MLP of a layer; where it is dropped, it writes what it
    writes in the clean run, whatever it reads. A part that the receiver belongs to is not dropped, since then nothing
    would depend on the receiver.
    """
    with torch.no_grad():
        clean, dirty = forward(model, tokens).sent, forward(model, corrupted).sent
    parts = Parts(model)
    units = {f"a{layer}": [f"a{layer}.h{head}" for head in range(parts.heads)] for layer in range(parts.layers)}
    units |= {f"m{layer}": [f"m{layer}"] for layer in range(parts.layers)}

    def estimates(dropped: list[str]) -> dict[Edge, Tensor]:
        run = forward(model, tokens, fixed={name: clean[name] for name in dropped})
        read, written = slopes_in(run, score)
        found = {}
        with torch.no_grad():
            for edge in edges(model):
                change = dirty[edge[0]] - clean[edge[0]]
                if edge[1].endswith(("<q>", "<k>")):
                    found[edge] = fixed_pattern_score(parts, run, written, edge, change)
                else:
                    found[edge] = (change * read[edge[1]]).sum((1, 2))
        return found

    plain = estimates([])
    by_unit = {unit: estimates(names) for unit, names in units.items()}
    found = {}
    for edge, value in plain.items():
        others = [by_unit[unit][edge] for unit in units if edge[1].split(".")[0] != unit]
        size = torch.stack(others).abs().mean(0)
        sign = torch.where(value == 0, torch.stack(others).sum(0).sign(), value.sign())
        found[edge] = sign * size
    return found


class FrozenScale(nn.Module):
    """A norm that divides by a number: what it divides by has no slope."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.centred = isinstance(norm, nn.LayerNorm)
        self.eps = norm.eps if self.centred else norm.variance_epsilon

    def forward(self, stream: Tensor) -> Tensor:
        centred = stream - stream.mean(-1, keepdim=True) if self.centred else stream
        size = (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().detach()
        made = self.weight * centred / size
        return made if self.bias is None else made + self.bias


class Proportional(nn.Module):
    """An activation function that multiplies what it gets by a number, f(x) / x."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, value: Tensor) -> Tensor:
        return value * (self.act(value) / value).detach()


class HalfOfSlope(nn.Module):
    """A module whose input passes on half of its slope."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, value: Tensor) -> Tensor:
        made: Tensor = self.module(value / 2 + (value / 2).detach())
        return made


def with_rules(model: Any) -> Any:
    """A copy of the model with the rules of RelP in its modules: the same numbers, other slopes."""
    model = copy.deepcopy(model)
    parts = Parts(model)
    norms = ("ln_1", "ln_2", "ln_f", "input_layernorm", "post_attention_layernorm", "final_layer_norm", "norm")
    for owner in [parts.body, *parts.blocks]:
        for name in norms:
            if hasattr(owner, name):
                setattr(owner, name, FrozenScale(getattr(owner, name)))
    for block in parts.blocks:
        name = "act_fn" if hasattr(block.mlp, "act_fn") else "act"
        setattr(block.mlp, name, Proportional(getattr(block.mlp, name)))
        if hasattr(block.mlp, "gate_proj"):  # what is projected down is the product with the gate
            block.mlp.down_proj = HalfOfSlope(block.mlp.down_proj)
    return model


def relp_scores(model: Any, tokens: Tensor, corrupted: Tensor, score: Score) -> dict[Edge, Tensor]:
    """RelP of edges: what the sender's value changes by, times the slope that the rules give at the receiver.

    A norm divides by a number, an activation function multiplies by one, and the two factors of a gate get half of the
    slope each. Attention has its own slopes.
    """
    return estimated_scores(with_rules(model), tokens, corrupted, score)
