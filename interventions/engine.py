"""Engine: runs a plan inside nnsight tracing contexts and returns arrays. Owns every trace of the package.

Imports the model handle, the plan and ops; knows no metric (they come as kernels), no labels, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import nnsight
import numpy as np
import torch

from ..errors import DeclarationError
from . import ops
from .edits import SiteEdit
from .models import Model
from .plan import DEFAULT_BUDGET, Chunk, Plan, check_site, positions_in, rows_within
from .shape import Group
from .sites import Component, Site
from .values import edit_value

Array = np.ndarray[Any, Any]
Points = dict[tuple[int, str], torch.Tensor]


@dataclass(frozen=True)
class Reader:
    """A metric as the engine sees it.

    Attributes
    ----------
    name : str
    kind : {"logits", "pattern"}
    kernel : callable
        ``kernel(logits, **arguments) -> (row, scored)`` with logits ``(row, scored, vocabulary)``, or
        ``kernel(pattern, **arguments) -> (row, head)`` with pattern ``(row, head, query, key)``, once for each layer.
    arguments : mapping of run name to a tuple of mappings
        For each group, argument name to an array whose first axis is the example.
    needs_base : bool
        Whether the kernel also takes ``base_logits`` of the same rows, without any intervention.
    """

    name: str
    kind: str
    kernel: Callable[..., torch.Tensor]
    arguments: Mapping[str, tuple[Mapping[str, Array], ...]]
    needs_base: bool = False


@dataclass(frozen=True)
class Inputs:
    """Token ids for the engine, group by group.

    Attributes
    ----------
    runs : mapping of run name to a tuple of arrays (example, position), one for each group
    reference : tuple of arrays (example, position), one for each group
        The reference draw; may be empty where no edit uses it.
    """

    runs: Mapping[str, tuple[Array, ...]]
    reference: tuple[Array, ...] = ()


@dataclass
class Outcome:
    """Values by reader and group: ``values[name, group]`` and ``baseline[name, run, group]``.

    Arrays are ``(condition, example, scored)`` for logits readers, ``(condition, example, layer, head)`` for pattern
    readers; the baseline lacks ``condition``.
    """

    values: dict[tuple[str, int], Array] = field(default_factory=dict)
    baseline: dict[tuple[str, str, int], Array] = field(default_factory=dict)

    def put(self, plan: Plan, chunk: Chunk, what: str | tuple[int, int], values: Mapping[str, torch.Tensor]) -> None:
        """Put in what a pass gave: a run as it is (its name), or a span of conditions."""
        size, examples = len(plan.groups[chunk.group].examples), slice(*chunk.examples)
        for name, tensor in values.items():
            value = tensor.float().cpu().numpy()
            if isinstance(what, str):
                empty = np.empty((size, *value.shape[1:]), dtype=np.float32)
                self.baseline.setdefault((name, what, chunk.group), empty)[examples] = value
            else:
                empty = np.empty((len(plan.conditions), size, *value.shape[1:]), dtype=np.float32)
                table = self.values.setdefault((name, chunk.group), empty)
                table[slice(*what), examples] = value.reshape(what[1] - what[0], -1, *value.shape[1:])


def run_plan(
    model: Model,
    plan: Plan,
    readers: Sequence[Reader],
    inputs: Inputs,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Measure every run as it is, and every condition of `plan`.

    Parameters
    ----------
    model : Model
    plan : Plan
    readers : sequence of Reader
    inputs : Inputs
    progress : callable, optional
        Called with passes done and passes in all.
    """
    outcome, done = Outcome(), 0
    reference: dict[int, Points] = {}
    for chunk in plan.chunks:
        if plan.uses_reference and chunk.group not in reference:
            reference = {chunk.group: read_points(model, inputs.reference[chunk.group], plan.reference_sites())}
        for what, values in run_chunk(model, plan, chunk, readers, inputs, reference.get(chunk.group, {})):
            outcome.put(plan, chunk, what, values)
            done += 1
            if progress is not None:
                progress(done, plan.steps)
    return outcome


