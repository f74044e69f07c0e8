"""Runs a plan on a server: groups of passes as jobs, of which metrics come back. The driver beside `engine`.

A group of passes is one session: what is read of the runs stays on the server until its passes are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ...errors import ModelError
from ..plan.passes import ExampleChunk, Pass
from ..plan.plan import Plan
from ..run.activations import native_point, point_of
from ..run.cache import CompiledMetric
from ..run.engine import check_readers, kernels_of
from ..run.gradients import chunks_of, described_estimate
from ..run.outcome import FinishedValues, Inputs, Keeper, Outcome, PassSlice
from ..run.pass_spec import PassSpecBuilder
from ..traced import server_jobs
from . import ledger
from .job import Failed, RemoteJob
from .model import RemoteModel
from .protocol import Shapes, deserialize_values, room
from .refusals import SHOWN, is_memory

ROWS = 8192
"""Rows of one job, more or less."""
Say = Callable[[str], None]
Told = Callable[[int, int], None]


def run_plan(
    model: RemoteModel,
    plan: Plan,
    readers: Sequence[CompiledMetric],
    inputs: Inputs,
    progress: Told | None = None,
    keeper: Keeper | None = None,
    *,
    positions: bool = True,
    say: Say | None = None,
) -> Outcome:
    """As `engine.run_plan`, on the server of `model`.

    Parameters
    ----------
    model, plan, readers, inputs, progress, keeper
        As there; what was sent before, and may be finished by now, is asked for instead of being sent again.
    positions : bool
        Whether values come back for each scored position, or their mean.
    say : callable, optional
        Gets a line on how the jobs are doing.
    """
    check_readers(plan, readers)
    sweep, outcome = RemoteSweep(model, plan, readers, inputs, positions), Outcome(plan)
    outcome.take(keeper)
    waiting = [session for whole in sessions(plan) for session in sweep.left(whole, outcome)]
    while waiting:
        again: list[list[ExampleChunk]] = []
        jobs = LazyJobs([partial(sweep.job, session) for session in waiting])
        for at, result in model.answers(jobs, say):
            if isinstance(result, Failed):
                again += sweep.cut(waiting[at], jobs.keys[at], result)
                continue
            for piece in pieces(plan, waiting[at], result):
                outcome.put(piece)
                if keeper is not None:
                    keeper.keep(piece)
            model.office.close(jobs.keys[at])
            if progress is not None:
                left = sum(len(chunk.passes) + len(plan.runs) for chunk in outcome.missing())
                progress(plan.steps - left, plan.steps)
        waiting = again
    return outcome.close()


def run_estimate(
    model: RemoteModel,
    plan: Plan,
    readers: Sequence[CompiledMetric],
    inputs: Inputs,
    steps: int | None,
    progress: Told | None = None,
    *,
    positions: bool = True,
    say: Say | None = None,
) -> Outcome:
    """As `gradients.run_estimate`, on the server of `model`."""
    check_readers(plan, readers)
    sweep, outcome, done = RemoteSweep(model, plan, readers, inputs, positions), Outcome(plan), 0
    chunks = list(chunks_of(plan, steps or 1))
    total = sum(chunk.size for chunk in chunks)
    jobs = LazyJobs([partial(sweep.estimate, chunk, steps) for chunk in chunks])
    for at, result in model.answers(jobs, say):
        if isinstance(result, Failed):
            raise model.office.failure(result)
        *runs, change = result
        chunk = chunks[at]
        for piece in _runs(plan, chunk, runs):
            outcome.put(piece)
        if plan.conditions:
            base = {name: value.numpy() for name, value in runs[0].items()}
            estimates = {name: base[name] + value.numpy()[..., None] for name, value in change.items()}
            outcome.put(
                FinishedValues(chunk.group, chunk.examples, estimates, None, tuple(range(len(plan.conditions))))
            )
        done += chunk.size
        if progress is not None:
            progress(done, total)
    return outcome


def sessions(plan: Plan) -> Iterator[list[ExampleChunk]]:
    """The chunks of a plan in groups, the same ones however much of them is done; long chunks in several."""
    group: list[ExampleChunk] = []
    rows = 0
    for chunk in plan.chunks:
        passes: list[Pass] = []
        for one in (*chunk.passes, None):
            more = len(one.conditions) * chunk.size if one is not None else 0
            if group and not passes and rows + more + chunk.size * len(plan.runs) > ROWS:
                yield group
                group, rows = [], 0
            if one is None:
                break
            if passes and rows + more > ROWS:
                yield [*group, replace(chunk, passes=tuple(passes))]
                group, passes, rows = [], [], 0
            passes.append(one)
            rows += more
        group.append(replace(chunk, passes=tuple(passes)))
        rows += chunk.size * len(plan.runs)
    if group:
        yield group


@dataclass(frozen=True)
class RemoteSweep:
    """A plan that runs on a server; the fields are as for `run_plan`."""

    model: RemoteModel
    plan: Plan
    readers: Sequence[CompiledMetric]
    inputs: Inputs
    positions: bool

    def left(self, session: list[ExampleChunk], outcome: Outcome) -> list[list[ExampleChunk]]:
        """What is left of a session: all of it, where it was sent before; its parts, where it was cut; or the rest."""
        missing = outcome.missing(session)
        if not missing:
            return []
        job = self.job(session)
        if cut := ledger.current().job(_split_key(job.key)):
            return [left for half in self.halved(session, cut["reason"]) for left in self.left(half, outcome)]
        return [session if missing == session or self.model.office.knows(job) else missing]

    def cut(self, session: list[ExampleChunk], key: str, failed: Failed) -> list[list[ExampleChunk]]:
        """The parts of a session that needed too much memory, which is written down; an error where it failed else."""
        if not is_memory(failed.reason):
            raise self.model.office.failure(failed)
        halves = self.halved(session, failed.reason)
        ledger.current().note_job(_split_key(key), {"reason": failed.reason})
        return halves

    def halved(self, session: list[ExampleChunk], reason: str) -> list[list[ExampleChunk]]:
        """The chunks of a session, each alone; of a single one, halves of its passes or of its examples."""
        if len(session) > 1:
            return [[chunk] for chunk in session]
        (chunk,) = session
        parts = [
            half
            for one in chunk.passes
            for half in PassSlice(one, (0, chunk.size)).halves() or [PassSlice(one, (0, chunk.size))]
        ]
        if all(part.examples == (0, chunk.size) for part in parts) and len(parts) > len(chunk.passes):
            return [[replace(chunk, passes=tuple(part.one for part in parts))]]
        start, stop = chunk.examples
        if stop - start < 2:
            raise ModelError(
                f"a single prompt needs more memory on {self.model.name} than {self.model.office.host} has left: "
                f"{reason.strip().splitlines()[-1][:SHOWN]}"
            )
        middle = (start + stop) // 2
        return [[replace(chunk, examples=span)] for span in ((start, middle), (middle, stop))]

    def job(self, session: list[ExampleChunk]) -> RemoteJob:
        """The job that runs the chunks of a session."""
        return self._job(
            "passes", server_jobs.passes, [self._chunk(chunk, chunk) for chunk in session], self.shapes(session)
        )

    def shapes(self, session: list[ExampleChunk]) -> list[Shapes]:
        """What the chunks of a session give: the values of each run and of each pass, by reader."""
        shape = self.model.shape
        found: list[Shapes] = []
        for chunk in session:
            scored = len(self.plan.groups[chunk.group].scored) if self.positions else 1
            for rows in [*([1] * len(self.plan.runs)), *(len(one.conditions) for one in chunk.passes)]:
                kinds = {"pattern": (shape.layers, shape.heads), "logits": (scored,)}
                found.append({one.name: (rows * chunk.size, *kinds[one.kind]) for one in self.readers})
        return found

    def estimate(self, chunk: ExampleChunk, steps: int | None) -> RemoteJob:
        """The job that estimates every condition for the examples of a chunk."""
        laid = self._chunk(replace(chunk, passes=()), chunk)
        names = [reader.name for reader in self.readers]
        laid["estimate"] = described_estimate(self.model, self.plan, chunk, self._drawn(chunk), names, steps)
        change = dict.fromkeys(names, (len(self.plan.conditions), chunk.size))
        wanted = [*self.shapes([replace(chunk, passes=())]), change]
        return self._job("estimates", server_jobs.estimates, [laid], wanted)

    def _drawn(self, chunk: ExampleChunk) -> int:
        """Examples of the reference draw."""
        return len(self.inputs.reference[chunk.group]) if self.inputs.reference else 0

    def _job(self, what: str, function: Any, laid: list[Any], wanted: list[Shapes]) -> RemoteJob:
        compares = any(reader.needs_base for reader in self.readers)
        program = {"chunks": laid, "positions": self.positions, "compares": compares}
        return self.model.job(what, function, program, partial(deserialize_values, wanted=wanted), room(wanted))

    def _chunk(self, chunk: ExampleChunk, reads: ExampleChunk) -> dict[str, Any]:
        """A chunk as `server_jobs.passes` takes it."""
        model, plan = self.model, self.plan
        layers, group = model.shape.layers, plan.groups[chunk.group]
        compare = [reader.name for reader in self.readers if reader.needs_base]
        wanted = {run: {point_of(site) for site in sites} for run, sites in plan.sources().items()}
        base = {native_point(layer, name, layers) for layer, name in plan.base_points(reads)}
        wanted[plan.base] = wanted.get(plan.base, set()) | base
        runs = []
        for run in ordered(plan):
            watch, score = kernels_of(model, plan, self.readers, run, chunk, compare)
            tokens = _tensor(self.inputs.runs[run][chunk.group][slice(*chunk.examples)])
            runs.append((run, tokens, list(group.scored), sorted(wanted.get(run, set())), watch, score))
        reference = None
        if plan.uses_reference:
            points = sorted({point_of(site) for site in plan.reference_sites()})
            reference = (_tensor(self.inputs.reference[chunk.group]), points)
        passes = []
        for one in chunk.passes:
            points = sorted(plan.points_of(chunk, one))
            taken = [
                ((layer, point), native_point(layer, point, layers))
                for layer, point in points
                if point not in ("embed", "pos_embed")
            ]
            spec = PassSpecBuilder(model, plan, chunk, one, self._drawn(chunk), chunk.examples).build()
            passes.append((spec, taken))
        return {"runs": runs, "reference": reference, "passes": passes}


class LazyJobs(Sequence[RemoteJob]):
    """Jobs that are made when they are asked for: those of a long sweep are large together. Their keys are kept."""

    def __init__(self, makers: Sequence[Callable[[], RemoteJob]]) -> None:
        self.makers = makers
        self.keys: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, at: Any) -> Any:
        job = self.makers[at]()
        self.keys[at] = job.key
        return job


def _split_key(key: str) -> str:
    """Where it is written down that a job needed too much memory."""
    return f"cut-{key}"


def ordered(plan: Plan) -> list[str]:
    """The runs, the base run first: some metrics compare with it."""
    return sorted(plan.runs, key=lambda run: run != plan.base)


def pieces(plan: Plan, session: list[ExampleChunk], values: list[dict[str, torch.Tensor]]) -> Iterator[FinishedValues]:
    """What came back, as the engine would have found it."""
    values = list(values)
    for chunk in session:
        yield from _runs(plan, chunk, [values.pop(0) for _ in plan.runs])
        for one in chunk.passes:
            made = {
                name: value.reshape(len(one.conditions), chunk.size, *value.shape[1:]).numpy()
                for name, value in values.pop(0).items()
            }
            yield FinishedValues(chunk.group, chunk.examples, made, None, one.conditions)


def _runs(plan: Plan, chunk: ExampleChunk, values: list[dict[str, torch.Tensor]]) -> Iterator[FinishedValues]:
    for run, one in zip(ordered(plan), values, strict=True):
        yield FinishedValues(chunk.group, chunk.examples, {name: value.numpy() for name, value in one.items()}, run)


def _tensor(array: Any) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(array))
