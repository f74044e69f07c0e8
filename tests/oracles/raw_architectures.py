"""Owns the second opinion on decoders of any architecture: plain torch hooks at the borders of modules.

Imports torch, the table of `architecture_parts`, and what `raw_paths` says of places.
A place is ``(layer, component, head, positions)``; a value is (example, position, ...), as in `raw_paths`.

=====================  ==========================================================================================
``embed pos_embed``    what the embedding of tokens (of positions) gives; the layer is ignored
``resid_pre``          what enters the block; ``resid_post`` what leaves it
``attn_in``            what enters the attention module; ``mlp_in`` the MLP
``q k v``              what the projections write, before any norm, clipping, scale or rotary embedding; heads of
                       ``k v`` are key-value heads; with latent attention q and v only
``q_rot k_rot``        what scores are made from, where the architecture has rotary embeddings
``pattern``            attention weights after caps and softmax, without sinks; the positions are queries
``z``                  what enters the output projection of attention, split into heads
``head_out``           z of a head times its rows of that projection, without bias, norm or multiplier
``attn_out mlp_out``   what is added to the stream: after a norm that follows, times a multiplier of the block
``resid_mid``          stream between attention and MLP; not there where both read the block's input
``mlp_pre mlp_post``   what the first matrix of the MLP writes (where it is gated: the gate), what enters its last;
                       nothing of experts; with a head, the number of a neuron
=====================  ==========================================================================================

What lies inside attention is read and changed in a stand-in for the function that the architecture calls under eager
attention; where its attention module holds that itself, there is no ``q_rot k_rot pattern``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.oracles.architecture_parts import QKV, columns, heads_of, is_parallel, parts
from tests.oracles.raw_paths import Change, Place, _at, _changed, _fixed, _reader

INSIDE = ("q_rot", "k_rot", "pattern")
PER_HEAD = (*QKV, *INSIDE, "z", "head_out")
PER_NEURON = ("mlp_pre", "mlp_post")


def components(model: Any) -> tuple[str, ...]:
    """What the architecture has, in forward order."""
    own = parts(model)
    position = ("pos_embed",) if own.pos_embed else ()
    if own.attention is None:
        return ("embed", *position, "resid_pre", "resid_post")
    qkv = ("q", "v") if own.layout == "latent" else QKV
    mid = () if is_parallel(model) or not own.sums else ("resid_mid",)
    neurons = PER_NEURON if own.neurons else ()
    rest = ("z", "head_out", "attn_out", *mid, "mlp_in", *neurons, "mlp_out", "resid_post")
    return ("embed", *position, "resid_pre", "attn_in", *qkv, *_inside(model), *rest)


def _inside(model: Any) -> tuple[str, ...]:
    """What can be had inside attention."""
    if not hasattr(sys.modules[type(model).__module__], "eager_attention_forward"):
        return ()
    return INSIDE if getattr(model.config, "rope_parameters", None) else ("pattern",)


ACTS: list[tuple[Any, str, Change]] = []
"""What is done inside attention at the moment: ``(attention module, component, act)``."""


def _act(module: Any, component: str, value: Tensor) -> Tensor:
    """``(example, head, position, d)`` after all acts on a component, which get ``(example, position, head, d)``."""
    for where, name, act in ACTS:
        if where is module and name == component:
            value = act(value.transpose(1, 2)).transpose(1, 2)
    return value


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """In place of ``eager_attention_forward``."""
    shared = query.shape[1] // key.shape[1]
    query, key = _act(module, "q_rot", query), _act(module, "k_rot", key)
    scores = query @ key.repeat_interleave(shared, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(attention_mask < -1, -torch.inf)
    if hasattr(module, "sinks"):  # a score of each head that stands beside those of the keys
        beside = module.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = _act(module, "pattern", weights)
    return (weights @ value.repeat_interleave(shared, 1)).transpose(1, 2).contiguous(), weights


class Inside:
    """A handle, as of a hook, on one component inside the attention of a layer."""

    def __init__(self, model: Any, layer: int, component: str, act: Change) -> None:
        self.act = (attrgetter(parts(model).attention)(block_of(model, layer)), component, act)
        self.stack, usual = ExitStack(), model.config._attn_implementation
        if usual != "eager":
            model.set_attn_implementation("eager")
            self.stack.callback(model.set_attn_implementation, usual)
        code = sys.modules[type(model).__module__]
        self.stack.enter_context(mock.patch.object(code, "eager_attention_forward", _eager))
        ACTS.append(self.act)

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: Any) -> None:
        ACTS.remove(self.act)
        self.stack.close()


def block_of(model: Any, layer: int) -> Any:
    return attrgetter(parts(model).blocks)(model)[layer]


def _of_input(act: Change, module: Any, rows: int) -> Any:
    """A hook on what enters a module: its first argument, or ``hidden_states`` by name."""

    def hook(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if args:
            return (_apart(args[0], act, rows), *args[1:]), named
        return args, {**named, "hidden_states": _apart(named["hidden_states"], act, rows)}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _of_output(act: Change, module: Any, rows: int) -> Any:
    """A hook on what leaves a module: all of it, or the first of several."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)((_apart(output[0], act, rows), *output[1:]))
        return _apart(output, act, rows)

    return module.register_forward_hook(hook)


