"""From what a user asks for to what the engine takes: conditions, readers and a plan, checked beforehand."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import LARGEST_SEED, MOST_DRAWS, DeclarationError, UnknownNameError, check_text, choices, whole
from ...interventions.declare.changes import MEAN
from ...interventions.declare.edges import EdgePatches
from ...interventions.declare.edits import Edit, Intervention
from ...interventions.declare.grid import Grid
from ...interventions.declare.steering import Knockout
from ...interventions.plan.plan import Plan, make_plan
from ...interventions.plan.validate import how_to_have
from ...metrics.card import Metric
from ...metrics.outputs import of_answer
from ..storage.registry import metric_of
from ..tasks.batch import Batch
from ..tasks.tasks import Task, reference_tokens
from .controls import Controls, with_controls
from .labels import check_is_model, check_names, task_json, texts_of

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.run.cache import CompiledMetric
    from ...interventions.run.outcome import Inputs

What = Intervention | Mapping[str, Intervention | None] | Sequence[Intervention] | Grid | EdgePatches | None
Metrics = Metric | str | Sequence[Metric | str]
Runs = str | Sequence[str] | None
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
    runs : str, sequence of str or None
        Which runs were asked for, as it was said.
    batch : Batch
    plan : Plan
        The conditions that were asked for come first.
    controls : Controls or None
        Random sets of heads, whose conditions come after them.
    """

    metrics: list[Metric]
    axes: Axes
    task: str
    runs: Runs
    batch: Batch
    plan: Plan
    controls: Controls | None

    def readers(self) -> list[CompiledMetric]:
        """The metrics as the engine sees them."""
        from ...interventions.run.cache import CompiledMetric

        batch, groups = self.batch, self.plan.groups
        return [
            CompiledMetric(
                metric.name,
                metric.kind,
                metric.kernel,
                {run: tuple(metric.prepare(batch.facts(run, group)) for group in groups) for run in self.plan.runs},
                metric.needs_base,
                metric.tokens,
            )
            for metric in self.metrics
        ]

    def inputs(self, task: Task, model: Model) -> Inputs:
        """The prompts as the engine sees them."""
        return inputs_of(task, model, self.batch, self.plan)


def inputs_of(task: Task, model: Model, batch: Batch, plan: Plan) -> Inputs:
    """The prompts that a task drew, and its reference prompts where a plan takes values from them.

    Parameters
    ----------
    task : Task
    model : Model
    batch : Batch
        What the task drew.
    plan : Plan

    Returns
    -------
    Inputs
    """
    from ...interventions.run.outcome import Inputs

    return Inputs(
        {run: tuple(batch.tokens(run, group) for group in plan.groups) for run in plan.runs},
        *(reference_tokens(task, model, plan) if plan.uses_reference else ()),
    )


def set_up(
    model: Model,
    task: Task,
    what: What,
    metrics: Metrics,
    *,
    base: str,
    runs: Runs = None,
    per_position: bool,
    batch_size: int | str,
    controls: int = 0,
    seed: int = 0,
) -> Request:
    """Check what a measurement asks for, and plan its passes.

    Parameters
    ----------
    model : Model
    task : Task
    what : Intervention, mapping of str to Intervention, sequence of Intervention, Grid, EdgePatches, or None
        None measures the model as it is.
    metrics : Metric, str, or sequence of these
    base : str
        The run that is intervened on.
    runs : str or sequence of str, optional
        See `measure`.
    per_position : bool
        Whether values of the logits metrics are wanted at each scored position, not their mean.
    batch_size : int or "auto"
        Rows of one forward pass.
    controls, seed : int
        See `measure`.

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
    axes, interventions = conditions(what, model)
    edits: Sequence[Sequence[Edit]] = [intervention.edits() for intervention in interventions]
    drawn = None
    if whole(controls, "controls", high=MOST_DRAWS):
        if per_position:
            raise DeclarationError(
                f"controls={controls}: they are compared by the mean over positions: leave per_position out"
            )
        drawn, edits = with_controls(
            edits, chosen, model.name, model.shape, controls, whole(seed, "a seed", high=LARGEST_SEED)
        )
    check_names(axes, chosen, per_position, drawn is not None)
    warn_of_nothing(interventions, base)
    declared = task_json(task)
    batch = task.draw(model)
    if isinstance(what, EdgePatches) and what.source not in (*batch.runs, MEAN):
        possible = [*(run for run in batch.runs if run != base), MEAN]
        are = "are" if len(possible) > 1 else "is"
        raise UnknownNameError(
            f"source={what.source!r}: the task has no such run, possible {are} {choices(possible)}"
            f"{how_to_have(what.source)}"
        )
    measured = _asked(runs, what, batch.runs)
    chosen, batch = for_answers(chosen, batch, per_position)
    plan = make_plan(
        edits,
        model=model.name,
        shape=model.shape,
        groups=batch.groups(),
        runs=list(batch.runs),
        base=base,
        measured=measured,
        batch_size=batch_size,
        reads_patterns=any(metric.kind == "pattern" for metric in chosen),
        columns=logits_wanted(chosen),
        budget=model.backend.budget,
        overhead=model.backend.overhead,
    )
    check_reference(plan, batch)
    plan = replace(plan, pairs=batch.pairs)
    return Request(chosen, axes, declared, runs, batch, plan, drawn)


def warn_of_nothing(interventions: Iterable[Intervention], base: str) -> None:
    """Warn of the first edit that cannot change anything on a run, whatever the model: it was hardly meant."""
    for edit in (edit for one in interventions for edit in one.edits()):
        if getattr(edit, "source", None) == base:
            why = f"it takes from the run that it changes, {base}: give measure another base, or it another source"
        elif isinstance(edit, Knockout) and edit.is_of_later_keys:
            why = "no query attends to a later key"
        else:
            continue
        warnings.warn(f"{edit!r} changes nothing: {why}", stacklevel=4)
        return


def _asked(runs: Runs, what: What, possible: Iterable[str]) -> list[str] | None:
    """The runs that are measured as they are beside those that must be; None for all of them."""
    if runs == "all" or (runs is None and what is not None):
        return None
    if isinstance(runs, str | list | tuple | None):
        return [runs] if isinstance(runs, str) else list(runs or ())
    several = "give 'all', the name of a run or several names"
    raise UnknownNameError(f"runs={runs!r}: {several}: the task has the runs {choices(possible)}")


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


def chosen_metrics(given: Metrics) -> list[Metric]:
    """One metric or several, as a list; the name of a metric that ships with headwise stands for it."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    chosen: list[Any] = list(given) if several else [given]  # type: ignore[arg-type]
    for at, metric in enumerate(chosen):
        if isinstance(metric, str):
            chosen[at] = metric = metric_of(metric)
        if not isinstance(metric, Metric):
            raise DeclarationError(f"{metric!r} is no metric: give a name such as 'loss', or a hw.metrics.Metric")
    if not chosen:
        raise DeclarationError("nothing to measure: name at least one metric, such as loss")
    if len({metric.name for metric in chosen}) < len(chosen):
        raise DeclarationError(f"metrics must differ, got {chosen}")
    return chosen


