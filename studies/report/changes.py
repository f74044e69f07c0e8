"""What a measurement says, as numbers: every condition's mean change, its interval, and whether it is beyond noise.

Reads a dataset from `measure`, or one that somebody built like it; measures nothing, draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from ...metrics.intervals import bootstrap_interval
from ...metrics.statistics import benjamini_hochberg, t_test
from ..catalogue.table import has_base, has_effect
from ..measuring.effects import condition_names, effect, intervened, normalized
from ..storage.registry import bounds_of

Array = np.ndarray[Any, Any]
NOISE = 0.05
"""False discovery rate up to which a change counts as beyond noise."""
ROUNDING = 1e-5
"""Changes up to this share of the metric's value without intervention (or of 1) are rounding of 32-bit numbers."""
READ = ("read_layer", "read_head")


@dataclass(frozen=True, eq=False)
class Values:
    """Means over examples, each with a name and a 95% bootstrap interval.

    Attributes
    ----------
    name, unit, label : str
        Of the metric; the label is in words.
    names : list of str
        Conditions, runs or heads.
    mean, low, high : array (name,)
        The ends are NaN where there are fewer than two examples.
    examples : int
        Examples with a value.
    """

    name: str
    unit: str
    label: str
    names: list[str]
    mean: Array
    low: Array
    high: Array
    examples: int

    def order(self) -> list[int]:
        """Places from the largest absolute value on; what is missing last."""
        return [int(at) for at in np.argsort(-np.nan_to_num(np.abs(self.mean), nan=-1.0), kind="stable")]


@dataclass(frozen=True, eq=False)
class Changes(Values):
    """Mean changes from the run without intervention, see `Values`.

    Attributes
    ----------
    after : array (name,)
        The metric itself, under the intervention.
    q : array (name,)
        By a t-test over examples and Benjamini-Hochberg over all conditions; 1 where a change is no more than rounding.
    share : array (name,) or None
        The change as a share of clean minus corrupted: 0 is the corrupted run, 1 the clean one.
    axes : dict of str to list
        Labels along each dim of the conditions, those of the head that was looked at last; their product are the names.
    """

    after: Array
    q: Array
    share: Array | None
    axes: dict[str, list[Any]]

    def at(self, place: int) -> dict[str, Any]:
        """Labels of a condition, by dim."""
        sizes = [len(labels) for labels in self.axes.values()]
        places = np.unravel_index(place, sizes) if sizes else ()
        return {dim: labels[one] for (dim, labels), one in zip(self.axes.items(), places, strict=True)}

    @property
    def excludes(self) -> Array:
        """Where the interval lies on one side of 0, and the change is more than rounding."""
        kept: Array = ((self.low > 0) | (self.high < 0)) & ~self.rounding
        return kept

    @property
    def sure(self) -> Array:
        """Where it does so and the correction for several tests leaves it."""
        kept: Array = self.excludes & (self.q <= NOISE)
        return kept

    @property
    def least_p(self) -> float:
        """The smallest p that the test can give with so few examples."""
        return float(2.0 ** (1 - self.examples))

    @property
    def rounding(self) -> Array:
        """Where the change is no larger than the rounding of 32-bit numbers."""
        small: Array = np.abs(self.mean) <= ROUNDING * np.maximum(1.0, np.abs(self.after - self.mean))
        return small


def metrics_in(ds: xr.Dataset) -> list[str]:
    """The metrics of a measurement, by their baselines; none where the dataset is no measurement."""
    found = [str(name).removeprefix("baseline_") for name in ds.data_vars if str(name).startswith("baseline_")]
    return [
        name for name in found if has_base(ds, name) and (name not in ds or not intervened(ds) or has_effect(ds, name))
    ]


def _runs(ds: xr.Dataset) -> list[str]:
    return [str(run) for run in ds["run"].values] if "run" in ds.coords else []


def baseline(ds: xr.Dataset, metric: str) -> Values:
    """The metric without intervention, for each run; of an attention metric for each head, on the base run."""
    values = ds[f"baseline_{metric}"]
    if heads := heads_in(values):
        values = values.sel(run=ds.attrs["base"], drop=True)
        table = _table(values, heads)
        names = [_head(layer, head) for layer in _labels(values, heads[0]) for head in _labels(values, heads[1])]
    else:
        table, names = _table(values, ("run",)), _runs(ds)
    low, high = _rows(table, partial(bootstrap_interval, bounds=bounds_of(values)))
    return Values(metric, *_words(values), names, _mean(table), low, high, _examples(table))


def changed(ds: xr.Dataset, metric: str) -> bool:
    """Whether a metric was measured under interventions."""
    return metric in ds and intervened(ds)


