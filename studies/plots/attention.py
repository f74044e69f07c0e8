"""What heads attend to on one prompt: a head's pattern, and several side by side that zoom together."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from .heads import names_of_heads
from .parts.inputs import need, part_of, per_head
from .parts.patterns import Pattern, coarse, names_of_patterns, read_pattern, short
from .parts.style import NARROWEST, ORANGE, WEIGHTS, ColourScale, cells, heat_map, hover, overlay, styled, ticks

WORDS, WHOLE = 50, 96
"""Up to so many tokens they are written along the axes; up to so many positions each has a cell of its own."""
SIDE = 560
"""Pixels of the side of a large pattern."""


def attention(
    ds: xr.Dataset | xr.DataArray,
    shown: str | None = None,
    *,
    example: int = 0,
    title: str | None = None,
    colorbar: bool = True,
) -> Any:
    """What one head attends to on a prompt: query tokens from top to bottom, key tokens from left to right.

    Parameters
    ----------
    ds : Dataset or DataArray
        The result of `headwise.capture`; or ``pattern([shown,] [layer, head,] [example,] query, key)`` with, where
        there are any, ``token(position)``, ``expected(shown, query)`` (the key that each query should attend to, NaN
        for none) and ``kind(shown)``; or an array ``([example,] query, key)``.
    shown : str, optional
        Name of the head, such as ``"L1H2"``; needed where there are several.
    example : int
        Which prompt.
    title : str, optional
        By default the head's name and, where expected keys are known, how much of its attention they get.
    colorbar : bool

    Returns
    -------
    holoviews.Overlay
        A ``HeatMap`` (``key``, ``query``; weight, tokens) and ``Rectangles`` around the expected keys. The weight of a
        key after the query is NaN where nothing attends to such keys. Of a prompt of more than 96 tokens, each cell is
        the largest weight in a block of positions; select some to see each, such as ``.isel(query=slice(0, 90))``.
    """
    return draw(read_pattern(ds, shown, example=example), title=title, colorbar=colorbar)


def draw(pattern: Pattern, *, title: str | None = None, colorbar: bool = True, hooks: Sequence[Any] = ()) -> Any:
    """The figure of a pattern that was read.

    Parameters
    ----------
    pattern : Pattern
    title : str, optional
        See `attention`.
    colorbar : bool
    hooks : sequence of callables
        Bokeh hooks of the figure.

    Returns
    -------
    holoviews.Overlay
    """
    title = titled(pattern) if title is None else title
    pattern = coarse(pattern, WHOLE)
    cell = cell_size(pattern)
    side = {"frame_width": round(len(pattern.keys) * cell), "frame_height": round(len(pattern.queries) * cell)}
    parts = [pattern_cells(pattern, cell, colorbar), *expected_boxes(pattern)]
    wide = max(int(side["frame_width"] / 6.6), 34)
    return overlay(
        parts,
        **side | axes_of(pattern, cell),
        invert_yaxis=True,
        xrotation=90,
        title=textwrap.fill(title, wide),
        hooks=list(hooks),
    )


def cell_size(pattern: Pattern) -> float:
    """Pixels of a cell."""
    count = max(pattern.weights.shape)
    return int(np.clip(280 / count, 12, max(22, NARROWEST / count))) if count <= WORDS else SIDE / count


def pattern_cells(pattern: Pattern, cell: float, colorbar: bool = True) -> Any:
    """The heat map of a pattern, with tooltips."""
    key, query = (grid.ravel() for grid in np.meshgrid(pattern.keys, pattern.queries))
    if pattern.block == 1:
        at = {"from": query, "to": key}
    else:
        at = {"from": pattern.peak_queries.ravel(), "to": pattern.peak_keys.ravel()}
    table: dict[str, Any] = {"key": key, "query": query, "weight": pattern.weights.ravel()}
    table |= {f"{end}_token": [pattern.token(one) for one in places] for end, places in at.items()}
    table |= {f"{end}_position": places for end, places in at.items()}
    rows = (("query", "@from_token (position @from_position)"), ("key", "@to_token (position @to_position)"))
    weight = pattern.shown
    value = "@weight{0.000}" if pattern.block == 1 else "@weight{0.000}, the largest in this block"
    width, height = (round(len(ends) * cell) for ends in (pattern.keys, pattern.queries))
    high = max(1.0, float(np.nanmax(pattern.weights)))
    look = cells(ColourScale(0.0, high, WEIGHTS), width, height, weight.pprint_label, colorbar)
    look |= {"line_color": "#eeeeee"} if cell >= 10 else {"line_color": None}
    vdims = [weight, "to_token", "from_token", "to_position", "from_position"]
    return styled(heat_map(table, ["key", "query"], vdims), **look, **hover(weight, value, *rows))


def expected_boxes(pattern: Pattern) -> list[Any]:
    """Outlines of the expected cells, as rectangles around ``(key, query)``; nothing where none are expected."""
    outlined = [
        (key - 0.5, query - 0.5, key + 0.5, query + 0.5)
        for query, key in zip(pattern.queries.astype(float), pattern.expected, strict=True)
        if np.isfinite(key)
    ]
    if not outlined:
        return []
    boxes = hv.Rectangles(outlined, ["left", "bottom", "right", "top"])
    return [styled(boxes, fill_alpha=0, line_color=ORANGE, line_width=2)]


def axes_of(pattern: Pattern, cell: float) -> dict[str, Any]:
    """Ticks, labels and ends of both axes: tokens where they are known and can be read, else positions."""
    words = bool(pattern.tokens) and pattern.block == 1 and max(pattern.weights.shape) <= WORDS
    half = pattern.block / 2
    axes: dict[str, Any] = {}
    for axis, name, places in (("x", "key", pattern.keys), ("y", "query", pattern.queries)):
        if words:
            axes[f"{axis}ticks"] = [(int(place), short(pattern.token(place))) for place in places]
        elif pattern.block == 1:
            axes[f"{axis}ticks"] = ticks(places, [str(place) for place in places], cell)
        axes[f"{axis}lim"] = (float(places[0]) - half, float(places[-1]) + half)
        axes[f"{axis}label"] = f"{name} token" if words else f"{name} position"
    return axes


def titled(pattern: Pattern) -> str:
    """The head's name, how much of its attention is at the expected keys, and whether cells are blocks."""
    share, block = pattern.at_expected(), coarse(pattern, WHOLE).block
    name = pattern.name
    if not np.isnan(share):
        name += f": {share:.0%} in {f'{pattern.kind} boxes' if pattern.kind else 'the boxes'}"
    return name if block == 1 else f"{name}: largest weight in blocks of {block} by {block}".removeprefix(": ")


