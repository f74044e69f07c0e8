"""Dots with intervals: charts of one row for each name, and scatters whose outstanding points are named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import holoviews as hv
import numpy as np

from .inputs import Array
from .style import GREY, INK, hover, overlay, styled

PLAIN = "%.3g"
"""How numbers along an axis are written: short, and never ``1.000e-3``."""


def dots(
    table: Mapping[str, Any], axes: Sequence[Any], label: str, look: tuple[str, str], size: float, **options: Any
) -> Any:
    """Points at the columns `axes` of `table`; `look` is colour and marker.

    All other columns are kept for hover, under their name or the dimension that `axes` gives them after the first two.

    Parameters
    ----------
    table : mapping of name to column
    axes : sequence of str or holoviews.Dimension
        Across, up, and dimensions of further columns.
    label : str
        In the legend.
    look : (str, str)
        Colour and marker.
    size : float
        Pixels.
    **options
        Of the Bokeh backend.

    Returns
    -------
    holoviews.Points
    """
    known = {getattr(axis, "name", axis): axis for axis in axes}
    others = [known.get(name, name) for name in table if name not in list(known)[:2]]
    points = hv.Points(table, list(axes[:2]), others, label=label)
    colour, marker = look
    return styled(points, **{"color": colour, "marker": marker, "size": size, "line_color": INK} | options)


def intervals(low: Array, rows: Array, high: Array) -> Any:
    """A horizontal line from `low` to `high` in each row."""
    return styled(hv.Segments((low, rows, high, rows), ["low", "row", "high", "row_high"]), color=INK, line_width=2)


def reference(at: float, name: str, rows: Array, shown: Any, colour: str, dash: str) -> Any:
    """A vertical line through all rows, with its value in the legend.

    Parameters
    ----------
    at : float
    name : str
        In the legend, with the value.
    rows : array
        See `rows_of`.
    shown : holoviews.Dimension
        What the horizontal axis is.
    colour, dash : str

    Returns
    -------
    holoviews.Curve
    """
    ends = [float(rows.min()) - 0.5, 0.5]
    line = hv.Curve(([at, at], ends), shown, "row", label=f"{name}, {at:.2f}")
    return styled(line, color=colour, line_dash=dash, line_width=1.5)


def span_of(values: Iterable[Any], *, share: bool = False) -> tuple[float, float]:
    """Ends of an axis that shows 0 and all `values` with room at the sides; of shares, all from 0 to 1."""
    flat = np.concatenate([np.ravel(np.asarray(one, dtype=float)) for one in values])
    flat = flat[np.isfinite(flat)]
    low, high = min(0.0, *flat.tolist()), max(1.0 if share else 0.0, *flat.tolist())
    pad = 0.02 if share else 0.06 * (high - low or 1.0)
    return low - pad, high + pad


def square_ends(*values: Any) -> tuple[float, float]:
    """Ends that both axes of a scatter share: all `values`, with room at the sides."""
    both = np.concatenate([np.ravel(one) for one in values]).astype(float)
    low, high = float(np.nanmin(both)), float(np.nanmax(both))
    pad = 0.08 * ((high - low) or 1.0)
    return low - pad, high + pad


def equal_line(ends: tuple[float, float], axes: Sequence[Any]) -> Any:
    """A dashed line where both axes are equal."""
    return styled(hv.Curve((ends, ends), *axes, label="equal"), color=GREY, line_dash="dashed", line_width=1)


def rows_of(names: Sequence[str]) -> Array:
    """Places of rows along the vertical axis, the first at the top."""
    return -np.arange(len(names), dtype=float)


def value_bars(
    numbers: Array, rows: Array, shown: Any, beside: Mapping[str, Any], tips: Sequence[tuple[str, str]]
) -> list[Any]:
    """A bar from 0 to each number, with the number written behind it: rectangles and labels.

    Parameters
    ----------
    numbers, rows : array (bar,)
    shown : holoviews.Dimension
        What the numbers are.
    beside : mapping of name to column
        For hover; ``colour`` is that of the bars.
    tips : sequence of (name, Bokeh field)
        What hover shows beside the number.

    Returns
    -------
    list of Rectangles and Labels
        For `row_chart`.
    """
    ends = {"left": np.minimum(numbers, 0), "bottom": rows - 0.36, "right": np.maximum(numbers, 0), "top": rows + 0.36}
    boxes = hv.Rectangles({**ends, "value": numbers, **beside}, [*ends], [shown, *beside])
    text = [f"{one:.3f}" if abs(one) < 10 else f"{one:.1f}" for one in numbers]
    labels = hv.Labels((ends["right"], rows, text), ["x", "y"], "text")
    look = {"text_align": "left", "text_baseline": "middle", "text_font_size": "11px", "text_color": INK}
    return [
        styled(boxes, color="colour", line_color=None, **hover(shown, "@value{0.0000}", *tips)),
        styled(labels, **look, hooks=[shift(4, 0)]),
    ]


def row_chart(parts: Sequence[Any], shown: Any, names: Sequence[str], *, middle: float = 0.0, **options: Any) -> Any:
    """One figure of `parts` with a row for each of `names`; `middle` is where a row's name stands within it.

    Parameters
    ----------
    parts : sequence of HoloViews elements
    shown : holoviews.Dimension
        What the horizontal axis is.
    names : sequence of str
        From top to bottom.
    middle : float
        Height of a row's name above the row's place.
    **options
        Of the Bokeh backend.

    Returns
    -------
    holoviews.Overlay
    """
    rows = rows_of(names)
    axes = {
        "xlabel": shown.pprint_label,
        "ylabel": "",
        "xformatter": PLAIN,
        "ylim": (float(rows[-1]) - 0.55, 0.55),
        "yticks": [(float(row) + middle, name) for row, name in zip(rows, names, strict=True)],
    }
    return overlay(parts, **axes | options)


def spread(count: int, width: float) -> Array:
    """Offsets that keep dots of one row apart: even, within `width`, the same every time."""
    return ((np.arange(count) * 0.6180339887 + 0.5) % 1.0 - 0.5) * width


def stand_out(x: Array, y: Array, names: Sequence[str], most: int = 8, least: float = 0.0) -> list[int]:
    """Which points to write a name at: the farthest from where most are, none in a crowd or on top of another.

    Parameters
    ----------
    x, y : arrays (point,)
    names : sequence of str
    most : int
    least : float
        What each axis spans at least, however near all points are.

    Returns
    -------
    list of int
        Places in `names`.
    """
    spans = [max(least, float(np.nanmax(axis) - np.nanmin(axis))) or 1.0 for axis in (x, y)]
    away = np.hypot((x - np.nanmedian(x)) / spans[0], (y - np.nanmedian(y)) / spans[1])
    kept: list[int] = []
    for index in np.argsort(-np.nan_to_num(away), kind="stable"):
        apart = all(abs(x[index] - x[k]) > 0.14 * spans[0] or abs(y[index] - y[k]) > 0.07 * spans[1] for k in kept)
        if away[index] > 0.12 and len(_near(x, y, index)) <= 3 and apart and len(kept) < min(most, len(names)):
            kept.append(int(index))
    return kept


def _near(x: Array, y: Array, index: int) -> list[int]:
    """The points so close to one of them, itself included, that a name beside it could mean any."""
    spans = [float(np.nanmax(axis) - np.nanmin(axis)) or 1.0 for axis in (x, y)]
    return np.flatnonzero(np.hypot((x - x[index]) / spans[0], (y - y[index]) / spans[1]) < 0.05).tolist()


def names_at(x: Array, y: Array, names: Sequence[str], kept: Sequence[int]) -> Any:
    """The names of the points `kept`, with those of the points on top of them; to the left where the edge is near.

    Parameters
    ----------
    x, y : arrays (point,)
    names : sequence of str
    kept : sequence of int
        Places in `names`, see `stand_out`.

    Returns
    -------
    list of holoviews.Labels
    """
    high = float(np.nanmax(x)) - 0.2 * (float(np.nanmax(x) - np.nanmin(x)) or 1.0)
    parts = []
    for align, offset, side in (
        ("left", 6, [k for k in kept if x[k] <= high]),
        ("right", -6, [k for k in kept if x[k] > high]),
    ):
        labels = hv.Labels(
            (x[side], y[side], [", ".join(names[one] for one in _near(x, y, k)) for k in side]), ["x", "y"], "name"
        )
        options = {"text_align": align, "text_baseline": "bottom", "text_font_size": "11px", "text_color": INK}
        parts.append(styled(labels, **options, hooks=[shift(offset)]))
    return parts


def shift(across: int, down: int = -3) -> Any:
    """Bokeh hook: move a label by so many pixels."""

    def hook(plot: Any, element: Any) -> None:
        plot.handles["glyph"].update(x_offset=across, y_offset=down)

    return hook


LETTER, LINE, DOT = 0.021, 0.045, 0.015
"""Width of a letter, height of a line and radius of a point, as shares of a figure that a narrow screen shows."""
SIDES = (("left", "bottom"), ("right", "bottom"), ("left", "top"), ("right", "top"))


def names_beside(x: Array, y: Array, names: Sequence[str], kept: Sequence[int], ends: tuple[float, float]) -> list[Any]:
    """The names of the points `kept`, the first the most important: each where it hides no other name.

    Points on top of each other share a label of several lines. Both axes reach from one of `ends` to the other. A side
    where no point is hidden, and none could be meant, is taken first; a label for which no side is free is left out.

    Parameters
    ----------
    x, y : arrays (point,)
    names : sequence of str
    kept : sequence of int
        Places in `names`.
    ends : (float, float)
        Of both axes.

    Returns
    -------
    list of holoviews.Labels
    """
    across, up = ((axis - ends[0]) / (ends[1] - ends[0]) for axis in (x, y))
    texts: dict[int, str] = {}
    for index in kept:
        (first, *_) = [*(k for k in texts if np.hypot(across[index] - across[k], up[index] - up[k]) < DOT), index]
        texts[first] = f"{texts[first]}\n{names[index]}" if first in texts else names[index]
    taken: list[tuple[float, float, float, float]] = []
    sides: dict[tuple[str, str], list[int]] = {}
    for index, text in texts.items():
        free: list[tuple[int, int, tuple[float, float, float, float], tuple[str, str]]] = []
        for align, baseline in SIDES:
            lines = text.split("\n")
            wide, high = LETTER * max(map(len, lines)), LINE * len(lines)
            left = across[index] + (DOT if align == "left" else -DOT - wide)
            low = up[index] - (0 if baseline == "bottom" else high)
            box = (left, low, left + wide, low + high)
            apart = all(box[2] < one[0] or box[0] > one[2] or box[3] < one[1] or box[1] > one[3] for one in taken)
            if apart and min(box) > 0 and max(box) < 1:
                beside = (across > box[0] - 2 * DOT) & (across < box[2] + DOT)  # it reads as the name of what is left
                near = beside & (up > box[1] - DOT) & (up < box[3] + DOT)
                hidden = int(np.count_nonzero(np.delete(near, index)))
                free.append((hidden, len(free), box, (align, baseline)))
        if free:
            _, _, box, chosen = min(free)
            taken.append(box)
            sides.setdefault(chosen, []).append(index)
    parts = []
    for (align, baseline), side in sides.items():
        labels = hv.Labels((x[side], y[side], [texts[at] for at in side]), ["x", "y"], "name")
        options = {"text_align": align, "text_baseline": baseline, "text_font_size": "11px", "text_color": INK}
        aside = shift(6 if align == "left" else -6, -3 if baseline == "bottom" else 3)
        parts.append(styled(labels, **options, hooks=[aside]))
    return parts
