"""Owns the second opinion on path patching, gradients and every kind of write: plain torch hooks on a GPT-2.

Imports torch and transformers only, and shares nothing with `raw_hooks`. Every function takes a `GPT2LMHeadModel` in
eval mode and token ids (example, position) without padding. What a component is, and the shape of its value at a place
(``n`` counts the place's positions; with ``head=None`` q, k, v, z have all heads: (example, n, head, d_head)):

==================  ==================================================================  ==========================
``embed``           output of ``wte`` (the place's layer is ignored)                    (example, n, d_model)
``pos_embed``       output of ``wpe``, given an example axis (layer ignored)            (example, n, d_model)
``resid_pre``       input of the block                                                  (example, n, d_model)
``attn_in``         input of ``attn.c_attn``                                            (example, n, d_model)
``q k v``           the head's part of ``attn.c_attn``'s output                         (example, n, d_head)
``pattern``         attention after the softmax; the positions are queries              (example, n, key)
``z``               the head's part of ``attn.c_proj``'s input                          (example, n, d_head)
``head_out``        z of the head times its rows of ``c_proj``'s weight, without bias   (example, n, d_model)
``attn_out``        output of ``attn``, bias included                                   (example, n, d_model)
``resid_mid``       input of ``ln_2``, and what the block adds the MLP's output to      (example, n, d_model)
``mlp_in``          input of ``mlp.c_fc``                                               (example, n, d_model)
``mlp_pre``         output of ``mlp.c_fc``; with a head, the number of a neuron         (example, n, neuron)
``mlp_post``        input of ``mlp.c_proj``; the same                                   (example, n, neuron)
``mlp_out``         output of ``mlp``                                                   (example, n, d_model)
``resid_post``      output of the block                                                 (example, n, d_model)
==================  ==================================================================  ==========================

The pattern is worked out from the output of ``c_attn``, never asked of the model, and what comes of it is put over the
head's part of z: nothing here depends on the attention implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

QKV = ("q", "k", "v")
ONE_HEAD = ("pattern", "head_out")
PER_HEAD = (*QKV, "z", *ONE_HEAD)
PER_NEURON = ("mlp_pre", "mlp_post")
OF_STREAM = ("embed", "pos_embed", "resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
COMPONENTS = (*PER_HEAD, *PER_NEURON, *OF_STREAM)


class Place(NamedTuple):
    """A component of a layer, of a head or neuron (or None), at some positions (None: all). A tuple serves too."""

    layer: int
    component: str
    head: int | None = None
    positions: Sequence[int] | None = None


Change = Callable[[Tensor], Tensor]
"""From the value at a place to the value that stands there instead, of a shape that broadcasts to it."""

Score = Callable[[Tensor], Tensor]
"""From logits (example, position, vocabulary) to one number per example, differentiable."""


def _at(positions: Sequence[int] | None, *rest: int | None) -> tuple[Any, ...]:
    """Index into (example, position, ...): the positions, kept as an axis, then what ``rest`` picks, dropped."""
    rows = slice(None) if positions is None else list(positions)
    return (slice(None), rows, *(index for index in rest if index is not None))


def _changed(whole: Tensor, where: tuple[Any, ...], change: Change) -> Tensor:
    """Copy of a tensor with one part of it changed."""
    copy = whole.clone()
    copy[where] = change(whole[where])
    return copy


def _fixed(value: Tensor | float) -> Change:
    """The change that puts a given value, whatever stood there."""
    return lambda old: torch.as_tensor(value).to(old).expand_as(old)


def _attention_hooks(
    model: GPT2LMHeadModel, layer: int, head: int, queries: Sequence[int] | None, weigh: Change
) -> list[Any]:
    """Hooks that set z of a head to ``weigh(scores) @ v``; scores are (example, query, key), the future at -inf."""
    attention, seen = model.transformer.h[layer].attn, []

    def look(_module: Any, _args: Any, output: Tensor) -> None:
        parts = output.unflatten(-1, (3, model.config.n_head, -1))
        seen[:] = [parts[:, :, part, head] for part in range(3)]

    def put(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, k, v = seen
        scores = q @ k.transpose(1, 2) * attention.scaling
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = weigh(scores.masked_fill(future, -torch.inf)[_at(queries)])
        z = args[0].unflatten(-1, (model.config.n_head, -1))
        return (_changed(z, _at(queries, head), lambda _old: weights @ v).flatten(2),)

    return [attention.c_attn.register_forward_hook(look), attention.c_proj.register_forward_pre_hook(put)]


def _hooks(model: GPT2LMHeadModel, tokens: Tensor, place: Place, change: Change) -> list[Any]:
    """Hooks that change one place; they act in the order in which they were made."""
    layer, component, head, positions = place
    if component not in COMPONENTS:
        raise ValueError(f"{component!r} is not one of {COMPONENTS}")
    if (head is not None and component in OF_STREAM) or (head is None and component in ONE_HEAD):
        raise ValueError(f"{component!r} cannot be had of head {head}")
    body, block, heads = model.transformer, model.transformer.h[layer], model.config.n_head

    def on_input(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_changed(args[0], _at(positions, head if component in PER_NEURON else None), change), *args[1:])

    def on_output(_module: Any, _args: Any, output: Any) -> Any:
        whole, *rest = output if isinstance(output, tuple) else (output,)
        changed = _changed(whole.expand(tokens.shape[0], -1, -1), _at(positions), change)  # wpe's has one row for all
        return (changed, *rest) if isinstance(output, tuple) else changed

    def on_neurons(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return _changed(output, _at(positions, head), change)

    def on_qkv(_module: Any, _args: Any, output: Tensor) -> Tensor:
        parts = output.unflatten(-1, (3, heads, -1))
        return _changed(parts, _at(positions, QKV.index(component), head), change).flatten(2)

    def on_z(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_changed(args[0].unflatten(-1, (heads, -1)), _at(positions, head), change).flatten(2),)

    def on_head_out(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        z, rows = args[0].unflatten(-1, (heads, -1))[:, :, head], module.weight.unflatten(0, (heads, -1))[head]
        return output + (_changed(z @ rows, _at(positions), change) - z @ rows)

    def on_mid(_module: Any, args: tuple[Tensor, ...]) -> None:
        # In place: the block adds this very tensor to the MLP's output.
        args[0].copy_(_changed(args[0], _at(positions), change))

    if component == "pattern":
        return _attention_hooks(model, layer, head, positions, lambda scores: change(scores.softmax(-1)))
    before = {
        "resid_pre": (block, on_input),
        "attn_in": (block.attn.c_attn, on_input),
        "z": (block.attn.c_proj, on_z),
        "resid_mid": (block.ln_2, on_mid),
        "mlp_in": (block.mlp.c_fc, on_input),
        "mlp_post": (block.mlp.c_proj, on_input),
    }
    if component in before:
        module, hook = before[component]
        return [module.register_forward_pre_hook(hook)]
    after = {
        **dict.fromkeys(QKV, (block.attn.c_attn, on_qkv)),
        "head_out": (block.attn.c_proj, on_head_out),
        "embed": (body.wte, on_output),
        "pos_embed": (body.wpe, on_output),
        "attn_out": (block.attn, on_output),
        "mlp_pre": (block.mlp.c_fc, on_neurons),
        "mlp_out": (block.mlp, on_output),
        "resid_post": (block, on_output),
    }
    module, hook = after[component]
    return [module.register_forward_hook(hook)]


def _forward(model: GPT2LMHeadModel, tokens: Tensor, changes: Sequence[tuple[Place, Change]]) -> Tensor:
    with ExitStack() as stack:
        for place, change in changes:
            for handle in _hooks(model, tokens, place, change):
                stack.enter_context(handle)  # removes the hook at the end
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits


def _reader(seen: dict[str, Tensor], place: Place) -> tuple[Place, Change]:
    """A change that keeps what stands at a place, and notes it under the place's text."""

    def look(old: Tensor) -> Tensor:
        seen[str(place)] = old.clone()
        return old

    return place, look


