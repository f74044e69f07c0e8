"""Conditions in order of what they do: a dot with its interval for each, whatever the axes are."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError
from ...metrics.intervals import bootstrap_interval
from ..measuring.effects import condition_names
from .parts.dots import dots, intervals, reference, row_chart, rows_of, span_of
from .parts.few import marks_few
from .parts.inputs import array_of, dataset_of
from .parts.style import BLUE, GREY, dimension, hover

TOP, LETTERS = 24, 44
"""How many are drawn; letters of a name that are written, hover shows all."""


@marks_few
def ranked_conditions(
    ds: xr.Dataset | xr.DataArray, name: str | None = None, *, top: int = TOP, title: str = ""
) -> Any:
    """Every condition with its value, the largest first, with a 95% interval over examples.

    Parameters
    ----------
    ds : Dataset or DataArray
        ``<name>(..., [example])`` with any other dims, such as ``condition``; ``<name>_low`` and ``_high`` without
        ``example`` where they are there, else the interval is bootstrapped from the examples.
    name : str, optional
        Needed for a dataset of several variables.
    top : int
        Of more conditions, so many with the values farthest from 0 are drawn.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Points`` (``value``, ``row``; name, interval), ``Segments`` for the intervals and a ``Curve`` at 0.
    """
    ds, name = dataset_of(ds, "ranked_conditions", name)
    values = array_of(ds[name], "ranked_conditions", ("condition",))
    where = [dim for dim in values.dims if dim != "example"]
    values = values.transpose(*where, ...)
    mean = values.mean("example", keep_attrs=True) if "example" in values.dims else values
    flat = np.ravel(mean.values).astype(float)
    known = np.flatnonzero(np.isfinite(flat))
    if not known.size:
        raise DeclarationError(f"ranked_conditions: {name} has no value that is not missing")
    far = known[np.argsort(-np.abs(flat[known]), kind="stable")][:top]
    order = far[np.argsort(-flat[far], kind="stable")]
    low, high, sure = _ends(ds, name, values, where, flat)
    whole = [str(one) for one in condition_names(mean).ravel()[order]]
    names = [one if len(one) <= LETTERS else one[: LETTERS - 1] + "…" for one in whole]
    rows, shown = rows_of(names), dimension("value", ds[name])
    table = {"value": flat[order], "row": rows, "name": whole, "low": low[order], "high": high[order]}
    text = "@value{0.0000} (95%: @low{0.0000} to @high{0.0000})" if sure else "@value{0.0000}"
    parts = [
        reference(0.0, "0", rows, shown, GREY, "solid"),
        intervals(low[order], rows, high[order]),
        dots(table, [shown, "row"], "conditions", (BLUE, "circle"), 9, **hover(shown, text, ("condition", "@name"))),
    ]
    if len(known) > len(order):
        title = f"{title}{': ' if title else ''}the {len(order)} of {len(known)} farthest from 0"
    letters = max(map(len, names))
    look = {"width": 380 + 7 * letters, "height": 90 + 24 * len(names), "show_legend": False}
    return row_chart(parts, shown, names, xlim=span_of([flat[order], low[order], high[order]]), title=title, **look)


def _ends(ds: xr.Dataset, name: str, values: xr.DataArray, where: list[Any], flat: Any) -> tuple[Any, Any, bool]:
    """Ends of the intervals, and whether they are known; the value itself where one is missing."""
    stored = [ds[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in ds]
    ends: Any = (flat, flat)
    sure = len(stored) == 2 and all(set(end.dims) == set(where) for end in stored)
    if sure:
        ends = [np.ravel(end.transpose(*where).values).astype(float) for end in stored]
    elif "example" in values.dims and values.sizes["example"] > 1:
        sure, ends = True, [np.ravel(end) for end in bootstrap_interval(np.asarray(values.values, dtype=float))]
    low, high = (np.where(np.isfinite(end), end, flat) for end in ends)
    return low, high, sure
