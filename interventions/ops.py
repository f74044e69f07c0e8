"""What runs inside a trace of the model's own forward pass: reading and replacing. A leaf: imports torch only.

Plain functions of tensors, numbers, slices and handles: nothing here may need this package where it runs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch


def columns(component: str, head: int | None, heads: int, d_head: int) -> slice:
    """Columns of a component (of one head, or of all) in the last axis of the tensor at its point."""
    start = {"k": 1, "v": 2}.get(component, 0) * heads * d_head
    if component not in ("q", "k", "v", "z", "head_out"):
        return slice(None)
    if head is None:
        return slice(start, start + heads * d_head)
    return slice(start + head * d_head, start + (head + 1) * d_head)


def split_heads(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``(example, position, head * width)`` as ``(example, position, head, width)``."""
    return value.reshape(*value.shape[:-1], heads, -1)


def attention_pattern(q: torch.Tensor, k: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention weights from q and k of shape ``(example, position, head, d_head)``.

    Returns ``(example, head, query, key)`` in float32, whatever implementation of attention the model itself uses.
    """
    scores = torch.einsum("eqhd,ekhd->ehqk", q.float(), k.float()) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def pattern_at(qkv: torch.Tensor, heads: int, scaling: float) -> torch.Tensor:
    """Attention weights from q, k and v side by side."""
    q, k, _ = qkv.chunk(3, dim=-1)
    return attention_pattern(split_heads(q, heads), split_heads(k, heads), scaling)


def pattern_between(qkv: torch.Tensor, q: slice, k: slice, heads: int, scaling: float) -> torch.Tensor:
    """Attention weights of the heads whose columns of q and k these are."""
    return attention_pattern(split_heads(qkv[..., q], heads), split_heads(qkv[..., k], heads), scaling)


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


def walk(
    root: Any,
    blocks: Any,
    embeddings: list[tuple[str, str]],
    points: list[tuple[str, str, str]],
    layers: int,
    reads: set[tuple[int, str]],
    watch: list[Any],
    heads: int,
    scalings: list[float],
    writes: dict[tuple[int, str], list[tuple[int, torch.Tensor]]],
) -> tuple[dict[tuple[int, str], torch.Tensor], dict[str, torch.Tensor]]:
    """Go through the model in forward order, reading and (for checks) adding.

    Parameters
    ----------
    root : nnsight handle of the model
    blocks : nnsight handle of the list of blocks
    embeddings : list of (name, path)
        Read as if in layer 0, before it.
    points : list of (name, path, side)
        Of a block, in forward order.
    layers : int
    reads : set of (layer, point)
    watch : list of (name, kernel, arguments)
        Kernels of attention patterns: ``kernel(pattern, **arguments) -> (row, head)``.
    heads : int
    scalings : list of float
        Factor of the attention scores of each layer.
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
    for name, path in embeddings:
        if (0, name) in reads:
            taken[(0, name)] = take(root, path, "output")
    for layer in range(layers):
        for name, path, side in points:
            at = (layer, name)
            if not (at in writes or at in reads or (watch and name == "qkv")):
                continue
            value = take(blocks[layer], path, side)
            if at in writes:
                value = added(value, writes[at])
                replace(blocks[layer], path, side, value)
            if at in reads:
                taken[at] = value
            if name == "qkv" and watch:
                pattern = pattern_at(value, heads, scalings[layer])
                for kernel_name, kernel, arguments in watch:
                    attended[kernel_name].append(kernel(pattern, **arguments))
    return taken, {name: torch.stack(values, dim=1) for name, values in attended.items()}
