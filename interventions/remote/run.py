"""Runs a plan on a server: groups of passes as jobs, of which metrics come back.

A group of passes is one session: what is read of the runs stays on the server until its passes are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...errors import ModelError
from ..declare.graph import Graph
from ..plan.passes import ExampleChunk, Pass
from ..plan.plan import Plan
from ..plan.reads import read_bytes
from ..run.activations import as_tensor, point_of
from ..run.cache import CompiledMetric
from ..run.edge_estimates import described_edges, places_of_conditions, runs_read, senders_read
from ..run.engine import chunk_halves, points_taken, runs_base_first, runs_of
from ..run.gradients import Values, described_estimate
from ..run.outcome import FinishedValues, Inputs, Outcome, PassSlice, values_of_conditions, values_of_run
from ..run.pass_spec import PassSpecBuilder
from ..traced.passes import server_jobs
from ..traced.specs import ChunkSpec, ReferenceSpec
from .job import Failed, RemoteJob
from .model import RemoteModel
from .protocol import Shapes, deserialize_values, room
from .refusals import SHOWN, is_memory

ROWS = 8192
"""Rows of one job, more or less."""
ANSWER = 512 * 2**20
"""Bytes of activations that one job gives, more or less."""
Say = Callable[[str], None]


def sessions(plan: Plan) -> Iterator[list[ExampleChunk]]:
    """The chunks of a plan in groups, the same ones however much of them is done; long chunks in several."""
    group: list[ExampleChunk] = []
    rows = 0
    largest = max((read_bytes(plan.reads, plan.shape, one) for one in plan.groups), default=0)
    most = ROWS if not largest else max(1, min(ROWS, ANSWER // largest))
    for chunk in plan.chunks:
        passes: list[Pass] = []
        for one in (*chunk.passes, None):
            more = len(one.conditions) * chunk.size if one is not None else 0
            if group and not passes and rows + more + chunk.size * len(plan.runs) > most:
                yield group
                group, rows = [], 0
            if one is None:
                break
            if passes and rows + more > most:
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
    """A plan that runs on a server.

    Attributes
    ----------
    model : RemoteModel
    plan : Plan
    readers : sequence of CompiledMetric
    inputs : Inputs
    positions : bool
        Whether values are wanted for each scored position; else their mean.
    say : callable, optional
        Gets a line on how the jobs are doing.
    """

    model: RemoteModel
    plan: Plan
    readers: Sequence[CompiledMetric]
    inputs: Inputs
    positions: bool
    say: Say | None = None

    def execute(self, outcome: Outcome, keep: Callable[[FinishedValues], None], step: Callable[[int], None]) -> None:
        """Run what is missing, as `engine.run_plan` asks for it.

        What was sent before, and may be finished by now, is asked for instead of being sent again.
        """
        begun = outcome.steps(outcome.missing())
        waiting = [session for whole in sessions(self.plan) for session in self.left(whole, outcome)]
        while waiting:
            again: list[list[ExampleChunk]] = []
            jobs = LazyJobs([partial(self.job, session) for session in waiting])
            for at, result in self.model.answers(jobs, self.say):
                if isinstance(result, Failed):
                    again += self.split(waiting[at], jobs.keys[at], result)
                    continue
                for finished in finished_values(self.plan, waiting[at], result):
                    keep(outcome.put(finished))
                self.model.ledger.drop_job(jobs.keys[at])
                step(begun - outcome.steps(outcome.missing()))
            waiting = again

    def estimates(
        self, steps: int | None, chunks: list[ExampleChunk], edges: str = ""
    ) -> Iterator[tuple[ExampleChunk, Values, dict[str, torch.Tensor]]]:
        """Estimate some chunks, as `gradients.run_estimate` asks for it."""
        jobs = LazyJobs([partial(self.estimate, chunk, steps, edges) for chunk in chunks])
        of_conditions = places_of_conditions(self.plan) if edges else None
        for at, result in self.model.answers(jobs, self.say):
            if isinstance(result, Failed):
                raise self.model.queue.failure(result)
            *runs, change = result
            if of_conditions is not None:
                change = {name: value[of_conditions] for name, value in change.items()}
            yield chunks[at], dict(zip(runs_base_first(self.plan), runs, strict=True)), change

    def left(self, session: list[ExampleChunk], outcome: Outcome) -> list[list[ExampleChunk]]:
        """What is left of a session: all of it, where it was sent before; its parts, where it was cut; or the rest."""
        missing = outcome.missing(session)
        if not missing:
            return []
        job = self.job(session)
        if split := self.model.ledger.job(_split_key(job.key)):
            return [left for half in self.halved(session, split["reason"]) for left in self.left(half, outcome)]
        return [session if missing == session or self.model.queue.knows(job, self.model.ledger) else missing]

    def split(self, session: list[ExampleChunk], key: str, failed: Failed) -> list[list[ExampleChunk]]:
        """The parts of a session that needed too much memory, which is written down; an error where it failed else."""
        if not is_memory(failed.reason):
            raise self.model.queue.failure(failed)
        halves = self.halved(session, failed.reason)
        self.model.ledger.note_job(_split_key(key), {"reason": failed.reason})
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
                f"a single prompt needs more memory on {self.model.name} than {self.model.queue.host} has left: "
                f"{reason.strip().splitlines()[-1][:SHOWN]}"
            )
        return [[half] for half in chunk_halves(chunk)]

    def job(self, session: list[ExampleChunk]) -> RemoteJob:
        """The job that runs the chunks of a session."""
        chunks = [self._chunk(chunk, chunk.passes) for chunk in session]
        return self._job("passes", server_jobs.passes, chunks, self.shapes(session))

    def shapes(self, session: list[ExampleChunk]) -> list[Shapes]:
        """What the chunks of a session give: the values of each run and of each pass, by reader."""
        shape = self.model.shape
        found: list[Shapes] = []
        for chunk in session:
            scored = len(self.plan.groups[chunk.group].scored) if self.positions else 1
            read = self.plan.sizes_read(chunk.group)
            for rows in [None] * len(self.plan.runs) + [len(one.conditions) for one in chunk.passes]:
                kinds = {"pattern": (shape.layers, shape.heads), "logits": (scored,)}
                sizes = {one.name: kinds[one.kind] for one in self.readers}
                if rows is not None:
                    sizes = read if self.plan.inside is not None else sizes | read
                found.append({name: ((rows or 1) * chunk.size, *size) for name, size in sizes.items()})
        return found

    def estimate(self, chunk: ExampleChunk, steps: int | None, edges: str = "") -> RemoteJob:
        """The job that estimates every condition, or every edge, for the examples of a chunk."""
        described, names = self._chunk(chunk, ()), [reader.name for reader in self.readers]
        count = len(self.plan.conditions)
        if edges:
            count = len(Graph.of(self.plan))
            described["runs"] = runs_read(self.plan, described["runs"])
            described["edges"] = described_edges(self.plan, chunk, edges, steps)
            if described["reference"] is not None:
                described["reference"]["points"] = sorted(map(point_of, senders_read(self.plan)))
        else:
            described["estimate"] = described_estimate(self.model, self.plan, chunk, self._drawn(chunk), names, steps)
        change = dict.fromkeys(names, (count, chunk.size))
        wanted = [*self.shapes([replace(chunk, passes=())]), change]
        return self._job("estimates", server_jobs.estimates, [described], wanted)

    def _job(self, what: str, function: Any, chunks: list[ChunkSpec], wanted: list[Shapes]) -> RemoteJob:
        compares = any(reader.needs_base for reader in self.readers)
        program = {"chunks": chunks, "positions": self.positions, "compares": compares}
        return self.model.job(what, function, program, partial(deserialize_values, wanted=wanted), room(wanted))

    def _chunk(self, chunk: ExampleChunk, passes: Sequence[Pass]) -> ChunkSpec:
        """A chunk as `server_jobs.passes` takes it."""
        model, plan = self.model, self.plan
        drawn, reference = self._drawn(chunk), None
        if plan.uses_reference:
            points = sorted({point_of(site) for site in plan.reference_sites()})
            tokens = as_tensor(model, self.inputs.reference[chunk.group])
            whole = [as_tensor(model, one) for one in self.inputs.whole_reference]
            reference = ReferenceSpec(tokens=tokens, whole=whole, points=points)
        return {
            "runs": runs_of(model, plan, chunk, self.readers, self.inputs),
            "reference": reference,
            "passes": [
                {
                    "spec": PassSpecBuilder(model, plan, chunk, one, drawn, chunk.examples).build(),
                    "points": points_taken(model, plan, chunk, one),
                }
                for one in passes
            ],
        }

    def _drawn(self, chunk: ExampleChunk) -> int:
        """Examples of the reference draw."""
        return len(self.inputs.reference[chunk.group]) if self.inputs.reference else 0


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


def finished_values(
    plan: Plan, session: list[ExampleChunk], values: list[dict[str, torch.Tensor]]
) -> Iterator[FinishedValues]:
    """What came back of a session, in the order in which it was asked for."""
    given = iter(values)
    for chunk in session:
        for run in runs_base_first(plan):
            yield values_of_run(chunk, run, next(given))
        for one in chunk.passes:
            yield values_of_conditions(chunk, (0, chunk.size), one.conditions, next(given))
