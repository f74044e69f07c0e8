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
from . import book, ops, remote, served, traces
from .components import Component
from .digest import short_hash
from .edits import Compose, Edit, Patch
from .elsewhere import RemoteModel
from .engine import run_plan
from .known import Reader
from .models import Model
from .native import as_tensor, handles, point_of, read_points
from .outcome import Inputs, Outcome
from .plan import Plan, make_plan
from .shape import Group
from .sites import Site
from .steering import Add
from .wire import unpacked

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
    noted = ""
    if isinstance(model, RemoteModel) and model not in _FAMILIAR:
        noted = "checked-" + short_hash(model.office.host, model.office.model_key, model.weight_hash)
    if model in _FAMILIAR or (noted and book.current().job(noted)):
        return
    failed = failures(model)
    if failed:
        raise ModelError(
            f"self-check of {model.name} failed: {'; '.join(failed)}. headwise would give wrong numbers on this model; "
            "check=False measures all the same"
        )
    _FAMILIAR.add(model)
    if noted:
        book.current().note_job(noted, {"checked": True})


def failures(model: Model) -> list[str]:
    """What goes wrong, in words; nothing on a model that headwise reads right."""
    length, last = min(LENGTH, model.shape.context), model.shape.layers - 1
    random = np.random.RandomState(0)
    tokens = random.randint(0, model.shape.vocabulary, (1, length))
    layers = sorted({0, last // 2, last})
    parts = [(layer, name) for layer in layers for name in WRITES if not (length == 1 and name in ("q", "k"))]
    changes = [_change(model, name, random) for _, name in parts]
    at = _scored(length)[len(_scored(length)) // 2]
    plan, readers, inputs = _plan(model, tokens, at, parts, changes)
    rows, writes = _rows(model, tokens, at, parts, changes)
    if model.remote:
        planned, own, scale, off = _there(model, plan, readers, inputs, (rows, writes, _scored(length)), layers)
    else:
        planned = run_plan(model, plan, readers, inputs).values["probe", 0][:, 0]
        logits, deviation = traces.changed(model.traced, handles(model), rows, writes, _scored(length))
        own, scale = probe(logits).float().cpu().numpy(), float(deviation) or 1.0
        off = _off(model, tokens, layers)
    allowed = TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * scale
    failed = [
        f"parts ({what} of layer {layer} is off by {by:.2g})" for layer, what, by in _wrong(model.dtype, layers, off)
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


def _wrong(dtype: str, layers: list[int], off: list[list[Any]]) -> list[tuple[int, str, float]]:
    """Where the family's own functions do not give what the model's modules give: layer, what, and by how much."""
    allowed = TOLERANCE.get(dtype, TOLERANCE["float32"])
    return [
        (layer, what, by)
        for layer, pairs in zip(layers, off, strict=True)
        for what, (by, scale) in zip(("project", "combine"), pairs, strict=True)
        if by > allowed * max(1e-6, scale)
    ]


def _off(model: Model, tokens: Array, layers: list[int]) -> list[list[Any]]:
    """How far the family's own functions are from the model's modules, and the deviation of what these give."""
    points = read_points(model, tokens, _looked_at(layers))
    return traces.distances(
        traces.by_itself(model.traced, handles(model), points, layers, model.device), points, layers
    )


def _looked_at(layers: list[int]) -> list[Site]:
    return [Site(part, layer) for layer in layers for part in (RESID, Z, Component.q)]


def _there(
    model: Model, plan: Plan, readers: list[Reader], inputs: Inputs, own: tuple[Any, Any, Any], layers: list[int]
) -> tuple[Array, Array, float, list[list[Any]]]:
    """All of it in one job on the server of a model."""
    assert isinstance(model, RemoteModel)
    rows, writes, scored = own
    laid = remote.program(model, plan, list(plan.chunks), readers, inputs, True).program
    more = {"rows": rows, "writes": writes, "scored": scored, "layers": layers, "probe": probe}
    wanted = sorted({point_of(site) for site in _looked_at(layers)})
    result = model.ask("check", served.check, {**laid, **more, "wanted": wanted})
    outcome = Outcome(plan)
    for piece in remote.pieces(plan, list(plan.chunks), unpacked(result["planned"])):
        outcome.put(piece)
    values = outcome.close().values["probe", 0][:, 0]
    return values, result["own"].numpy(), result["deviation"] or 1.0, result["off"]


def _most(difference: Array) -> float:
    return float(np.abs(difference).max())


def _change(model: Model, name: str, random: np.random.RandomState) -> Array:
    """A vector to add to a part: of all heads, where it has heads."""
    heads = Component(name).per_head
    return random.standard_normal(model.shape.heads * model.shape.d_head if heads else model.shape.d_model)


def _plan(
    model: Model, tokens: Array, at: int, parts: list[tuple[int, str]], changes: list[Array]
) -> tuple[Plan, list[Reader], Inputs]:
    """Planned passes that probe the logits, the first of one that changes nothing."""
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
    return plan, [Reader("probe", "logits", probe, {"own": ({},)})], Inputs({"own": (tokens,)})


def _rows(
    model: Model, tokens: Array, at: int, parts: list[tuple[int, str]], changes: list[Array]
) -> tuple[Any, dict[tuple[int, str], list[Any]]]:
    """Tokens for the model's own pass, a row for each part, and the changes that are put into it."""
    writes: dict[tuple[int, str], list[Any]] = {}
    shape, width = model.shape, tokens.shape[1]
    for row, ((layer, name), change) in enumerate(zip(parts, changes, strict=True), start=1):
        point = Component(name).point
        full = np.zeros((width, 3 * shape.heads * shape.d_head if point == "qkv" else len(change)), dtype=np.float32)
        full[at, ops.columns(name, None, shape.heads, shape.d_head)] = change
        writes.setdefault((layer, point), []).append((row, torch.as_tensor(full, device=model.device)))
    return as_tensor(model, np.repeat(tokens, len(parts) + 1, axis=0)), writes


def _scored(length: int) -> list[int]:
    """Every other position, the last among them, so that the last layer is computed in part."""
    return list(range(length - 1, -1, -2))[::-1]


def probe(logits: torch.Tensor) -> torch.Tensor:
    """A sum of all logits with weights of both signs, as large as a logit."""
    size = logits.shape[-1]
    weights = torch.cos(1.7 * torch.arange(size, device=logits.device)) * (2 / size) ** 0.5
    probes: torch.Tensor = (logits.float() * weights).sum(-1)
    return probes
