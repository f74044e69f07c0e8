"""Engine: runs a plan inside nnsight tracing contexts and returns arrays.

Imports the plan, its jobs and the traces; knows no metric (they come as kernels), no labels, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...errors import DeclarationError, ModelError, choices
from ..models.model import Model
from ..plan.cost import logits_bytes
from ..plan.passes import ExampleChunk, Pass
from ..plan.plan import Plan
from ..traced import traces
from ..traced.logits import with_base_logits
from ..traced.specs import Kernel, LogitsSpec, Points, RunCache
from ..traced.values import resolve_values
from .activations import as_tensor, handles, native_point, point_of, read_points
from .cache import CompiledMetric, drawn_examples, part_of
from .memory import is_out_of_memory
from .outcome import FinishedValues, Inputs, Keeper, Outcome, PassSlice
from .pass_spec import PassSpecBuilder, base_of

Array = np.ndarray[Any, Any]
Elsewhere = Callable[[Outcome, Callable[[FinishedValues], None], Callable[[int], None]], None]


@dataclass
class RowLimit:
    """How many rows fit at most, once memory has run out."""

    rows: int | None = None


def run_plan(
    model: Model,
    plan: Plan,
    readers: Sequence[CompiledMetric],
    inputs: Inputs,
    progress: Callable[[int, int], None] | None = None,
    keeper: Keeper | None = None,
    elsewhere: Elsewhere | None = None,
) -> Outcome:
    """Measure every run as it is, and every condition of `plan`.

    A pass that runs out of memory is done again in halves, and later passes are kept as small.

    Parameters
    ----------
    model : Model
    plan : Plan
    readers : sequence of Reader
    inputs : Inputs
    progress : callable, optional
        Called with passes done and passes in all.
    keeper : Keeper, optional
        Gives what was finished before, which is not done again, and gets what is finished now. Runs are read again as
        they are where passes are left that start from them.
    elsewhere : callable, optional
        Runs what is missing in place of this process: ``elsewhere(outcome, keep, step)``, as for `run_chunks`.

    Raises
    ------
    DeclarationError
        A reader's arguments do not fit the scored positions.
    ModelError
        Even a single prompt needs more memory than there is.
    """
    check_readers(plan, readers)
    outcome = Outcome(plan, readers)
    outcome.take(keeper)
    left = outcome.missing()
    done = plan.steps - outcome.steps(left)

    def keep(piece: FinishedValues) -> None:
        if keeper is not None:
            keeper.keep(piece)

    def step(count: int) -> None:
        if progress is not None:
            progress(min(done + count, plan.steps), plan.steps)

    if elsewhere is not None:
        elsewhere(outcome, keep, step)
    else:
        run_chunks(model, left, readers, inputs, outcome, keep, step)
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
    """Run some chunks of the plan of `outcome`, which gets what they give; `keep` gets it piece by piece.

    `step` gets how many forward passes were done, after each.
    """
    plan, room = outcome.plan, RowLimit()
    known: RunCache | None = None
    reference: dict[int, Points] = {}
    waiting, done = list(chunks), 0
    while waiting:
        chunk = waiting.pop(0)
        left = list(chunk.passes)
        try:
            if plan.uses_reference and chunk.group not in reference:
                reference = {chunk.group: read_points(model, inputs.reference[chunk.group], plan.reference_sites())}
            known, runs = run_unmodified(model, plan, chunk, readers, inputs, reference.get(chunk.group, {}))
            for run, values in runs.items():
                keep(outcome.put(outcome.run_piece(chunk, run, values)))
                step(done := done + 1)
            while left:
                for part, values in run_pass(model, plan, chunk, left[0], known, room):
                    keep(outcome.put(outcome.part_piece(chunk, part, values)))
                step(done := done + 1)
                del left[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            waiting = halve_examples(model, replace(chunk, passes=tuple(left)), error) + waiting
        known = None  # let go of what was read before the next is


def run_unmodified(
    model: Model, plan: Plan, chunk: ExampleChunk, readers: Sequence[CompiledMetric], inputs: Inputs, reference: Points
) -> tuple[RunCache, dict[str, dict[str, torch.Tensor]]]:
    """Every run as it is: what the passes of a chunk need to know, and the readers' values by run."""
    group, span = plan.groups[chunk.group], slice(*chunk.examples)
    layers = model.shape.layers
    wanted = {run: {point_of(site) for site in sites} for run, sites in plan.sources().items()}
    base_points = {native_point(layer, name, layers) for layer, name in plan.base_points(chunk)}
    wanted[plan.base] = wanted.get(plan.base, set()) | base_points
    sources: dict[str, Points] = {}
    found: dict[str, dict[str, torch.Tensor]] = {}
    logits = None
    parts, keep = handles(model), any(reader.needs_base for reader in readers)
    compare = [reader.name for reader in readers if reader.needs_base]
    for run in sorted(plan.runs, key=lambda run: run != plan.base):  # the base run first: kl compares with it
        watch, score = kernels_of(model, plan, readers, run, chunk, compare)
        score = with_base_logits(score, logits)
        tokens = as_tensor(model, inputs.runs[run][chunk.group][span])
        scored, read = list(group.scored), wanted.get(run, set())
        points, values, made = traces.as_it_is(
            model.traced, parts, tokens, scored, read, watch, score, keep and logits is None
        )
        logits = made if logits is None else logits
        if wrong := traces.misshapen(parts, values, watch, len(tokens), len(scored)):
            raise DeclarationError(wrong)
        found[run] = values
        sources[run] = points
        if run == plan.base:
            known: RunCache = {
                "base": points,
                "sources": sources,
                "reference": reference,
                "pattern_kernels": watch,
                "logits": with_base_logits(score, logits),
                "base_attended": {kernel["name"]: values[kernel["name"]] for kernel in watch},
            }
    return known, {run: found[run] for run in plan.runs}


