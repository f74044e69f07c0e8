"""Checks of an unfamiliar model before a sweep: whether planned passes see what the model itself does.

On one short prompt of random tokens: *parts*, what the table of the family computes by itself is what the model's
modules compute; *identity*, a planned pass that changes nothing gives the logits of the model's own forward pass;
*seen*, a write in a planned pass gives the same logits as the write put into the model's own pass; and *moved*, a write
to the stream does move the logits.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import numpy as np
import torch

from ..errors import ModelError
from . import ops, traces
from .components import Component
from .edits import Compose, Edit, Patch
from .engine import run_plan
from .known import Reader
from .models import Model
from .native import as_tensor, handles, read_points
from .outcome import Inputs
from .plan import make_plan
from .shape import Group
from .sites import Site
from .steering import Add

Array = np.ndarray[Any, Any]
LENGTH = 8
"""Tokens of the prompt."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Largest difference that counts as rounding, in standard deviations of the logits."""
WRITES = ("resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out", "resid_post")
ADDED = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""Parts that are added to the stream, so that a write to them reaches the logits of any model that uses them."""
RESID, Z = Component.resid_pre, Component.z
_FAMILIAR: WeakSet[Model] = WeakSet()


def check_model(model: Model) -> None:
    """Check a model once.

    Raises
    ------
    ModelError
        Names every check that failed.
    """
    if model in _FAMILIAR:
        return
    failed = failures(model)
    if failed:
        raise ModelError(
            f"self-check of {model.name} failed: {'; '.join(failed)}. headwise would give wrong numbers on this model; "
            "check=False measures all the same"
        )
    _FAMILIAR.add(model)


def failures(model: Model) -> list[str]:
    """What goes wrong, in words; nothing on a model that headwise reads right."""
    length, last = min(LENGTH, model.shape.context), model.shape.layers - 1
    random = np.random.RandomState(0)
    tokens = random.randint(0, model.shape.vocabulary, (1, length))
    layers = sorted({0, last // 2, last})
    parts = [(layer, name) for layer in layers for name in WRITES if not (length == 1 and name in ("q", "k"))]
    changes = [_change(model, name, random) for _, name in parts]
    at = _scored(length)[len(_scored(length)) // 2]
    planned = _planned(model, tokens, at, parts, changes)
    own, scale = _own(model, tokens, at, parts, changes)
    allowed = TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * scale
    failed = [
        f"parts ({what} of layer {layer} is off by {by:.2g})" for layer, what, by in _parts(model, tokens, layers)
    ]
    if not _most(planned[0] - own[0]) <= allowed:
        failed.append(f"identity (a pass that changes nothing moves the logits by {_most(planned[0] - own[0]):.2g})")
    for (layer, name), mine, theirs in zip(parts, planned[1:], own[1:], strict=True):
        if not _most(mine - theirs) <= allowed:
            failed.append(
                f"seen (a write to {name} of layer {layer} moves them elsewhere by {_most(mine - theirs):.2g})"
            )
    for name in ADDED:
        moves = [_most(row - own[0]) for (_, part), row in zip(parts, own[1:], strict=True) if part == name]
        if not max(moves) > allowed / 100:  # both from one pass of the model, so rounded alike
            failed.append(f"moved (no write to {name} moves the logits)")
    return failed


def _parts(model: Model, tokens: Array, layers: list[int]) -> list[tuple[int, str, float]]:
    """Where the family's own functions do not give what the model's modules give: layer, what, and by how much."""
    points = read_points(model, tokens, [Site(part, layer) for layer in layers for part in (RESID, Z, Component.q)])
    found = traces.by_itself(model.traced, handles(model), points, layers, model.device)
    wrong = []
    for layer, ours in zip(layers, found, strict=True):
        pairs = {"project": (ours[0], points[(layer, "qkv")]), "combine": (ours[1], ours[2])}
        for what, (one, theirs) in pairs.items():
            off = float((one.float() - theirs.float()).abs().max())
            if off > TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * max(1e-6, float(theirs.float().std())):
                wrong.append((layer, what, off))
    return wrong


def _most(difference: Array) -> float:
    return float(np.abs(difference).max())


def _change(model: Model, name: str, random: np.random.RandomState) -> Array:
    """A vector to add to a part: of all heads, where it has heads."""
    heads = Component(name).per_head
    return random.standard_normal(model.shape.heads * model.shape.d_head if heads else model.shape.d_model)


def _planned(model: Model, tokens: Array, at: int, parts: list[tuple[int, str]], changes: list[Array]) -> Array:
    """Probes of the logits ``(1 + part, position)`` in planned passes, the first of one that changes nothing."""
    conditions: list[tuple[Edit, ...]] = [(Patch(Site(Component.resid_pre, 0), source="own"),)]
    for (layer, name), change in zip(parts, changes, strict=True):
        component = Component(name)
        if component.per_head:
            each = change.reshape(model.shape.heads, -1)
            adds = (Add(Site(component, layer, head, (at,)), each[head]) for head in model.heads)
            conditions.append(Compose(*adds).edits())
        else:
            conditions.append((Add(Site(component, layer, None, (at,)), change),))
    length = tokens.shape[1]
    group = Group((0,), length, tuple(_scored(length)))
    plan = make_plan(
        conditions, model=model.name, shape=model.shape, groups=[group], runs=["own"], base="own", overhead=0.0
    )
    found = run_plan(model, plan, [Reader("probe", "logits", probe, {"own": ({},)})], Inputs({"own": (tokens,)}))
    return found.values["probe", 0][:, 0]


def _own(
    model: Model, tokens: Array, at: int, parts: list[tuple[int, str]], changes: list[Array]
) -> tuple[Array, float]:
    """The same, with each change put into the model's own forward pass; and the deviation of the logits."""
    writes: dict[tuple[int, str], list[Any]] = {}
    shape, width = model.shape, tokens.shape[1]
    for row, ((layer, name), change) in enumerate(zip(parts, changes, strict=True), start=1):
        point = Component(name).point
        full = np.zeros((width, 3 * shape.heads * shape.d_head if point == "qkv" else len(change)), dtype=np.float32)
        full[at, ops.columns(name, None, shape.heads, shape.d_head)] = change
        writes.setdefault((layer, point), []).append((row, torch.as_tensor(full, device=model.device)))
    rows = as_tensor(model, np.repeat(tokens, len(parts) + 1, axis=0))
    logits = traces.changed(model.traced, handles(model), rows, writes, _scored(width))
    return probe(logits[0]).float().cpu().numpy(), float(logits[1]) or 1.0


def _scored(length: int) -> list[int]:
    """Every other position, the last among them, so that the last layer is computed in part."""
    return list(range(length - 1, -1, -2))[::-1]


def probe(logits: torch.Tensor) -> torch.Tensor:
    """A sum of all logits with weights of both signs, as large as a logit."""
    size = logits.shape[-1]
    weights = torch.cos(1.7 * torch.arange(size, device=logits.device)) * (2 / size) ** 0.5
    probes: torch.Tensor = (logits.float() * weights).sum(-1)
    return probes
