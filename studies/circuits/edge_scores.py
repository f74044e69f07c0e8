"""edge_scores: what each edge of a model is worth to a behaviour, exactly or by an estimate."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, NamedTuple

import xarray as xr

from ...errors import LARGEST_SEED, MOST_STEPS, DeclarationError, choices, whole
from ...interventions.declare.circuits import Circuit, Edge
from ...interventions.declare.codec import encode
from ...interventions.declare.edges import EdgePatches
from ...interventions.plan.estimators import EDGE_ESTIMATORS, EDGE_STEPS, STEPPED, said
from ...metrics.card import Metric
from ..measuring import context
from ..measuring.labels import check_is_model, task_json
from ..measuring.request import chosen_metrics
from ..storage import unfinished
from ..storage.provenance import inputs_of, provenance
from ..storage.registry import TASKS
from ..tasks.prompts import rendered
from .edge_estimates import estimating
from .edge_request import EdgeRequest

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ..tasks.tasks import Task

SAMPLE = 50
"""Edges that are drawn where some are verified."""
Edges = Circuit | Iterable[Edge | tuple[str, str] | str]
ASKED = "edge_scores"
"""Attribute that holds the options of the call as JSON."""


class Estimator(NamedTuple):
    """How edges are scored."""

    score: Callable[[EdgeRequest], xr.Dataset]
    """Gives a Dataset with ``score (edge, example)``, ``baseline_<metric> (run, example)`` and their attributes."""
    steps: int | None = None
    """Steps where none are given; None where it takes none."""


ESTIMATORS: dict[str, Estimator] = {
    name: Estimator(
        EdgeRequest.exactly if name == "exact" else estimating(name), EDGE_STEPS if name in STEPPED else None
    )
    for name in EDGE_ESTIMATORS
}
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
    sample: int = SAMPLE,
    seed: int = 0,
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
        One that has the run `source`, if that is one.
    metric : Metric or str
        Of logits, such as ``"logit_diff"``.
    source : str
        The run whose values edges carry; ``"mean"`` for means over the reference draw of the task.
    estimator : {"exact", "eap", "eap-ig", "eap-ig-activations", "atp*", "relp"}
        How edges are scored. Estimates take a few passes for all edges together. They are what the sender's value
        changes by, times a slope of the metric by what the receiver reads, so their sign is that of exact scores:
        ``"eap"`` takes the slope in the base run; ``"eap-ig"`` its mean while the embedding goes from one run to the
        other, ``"eap-ig-activations"`` while each layer of heads and each MLP does; ``"atp*"`` makes attention patterns
        anew, and leaves each attention layer and MLP in turn out of the way back, so that nothing cancels; ``"relp"``
        takes norms and activation functions for multiplications by numbers, and halves the slope at gates. What each
        is, and what of it is ours, is in ``studies/circuits/edge_estimates.py``.
    steps : int, optional
        Of ``"eap-ig"`` and ``"eap-ig-activations"``; 5 when left out, as in MIB.
    then_exact : int
        Of an estimate: so many edges with the largest estimates (means over prompts, in size) get their exact score.
    sample : int
        Of the other edges, so many get theirs too, drawn at random: the attribute ``verification`` says how large the
        largest of them is, and how many of all others can be larger than the least of those that were verified, with
        95% confidence. Without `then_exact`, none are drawn.
    seed : int
        Of the draw.
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
        is that of the metric, which `Circuit.top` reads: ``Circuit.top(scores.mean("example"), n=20)``. With
        `then_exact` the coordinates ``exact`` and ``sampled`` along ``edge`` say which scores are exact, and which of
        them were drawn; attributes say what that tells of the others, ``verification`` in words.

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
    Conmy et al. 2023, Towards Automated Circuit Discovery, arXiv:2304.14997; Syed et al. 2023, arXiv:2310.10348 (EAP);
    Hanna et al. 2024, arXiv:2403.17806 (EAP-IG); Kramar et al. 2024, arXiv:2403.00745 (AtP*); Jafari et al. 2025,
    arXiv:2508.21258 (RelP); Mueller et al. 2025, MIB, arXiv:2504.13151, whose graph it is.
    """
    check_is_model(model)
    (chosen,) = _one(metric)
    what = EdgePatches(edges, source)
    found = check_options(estimator, steps, then_exact)
    steps = found.steps if steps is None else steps
    model.check_laid_open("edge_scores")
    most = len(what.of(model))
    whole(sample, "sample")
    whole(seed, "seed", high=LARGEST_SEED)
    if then_exact > most:
        raise DeclarationError(f"then_exact={then_exact}: there are {most} edges")
    options = {"batch_size": batch_size, "remote": remote, "progress": progress, "executor": executor}
    task = rendered(task, model)
    request = EdgeRequest(model, task, chosen, what, base, steps, then_exact, sample, seed, check, options)
    asked = {"estimator": estimator, "steps": steps, "then_exact": then_exact}
    if then_exact:
        asked |= {"sample": sample, "seed": seed}
    attrs = {
        "task": task_json(task),
        "interventions": json.dumps(encode(what, TASKS)),
        "metrics": json.dumps([chosen.name]),
        "base": base,
        "estimator": said(estimator, steps or 0),
        ASKED: json.dumps({name: value for name, value in asked.items() if value or name in ("sample", "seed")}),
    }

    def scored() -> xr.Dataset:
        result = found.score(request).assign_attrs(attrs)
        result["score"].attrs["estimator"] = attrs["estimator"]
        return result

    if out is None:
        return scored()
    from ...interventions.begin import begin

    with (
        unfinished.keeping(out, resume) as kept,
        context.using(store=kept),
        begin(model, check=False, anew=True, ledger=kept) as call,
    ):
        kept.describe(provenance(model, call.identity) | attrs, call.identity)
        inputs = inputs_of(model, call.identity, json.dumps(attrs), tasks=[task], metrics=[chosen])
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


def check_options(name: str, steps: int | None, then_exact: int) -> Estimator:
    """The way of scoring that is called so, or an error where it takes no such options."""
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
