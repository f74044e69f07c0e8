"""measure: a task, interventions and metrics in; a labelled dataset out. Joins the other two packages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..errors import DeclarationError
from ..interventions.codec import encode
from ..interventions.edits import Intervention
from ..interventions.grid import Grid
from ..interventions.plan import make_plan
from ..metrics.card import Metric
from ..metrics.outputs import loss
from .batch import Batch
from .labels import check_axes, check_model, coordinates, labelled, number_dims, task_json
from .progress import Progress
from .results import card_attrs, provenance
from .tables import TASKS
from .tasks import Task, reference_tokens

if TYPE_CHECKING:
    from ..interventions.engine import Outcome
    from ..interventions.models import Model

Array = np.ndarray[Any, Any]
What = Intervention | Mapping[str, Intervention] | Grid | None


def measure(
    model: Model,
    task: Task,
    what: What = None,
    metrics: Metric | Sequence[Metric] = (loss,),
    *,
    base: str = "clean",
    per_position: bool = False,
    batch_size: int | str = "auto",
    progress: Callable[[int, int], None] | bool | None = None,
) -> xr.Dataset:
    """Measure what interventions do to a model on a task.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    task : Task
    what : Intervention, mapping of names to interventions, Grid, or None
        None measures the baseline alone.
    metrics : Metric or sequence of Metric
    base : str
        The run that is intervened on.
    per_position : bool
        Keep the values of the logits metrics at each scored position (NaN elsewhere) instead of their mean.
    batch_size : int or "auto"
        Rows of one forward pass; never changes a number.
    progress : callable or bool, optional
        Called with passes done and in all; True and False force a bar on or off; by default a bar is shown in a
        terminal once the work has taken two seconds.

    Returns
    -------
    Dataset
        One variable for each metric, with the dims of `what` (none, ``condition``, or the axes of the grid), then
        ``example`` (and ``position``; for attention metrics ``read_layer``, ``read_head``: the head that was looked
        at), and ``baseline_<metric>`` with ``run``. Effects are derived: see `headwise.effect`.

    Raises
    ------
    DeclarationError, UnknownNameError
        Something that was asked for does not exist or cannot be; raised before any forward pass.
    """
    from ..interventions import engine

    started = time.monotonic()
    check_model(model)
    chosen = _metrics(metrics)
    axes, interventions = _conditions(what)
    check_axes(axes, chosen, per_position)
    declared = {"task": task_json(task), "interventions": json.dumps(encode(what, TASKS))}
    batch = task.draw(model)
    groups = batch.groups()
    plan = make_plan(
        [intervention.edits() for intervention in interventions],
        model=model.name,
        shape=model.shape,
        groups=groups,
        runs=list(batch.runs),
        base=base,
        batch_size=batch_size,
        reads_patterns=any(metric.kind == "pattern" for metric in chosen),
    )
    dataset = labelled(coordinates(model, batch, base), axes)
    readers = [
        engine.Reader(
            metric.name,
            metric.kind,
            metric.kernel,
            {run: tuple(metric.prepare(batch.facts(run, group)) for group in groups) for run in batch.runs},
            metric.needs_base,
        )
        for metric in chosen
    ]
    inputs = engine.Inputs(
        {run: tuple(batch.tokens(run, group) for group in groups) for run in batch.runs},
        reference_tokens(task, model, base, groups) if plan.uses_reference else (),
    )
    with Progress("measuring", progress) as bar:
        outcome = engine.run_plan(model, plan, readers, inputs, bar.update)
    for metric in chosen:
        dataset = dataset.assign(_variables(metric, outcome, batch, axes, per_position))
    dataset = number_dims(dataset)
    direction = {"clean": "noising", "corrupted": "denoising"}.get(base, base) if plan.sources() else "none"
    dataset.attrs = provenance(model) | {
        "base": base,
        "direction": direction,
        **declared,
        "metrics": json.dumps([metric.name for metric in chosen]),
        "seconds": f"{time.monotonic() - started:.3f}",
    }
    return dataset


def _variables(
    metric: Metric, outcome: Outcome, batch: Batch, axes: Sequence[tuple[str, tuple[Any, ...]]], per_position: bool
) -> dict[str, xr.Variable]:
    """``<metric>``, with the axes as its first dims, and ``baseline_<metric>``, with ``run``."""
    groups = batch.groups()
    dims, place = _layout(metric, batch, per_position)
    runs = [
        _assemble(
            [place(outcome.baseline[metric.name, run, at][None], at) for at in range(len(groups))], batch, groups
        )[0]
        for run in batch.runs
    ]
    attrs = card_attrs(metric.card, long_name=f"{metric.card.long_name}, no intervention")
    found = {f"baseline_{metric.name}": xr.Variable(("run", *dims), np.stack(runs), attrs)}
    if (metric.name, 0) in outcome.values:
        whole = _assemble([place(outcome.values[metric.name, at], at) for at in range(len(groups))], batch, groups)
        whole = whole.reshape(*(len(values) for _, values in axes), *whole.shape[1:])
        found[metric.name] = xr.Variable((*(name for name, _ in axes), *dims), whole, card_attrs(metric.card))
    return dict(reversed(found.items()))


def _metrics(given: Metric | Sequence[Metric]) -> list[Metric]:
    several = isinstance(given, Iterable) and not isinstance(given, str)
    chosen: list[Any] = list(given) if several else [given]  # type: ignore[arg-type]
    for metric in chosen:
        if not isinstance(metric, Metric):
            raise DeclarationError(f"{metric!r} is no metric: import one from headwise.metrics, such as loss")
    if not chosen:
        raise DeclarationError("nothing to measure: name at least one metric, such as loss")
    if len({metric.name for metric in chosen}) < len(chosen):
        raise DeclarationError(f"metrics must differ, got {chosen}")
    return chosen


def _conditions(what: What) -> tuple[list[tuple[str, tuple[Any, ...]]], list[Intervention]]:
    """Axes (name and coordinates) and interventions in the order of their product."""
    if what is None:
        return [], []
    if isinstance(what, Intervention):
        return [], [what]
    if isinstance(what, Grid):
        return list(what.axes), list(what.interventions)
    if not isinstance(what, Mapping):
        raise DeclarationError(f"cannot measure {what!r}: give an intervention, a mapping of names to them, or a Grid")
    for name, intervention in what.items():
        if not isinstance(intervention, Intervention):
            raise DeclarationError(f"{name!r} is {intervention!r}: each condition must be an intervention")
    if not what:
        raise DeclarationError("the mapping of conditions is empty; leave it out to measure the baseline alone")
    names = tuple(map(str, what))
    if len(set(names)) < len(names):
        raise DeclarationError(f"the names of the conditions must differ as text, got {names}")
    return [("condition", names)], list(what.values())


def _layout(metric: Metric, batch: Batch, per_position: bool) -> tuple[tuple[str, ...], Callable[[Array, int], Array]]:
    """Dims after the conditions, and how a group's ``(condition, example, ...)`` values are brought to them."""
    groups = batch.groups()
    if metric.kind == "pattern":
        return ("example", "read_layer", "read_head"), lambda value, number: value
    if not per_position:
        return ("example",), lambda value, number: value.mean(axis=-1)

    def spread(value: Array, number: int) -> Array:
        whole = np.full((*value.shape[:2], int(batch.lengths.max())), np.nan, dtype=np.float32)
        whole[..., list(groups[number].scored)] = value
        return whole

    return ("example", "position"), spread


def _assemble(pieces: list[Array], batch: Batch, groups: Sequence[Any]) -> Array:
    """Groups ``(condition, example of the group, ...)`` as ``(condition, example, ...)``."""
    first = pieces[0]
    whole = np.full((first.shape[0], len(batch.lengths), *first.shape[2:]), np.nan, dtype=np.float32)
    for group, piece in zip(groups, pieces, strict=True):
        whole[:, list(group.examples)] = piece
    return whole
