"""Estimates from gradients: what an intervention changes, to first order, from a few passes for a whole grid.

The estimate of ``metric(changed) - metric(base)`` is the sum over an edit's positions and columns of
``(new - old) * d metric / d value``: positive where the metric grows. ``"gradient"`` takes the derivative at the base
run (attribution patching). ``"integrated"`` takes its mean on the straight line from old to new, at the middles of
equal steps, with the edits of one kind, layer and component on their lines together (all heads of a layer, say), so an
estimate depends on which others are asked for beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import nnsight
import torch

from ..errors import DeclarationError
from . import forward
from .cost import row_bytes
from .engine import check_readers, halves_of, look
from .jobs import Job
from .known import Known, Points, Reader
from .lowering import Write
from .memory import is_out_of_memory
from .models import Model
from .native import handles, native_point, nothing, read_points
from .outcome import Inputs, Outcome, Piece, as_array
from .packing import Chunk, Pass
from .paths import PathPatch
from .plan import Plan
from .steering import Knockout

Place = tuple[int, str]
AT_ONCE = 32
"""Conditions whose new values are held together."""


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
        Called with examples done and in all.
    """
    check_estimable(plan, readers, steps)
    check_readers(plan, readers)
    outcome, done = Outcome(plan), 0
    reference: dict[int, Points] = {}
    waiting = list(_chunks(plan, steps or 1))
    total = sum(chunk.size for chunk in waiting)
    while waiting:
        chunk = waiting.pop(0)
        try:
            if plan.uses_reference and chunk.group not in reference:
                reference = {chunk.group: read_points(model, inputs.reference[chunk.group], plan.reference_sites())}
            known, runs = look(model, plan, chunk, readers, inputs, reference.get(chunk.group, {}))
            found = _estimates(model, plan, chunk, known, [reader.name for reader in readers], steps)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            waiting = halves_of(model, chunk, error) + waiting
            continue
        for run, values in runs.items():
            outcome.put(outcome.run_piece(chunk, run, values))
        if plan.conditions:
            base = {name: as_array(runs[plan.base][name]) for name in found}
            estimates = {name: base[name] + as_array(change)[..., None] for name, change in found.items()}
            outcome.put(Piece(chunk.group, chunk.examples, estimates, None, tuple(range(len(plan.conditions)))))
        done += chunk.size
        if progress is not None:
            progress(done, total)
    return outcome


def check_estimable(plan: Plan, readers: Sequence[Reader], steps: int | None) -> None:
    """Refuse what has no estimate: knocked-out attention, paths, values written twice, slopes that must be 0."""
    for edits in plan.conditions:
        for edit in edits:
            if isinstance(edit, Knockout | PathPatch):
                raise DeclarationError(
                    f"{edit!r} has no gradient estimate: possible are ablations, Patch, Add and Scale; measure it with "
                    "estimator='exact'"
                )
    for group in plan.writes:
        for writes in group:
            for one, other in combinations(writes, 2):
                if _meet(one, other):
                    raise DeclarationError(
                        f"{one.edit!r} and {other.edit!r} write to one place one after the other, which has no "
                        "gradient estimate; measure it with estimator='exact'"
                    )
    for reader in readers:
        if reader.needs_base and steps is None:
            raise DeclarationError(
                f"{reader.name} is least at the base run, where its slope is 0 whatever is done: use "
                "estimator='integrated' or 'exact'"
            )


def _meet(one: Write, other: Write) -> bool:
    same_head = one.head is None or other.head is None or one.head == other.head
    shared = one.positions is None or other.positions is None or bool({*one.positions} & {*other.positions})
    return (one.layer, one.place) == (other.layer, other.place) and same_head and shared


def _chunks(plan: Plan, steps: int) -> Iterator[Chunk]:
    """Examples in pieces whose whole forward pass can be kept for the way back."""
    for chunk in plan.chunks:
        held = plan.budget // 4 // (row_bytes(plan.shape, plan.extent(chunk), True) * plan.shape.layers * steps)
        layers = sorted({(write.layer, at) for at, writes in enumerate(plan.writes[chunk.group]) for write in writes})
        passes = tuple(Pass((number,), ((layer, 0),), 0) for layer, number in layers)
        for start in range(*chunk.examples, max(1, held)):
            yield Chunk(chunk.group, (start, min(start + max(1, held), chunk.examples[1])), passes)


def _estimates(
    model: Model, plan: Plan, chunk: Chunk, known: Known, names: list[str], steps: int | None
) -> dict[str, torch.Tensor]:
    """Reader name to ``(condition, example)``."""
    found = {name: torch.zeros(len(plan.conditions), chunk.size, device=model.device) for name in names}
    together: dict[Any, list[tuple[int, Write]]] = {}
    for number, writes in enumerate(plan.writes[chunk.group]):
        for write in writes:
            together.setdefault((write.layer, write.place, _kind(write) if steps else ""), []).append((number, write))
    places = sorted({place[:2] for place in together})
    if not places:
        return found
    values, slopes = _slopes(model, plan, chunk, known, places, names, {}, 1)
    for (*layer_place, _), members in sorted(together.items(), key=lambda item: str(item[0])):
        place = (layer_place[0], layer_place[1])
        for piece in _pieces(members) if steps is None else [members]:
            changes = _changes(model, plan, chunk, known, piece)
            for apart in [changes] if steps is None else _apart(changes, values[place]):
                here = {name: slopes[name][place] for name in names}
                if steps is not None:
                    on_the_way = {place: list(_on_the_way(apart, values[place], steps, chunk.size))}
                    _, there = _slopes(model, plan, chunk, known, [place], names, on_the_way, steps)
                    shape = (steps, chunk.size, *values[place].shape[1:])
                    here = {name: there[name][place].reshape(shape).mean(0) for name in names}
                for change in apart:
                    for name in names:
                        found[name][change.condition] += _along(change, values[place], here[name])
    return found


def _pieces(members: list[tuple[int, Write]]) -> Iterator[list[tuple[int, Write]]]:
    """Few enough at a time that their new values take little memory."""
    for start in range(0, len(members), AT_ONCE):
        yield members[start : start + AT_ONCE]


def _kind(write: Write) -> str:
    """What edits have in common that move together in the integrated estimate: all but where they are."""
    fields = {name: value for name, value in vars(write.edit).items() if name != "site"}
    return f"{type(write.edit).__name__} {fields}"


def _along(change: Change, old: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return (change.delta(old) * change.cut(slope)).flatten(1).sum(1)


def _changes(
    model: Model, plan: Plan, chunk: Chunk, known: Known, members: Sequence[tuple[int, Write]]
) -> list[Change]:
    """Writes of conditions as the engine makes them."""
    one = Pass(tuple(number for number, _ in members), ((0, 0),) * len(members), 0)
    job = Job(model, plan, chunk, one, known, chunk.examples)
    for unit, (_, write) in enumerate(members):
        job.write(write, unit)
    return [
        Change(members[rows.start // chunk.size][0], place, where, columns, how, new)
        for place, writes in job.writes.items()
        for rows, where, columns, how, new in writes
    ]


def _apart(changes: Sequence[Change], old: torch.Tensor) -> list[list[Change]]:
    """Changes of one place in sets whose members touch different numbers."""
    sets: list[tuple[list[Change], torch.Tensor]] = []
    for change in changes:
        touched = change.touched(old)
        for members, marks in sets:
            if not (marks & touched).any():
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
