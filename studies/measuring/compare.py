"""Estimates from gradients beside what was measured exactly: how near they come, condition by condition."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, choices
from ...interventions.declare.edges import EdgePatches
from ...interventions.plan.estimators import EDGE_ESTIMATORS, EDGE_STEPS, ESTIMATORS, STEPPED
from ...metrics.card import Metric
from ...metrics.statistics import benjamini_hochberg, rank_correlation, strongest_shared, t_test
from ..tasks.tasks import Task
from .effects import condition_names, effect
from .labels import check_axes
from .measure import measure
from .request import What, check_estimable, chosen_metrics, conditions

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]

STEPS = 8
"""Steps of an estimate of interventions where none are given."""
WORST = 5
"""How many of the worst misses are kept."""
NOISE = 0.05
"""False discovery rate up to which an exact effect is beyond noise."""
ROUNDING = 1e-5
"""Effects up to this share of the metric's value without intervention (or of 1) are rounding of 32-bit numbers."""
DIMS = ("estimator", "place")
"""Dims of the result beside the axes of the conditions."""
SAME = 1e-3
"""How far the values without intervention of two measurements of the same may lie apart, relative or absolute."""


def compare_estimates(
    model: Model,
    task: Task,
    what: What,
    metric: Metric | str,
    *,
    estimators: Sequence[str] | None = None,
    steps: int | None = None,
    base: str = "clean",
    exact: xr.Dataset | None = None,
) -> xr.Dataset:
    """Estimate what interventions change from gradients, measure it exactly, and say how well the two agree.

    The estimate of an effect is the sum of ``(new - old) * d metric / d value`` over what the intervention replaces:
    **above 0 where the metric grows**, as the exact effect, ``metric(intervened) - metric(base)``. For ``loss``, above
    0 is worse; for ``logit_diff``, better.

    Parameters
    ----------
    model : Model
    task : Task
    what : Intervention, mapping of names to interventions, sequence of interventions, Grid, or EdgePatches
        Ablations, `Patch`, `Add`, `Scale`, `ProjectOut` and their compositions have estimates; edges have their own.
    metric : Metric or str
        One that changes smoothly, such as ``"loss"`` or ``"logit_diff"``.
    estimators : sequence of str, optional
        ``"gradient"``, the slope at the base run (attribution patching); ``"integrated"``, the mean slope on the way
        from old to new, where all sites of one layer and component move together: it shares what they do jointly among
        them, so it depends on what else is in `what`, and is no estimate of each alone where they stand in for each
        other. Both when left out. Of edges, those of `edge_scores`: ``"eap"`` and ``"eap-ig"`` when left out.
    steps : int, optional
        Of estimates that take some; when left out 8, and of edges 5, as in MIB.
    base : str
        The run that is intervened on.
    exact : Dataset, optional
        An exact measurement of the same conditions by `measure`, where there is one already.

    Returns
    -------
    Dataset
        In the metric's units, means over examples:

        - ``exact(axes...)`` and ``estimate(estimator, axes...)``, with the axes of `what`;
        - ``baseline``, the metric without intervention;
        - ``largest_miss(estimator)``, the largest ``|estimate - exact|``;
        - ``worst(estimator, place)`` and ``worst_miss(estimator, place)``: which conditions are missed most, and
          ``estimate - exact`` there.

        And pure numbers:

        - ``exact_q(axes...)``: q that an exact effect is 0, by a t-test over examples and Benjamini-Hochberg over
          conditions; 1 where it is no larger than rounding;
        - ``rank_correlation(estimator)``: Spearman, over all conditions, what is no larger than rounding taken for 0;
        - ``sign_agreement(estimator)``: of the conditions with ``exact_q`` of at most 0.05, the share whose estimate
          has the sign of the exact effect; NaN where there are none;
        - ``strongest_found(estimator)``: of the 5 strongest exact effects beyond rounding (or half of the conditions,
          where that is fewer), the share that is among as many strongest estimates, whatever their signs.

    Raises
    ------
    DeclarationError
        No such estimator, nothing to compare, a metric or an intervention that has no estimate, or an `exact` that was
        measured on something else.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> values = hw.Grid(lambda head: hw.Patch(hw.Head(1, head)), head=model.heads)
    >>> ds = hw.compare_estimates(model, task, values, hw.metrics.logit_diff, estimators=["gradient"])
    >>> ds["estimate"].dims, bool(ds["rank_correlation"].item() > 0.9)
    (('estimator', 'head'), True)

    Of edges, which one an estimator misses most:

    >>> ds = hw.compare_estimates(model, task, hw.EdgePatches(), "logit_diff", estimators=["eap"])
    >>> ds["worst"].sel(place=1).item()
    'input->a0.h3<v>'

    References
    ----------
    Nanda 2023, Attribution patching: activation patching at industrial scale. Syed et al. 2023, Attribution patching
    outperforms automated circuit discovery, arXiv:2310.10348. Kramár et al. 2024, AtP*, arXiv:2403.00745: saturated
    attention as a cause of misses. Marks et al. 2024, Sparse feature circuits, arXiv:2403.19647, and Hanna et al. 2024,
    Have faith in faithfulness, arXiv:2403.17806: integrated gradients, with all sites of a layer moved together in the
    former.
    """
    (metric,) = chosen_metrics([metric])
    of_edges = isinstance(what, EdgePatches)
    if steps is None:
        steps = EDGE_STEPS if of_edges else STEPS
    names = _names(estimators, metric, steps, of_edges)
    axes, interventions = conditions(what, model)
    if not interventions:
        raise DeclarationError(
            "nothing to compare: give an intervention, a list of them, a mapping of names to them, or a Grid"
        )
    check_axes(axes, DIMS)
    measured = {name: measure(model, task, what, metric, base=base, estimator=name, steps=steps) for name in names}
    like = next(iter(measured.values()))
    judge = measure(model, task, what, metric, base=base) if exact is None else same(exact, like, metric.name)
    return compared(measured, judge, metric, steps)


