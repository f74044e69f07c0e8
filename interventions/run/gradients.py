"""Estimates from gradients: what an intervention changes, to first order, from a few passes for a whole grid.

The estimate of ``metric(changed) - metric(base)`` is the sum over an edit's positions and columns of
``(new - old) * d metric / d value``: positive where the metric grows. ``"gradient"`` takes the derivative at the base
run (attribution patching). ``"integrated"`` takes its mean on the straight line from old to new, at the middles of
equal steps, with the edits of one kind, layer and component on their lines together (all heads of a layer, say), so an
estimate depends on which others are asked for beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch

from ...errors import DeclarationError
from ..declare.circuits import Circuit
from ..declare.paths import PathPatch
from ..declare.steering import Knockout
from ..models.model import Model
from ..plan.cost import row_bytes
from ..plan.estimators import moved_together
from ..plan.passes import ExampleChunk, Pass
from ..plan.plan import Plan
from ..plan.writes import Join, Write
from ..traced.passes import gradients, server_jobs
from ..traced.specs import Change, EstimateSpec, StreamStart
from .activations import handles, own_point
from .cache import CompiledMetric, drawn_examples
from .edge_estimates import (
    check_edges_estimable,
    chunks_of_edges,
    described_edges,
    places_of_conditions,
    runs_read,
    senders_read,
)
from .engine import ReferenceDraw, check_readers, halve_examples, run_unmodified, runs_of
from .outcome import FinishedValues, Inputs, Outcome, as_array, values_of_run
from .pass_spec import PassSpecBuilder

Values = dict[str, dict[str, torch.Tensor]]
"""For each run the values by reader."""


Estimates = Callable[[list[ExampleChunk]], Iterator[tuple[ExampleChunk, Values, dict[str, torch.Tensor]]]]
"""Gives chunks that are done, with the values of each run and the estimated change, ``(condition, example)``."""


def run_estimate(
    plan: Plan,
    readers: Sequence[CompiledMetric],
    steps: int | None,
    execute: Estimates,
    progress: Callable[[int, int], None] | None = None,
    positions: bool = True,
    edges: str = "",
) -> Outcome:
    """Estimate every condition of `plan`; the runs as they are stay exact.

    Parameters
    ----------
    plan, readers, progress, positions
        As for `engine.run_plan`; progress counts examples.
    steps : int, optional
        Of the integrated estimate; left out, the gradient at the base run.
    execute : callable
        Does it, chunk by chunk. `estimate_chunks` does it in this process.
    edges : str
        The estimator of edge scores, where the conditions are edges.

    Returns
    -------
    Outcome

    Raises
    ------
    DeclarationError
        Something that was asked for has no estimate.
    ModelError
        Even a single prompt needs more memory than there is.
    """
    check_plan_estimable(plan, edges)
    check_readers(plan, readers)
    outcome, done = Outcome(plan, readers, positions), 0
    chunks = list(chunks_of_edges(plan, edges) if edges else chunks_of(plan, steps or 1))
    total = sum(chunk.size for chunk in chunks)
    for chunk, runs, change in execute(chunks):
        for run in plan.runs:
            outcome.put(values_of_run(chunk, run, runs[run]))
        if plan.conditions:
            base = {name: as_array(runs[plan.base][name]) for name in change}
            estimates = {name: base[name] + as_array(value)[..., None] for name, value in change.items()}
            every = tuple(range(len(plan.conditions)))
            outcome.put(FinishedValues(chunk.group, chunk.examples, estimates, None, every))
        done += chunk.size
        if progress is not None:
            progress(done, total)
    return outcome


def estimate_chunks(
    model: Model,
    plan: Plan,
    readers: Sequence[CompiledMetric],
    inputs: Inputs,
    steps: int | None,
    chunks: Sequence[ExampleChunk],
    edges: str = "",
) -> Iterator[tuple[ExampleChunk, Values, dict[str, torch.Tensor]]]:
    """Estimate some chunks in this process; one that runs out of memory is done again in halves.

    Parameters
    ----------
    model : Model
    plan, readers, steps, edges
        As for `run_estimate`.
    inputs : Inputs
    chunks : sequence of ExampleChunk
        As `chunks_of` gives them.

    Yields
    ------
    tuple of (ExampleChunk, dict, dict)
        As `Estimates` says.

    Raises
    ------
    ModelError
        Even a single prompt needs more memory than there is.
    """
    names = [reader.name for reader in readers]
    references = ReferenceDraw(model, plan, inputs, senders_read(plan) if edges else None)
    compares, of_conditions = (
        any(reader.needs_base for reader in readers),
        places_of_conditions(plan) if edges else None,
    )

    def estimate_edges(chunk: ExampleChunk) -> tuple[Values, dict[str, torch.Tensor]]:
        """Run a chunk without intervention, then estimate the score of every edge."""
        specs, parts = runs_read(plan, runs_of(model, plan, chunk, readers, inputs)), handles(model)
        reference = references.of(chunk.group)
        cache, runs = server_jobs.run_unmodified(model.traced, parts, specs, reference, compares, DeclarationError)
        given = described_edges(plan, chunk, edges, steps)
        found = gradients.edge_estimates(model.traced, parts, cache, given, model.device)
        return runs, {name: value.cpu()[of_conditions] for name, value in found.items()}

    def estimate(chunk: ExampleChunk) -> tuple[Values, dict[str, torch.Tensor]]:
        """Run a chunk without intervention, then estimate what every condition changes."""
        cache, runs = run_unmodified(model, plan, chunk, readers, inputs, references.of(chunk.group))
        given = described_estimate(model, plan, chunk, drawn_examples(cache), names, steps)
        return runs, gradients.attribution(model.traced, handles(model), cache, given, model.device)

    waiting = list(chunks)
    while waiting:
        chunk = waiting.pop(0)
        try:
            runs, change = estimate_edges(chunk) if edges else estimate(chunk)
        except Exception as error:
            waiting = halve_examples(model, chunk, error) + waiting
            continue
        yield chunk, runs, change


def check_plan_estimable(plan: Plan, edges: str = "") -> None:
    """Refuse what has no estimate: knocked-out attention, paths, values written twice.

    Parameters
    ----------
    plan, edges
        As for `run_estimate`.

    Raises
    ------
    DeclarationError
        The text says what is possible.
    """
    if edges:
        check_edges_estimable(plan, edges)
        return
    for edits in plan.conditions:
        for edit in edits:
            if isinstance(edit, Knockout | PathPatch | Circuit):
                raise DeclarationError(
                    f"{edit!r} has no gradient estimate: possible are ablations, Patch, Add, Scale and ProjectOut; "
                    "measure it with estimator='exact'"
                )
    for group in plan.writes:
        for writes in group:
            for one, other in combinations(writes, 2):
                if _meet(one, other):
                    raise DeclarationError(
                        f"{one.edit!r} and {other.edit!r} write to one place one after the other, which has no "
                        "gradient estimate; measure it with estimator='exact'"
                    )


def _meet(one: Write, other: Write) -> bool:
    same_part = one.part is None or other.part is None or one.part == other.part
    shared = one.positions is None or other.positions is None or bool({*one.positions} & {*other.positions})
    return (one.layer, one.point) == (other.layer, other.point) and same_part and shared


def chunks_of(plan: Plan, steps: int) -> Iterator[ExampleChunk]:
    """Examples in chunks whose whole forward pass can be kept for the way back."""
    for chunk in plan.chunks:
        held = plan.budget // 4 // (row_bytes(plan.shape, plan.extent(chunk), True) * plan.shape.layers * steps)
        layers = sorted({(write.layer, at) for at, writes in enumerate(plan.writes[chunk.group]) for write in writes})
        passes = tuple(Pass((number,), (Join(layer, 0),), 0) for layer, number in layers)
        for start in range(*chunk.examples, max(1, held)):
            yield ExampleChunk(chunk.group, (start, min(start + max(1, held), chunk.examples[1])), passes)


def described_estimate(
    model: Model, plan: Plan, chunk: ExampleChunk, drawn: int, names: list[str], steps: int | None
) -> EstimateSpec:
    """Describe an estimate of every condition for the examples of a chunk, as `attribution` takes it.

    Parameters
    ----------
    model : Model
    plan : Plan
    chunk : ExampleChunk
    drawn : int
        Examples of the reference draw.
    names : list of str
        Of the readers.
    steps : int, optional
        Of the integrated estimate; None for the gradient at the base run.

    Returns
    -------
    EstimateSpec
    """
    moved = moved_together(plan.writes[chunk.group], steps)
    sites = sorted({(layer, point) for layer, point, _ in moved})
    spec: EstimateSpec = {
        "names": names,
        "conditions": len(plan.conditions),
        "examples": chunk.size,
        "steps": steps,
        "sites": sites,
        "start": _start(model, plan, chunk, drawn, min(layer for layer, _ in sites), 1) if sites else None,
        "groups": [],
    }
    for (layer, point, _), members in sorted(moved.items(), key=lambda item: str(item[0])):
        start = None if steps is None else _start(model, plan, chunk, drawn, layer, steps)
        changes = _changes(model, plan, chunk, drawn, members)
        spec["groups"].append({"site": (layer, point), "changes": changes, "start": start})
    return spec


def _start(model: Model, plan: Plan, chunk: ExampleChunk, drawn: int, layer: int, copies: int) -> StreamStart:
    """A pass of `copies` of the base run from the stream of a layer on."""
    one = Pass((0,) * copies, (Join(layer, 0),) * copies, 0)
    spec = PassSpecBuilder(model, plan, chunk, one, drawn, chunk.examples).frame()
    return {"spec": spec, "layer": layer, "site": own_point(layer, "stream", model.shape.layers)}


def _changes(
    model: Model, plan: Plan, chunk: ExampleChunk, drawn: int, members: Sequence[tuple[int, Write]]
) -> list[Change]:
    """Writes of conditions at one site, as a pass would make them."""
    one = Pass(tuple(number for number, _ in members), (Join(0, 0),) * len(members), 0)
    builder = PassSpecBuilder(model, plan, chunk, one, drawn, chunk.examples)
    for unit, (_, write) in enumerate(members):
        builder.write(write, unit)
    return [
        {
            "condition": one.conditions[write["rows"].start // chunk.size],
            "positions": write["positions"],
            "columns": write["columns"],
            "how": write["how"],
            "value": write["value"],
        }
        for writes in builder.writes.values()
        for write in writes
    ]
