"""Checks of an unfamiliar model before a sweep: whether planned passes see what the model itself does.

On one short prompt of random tokens: *parts*, what the family's table leads to is what the model has, from the
embeddings to the weights that are used in part; *identity*, a planned pass that changes nothing gives the logits of the
model's own forward pass; *seen*, a write in a planned pass gives the same logits as the write put into the model's own
pass; *windows*, the first holds on a longer prompt too where layers have windows; and *moved*, a write to the stream
does move the logits.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import nnsight
import numpy as np
import torch

from ..errors import HeadwiseError, ModelError
from . import ops
from .components import Component
from .edits import Compose, Edit, Patch
from .engine import run_plan
from .known import Reader
from .memory import is_out_of_memory
from .models import Model
from .native import as_tensor, handles, nothing, read_points, walk_arguments
from .outcome import Inputs
from .plan import make_plan
from .projections import combine, project, sides
from .rows import called
from .shape import Group
from .sites import Site
from .steering import Add

Array = np.ndarray[Any, Any]
LENGTH = 8
"""Tokens of the prompt."""
WINDOW = 512
"""Windows of attention up to this size are checked, on a prompt that is longer."""
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
    try:
        failed = failures(model)
    except Exception as error:
        if isinstance(error, HeadwiseError) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"self-check of {model.name} ended early: {_line(error)}. Does what the family {model.family.name} says of "
            "its modules and counts hold for this model?"
        ) from error
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
    failed += _windows(model, random)
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


def _windows(model: Model, random: np.random.RandomState) -> list[str]:
    """What goes wrong on a prompt that is longer than the windows of attention; longer windows are left unchecked."""
    sizes = [size for size in model.shape.windows if size is not None and LENGTH <= size <= WINDOW]
    length = max(sizes, default=0) + 2
    if not sizes or length > model.shape.context:
        return []
    tokens = random.randint(0, model.shape.vocabulary, (1, length))
    planned = _planned(model, tokens, 0, [], [])
    own, scale = _own(model, tokens, 0, [], [])
    off = _most(planned[0] - own[0])
    if off <= TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * scale:
        return []
    return [f"windows (a pass that changes nothing moves the logits of {length} tokens by {off:.2g})"]


def _parts(model: Model, tokens: Array, layers: list[int]) -> list[tuple[int, str, float]]:
    """Where what the family's table leads to is not what the model has: layer, what, and by how much."""
    shape, parts = model.shape, handles(model)
    out, size = parts["paths"]["out"], shape.qkv_width
    embeddings = [Component(name) for name in model.family.embeddings]
    sites = [Site(part, layer) for layer in layers for part in (RESID, Z, Component.q)]
    points = read_points(model, tokens, [*sites, *(Site(part, 0) for part in embeddings)])
    embedded = sum(points[(0, str(part))] for part in embeddings)
    wrong = []
    for layer in layers:
        with torch.no_grad(), model.traced.trace(nothing(model), use_cache=False) as tracer:
            block, z = parts["blocks"][layer], points[(layer, "z")]
            normed = called(block, parts["paths"]["norm_1"], points[(layer, "resid_pre")])
            whole = torch.cat(sides(parts, block, normed), -1)
            some = [project(parts, block, normed, slice(start, start + size // 3 + 1)) for start in _thirds(size)]
            written = combine(parts, block, z, slice(0, shape.width))
            given = called(block, out, z) - called(block, out, torch.zeros_like(z))
            found = nnsight.save([whole, torch.cat(some, -1), written, given])
            tracer.stop()
        pairs = {
            "sides": (found[0], points[(layer, "qkv")]),
            "project": (found[1], points[(layer, "qkv")]),
            "combine": (found[2], found[3]),
        }
        if layer == 0:
            pairs["embeddings"] = (embedded, points[(0, "resid_pre")])
        for what, (ours, theirs) in pairs.items():
            off = float((ours.float() - theirs.float()).abs().max())
            if off > TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * max(1e-6, float(theirs.float().std())):
                wrong.append((layer, what, off))
    return wrong


def _thirds(size: int) -> range:
    """Where thirds of columns start; they do not end where heads do."""
    return range(0, size, size // 3 + 1)


def _line(error: Exception) -> str:
    return next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), type(error).__name__)


def _most(difference: Array) -> float:
    return float(np.abs(difference).max())


def _change(model: Model, name: str, random: np.random.RandomState) -> Array:
    """A vector to add to a part: of all heads, where it has heads."""
    component, shape = Component(name), model.shape
    width = shape.kv_width if component.of_keys else shape.width
    return random.standard_normal(width if component.per_head else shape.d_model)


def _planned(model: Model, tokens: Array, at: int, parts: list[tuple[int, str]], changes: list[Array]) -> Array:
    """Probes of the logits ``(1 + part, position)`` in planned passes, the first of one that changes nothing."""
    conditions: list[tuple[Edit, ...]] = [(Patch(Site(Component.resid_pre, 0), source="own"),)]
    for (layer, name), change in zip(parts, changes, strict=True):
        component = Component(name)
        if component.per_head:
            each = change.reshape(-1, model.shape.d_head)
            adds = (Add(Site(component, layer, head, (at,)), one) for head, one in enumerate(each))
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
        full = np.zeros((width, shape.qkv_width if point == "qkv" else len(change)), dtype=np.float32)
        full[at, ops.columns(name, None, shape.heads, shape.d_head, shape.kv_heads)] = change
        value = torch.as_tensor(full, device=model.device).to(next(model.module.parameters()).dtype)
        writes.setdefault((layer, point), []).append((row, value))
    rows = as_tensor(model, np.repeat(tokens, len(parts) + 1, axis=0))
    root, arguments = model.traced, walk_arguments(model)
    with torch.no_grad(), model.traced.trace(rows, use_cache=False):
        ops.walk(root, *arguments, shape.layers, set(), [], writes)
        logits = nnsight.save(model.traced.output.logits)
    return probe(logits[:, _scored(width)]).float().cpu().numpy(), float(logits[0].float().std()) or 1.0


def _scored(length: int) -> list[int]:
    """Every other position, the last among them, so that the last layer is computed in part."""
    return list(range(length - 1, -1, -2))[::-1]


def probe(logits: torch.Tensor) -> torch.Tensor:
    """A sum of all logits with weights of both signs, as large as a logit."""
    size = logits.shape[-1]
    weights = torch.cos(1.7 * torch.arange(size, device=logits.device)) * (2 / size) ** 0.5
    probes: torch.Tensor = (logits.float() * weights).sum(-1)
    return probes
