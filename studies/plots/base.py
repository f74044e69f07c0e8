"""What every picture shares: labels from attributes, colour scales, roles, rows. Imports HoloViews, never a model.

The Bokeh backend is registered by the first picture that is styled, not by an import; a notebook that shows pictures
still says ``hv.extension("bokeh")`` itself.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr
from bokeh.palettes import Blues9, Viridis256, interp_palette

from ...errors import DeclarationError, UnknownNameError, choices
from ..page import Page
from ..results import check_writable, write_beside

Array = np.ndarray[Any, Any]

INK, GREY, PALE = "#1a1a1a", "#8a8a8a", "#e9e9e9"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
"""Okabe and Ito's colours, told apart with any colour vision."""
ROLES = {
    "induction": (ORANGE, "circle"),
    "previous-token": (BLUE, "triangle"),
    "duplicate-token": (GREEN, "square"),
    "first-token": (PURPLE, "inverted_triangle"),
    "current-token": (SKY, "diamond"),
    "other": (GREY, "circle"),
}
"""Role to colour and marker: colour is never the only sign."""
TOOLS = ["save", "box_zoom", "reset"]
"""No drag or wheel tool is on from the start, so that a page with pictures scrolls."""

SEQUENTIAL = list(Viridis256)
WEIGHTS = list(interp_palette(("#ffffff", *reversed(Blues9)), 255))
DIVERGING = list(interp_palette(("#0b3c73", "#2f76b5", "#8fbfe0", "#f7f7f7", "#f5b878", "#d9731a", "#8a3a05"), 255))
"""Viridis; white to blue; blue, white, orange. All keep their order in grey and for colour-blind readers."""


@dataclass(frozen=True)
class Scale:
    """Colours for a range of values.

    Attributes
    ----------
    low, high : float
        Values of the first and the last colour.
    colours : list of str
    signed : bool
        Whether values are written with their sign.
    """

    low: float
    high: float
    colours: Sequence[str]
    signed: bool = False

    def ink(self, values: Array) -> list[str]:
        """Black or white, whichever is read more easily on each value's colour."""
        span = (self.high - self.low) or 1.0
        at = np.clip((np.nan_to_num(values, nan=self.low) - self.low) / span, 0, 1)
        picked = [self.colours[round(one * (len(self.colours) - 1))] for one in at]
        light = [0.299 * int(c[1:3], 16) + 0.587 * int(c[3:5], 16) + 0.114 * int(c[5:7], 16) for c in picked]
        return ["#000000" if one > 140 else "#ffffff" for one in light]

    def text(self, values: Array) -> list[str]:
        """Values as short text; nothing where one is missing."""
        digits = 2 if max(abs(self.low), abs(self.high)) < 10 else 1
        sign = "+" if self.signed else ""
        return ["" if np.isnan(value) else _no_minus_zero(f"{value:{sign}.{digits}f}") for value in values]


def _no_minus_zero(text: str) -> str:
    return text.lstrip("+-") if not text.strip("+-0.") else text


