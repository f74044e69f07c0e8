"""Estimates of edge scores, and what exact scores of some edges say of the others.

All estimators have one sign, that of exact scores: what the metric changes by where an edge carries the other run's
value, so below 0 where the edge matters to a metric that is better higher. Each is what the sender's value changes by
(``source - base``) times a slope of the metric by what the receiver reads, summed over positions and dimensions. They
differ in the slope:

``eap``
    In the base run. Nanda 2023; Syed et al. 2023, arXiv:2310.10348.
``eap-ig``
    The mean over runs in which the token embedding stands between the two runs, at the middles of equal steps, and
    everything after it follows. Hanna et al. 2024, arXiv:2403.17806, take the left ends of the steps.
``eap-ig-activations``
    The same with one run, for each step, in which the heads of one layer or one MLP stand between the two runs, for
    each of them and for the embedding; the mean is over all of them. As in Mueller et al. 2025, MIB, arXiv:2504.13151,
    which takes the left ends too.
``atp*``
    In the base run, with two corrections. *QK fix*: for an edge into q or k, the pattern is made anew from what the
    receiver then reads, and its change is multiplied by the slope by the pattern; so a saturated softmax hides nothing.
    *GradDrop*: the slope is taken with the attention or the MLP of each layer in turn left out of the way back, since
    ways that cancel hide each other; the mean of the absolute estimates counts. Kramar et al. 2024, arXiv:2403.00745,
    say it of nodes. Ours: edges; attention and MLP of a layer are dropped one by one; the part that the receiver
    belongs to is not dropped; the size has the sign of the estimate without a drop, where theirs has none.
``relp``
    In the base run, with the slopes of layer-wise relevance propagation: a norm divides by a number, an activation
    function multiplies by one (what it gives over what it gets), and each factor of a gated MLP gets half of the slope.
    Jafari et al. 2025, arXiv:2508.21258. Attention keeps its own slopes, as in the authors' example: with their rule
    for attention patterns, which have no slope then, every edge into q or k would be 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from ...interventions.declare.circuits import Circuit
from ...interventions.declare.edges import EdgePatches
from ...metrics.intervals import most_in_all
from ..measuring.effects import effect
from ..measuring.measure import measure
from .edge_request import EdgeRequest

CONFIDENCE = 0.95
SHOWN = 5
"""Edges that were missed and are named."""


def estimating(name: str) -> Callable[[EdgeRequest], xr.Dataset]:
    """The way of scoring that an estimator is, for `edge_scores`.

    Parameters
    ----------
    name : str
        One that the docstring of this module explains.

    Returns
    -------
    callable
    """

    def score(request: EdgeRequest) -> xr.Dataset:
        return estimated(request, name)

    return score


def estimated(request: EdgeRequest, name: str) -> xr.Dataset:
    """Scores by an estimate; those of the largest, and of some more, exactly.

    Parameters
    ----------
    request : EdgeRequest
    name : str
        Of the estimator.

    Returns
    -------
    Dataset
        ``score (edge, example)`` and ``baseline_<metric>``. Where some scores are exact: the coordinates ``exact`` and
        ``sampled`` along ``edge``, and attributes on what the exact ones say of the others, see `verified`.
    """
    options: dict[str, Any] = dict(request.options)
    executor = options.pop("executor", None)
    if not request.then_exact:
        options["executor"] = executor  # which `measure` refuses, if there is one: an estimate stays here
    if request.steps is not None:
        options["steps"] = request.steps
    ds = measure(
        request.model,
        request.task,
        request.what,
        request.metric,
        base=request.base,
        check=request.check,
        estimator=name,
        **options,
    )
    found = ds.drop_vars(request.metric.name).assign(score=request.as_score(effect(ds, request.metric.name)))
    found["score"].attrs["long_name"] += ", estimated"
    return verified(request, found) if request.then_exact else found


def verified(request: EdgeRequest, found: xr.Dataset) -> xr.Dataset:
    """Estimates, of which the largest are replaced by exact scores, with a bound on what was missed.

    Of the other edges some are drawn at random and scored exactly too. How many of them exceed the least of the
    verified scores bounds how many of all the others do, with 95% confidence. This is a simple form of the diagnostic
    of AtP* (Kramar et al. 2024), which patches random sets of nodes together.

    Parameters
    ----------
    request : EdgeRequest
    found : Dataset
        With ``score (edge, example)``.

    Returns
    -------
    Dataset
        As `found`, with the coordinates ``exact`` (edge: whether its score is) and ``sampled`` (whether it was drawn),
        and the attributes ``verified``, ``sampled``, ``threshold`` (the size of the least mean score of the verified
        edges), ``largest_sampled``, ``exceeding`` (of the sample), ``exceeding_at_most`` (of all edges that were not
        verified), and ``verification``, which says it in words.
    """
    means = np.abs(found["score"].mean("example").values.astype(np.float64))
    order, k = np.argsort(-means, kind="stable"), request.then_exact
    top, others = order[:k], np.sort(order[k:])
    random = np.random.default_rng(request.seed)
    drawn = random.choice(others, size=min(request.sample, len(others)), replace=False)
    chosen = np.sort(np.concatenate([top, drawn]))
    names = [(str(found["sender"].values[at]), str(found["receiver"].values[at])) for at in chosen]
    exact = request.exactly(EdgePatches(Circuit(names), request.what.source))
    place = {str(edge): at for at, edge in enumerate(exact["edge"].values)}
    values, known = found["score"].values.copy(), exact["score"].values
    for at in chosen:
        values[at] = known[place[str(found["edge"].values[at])]]
    sizes = np.abs(values.mean(-1, dtype=np.float64))
    is_exact, is_sampled = (np.isin(np.arange(len(means)), some) for some in (chosen, drawn))
    threshold, above = float(sizes[top].min()), drawn[sizes[drawn] > sizes[top].min()]
    exceeding = len(above)
    most = most_in_all(exceeding, len(drawn), len(others), CONFIDENCE) if len(others) else 0
    largest = float(sizes[drawn].max()) if len(drawn) else float("nan")
    units = request.metric.card.units
    words = f"The scores of the {k} edges with the largest estimates are exact."
    if len(drawn):
        words += (
            f" Of the other {len(others)}, {len(drawn)} were drawn at random (seed {request.seed}) and scored exactly "
            f"too: the largest mean among them is {largest:.3g} {units} in size, where the least of the {k} is "
            f"{threshold:.3g}, and {exceeding} exceed that{_named(found, above)}. With {CONFIDENCE:.0%} confidence at "
            f"most {most} of the {len(others)} do ({most / len(others):.1%})."
        )
    elif len(others):
        words += f" Nothing is known of how large the exact scores of the other {len(others)} are: sample=0."
    facts = {"verified": k, "sampled": len(drawn), "threshold": threshold, "exceeding": exceeding}
    if len(drawn):
        facts |= {"largest_sampled": largest, "exceeding_at_most": most}
    result = found.assign_coords(exact=("edge", is_exact), sampled=("edge", is_sampled))
    result["score"] = result["score"].copy(data=values)
    return result.assign_attrs(facts | {"verification": words})


def _named(found: xr.Dataset, places: np.ndarray[Any, Any]) -> str:
    """Edges in brackets, the first of them; nothing where there is none."""
    names = [str(found["edge"].values[at]) for at in np.sort(places)]
    return f" ({', '.join([*names[:SHOWN], *(['...'] if len(names) > SHOWN else [])])})" if names else ""