def run_pass(
    model: Model, plan: Plan, chunk: ExampleChunk, one: Pass, known: RunCache, room: RowLimit
) -> Iterator[tuple[PassSlice, dict[str, torch.Tensor]]]:
    """A pass: ``(part, values)``, one part unless it needs more memory, or more rows, than there are to have.

    Raises what running out of memory raised where a single row did.
    """
    waiting = [PassSlice(one, (0, chunk.size))]
    while waiting:
        part = waiting.pop(0)
        if room.rows is not None and part.rows > room.rows and part.halves():
            waiting = part.halves() + waiting
            continue
        try:
            values = run_part(model, plan, chunk, part, known)
        except Exception as error:
            if not (is_out_of_memory(error) and part.halves()):
                raise
            room.rows = max(1, part.rows // 2)
            waiting = [part, *waiting]
            continue
        yield part, values


def run_part(
    model: Model, plan: Plan, chunk: ExampleChunk, part: PassSlice, known: RunCache
) -> dict[str, torch.Tensor]:
    """One trace: the values of the rows of a part, by reader name."""
    first = chunk.examples[0]
    some = known if part.examples == (0, chunk.size) else part_of(known, slice(*part.examples))
    examples = (first + part.examples[0], first + part.examples[1])
    spec = PassSpecBuilder(model, plan, chunk, part.one, drawn_examples(some), examples).build()
    base = base_of(model, plan, chunk, part.one, some["base"])
    return traces.planned(model.traced, handles(model), base, resolve_values(spec, some), model.device)


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
    model: Model, plan: Plan, readers: Sequence[CompiledMetric], run: str, chunk: ExampleChunk, compare: list[str]
) -> tuple[list[Kernel], LogitsSpec]:
    """Kernels of patterns, and what is made of logits, for the examples of a chunk."""
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
        kernel: Kernel = {"name": reader.name, "function": reader.kernel, "arguments": given[reader.name]}
        kernels[reader.kind].append(kernel)
    extent = plan.extent(chunk)
    every = replace(extent, columns=plan.shape.vocabulary)
    rows, rows_of_all = (max(1, plan.budget // 4 // logits_bytes(plan.shape, one)) for one in (extent, every))
    return kernels["pattern"], {
        "kernels": kernels["logits"],
        "tokens": tokens,
        "compare": compare,
        "rows": rows,
        "rows_of_all": rows_of_all,
        "apart": False,
    }


def halve_examples(model: Model, chunk: ExampleChunk, error: Exception) -> list[ExampleChunk]:
    """The examples of a chunk in two chunks; an error where there is only one."""
    start, stop = chunk.examples
    if stop - start < 2:
        raise ModelError(
            f"a single prompt needs more memory on {model.name} than {model.device} has left: {error}"
        ) from error
    middle = (start + stop) // 2
    return [replace(chunk, examples=span) for span in ((start, middle), (middle, stop))]
