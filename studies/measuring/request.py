"""From what a user asks for to what the engine takes: conditions, readers and a plan, checked beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, check_text
from ...interventions.declare.edits import Intervention
from ...interventions.declare.grid import Grid
from ...interventions.plan.plan import Plan, make_plan
from ...metrics.card import Metric
from ...metrics.outputs import of_answer
from ..tasks.batch import Batch
from ..tasks.tasks import Task, reference_tokens
from .labels import check_is_model, check_names, task_json

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.run.cache import CompiledMetric
    from ...interventions.run.outcome import Inputs

What = Intervention | Mapping[str, Intervention] | Grid | None
Axes = list[tuple[str, tuple[Any, ...]]]


@dataclass(frozen=True, eq=False)
class Request:
    """Everything that a measurement needs before it runs.

    Attributes
    ----------
    metrics : list of Metric
    axes : list of (name, labels)
    task : str
        Its declaration as JSON.
    batch : Batch
    plan : Plan
    """

    metrics: list[Metric]
    axes: Axes
    task: str
    batch: Batch
    plan: Plan

    def readers(self) -> list[CompiledMetric]:
        """The metrics as the engine sees them."""
        from ...interventions.run.cache import CompiledMetric

        batch, groups = self.batch, self.plan.groups
        return [
            CompiledMetric(
                metric.name,
                metric.kind,
                metric.kernel,
                {run: tuple(metric.prepare(batch.facts(run, group)) for group in groups) for run in batch.runs},
                metric.needs_base,
                metric.tokens,
            )
            for metric in self.metrics
        ]

    def inputs(self, task: Task, model: Model) -> Inputs:
        """The prompts as the engine sees them."""
        from ...interventions.run.outcome import Inputs

        batch, plan = self.batch, self.plan
        return Inputs(
            {run: tuple(batch.tokens(run, group) for group in plan.groups) for run in batch.runs},
            *(reference_tokens(task, model, plan) if plan.uses_reference else ()),
        )


def set_up(
    model: Model,
    task: Task,
    what: What,
    metrics: Metric | Sequence[Metric],
    *,
    base: str,
    per_position: bool,
    batch_size: int | str,
) -> Request:
    """Check what a measurement asks for, and plan its passes.

    Parameters
    ----------
    model : Model
    task : Task
    what : Intervention, mapping of str to Intervention, Grid, or None
        None measures the baseline alone.
    metrics : Metric or sequence of Metric
    base : str
        The run that is intervened on.
    per_position : bool
        Whether values of the logits metrics are wanted at each scored position, not their mean.
    batch_size : int or "auto"
        Rows of one forward pass.

    Returns
    -------
    Request

    Raises
    ------
    DeclarationError, UnknownNameError
        Something that was asked for does not exist or cannot be; the text says what is possible.
    """
    check_is_model(model)
    chosen = chosen_metrics(metrics)
    axes, interventions = conditions(what)
    check_names(axes, chosen, per_position)
    declared = task_json(task)
    batch = task.draw(model)
    chosen, batch = for_answers(chosen, batch, per_position)
    plan = make_plan(
        [intervention.edits() for intervention in interventions],
        model=model.name,
        shape=model.shape,
        groups=batch.groups(),
        runs=list(batch.runs),
        base=base,
        batch_size=batch_size,
        reads_patterns=any(metric.kind == "pattern" for metric in chosen),
        columns=logits_wanted(chosen),
        budget=model.backend.budget,
        overhead=model.backend.overhead,
    )
    check_reference(plan, batch)
    return Request(chosen, axes, declared, batch, plan)


def for_answers(metrics: list[Metric], batch: Batch, per_position: bool) -> tuple[list[Metric], Batch]:
    """Where answers are several tokens: the metrics as they are defined for them, and the rows that they need."""
    if not batch.sequences:
        return metrics, batch
    metrics = [of_answer(metric) for metric in metrics]
    if not any(metric.over == "difference" for metric in metrics):
        return metrics, batch
    if per_position:
        raise DeclarationError(
            "per_position=True: logit_diff of answers of several tokens compares two continuations, which share no "
            "position"
        )
    return metrics, batch.with_rivals()


def check_reference(plan: Plan, batch: Batch) -> None:
    """Refuse what puts other values into a prompt with its answer than into the same prompt with its distractor."""
    for edit in (edit for edits in plan.conditions for edit in edits if batch.pairs):
        if edit.uses_reference and not edit.over_all:
            raise DeclarationError(
                f"{edit!r}: logit_diff of answers of several tokens compares prompts of different lengths, and "
                "references of each length are others: possible are MeanAblate(..., over=('example', 'position')), "
                "ZeroAblate, and metrics that take no distractor"
            )


def logits_wanted(metrics: Sequence[Metric]) -> int | None:
    """Logits that the metrics look at, at each scored position; None for the whole vocabulary."""
    outputs = [metric for metric in metrics if metric.kind == "logits"]
    return sum(len(metric.tokens) for metric in outputs) if all(metric.tokens for metric in outputs) else None


def chosen_metrics(given: Metric | Sequence[Metric]) -> list[Metric]:
    """One metric or several, as a list."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    chosen: list[Any] = list(given) if several else [given]  # type: ignore[arg-type]
    for metric in chosen:
        if not isinstance(metric, Metric):
            raise DeclarationError(f"{metric!r} is no metric: give one of hw.metrics, such as hw.metrics.loss")
    if not chosen:
        raise DeclarationError("nothing to measure: name at least one metric, such as loss")
    if len({metric.name for metric in chosen}) < len(chosen):
        raise DeclarationError(f"metrics must differ, got {chosen}")
    return chosen


def conditions(what: What) -> tuple[Axes, list[Intervention]]:
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
    for name in names:
        check_text(name, "the name of the condition")
    if len(set(names)) < len(names):
        raise DeclarationError(f"the names of the conditions must differ as text, got {names}")
    return [("condition", names)], list(what.values())


def check_estimable(metrics: Sequence[Metric], estimator: str, steps: int, per_position: bool) -> None:
    """Refuse an estimator that is not known, or that cannot give what is asked for.

    Parameters
    ----------
    metrics : sequence of Metric
    estimator : {"exact", "gradient", "integrated"}
    steps : int
        Steps of the integrated estimate.
    per_position : bool
        Whether values are wanted at each scored position, which no gradient estimate gives.

    Raises
    ------
    DeclarationError, UnknownNameError
        The text says what is possible.
    """
    from ...interventions.plan.estimators import check_estimator

    check_estimator(estimator, steps)
    if estimator == "exact":
        return
    for metric in metrics:
        if metric.kind != "logits" or not metric.differentiable:
            raise DeclarationError(
                f"{metric.name} has no gradient estimate: possible are metrics of logits that change smoothly, such as "
                "loss, logit_diff and prob"
            )
        if metric.over != "mean":
            raise DeclarationError(f"{metric.card.long_name}: there is only estimator='exact'")
    if per_position:
        raise DeclarationError(f"per_position=True: estimator={estimator!r} gives the mean over scored positions only")
