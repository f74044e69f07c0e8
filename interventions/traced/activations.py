"""What runs inside a trace of the model's own forward pass: reading and replacing. Imports torch and its parts.

Plain functions of tensors, numbers, slices and handles: nothing here may need this package where it runs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from .attention import hidden_keys
from .projections import by_heads, side_by_side
from .rotary import angles, rotated_sides


def columns(component: str, head: int | None, heads: int, d_head: int, kv_heads: int) -> slice:
    """Columns of a component (of one head, or of all) in the last axis of the tensor at its point."""
    count = kv_heads if component in ("k", "v", "k_rot") else heads
    start = {"k": heads, "k_rot": heads, "v": heads + kv_heads}.get(component, 0) * d_head
    if component not in ("q", "k", "v", "q_rot", "k_rot", "z", "head_out"):
        return slice(None)
    if head is None:
        return slice(start, start + count * d_head)
    return slice(start + head * d_head, start + (head + 1) * d_head)


def split_heads(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``(example, position, head * width)`` as ``(example, position, head, width)``."""
    return value.reshape(*value.shape[:-1], heads, -1)


def attention_pattern(q: torch.Tensor, k: torch.Tensor, scaling: float, window: int | None = None) -> torch.Tensor:
    """Causal attention weights from q and k of shape ``(example, position, head, d_head)``.

    Returns ``(example, head, query, key)``, float32 at least, whatever implementation of attention the model itself
    uses. k may have fewer heads, each of which as many neighbours of q read; a query sees `window` keys back, itself
    among them.
    """
    k = k if k.shape[2] == q.shape[2] else k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("eqhd,ekhd->ehqk", q.to(wide), k.to(wide)) * scaling
    hidden = hidden_keys(torch.arange(q.shape[1], device=q.device), k.shape[1], window)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def pattern_at(model: dict[str, Any], layer: int, turned: torch.Tensor) -> torch.Tensor:
    """Attention weights of all heads of a layer from q and k side by side, turned as they are where scores are made."""
    both = split_heads(turned, model["heads"] + model["kv_heads"])
    q, k = both[:, :, : model["heads"]], both[:, :, model["heads"] :]
    return attention_pattern(q, k, model["scalings"][layer], model["windows"][layer])


def take(root: Any, path: str, side: str) -> torch.Tensor:
    """The value at a side of a module (the first, where a module returns several)."""
    place = operator.attrgetter(path)(root) if path else root
    value: Any = place.input if side == "input" else place.output
    whole: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return whole


def replace(root: Any, path: str, side: str, value: torch.Tensor) -> None:
    """Replace the value at a side of a module."""
    place = operator.attrgetter(path)(root) if path else root
    if side == "input":
        place.input = value
        return
    whole = place.output
    place.output = (value, *whole[1:]) if isinstance(whole, tuple) else value


def added(value: torch.Tensor, changes: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """A copy of `value` with a change added to each of some rows."""
    changed = value.clone()
    for row, change in changes:
        changed[row] += change.to(changed.dtype)
    return changed


def pattern_between(
    turned: torch.Tensor, q: slice, k: slice, d_head: int, scaling: float, window: int | None
) -> torch.Tensor:
    """Attention weights of the heads whose columns of q and k, turned and side by side, these are."""
    queries, keys = (split_heads(turned[..., at], turned[..., at].shape[-1] // d_head) for at in (q, k))
    return attention_pattern(queries, keys, scaling, window)


def taken_at(
    model: dict[str, Any], block: Any, name: str, parts: list[tuple[str, str]], changes: list[tuple[int, torch.Tensor]]
) -> torch.Tensor:
    """What is at a point of a block, q, k and v side by side; with changes, if any, added to some rows there."""
    ordered = name == "qkv" and model["layout"] == "by head"
    found, first = [], 0
    for path, side in parts:
        value = take(block, path, side)
        value = side_by_side(value, model["heads"]) if ordered else value
        if changes:
            last = first + value.shape[-1]
            value = added(value, [(row, change[..., first:last]) for row, change in changes])
            replace(block, path, side, by_heads(value, model["heads"]) if ordered else value)
            first = last
        found.append(value)
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def read_activations(
    root: Any,
    model: dict[str, Any],
    embeddings: list[tuple[str, str]],
    points: list[tuple[str, list[tuple[str, str]]]],
    layers: int,
    reads: set[tuple[int, str]],
    watch: list[Any],
    writes: dict[tuple[int, str], list[tuple[int, torch.Tensor]]],
) -> tuple[dict[tuple[int, str], torch.Tensor], dict[str, torch.Tensor]]:
    """Go through the model in forward order, reading and (for checks) adding.

    Parameters
    ----------
    root : nnsight handle of the model
    model : dict
        As `forward` describes it.
    embeddings : list of (name, path)
        Read as if in layer 0, before it.
    points : list of (name, list of (path, side))
        Of a block, in forward order.
    layers : int
    reads : set of (layer, point)
        A point is one of `points`, or ``turned``: q and k side by side as scores are made from them.
    watch : list of (name, kernel, arguments)
        Kernels of attention patterns: ``kernel(pattern, **arguments) -> (row, head)``.
    writes : dict
        ``(layer, point)`` to a list for `added`; not ``resid_mid``, which no module's output is.

    Returns
    -------
    taken : dict
        ``(layer, point)`` to the tensor there, after any writes.
    attended : dict
        Kernel name to ``(row, layer, head)``.
    """
    taken: dict[tuple[int, str], torch.Tensor] = {}
    attended: dict[str, list[torch.Tensor]] = {name: [] for name, _, _ in watch}
    found = None
    for name, path in embeddings:
        if (0, name) in reads:
            taken[(0, name)] = take(root, path, "output")
    for layer in range(layers):
        for name, parts in points:
            at = (layer, name)
            turns = name == "qkv" and (watch or (layer, "turned") in reads)
            if not (at in writes or at in reads or turns):
                continue
            value = taken_at(model, model["blocks"][layer], name, parts, writes.get(at, []))
            if at in reads:
                taken[at] = value
            if turns:
                found = angles(model, value, value.shape[1]) if found is None else found
                turned = rotated_sides(model, found, model["blocks"][layer], value)
                if (layer, "turned") in reads:
                    taken[(layer, "turned")] = turned
            if turns and watch:
                pattern = pattern_at(model, layer, turned)
                for kernel_name, kernel, arguments in watch:
                    attended[kernel_name].append(kernel(pattern, **arguments))
    return taken, {name: torch.stack(values, dim=1) for name, values in attended.items()}