def attention_row(
    ds: xr.Dataset,
    shown: Sequence[str] | None = None,
    *,
    by: xr.DataArray | None = None,
    top: int | None = None,
    example: int = 0,
    columns: int = 3,
) -> Any:
    """The patterns of several heads side by side; zooming in one zooms in all. See `attention`.

    Parameters
    ----------
    ds : Dataset
        As for `attention`.
    shown : sequence of str, optional
        Which heads, in this order; by default all.
    by : DataArray (layer, head), optionally with ``example``
        A score: heads are drawn from the highest to the lowest.
    top : int, optional
        Draw only so many.
    example : int
    columns : int

    Returns
    -------
    holoviews.Layout
    """
    ds = part_of(ds, "attention_row", "pattern")
    names = names_of_patterns(ds) if isinstance(ds, xr.Dataset) else []
    if not names:
        need(ds, "attention_row", "pattern")
    names = [str(name) for name in shown] if shown is not None else names
    if by is not None:
        scores = per_head(by, "attention_row by a score")
        score = dict(zip(names_of_heads(scores), scores.values.ravel().tolist(), strict=True))
        names = sorted(names, key=lambda name: -score.get(name, -np.inf))
    names = names[:top]
    link = _Linked()
    panels = [
        draw(
            read_pattern(ds, name, example=example, what="attention_row"),
            colorbar=name == names[-1],
            hooks=[link.panel(number)],
        )
        for number, name in enumerate(names)
    ]
    return hv.Layout(panels).cols(columns)


class _Linked:
    """Ranges that the panels of one row share, made anew each time that the row is drawn."""

    def __init__(self) -> None:
        self.ranges: dict[str, Any] = {}
        self.drawn: set[int] = set()

    def panel(self, number: int) -> Callable[[Any, Any], None]:
        """Bokeh hook that gives a panel the ranges of the others, so that zooming in one zooms in all."""

        def hook(plot: Any, element: Any) -> None:
            """Give the panel the shared ranges."""
            taken = any(one.document is not None for one in self.ranges.values())
            if number in self.drawn or taken:
                self.ranges, self.drawn = {}, set()
            self.drawn.add(number)
            for axis in ("x_range", "y_range"):
                setattr(plot.state, axis, self.ranges.setdefault(axis, getattr(plot.state, axis)))

        return hook
