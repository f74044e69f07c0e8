"""Checks of an unfamiliar model before it is measured: whether planned passes see what the model itself does.

On one short prompt of random tokens, in every layer: *parts*, what the family's table leads to is what the model has,
from the embeddings to the weights of heads and to the logits of some tokens; *identity*, a planned pass that changes
nothing gives the logits of the model's own forward pass; *seen*, a write in a planned pass gives the same logits as the
write put into the model's own pass; *windows*, *identity* holds on a longer prompt too where layers have short windows,
and modules say nothing else of windows of any size; and *moved*, a write to the stream does move the logits. *Identity*
is seen once more on a prompt as long as the longest that is measured, where the model runs here.

Writes go to what modules take and give: one by one in the first, the middle and the last layer, together in others.
One to ``resid_mid`` or to an embedding is compared with the same write to ``attn_out`` or to the first ``resid_pre``,
as the model's own pass has no place for it; ``q_rot``, ``k_rot`` and ``pattern`` are no module's output, and are seen
by *identity* and by writes to ``q``, ``k`` and ``v``. Writes to what attention and MLPs read, and to neurons,
are *seen* before the first sweep that has such: a model is not refused for what is not asked of it.

Of blocks that are called nothing is computed here. Then *parts* are sums: what attention and MLP add makes of the
stream that enters a block the one that leaves it, and the embeddings make the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import HeadwiseError, ModelError, choices
from .base.shape import Group
from .declare.components import Component
from .declare.edits import Compose, Edit, Patch
from .declare.sites import Site
from .declare.steering import Add
from .models.identity import Identity
from .models.model import Model
from .models.windows import unlike
from .plan.plan import Plan, make_plan
from .run.activations import as_tensor, handles, point_of, read_points
from .run.backend import Backend, CheckRequest
from .run.cache import CompiledMetric
from .run.memory import is_out_of_memory
from .run.outcome import Inputs
from .traced import activations
from .traced.passes import traces
from .traced.specs import ReadSite, RowChange

Array = np.ndarray[Any, Any]
LENGTH = 8
"""Tokens of the prompt."""
WINDOW = 512
"""Windows of attention up to this size are checked, on a prompt that is longer."""
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Largest difference that counts as rounding, in standard deviations of the logits."""
SHOWN = 6
"""Failures that are told; the rest is counted."""
WRITES = ("resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out", "resid_post")
ADDED = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""Parts that are added to the stream, so that a write to them reaches the logits of any model that uses them."""
INNER = ("attn_in", "mlp_in", "mlp_pre", "mlp_post")
"""Parts that are looked at only where a sweep writes to one."""
RESID, Z = Component.resid_pre, Component.z
AT_ONCE = 24
"""Probes that go through the model together, or some more."""


def check_planned(model: Model, identity: Identity, plan: Plan) -> None:
    """Check a model for what a plan runs and writes, unless this very model has passed that; see `check_model`."""
    writes = {write.point for group in plan.writes for edits in group for write in edits}
    longest = max((group.length for group in plan.groups), default=0)
    check_model(model, identity, longest, not writes.isdisjoint(INNER))


def check_model(model: Model, identity: Identity, length: int = 0, inner: bool = False) -> None:
    """Check a model, unless this very model has passed already.

    Parameters
    ----------
    model : Model
    identity : Identity
        Of this moment, see `begin`.
    length : int
        Tokens of the longest prompt that is going to be run; a longer one than before is checked too, where the model
        runs here.
    inner : bool
        Whether a part of `INNER` is going to be written.

    Raises
    ------
    ModelError
        Names every check that failed.
    """
    passed, length = _has_passed(model, identity), model.backend.checked_length(length)
    seen = passed and length <= max(LENGTH, model._memory.longest)
    before = model._memory.inner
    inner = inner and not (passed and before is not None and before.exact == identity.exact)
    if seen and not inner:
        return
    where = "on this model"
    try:
        failed = ([] if passed else failures(model)) or ([] if seen else _on_length(model, length))
        if inner and not failed:
            failed, where = inner_failures(model), f"for {choices(INNER)} of this model"
    except Exception as error:
        if isinstance(error, HeadwiseError) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"self-check of {model.name} ended early: {line_of(error)}. Does what the family {model.family.name} says "
            "of its modules and counts hold for this model?"
        ) from error
    if failed:
        more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        raise ModelError(
            f"self-check of {model.name} failed: {'; '.join(failed[:SHOWN])}{more}. headwise would give wrong numbers "
            f"{where}; check=False measures all the same"
        )
    model._memory.longest = max(length, model._memory.longest if passed else 0)
    model._memory.checked = identity
    model._memory.inner = identity if inner else model._memory.inner
    model.backend.note_passed(identity)


def _has_passed(model: Model, identity: Identity) -> bool:
    """Whether this very model passed: the same facts, and a fingerprint that is the same up to rounding."""
    before = model._memory.checked
    if before is not None and before.exact == identity.exact:
        one, two = before.fingerprint, identity.fingerprint
        return one is None or two is None or not one.unlike(two, identity.dtype)
    if not model.backend.has_passed(identity):
        return False
    model._memory.checked = identity
    return True


class Probe(NamedTuple):
    """Writes to parts of a layer in one forward pass: names, and for each the vector that is added, of all heads."""

    layer: int
    names: tuple[str, ...]
    changes: tuple[Array, ...]


def failures(model: Model) -> list[str]:
    """What goes wrong, in words; nothing on a model that headwise reads right."""
    length = min(LENGTH, model.shape.context)
    random = np.random.RandomState(0)
    tokens = random.randint(0, model.shape.vocabulary, (1, length))
    names = [name for name in WRITES if not (length == 1 and name in ("q", "k")) and not unwritable(model, name)]
    last = model.shape.layers - 1
    failed, moves = [], dict.fromkeys(ADDED, 0.0)
    layers: list[int] = []
    probes: list[Probe] = []
    for layer, some in groupby(_probes(model, names, random), lambda one: one.layer):
        layers.append(layer)
        probes += some
        if len(probes) >= AT_ONCE or layer == last:
            failed += _failures_of(model, tokens, layers, probes, moves)
            layers, probes = [], []
    failed += _windows(model, random) + _around(model, tokens)
    failed += _sums(model, tokens) if model.shape.called else []
    failed += [
        f"moved (no write to {name} moves the logits)" for name in ADDED if name in names and not moves[name] > 1
    ]
    return list(dict.fromkeys(failed))


def unwritable(model: Model, name: str) -> bool:
    """Whether a model has no such component, or one that can only be read."""
    return name in dict(model.shape.lacks + model.shape.read_only)


def _sums(model: Model, tokens: Array) -> list[str]:
    """Whether parts of blocks that are called add up to the stream, and embeddings to what enters the first."""
    shape, off = model.shape, []
    parts = [Component(name) for name in ADDED if not unwritable(model, name)]
    sites = [Site(part, layer) for layer in model.layers for part in parts]
    sites += [Site(Component(name), 0) for name in model.family.embeddings]
    found = read_points(model, tokens, sites)
    allowed = TOLERANCE.get(model.dtype, TOLERANCE["float32"])

    def compare(what: str, made: list[torch.Tensor], wanted: torch.Tensor) -> None:
        by = traces.far_off(torch.stack([one.float().expand_as(wanted) for one in made]).sum(0), wanted)
        if not by <= allowed * (float(wanted.float().std()) or 1.0):
            off.append(f"parts ({what} is off by {by:.2g})")

    for layer in model.layers if len(parts) == len(ADDED) else ():
        made = [found[(layer, name)] for name in ("resid_pre", "attn_out", "mlp_out")]
        compare(f"the sum of what is added to the stream in layer {layer}", made, found[(layer, "resid_post")])
    for layer in range(shape.layers - 1):
        compare(
            f"the stream between layers {layer} and {layer + 1}",
            [found[(layer, "resid_post")]],
            found[(layer + 1, "resid_pre")],
        )
    if model.family.embeddings:
        compare(
            "the sum of the embeddings", [found[(0, name)] for name in model.family.embeddings], found[(0, "resid_pre")]
        )
    return off


def off_by(model: Model) -> float:
    """How far a planned pass that changes nothing is off on one short prompt, in shares of what counts as rounding.

    0 where that cannot be told; then the whole check says why, before the first number.
    """
    tokens = np.random.RandomState(0).randint(0, model.shape.vocabulary, (1, min(LENGTH, model.shape.context)))
    try:
        planned, own, scale, _ = _planned_and_own(model, tokens, 0, [], [], [])
    except Exception:  # whatever a strange model raises
        return 0.0
    return _most(planned[0] - own[0]) / (TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * scale)


def inner_failures(model: Model) -> list[str]:
    """What goes wrong with writes to parts of `INNER`, in words."""
    shape, paths = model.shape, model.family.modules
    random = np.random.RandomState(2)
    tokens = random.randint(0, shape.vocabulary, (1, min(LENGTH, shape.context)))
    names = [
        name for name in INNER if (shape.neurons or not Component(name).per_neuron) and not unwritable(model, name)
    ]
    shared = "norm_1" in paths and paths["norm_1"] == paths.get("norm_2")
    if shared and not shape.called:  # whose output the model's own pass has only one of
        names.remove("attn_in")
    probes = list(_probes(model, names, random))
    batches = [probes[start : start + AT_ONCE] for start in range(0, len(probes), AT_ONCE)]
    return list(dict.fromkeys(one for some in batches for one in _failures_of(model, tokens, [], some, {})))


def _probes(model: Model, names: list[str], random: np.random.RandomState) -> Iterator[Probe]:
    """Writes to parts one by one in the first, the middle and the last layer, together in others."""
    last = model.shape.layers - 1
    for layer in model.layers:
        together = [(name,) for name in names] if layer in (0, last // 2, last) else [tuple(names)]
        for some in together:
            yield Probe(layer, some, tuple(_change(model, name, random) for name in some))


def _failures_of(
    model: Model, tokens: Array, layers: list[int], probes: list[Probe], moves: dict[str, float]
) -> list[str]:
    """What goes wrong in some layers; `moves` gets how far writes move the logits, in shares of what is rounding."""
    scored = _scored(tokens.shape[1])
    twins = _twins(model, probes)
    planned, own, scale, off = _planned_and_own(model, tokens, scored[len(scored) // 2], probes, twins, layers)
    allowed = TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * scale
    failed = [
        f"parts ({what} of layer {layer} is off by {by:.2g})"
        for layer, found in zip(layers, off, strict=not model.shape.called)
        for what, by, deviation, rounding in found
        if not by <= TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * max(1e-6, deviation) + rounding
    ]
    if not _most(planned[0] - own[0]) <= allowed:
        failed.append(f"identity (a pass that changes nothing moves the logits by {_most(planned[0] - own[0]):.2g})")
    again = [own[1 + number] for number, _ in twins]
    for one, mine, theirs in zip([*probes, *(two for _, two in twins)], planned[1:], [*own[1:], *again], strict=True):
        if not _most(mine - theirs) <= allowed:
            what = one.names[0] if len(one.names) == 1 else "all parts"
            failed.append(
                f"seen (a write to {what} of layer {one.layer} moves them elsewhere by {_most(mine - theirs):.2g})"
            )
    for one, row in zip(probes, own[1:], strict=True):
        if len(one.names) == 1 and one.names[0] in ADDED:  # both from one pass of the model, so rounded alike
            moves[one.names[0]] = max(moves[one.names[0]], _most(row - own[0]) / (allowed / 100))
    return failed


def _planned_and_own(
    model: Model, tokens: Array, at: int, probes: list[Probe], twins: list[tuple[int, Probe]], layers: list[int]
) -> tuple[Array, Array, float, list[Any]]:
    """Probes in planned passes, in the model's own, the deviation of its logits, and what its parts are off by."""
    plan, readers, inputs = _plan(model, tokens, at, [*probes, *(two for _, two in twins)])
    rows, writes = _rows(model, tokens, at, probes)
    scored = _scored(tokens.shape[1])
    layers = [] if model.shape.called else layers  # nothing of them is computed here: see `_sums`
    sites = [Site(part, layer) for layer in layers for part in (RESID, Z, Component.q)]
    sites += [Site(Component.resid_post, model.shape.layers - 1)] if layers else []
    sites += [Site(Component(name), 0) for name in model.family.embeddings] if layers else []
    points = sorted({point_of(site) for site in sites})
    backend: Backend = model.backend
    planned, own, deviation, off = backend.self_check(
        CheckRequest(plan, readers, inputs, rows, writes, scored, points, layers, probe)
    )
    return planned, own, deviation or 1.0, off


