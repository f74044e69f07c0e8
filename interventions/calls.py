"""What needs weights, done by calling modules: for servers that run jobs apart from the weights.

NDIF runs what it does not trust in a process that has the model's structure alone, where a module can be called inside
a trace but not looked into. Plain functions, as in `traces`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from .projections import side_by_side, sides, split
from .rows import called
from .traces import nothing

FAR = 1e4
"""How far apart the numbers are that a norm is called with, so that what it adds to their variance does not count."""


def weights_of(root: Any, parts: dict[str, Any], layer: int, like: torch.Tensor) -> list[torch.Tensor | None]:
    """The fields of `HeadWeights` of a layer, read; or what its modules make of unit vectors, where they cannot be."""
    return weights_called(root, parts, layer, like) if parts["apart"] else weights_read(root, parts, layer)


def weights_read(root: Any, parts: dict[str, Any], layer: int) -> list[torch.Tensor | None]:
    """From the modules themselves."""
    block, paths = parts["blocks"][layer]._module, parts["paths"]
    matrices = {}
    for name in ("q", "k", "v", "qkv", "out"):
        if name in paths:
            weight = operator.attrgetter(paths[name])(block).weight.detach()
            matrices[name] = weight if parts["transposed"] else weight.T
    if parts["layout"] == "apart":
        qkv = [matrices[side] for side in ("q", "k", "v")]
    else:
        whole = matrices["qkv"]
        qkv = list(split(parts, side_by_side(whole, parts["heads"]) if parts["layout"] == "by head" else whole))
    gains = [
        operator.attrgetter(paths[name])(block).weight.detach() + parts["gain_offset"] if name in paths else None
        for name in ("norm_1", "q_norm", "k_norm")
    ]
    return [*by_head(parts, qkv, matrices["out"]), *gains]


def weights_called(root: Any, parts: dict[str, Any], layer: int, like: torch.Tensor) -> list[torch.Tensor | None]:
    """From calls of the modules."""
    block, paths = parts["blocks"][layer], parts["paths"]
    gains: list[torch.Tensor | None] = []
    sizes = (like.shape[-1], parts["heads"] * parts["d_head"])
    with torch.no_grad(), root.trace(nothing(like.device), use_cache=False):
        units, wide = (torch.eye(size, dtype=like.dtype, device=like.device) for size in sizes)
        qkv = [
            a - b for a, b in zip(sides(parts, block, units), sides(parts, block, torch.zeros_like(units)), strict=True)
        ]
        out = called(block, paths["out"], wide) - called(block, paths["out"], torch.zeros_like(wide))
        for name, size in (("norm_1", sizes[0]), ("q_norm", parts["d_head"]), ("k_norm", parts["d_head"])):
            if name not in paths:
                gains.append(None)
                continue
            order = torch.arange(size, device=like.device)
            far = (FAR * (1 - 2 * (order % 2)) * (1 + order / size)).to(like.dtype)[None]
            normed = far - far.mean() if parts["centred"] else far
            made = called(block, paths[name], far) - called(block, paths[name], -far)
            gains.append((made / 2 * normed.pow(2).mean().sqrt() / normed)[0])
    return [*by_head(parts, qkv, out), *gains]


def by_head(parts: dict[str, Any], qkv: list[torch.Tensor], out: torch.Tensor) -> list[torch.Tensor]:
    """Matrices ``(input, output)`` with a head as their first axis."""
    d_head = parts["d_head"]
    return [*(one.reshape(len(one), -1, d_head).transpose(0, 1) for one in qkv), out.reshape(-1, d_head, out.shape[1])]