class AsItIs(Intervention):
    """None among the conditions of a mapping: nothing is changed."""

    def edits(self) -> tuple[Edit, ...]:
        """None."""
        return ()


def check_what(what: What) -> None:
    """Refuse, before a model is known, what cannot be measured on any."""
    if not isinstance(what, EdgePatches):
        conditions(what)


def conditions(what: What, model: Model | None = None) -> tuple[Axes, list[Intervention]]:
    """Axes (name and coordinates) and interventions in the order of their product; of edges on a model."""
    if isinstance(what, EdgePatches):
        if model is None:
            raise DeclarationError(f"{what!r}: which edges there are is known of a model only")
        return [("edge", what.of(model))], list(what.patches(model))
    if what is None:
        return [], []
    if isinstance(what, Intervention):
        return [], [what]
    if isinstance(what, Grid):
        return list(what.axes), list(what.interventions)
    if isinstance(what, list | tuple):
        for one in what:
            if not isinstance(one, Intervention):
                raise DeclarationError(f"cannot measure {one!r} in a list: each condition must be an intervention")
        if not what:
            raise DeclarationError("the list of conditions is empty; leave it out to measure the model as it is")
        return [("condition", texts_of(what))], list(what)
    if not isinstance(what, Mapping):
        raise DeclarationError(
            f"cannot measure {what!r}: give an intervention, a list of them, a mapping of names to them, a Grid or "
            "EdgePatches"
        )
    for name, intervention in what.items():
        if not isinstance(intervention, Intervention | None):
            raise DeclarationError(f"{name!r} is {intervention!r}: each condition must be an intervention, or None")
    if not what:
        raise DeclarationError("the mapping of conditions is empty; leave it out to measure the model as it is")
    names = tuple(map(str, what))
    for name in names:
        check_text(name, "the name of the condition")
    if len(set(names)) < len(names):
        raise DeclarationError(f"the names of the conditions must differ as text, got {names}")
    return [("condition", names)], [AsItIs() if one is None else one for one in what.values()]


def check_estimable(
    metrics: Sequence[Metric], estimator: str, steps: int, per_position: bool, what: What = None
) -> None:
    """Refuse an estimator that is not known, or that cannot give what is asked for.

    Parameters
    ----------
    metrics : sequence of Metric
    estimator : str
        See `measure`.
    steps : int
        Steps of an estimate that takes some.
    per_position : bool
        Whether values are wanted at each scored position, which no gradient estimate gives.
    what : Intervention, mapping, sequence, Grid, EdgePatches or None
        What is measured: edges have estimators of their own.

    Raises
    ------
    DeclarationError, UnknownNameError
        The text says what is possible.
    """
    from ...interventions.plan.estimators import EDGE_ESTIMATORS, ESTIMATORS, STEPPED, check_estimator

    check_estimator(estimator, steps, isinstance(what, EdgePatches))
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
        if metric.needs_base and estimator not in STEPPED:
            known = EDGE_ESTIMATORS if isinstance(what, EdgePatches) else ESTIMATORS
            possible = choices(repr(name) for name in known if name in STEPPED)
            raise DeclarationError(
                f"{metric.name} is least at the base run, where its slope is 0 whatever is done: use "
                f"estimator={possible} or 'exact'"
            )
    if per_position:
        raise DeclarationError(f"per_position=True: estimator={estimator!r} gives the mean over scored positions only")
