"""A prompt as a strip of tokens above a head's pattern: hover on a token, or on a row, shows where it looks."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Callable
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import DeclarationError
from .attention import WORDS, axes_of, expected_boxes, pattern_cells, titled
from .parts.patterns import Pattern, read_pattern, short
from .parts.style import INK, ORANGE, WEIGHTS, overlay, styled

MOST = 150
"""Tokens that a strip holds."""
LETTER, LINE, GAP = 6.7, 24, 4
"""Pixels: width of a letter, height of a line of the strip, and room between tokens."""
TINTS = WEIGHTS[:150]
"""Of the colours of weights, those on which black text can be read."""
NARROWEST, WIDEST = 420, 600
LOOKS = 3
"""How many of the keys that a token attends to a tooltip lists."""


def attention_viewer(
    ds: xr.Dataset | xr.DataArray, shown: str | None = None, *, example: int = 0, title: str | None = None
) -> Any:
    """What one head attends to, with the prompt above it: hover on a token of it to see where that token looks.

    The token is outlined, and the tokens that it attends to are as dark as it attends to them; hovering on a row of the
    pattern does the same. Until then the last token is chosen. Works in a saved page, with no network and no Python.

    Parameters
    ----------
    ds : Dataset or DataArray
        As for `attention`. Any prompt: ``capture(model, Prompts(["..."]), [Head(1, 2).pattern])``.
    shown : str, optional
        Name of the head; needed where there are several.
    example : int
        Which prompt.
    title : str, optional

    Returns
    -------
    holoviews.Overlay
        The ``HeatMap`` and ``Rectangles`` of `attention`; ``Rectangles`` of the chosen row and of the strip
        (``token``, ``position``, ``weight``: of the chosen row) and ``Labels`` of its tokens.

    Raises
    ------
    DeclarationError
        For a prompt of more than 150 tokens.
    """
    pattern = read_pattern(ds, shown, example=example, what="attention_viewer")
    if max(pattern.weights.shape) > MOST:
        raise DeclarationError(
            f"attention_viewer draws prompts of up to {MOST} tokens, this one has {max(pattern.weights.shape)}: select "
            f"some, such as .isel(query=slice(0, {MOST}), key=slice(0, {MOST})), or draw it with attention"
        )
    count = len(pattern.keys)
    cell = float(np.clip(NARROWEST / count, 12, 60)) if count <= WORDS else WIDEST / count
    width = max(count * cell, NARROWEST)
    boxes, lines = _laid_out(pattern, width)
    title = titled(pattern) if title is None else title
    unit = 1 / cell  # a pixel, in positions
    axes = axes_of(pattern, cell)
    left, top = axes["xlim"][0], axes["ylim"][0]
    right, edge = left + width * unit, top - (lines * LINE + 3 * GAP) * unit
    chosen = len(pattern.queries) - 1
    parts = [
        pattern_cells(pattern, cell),
        *expected_boxes(pattern),
        _row(pattern, chosen),
        *_strip(pattern, boxes, lines, (left, top), unit, chosen),
    ]
    height = len(pattern.queries) * cell + (top - edge) * cell
    axes |= {"xlim": (left, right), "ylim": (edge, axes["ylim"][1])}
    return overlay(
        parts,
        **axes,
        frame_width=round(width),
        frame_height=round(height),
        invert_yaxis=True,
        xrotation=90,
        title=textwrap.fill(title, int(width / 6.6)),
        show_legend=False,
        hooks=[_alive(pattern)],
    )


def _laid_out(pattern: Pattern, width: float) -> tuple[list[tuple[float, float, int]], int]:
    """Left end, width and line of each token's box, in pixels; and how many lines there are."""
    boxes, at, line = [], 0.0, 0
    for key in pattern.keys:
        wide = 2.0 * GAP + LETTER * _columns(short(pattern.token(key)))
        if at and at + wide > width:
            at, line = 0.0, line + 1
        boxes.append((at, wide, line))
        at += wide + GAP
    return boxes, line + 1


