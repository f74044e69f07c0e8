"""A variable of a result as a table: a row for each cell, with its labels, its effect and what is stored beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..measuring.effects import effect, intervened
from ..storage.netcdf import check_room
from ..storage.reading import Result, pick
from .conditions import ask

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = ("effect_low", "effect_high", "effect_q", "effect_p", "low", "high", "q", "p", "z", "sd", "normalized")
"""``loss_effect_low`` is the column ``effect_low`` in the table of ``loss``."""
PREFIXES = ("chance", "q", "p")
"""``q_induction`` is the column ``q`` in the table of ``induction``."""
ROW = 200
"""Bytes of a row of a table."""


def table(
    result: Result,
    variable: str,
    *,
    where: str | None = None,
    sort: str | Sequence[str] | None = None,
    top: int | None = None,
) -> pd.DataFrame:
    """A variable as a table: one row for each cell, the mean over ``example``.

    Parameters
    ----------
    result : Dataset or DataTree
    variable : str
        ``loss`` of a Dataset, ``ablation/loss`` of a DataTree.
    where : str, optional
        A condition on the columns, such as ``"effect > 0.5 and layer >= 4"``, ``"head in (1, 2)"`` or
        ``"not (ablation == 'zero')"``. A missing value meets no comparison but ``!=``.
    sort : str or sequence of str, optional
        Columns, the first one first; ``"-effect"`` sorts from large to small. Missing values come last.
    top : int, optional
        How many rows to keep.

    Returns
    -------
    DataFrame
        Columns: ``name`` (``L5H1``, ``L5N17``) where ``layer`` and ``head`` or ``neuron`` are dims; each dim;
        ``value``, in the unit of the variable; ``effect``, the change from the run without intervention, where that was
        measured; intervals and q-values that are stored beside it (``effect_low``, ``effect_high``, ``effect_q``,
        ``chance``, ...); text of the same dims, such as ``role``. ``.attrs`` holds ``variable``, ``units`` and
        ``long_name``, and ``comment`` where intervals are over few examples.

    Raises
    ------
    UnknownNameError
        The result has no such variable, or the table no such column; the text lists those it has.
    DeclarationError
        The condition cannot be read, or `top` is no whole number.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> heads = hw.Grid(lambda layer, head: hw.ZeroAblate(hw.Head(layer, head)), layer=model.layers, head=model.heads)
    >>> ds = hw.measure(model, task, heads)
    >>> hw.table(ds, "loss", where="effect > 2", sort="-effect")[["name", "effect"]].round(1)
       name  effect
    0  L0H3     6.8
    1  L1H0     2.8
    2  L1H1     2.0
    """
    return ask(rows_of(*pick(result, variable)), where=where, sort=sort, top=top)


def rows_of(ds: xr.Dataset, name: str) -> pd.DataFrame:
    """Every cell of ``ds[name]`` as a row; see `table`."""
    import pandas as pd

    rows = math.prod(size for dim, size in ds[name].sizes.items() if dim != "example")
    check_room(rows * ROW, f"the table of {name}, with {rows} rows,")
    values = mean_of(ds[name])
    dims = [str(dim) for dim in values.dims]
    columns: dict[str, Any] = {}

    def spread(array: xr.DataArray) -> Any:
        """Values of an array over some of the dims, as a column."""
        missing = {dim: values.sizes[dim] for dim in dims if dim not in array.dims}
        return array.expand_dims(missing).transpose(*dims).values.ravel()

    def put(column: str, array: xr.DataArray) -> None:
        column = f"{name}_{column}" if column in dims else column
        if column not in columns:
            columns[column] = spread(array)

    axes = {dim: xr.DataArray(_labels(ds, dim), dims=dim) for dim in dims}
    for column, layer, part in _heads(dims):
        if column not in dims:
            columns[column] = [
                f"L{one}{'N' if part == 'neuron' else 'H'}{two}"
                for one, two in zip(spread(axes[layer]), spread(axes[part]), strict=True)
            ]
    columns |= {dim: spread(axis) for dim, axis in axes.items()}
    put("value", values)
    if has_effect(ds, name):
        put("effect", mean_of(effect(ds, name)))
    beside = _beside(ds, name, dims)
    for column, array in beside.items():
        put(column, array)
    frame = pd.DataFrame({column: _plain(data) for column, data in columns.items()})
    frame.attrs = {"variable": name} | {
        key: str(ds[name].attrs[key]) for key in ("units", "long_name") if key in ds[name].attrs
    }
    comments = dict.fromkeys(str(one.attrs["comment"]) for one in beside.values() if "comment" in one.attrs)
    frame.attrs |= {"comment": "; ".join(comments)} if comments else {}
    return frame


def has_base(ds: xr.Dataset, name: str) -> bool:
    """Whether a metric was measured without intervention, on the run that the attribute ``base`` names too."""
    before = ds.get(f"baseline_{name}")
    if before is None or before.dtype.kind not in "iuf" or "run" not in before.coords or before["run"].dims != ("run",):
        return False
    base = ds.attrs.get("base")
    return isinstance(base, str | int | float) and before["run"].values.tolist().count(base) == 1


def has_effect(ds: xr.Dataset, name: str) -> bool:
    """Whether ``ds[name]`` can be compared with what was measured without intervention."""
    if name not in ds or not intervened(ds) or not has_base(ds, name):
        return False
    values, before = ds[name], ds[f"baseline_{name}"]
    return values.dtype.kind in "iuf" and {*before.dims} - {"run"} <= {*values.dims}


def mean_of(array: xr.DataArray) -> xr.DataArray:
    """The mean over ``example`` of numbers, as they are where there is no such dim; missing values are left out."""
    if "example" in array.dims and array.dtype.kind in "biuf":
        return array.mean("example")
    return array


def _beside(ds: xr.Dataset, name: str, dims: list[str]) -> dict[str, xr.DataArray]:
    """What is stored beside a variable about the same cells: intervals, q, chance; and text."""
    own = {f"{name}_{suffix}": suffix for suffix in SUFFIXES} | {f"{prefix}_{name}": prefix for prefix in PREFIXES}
    found = {}
    for other, column in own.items():
        if other in ds and column not in ds.coords:
            array = mean_of(ds[other])
            if set(array.dims) <= set(dims):
                found[column] = array
    for label, stored in ds.variables.items():
        text = stored.dtype.kind in "OUT" and bool(stored.dims)
        if text and label not in ds.indexes and label != name and set(stored.dims) <= set(dims):
            found.setdefault(str(label), ds[label])
    return found


def _heads(dims: list[str]) -> list[tuple[str, str, str]]:
    """Pairs of dims that name a head or a neuron: the column, and the dims of its layer and its number."""
    whole = [("name", "layer", part) for part in ("head", "neuron") if {"layer", part} <= set(dims)][:1]
    kinds = [dim.removesuffix("_layer") for dim in dims if dim.endswith("_layer")]
    return whole + [(kind, f"{kind}_layer", f"{kind}_head") for kind in kinds if f"{kind}_head" in dims]


def _labels(ds: xr.Dataset, dim: str) -> Any:
    return ds[dim].values if dim in ds.coords else np.arange(ds.sizes[dim])


def _plain(data: Any) -> Any:
    """Text as objects, so that a column of text is one whatever xarray read it as."""
    array = np.asarray(data)
    return array.astype(object) if array.dtype.kind in "UT" else array
