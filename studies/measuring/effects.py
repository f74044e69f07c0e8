"""Effects: what interventions changed, derived from a measurement that is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from ...errors import UnknownNameError, choices


def effect(ds: xr.Dataset, name: str) -> xr.DataArray:
    """What the interventions changed: ``ds[name]`` minus the base run without intervention.

    Parameters
    ----------
    ds : Dataset
        From `measure`.
    name : str
        A metric in it, such as ``"loss"``.

    Returns
    -------
    DataArray
        The dims of ``ds[name]``; units of the metric.

    Raises
    ------
    UnknownNameError
        The dataset has no such metric; the text lists those it has.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, hw.ZeroAblate(hw.Head(0, 3)))
    >>> change = hw.effect(ds, "loss")
    >>> change.dims, change.attrs["units"], round(float(change.mean()), 1)
    (('example',), 'nat', 6.8)
    """
    values, baseline = _measured(ds, name)
    change: xr.DataArray = values - baseline.sel(run=ds.attrs["base"], drop=True)
    change = change.transpose(*values.dims).rename(f"effect_{name}")
    change.attrs = {**values.attrs, "long_name": f"change in {values.attrs.get('long_name', name)}"}
    return change


def effect_interval(ds: xr.Dataset, name: str, level: float = 0.95) -> dict[str, xr.DataArray]:
    """``<name>_effect_low`` and ``_high``: a 95% bootstrap interval over examples of the mean `effect`.

    `level` is its coverage at this look, where one looks more than once (`intervals.level_at`).

    Over fewer than 5 examples, their attribute ``comment`` says that they tell little.
    """
    from ...metrics.intervals import bootstrap_interval, interval_attrs  # here, since reading results needs no torch

    change = effect(ds, name).transpose(..., "example")
    ends = bootstrap_interval(change.values, level)
    return {
        f"{name}_effect_{end}": xr.DataArray(
            values,
            dims=change.dims[:-1],
            attrs={
                "units": change.attrs["units"],
                "long_name": f"{change.attrs['long_name']}, 95% interval, {end} end",
                **interval_attrs(change.sizes["example"]),
            },
        )
        for end, values in zip(("low", "high"), ends, strict=True)
    }


def normalized(ds: xr.Dataset, name: str) -> xr.DataArray:
    """``(x - corrupted) / (clean - corrupted)`` as a ratio of means over examples: 0 is corrupted, 1 is clean.

    Means are taken already: the result has no dim ``example``. Of a `Circuit` with ``source="mean"``, 0 is still the
    corrupted run and not the empty circuit: measure that beside it, as ``circuit - circuit``, and take it for 0.

    Parameters
    ----------
    ds : Dataset
        From `measure`, on a task with a corrupted run.
    name : str
        A metric in it, such as ``"logit_diff"``.

    Returns
    -------
    DataArray
        The dims of ``ds[name]`` without ``example``; a pure number. NaN where clean and corrupted are within noise of
        each other.

    Raises
    ------
    UnknownNameError
        The dataset has no such metric, or the task no corrupted run.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, {"prev": hw.Patch(hw.Head(0, 3))}, [hw.metrics.logit_diff])
    >>> hw.normalized(ds, "logit_diff").round(2).values
    array([0.01])
    """
    from ...metrics.statistics import normalized as ratio_of_means

    values, baseline = _measured(ds, name)
    for run in ("clean", "corrupted"):
        if run not in baseline["run"]:
            from ...interventions.plan.validate import how_to_have

            raise UnknownNameError(
                f"normalized needs the run {run!r}: this task has {choices(baseline['run'].values)}{how_to_have(run)}"
            )
    ratio: xr.DataArray = xr.apply_ufunc(
        ratio_of_means,
        values,
        baseline.sel(run="clean", drop=True),
        baseline.sel(run="corrupted", drop=True),
        input_core_dims=[["example"]] * 3,
    )
    ratio = ratio.rename(f"normalized_{name}")
    ratio.attrs = {"long_name": f"normalized {values.attrs.get('long_name', name)}", "units": "1"}
    return ratio


def _measured(ds: xr.Dataset, name: str) -> tuple[xr.DataArray, xr.DataArray]:
    if name in ds and not intervened(ds):
        raise UnknownNameError(
            f"nothing was intervened on here: ds[{name!r}] is the {name} of the {ds.attrs.get('base')} run as it is; "
            "give measure an intervention, such as ZeroAblate(Head(0, 0))"
        )
    if name not in ds or f"baseline_{name}" not in ds:
        measured = [str(other) for other in ds.data_vars if f"baseline_{other}" in ds]
        raise UnknownNameError(
            f"no intervention was measured by {name!r}: this dataset has {choices(measured) or 'none'}"
        )
    return ds[name], ds[f"baseline_{name}"]


def intervened(ds: xr.Dataset) -> bool:
    """Whether the metrics of a measurement are those under interventions, not of the base run as it is."""
    return bool(ds.attrs.get("interventions") != "null")


def condition_names(values: xr.DataArray) -> np.ndarray[Any, Any]:
    """A short name for each condition of an array, in its shape: ``L1H2 k``, ``L0N17``, ``layer 1 position 5``.

    Axes without a coordinate count from 0; an array without dims holds ``the intervention``.
    """
    names = np.full(values.shape, "the intervention", dtype=object)
    part = next((one for one in ("head", "neuron") if {"layer", one} <= set(values.dims)), "")
    for at in np.ndindex(values.shape):
        here = {str(dim): _at(values, str(dim), place) for dim, place in zip(values.dims, at, strict=True)}
        words = [f"L{here.pop('layer')}{part[0].upper()}{here.pop(part)}"] if part else []
        words += [str(value) if isinstance(value, str) else f"{dim} {value}" for dim, value in here.items()]
        names[at] = " ".join(words) or names[at]
    return names


def _at(values: xr.DataArray, dim: str, place: int) -> Any:
    return values[dim].values[place] if dim in values.coords else place
