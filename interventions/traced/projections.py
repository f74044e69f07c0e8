"""From the normed stream to q, k and v, and what heads write back. Runs inside a trace: plain functions.

Imports torch and `rows`. q, k and v of all heads lie side by side wherever headwise handles them. A family keeps them
so (``"side by side"``), one head after the other in one matrix (``"by head"``), or in three matrices (``"apart"``).
``model`` is the dict that `forward` describes. Some columns of a weight are read only where the module is a plain
linear layer with nothing around it, and where the weights are here (not where ``apart`` is set); else the module is
called.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

from .rows import call_module, split_last_axis
from .structure import is_linear


def sides(model: dict[str, Any], block: Any, normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v of all heads, through the family's own modules."""
    if model["layout"] == "apart":
        return tuple(call_module(block, model["paths"][side], normed) for side in ("q", "k", "v"))
    whole = call_module(block, model["paths"]["qkv"], normed)
    return split(model, side_by_side(whole, model["heads"]) if model["layout"] == "by head" else whole)


def split(model: dict[str, Any], qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v from where they lie side by side."""
    ends = [model["heads"] * model["d_head"], (model["heads"] + model["kv_heads"]) * model["d_head"]]
    return qkv[..., : ends[0]], qkv[..., ends[0] : ends[1]], qkv[..., ends[1] :]


def project(model: dict[str, Any], block: Any, normed: torch.Tensor, columns: slice) -> torch.Tensor:
    """These columns of q, k and v side by side."""
    names = ("q", "k", "v") if model["layout"] == "apart" else ("qkv",)
    if not all([is_readable(model, operator.attrgetter(model["paths"][name])(block)) for name in names]):
        return torch.cat(sides(model, block, normed), -1)[..., columns]
    if model["layout"] == "apart":
        parts, first = [], 0
        for side in ("q", "k", "v"):
            module = operator.attrgetter(model["paths"][side])(block)
            size = module.weight.shape[0]
            start, stop = max(columns.start - first, 0), min(columns.stop - first, size)
            if start < stop:
                parts.append(linear(normed, module, slice(start, stop)))
            first += size
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    module = operator.attrgetter(model["paths"]["qkv"])(block)
    if model["transposed"]:
        made: torch.Tensor = normed @ module.weight[:, columns]
        return made if module.bias is None else made + module.bias[columns]
    if model["layout"] == "by head":
        order = torch.arange(3 * model["heads"] * model["d_head"], device=normed.device)
        return linear(normed, module, side_by_side(order, model["heads"])[columns])
    return linear(normed, module, columns)


def is_readable(model: dict[str, Any], module: Any) -> bool:
    """Whether rows of the weight of a linear layer are what the layer computes with; `module` may be its handle."""
    return not model["apart"] and is_linear(getattr(module, "_module", module))


def linear(value: torch.Tensor, module: Any, rows: Any) -> torch.Tensor:
    """Some outputs of a linear layer."""
    return F.linear(value, module.weight[rows], None if module.bias is None else module.bias[rows])


def combine(model: dict[str, Any], block: Any, z: torch.Tensor, columns: slice) -> torch.Tensor:
    """What these columns of ``z`` write into the stream, without bias."""
    if not is_readable(model, operator.attrgetter(model["paths"]["out"])(block)):
        full = torch.zeros(*z.shape[:-1], model["heads"] * model["d_head"], dtype=z.dtype, device=z.device)
        full[..., columns] = z
        return call_module(block, model["paths"]["out"], full) - call_module(
            block, model["paths"]["out"], torch.zeros_like(full)
        )
    weight = operator.attrgetter(model["paths"]["out"])(block).weight
    written: torch.Tensor = z @ (weight[columns] if model["transposed"] else weight[:, columns].T)
    return written


def side_by_side(by_head: torch.Tensor, heads: int) -> torch.Tensor:
    """q, k and v side by side, from one head after the other."""
    return split_last_axis(by_head, heads, 3, -1).transpose(-2, -3).flatten(-3)


def by_heads(sides: torch.Tensor, heads: int) -> torch.Tensor:
    """The other way round."""
    return split_last_axis(sides, 3, heads, -1).transpose(-2, -3).flatten(-3)
