"""measure: a task, interventions and metrics in; a labelled dataset out. Joins the other two packages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..interventions.codec import encode
from ..interventions.plan import Plan
from ..metrics.card import Metric
from ..metrics.outputs import loss
from .batch import Batch
from .labels import coordinates, labelled, number_dims
from .progress import Progress
from .results import card_attrs, provenance
from .setup import What, check_estimable, set_up
from .tables import TASKS
from .tasks import Task

if TYPE_CHECKING:
    from ..interventions.models import Model
    from ..interventions.outcome import Outcome

Array = np.ndarray[Any, Any]


def measure(
    model: Model,
    task: Task,
    what: What = None,
    metrics: Metric | Sequence[Metric] = (loss,),
    *,
    base: str = "clean",
    per_position: bool = False,
    batch_size: int | str = "auto",
    estimator: str = "exact",
    steps: int = 8,
    check: bool = True,
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
        Rows of one forward pass; ``"auto"`` takes as many as fit the memory, and a pass that runs out of it is done
        again in halves. No number changes by more than rounding.
    estimator : {"exact", "gradient", "integrated"}
        ``"gradient"`` and ``"integrated"`` estimate every condition from a few passes, see
        `headwise.interventions.gradients`: ``base + (new - old) * slope``. The runs as they are stay exact. The
        integrated estimate moves the edits of one kind, layer and component together, as all heads of a layer.
    steps : int
        Steps of the integrated estimate.
    check : bool
        Before the first sweep on a model, see on one short prompt that planned passes give what its own forward pass
        gives (see `headwise.interventions.selfcheck`).
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
        Something that was asked for does not exist or cannot be; raised before any forward pass, but for a metric
        whose own kernel gives values of the wrong shape.
    ModelError
        A self-check failed, or a single prompt needs more memory than there is.
    """
    from ..interventions import engine, gradients, selfcheck
    from ..interventions.deviation import against_float32

    started = time.monotonic()
    setup = set_up(model, task, what, metrics, base=base, per_position=per_position, batch_size=batch_size)
    check_estimable(setup.metrics, estimator, steps, per_position)
    planned, batch, axes = setup.plan, setup.batch, setup.axes
    declared = json.dumps(encode(what, TASKS))
    dataset = labelled(coordinates(model, batch, base), axes)
    readers, inputs = setup.readers(), setup.inputs(task, model)
    engine.check_readers(planned, readers)
    if estimator != "exact":
        gradients.check_estimable(planned, readers, steps if estimator == "integrated" else None)
    deviation = against_float32(model, planned, readers, inputs)
    if check and planned.conditions:
        selfcheck.check_model(model)
    with Progress("measuring", progress) as bar:
        if estimator == "exact":
            outcome = engine.run_plan(model, planned, readers, inputs, bar.update)
        else:
            count = steps if estimator == "integrated" else None
            outcome = gradients.run_estimate(model, planned, readers, inputs, count, bar.update)
    for metric in setup.metrics:
        dataset = dataset.assign(_variables(metric, outcome, batch, axes, per_position))
    dataset = number_dims(dataset)
    direction = {"clean": "noising", "corrupted": "denoising"}.get(base, base) if planned.sources() else "none"
    dataset.attrs = provenance(model) | {
        "base": base,
        "direction": direction,
        "task": setup.task,
        "interventions": declared,
        "metrics": json.dumps([metric.name for metric in setup.metrics]),
        "estimator": estimator if estimator != "integrated" else f"integrated, {steps} steps",
        "seconds": f"{time.monotonic() - started:.3f}",
    }
    if deviation:
        dataset.attrs["float32_deviation"] = json.dumps(deviation)
    return dataset


def plan(
    model: Model,
    task: Task,
    what: What = None,
    metrics: Metric | Sequence[Metric] = (loss,),
    *,
    base: str = "clean",
    batch_size: int | str = "auto",
    timed: bool = True,
) -> Plan:
    """What `measure` would do with the same arguments, without doing it: ``print(plan(...))`` explains the cost.

    Parameters
    ----------
    model, task, what, metrics, base, batch_size
        As for `measure`.
    timed : bool
        Run a few plain forward passes to estimate the time.

    Returns
    -------
    Plan
        ``headwise.interventions.explain.cost(plan)`` gives the figures.
    """
    setup = set_up(model, task, what, metrics, base=base, per_position=False, batch_size=batch_size)
    setup.readers()  # refuses metrics that the task cannot have, as `measure` does
    if not timed:
        return setup.plan
    from ..interventions.deviation import speed

    return replace(setup.plan, speed=speed(model, setup.plan, setup.inputs(task, model)))


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