def run_chunk(
    model: Model, plan: Plan, chunk: Chunk, readers: Sequence[Reader], inputs: Inputs, reference: Points
) -> Iterator[tuple[str | tuple[int, int], dict[str, torch.Tensor]]]:
    """The passes of a chunk, one by one: ``(run name or span of conditions, values by reader)``.

    `reference` holds what was read of the reference draw for the chunk's group.
    """
    group, (start, stop) = plan.groups[chunk.group], chunk.examples
    arrays = {run: inputs.runs[run][chunk.group][start:stop] for run in plan.runs}
    tokens = {run: _tensor(model, array) for run, array in arrays.items()}
    arguments = {run: [_arguments(model, reader, run, chunk) for reader in readers] for run in plan.runs}
    base_logits = None
    for run in sorted(plan.runs, key=lambda run: run != plan.base):  # the base run first: kl compares with it
        values, logits = _forward(model, group, tokens[run], {}, readers, arguments[run], 1, base_logits)
        base_logits = base_logits if logits is None else logits
        yield run, values
    sources = {run: read_points(model, arrays[run], sites) for run, sites in plan.sources().items()}
    for span in chunk.conditions:
        edits = plan.conditions[slice(*span)]
        writes = _writes(model, edits, group.length, chunk.examples, sources, reference)
        rows = tokens[plan.base].repeat(len(edits), 1)
        yield span, _forward(model, group, rows, writes, readers, arguments[plan.base], len(edits), base_logits)[0]


def read_points(model: Model, tokens: Array, sites: Iterable[Site]) -> Points:
    """The tensors at the points of `sites`, ``(example, position, width)``, from a pass without intervention."""
    wanted = {_point(site) for site in sites}
    group = Group(tuple(range(len(tokens))), tokens.shape[1], ())
    rows = rows_within(DEFAULT_BUDGET, model.shape, group, False)
    pieces = [
        _read(model, _tensor(model, tokens[start : start + rows]), wanted) for start in range(0, len(tokens), rows)
    ]
    return {at: torch.cat([piece[at] for piece in pieces]) for at in wanted}


def capture_site(model: Model, points: Points, site: Site) -> torch.Tensor:
    """The value of `site` from the tensors of `read_points`, in the shape that `Component` states."""
    heads, d_head = model.shape.heads, model.shape.d_head
    point = points[_point(site)]
    if site.component is Component.pattern:
        pattern = ops.pattern_at(point, heads, model.scaling(site.layer))
        pattern = pattern if site.head is None else pattern[:, site.head]
        queries = positions_in(site, point.shape[1])
        return pattern if queries is None else pattern[..., queries, :]
    value = point
    if site.component is Component.head_out:
        z = ops.split_heads(point, heads)
        value = torch.einsum("ephd,hdm->ephm", z, model.head_weights(site.layer).W_O)
        value = value if site.head is None else value[:, :, site.head]
    elif site.component.per_head:
        value = point[..., ops.columns(site.component, site.head, heads, d_head)]
        value = ops.split_heads(value, heads) if site.head is None else value
    at = positions_in(site, point.shape[1])
    return value if at is None else value[:, at]


def check_sites(model: Model, sites: Sequence[Site], groups: Sequence[Group]) -> None:
    """Refuse sites that the model or the prompts do not have."""
    if not sites:
        raise DeclarationError("nothing to capture: name at least one site, such as Head(1, 2).pattern")
    for site in sites:
        check_site(site, model.name, model.shape, groups)


def _blocks(model: Model) -> Any:
    return attrgetter(model.family.blocks)(model.traced)


def _points(model: Model) -> list[tuple[str, str, str]]:
    return [(name, point.path, point.side) for name, point in model.family.points.items()]


