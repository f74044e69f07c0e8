"""Engine: runs a plan inside nnsight tracing contexts and returns arrays.

Imports the plan, its jobs and the traces; knows no metric (they come as kernels), no labels, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ...errors import DeclarationError, ModelError, choices
from ..declare.sites import Site
from ..models.model import Model
from ..plan.cost import logits_bytes
from ..plan.passes import ExampleChunk, Pass
from ..plan.plan import Plan
from ..traced.passes import server_jobs
from ..traced.specs import Kernel, LogitsSpec, Points, ReadSite, ReferenceRead, RunCache, RunSpec
from .activations import as_tensor, handles, own_point, point_of, read_points
from .cache import Array, CompiledMetric, drawn_examples, part_of
from .memory import is_out_of_memory
from .outcome import Blank, FinishedValues, Inputs, Outcome, PassSlice, Store, values_of_conditions, values_of_run
from .pass_spec import EMBEDDINGS, PassSpecBuilder

Execute = Callable[[Outcome, Callable[[FinishedValues], None], Callable[[int], None]], None]
Progress = Callable[[int, int], None]


@dataclass
class RowLimit:
    """How many rows fit at most, once memory has run out."""

    rows: int | None = None


def run_plan(
    plan: Plan,
    readers: Sequence[CompiledMetric],
    execute: Execute,
    progress: Progress | None = None,
    store: Store | None = None,
    positions: bool = True,
    blank: Blank = np.zeros,
) -> Outcome:
    """Measure every run as it is, and every condition of `plan`.

    Parameters
    ----------
    plan : Plan
    readers : sequence of CompiledMetric
    execute : callable
        Runs what is missing: ``execute(outcome, keep, step)``. It puts what it finds into `outcome`, gives each of
        these `FinishedValues` to `keep`, and tells `step` how many forward passes were done. `run_chunks` does it in
        this process.
    progress : callable, optional
        Called with passes done and passes in all.
    store : Store, optional
        Gives what was finished before, which is not done again, and gets what is finished now. Runs are read again as
        they are where passes are left that start from them.
    positions : bool
        Whether values come for each scored position, or their mean.
    blank : callable
        Makes the arrays that values of conditions are put in, of a shape and a dtype; zeros at first.

    Returns
    -------
    Outcome

    Raises
    ------
    DeclarationError
        A reader's arguments do not fit the scored positions.
    ModelError
        Even a single prompt needs more memory than there is, or something never came back.
    """
    check_readers(plan, readers)
    outcome = Outcome(plan, readers, positions, blank=blank)
    outcome.take(store)
    done = plan.steps - outcome.steps(outcome.missing())

    def keep(finished: FinishedValues) -> None:
        if store is not None:
            store.keep(finished)

    def step(count: int) -> None:
        if progress is not None:
            progress(min(done + count, plan.steps), plan.steps)

    execute(outcome, keep, step)
    return outcome.close()


def run_chunks(
    model: Model,
    chunks: Sequence[ExampleChunk],
    readers: Sequence[CompiledMetric],
    inputs: Inputs,
    outcome: Outcome,
    keep: Callable[[FinishedValues], None],
    step: Callable[[int], None],
) -> None:
    """Run some chunks of the plan of `outcome` in this process.

    A pass that runs out of memory is done again in halves, and later passes are kept as small.

    Parameters
    ----------
    model : Model
    chunks : sequence of ExampleChunk
    readers : sequence of CompiledMetric
    inputs : Inputs
    outcome : Outcome
        Gets what is found.
    keep : callable
        Gets each `FinishedValues` of it.
    step : callable
        Gets how many forward passes were done, after each.

    Raises
    ------
    ModelError
        Even a single prompt needs more memory than there is.
    """
    plan, limit, references, done = outcome.plan, RowLimit(), ReferenceDraw(model, outcome.plan, inputs), 0

    def run_chunk(chunk: ExampleChunk, left: list[Pass]) -> None:
        """Run a chunk; take each pass that is done from `left`."""
        nonlocal done
        cache, runs = run_unmodified(model, plan, chunk, readers, inputs, references.of(chunk.group))
        for run in plan.runs:
            keep(outcome.put(values_of_run(chunk, run, runs[run])))
            step(done := done + 1)
        while left:
            for part, values in run_pass_in_parts(model, plan, chunk, left[0], cache, limit):
                base = {name: value[slice(*part.examples)] for name, value in runs[plan.base].items()}
                values = server_jobs.with_all_positions(values, base, len(part.one.conditions))
                keep(outcome.put(values_of_conditions(chunk, part.examples, part.one.conditions, values)))
            step(done := done + 1)
            del left[0]

    waiting = list(chunks)
    while waiting:
        chunk = waiting.pop(0)
        left = list(chunk.passes)
        try:
            run_chunk(chunk, left)
        except Exception as error:
            waiting = halve_examples(model, replace(chunk, passes=tuple(left)), error) + waiting


class ReferenceDraw:
    """What is read of the reference draw, one group at a time.

    Parameters
    ----------
    model : Model
    plan : Plan
    inputs : Inputs
    sites : list of Site, optional
        What is read; by default what edits take of it.
    """

    def __init__(self, model: Model, plan: Plan, inputs: Inputs, sites: list[Site] | None = None) -> None:
        self.model, self.plan, self.inputs = model, plan, inputs
        self.sites = plan.reference_sites() if sites is None else sites
        self.read: dict[int, Points] = {}

    def of(self, group: int) -> ReferenceRead:
        """The tensors of a group, ``(example, position, width)``; nothing where no edit uses them."""
        if not self.plan.uses_reference:
            return {"alike": {}, "whole": []}
        if group not in self.read:
            self.read = {group: self._points(self.inputs.reference[group])}
        return {"alike": self.read[group], "whole": self._whole}

    @cached_property
    def _whole(self) -> list[Points]:
        return [self._points(tokens) for tokens in self.inputs.whole_reference]

    def _points(self, tokens: Array) -> Points:
        return read_points(self.model, tokens, self.sites) if len(tokens) else {}


def run_unmodified(
    model: Model,
    plan: Plan,
    chunk: ExampleChunk,
    readers: Sequence[CompiledMetric],
    inputs: Inputs,
    reference: ReferenceRead,
) -> tuple[RunCache, dict[str, dict[str, torch.Tensor]]]:
    """Run every run of a chunk without intervention, in this process.

    Parameters
    ----------
    model : Model
    plan : Plan
    chunk : ExampleChunk
    readers : sequence of CompiledMetric
    inputs : Inputs
    reference : ReferenceRead
        What was read of the reference draw, see `ReferenceDraw.of`.

    Returns
    -------
    tuple of RunCache and dict
        What the passes of the chunk need; and for each run the values by reader, ``(example, scored)`` of logits and
        ``(example, layer, head)`` of patterns.

    Raises
    ------
    DeclarationError
        The kernel of a reader gives values of the wrong shape.
    """
    runs, compares = runs_of(model, plan, chunk, readers, inputs), any(reader.needs_base for reader in readers)
    return server_jobs.run_unmodified(model.traced, handles(model), runs, reference, compares, DeclarationError)


def runs_of(
    model: Model, plan: Plan, chunk: ExampleChunk, readers: Sequence[CompiledMetric], inputs: Inputs
) -> list[RunSpec]:
    """Describe the runs of a chunk as `server_jobs.run_unmodified` takes them, the base run first.

    Parameters
    ----------
    model : Model
    plan : Plan
    chunk : ExampleChunk
    readers : sequence of CompiledMetric
    inputs : Inputs

    Returns
    -------
    list of tuple
        For each run its name, the tokens ``(example, position)``, the scored positions, the sites that are read, the
        kernels of patterns, and what is made of logits.
    """
    layers, scored = model.shape.layers, list(plan.groups[chunk.group].scored)
    wanted = {run: {point_of(site) for site in sites} for run, sites in plan.sources().items()}
    base_points = {own_point(layer, name, layers) for layer, name in plan.base_points(chunk)}
    wanted[plan.base] = wanted.get(plan.base, set()) | base_points
    runs: list[RunSpec] = []
    for run in runs_base_first(plan):
        pattern_kernels, logits = kernels_of(model, plan, readers, run, chunk)
        runs.append(
            {
                "name": run,
                "tokens": as_tensor(model, inputs.runs[run][chunk.group][slice(*chunk.examples)]),
                "scored": scored,
                "points": sorted(wanted.get(run, set())),
                "pattern_kernels": pattern_kernels,
                "logits": logits,
            }
        )
    return runs


def runs_base_first(plan: Plan) -> list[str]:
    """The runs, the base run first: some metrics compare with it."""
    return sorted(plan.runs, key=lambda run: run != plan.base)


def run_pass_in_parts(
    model: Model, plan: Plan, chunk: ExampleChunk, one: Pass, cache: RunCache, limit: RowLimit
) -> Iterator[tuple[PassSlice, dict[str, torch.Tensor]]]:
    """Run a pass; in parts where it needs more memory, or more rows, than there are to have.

    Parameters
    ----------
    model : Model
    plan : Plan
    chunk : ExampleChunk
    one : Pass
        Of the chunk.
    cache : RunCache
        What was read of the runs.
    limit : RowLimit
        Gets smaller where memory runs out, for later passes too.

    Yields
    ------
    tuple of PassSlice and dict
        Each part, and its values by reader.

    Raises
    ------
    Exception
        What a trace raised, where that does not say that memory ran out, or where a single row needs too much.
    """
    waiting = [PassSlice(one, (0, chunk.size))]
    while waiting:
        part = waiting.pop(0)
        if limit.rows is not None and part.rows > limit.rows and part.halves():
            waiting = part.halves() + waiting
            continue
        try:
            values = run_part(model, plan, chunk, part, cache)
        except Exception as error:
            if not (is_out_of_memory(error) and part.halves()):
                raise
            limit.rows = max(1, part.rows // 2)
            waiting = [part, *waiting]
            continue
        yield part, values


def run_part(
    model: Model, plan: Plan, chunk: ExampleChunk, part: PassSlice, cache: RunCache
) -> dict[str, torch.Tensor]:
    """Run one trace: a slice of a pass.

    Parameters
    ----------
    model : Model
    plan : Plan
    chunk : ExampleChunk
    part : PassSlice
        Its examples are counted from the first example of the chunk.
    cache : RunCache
        What was read of the runs of the chunk.

    Returns
    -------
    dict of str to Tensor
        Values by reader: ``(condition * example, scored from the pass's first position on)`` of logits, ``(condition *
        example, layer, head)`` of patterns.
    """
    first = chunk.examples[0]
    some = cache if part.examples == (0, chunk.size) else part_of(cache, slice(*part.examples))
    examples = (first + part.examples[0], first + part.examples[1])
    spec = PassSpecBuilder(model, plan, chunk, part.one, drawn_examples(some), examples).build()
    points = points_taken(model, plan, chunk, part.one)
    return server_jobs.run_pass(model.traced, handles(model), some, spec, points, model.device)


def points_taken(model: Model, plan: Plan, chunk: ExampleChunk, one: Pass) -> dict[ReadSite, ReadSite]:
    """Name what a pass takes from the base run. Embeddings are left out: they reach a pass in its writes.

    Parameters
    ----------
    model : Model
    plan : Plan
    chunk : ExampleChunk
    one : Pass

    Returns
    -------
    list of (ReadSite, ReadSite)
        The site of the planned pass, and that of the model's own pass.
    """
    return {
        (layer, point): own_point(layer, point, model.shape.layers)
        for layer, point in sorted(plan.points_of(chunk, one))
        if point not in EMBEDDINGS
    }


def check_readers(plan: Plan, readers: Sequence[CompiledMetric]) -> None:
    """Refuse arguments of logits kernels that are not ``(example, scored, ...)``."""
    for reader in readers:
        for given in reader.arguments.values() if reader.kind == "logits" else ():
            for group, arrays in zip(plan.groups, given, strict=True):
                wanted = (len(group.examples), len(group.scored))
                for name, array in arrays.items():
                    if np.shape(array)[:2] != wanted:
                        raise DeclarationError(
                            f"{reader.name}: its argument {name} has shape {np.shape(array)}: the first two axes of "
                            f"what a metric of logits prepares are example and scored position, here {wanted}"
                        )
                for name in reader.tokens:
                    if name not in arrays:
                        raise DeclarationError(
                            f"{reader.name}: tokens names {name!r}, which it does not prepare: possible are "
                            f"{choices(arrays) or 'none'}"
                        )


def kernels_of(
    model: Model, plan: Plan, readers: Sequence[CompiledMetric], run: str, chunk: ExampleChunk
) -> tuple[list[Kernel], LogitsSpec]:
    """Make the kernels of readers, with their arguments for the examples of a chunk in a run.

    Parameters
    ----------
    model : Model
    plan : Plan
    readers : sequence of CompiledMetric
    run : str
    chunk : ExampleChunk

    Returns
    -------
    tuple of list of Kernel and LogitsSpec
        Kernels of patterns, and what is made of logits.
    """
    span = slice(*chunk.examples)
    given = {
        reader.name: {name: as_tensor(model, value[span]) for name, value in reader.arguments[run][chunk.group].items()}
        for reader in readers
    }
    kernels: dict[str, list[Kernel]] = {"pattern": [], "logits": []}
    scoring = [reader for reader in readers if reader.kind == "logits"]
    tokens, columns = None, 0
    if scoring and all(reader.tokens for reader in scoring):
        parts = []
        for reader in scoring:
            for name in reader.tokens:
                ids = given[reader.name][name]
                parts.append(ids.flatten(2) if ids.dim() > 2 else ids.unsqueeze(-1))
                places = torch.arange(columns, columns + parts[-1].shape[-1], device=ids.device)
                given[reader.name][name] = places.reshape(ids.shape[2:]).expand(ids.shape).contiguous()
                columns += parts[-1].shape[-1]
        tokens = torch.cat(parts, dim=-1)
    for reader in readers:
        kernels[reader.kind].append({"name": reader.name, "function": reader.kernel, "arguments": given[reader.name]})
    extent = plan.extent(chunk)
    every = replace(extent, columns=plan.shape.vocabulary)
    rows, rows_of_all = (max(1, plan.budget // 4 // logits_bytes(plan.shape, one)) for one in (extent, every))
    return kernels["pattern"], {
        "kernels": kernels["logits"],
        "tokens": tokens,
        "compare": [reader.name for reader in readers if reader.needs_base],
        "rows": rows,
        "rows_of_all": rows_of_all,
        "apart": False,
        "tail": model.shape.tail,
    }


def halve_examples(model: Model, chunk: ExampleChunk, error: Exception) -> list[ExampleChunk]:
    """The examples of a chunk in two chunks, after `error` came from them.

    Raises
    ------
    Exception
        `error` itself, where it does not say that memory ran out.
    ModelError
        There is only one example.
    """
    if not is_out_of_memory(error):
        raise error
    start, stop = chunk.examples
    if stop - start < 2:
        raise ModelError(
            f"a single prompt needs more memory on {model.name} than {model.device} has left: {error}"
        ) from error
    return chunk_halves(chunk)


def chunk_halves(chunk: ExampleChunk) -> list[ExampleChunk]:
    """The examples of a chunk in two chunks."""
    start, stop = chunk.examples
    middle = (start + stop) // 2
    return [replace(chunk, examples=span) for span in ((start, middle), (middle, stop))]