@torch.no_grad()
def run(model: GPT2LMHeadModel, tokens: Tensor, changes: Sequence[tuple[Place, Change]] = ()) -> Tensor:
    """Logits with several changes in one forward pass; changes of one component of one layer act in list order.

    A pattern or head_out is what q and k, or z, make it: a second change of the same one does not see the first.
    """
    return _forward(model, tokens, changes)


@torch.no_grad()
def read(model: GPT2LMHeadModel, tokens: Tensor, place: Place) -> Tensor:
    """Value at one place in an untouched run."""
    seen: dict[str, Tensor] = {}
    _forward(model, tokens, [_reader(seen, place)])
    return seen[str(place)]


def write(model: GPT2LMHeadModel, tokens: Tensor, place: Place, new: Tensor | float) -> Tensor:
    """Logits where a place is set to ``new``, which broadcasts to the place's value."""
    return run(model, tokens, [(place, _fixed(new))])


def add(model: GPT2LMHeadModel, tokens: Tensor, place: Place, vector: Tensor | float) -> Tensor:
    """Logits where ``vector`` is added at a place."""
    return run(model, tokens, [(place, lambda old: old + vector)])


def scale(model: GPT2LMHeadModel, tokens: Tensor, place: Place, factor: Tensor | float) -> Tensor:
    """Logits where what stands at a place is multiplied by ``factor``."""
    return run(model, tokens, [(place, lambda old: old * factor)])


def without_direction(old: Tensor, vector: Tensor) -> Tensor:
    """What is left of each vector of ``old`` once its part along ``vector`` is taken away; by a projection matrix."""
    column = vector.double()[:, None]
    away = torch.eye(len(vector), dtype=torch.float64) - column @ column.T / (column.T @ column)
    return (old.double() @ away).to(old.dtype)


