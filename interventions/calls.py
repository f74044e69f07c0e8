"""What needs weights, done by calling modules: for servers that run jobs apart from the weights.

NDIF runs what it does not trust in a process that has the model's structure alone, where a module can be called inside
a trace but not looked into. Plain functions, as in `traces`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .rows import called
from .traces import nothing

FAR = 1e4
"""How far apart the numbers are that a norm is called with, so that what it adds to their variance does not count."""


def by_calls(root: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """`parts` with functions that call modules, where the weights are elsewhere; else as they are."""
    if not next(iter(root._module.parameters())).is_meta:
        return {**parts, "apart": False}
    paths, width = parts["paths"], parts["heads"] * parts["d_head"]
    return {
        **parts,
        "apart": True,
        "project": functools.partial(project, paths["qkv"]),
        "combine": functools.partial(combine, paths["out"], width),
    }


def project(path: str, block: Any, normed: torch.Tensor, columns: slice) -> torch.Tensor:
    """Some columns of q, k and v."""
    return called(block, path, normed)[..., columns]


def combine(path: str, width: int, block: Any, z: torch.Tensor, columns: slice) -> torch.Tensor:
    """What some columns of ``z`` write, without bias."""
    full = torch.zeros(*z.shape[:-1], width, dtype=z.dtype, device=z.device)
    full[..., columns] = z
    return called(block, path, full) - called(block, path, torch.zeros_like(full))


def weights(root: Any, parts: dict[str, Any], layer: int, like: torch.Tensor) -> list[torch.Tensor]:
    """``W_Q W_K W_V W_O gain`` of a layer: what its modules make of unit vectors."""
    block, paths = parts["blocks"][layer], parts["paths"]
    heads, d_model, width = parts["heads"], like.shape[-1], parts["heads"] * parts["d_head"]
    far = torch.linspace(-FAR, FAR, d_model, dtype=like.dtype, device=like.device)[None]
    with torch.no_grad(), root.trace(nothing(like.device), use_cache=False) as tracer:
        units = torch.eye(d_model, dtype=like.dtype, device=like.device)
        sides = called(block, paths["qkv"], units) - called(block, paths["qkv"], torch.zeros_like(units))
        units = torch.eye(width, dtype=like.dtype, device=like.device)
        out = called(block, paths["out"], units) - called(block, paths["out"], torch.zeros_like(units))
        gain = (called(block, paths["norm_1"], far) - called(block, paths["norm_1"], -far))[0] / 2
        tracer.stop()
    q, k, v = (side.reshape(d_model, heads, -1).transpose(0, 1) for side in sides.chunk(3, -1))
    normed = (far - far.mean()) / far.var(correction=0).sqrt()
    return [q, k, v, out.reshape(heads, -1, d_model), gain / normed[0]]
