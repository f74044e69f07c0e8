"""Estimates from gradients: what an intervention changes, to first order, from a few passes for a whole grid.

The estimate of ``metric(changed) - metric(base)`` is the sum over an edit's positions and columns of
``(new - old) * d metric / d value``: positive where the metric grows. ``"gradient"`` takes the derivative at the base
run (attribution patching). ``"integrated"`` takes its mean on the straight line from old to new, at the middles of
equal steps, with all sites of one layer and component on their lines together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch

from ..errors import DeclarationError
from . import forward
from .engine import Inputs, Outcome, check_readers, look
from .jobs import Job, handles
from .known import Known, Points, Reader
from .models import Model
from .native import native_point, nothing, read_points
from .packing import Chunk, Pass, rows_within
from .paths import PathPatch
from .plan import Plan
from .steering import Knockout

Place = tuple[int, str]


@dataclass(frozen=True)
class Change:
    """One write of one condition: where, and how it changes the value there."""

    condition: int
    place: Place
    where: Any
    columns: slice
    how: str
    new: torch.Tensor | float | None

    def delta(self, old: torch.Tensor) -> torch.Tensor:
        """``new - old`` for the value at its place, ``(example, position, column)``."""
        there = self.cut(old)
        if self.new is None:
            return -there
        if not isinstance(self.new, torch.Tensor):
            return (self.new - 1) * there
        new = self.new.to(there.dtype)
        return new - there if self.how == "set" else new.expand_as(there)

    def cut(self, value: torch.Tensor) -> torch.Tensor:
        """The part of a value at its place that it changes."""
        if self.place[1] == "pattern":
            return value[:, self.columns][:, :, self.where]
        return value[:, self.where, self.columns]

    def touched(self, value: torch.Tensor) -> torch.Tensor:
        """Which numbers of a value at its place it changes."""
        marks = torch.zeros_like(value[:1], dtype=torch.bool)
        if self.place[1] == "pattern":
            marks[:, self.columns][:, :, self.where] = True
        else:
            marks[:, self.where, self.columns] = True
        return marks


def run_estimate(
    model: Model,
    plan: Plan,
    readers: Sequence[Reader],
    inputs: Inputs,
    steps: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Estimate every condition of `plan`; the runs as they are stay exact.

    Parameters
    ----------
    model, plan, readers, inputs
        As for `engine.run_plan`.
    steps : int, optional
        Of the integrated estimate; left out, the gradient at the base run.
    progress : callable, optional
        Called with chunks of examples done and in all.
    """
    check_estimable(plan)
    check_readers(plan, readers)
    outcome = Outcome()
    reference: dict[int, Points] = {}
    chunks = list(_chunks(plan, steps or 1))
    for number, chunk in enumerate(chunks, start=1):
        if plan.uses_reference and chunk.group not in reference:
            reference = {chunk.group: read_points(model, inputs.reference[chunk.group], plan.reference_sites())}
        known, runs = look(model, plan, chunk, readers, inputs, reference.get(chunk.group, {}))
        for run, values in runs.items():
            outcome.put_run(plan, chunk, run, values)
        for name, estimate in _estimates(model, plan, chunk, known, [reader.name for reader in readers], steps).items():
            table = outcome.values[name, chunk.group]
            table[:, slice(*chunk.examples)] += estimate.float().cpu().numpy()[..., None]
        if progress is not None:
            progress(number, len(chunks))
    return outcome


def check_estimable(plan: Plan) -> None:
    """Refuse interventions that are no change of a value."""
    for edits in plan.conditions:
        for edit in edits:
            if isinstance(edit, Knockout | PathPatch):
                raise DeclarationError(
                    f"{edit!r} has no gradient estimate: possible are ablations, Patch, Add and Scale; measure it with "
                    "estimator='exact'"
                )