def compared(estimates: Mapping[str, xr.Dataset], exact: xr.Dataset, metric: Metric, steps: int) -> xr.Dataset:
    """What `compare_estimates` says of measurements that are there.

    Parameters
    ----------
    estimates : mapping of estimator to Dataset
        From `measure`; one at least.
    exact : Dataset
        The exact measurement of the same conditions and prompts.
    metric : Metric
    steps : int
        Of the integrated estimate.

    Returns
    -------
    Dataset
        See `compare_estimates`.
    """
    like = next(iter(estimates.values()))
    changes = {name: effect(ds, metric.name) for name, ds in estimates.items()}
    baseline = exact[f"baseline_{metric.name}"].sel(run=like.attrs["base"], drop=True)
    result = agreement(effect(exact, metric.name), changes, baseline)
    not_shared = ("estimator", "seconds", "float32_deviation")
    result.attrs = {name: value for name, value in like.attrs.items() if name not in not_shared}
    result.attrs["estimators"] = json.dumps(list(estimates))
    return result.assign_attrs(steps=steps) if {*STEPPED} & {*estimates} else result


SOURCES = {
    "references": "Nanda 2023; Syed et al. 2023, arXiv:2310.10348; Kramár et al. 2024, arXiv:2403.00745; "
    "Marks et al. 2024, arXiv:2403.19647; Hanna et al. 2024, arXiv:2403.17806"
}
"""Where the estimates come from; the docstring of `compare_estimates` says which is which."""


