"""What each head is called, by what it does on text."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ..parts.inputs import need
from ..parts.style import overlay, styled

SIGNS = {
    "closing bracket": ("( )", "#d55e00"),
    "nested bracket": ("(( ))", "#b34700"),
    "inside bracket": ("( ·", "#e69f00"),
    "last bracket": ("last (", "#f5c97a"),
    "same indentation": ("=", "#009e73"),
    "block opener": ("block", "#66c2a4"),
    "induction": ("ind.", "#0072b2"),
    "duplicate token": ("dup.", "#cc79a7"),
    "previous token": ("prev.", "#56b4e9"),
    "current token": ("self", "#d9d2e9"),
    "first token": ("first", "#e3e3e3"),
}
"""What is written in the cell of a head that is called so, and its colour."""
NAMED = ("called", "score", "control_score", "fits")
"""Variables that are drawn."""
UNNAMED = ("", "#ffffff")
CELL = 52
"""Pixels of the side of a cell."""


def heads_on_text(ds: xr.Dataset, *, title: str = "") -> Any:
    """A cell for each head, layer 0 at the bottom, coloured by what the head is called.

    Hovering tells by how much the score of the claim is above the nearer control, and every claim that fits.

    Parameters
    ----------
    ds : Dataset
        The result of `headwise.text_heads`.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Rectangles`` for each name that a head has, with a legend, and ``Labels``.

    Raises
    ------
    DeclarationError
        The dataset is another.
    """
    ds = need(ds, "heads_on_text", *NAMED)
    gap = (ds["score"] - ds["control_score"]).mean("unit").min("control").transpose("claim", "layer", "head")
    called = ds["called"].transpose("layer", "head")
    fits = ds["fits"].transpose("claim", "layer", "head").values
    claims = [str(one) for one in ds["claim"].values]
    layers, heads = called["layer"].values, called["head"].values
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for (row, column), name in np.ndenumerate(called.values):
        layer, head = int(layers[row]), int(heads[column])
        margin = float(gap.values[claims.index(name), row, column]) if name in claims else np.nan
        others = ", ".join(one for one, fit in zip(claims, fits[:, row, column], strict=True) if fit) or "none"
        box = (head - 0.5, layer - 0.5, head + 0.5, layer + 0.5)
        rows.setdefault(str(name), []).append((*box, f"L{layer}H{head}", str(name), margin, others))
    ends, told = ["left", "bottom", "right", "top"], ["name", "called", "margin", "fitting"]
    tips = [("head", "@name"), ("called", "@called"), ("above the nearer control by", "@margin{0.00}")]
    tips += [("claims that fit", "@fitting")]
    parts: list[Any] = []
    for name in [*(one for one in SIGNS if one in rows), *(one for one in rows if one not in SIGNS)]:
        colour = SIGNS.get(name, UNNAMED)[1]
        boxes = hv.Rectangles(rows[name], ends, told, label=name)
        look = {"color": colour, "line_color": "#bbbbbb", "tools": ["hover"], "hover_tooltips": tips}
        parts.append(styled(boxes, **look))
    written = [((left + right) / 2, (low + high) / 2, SIGNS.get(name, UNNAMED)[0], INKS.get(name, "#000000"))
               for name, boxes in rows.items() for left, low, right, high, *_ in boxes]  # fmt: skip
    labels = hv.Labels(written, ["x", "y"], ["text", "ink"])
    parts.append(styled(labels, text_color="ink", text_font_size="11px", text_baseline="middle"))
    return overlay(
        parts,
        frame_width=len(heads) * CELL,
        frame_height=len(layers) * CELL,
        xlim=(heads[0] - 0.5, heads[-1] + 0.5),
        ylim=(layers[0] - 0.5, layers[-1] + 0.5),
        xticks=[int(head) for head in heads],
        yticks=[int(layer) for layer in layers],
        xlabel="head",
        ylabel="layer",
        title=title,
        legend_cols=2,  # three do not fit into 390 pixels
    )


INKS = dict.fromkeys(("closing bracket", "nested bracket", "induction", "same indentation"), "#ffffff")
"""Colour of what is written on a dark cell; black elsewhere."""