def _chunks(plan: Plan, steps: int) -> Iterator[Chunk]:
    """Examples in pieces whose whole forward pass can be kept for the way back."""
    for chunk in plan.chunks:
        held = max(1, rows_within(plan.budget, plan.shape, plan.extent(chunk)) // (plan.shape.layers * steps))
        from_layers = {
            (write.layer, number) for number, writes in enumerate(plan.writes[chunk.group]) for write in writes
        }
        passes = tuple(Pass((number,), ((layer, 0),), 0) for layer, number in sorted(from_layers))
        for start in range(*chunk.examples, held):
            yield Chunk(chunk.group, (start, min(start + held, chunk.examples[1])), passes)


def _estimates(
    model: Model, plan: Plan, chunk: Chunk, known: Known, names: list[str], steps: int | None
) -> dict[str, torch.Tensor]:
    """Reader name to ``(condition, example)``."""
    found = {name: torch.zeros(len(plan.conditions), chunk.size, device=model.device) for name in names}
    changes = _changes(model, plan, chunk, known)
    if not changes:
        return found
    places = sorted({change.place for change in changes})
    values, slopes = _slopes(model, plan, chunk, known, places, names, {}, 1)
    if steps is None:
        for change in changes:
            for name in names:
                found[name][change.condition] += _along(change, values[change.place], slopes[name][change.place])
        return found
    for together in _apart(changes, values):
        place = together[0].place
        writes = {place: list(_on_the_way(together, values[place], steps, chunk.size))}
        _, slopes = _slopes(model, plan, chunk, known, [place], names, writes, steps)
        for name in names:
            slope = slopes[name][place].reshape(steps, chunk.size, *values[place].shape[1:]).mean(0)
            for change in together:
                found[name][change.condition] += _along(change, values[place], slope)
    return found


def _along(change: Change, old: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return (change.delta(old) * change.cut(slope)).flatten(1).sum(1)


def _changes(model: Model, plan: Plan, chunk: Chunk, known: Known) -> list[Change]:
    """The writes of all conditions, as the engine makes them."""
    numbers = tuple(number for number, writes in enumerate(plan.writes[chunk.group]) if writes)
    one = Pass(numbers, ((0, 0),) * len(numbers), 0)
    job = Job(model, plan, chunk, one, known, chunk.examples).make()
    changes = []
    for place, writes in job["writes"].items():
        for rows, where, columns, how, new in writes:
            changes.append(Change(numbers[rows.start // chunk.size], place, where, columns, how, new))
    return changes


def _apart(changes: Sequence[Change], values: Mapping[Place, torch.Tensor]) -> list[list[Change]]:
    """Changes of one place each, in sets whose members touch different numbers."""
    sets: list[tuple[list[Change], torch.Tensor]] = []
    for change in changes:
        touched = change.touched(values[change.place])
        for members, marks in sets:
            if members[0].place == change.place and not (marks & touched).any():
                members.append(change)
                marks |= touched
                break
        else:
            sets.append(([change], touched))
    return [members for members, _ in sets]


def _on_the_way(changes: Sequence[Change], old: torch.Tensor, steps: int, examples: int) -> Iterator[Any]:
    """Writes that bring the values at a place to the middle of each step of their line, step by step as rows."""
    for step in range(steps):
        rows = slice(step * examples, (step + 1) * examples)
        for change in changes:
            moved = change.cut(old) + (step + 0.5) / steps * change.delta(old)
            yield rows, change.where, change.columns, "set", moved


def _slopes(
    model: Model,
    plan: Plan,
    chunk: Chunk,
    known: Known,
    places: list[Place],
    names: list[str],
    writes: dict[Place, list[Any]],
    copies: int,
) -> tuple[dict[Place, torch.Tensor], dict[str, dict[Place, torch.Tensor]]]:
    """What is at places, and the derivative of each reader's mean over scored positions by it."""
    first = places[0][0]
    one = Pass((0,) * copies, ((first, 0),) * copies, 0)
    job = {**Job(model, plan, chunk, one, known, chunk.examples).frame(), "writes": writes}
    base = {(first, "stream"): known.base[native_point(first, "stream", model.shape.layers)]}
    parts = handles(model)
    with torch.enable_grad(), model.traced.trace(nothing(model), use_cache=False) as tracer:
        found = forward.slopes(parts, base, job, places, names)
        nnsight.save(found)
        tracer.stop()
    values, slopes = found
    return dict(values), {name: dict(slope) for name, slope in slopes.items()}
