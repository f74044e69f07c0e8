"""The work of a measurement: runs its plan, exactly or as an estimate, and labels what comes out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import xarray as xr

from ...interventions.declare.circuits import Circuit
from ...interventions.declare.codec import encode
from ...interventions.declare.edges import EdgePatches
from ...interventions.plan.estimators import said, steps_of
from ...metrics.card import OVER, Metric
from ..output.progress import Progress
from ..storage.provenance import card_attrs, provenance
from ..storage.registry import TASKS
from ..tasks.batch import Batch
from ..tasks.tasks import Task
from . import context
from .advice import advice
from .controls import CONTROLS, WORSE, control_p
from .labels import coordinates, dataset_of, with_axes
from .request import Request, What

if TYPE_CHECKING:
    from ...interventions.begin import Call
    from ...interventions.models.model import Model
    from ...interventions.run.backend import Backend
    from ...interventions.run.cache import CompiledMetric
    from ...interventions.run.outcome import Inputs, Outcome
    from ..storage.pass_store import PassStore
    from ..storage.unfinished import UnfinishedResult

Array = np.ndarray[Any, Any]
CHECKED = "self_check"
"""Attribute that says whether the model passed the self-check."""


@dataclass(frozen=True, eq=False)
class SweepRun:
    """A measurement that was checked and planned.

    Attributes
    ----------
    model : Model
    task : Task
    what : Intervention, mapping of str to Intervention, Grid, EdgePatches, or None
    setup : Request
        The checked request.
    base : str
        The run that is intervened on.
    per_position : bool
        Whether values of the logits metrics are kept at each scored position, not their mean.
    estimator : str
        See `measure`; of edges `edge_scores`.
    steps : int
        Steps of an estimate that takes some.
    check : bool
        Whether the self-check runs first.
    """

    model: Model
    task: Task
    what: What
    setup: Request
    base: str
    per_position: bool
    estimator: str
    steps: int
    check: bool

    @cached_property
    def readers(self) -> list[CompiledMetric]:
        """The metrics as the engine sees them."""
        return self.setup.readers()

    @cached_property
    def inputs(self) -> Inputs:
        """The prompts as the engine sees them."""
        return self.setup.inputs(self.task, self.model)

    @property
    def backend(self) -> Backend:
        """What carries out the passes."""
        backend: Backend = self.model.backend
        return backend

    @cached_property
    def attrs(self) -> dict[str, str]:
        """What was asked for, as NetCDF attributes."""
        runs, drawn = self.setup.runs, self.setup.controls
        edits = (edit for edits in self.setup.plan.conditions for edit in edits)
        takes = any(edit.run is not None and not isinstance(edit, Circuit) for edit in edits)
        return (
            {
                "base": self.base,
                "direction": {"clean": "noising", "corrupted": "denoising"}.get(self.base, self.base)
                if takes
                else "none",
                "task": self.setup.task,
                "interventions": json.dumps(encode(self.what, TASKS)),
                "metrics": json.dumps([metric.name for metric in self.setup.metrics]),
                "estimator": said(self.estimator, self.steps),
            }
            | ({} if runs is None else {"runs": json.dumps(runs)})
            | ({} if drawn is None else {"controls": json.dumps({"draws": drawn.draws, "seed": drawn.seed})})
        )

    @cached_property
    def advice(self) -> list[str]:
        """What is advised otherwise, see `advice.advice`."""
        return advice(self.attrs)

    def check_request(self) -> None:
        """Refuse, before any forward pass, what the engine or the estimator cannot do."""
        from ...interventions.run import engine, gradients

        engine.check_readers(self.setup.plan, self.readers)
        if self.estimator != "exact":
            gradients.check_plan_estimable(self.setup.plan, self._edges)

    def check_model(self, call: Call) -> None:
        """Run the self-check, unless this very model has passed it."""
        from ...interventions.selfcheck import check_planned

        check_planned(self.model, call.identity, self.setup.plan)

    @property
    def _steps(self) -> int | None:
        return steps_of(self.estimator, self.steps)

    @property
    def _edges(self) -> str:
        """The estimator of edge scores, where edges are measured by one."""
        return self.estimator if isinstance(self.what, EdgePatches) and self.estimator != "exact" else ""

    @property
    def _every_position(self) -> bool:
        """Whether values at each scored position are needed: of answers of several tokens no mean is taken."""
        return self.per_position or self.setup.batch.sequences

    @overload
    def pass_store(self, kept: UnfinishedResult, call: Call) -> PassStore: ...

    @overload
    def pass_store(self, kept: UnfinishedResult | None, call: Call) -> PassStore | None: ...

    def pass_store(self, kept: UnfinishedResult | None, call: Call) -> PassStore | None:
        """Where the passes are kept: among the parts of a result, where there is one."""
        if kept is None:
            return None
        from ..storage.pass_store import PassStore

        whole = self._every_position or self.backend.every_position
        return PassStore(kept, self.model, call.identity, self.setup.plan, self.readers, self.inputs, whole)

    def run(
        self,
        progress: Callable[[int, int], None] | bool | None,
        call: Call,
        store: PassStore | None,
        on_workers: Callable[..., None] | None = None,
    ) -> xr.Dataset:
        """Run the plan in a call on the model, and label the values.

        An estimate takes few passes, so it keeps none of them and runs on no worker.

        Parameters
        ----------
        progress : callable or bool, optional
            See `Progress`.
        call : Call
            The call on the model that is going on.
        store : PassStore, optional
            Gives the passes that were finished before, and gets those that are finished now. None keeps none.
        on_workers : callable, optional
            Runs the passes on workers: ``on_workers(outcome, keep, step)``, see `executors.run_on`. None runs them on
            the backend of the model.

        Returns
        -------
        Dataset
            See `measure`; the attributes hold the provenance.

        Raises
        ------
        DeclarationError
            The kernel of a metric gives values of the wrong shape.
        ModelError
            The self-check failed, a single prompt needs more memory than there is, or pieces were lost on workers.
        ServerError
            A server refuses, or cannot be reached for a long time.
        """
        from ...interventions.calibration import against_float32
        from ...interventions.run import engine

        if self.check:
            self.check_model(call)
        started = time.monotonic()
        model, plan, batch, axes = self.model, self.setup.plan, self.setup.batch, self.setup.axes
        attrs, backend = self.attrs, self.backend
        coords = with_axes(coordinates(model, batch, self.base, plan.runs), axes)
        readers, inputs = self.readers, self.inputs
        deviation = against_float32(model, plan, readers, inputs)
        where = None if store is None or self.estimator != "exact" else store.parts.folder
        execution = context.current()
        with Progress(execution.label, progress, kept=where, total=plan.steps, stage=execution.stage) as bar:
            positions, say = self._every_position, bar.say
            if self.estimator != "exact":
                outcome = backend.run_estimate(
                    plan, readers, inputs, self._steps, bar.update, positions=positions, say=say, edges=self._edges
                )
            elif on_workers is not None:
                outcome = engine.run_plan(plan, readers, on_workers, bar.update, store)
            else:
                outcome = backend.run_plan(plan, readers, inputs, bar.update, store, positions=positions, say=say)
        variables: dict[str, xr.Variable] = {}
        for metric in self.setup.metrics:
            variables |= _variables(metric, outcome, self.setup, self.what is None, self.per_position)
        if drawn := self.setup.controls:
            shape = [len(values) for _, values in axes]
            dims = (*(name for name, _ in axes), "control", "draw")
            variables["control_heads"] = xr.Variable(dims, drawn.heads.reshape(*shape, *drawn.heads.shape[1:]))
            coords |= {"control": np.asarray(list(CONTROLS), dtype=object), "draw": np.arange(drawn.heads.shape[-1])}
        dataset = _less_rivals(dataset_of(variables, coords), self.setup.metrics, batch.pairs)
        for metric in self.setup.metrics if drawn else ():
            base = dataset[f"baseline_{metric.name}"].sel(run=self.base, drop=True)
            own, random = dataset[metric.name], dataset[f"{metric.name}_control"]
            dataset[f"p_{metric.name}"] = control_p(own, random, base, WORSE[metric.card.better])
        told = {"advice": " ".join(self.advice)} if self.advice else {}
        told |= {"seconds": f"{time.monotonic() - started:.3f}", CHECKED: "passed" if self.check else "left out"}
        dataset.attrs = provenance(model, call.identity) | attrs | told
        if deviation:
            dataset.attrs["float32_deviation"] = json.dumps(deviation)
        return dataset


def _variables(
    metric: Metric, outcome: Outcome, setup: Request, as_it_is: bool, per_position: bool
) -> dict[str, xr.Variable]:
    """``<metric>``, with the axes as its first dims, ``baseline_<metric>``, with ``run``, and ``<metric>_control``.

    Without interventions (`as_it_is`) the metric is that of the base run, and of attention ``(layer, head,
    example)``, since no other heads are there that it could be confused with.
    """
    batch, axes, drawn = setup.batch, setup.axes, setup.controls
    groups, plan = batch.groups(), outcome.plan
    dims, place = _layout(metric, batch, per_position)
    runs = [
        _assemble(
            [place(outcome.baseline[metric.name, run, at][None], at) for at in range(len(groups))], batch, groups
        )[0]
        for run in plan.runs
    ]
    attrs = card_attrs(metric.card, long_name=f"{metric.card.long_name}, no intervention")
    baseline = xr.Variable(("run", *dims), np.stack(runs), attrs)
    if as_it_is:
        if metric.kind == "pattern":
            baseline = xr.Variable(("run", "layer", "head", "example"), np.moveaxis(baseline.values, 1, -1), attrs)
        alone = xr.Variable(baseline.dims[1:], baseline.values[plan.runs.index(plan.base)], card_attrs(metric.card))
        return {metric.name: alone, f"baseline_{metric.name}": baseline}
    found = {f"baseline_{metric.name}": baseline}
    if (metric.name, 0) in outcome.values:
        whole = _assemble([place(outcome.values[metric.name, at], at) for at in range(len(groups))], batch, groups)
        names, shape = [name for name, _ in axes], [len(values) for _, values in axes]
        if drawn is not None:
            random = np.where(drawn.rows[..., None] < 0, np.nan, whole[drawn.rows]).astype(whole.dtype)
            attrs = card_attrs(metric.card, long_name=f"{metric.card.long_name}, random heads instead")
            random = random.reshape(*shape, *random.shape[1:])
            found[f"{metric.name}_control"] = xr.Variable((*names, "control", "draw", *dims), random, attrs)
            whole = whole[: len(drawn.rows)]
        whole = whole.reshape(*shape, *whole.shape[1:])
        found[metric.name] = xr.Variable((*names, *dims), whole, card_attrs(metric.card))
    return dict(reversed(found.items()))


def _layout(metric: Metric, batch: Batch, per_position: bool) -> tuple[tuple[str, ...], Callable[[Array, int], Array]]:
    """Dims after the conditions, and how a group's ``(condition, example, ...)`` values are brought to them."""
    groups = batch.groups()
    if metric.kind == "pattern":
        return ("example", "read_layer", "read_head"), lambda value, number: value
    if not per_position:
        return ("example",), lambda value, number: OVER[metric.over](value)

    def spread(value: Array, number: int) -> Array:
        """Put the values of a group at its scored positions; NaN elsewhere."""
        whole = np.full((*value.shape[:2], int(batch.lengths.max())), np.nan, dtype=value.dtype)
        whole[..., list(groups[number].scored)] = value
        return whole

    return ("example", "position"), spread


def _less_rivals(dataset: xr.Dataset, metrics: Sequence[Metric], pairs: int) -> xr.Dataset:
    """The examples alone, where their rivals ran in as many rows after them; a difference is that of the two."""
    if not pairs:
        return dataset
    own, rivals = dataset.isel(example=slice(pairs)), dataset.isel(example=slice(pairs, None))
    differ = [
        name
        for metric in metrics
        if metric.over == "difference"
        for name in (metric.name, f"baseline_{metric.name}", f"{metric.name}_control")
    ]
    return own.assign(
        {name: own[name].copy(data=own[name].values - rivals[name].values) for name in differ if name in own}
    )


def _assemble(by_group: list[Array], batch: Batch, groups: Sequence[Any]) -> Array:
    """Groups ``(condition, example of the group, ...)`` as ``(condition, example, ...)``."""
    first = by_group[0]
    whole = np.full((first.shape[0], len(batch.lengths), *first.shape[2:]), np.nan, dtype=first.dtype)
    for group, values in zip(groups, by_group, strict=True):
        whole[:, list(group.examples)] = values
    return whole