def _windows(model: Model, random: np.random.RandomState) -> list[str]:
    """What goes wrong on a prompt that is longer than the windows of attention, where that is short; else what differs.

    A window that is too long for a pass is compared with what the modules say of themselves.
    """
    family, shape = model.family, model.shape
    if shape.called:
        return []
    said = unlike(model.module, family.blocks, family.modules["attention"], shape.windows, shape.context)
    if said:
        return [f"windows ({said[0]})"]
    sizes = [size for size in model.shape.windows if size is not None and LENGTH <= size <= WINDOW]
    length = max(sizes, default=0) + 2
    if not sizes or length > model.shape.context:
        return []
    return _no_op(model, random.randint(0, model.shape.vocabulary, (1, length)), "windows")


def _on_length(model: Model, length: int) -> list[str]:
    """What goes wrong on a prompt of this length; nothing of a short one, which `failures` has seen."""
    if length <= LENGTH:
        return []
    tokens = np.random.RandomState(1).randint(0, model.shape.vocabulary, (1, min(length, model.shape.context)))
    return _no_op(model, tokens, "identity")


def _no_op(model: Model, tokens: Array, check: str) -> list[str]:
    """Whether a planned pass that changes nothing gives other logits than the model's own, on one prompt."""
    planned, own, scale, _ = _planned_and_own(model, tokens, 0, [], [], [])
    off = _most(planned[0] - own[0])
    if off <= TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * scale:
        return []
    return [f"{check} (a pass that changes nothing moves the logits of {tokens.shape[1]} tokens by {off:.2g})"]


