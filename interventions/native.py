"""The model's own forward pass, traced: what the engine reads of the runs as they are. Owns those traces.

Imports the model handle and ops; knows no plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import nnsight
import numpy as np
import torch

from ..errors import DeclarationError
from . import ops
from .checks import check_site
from .components import Component
from .known import Points
from .lowering import positions_in
from .models import Model
from .score import comparing
from .score import score as score_logits
from .shape import Group
from .sites import Site

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
    return torch.zeros((1, 1), dtype=torch.long, device=model.device)


def read_points(model: Model, tokens: Array, sites: Iterable[Site]) -> Points:
    """The tensors at the points of `sites`, ``(example, position, width)``, from passes without intervention."""
    wanted = {point_of(site) for site in sites}
    pieces = [
        _read(model, as_tensor(model, tokens[start : start + AT_ONCE]), wanted)
        for start in range(0, len(tokens), AT_ONCE)
    ]
    return {at: torch.cat([piece[at] for piece in pieces]) for at in wanted}


def _read(model: Model, tokens: torch.Tensor, wanted: set[tuple[int, str]]) -> Points:
    root, arguments = model.traced, walk_arguments(model)
    layers = 1 + max(layer for layer, _ in wanted)
    with torch.no_grad(), model.traced.trace(tokens, use_cache=False) as tracer:
        taken, _ = ops.walk(root, *arguments, layers, wanted, [], {})
        nnsight.save(taken)
        tracer.stop()
    return {at: value.expand(len(tokens), *value.shape[1:]) for at, value in taken.items()}


def run_as_it_is(
    model: Model,
    tokens: torch.Tensor,
    scored: Sequence[int],
    wanted: set[tuple[int, str]],
    watch: list[Any],
    score: dict[str, Any],
    keep_logits: bool,
) -> tuple[Points, dict[str, torch.Tensor], torch.Tensor | None]:
    """One pass of the model's own: what is at the wanted points, the readers' values, and the scored logits if kept.

    `watch` and `score` are as in `forward`; kernels in ``score["compare"]`` also take ``base_logits``, which are those
    of this very pass where `keep_logits` is set.
    """
    root, arguments, shape = model.traced, walk_arguments(model), model.shape
    norm, unembed = (attrgetter(model.family.modules[name])(root) for name in ("norm", "unembed"))
    at = torch.tensor(scored, device=tokens.device)
    with torch.no_grad(), model.traced.trace(tokens, use_cache=False) as tracer:
        found: dict[str, Any] = {}
        taken, values = ops.walk(root, *arguments, shape.layers, wanted, watch, {})
        if score["kernels"]:
            normed = norm.output[:, at]
            if keep_logits:
                found["logits"] = unembed(normed)
            values.update(score_logits(normed, unembed, comparing(score, found), len(tokens)))
        nnsight.save(taken)
        nnsight.save(values)
        nnsight.save(found)
        tracer.stop()
    points = {point: value.expand(len(tokens), *value.shape[1:]) for point, value in taken.items()}
    return points, dict(values), found.get("logits")


def handles(model: Model) -> dict[str, Any]:
    """What `forward.run` and `ops.walk` have to know of a model."""
    family, shape = model.family, model.shape

    def handle(name: str) -> Any:
        return attrgetter(family.modules[name])(model.traced) if name in family.modules else None

    return {
        "blocks": attrgetter(family.blocks)(model.traced),
        "norm": handle("norm"),
        "unembed": handle("unembed"),
        "rotary": handle("rotary"),
        "paths": dict(family.modules),
        "layout": family.layout,
        "transposed": family.transposed,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "d_head": shape.d_head,
        "parallel": shape.parallel,
        "scalings": [model.scaling(layer) for layer in model.layers],
        "windows": [shape.window(layer) for layer in model.layers],
    }


def walk_arguments(model: Model) -> tuple[dict[str, Any], list[tuple[str, str]], list[tuple[str, Any]]]:
    """What `ops.walk` takes first after the model: what there is to know of it, embeddings, points."""
    family = model.family
    return handles(model), list(family.embeddings.items()), list(family.points(model.shape.parallel))


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
        z = ops.split_heads(point, shape.heads)
        value = torch.einsum("ephd,hdm->ephm", z, model.head_weights(site.layer).W_O)
        value = value if site.head is None else value[:, :, site.head]
    elif site.component.per_head:
        value = point[..., ops.columns(site.component, site.head, shape.heads, shape.d_head, shape.kv_heads)]
        count = shape.kv_heads if site.component.of_keys else shape.heads
        value = ops.split_heads(value, count) if site.head is None else value
    return value if at is None else value[:, at]


def pattern_of(model: Model, turned: torch.Tensor, site: Site) -> torch.Tensor:
    """Attention weights ``(example, head, query, key)`` of the head of `site`, or of all."""
    shape, head = model.shape, site.head
    key_head = None if head is None else shape.key_head(head)
    q = turned[..., ops.columns("q_rot", head, shape.heads, shape.d_head, shape.kv_heads)]
    k = turned[..., ops.columns("k_rot", key_head, shape.heads, shape.d_head, shape.kv_heads)]
    q, k = (ops.split_heads(part, part.shape[-1] // shape.d_head) for part in (q, k))
    return ops.attention_pattern(q, k, model.scaling(site.layer), shape.window(site.layer))


def check_sites(model: Model, sites: Sequence[Site], groups: Sequence[Group]) -> None:
    """Refuse sites that the model or the prompts do not have."""
    if not sites:
        raise DeclarationError("nothing to capture: name at least one site, such as Head(1, 2).pattern")
    for site in sites:
        check_site(site, model.name, model.shape, groups)
