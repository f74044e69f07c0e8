"""Of a formation study: the curves that tell when a part of the circuit appears, and their change points."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from ...metrics.changepoints import change_interval, change_point
from ...metrics.intervals import bootstrap_interval

Array = np.ndarray[Any, Any]
FITS = 0.8
"""Share of its variance that a fit explains at least, where something appears."""
ENDS = 3
"""Steps at each end of which the mean is taken."""


class Curve(NamedTuple):
    """What a change point is taken of.

    Attributes
    ----------
    words, unit : str
    rising : bool
        Whether it rises where the circuit forms, else it falls.
    least : float
        The change from the first to the last steps from which on something has appeared.
    """

    words: str
    unit: str
    rising: bool
    least: float


CURVES = {
    "previous_token": Curve("previous-token score of the best head of layer 0", "1", True, 0.2),
    "further_back": Curve("attention of the best head of layer 0 to a token 2 to 4 back", "1", True, 0.2),
    "duplicate_token": Curve("duplicate-token score of the best head of layer 0", "1", True, 0.2),
    "k_of_previous": Curve("K-composition of the previous-token head with the induction head", "1", True, 0.1),
    "q_of_previous": Curve("Q-composition of the previous-token head with the induction head", "1", True, 0.1),
    "v_of_previous": Curve("V-composition of the previous-token head with the induction head", "1", True, 0.1),
    "k_of_further": Curve("K-composition of the head that looks 2 to 4 back with the induction head", "1", True, 0.1),
    "q_of_duplicate": Curve("Q-composition of the duplicate-token head with the induction head", "1", True, 0.1),
    "behind": Curve("attention of the best head behind the earlier copy", "1", True, 0.2),
    "induction": Curve("induction score of the best head", "1", True, 0.2),
    "prefix_matching": Curve("prefix-matching score of the best head", "1", True, 0.2),
    "repeat_accuracy": Curve("accuracy on repeated random tokens", "1", True, 0.2),
    "repeat_loss": Curve("loss on repeated random tokens", "nat", False, 0.5),
    "in_context": Curve("in-context-learning score where a part repeats", "nat", False, 0.2),
    "in_context_new": Curve("in-context-learning score where nothing repeats", "nat", False, 0.2),
}
"""What may be part of induction. The head that does it may look at the token behind the earlier copy (the induction
score), or further behind, where other heads have put what that token is: ``behind`` takes the distance, 1 to 4, at
which a head attends most. It finds the place by keys (a head that looks back writes which token stands before), or by
queries, with learned position embeddings: a duplicate-token head writes where the query's token stood before (pointer
arithmetic). The last curve is a control."""
SENDERS = ("previous_token", "further_back", "duplicate_token")
"""Heads of layer 0 that may be part of it."""
COMPOSED = {
    "k_of_previous": ("k", "previous_token"),
    "q_of_previous": ("q", "previous_token"),
    "v_of_previous": ("v", "previous_token"),
    "k_of_further": ("k", "further_back"),
    "q_of_duplicate": ("q", "duplicate_token"),
}
"""Kind of composition, and which head of layer 0."""
REFERENCE = "behind"
"""The curve that tells when induction appears, with which others are compared."""


def curves_of(measured: xr.Dataset, study: Any) -> xr.Dataset:
    """The curves of `CURVES`, for each prompt.

    Parameters
    ----------
    measured : Dataset
        What `Look` gives, with dims ``training``, ``seed`` and ``step`` in front.
    study : FormationStudy

    Returns
    -------
    Dataset
        ``<curve>(training, seed, step[, example])``; ``best_<score>(training, seed)``, the head with the largest mean
        score over the last steps, whose curve it is, and where that has distances, ``distance_<score>``.
    """
    found: dict[str, xr.DataArray] = {}
    best: dict[str, xr.DataArray] = {}
    at: dict[str, xr.DataArray] = {}
    kinds = {name: measured[name] for name in ("previous_token", "duplicate_token", "prefix_matching", "induction")}
    kinds |= {"further_back": measured["back"].sel(distance=slice(2, None)), "behind": measured["behind"]}
    for name, each in kinds.items():
        each = each.sel(layer=[0]) if name in SENDERS else each
        each = each if "distance" in each.dims else each.expand_dims(distance=[1])
        flat = each.stack(one=("layer", "head", "distance"))
        at[name] = _late(flat).argmax("one")
        found[name] = flat.isel(one=at[name])
        one = flat["one"].isel(one=at[name])
        labels = [f"L{layer}H{head}" for layer, head, _ in np.ravel(one.values)]
        best[f"best_{name}"] = one.copy(data=np.reshape(np.asarray(labels, dtype=object), one.shape))
        if "distance" in kinds[name].dims:
            best[f"distance_{name}"] = one.copy(
                data=np.reshape([int(d) for _, _, d in np.ravel(one.values)], one.shape)
            )
    if "composition" in measured:
        inside = measured["behind"].isel(layer=min(1, measured.sizes["layer"] - 1), drop=True)
        receiver = _late(inside).max("distance").argmax("head")
        heads = {name: best[f"best_{name}"].copy(data=_numbers(best[f"best_{name}"])) for name in SENDERS}
        for name, (kind, sender) in COMPOSED.items():
            table = measured["composition"].sel(kind=kind, drop=True)
            found[name] = table.isel(sender_head=heads[sender], receiver_head=receiver)
    repeated = {"position": slice(study.length, 2 * study.length - 1)}
    found["repeat_accuracy"] = measured["accuracy"].isel(repeated).mean("position")
    found["repeat_loss"] = measured["loss"].isel(repeated).mean("position")
    held_out = measured["held_out_loss"]
    early = held_out.isel(context_position=slice(0, study.period[0] - 1)).mean("context_position")
    late = held_out.isel(context_position=slice(-(study.context // 4) - 1, -1)).mean("context_position")
    for name, part in (("in_context", "repeats"), ("in_context_new", "new")):
        found[name] = (late - early).sel(part=part, drop=True)
    made = {name: found[name].reset_coords(drop=True) for name in CURVES if name in found}
    for name, values in made.items():
        values.attrs = {"long_name": CURVES[name].words, "units": CURVES[name].unit}
    named = {name: one.reset_coords(drop=True) for name, one in best.items()}
    return xr.Dataset(made | named)


def _late(values: xr.DataArray) -> xr.DataArray:
    """The mean over the last steps and prompts; -1 where there is no such head."""
    return values.isel(step=slice(-ENDS, None)).mean(["step", "example"]).fillna(-1.0)


def _numbers(labels: xr.DataArray) -> Array:
    """Numbers of heads that labels such as ``L0H1`` name."""
    return np.reshape([int(label.partition("H")[2]) for label in np.ravel(labels.values)], labels.shape)


def changes_of(curves: xr.Dataset) -> xr.Dataset:
    """The change point of each curve in each training, and of all seeds together.

    The change point is that of `metrics.changepoints.change_point`, of the mean over prompts. Something has appeared
    where the mean of the last `ENDS` steps lies beyond that of the first by the curve's ``least``, in its direction,
    and the fit explains `FITS` of the variance; elsewhere there is no change point. Intervals of a training are
    bootstrapped over prompts. Those over seeds are of the mean of the logarithms (`metrics.intervals`; for two or
    three seeds Student's t), and so of the geometric mean of the steps.

    Parameters
    ----------
    curves : Dataset
        See `curves_of`.

    Returns
    -------
    Dataset
        ``change_step``, ``change_low``, ``change_high`` ``(training, seed, curve)``, ``first`` and ``last`` (means of
        the first and last steps), ``begin_step`` and ``end_step`` (10% and 90% of the change); ``mean_step``,
        ``mean_low``, ``mean_high`` and ``appeared`` ``(training, curve)``, the last a number of seeds; ``ratio``,
        ``ratio_low`` and ``ratio_high``: the change point over that of `REFERENCE` in the same training;
        ``share_of_change``: how much of a curve's change falls between begin and end of that of induction.
    """
    names = [name for name in CURVES if name in curves]
    seeds, trainings = curves.sizes["seed"], curves.sizes["training"]
    steps = curves["step"].values.astype(float)
    shape = (trainings, seeds, len(names))
    keys = ("change_step", "change_low", "change_high", "begin_step", "end_step", "first", "last", "share_of_change")
    found = {key: np.full(shape, np.nan) for key in keys}
    means = np.full((*shape, len(steps)), np.nan)
    for training, seed, at in np.ndindex(shape):
        curve, values = CURVES[names[at]], curves[names[at]].isel(training=training, seed=seed)
        each = values.transpose("step", ...).values.astype(float).reshape(len(steps), -1)
        means[training, seed, at] = mean = each.mean(axis=1)
        here = training, seed, at
        found["first"][here], found["last"][here] = mean[:ENDS].mean(), mean[-ENDS:].mean()
        fit = change_point(steps, mean, curve.rising)
        moved = (found["last"][here] - found["first"][here]) * (1 if curve.rising else -1)
        if not (moved >= curve.least and fit.explained >= FITS):
            continue
        found["change_step"][here] = fit.step
        found["begin_step"][here], found["end_step"][here] = fit.span()
        found["change_low"][here], found["change_high"][here] = change_interval(steps, each, curve.rising)
    reference = names.index(REFERENCE)
    begin, end = (found[name][:, :, reference] for name in ("begin_step", "end_step"))
    for training, seed, at in np.ndindex(shape):
        found["share_of_change"][training, seed, at] = _share(
            steps, means[training, seed, at], float(begin[training, seed]), float(end[training, seed])
        )
    logs = np.log(found["change_step"])
    apart = logs - logs[:, :, [reference]]
    whole = {
        "appeared": np.isfinite(logs).sum(axis=1).astype(float),
        **_over_seeds("mean_step", "mean", logs),
        **_over_seeds("ratio", "ratio", apart),
    }
    words = {
        "change_step": "change point, a step of training",
        "change_low": "low end of its 95% interval over prompts",
        "change_high": "high end of its 95% interval over prompts",
        "begin_step": "step at which 10% of the change is done",
        "end_step": "step at which 90% of the change is done",
        "first": "mean over the first steps that were measured",
        "last": "mean over the last steps that were measured",
        "share_of_change": "share of the change from the first to the last step while induction goes from 10% to 90%",
        "appeared": "seeds with a change point",
        "mean_step": "change point, geometric mean over seeds",
        "mean_low": "low end of its 95% interval over seeds",
        "mean_high": "high end of its 95% interval over seeds",
        "ratio": "change point over that of induction, geometric mean over seeds",
        "ratio_low": "low end of its 95% interval over seeds",
        "ratio_high": "high end of its 95% interval over seeds",
    }
    dims = ("training", "seed", "curve")
    made: dict[str, Any] = {name: (dims, one, {"long_name": words[name], "units": "1"}) for name, one in found.items()}
    made |= {name: (dims[::2], one, {"long_name": words[name], "units": "1"}) for name, one in whole.items()}
    coords = {"training": curves["training"], "seed": curves["seed"], "curve": np.asarray(names, dtype=object)}
    return xr.Dataset(made, coords)


def _share(steps: Array, mean: Array, begin: float, end: float) -> float:
    """How much of a curve's change from the first to the last step falls between two steps."""
    whole = mean[-1] - mean[0]
    if not np.isfinite([whole, begin, end]).all() or whole == 0:
        return float("nan")
    place = np.log(np.maximum(steps, 0.5))
    first, last = np.interp(np.log([begin, end]), place, mean)
    return float((last - first) / whole)


def _over_seeds(name: str, start: str, logs: Array) -> dict[str, Array]:
    """Geometric mean over the seeds that have a value, with its interval where there are two or more."""
    shape = (logs.shape[0], logs.shape[2])
    mean, low, high = (np.full(shape, np.nan) for _ in range(3))
    for training, at in np.ndindex(shape):
        known = logs[training, :, at][np.isfinite(logs[training, :, at])]
        if known.size:
            mean[training, at] = np.exp(known.mean())
            low[training, at], high[training, at] = np.exp(bootstrap_interval(known))
    return {name: mean, f"{start}_low": low, f"{start}_high": high}