def scale_for(values: Array, limits: tuple[float, float] | None = None, centre: float | None = None) -> Scale:
    """The scale of `values`.

    Parameters
    ----------
    values : array
    limits : (low, high), optional
        Its ends; for a diverging scale the farther one counts on both sides.
    centre : float, optional
        Value of the neutral colour of a diverging scale; without it, 0 where there are negative values, and else a
        sequential scale from 0.
    """
    finite = values[np.isfinite(values)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    if centre is None and low < 0:
        centre = 0.0
    if centre is None:
        low = low if limits else min(0.0, low)
        return Scale(low, high if high > low else low + 1.0, SEQUENTIAL)
    reach = max(abs(low - centre), abs(high - centre)) or 1.0
    return Scale(centre - reach, centre + reach, DIVERGING, signed=centre == 0)


def styled(element: Any, **options: Any) -> Any:
    """`element` with options of the Bokeh backend, which is registered here if it is not yet."""
    if "bokeh" not in hv.Store.loaded_backends():
        before = hv.Store.current_backend if hv.Store.loaded_backends() else "bokeh"
        import holoviews.plotting.bokeh  # noqa: F401  # registers itself, and makes itself the current backend

        hv.Store.set_current_backend(before)
    return element.opts(backend="bokeh", **{"default_tools": TOOLS, "active_tools": []} | options)


def overlay(parts: Iterable[Any], **options: Any) -> Any:
    """Elements on top of each other, in this order, as one figure; the legend, where there is one, below it."""
    legend = {"margin": 0, "padding": 4, "spacing": 6, "border_line_alpha": 0, "label_text_font_size": "12px"}
    below = {"legend_position": "bottom", "legend_opts": legend}
    return styled(hv.Overlay(list(parts)), **below | options)


def dimension(name: str, values: xr.DataArray, long_name: str | None = None) -> Any:
    """A HoloViews dimension with the label and the unit that the attributes of `values` give."""
    label = long_name or str(values.attrs.get("long_name", values.name or name))
    return hv.Dimension((name, label.removesuffix(", no intervention")), unit=unit_of(values))


def bar(label: str, width: int = 280) -> dict[str, Any]:
    """Options of a horizontal colour bar below a frame of `width` pixels; a long label takes several lines."""
    look = {"height": 10, "title_text_font_style": "normal", "title_text_font_size": "12px", "padding": 4}
    label = textwrap.fill(label, max(int(width / 6.6), 12))
    return {"colorbar_position": "bottom", "clabel": label, "colorbar_opts": look}


def hover(shown: Any, value: str, *rows: tuple[str, str]) -> dict[str, Any]:
    """Options for a tooltip: `rows`, then the value of `shown` (``"@score{0.00}"``) under its label, and its unit."""
    return {"tools": ["hover"], "hover_tooltips": [*rows, (shown.label, value), ("unit", shown.unit or "pure number")]}


def unit_of(values: xr.DataArray) -> str | None:
    """Unit, or None for a pure number."""
    unit = str(values.attrs.get("units", "1"))
    return None if unit in ("", "1") else unit


def head_name(layer: Any, head: Any) -> str:
    """``L5H1``."""
    return f"L{int(layer)}H{int(head)}"


def per_head(values: xr.DataArray, what: str) -> xr.DataArray:
    """`values` as ``(layer, head)``, its mean over examples taken; an error names any other dimension."""
    if "example" in values.dims:
        values = values.mean("example", keep_attrs=True)
    if set(values.dims) != {"layer", "head"}:
        extra = [str(dim) for dim in values.dims if dim not in ("layer", "head")]
        advice = (
            f"select one {extra[0]} first" if set(values.dims) > {"layer", "head"} else "draw others with hv.HeatMap"
        )
        raise DeclarationError(
            f"{what} draws (layer, head), and this has {choices(values.dims) or 'no dims'}: {advice}"
        )
    return values.transpose("layer", "head")


def numbers_of(values: xr.DataArray, dim: str) -> Array:
    """Coordinate of `dim`, counted from 0 where it has none."""
    return np.asarray(values[dim].values if dim in values.coords else np.arange(values.sizes[dim]))


def need(ds: xr.Dataset, what: str, *names: str) -> None:
    """Refuse a dataset that lacks what a picture is made of."""
    missing = [name for name in names if name not in ds]
    if missing:
        raise UnknownNameError(f"{what} needs {choices(names)}: this dataset has no {choices(missing)}")


def save(element: Any, path: str | os.PathLike[str]) -> Path:
    """Write a picture as one HTML file that opens without a network.

    Parameters
    ----------
    element : HoloViews element, overlay or layout
    path : str or path
        Ends in ``.html``.
    """
    target = check_writable(path)
    if target.suffix != ".html":
        raise DeclarationError(f"{target.name}: pictures are saved as .html")
    page = Page(target.stem)
    page.add("<main>")
    page.figure(element, target.stem)
    page.add("</main>")
    return write_beside(target, lambda beside: Path(beside).write_text(page.html(), encoding="utf-8"))
