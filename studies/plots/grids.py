"""Any two axes as a grid of cells, and the one most asked for: what a patch does at every layer and position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from .parts.inputs import Array, array_of, places_of, reduced
from .parts.patterns import short, visible
from .parts.style import cells, dimension, heat_map, hover, scale_for, styled, ticks

MOST = 160
"""Columns that are drawn each for itself."""


def layer_by_position(
    values: xr.DataArray | xr.Dataset,
    *,
    centre: float | None = None,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Any:
    """One cell for each layer (upward) and position (to the right), such as of patches of the residual stream.

    Parameters
    ----------
    values : DataArray (layer, position), optionally with ``example``, or Dataset
        A Dataset of `measure` with one metric stands for the change of that metric.
        Averaged over examples. Tokens, where ``token(position)`` is there or all examples have the same ones,
        are written along the axis. Of more than 160 positions, each cell is the value in a block of them that is
        farthest from the neutral one.
    centre : float, optional
        Value of the neutral colour; without it 0 where there are negative values or the array is an effect, and else a
        sequential scale.
    title : str
    limits : (low, high), optional
        Ends of the colour scale.

    Returns
    -------
    holoviews.HeatMap
        ``position``, ``layer``; ``value`` and the labels of both.
    """
    return grid(values, "position", "layer", centre=centre, title=title, limits=limits)


def grid(
    values: xr.DataArray | xr.Dataset,
    x: str,
    y: str,
    *,
    centre: float | None = None,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Any:
    """One cell for each pair of values of two axes: `x` to the right, `y` upward where it counts, else downward.

    Parameters
    ----------
    values : DataArray (y, x), optionally with ``example``, or Dataset
    x, y : str
        Its dims.
    centre, title, limits
        As for `layer_by_position`.

    Returns
    -------
    holoviews.HeatMap
        ``x``, ``y`` under their names; ``value``, ``x_label``, ``y_label``.
    """
    what = "layer_by_position" if (x, y) == ("position", "layer") else "grid"
    given = array_of(values, what, (y, x))
    drawn = reduced(given, what, (y, x))
    if centre is None and str(given.name).startswith("effect_"):
        centre = 0.0
    numbers = np.asarray(drawn.values, dtype=float)
    (columns, column_names), (rows, row_names) = (places_of(drawn, dim) for dim in (x, y))
    numbers, columns, column_names, block = _blocks(numbers, columns, column_names, centre or 0.0)
    scale = scale_for(numbers, limits, centre)
    wide = float(np.clip(560 / len(columns), 3.5, 34))
    high = int(np.clip(420 / len(rows), 9, 28))
    row, column = (at.ravel() for at in np.meshgrid(rows, columns, indexing="ij"))
    labels = np.meshgrid(np.asarray(row_names, dtype=object), np.asarray(column_names, dtype=object), indexing="ij")
    table = {x: column, y: row, "value": numbers.ravel(), "x_label": labels[1].ravel(), "y_label": labels[0].ravel()}
    shown = dimension("value", given)
    tokens = _tokens(given) if x == "position" and block == 1 else []
    table["token"] = (tokens or column_names) * len(rows)
    if y == "position" and (read := _tokens(given)):
        row_names = [f"{name} {token}" for name, token in zip(row_names, read, strict=True)]
        table["y_label"] = np.repeat(np.asarray(row_names, dtype=object), len(columns))
    counted = drawn[y].dtype.kind in "iuf" if y in drawn.coords else True
    words = bool(tokens) and wide >= 11
    upright = max(map(len, column_names)) * 7 > wide or words
    room = 0.85 if upright else 0.7
    if column_names[-1].isdigit() and len(column_names[-1]) > 2:  # long numbers stand side by side
        room *= 1.5 / len(column_names[-1])
    across: Any = ticks(columns, [short(name) for name in column_names], wide * room)
    if words:
        across = [(int(at), short(one)) for at, one in zip(columns, tokens, strict=True)]
    elif block > 1:
        across = 10  # numbers along the axis itself
    extra = [("token", "@token")] if tokens else []
    value = "@value{0.0000}" if block == 1 else f"@value{{0.0000}}, the farthest of {block}"
    return styled(
        heat_map(table, [x, y], [shown, "x_label", "y_label", "token"]),
        **cells(scale, round(len(columns) * wide), len(rows) * high, shown.pprint_label),
        **hover(shown, value, (y, "@y_label"), (x, "@x_label"), *extra),
        title=title,
        xlabel="token" if words else x,
        xticks=across,
        yticks=ticks(rows, [short(name) for name in row_names], high),
        xrotation=90 if words or (upright and block == 1 and not column_names[0].isdigit()) else 0,
        xlim=(float(columns[0]) - 0.5 * block, float(columns[-1]) + 0.5 * block),
        ylim=(float(rows[0]) - 0.5, float(rows[-1]) + 0.5),
        invert_yaxis=not counted or y == "position",
    ).opts(backend="bokeh", line_width=1 if min(wide, high) >= 8 else 0.3)


def _blocks(numbers: Array, columns: Array, names: list[str], centre: float) -> tuple[Array, Array, list[str], int]:
    """At most so many columns: of each block the value farthest from the neutral one, labelled with its ends."""
    block = math.ceil(len(columns) / MOST)
    if block == 1:
        return numbers, columns, names, 1
    starts = range(0, len(columns), block)
    pieces = [numbers[:, start : start + block] for start in starts]
    far = [np.nan_to_num(np.abs(piece - centre), nan=-1.0).argmax(1)[:, None] for piece in pieces]
    thinned = np.concatenate([np.take_along_axis(piece, at, 1) for piece, at in zip(pieces, far, strict=True)], 1)
    ends = [f"{names[start]} to {names[min(start + block, len(names)) - 1]}" for start in starts]
    return thinned, columns[list(starts)] + (block - 1) / 2, ends, block


def _tokens(values: xr.DataArray) -> list[str]:
    """The tokens along the positions, where they are known and the same for all examples."""
    if "token" not in values.coords or "position" not in values["token"].dims:
        return []
    token = values["token"]
    if set(token.dims) == {"example", "position"}:
        texts = token.transpose("example", "position").values
        if not (texts == texts[:1]).all():
            return []
        token = token.isel(example=0)
    return [visible(str(one)) for one in token.values] if token.dims == ("position",) else []
