"""Where one token of a text looks, drawn in the text itself."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ....errors import DeclarationError
from ..parts.inputs import need
from ..parts.patterns import read_pattern
from ..parts.style import ORANGE, WEIGHTS, ColourScale, overlay, styled

LETTER, LINE = 8.4, 24
"""Pixels: width of a letter and height of a line."""
LEAST = 0.1
"""Attention from which on a line leads from the token to what it looks at."""
HIGH = 0.9
"""Lines by which an arc would rise above what it leads to, if it were not smooth."""
TINTS = WEIGHTS[:170]
"""Of the colours of weights, those on which black text can be read."""


def attention_in_text(
    ds: xr.Dataset, shown: str | None = None, *, query: int = -1, example: int = 0, title: str | None = None
) -> Any:
    """A text with its lines and spaces, each token as dark as one token of it attends to it.

    Parameters
    ----------
    ds : Dataset
        The result of `headwise.capture`, of the pattern of a head or several.
    shown : str, optional
        Name of the head, such as ``"L1H2"``; needed where there are several.
    query : int
        The position of the token that looks; it is outlined.
    example : int
        Which prompt.
    title : str, optional
        By default the head's name, and the token that gets most.

    Returns
    -------
    holoviews.Overlay
        ``Rectangles`` of the tokens (``token``, ``position``, ``weight``), ``Path`` from the query to the tokens
        that get at least a tenth of its attention, and ``Labels``.

    Raises
    ------
    DeclarationError
        The dataset holds no pattern with tokens, or no such query.
    """
    pattern = read_pattern(ds, shown, example=example, what="attention_in_text")
    need(ds, "attention_in_text", "token")
    token = ds["token"].isel(example=example) if "example" in ds["token"].dims else ds["token"]
    texts = {int(at): str(text) for at, text in zip(token["position"].values, token.values, strict=True)}
    places = [int(key) for key in pattern.keys]
    where = {int(one): row for row, one in enumerate(pattern.queries)}
    chosen = int(pattern.queries[-1]) + 1 + query if query < 0 else query
    if chosen not in where:
        raise DeclarationError(
            f"query={query}: the prompt has positions {pattern.queries[0]} to {pattern.queries[-1]}, or -1 from the end"
        )
    weights = np.nan_to_num(pattern.weights[where[chosen]])
    boxes, tops, words = _laid_out([texts[place] for place in places])
    colours = ColourScale(0.0, 1.0, TINTS)
    fills = [colours.colours[round(min(max(weight, 0), 1) * (len(TINTS) - 1))] for weight in weights]
    rows = [
        (*box, texts[place], place, weight, fill)
        for several, place, weight, fill in zip(boxes, places, weights, fills, strict=True)
        for box in several
    ]
    ends = ["left", "bottom", "right", "top"]
    tips = [("token", "@token"), ("position", "@position"), ("attention", "@weight{0.000}")]
    own = boxes[places.index(chosen)]
    arcs = [
        _arc(tops[places.index(chosen)], tops[row]) | {"weight": float(weight)}
        for row, weight in enumerate(weights)
        if weight >= LEAST and places[row] != chosen
    ]
    parts = [
        styled(
            hv.Rectangles(rows, ends, ["token", "position", "weight", "fill"]),
            color="fill", line_color="#e6e6e6", tools=["hover"], hover_tooltips=tips,
        ),
        styled(hv.Rectangles(own, ends), fill_alpha=0, line_color=ORANGE, line_width=2.5),
        styled(hv.Path(arcs, ["x", "y"], "weight"), color=ORANGE, line_width=1.5, line_alpha=0.8),
        styled(
            hv.Labels(words, ["x", "y"], "text"),
            text_font_size="13px", text_color="#1a1a1a", text_align="left", text_baseline="middle", hooks=[_monospace],
        ),
    ]  # fmt: skip
    wide = max(box[2] for several in boxes for box in several)
    high = max(box[3] for several in boxes for box in several)
    if title is None:
        best = int(weights.argmax())
        title = (
            f"{pattern.name}: {texts[chosen].strip()!r} gives {weights[best]:.0%} to {texts[places[best]].strip()!r}"
        )
    return overlay(
        parts,
        frame_width=round(max(wide, 30) * LETTER),
        frame_height=round((high + 1.25) * LINE),
        xlim=(-0.5, max(wide, 30) + 0.5),
        ylim=(-1, high + 0.25),
        invert_yaxis=True,
        xaxis=None,
        yaxis=None,
        title=title,
        show_legend=False,
        hooks=[_bare],
    )


def _laid_out(texts: list[str]) -> tuple[list[list[Any]], list[tuple[float, float]], list[tuple[int, int, str]]]:
    """Boxes of each token, one for each line it is on; the top of its last one; and what is written where."""
    boxes: list[list[Any]] = []
    tops, words = [], []
    column, line = 0, 0
    for text in texts:
        own = []
        parts = text.expandtabs(4).split("\n")
        for number, part in enumerate(parts):
            ends_line = number < len(parts) - 1
            width = len(part) or (1 if ends_line or len(parts) == 1 else 0)
            if width:
                own.append((column, line - 0.42, column + width, line + 0.42))
                written = part if part.strip() else ("↵" if ends_line and not part else "")
                words += [(column, line, written)] if written else []
            column, line = (0, line + 1) if ends_line else (column + width, line)
        boxes.append(own)
        left, top, right, _ = own[-1]
        tops.append(((left + right) / 2, top))
    return boxes, tops, words


def _arc(start: tuple[float, float], end: tuple[float, float]) -> dict[str, Any]:
    """A curve from one place to another that rises above the lines between them."""
    share = np.linspace(0, 1, 30)
    (x0, y0), (x1, y1) = start, end
    top = min(y0, y1) - HIGH
    rows = ((1 - share) ** 2, 2 * share * (1 - share), share**2)
    x, y = (sum(part * value for part, value in zip(rows, ends, strict=True))
            for ends in ((x0, (x0 + x1) / 2, x1), (y0, top, y1)))  # fmt: skip
    return {"x": x, "y": y}


def _monospace(plot: Any, element: Any) -> None:
    """Bokeh hook: letters of one width, so that boxes fit."""
    plot.handles["glyph"].text_font = {"value": "monospace"}


def _bare(plot: Any, element: Any) -> None:
    """Bokeh hook: no frame and no grid."""
    plot.state.outline_line_color = None