def agreement(exact: xr.DataArray, estimates: Mapping[str, xr.DataArray], baseline: xr.DataArray) -> xr.Dataset:
    """How effects agree with estimates of them; the arithmetic of `compare_estimates`.

    Parameters
    ----------
    exact : DataArray (axes..., example)
        Effects, with ``long_name`` and ``units``.
    estimates : mapping of estimator to DataArray (axes..., example)
    baseline : DataArray (example)
        The metric without intervention.

    Returns
    -------
    Dataset
        As of `compare_estimates`, without its attributes.
    """
    exact = exact.transpose(..., "example")
    axes = [str(dim) for dim in exact.dims[:-1]]
    change = exact.values.astype(np.float64)
    mean = change.mean(axis=-1)
    found = np.stack([one.transpose(*exact.dims).values.astype(np.float64).mean(axis=-1) for one in estimates.values()])
    kept, kept_estimates = _without_rounding(mean, baseline), _without_rounding(found, baseline)
    q = benjamini_hochberg(np.where(kept == 0, 1.0, t_test(change)))
    clear = q <= NOISE
    same_sign = np.sign(kept_estimates) == np.sign(mean)
    most = min(WORST, max(1, mean.size // 2), max(1, np.count_nonzero(kept)))

    miss = (found - mean).reshape(len(estimates), -1)
    places = np.argsort(-np.abs(miss), axis=1, kind="stable")[:, :WORST]
    worst_miss = np.take_along_axis(miss, places, axis=1)
    coords = {axis: exact[axis].values for axis in axes if axis in exact.coords}
    names = condition_names(xr.DataArray(mean, dims=axes, coords=coords)).ravel()

    number, units = {"units": "1"}, {"units": str(exact.attrs.get("units", "1"))}
    card = {name: value for name, value in exact.attrs.items() if name in ("metric", "references")} | units
    change_in = str(exact.attrs.get("long_name", "effect"))
    return xr.Dataset(
        {
            "exact": (axes, mean, {"long_name": f"{change_in}, exact", **card}),
            "estimate": (("estimator", *axes), found, {"long_name": f"{change_in}, estimated", **card, **SOURCES}),
            "baseline": baseline.mean("example", keep_attrs=True).astype(np.float64),
            "exact_q": (axes, q, {"long_name": "q that the exact effect is 0", **number}),
            "rank_correlation": (
                "estimator",
                [rank_correlation(one, kept) for one in kept_estimates],
                {"long_name": "Spearman's rank correlation of estimate and exact effect", **number},
            ),
            "sign_agreement": (
                "estimator",
                [float(one[clear].mean()) if clear.any() else np.nan for one in same_sign],
                {"long_name": "share of the effects beyond noise whose estimate has their sign", **number},
            ),
            "strongest_found": (
                "estimator",
                [strongest_shared(kept, one, most) for one in kept_estimates],
                {"long_name": "share of the strongest effects among as many strongest estimates", "strongest": most}
                | number,
            ),
            "largest_miss": (
                "estimator",
                np.abs(worst_miss[:, 0]),
                {"long_name": "largest distance of an estimate from the exact effect", **units},
            ),
            "worst": (("estimator", "place"), names[places], {"long_name": "conditions that are missed most"}),
            "worst_miss": (("estimator", "place"), worst_miss, {"long_name": "estimate minus exact effect", **units}),
        },
        coords=coords
        | {"estimator": np.asarray(list(estimates), dtype=object), "place": 1 + np.arange(places.shape[1])},
    )


def _without_rounding(values: Array, baseline: xr.DataArray) -> Array:
    """Values, with 0 for those that are no more than rounding.

    It can be alike for all prompts, which a t-test takes for an effect, and its order means nothing.
    """
    real: Array = np.where(np.abs(values) <= ROUNDING * max(abs(float(baseline.mean())), 1.0), 0.0, values)
    return real


def _names(estimators: Sequence[str] | None, metric: Metric, steps: int, of_edges: bool) -> list[str]:
    """The estimators as a list, refused where there is none to compare with the exact one.

    Parameters
    ----------
    estimators : sequence of str, optional
        Those that were asked for.
    metric : Metric
    steps : int
    of_edges : bool
        Whether edges are estimated, which have estimators of their own.

    Returns
    -------
    list of str
    """
    if estimators is None:
        estimators = ("eap", "eap-ig") if of_edges else ("gradient", "integrated")
    names = [estimators] if isinstance(estimators, str) else list(estimators)
    for name in names:
        check_estimable([metric], name, steps, False, EdgePatches() if of_edges else None)
    if not names or "exact" in names or len(set(names)) < len(names):
        possible = choices(name for name in (EDGE_ESTIMATORS if of_edges else ESTIMATORS) if name != "exact")
        raise DeclarationError(f"estimators={estimators!r}: name each once, possible are {possible}")
    return names


def same(exact: xr.Dataset, like: xr.Dataset, name: str) -> xr.Dataset:
    """`exact` in the form of `like`; an error where it was measured on something else."""
    values, base = effect(exact, name), like.attrs["base"]
    wanted = like[name]
    if set(values.dims) != set(wanted.dims) or any(not np.array_equal(values[dim], wanted[dim]) for dim in wanted.dims):
        raise DeclarationError(
            f"exact holds {_shape(exact[name])}: not the conditions and prompts to compare, {_shape(wanted)}"
        )
    one, other = (ds[f"baseline_{name}"].sel(run=base).values for ds in (exact, like))
    if exact.attrs["base"] != base or not np.allclose(one, other, rtol=SAME, atol=SAME):
        raise DeclarationError("exact was measured on other prompts, another run or another model: measure it again")
    return like.assign({name: wanted.copy(data=exact[name].transpose(*wanted.dims).values)})


def _shape(values: xr.DataArray) -> str:
    return ", ".join(f"{size} {dim}" for dim, size in values.sizes.items())
