"""From the normed stream to q, k and v as scores are made from them, and what heads write back. Runs inside a trace.

q, k and v of all heads lie side by side wherever headwise handles them. A family keeps them
so (``"side by side"``), one head after the other in one matrix (``"by head"``), or in three matrices (``"apart"``).
Some columns of a weight are read only where the module is a plain
linear layer with nothing around it, and where the weights are here (not where ``apart`` is set); else the module is
called. After the projections come the norms of q and k, and their rotation by position; models that have neither pass
q and k on as they are.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .rows import call_module, split_last_axis
from .structure import is_linear

if TYPE_CHECKING:
    from .specs import Angles, BlockLayout, ModelParts


def sides(model: BlockLayout, block: Any, normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v of all heads, through the family's own modules."""
    if model["layout"] == "apart":
        return tuple(call_module(block, model["paths"][side], normed) for side in ("q", "k", "v"))
    qkv = call_module(block, model["paths"]["qkv"], normed)
    return split_sides(model, side_by_side(qkv, model["heads"]) if model["layout"] == "by head" else qkv)


def split_sides(model: BlockLayout, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v from where they lie side by side."""
    ends = [model["heads"] * model["d_head"], (model["heads"] + model["kv_heads"]) * model["d_head"]]
    return qkv[..., : ends[0]], qkv[..., ends[0] : ends[1]], qkv[..., ends[1] :]


def project(model: ModelParts, block: Any, normed: torch.Tensor, columns: slice) -> torch.Tensor:
    """These columns of q, k and v side by side.

    Parameters
    ----------
    model : ModelParts
    block : nnsight handle
    normed : tensor (row, position, d_model)
    columns : slice

    Returns
    -------
    tensor (row, position, column)
    """
    names = ("q", "k", "v") if model["layout"] == "apart" else ("qkv",)
    if not all([is_readable(model["apart"], operator.attrgetter(model["paths"][name])(block)) for name in names]):
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


def is_readable(apart: bool, module: Any) -> bool:
    """Whether rows of the weight of a linear layer are what the layer computes with; `module` may be its handle."""
    return not apart and is_linear(getattr(module, "_module", module))


def linear(value: torch.Tensor, module: Any, rows: Any) -> torch.Tensor:
    """Some outputs of a linear layer."""
    return F.linear(value, module.weight[rows], None if module.bias is None else module.bias[rows])


def combine(model: ModelParts, block: Any, z: torch.Tensor, columns: slice) -> torch.Tensor:
    """What these columns of ``z`` write into the stream, without bias.

    Parameters
    ----------
    model : ModelParts
    block : nnsight handle
    z : tensor (..., column)
    columns : slice
        Of ``z`` of all heads.

    Returns
    -------
    tensor (..., d_model)
    """
    if not is_readable(model["apart"], operator.attrgetter(model["paths"]["out"])(block)):
        full = torch.zeros(*z.shape[:-1], model["heads"] * model["d_head"], dtype=z.dtype, device=z.device)
        full[..., columns] = z
        return call_module(block, model["paths"]["out"], full) - call_module(
            block, model["paths"]["out"], torch.zeros_like(full)
        )
    weight = operator.attrgetter(model["paths"]["out"])(block).weight
    written: torch.Tensor = z @ (weight[columns] if model["transposed"] else weight[:, columns].T)
    return written


def side_by_side(by_head: torch.Tensor, heads: int, kv_heads: int = 0) -> torch.Tensor:
    """q, k and v side by side, from one key-value head after the other: q of those that read it, its k and its v."""
    if kv_heads in (0, heads):
        return split_last_axis(by_head, heads, 3, -1).transpose(-2, -3).flatten(-3)
    every = split_last_axis(by_head, kv_heads, heads // kv_heads + 2, -1)
    return torch.cat([every[..., :-2, :].flatten(-3), every[..., -2, :].flatten(-2), every[..., -1, :].flatten(-2)], -1)


def head_by_head(sides: torch.Tensor, heads: int, kv_heads: int = 0) -> torch.Tensor:
    """One key-value head after the other, from q, k and v side by side."""
    if kv_heads in (0, heads):
        return split_last_axis(sides, 3, heads, -1).transpose(-2, -3).flatten(-3)
    size = sides.shape[-1] // (heads + 2 * kv_heads)
    ends = [0, heads * size, (heads + kv_heads) * size, sides.shape[-1]]
    every = [split_last_axis(sides[..., ends[at] : ends[at + 1]], kv_heads, -1, size) for at in range(3)]
    return torch.cat(every, -2).flatten(-3)


def rotary_angles(model: ModelParts, like: torch.Tensor, length: int) -> list[Angles]:
    """Cosines and sines by which the model's own module rotates positions 0, 1, ..., by layer."""
    if model["rotary"] is None:
        return [None] * model["layers"]
    made = {kind: None if kind is None else angles_of_kind(model, like, length, kind) for kind in {*model["kinds"]}}
    return [made[kind] for kind in model["kinds"]]


def angles_of_kind(model: ModelParts, like: torch.Tensor, length: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of one kind of layer.

    Parameters
    ----------
    model : ModelParts
    like : tensor
        Has the number format and the device.
    length : int
        Positions.
    kind : str
        Of a layer, where angles differ by it; else empty.

    Returns
    -------
    tuple of tensors (position, rotated dimension)
    """
    if isinstance(model["rotary"], torch.Tensor):  # sines and cosines of all positions
        sin, cos = at_hand(model, model["rotary"])[:length].to(like).chunk(2, -1)
    else:
        more = (kind,) if kind else ()
        cos, sin = (one[0] for one in model["rotary"](like, torch.arange(length, device=like.device)[None], *more))
    if model["paired"] and model["neighbours"]:
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    return (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)) if model["paired"] else (cos, sin)


def at_hand(model: ModelParts, values: torch.Tensor) -> torch.Tensor:
    """Numbers of the model itself, which a job apart from the weights does not have."""
    if model["apart"]:
        raise RuntimeError("this server runs jobs apart from the weights, which attention of this model is made from")
    return values


def sinks_of(model: ModelParts, block: Any) -> torch.Tensor | None:
    """The number ``(head,)`` that stands beside the scores of each head; None where there is none."""
    path = model["paths"].get("sinks")
    return None if path is None else at_hand(model, operator.attrgetter(path)(block))


def rotated(
    model: ModelParts, angles: Angles, block: Any, side: str, value: torch.Tensor, at: torch.Tensor | slice
) -> torch.Tensor:
    """Norm and rotate q or k ``(row, position, head * d_head)``, which stand at positions `at`.

    Parameters
    ----------
    model : ModelParts
    angles : Angles
    block : nnsight handle
    side : {"q", "k"}
    value : tensor (row, position, head * d_head)
    at : slice or tensor
        Positions of it.

    Returns
    -------
    tensor (row, position, head * d_head)
    """
    norm = model["paths"].get(f"{side}_norm")
    if norm is None and angles is None:
        return value
    if norm is not None and model["joint_norms"]:
        value, norm = call_module(block, norm, value), None
    each = split_last_axis(value, -1, model["d_head"])
    if norm is not None:
        each = call_module(block, norm, each)
    if angles is not None:
        cos, sin = (part[at].unsqueeze(1) for part in angles)
        each = turned(each, cos, sin, model["neighbours"])
    return each.flatten(-2).to(value.dtype)  # angles may be wider


def turned(each: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """Rotate the first dimensions of vectors ``(..., d_head)``, as many as there are cosines.

    Parameters
    ----------
    each : tensor (..., d_head)
    cos, sin : tensor (..., rotated dimension)
    neighbours : bool
        Whether neighbouring dimensions turn together, and not those of the first half with those of the second.

    Returns
    -------
    tensor (..., d_head)
    """
    size = cos.shape[-1]
    if neighbours:
        first, second = each[..., 0:size:2], each[..., 1:size:2]
        across = torch.stack([-second, first], -1).flatten(-2)
    else:
        first, second = each[..., : size // 2], each[..., size // 2 : size]
        across = torch.cat([-second, first], -1)
    front = each[..., :size] * cos + across * sin
    return front if size == each.shape[-1] else torch.cat([front, each[..., size:]], -1)


def rotated_sides(model: ModelParts, angles: Angles, block: Any, qkv: torch.Tensor) -> torch.Tensor:
    """Give q and k side by side, of all positions, as scores are made from them; and the sinks, where there are any.

    Parameters
    ----------
    model : ModelParts
    angles : Angles
    block : nnsight handle
    qkv : tensor (row, position, width)
        Of all positions of a prompt.

    Returns
    -------
    tensor (row, position, width of q and k, and a column for the sink of each head)
    """
    d_head, sinks = model["d_head"], sinks_of(model, block)
    width, both = model["heads"] * d_head, (model["heads"] + model["kv_heads"]) * d_head
    beside = [] if sinks is None else [sinks.to(qkv.dtype).expand(*qkv.shape[:2], -1)]
    if angles is None and "q_norm" not in model["paths"]:
        return torch.cat([qkv[..., :both], *beside], -1) if beside else qkv[..., :both]
    at = slice(0, qkv.shape[1])
    q = rotated(model, angles, block, "q", qkv[..., :width], at)
    return torch.cat([q, rotated(model, angles, block, "k", qkv[..., width:both], at), *beside], -1)