def heads_in(values: xr.DataArray) -> tuple[str, ...]:
    """The dims of the heads that a baseline was read at; none where it is not of attention."""
    return next((pair for pair in (READ, ("layer", "head")) if {*pair} <= {*values.dims}), ())


def changes(ds: xr.Dataset, metric: str) -> Changes | None:
    """What each condition changes; None where nothing was changed."""
    if not changed(ds, metric):
        return None
    change = effect(ds, metric)
    dims = [dim for dim in change.dims if dim not in _inner(ds, metric)]
    read = [dim for dim in READ if dim in change.dims]
    table = _table(change, [*dims, *read])
    names = _names(change, dims, read)
    mean, after = _mean(table), _mean(_table(ds[metric], [*dims, *read]))
    small = np.abs(mean) <= ROUNDING * np.maximum(1.0, np.abs(after - mean))
    q = benjamini_hochberg(np.where(small & ~np.isnan(mean), 1.0, _p(table)))
    label = str(ds[metric].attrs.get("long_name", metric))
    unit = str(ds[metric].attrs.get("units", "1"))
    low, high = _rows(table, bootstrap_interval)
    share = _share(ds, metric, [*dims, *read])
    axes = {str(dim): _labels(change, str(dim)) for dim in (*dims, *read)}
    return Changes(metric, unit, label, names, mean, low, high, _examples(table), after, q, share, axes)


def _inner(ds: xr.Dataset, metric: str) -> set[Any]:
    """Dims of a metric's values that are no conditions: those of its baseline, unless an axis has the name."""
    return {*ds[f"baseline_{metric}"].dims} | {"example"}


def _share(ds: xr.Dataset, metric: str, dims: Sequence[Any]) -> Array | None:
    plain = set(ds[f"baseline_{metric}"].dims) == {"run", "example"}
    if not plain or ds.attrs.get("direction") not in ("noising", "denoising"):
        return None
    if not {"clean", "corrupted"} <= {*_runs(ds)}:
        return None
    found: Array = normalized(ds, metric).transpose(*dims).values.reshape(-1)
    return None if np.isnan(found).all() else found


def _names(values: xr.DataArray, dims: Sequence[Any], read: Sequence[str]) -> list[str]:
    """Conditions in words; where a metric was read at every head, with the head."""
    bare = values.isel({dim: 0 for dim in values.dims if dim not in dims}, drop=True).transpose(*dims)
    own = [str(name) for name in condition_names(bare).ravel()]
    if not read:
        return own
    heads = [_head(layer, head) for layer in _labels(values, "read_layer") for head in _labels(values, "read_head")]
    return [f"{name}, read at {head}" for name in own for head in heads] if dims else heads


def _head(layer: Any, head: Any) -> str:
    return f"L{layer}H{head}"


def _labels(values: xr.DataArray, dim: str) -> list[Any]:
    return list(values[dim].values if dim in values.coords else range(values.sizes[dim]))


def _words(values: xr.DataArray) -> tuple[str, str]:
    label = str(values.attrs.get("long_name", values.name)).removesuffix(", no intervention")
    return str(values.attrs.get("units", "1")), label


def _table(values: xr.DataArray, dims: Sequence[Any]) -> Array:
    """Values as ``(condition, example)`` in double precision; other dims, such as positions, are averaged over."""
    wide = values.astype(np.float64)
    rest = [dim for dim in wide.dims if dim not in dims and dim != "example"]
    wide = wide.mean(rest) if rest else wide
    wide = wide if "example" in wide.dims else wide.expand_dims("example", axis=-1)
    flat: Array = wide.transpose(*dims, "example").values.reshape(-1, wide.sizes["example"])
    return flat[:, ~np.isnan(flat).all(axis=0)] if flat.size else flat  # a prompt that has no value says nothing


def _examples(table: Array) -> int:
    return int(table.shape[1])


def _mean(table: Array) -> Array:
    return _rows(table, lambda rows: (rows.mean(axis=-1),))[0]


def _p(table: Array) -> Array:
    return _rows(table, lambda rows: (t_test(rows),))[0]


def _rows(table: Array, what: Any) -> tuple[Array, ...]:
    """`what` of all rows at once; rows that lack values are taken one by one, without those."""
    if not table.shape[1]:
        return (np.full(len(table), np.nan),) * 2
    found = [np.array(one, dtype=np.float64) for one in what(table)]
    for row in np.flatnonzero(np.isnan(table).any(axis=1)):
        kept = table[row, ~np.isnan(table[row])]
        for one, value in zip(found, what(kept[None]) if kept.size else [np.nan] * len(found), strict=True):
            one[row] = np.squeeze(value)
    return tuple(found)
