"""What runs inside a trace: plain functions of tensors, numbers, slices and handles. A leaf: imports torch only.

Nothing here may need this package where it runs: no classes of ours, no closures over them, no imports in functions.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

POINT_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "pattern": "qkv", "head_out": "z"}
"""Component to the point where it is found; the others are points themselves."""


def columns(component: str, head: int | None, heads: int, d_head: int) -> slice:
    """Columns of a component (of one head, or of all) in the last axis of the tensor at its point."""
    start = {"k": 1, "v": 2}.get(component, 0) * heads * d_head
    if component not in ("q", "k", "v", "z"):
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


def write(value: torch.Tensor, writes: list[Any]) -> torch.Tensor:
    """A copy of `value` (row, position, column) with each ``(rows, positions, columns, new)`` put in; None is zeros."""
    changed = value.clone()
    for rows, positions, cols, new in writes:
        where = slice(None) if positions is None else positions
        changed[rows, where, cols] = 0 if new is None else new.to(changed.dtype)
    return changed


def less(value: torch.Tensor, writes: list[Any]) -> list[Any]:
    """The writes that make a sum with `value` what `writes` say, in the same places and nowhere else."""
    left = []
    for rows, positions, cols, new in writes:
        there = value[rows, slice(None) if positions is None else positions, cols]
        left.append((rows, positions, cols, -there if new is None else new - there))
    return left


def take(block: Any, path: str, side: str) -> torch.Tensor:
    """The value at a point of a block (the first, where a module returns several)."""
    place = operator.attrgetter(path)(block) if path else block
    value: Any = place.input if side == "input" else place.output
    whole: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return whole


def put(block: Any, path: str, side: str, value: torch.Tensor) -> None:
    """Replace the value at a point of a block."""
    place = operator.attrgetter(path)(block) if path else block
    if side == "input":
        place.input = value
        return
    whole = place.output
    place.output = (value, *whole[1:]) if isinstance(whole, tuple) else value


def walk(
    blocks: Any,
    points: list[tuple[str, str, str]],
    layers: int,
    writes: dict[tuple[int, str], list[Any]],
    reads: set[tuple[int, str]],
    attend: list[Any],
    heads: int,
    scalings: list[float],
) -> tuple[dict[tuple[int, str], torch.Tensor], dict[str, torch.Tensor]]:
    """Go through the blocks in forward order, replacing and reading.

    Parameters
    ----------
    blocks : nnsight handle of the list of blocks
    points : list of (name, path, side)
        In forward order; ``resid_pre``, ``attn_out`` and ``resid_mid`` among them.
    layers : int
    writes : dict
        ``(layer, point)`` to a list for `write`.
    reads : set of (layer, point)
    attend : list of (name, kernel, arguments)
        Kernels of attention patterns: ``kernel(pattern, **arguments) -> (row, head)``.
    heads : int
    scalings : list of float
        Factor of the attention scores of each layer.

    Returns
    -------
    taken : dict
        ``(layer, point)`` to the tensor there, after any writes.
    attended : dict
        Kernel name to ``(row, layer, head)``.
    """
    taken: dict[tuple[int, str], torch.Tensor] = {}
    attended: dict[str, list[torch.Tensor]] = {name: [] for name, _, _ in attend}
    for layer in range(layers):
        block = blocks[layer]
        sets_mid = (layer, "resid_mid") in writes
        for name, path, side in points:
            at = (layer, name)
            through = sets_mid and name in ("resid_pre", "attn_out")
            if (name == "resid_mid" and sets_mid) or not (
                at in writes or at in reads or through or (attend and name == "qkv")
            ):
                continue
            value = take(block, path, side)
            if at in writes:
                value = write(value, writes[at])
                put(block, path, side, value)
            if at in reads:
                taken[at] = value
            if name == "qkv" and attend:
                pattern = pattern_at(value, heads, scalings[layer])
                for kernel_name, kernel, arguments in attend:
                    attended[kernel_name].append(kernel(pattern, **arguments))
            if sets_mid and name == "resid_pre":
                entering = value
            if sets_mid and name == "attn_out":
                # The stream between attention and MLP goes on past the MLP as well, so it is set through attn_out.
                put(block, path, side, write(value, less(entering, writes[(layer, "resid_mid")])))
    return taken, {name: torch.stack(values, dim=1) for name, values in attended.items()}
