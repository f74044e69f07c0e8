"""Activations of the model's own forward pass: where they are found, and what a trace has to know of the model."""

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
from ..traced import activations, server_jobs, traces
from ..traced.specs import Points

Array = np.ndarray[Any, Any]


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


def described(model: Model) -> dict[str, Any]:
    """What a trace has to know of a model, in plain data: `traces.opened` adds the handles."""
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
    """`described` with handles, for traces that run here."""
    return traces.opened(model.traced, described(model))


def read_points(model: Model, tokens: Array, sites: Iterable[Site]) -> Points:
    """The tensors at the points of `sites`, ``(example, position, width)``, from passes without intervention."""
    wanted = {point_of(site) for site in sites}
    return server_jobs.read_in_batches(model.traced, handles(model), as_tensor(model, tokens), wanted)


def described_site(model: Model, site: Site) -> tuple[str, tuple[int, str], Any, int, int | None, list[int] | None]:
    """A site as `server_jobs.capture` takes it: ``(kind, point, columns, heads, head, positions)``."""
    shape, component, head, layer = model.shape, site.component, site.head, site.layer
    sizes = (shape.heads, shape.d_head, shape.kv_heads)
    kind = "pattern" if component is Component.pattern else "heads" if component.per_head else "whole"
    columns: Any = activations.columns(component, head, *sizes)
    if kind == "pattern":
        key_head = None if head is None else shape.key_head(head)
        rotated = (activations.columns("q_rot", head, *sizes), activations.columns("k_rot", key_head, *sizes))
        columns = (*rotated, shape.d_head, model.scaling(layer), shape.window(layer))
    kind = "head_out" if component is Component.head_out else kind
    positions = None if site.positions is None else list(site.positions)
    return kind, point_of(site), columns, shape.kv_heads if component.of_keys else shape.heads, head, positions


def check_sites(model: Model, sites: Sequence[Site], groups: Sequence[Group]) -> None:
    """Refuse sites that the model or the prompts do not have."""
    if not sites:
        raise DeclarationError("nothing to capture: name at least one site, such as Head(1, 2).pattern")
    for site in sites:
        check_site(site, model.name, model.shape, groups)