def _columns(text: str) -> int:
    """How many letters wide a text is; some scripts are twice as wide."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _strip(
    pattern: Pattern,
    boxes: list[tuple[float, float, int]],
    lines: int,
    corner: tuple[float, float],
    unit: float,
    chosen: int,
) -> list[Any]:
    """Boxes with the tokens, above the pattern whose upper left corner is given."""
    left, top = corner
    start = np.array([left + at * unit for at, _, _ in boxes])
    end = start + np.array([wide * unit for _, wide, _ in boxes])
    low = np.array([top - (2 * GAP + (lines - line) * LINE) * unit for _, _, line in boxes])
    high = low + (LINE - GAP) * unit
    row = {int(query): place for place, query in enumerate(pattern.queries)}
    table = {
        "left": start,
        "bottom": low,
        "right": end,
        "top": high,
        "token": [pattern.token(key) for key in pattern.keys],
        "position": pattern.keys,
        "weight": pattern.weights[chosen],
        "looks": [_looks(pattern, row.get(int(key))) for key in pattern.keys],
    }
    rectangles = hv.Rectangles(table, ["left", "bottom", "right", "top"], ["token", "position", "weight", "looks"])
    written = [short(pattern.token(key)) for key in pattern.keys]
    labels = hv.Labels(((start + end) / 2, (low + high) / 2, written), ["x", "y"], "text")
    tips = [("token", "@token (position @position)"), ("looks at", "@looks")]
    look = {"text_font_size": "11px", "text_color": INK, "text_baseline": "middle"}
    return [
        styled(rectangles, tools=["hover"], hover_tooltips=tips, line_color="#c8c8c8", color="#ffffff"),
        styled(labels, **look, hooks=[_monospace]),
    ]


def _monospace(plot: Any, element: Any) -> None:
    """Bokeh hook: letters of one width, so that boxes fit."""
    plot.handles["glyph"].text_font = {"value": "monospace"}


def _looks(pattern: Pattern, row: int | None) -> str:
    """The keys with most of a row's attention, in words."""
    if row is None:
        return "not a query here"
    weights = np.nan_to_num(pattern.weights[row])
    best = [at for at in np.argsort(-weights, kind="stable")[:LOOKS] if weights[at] >= 0.005]
    return ", ".join(f"{pattern.token(pattern.keys[at])} ({pattern.keys[at]}) {weights[at]:.2f}" for at in best)


def _row(pattern: Pattern, chosen: int) -> Any:
    """The outline of the chosen row."""
    query = float(pattern.queries[chosen])
    ends = (float(pattern.keys[0]) - 0.5, query - 0.5, float(pattern.keys[-1]) + 0.5, query + 0.5)
    box = hv.Rectangles([ends], ["left", "bottom", "right", "top"], label="chosen row")
    return styled(box, fill_alpha=0, line_color=INK, line_width=1)


CHOOSE = """
const [at] = cb_data.index.indices
if (at == null) return
const row = rows[position == "query" ? cells.data.query[at] : strip.data.position[at]]
if (row == null) return
const {weight, edge, thick} = strip.data
for (let key = 0; key < weight.length; key++) {
  const one = weights[row][key]
  weight[key] = one == null ? NaN : one
  edge[key] = strip.data.position[key] == queries[row] ? chosen : "#c8c8c8"
  thick[key] = edge[key] == chosen ? 2.5 : 1
}
strip.change.emit()
outline.data[low][0] = queries[row] - 0.5
outline.data[high][0] = queries[row] + 0.5
outline.change.emit()
"""


def _alive(pattern: Pattern) -> Callable[[Any, Any], None]:
    """Bokeh hook: colours of the strip, and what hovering does."""
    weights = [[None if np.isnan(one) else round(float(one), 4) for one in row] for row in pattern.weights]
    queries = [int(query) for query in pattern.queries]

    def hook(plot: Any, element: Any) -> None:
        """Add the tools that follow the mouse to the drawn panel."""
        from bokeh.models import CustomJS, HoverTool
        from bokeh.transform import linear_cmap

        parts = [part.handles for part in plot.subplots.values()]
        cells, outline, strip = parts[0], parts[-3], parts[-2]
        source, last = strip["source"], queries[-1]
        here = [int(key) == last for key in pattern.keys]
        source.data = dict(source.data) | {
            "weight": np.asarray(pattern.weights[-1], dtype=float),
            "position": np.asarray(pattern.keys, dtype=int),
            "edge": [ORANGE if one else "#c8c8c8" for one in here],
            "thick": [2.5 if one else 1 for one in here],
        }
        colour = linear_cmap("weight", TINTS, 0, 1, nan_color="#f4f4f4")
        strip["glyph"].update(fill_color=colour, line_color={"field": "edge"}, line_width={"field": "thick"})
        glyph = outline["glyph"]
        arguments = {
            "weights": weights,
            "queries": queries,
            "rows": {str(query): place for place, query in enumerate(queries)},
            "cells": cells["source"],
            "strip": source,
            "outline": outline["source"],
            "low": glyph.bottom,
            "high": glyph.top,
            "chosen": ORANGE,
        }
        for handles, position in ((cells, "query"), (strip, "key")):
            act = CustomJS(args=arguments | {"position": position}, code=CHOOSE)
            tool = HoverTool(renderers=[handles["glyph_renderer"]], tooltips=None, callback=act, visible=False)
            plot.state.add_tools(tool)
        if "hover" in strip:
            strip["hover"].attachment = "below"  # so that a tooltip hides no earlier token
        plot.state.outline_line_color = None
        plot.state.yaxis.axis_line_color = None
        plot.state.xaxis.axis_line_color = None

    return hook
