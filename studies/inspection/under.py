"""What is looked for inside a model under interventions: planned passes make it, and give nothing else."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DeclarationError
from ...interventions.base.memory import shortage
from ...interventions.declare.circuits import Edge
from ...interventions.declare.codec import encode
from ...interventions.declare.sites import Site
from ...interventions.plan.plan import Plan, make_plan
from ...interventions.plan.reads import Inside
from ...metrics.card import Metric
from ..measuring import context
from ..measuring.capture import SHARE
from ..measuring.labels import check_axes
from ..measuring.request import Axes, Request, What, conditions, logits_wanted, warn_of_nothing
from ..output.progress import Progress
from ..storage.registry import TASKS

if TYPE_CHECKING:
    from ...interventions.begin import Call
    from ...interventions.models.model import Model
    from ..tasks.batch import Batch
    from ..tasks.tasks import Task

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Under:
    """Conditions under which something is looked for inside a model, checked and planned.

    Attributes
    ----------
    model : Model
    task : Task
    what : Intervention, mapping, sequence or Grid
    axes : list of (name, labels)
        The dims of `what`.
    request : Request
        The prompts, the metrics and the plan.
    """

    model: Model
    task: Task
    what: What
    axes: Axes
    request: Request

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dims of the conditions."""
        return tuple(name for name, _ in self.axes)

    @property
    def coords(self) -> dict[str, list[Any]]:
        """The labels of the conditions."""
        return {name: [str(one) if isinstance(one, Edge) else one for one in values] for name, values in self.axes}

    @property
    def attrs(self) -> dict[str, str]:
        """The conditions as a NetCDF attribute."""
        return {"interventions": json.dumps(encode(self.what, TASKS))}

    def named(self, dim: str) -> str:
        """What a dim or coordinate of the result is called: ``read_layer`` where ``layer`` is an axis of the grid."""
        return f"read_{dim}" if dim in self.dims else dim

    def check_model(self, call: Call) -> None:
        """Check the parts inside a layer that are written, unless this very model has passed that."""
        from ...interventions.selfcheck import check_planned

        check_planned(self.model, call.identity, self.request.plan)

    def values(self) -> dict[str, Array]:
        """Run the passes.

        Returns
        -------
        dict
            Each value, in the sizes of `axes`, then its own, then ``(example, position)``; NaN where none is scored.
        """
        request, plan, execution = self.request, self.request.plan, context.current()
        with Progress(execution.label, None, kept=None, total=plan.steps, stage=execution.stage) as bar:
            outcome = self.model.backend.run_plan(
                plan, request.readers(), request.inputs(self.task, self.model), bar.update, say=bar.say
            )
        assert plan.inside is not None
        found, axes = {}, [len(labels) for _, labels in self.axes]
        for name, sizes in plan.inside.sizes.items():
            size = (len(plan.conditions), *sizes, *request.batch.scored.shape)
            whole: Array = np.full(size, np.nan, dtype=outcome.values[name, 0].dtype)
            for at, group in enumerate(plan.groups):
                value = np.moveaxis(outcome.values[name, at], 1, -2)
                whole[np.ix_(*map(range, whole.shape[:-2]), group.examples, group.scored)] = value
            found[name] = whole.reshape(*axes, *whole.shape[1:])
        return found


def under(
    model: Model,
    task: Task,
    what: What,
    batch: Batch,
    run: str,
    reads: Sequence[Site],
    inside: Inside,
    own: Collection[str],
    metrics: Sequence[Metric] = (),
) -> Under:
    """Check conditions, and plan the passes that look inside a model under each of them.

    Parameters
    ----------
    model : Model
    task : Task
    what : Intervention, mapping, sequence or Grid
    batch : Batch
        What the task drew.
    run : str
    reads : sequence of Site
    inside : Inside
        What is made of these.
    own : collection of str
        Names that the result has, but for ``layer`` and ``head``, and no axis of a grid can have.
    metrics : sequence of Metric
        Of the lens.

    Returns
    -------
    Under

    Raises
    ------
    DeclarationError, UnknownNameError
        A condition cannot be, or memory does not hold what is asked for; the text says what is possible.
    """
    axes, interventions = conditions(what, model)
    warn_of_nothing(interventions, run)
    check_axes(axes, {*own, "read_layer", "read_head"})
    plan: Plan = make_plan(
        [one.edits() for one in interventions],
        model=model.name,
        shape=model.shape,
        groups=batch.groups(),
        runs=list(batch.runs),
        base=run,
        measured=[],
        columns=logits_wanted(metrics) if metrics else 0,
        budget=model.backend.budget,
        overhead=model.backend.overhead,
        reads=reads,
        inside=inside,
    )
    check_room(inside.sizes.values(), len(plan.conditions), batch)
    return Under(model, task, what, axes, Request([*metrics], axes, "", None, batch, plan, None))


def check_room(sizes: Iterable[tuple[int, ...]], conditions: int, batch: Batch) -> None:
    """Refuse values of some sizes, at every position, that the free memory does not hold."""
    numbers = conditions * batch.scored.size * sum(int(np.prod(size)) for size in sizes)
    if short := shortage(8 * numbers, SHARE):
        raise DeclarationError(f"what is asked for {short}: name fewer parts, conditions or prompts")