def _around(model: Model, tokens: Array) -> list[str]:
    """Whether hooks on the model as a whole change its logits: they come after all that a trace hears of."""
    module = model.backend.module
    if module is None:
        return []
    given = as_tensor(model, tokens)
    with torch.no_grad():
        whole = module(given, use_cache=False).logits[0]
    heard = traces.short_run(model.traced, handles(model), given)[-1]
    off = traces.far_off(heard, whole)
    if off <= TOLERANCE.get(model.dtype, TOLERANCE["float32"]) * (float(whole.float().std()) or 1.0):
        return []
    return [f"identity (a hook on the whole model moves its logits by {off:.2g}, and no trace hears of it)"]


def line_of(error: Exception) -> str:
    """The last line of what an error says."""
    return next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), type(error).__name__)


def _most(difference: Array) -> float:
    return float(np.abs(difference).max())


def _change(model: Model, name: str, random: np.random.RandomState) -> Array:
    """A vector to add to a part: of all heads, where it has heads."""
    component, shape = Component(name), model.shape
    width = shape.kv_width if component.of_keys else shape.width if component.per_head else shape.d_model
    return random.standard_normal(shape.d_mlp if component.per_neuron else width)


def _twins(model: Model, probes: list[Probe]) -> list[tuple[int, Probe]]:
    """The number of a probe, and a probe of another part of its layer that comes to the same."""
    others: dict[tuple[str, ...], list[str]] = {
        ("attn_out",): [] if model.shape.parallel or unwritable(model, "resid_mid") else ["resid_mid"]
    }
    first: dict[tuple[str, ...], list[str]] = {("resid_pre",): list(model.family.embeddings)}
    return [
        (number, one._replace(names=(name,)))
        for number, one in enumerate(probes)
        for name in (others if one.layer else others | first).get(one.names, [])
    ]