def project_out(model: GPT2LMHeadModel, tokens: Tensor, place: Place, vector: Tensor) -> Tensor:
    """Logits where what stands at a place has lost its part along ``vector``, which may have any norm."""
    return run(model, tokens, [(place, lambda old: without_direction(old, vector))])


@torch.no_grad()
def knockout(
    model: GPT2LMHeadModel, tokens: Tensor, layer: int, heads: Sequence[int], cells: Sequence[tuple[int, int]]
) -> Tensor:
    """Logits where the given heads' scores are -inf, before the softmax, at the given (query, key) cells.

    A query that is left without any key has no softmax: ValueError.
    """
    queries = sorted({query for query, _ in cells})

    def weigh(scores: Tensor) -> Tensor:
        scores = scores.clone()
        for query, key in cells:
            scores[:, queries.index(query), key] = -torch.inf
        if (scores == -torch.inf).all(-1).any():
            raise ValueError("a query has no key left")
        return scores.softmax(-1)

    with ExitStack() as stack:
        for head in heads:
            for handle in _attention_hooks(model, layer, head, queries, weigh):
                stack.enter_context(handle)
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits


@torch.no_grad()
def path_patch(
    model: GPT2LMHeadModel,
    tokens: Tensor,
    source_tokens: Tensor,
    sender: Place,
    receivers: str | Sequence[Place | str],
    through_mlps: bool,
) -> Tensor:
    """Logits where the receivers alone see the sender of another run, and only by the direct paths.

    The sender is a place of embed, z, attn_out or mlp_out. Receivers are ``"logits"``, or a list of places of q, k, v
    and mlp_in that may hold ``"logits"`` too. MLPs on the way, that of a sending attention's own layer among them,
    belong to the direct paths where ``through_mlps`` says so; attention heads never do.
    """
    sender, mixed = Place(*sender), [receivers] if receivers == "logits" else list(receivers)
    heads = [Place(*receiver) for receiver in mixed if receiver != "logits"]
    reads = (*QKV, "mlp_in")
    if sender.component not in ("embed", "z", "attn_out", "mlp_out") or any(at.component not in reads for at in heads):
        raise ValueError("a sender is embed, z, attn_out or mlp_out; a receiver is q, k, v, mlp_in or 'logits'")
    layers = range(model.config.n_layer)
    end = Place(layers[-1], "resid_post")
    frozen = [Place(n, "z") for n in layers] + ([] if through_mlps else [Place(n, "mlp_out") for n in layers])

    base: dict[str, Tensor] = {}  # pass A: the base run
    _forward(model, tokens, [_reader(base, place) for place in (*frozen, end)])
    sent = read(model, source_tokens, sender)  # pass B: the source run

    direct: dict[str, Tensor] = {}  # pass C: the sender is changed, every head (and MLP) after it stays as it was
    holds = [(place, _fixed(base[str(place)])) for place in frozen]
    listen = [_reader(direct, place) for place in (*heads, end)]
    logits = _forward(model, tokens, [*holds, (sender, _fixed(sent)), *listen])
    if not heads and mixed:
        return logits

    writes = [
        (place, _fixed(direct[str(place)])) for place in heads
    ]  # pass D: the receivers are changed, the rest is free
    if "logits" in mixed:
        writes.append((end, lambda old: old + (direct[str(end)] - base[str(end)])))
    return _forward(model, tokens, writes)


def _slopes(
    model: GPT2LMHeadModel, tokens: Tensor, score: Score, places: Sequence[Place], values: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradient of the score at each place, in a run where the places hold the given values."""
    leaves = [value.detach().clone().requires_grad_() for value in values]
    with torch.enable_grad():
        logits = _forward(model, tokens, [(p, _fixed(leaf)) for p, leaf in zip(places, leaves, strict=True)])
        return torch.autograd.grad(score(logits).sum(), leaves)


def gradient_estimate(
    model: GPT2LMHeadModel, tokens: Tensor, score: Score, place: Place, new: Tensor | float
) -> Tensor:
    """Attribution patching, (example,): sum of (new - old) times the score's gradient at the base run."""
    old = read(model, tokens, place)
    (slope,) = _slopes(model, tokens, score, [place], [old])
    return ((_fixed(new)(old) - old) * slope).flatten(1).sum(1)


def integrated_estimate(
    model: GPT2LMHeadModel, tokens: Tensor, score: Score, places: Sequence[Place], news: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Per place (example,): (new - old) times the gradient's mean on the way, all places moving together.

    The places are of one component of one layer and do not overlap. Each of the equal steps is taken at its middle.
    """
    olds = [read(model, tokens, place) for place in places]
    moves = [_fixed(new)(old) - old for old, new in zip(olds, news, strict=True)]
    totals = [torch.zeros_like(old) for old in olds]
    for step in range(steps):
        values = [old + (step + 0.5) / steps * move for old, move in zip(olds, moves, strict=True)]
        for total, slope in zip(totals, _slopes(model, tokens, score, places, values), strict=True):
            total += slope
    return [(move * total / steps).flatten(1).sum(1) for move, total in zip(moves, totals, strict=True)]