def _read(model: Model, tokens: torch.Tensor, wanted: set[tuple[int, str]]) -> Points:
    blocks, points = _blocks(model), _points(model)
    layers = 1 + max(layer for layer, _ in wanted)
    with torch.no_grad(), model.traced.trace(tokens, use_cache=False) as tracer:
        taken, _ = ops.walk(blocks, points, layers, {}, wanted, [], model.shape.heads, [])
        nnsight.save(taken)
        tracer.stop()
    return dict(taken)


def _forward(
    model: Model,
    group: Group,
    tokens: torch.Tensor,
    writes: dict[tuple[int, str], list[Any]],
    readers: Sequence[Reader],
    arguments: Sequence[Mapping[str, torch.Tensor]],
    conditions: int,
    base_logits: torch.Tensor | None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """One trace: values by reader name, and the logits at the scored positions if a reader compares with them."""
    repeated = [{name: _repeat(value, conditions) for name, value in given.items()} for given in arguments]
    pairs = list(zip(readers, repeated, strict=True))
    attend = [(reader.name, reader.kernel, given) for reader, given in pairs if reader.kind == "pattern"]
    score = [
        (reader.name, reader.kernel, given, reader.needs_base) for reader, given in pairs if reader.kind == "logits"
    ]
    keep_logits = base_logits is None and any(needs_base for *_, needs_base in score)
    base = None if base_logits is None else _repeat(base_logits, conditions)
    blocks, points, shape = _blocks(model), _points(model), model.shape
    scalings = [model.scaling(layer) for layer in range(shape.layers)]
    scored = torch.tensor(group.scored, device=tokens.device)
    with torch.no_grad(), model.traced.trace(tokens, use_cache=False, logits_to_keep=scored) as tracer:
        values: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        _, attended = ops.walk(blocks, points, shape.layers, writes, set(), attend, shape.heads, scalings)
        values.update(attended)
        if score:
            logits = model.traced.output.logits
            for name, kernel, given, needs_base in score:
                extra = {"base_logits": logits if base is None else base} if needs_base else {}
                values[name] = kernel(logits, **given, **extra)
            if keep_logits:
                kept["logits"] = logits
        nnsight.save(values)
        nnsight.save(kept)
        tracer.stop()
    return dict(values), kept.get("logits")


def _writes(
    model: Model,
    conditions: Sequence[Sequence[SiteEdit]],
    length: int,
    examples: tuple[int, int],
    sources: Mapping[str, Points],
    reference: Points,
) -> dict[tuple[int, str], list[Any]]:
    """What `ops.write` puts in at each point; condition c owns the c-th run of as many rows as there are examples."""
    writes: dict[tuple[int, str], list[Any]] = {}
    count = examples[1] - examples[0]
    for number, edits in enumerate(conditions):
        rows = slice(number * count, (number + 1) * count)
        for edit in edits:
            at = _point(edit.site)
            cols = ops.columns(edit.site.component, edit.site.head, model.shape.heads, model.shape.d_head)
            positions = positions_in(edit.site, length)
            source = reference if edit.uses_reference else sources.get(edit.run or "", {})
            value = edit_value(edit, source.get(at), cols, positions, examples)
            writes.setdefault(at, []).append((rows, positions, cols, value))
    return writes


def _point(site: Site) -> tuple[int, str]:
    """Where the tensor that holds a site is found."""
    return site.layer, ops.POINT_OF.get(site.component, str(site.component))


def _repeat(value: torch.Tensor, times: int) -> torch.Tensor:
    return value if times == 1 else value.repeat(times, *[1] * (value.dim() - 1))


def _tensor(model: Model, array: Array) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(array), device=model.device)


def _arguments(model: Model, reader: Reader, run: str, chunk: Chunk) -> dict[str, torch.Tensor]:
    given = reader.arguments[run][chunk.group]
    return {name: _tensor(model, value[slice(*chunk.examples)]) for name, value in given.items()}
