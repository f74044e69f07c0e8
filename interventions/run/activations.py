"""The model's own forward pass, traced: what the engine reads of the runs as they are. Owns those traces.

Imports the model handle and ops; knows no plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ...errors import DeclarationError
from ..base.shape import Group
from ..declare.components import Component
from ..declare.sites import Site
from ..models.model import Model
from ..plan.validate import check_site
from ..plan.writes import positions_in
from ..traced import activations, traces
from ..traced.specs import Points

Array = np.ndarray[Any, Any]
AT_ONCE = 64
"""Prompts that are read together."""


def point_of(site: Site) -> tuple[int, str]:
    """Where the tensor that holds a site is found."""
    return site.layer, site.component.point


def native_point(layer: int, name: str, layers: int) -> tuple[int, str]:
    """The point of the model's own forward pass that holds what a planned pass calls ``stream``."""
    if name != "stream":
        return layer, name
    return (layer, "resid_pre") if layer < layers else (layers - 1, "resid_post")


def as_tensor(model: Model, array: Array) -> torch.Tensor:
    """An array where the model is."""
    return torch.as_tensor(np.ascontiguousarray(array), device=model.device)


def nothing(model: Model) -> torch.Tensor:
    """Tokens for a trace that never goes through the model itself."""
    return traces.nothing(model.device)


def described(model: Model) -> dict[str, Any]:
    """`ModelParts` in plain words: `traces.opened` adds the handles."""
    family, shape = model.family, model.shape
    return {
        "blocks": family.blocks,
        "norm": family.modules["norm"],
        "unembed": family.modules["unembed"],
        "rotary": family.modules.get("rotary"),
        **family.layout_of(shape),
        "embeddings": list(family.embeddings.items()),
        "points": list(family.points(shape.parallel)),
        "layers": shape.layers,
        "parallel": shape.parallel,
        "scalings": [model.scaling(layer) for layer in model.layers],
        "windows": [shape.window(layer) for layer in model.layers],
        "apart": False,
    }


def handles(model: Model) -> dict[str, Any]:
    """The same with handles, for traces that run here."""
    return traces.opened(model.traced, described(model))


def read_points(model: Model, tokens: Array, sites: Iterable[Site]) -> Points:
    """The tensors at the points of `sites`, ``(example, position, width)``, from passes without intervention."""
    wanted = {point_of(site) for site in sites}
    parts = handles(model)
    pieces = [
        traces.read(model.traced, parts, as_tensor(model, tokens[start : start + AT_ONCE]), wanted)
        for start in range(0, len(tokens), AT_ONCE)
    ]
    return {at: torch.cat([piece[at] for piece in pieces]) for at in wanted}


def capture_site(model: Model, points: Points, site: Site) -> torch.Tensor:
    """The value of `site` from the tensors of `read_points`, in the shape that `Component` states."""
    shape = model.shape
    point = points[point_of(site)]
    at = positions_in(site, point.shape[1])
    if site.component is Component.pattern:
        pattern = pattern_of(model, point, site)
        pattern = pattern if site.head is None else pattern[:, 0]
        return pattern if at is None else pattern[..., at, :]
    value = point
    if site.component is Component.head_out:
        z = activations.split_heads(point, shape.heads)
        value = torch.einsum("ephd,hdm->ephm", z, model.head_weights(site.layer).W_O)
        value = value if site.head is None else value[:, :, site.head]
    elif site.component.per_head:
        value = point[..., activations.columns(site.component, site.head, shape.heads, shape.d_head, shape.kv_heads)]
        count = shape.kv_heads if site.component.of_keys else shape.heads
        value = activations.split_heads(value, count) if site.head is None else value
    return value if at is None else value[:, at]


def pattern_of(model: Model, rotated: torch.Tensor, site: Site) -> torch.Tensor:
    """Attention weights ``(example, head, query, key)`` of the head of `site`, or of all."""
    shape, head = model.shape, site.head
    key_head = None if head is None else shape.key_head(head)
    q = rotated[..., activations.columns("q_rot", head, shape.heads, shape.d_head, shape.kv_heads)]
    k = rotated[..., activations.columns("k_rot", key_head, shape.heads, shape.d_head, shape.kv_heads)]
    q, k = (activations.split_heads(part, part.shape[-1] // shape.d_head) for part in (q, k))
    return activations.attention_pattern(q, k, model.scaling(site.layer), shape.window(site.layer))


def check_sites(model: Model, sites: Sequence[Site], groups: Sequence[Group]) -> None:
    """Refuse sites that the model or the prompts do not have."""
    if not sites:
        raise DeclarationError("nothing to capture: name at least one site, such as Head(1, 2).pattern")
    for site in sites:
        check_site(site, model.name, model.shape, groups)