def _plan(model: Model, tokens: Array, at: int, probes: list[Probe]) -> tuple[Plan, list[CompiledMetric], Inputs]:
    """Planned passes that probe the logits, the first of one that changes nothing."""
    conditions: list[tuple[Edit, ...]] = [(Patch(Site(Component.resid_pre, 0), source="own"),)]
    for one in probes:
        adds: list[Edit] = []
        for name, change in zip(one.names, one.changes, strict=True):
            component = Component(name)
            if component.per_head:
                each = change.reshape(-1, model.shape.d_head)
                adds += [Add(Site(component, one.layer, head, (at,)), part) for head, part in enumerate(each)]
            else:
                adds.append(Add(Site(component, one.layer, None, (at,)), change))
        conditions.append(Compose(*adds).edits())
    length = tokens.shape[1]
    group = Group((0,), length, tuple(_scored(length)))
    plan = make_plan(
        conditions, model=model.name, shape=model.shape, groups=[group], runs=["own"], base="own", overhead=0.0
    )
    return plan, [CompiledMetric("probe", "logits", probe, {"own": ({},)})], Inputs({"own": (tokens,)})


def _rows(model: Model, tokens: Array, at: int, probes: list[Probe]) -> tuple[Any, dict[ReadSite, list[RowChange]]]:
    """Tokens for the model's own pass, a row for each probe, and the changes that are put into it."""
    writes: dict[ReadSite, list[RowChange]] = {}
    shape, width = model.shape, tokens.shape[1]
    for row, one in enumerate(probes, start=1):
        for name, change in zip(one.names, one.changes, strict=True):
            point = Component(name).point
            full = np.zeros((width, shape.qkv_width if point == "qkv" else len(change)), dtype=np.float32)
            full[at, activations.columns(name, None, shape.heads, shape.d_head, shape.kv_heads)] = change
            added: RowChange = {"row": row, "change": torch.as_tensor(full, device=model.device)}
            writes.setdefault((one.layer, point), []).append(added)
    return as_tensor(model, np.repeat(tokens, len(probes) + 1, axis=0)), writes


def _scored(length: int) -> list[int]:
    """Every other position or fewer, the last among them, so that the last layer is computed in part."""
    return list(range(length - 1, -1, -max(2, length // 16)))[::-1]


def probe(logits: torch.Tensor) -> torch.Tensor:
    """A sum of all logits with weights of both signs, as large as a logit."""
    size = logits.shape[-1]
    weights = torch.cos(1.7 * torch.arange(size, device=logits.device)) * (2 / size) ** 0.5
    probes: torch.Tensor = (logits.float() * weights).sum(-1)
    return probes
