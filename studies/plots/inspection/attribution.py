"""What each part of a model writes towards the answer: heads as a grid, the other parts as bars beside it."""

from __future__ import annotations

import textwrap
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ....errors import DeclarationError
from ..curves import interval_along
from ..heads import head_grid
from ..parts.dots import intervals, reference, row_chart, rows_of, span_of
from ..parts.few import marks_few
from ..parts.inputs import need, need_dims, possible, where_read
from ..parts.style import BLUE, GREY, ORANGE, dimension, hover, styled

MOST = 26
"""Bars; of more parts those that are farthest from 0."""


def attributed(ds: Any, variable: str) -> bool:
    """Whether a variable holds the shares of a model's heads and other parts."""
    names = ["kind", *(f"read_{name}" if f"read_{name}" in ds.coords else name for name in ("layer", "head"))]
    known = {*names} <= {*map(str, ds.coords)} and "source" in ds[variable].dims
    return known and all(ds[name].dims == ("source",) for name in names)


@marks_few
def attribution(ds: xr.Dataset, *, title: str = "") -> Any:
    """The share of every head as a grid; beside it bars of the embeddings, the MLPs and the biases.

    Parameters
    ----------
    ds : Dataset
        The result of `headwise.direct_logit_attribution`: ``attribution(source[, example])``, with the coordinates
        ``kind``, ``layer`` and ``head`` of the sources. Averaged over examples.
    title : str

    Returns
    -------
    holoviews.Layout
        A `head_grid`, and an ``Overlay`` of ``Rectangles`` (``source``, ``value``, ``low``, ``high``), of ``Segments``
        for 95% intervals over examples and of a line at 0. The last part is at the top.

    Raises
    ------
    UnknownNameError
        There is no ``attribution``.
    DeclarationError
        Other dims are there, such as ``position``: select first, or take the mean.
    """
    ds = need(ds, "attribution", "attribution")
    need_dims(ds, "attribution", {"attribution": ["source"]})
    if extra := [str(dim) for dim in ds["attribution"].dims if dim not in ("source", "example")]:
        raise DeclarationError(f"attribution draws (source): select {extra[0]}, {possible(ds, extra[0])}")
    if not attributed(ds, "attribution"):
        raise DeclarationError("attribution: sources need the coordinates kind, layer and head")
    ds = where_read(ds)
    mean, low, high, known = interval_along(ds, "attribution", "source")
    kind, layer, head = (ds[name].values for name in ("kind", "layer", "head"))
    heads = np.flatnonzero(kind == "head")
    panels = []
    if heads.size:
        grid = np.full((int(layer[heads].max()) + 1, int(head[heads].max()) + 1), np.nan)
        grid[layer[heads], head[heads]] = mean[heads]
        attrs = ds["attribution"].attrs
        array = xr.DataArray(grid, dims=("layer", "head"), name="attribution", attrs=attrs)
        panels.append(head_grid(array, centre=0.0, title=title or "heads"))
    rest = np.flatnonzero((kind != "head") & np.isfinite(mean))
    every = rest.size
    rest = np.sort(rest[np.argsort(-np.abs(mean[rest]), kind="stable")][:MOST])[::-1]
    if rest.size:
        names = [str(one) for one in ds["source"].values[rest]]
        few = f"the {rest.size} of {every} farthest from 0" if rest.size < every else ""
        named = ", ".join(filter(None, ("other parts" if heads.size else title, few)))
        rows, shown = rows_of(names), dimension("value", ds["attribution"])
        table = {
            "left": np.minimum(mean[rest], 0),
            "bottom": rows - 0.34,
            "right": np.maximum(mean[rest], 0),
            "top": rows + 0.34,
            "value": mean[rest],
            "source": names,
            "low": low[rest],
            "high": high[rest],
            "colour": [ORANGE if one > 0 else BLUE for one in mean[rest]],
        }
        boxes = hv.Rectangles(table, ["left", "bottom", "right", "top"], [shown, "source", "low", "high", "colour"])
        text = "@value{0.000} (95%: @low{0.000} to @high{0.000})" if known else "@value{0.000}"
        parts = [
            styled(boxes, color="colour", line_color=None, **hover(shown, text, ("part", "@source"))),
            intervals(low[rest], rows, high[rest]),
            reference(0.0, "0", rows, shown, GREY, "solid"),
        ]
        label = textwrap.fill(shown.pprint_label, 46)
        size: dict[str, Any] = {"width": 380, "height": 110 + 24 * len(rows), "show_legend": False, "xlabel": label}
        ends = span_of([mean[rest], low[rest], high[rest]])
        panels.append(row_chart(parts, shown, names, xlim=ends, title=named, **size))
    return panels[0] if len(panels) == 1 else hv.Layout(panels).cols(2)
