"""edge_scores: what each edge of a model is worth to a behaviour, exactly or by an estimate."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import xarray as xr

from ...errors import MOST_STEPS, DeclarationError, choices, whole
from ...interventions.base.hashing import data_hash, short_hash
from ...interventions.declare.circuits import Circuit, Edge
from ...interventions.declare.codec import encode
from ...interventions.declare.edges import EdgePatches
from ...metrics.card import Metric
from ..measuring import context
from ..measuring.effects import effect
from ..measuring.labels import check_is_model, task_json
from ..measuring.measure import measure
from ..measuring.request import chosen_metrics
from ..storage import unfinished
from ..storage.provenance import exact_facts, provenance
from ..storage.registry import TASKS
from ..tasks.prompts import rendered

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ..tasks.tasks import Task

Edges = Circuit | Iterable[Edge | tuple[str, str] | str]
ASKED = "edge_scores"
"""Attribute that holds the options of the call as JSON."""


@dataclass(frozen=True, eq=False)
class EdgeRequest:
    """What scores of edges are asked for: checked, and ready to be run by an estimator.

    Attributes
    ----------
    model : Model
    task : Task
    metric : Metric
        Of logits.
    what : EdgePatches
        The edges, and the run that they carry.
    base : str
    steps : int, optional
        Of an estimator that takes steps.
    then_exact : int
        How many of the edges with the largest estimates are scored exactly afterwards.
    check : bool
    options : dict
        What `measure` takes besides: ``batch_size``, ``remote``, ``progress``, ``executor``.
    """

    model: Model
    task: Task
    metric: Metric
    what: EdgePatches
    base: str
    steps: int | None
    then_exact: int
    check: bool
    options: dict[str, Any]

    def exactly(self, what: EdgePatches | None = None) -> xr.Dataset:
        """Exact scores ``score (edge, example)`` of these edges, or of others, with ``baseline_<metric>``."""
        some, name = self.what if what is None else what, self.metric.name
        ds = measure(self.model, self.task, some, self.metric, base=self.base, check=self.check, **self.options)
        return ds.drop_vars(name).assign(score=self.as_score(effect(ds, name)))

    def as_score(self, values: xr.DataArray) -> xr.DataArray:
        """Scores ``(edge, example)`` with the attributes that say what they are."""
        card = self.metric.card
        attrs = {
            "long_name": f"change of {card.long_name} by one edge that carries the {self.what.source} run",
            "units": card.units,
            "metric": card.name,
            **({"better": card.better} if card.better else {}),
        }
        return values.transpose("edge", "example").assign_attrs(attrs).rename("score")


class Estimator(NamedTuple):
    """How edges are scored."""

    score: Callable[[EdgeRequest], xr.Dataset]
    """Gives a Dataset with ``score (edge, example)``, ``baseline_<metric> (run, example)`` and their attributes."""
    steps: int | None = None
    """Steps where none are given; None where it takes none."""


ESTIMATORS: dict[str, Estimator] = {"exact": Estimator(EdgeRequest.exactly)}
"""The ways of scoring, by their names."""


def edge_scores(
    model: Model,
    task: Task,
    metric: Metric | str,
    *,
    source: str = "corrupted",
    estimator: str = "exact",
    steps: int | None = None,
    then_exact: int = 0,
    base: str = "clean",
    edges: Edges | None = None,
    batch_size: int | str = "auto",
    check: bool = True,
    remote: bool | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    executor: Executor | None = None,
) -> xr.Dataset:
    """What the metric changes by where one edge of the model carries the value of another run.

    A score is ``metric(edge carries source) - metric(base)``: **below 0 where the edge matters to a metric that is
    better higher**. An exact score is a forward pass from the receiver of the edge on, in which the receiver reads what
    the sender writes in the run `source`, and all else that it reads stays as in the base run; everything after it is
    computed anew. ``print(hw.plan(model, task, hw.EdgePatches(), metric))`` explains what all of them cost.

    Parameters
    ----------
    model : Model
        From `headwise.load`; one that `Graph.of` takes, with its blocks laid open.
    task : Task
        One that has the run `source`.
    metric : Metric or str
        Of logits, such as ``"logit_diff"``.
    source : str
        The run whose values edges carry.
    estimator : {"exact"}
        How edges are scored.
    steps : int, optional
        Of an estimator that takes steps.
    then_exact : int
        Of an estimate: how many of the edges with the largest estimates get their exact score.
    base : str
        The run that is intervened on.
    edges : Circuit or iterable of edges, optional
        Those that are scored; all edges of the model when left out, see `Graph`.
    batch_size, check, remote, progress, resume, executor
        As for `measure`.
    out : path, optional
        NetCDF file to write. Until it is whole, finished passes are kept beside it: see `measure`.

    Returns
    -------
    Dataset
        ``score (edge, example)``, in the units of the metric, and ``baseline_<metric> (run, example)``, the runs as
        they are. Coordinates along ``edge``: its text, ``sender`` and ``receiver``. The attribute ``better`` of scores
        is that of the metric, which `Circuit.top` reads: ``Circuit.top(scores.mean("example"), n=20)``.

    Raises
    ------
    DeclarationError, UnknownNameError
        Something that was asked for does not exist or cannot be; raised before any forward pass.
    ModelError, ResultError, ServerError
        As `measure`.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> scores = hw.edge_scores(model, task, "logit_diff")
    >>> dict(scores["score"].sizes), scores["score"].attrs["units"]
    ({'edge': 310, 'example': 4}, 'logit')
    >>> hw.Circuit.top(scores.mean("example"), n=2)
    Circuit(2 edges: input->a0.h3<v>, a0.h3->a1.h1<k>)

    References
    ----------
    Conmy et al. 2023, Towards Automated Circuit Discovery, arXiv:2304.14997; Syed et al. 2023, arXiv:2310.10348;
    Mueller et al. 2025, MIB, arXiv:2504.13151, whose graph it is.
    """
    check_is_model(model)
    (chosen,) = _one(metric)
    what = EdgePatches(edges, source)
    found = _estimator(estimator, steps, then_exact)
    steps = found.steps if steps is None else steps
    model.check_laid_open("edge_scores")
    most = len(what.of(model))
    if then_exact > most:
        raise DeclarationError(f"then_exact={then_exact}: there are {most} edges")
    options = {"batch_size": batch_size, "remote": remote, "progress": progress, "executor": executor}
    task = rendered(task, model)
    request = EdgeRequest(model, task, chosen, what, base, steps, then_exact, check, options)
    asked = {"estimator": estimator, "steps": steps, "then_exact": then_exact}
    attrs = {
        "task": task_json(task),
        "interventions": json.dumps(encode(what, TASKS)),
        "metrics": json.dumps([chosen.name]),
        "base": base,
        "estimator": estimator,
        ASKED: json.dumps({name: value for name, value in asked.items() if value}),
    }

    def scored() -> xr.Dataset:
        result = found.score(request).assign_attrs(attrs)
        result["score"].attrs["estimator"] = estimator
        return result

    if out is None:
        return scored()
    from ...interventions.begin import begin

    batch = task.draw(model)
    with (
        unfinished.keeping(out, resume) as kept,
        context.using(store=kept),
        begin(model, check=False, anew=True, ledger=kept) as call,
    ):
        kept.describe(provenance(model, call.identity) | attrs, call.identity)
        drawn = data_hash([dict(batch.runs), batch.lengths, batch.scored, batch.targets, batch.distractors])
        numbers = json.dumps(exact_facts(model, call.identity))
        inputs = short_hash(json.dumps(attrs), drawn, data_hash(chosen), numbers)
        if (there := kept.finished(inputs, call.identity)) is not None:
            return there.to_dataset()
        result = scored().assign_attrs(inputs=inputs)
        kept.finish(result)
        return result


def _one(metric: Metric | str) -> list[Metric]:
    """The metric, where it is one that scores can be of."""
    if not isinstance(metric, Metric | str):
        raise DeclarationError(f"edge_scores takes one metric, such as 'logit_diff', got {metric!r}")
    chosen = chosen_metrics(metric)
    if chosen[0].kind != "logits":
        raise DeclarationError(f"{chosen[0].name} is no metric of logits: edge_scores takes one, such as 'logit_diff'")
    return chosen


def _estimator(name: str, steps: int | None, then_exact: int) -> Estimator:
    """The way of scoring that is called so, where it takes these options."""
    if name not in ESTIMATORS:
        raise DeclarationError(f"estimator={name!r}: possible are {choices(map(repr, ESTIMATORS))}")
    found = ESTIMATORS[name]
    if steps is not None:
        if found.steps is None:
            raise DeclarationError(f"steps={steps!r}: estimator={name!r} takes none: leave steps out")
        whole(steps, "steps", low=1, high=MOST_STEPS)
    if whole(then_exact, "then_exact") and name == "exact":
        raise DeclarationError(f"then_exact={then_exact}: all scores of estimator='exact' are exact: leave it out")
    return found