def _apart(value: Tensor, act: Change, rows: int) -> Tensor:
    """Some modules get (example x position, d) or (example, 1, position, d); positions are embedded once for all."""
    if value.dim() == 2 and value.shape[0] % rows == 0:
        return act(value.unflatten(0, (rows, -1))).flatten(0, 1)
    if value.dim() == 4:
        return act(value[:, 0])[:, None]
    return act(value.expand(rows, *value.shape[-2:]))


def _hooks(model: Any, tokens: Tensor, place: Place, change: Change) -> list[Any]:
    """Handles that change one place; they act in the order in which they were made."""
    layer, component, head, positions = place
    if component not in components(model):
        raise ValueError(f"{component!r} is not one of {components(model)}")
    own, (heads, _), rows = parts(model), heads_of(model), len(tokens)
    block = block_of(model, layer)
    times = getattr(model.config, own.multiplier) if own.multiplier else 1.0

    def at(path: str | None) -> Any:
        return attrgetter(path)(block) if path else block

    def whole(value: Tensor) -> Tensor:
        return _changed(value, _at(positions, head), change)

    def added(value: Tensor) -> Tensor:
        return whole(value * times) / times

    if component in ("embed", "pos_embed"):
        return [_of_output(whole, attrgetter(getattr(own, component))(model), rows)]
    if component in QKV:
        path = own.qkv[min(QKV.index(component), len(own.qkv) - 1)]

        def projected(value: Tensor) -> Tensor:
            there = columns(model, component, value.shape[-1])
            flat = there.flatten()
            made = whole(value[..., flat].unflatten(-1, there.shape))
            changed = value.clone()
            changed[..., flat] = made.flatten(2)
            return changed

        return [_of_output(projected, at(path), rows)]
    if component in INSIDE:
        return [Inside(model, layer, component, whole)]
    if component == "z":
        return [_of_input(lambda value: whole(value.unflatten(-1, (heads, -1))).flatten(2), at(own.out), rows)]
    if component == "head_out":
        out, seen = at(own.out), {}
        weight = out.weight if type(out).__name__ == "Conv1D" else out.weight.T
        of_head = weight.unflatten(0, (heads, -1))[head]

        def look(value: Tensor) -> Tensor:
            seen["z"] = value.unflatten(-1, (heads, -1))[:, :, head]
            return value

        def put(value: Tensor) -> Tensor:
            old = seen["z"] @ of_head
            return value + (_changed(old, _at(positions), change) - old)

        return [_of_input(look, out, rows), _of_output(put, out, rows)]
    if component == "resid_mid":
        stream = {}

        def enter(value: Tensor) -> Tensor:
            stream["pre"] = value
            return value

        def middle(value: Tensor) -> Tensor:
            return (whole(stream["pre"] + value * times) - stream["pre"]) / times

        return [_of_input(enter, block, rows), _of_output(middle, at(own.attn_out), rows)]
    if component == "mlp_pre":

        def gate(value: Tensor) -> Tensor:
            last = at(own.neurons[1])
            width = last.weight.shape[0 if type(last).__name__ == "Conv1D" else 1]
            return torch.cat([whole(value[..., :width]), value[..., width:]], -1)

        return [_of_output(gate, at(own.neurons[0]), rows)]
    entering = {
        "resid_pre": None,
        "attn_in": own.attention,
        "mlp_in": own.mlp,
        "mlp_post": own.neurons and own.neurons[1],
    }
    if component in entering:
        return [_of_input(whole, at(entering[component]), rows)]
    leaving = {"attn_out": own.attn_out, "mlp_out": own.mlp_out, "resid_post": None}
    return [_of_output(whole if component == "resid_post" else added, at(leaving[component]), rows)]


def _forward(model: Any, tokens: Tensor, changes: Sequence[tuple[Place, Change]]) -> Tensor:
    with ExitStack() as stack:
        for place, change in changes:
            for handle in _hooks(model, tokens, Place(*place), change):
                stack.enter_context(handle)
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits


@torch.no_grad()
def run(model: Any, tokens: Tensor, changes: Sequence[tuple[Place, Change]] = ()) -> Tensor:
    """Logits with several changes in one forward pass; changes of one component of one layer act in list order."""
    return _forward(model, tokens, changes)


def slope(model: Any, tokens: Tensor, score: Callable[[Tensor], Tensor], place: Place) -> tuple[Tensor, Tensor]:
    """What stands at a place, and the gradient of the summed score by it."""
    leaf = read(model, tokens, place)[0].requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(score(_forward(model, tokens, [(place, _fixed(leaf))])).sum(), [leaf])
    return leaf.detach(), found


def read(model: Any, tokens: Tensor, *places: Place) -> list[Tensor]:
    """Values at places in one untouched run."""
    seen: dict[str, Tensor] = {}
    run(model, tokens, [_reader(seen, Place(*place)) for place in places])
    return [seen[str(Place(*place))] for place in places]


def write(model: Any, tokens: Tensor, place: Place, new: Tensor | float) -> Tensor:
    """Logits where a place is set to ``new``, which broadcasts to the place's value."""
    return run(model, tokens, [(place, _fixed(new))])


def add(model: Any, tokens: Tensor, place: Place, vector: Tensor) -> Tensor:
    """Logits where a vector is added at a place."""
    return run(model, tokens, [(place, lambda old: old + vector)])


def patch(model: Any, tokens: Tensor, place: Place, source: Tensor) -> Tensor:
    """Logits where a place has the value that it has in another run."""
    return write(model, tokens, place, read(model, source, place)[0])
