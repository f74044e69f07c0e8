"""Activations of the model's own forward pass: where they are found, and what a trace has to know of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from ..base.shape import Group
from ..declare.components import Component
from ..declare.sites import Logits, Site
from ..models.model import Model
from ..plan.reads import Read, name_of, planned_point, positions_read
from ..plan.reads import own_point as own_point_of
from ..plan.writes import BY_QUERY
from ..traced import activations
from ..traced.passes import inside, traces
from ..traced.specs import CapturedSite, ModelDescription, ModelParts, PatternColumns, PlannedSite, Points, ReadSite

Array = np.ndarray[Any, Any]


def point_of(site: Site) -> ReadSite:
    """Where the tensor that holds a site is found."""
    return site.layer, site.component.point


def own_point(layer: int, name: str, layers: int) -> ReadSite:
    """The point of the model's own forward pass that holds what a planned pass calls ``stream``."""
    if name != "stream":
        return layer, name
    return (layer, "resid_pre") if layer < layers else (layers - 1, "resid_post")


def as_tensor(model: Model, array: Array) -> torch.Tensor:
    """An array where the model is."""
    return torch.as_tensor(np.ascontiguousarray(array), device=model.device)


def described(model: Model) -> ModelDescription:
    """What a trace has to know of a model, in plain data: `traces.opened` adds the handles."""
    family, shape = model.family, model.shape
    return {
        "blocks": family.blocks,
        "norm": family.modules["norm"],
        "unembed": family.modules["unembed"],
        "rotary": family.modules.get("rotary"),
        **family.layout_of(shape),
        "embeddings": list(family.embeddings.items()),
        "points": list(family.points(shape)),
        "layers": shape.layers,
        "parallel": shape.parallel,
        "gated": shape.gated,
        "scalings": [model.scaling(layer) for layer in model.layers],
        "windows": [shape.window(layer) for layer in model.layers],
        "cap": shape.cap,
        "kinds": [shape.kind(layer) for layer in model.layers],
        "neighbours": shape.neighbours,
        "paired": shape.paired,
        "tail": shape.tail,
        "apart": False,
        **family.calls(),
    }


def handles(model: Model) -> ModelParts:
    """`described` with handles, for traces that run here."""
    return traces.opened(model.traced, described(model))


def read_points(model: Model, tokens: Array, sites: Iterable[Site]) -> Points:
    """The tensors at the points of `sites`, ``(example, position, width)``, from passes without intervention."""
    wanted = {point_of(site) for site in sites}
    return inside.read_in_batches(model.traced, handles(model), as_tensor(model, tokens), wanted)


def described_site(model: Model, site: Site) -> CapturedSite:
    """A site as `inside.capture` takes it."""
    shape, component = model.shape, site.component
    return {
        "kind": _kind(site),
        "site": point_of(site),
        "columns": columns_of(model, component, None if component is Component.head_out else site.part),
        "pattern": pattern_columns(model, site.layer, site.head) if component is Component.pattern else None,
        "heads": shape.kv_heads if component.of_keys else shape.heads,
        "head": site.head,
        "positions": None if site.positions is None else [int(at) for at in site.positions],
        "tokens": None,
    }


def described_read(model: Model, read: Read, number: int, group: Group, inside: bool = False) -> CapturedSite:
    """The `number`-th site that passes read, as a pass on prompts of a group takes it.

    Parameters
    ----------
    model : Model
    read : Site or Logits
    number : int
    group : Group
    inside : bool
        Whether something is made of what is read: then ``z`` is what the output projection reads.

    Returns
    -------
    CapturedSite
    """
    shape, at = model.shape, positions_read(read, group)
    point = planned_point(read, shape)
    if inside and isinstance(read, Site) and read.component is Component.z:
        point = (read.layer, str(Component.head_out))
    by_query = point is not None and point[0] == shape.layers - 1 and point[1] in (*BY_QUERY, "head_out")
    by_query = by_query and not shape.called
    planned: PlannedSite = {
        "name": name_of(number),
        "at": point,
        "columns": slice(None),
        "scored": by_query or point == (shape.layers, "stream"),
        "added": None,
    }
    if isinstance(read, Logits):
        return {
            "kind": "logits",
            "site": own_point_of(read, shape),
            "columns": slice(None),
            "pattern": None,
            "heads": 0,
            "head": None,
            "positions": at,
            "tokens": None if read.tokens is None else [int(token) for token in read.tokens],
            "planned": planned,
        }
    if read.component.embedding or read.component is Component.head_out:
        planned["added"] = (read.layer, f"{read.component} read")
    if read.part is not None and read.component is not Component.head_out:
        width = 1 if read.component in (Component.pattern, Component.mlp_pre, Component.mlp_post) else shape.d_head
        planned["columns"] = slice(read.part * width, (read.part + 1) * width)
    return {**described_site(model, replace(read, positions=None)), "positions": at, "planned": planned}


def _kind(site: Site) -> Literal["whole", "heads", "head_out", "neuron"]:
    """How the values of a site lie in the tensor that holds it."""
    if site.component is Component.head_out:
        return "head_out"
    return "heads" if site.component.per_head else "whole" if site.neuron is None else "neuron"


def columns_of(model: Model, component: str, part: int | None) -> slice:
    """Columns of a component, of one head or neuron or of all, in the tensor at its point."""
    return activations.columns(component, part, model.shape.heads, model.shape.d_head, model.shape.kv_heads)


def pattern_columns(model: Model, layer: int, head: int | None) -> PatternColumns:
    """How the pattern of a head, or of all, is made of rotated q and k."""
    shape = model.shape
    first = shape.width + shape.kv_width + (head or 0)
    return {
        "q": columns_of(model, "q_rot", head),
        "k": columns_of(model, "k_rot", None if head is None else shape.key_head(head)),
        "d_head": shape.d_head,
        "scaling": model.scaling(layer),
        "window": shape.window(layer),
        "cap": shape.cap,
        "sinks": slice(first, first + (shape.heads if head is None else 1)) if shape.sinks else None,
    }
