"""From q and k to what scores are made from: their norms, and rotary embedding. Runs inside a trace; imports `rows`.

``model`` is the dict that `forward` describes. In models that have neither, all is passed on as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from .rows import call_module, split_last_axis

Angles = tuple[torch.Tensor, torch.Tensor] | None


def angles(model: dict[str, Any], like: torch.Tensor, length: int) -> Angles:
    """Cosines and sines by which the model's own module turns positions 0, 1, ... ``(position, turned dimension)``."""
    if model["rotary"] is None:
        return None
    cos, sin = model["rotary"](like, torch.arange(length, device=like.device)[None])
    return cos[0], sin[0]


def rotated(
    model: dict[str, Any], found: Angles, block: Any, side: str, value: torch.Tensor, at: torch.Tensor | slice
) -> torch.Tensor:
    """Norm and turn q or k ``(row, position, head * d_head)``, which stand at positions `at`."""
    norm = model["paths"].get(f"{side}_norm")
    if norm is None and found is None:
        return value
    each = split_last_axis(value, -1, model["d_head"])
    if norm is not None:
        each = call_module(block, norm, each)
    if found is not None:
        cos, sin = (part[at].unsqueeze(1) for part in found)
        size = cos.shape[-1]
        first, second = each[..., : size // 2], each[..., size // 2 : size]
        spun = each[..., :size] * cos + torch.cat([-second, first], -1) * sin
        each = spun if size == model["d_head"] else torch.cat([spun, each[..., size:]], -1)
    return each.flatten(-2)


def rotated_sides(model: dict[str, Any], found: Angles, block: Any, qkv: torch.Tensor) -> torch.Tensor:
    """Give q and k side by side, of all positions, as scores are made from them."""
    d_head = model["d_head"]
    width, whole = model["heads"] * d_head, (model["heads"] + model["kv_heads"]) * d_head
    if found is None and "q_norm" not in model["paths"]:
        return qkv[..., :whole]
    at = slice(0, qkv.shape[1])
    q = rotated(model, found, block, "q", qkv[..., :width], at)
    return torch.cat([q, rotated(model, found, block, "k", qkv[..., width:whole], at)], -1)
