"""What every picture shares: labels from attributes, colour scales, roles, rows. Imports HoloViews, never a model.

The Bokeh backend is registered by the first picture that is styled, not by an import.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr
from bokeh.palettes import Blues9, Viridis256, interp_palette

from .inputs import Array

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
NARROWEST, LINE_HEIGHT = 160, 12
"""Pixels: least width of a heat map, whose colour bar has a label; and of a line of tick labels."""
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

SEQUENTIAL = list(Viridis256)
WEIGHTS = list(interp_palette(("#ffffff", *reversed(Blues9)), 255))
DIVERGING = list(interp_palette(("#0b3c73", "#2f76b5", "#8fbfe0", "#f7f7f7", "#f5b878", "#d9731a", "#8a3a05"), 255))
"""Viridis; white to blue; blue, white, orange. All keep their order in grey and for colour-blind readers."""


@dataclass(frozen=True)
class ColourScale:
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


def scale_for(values: Array, limits: tuple[float, float] | None = None, centre: float | None = None) -> ColourScale:
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
    values = np.asarray(values, dtype=float)
    finite = values[np.isfinite(values)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    if centre is None and low < 0:
        centre = 0.0
    if centre is None:
        low = low if limits else min(0.0, low)
        return ColourScale(low, high if high > low else low + 1.0, SEQUENTIAL)
    reach = max(abs(low - centre), abs(high - centre)) or 1.0
    return ColourScale(centre - reach, centre + reach, DIVERGING, signed=centre == 0)


def by_role(roles: Sequence[str]) -> Iterator[tuple[str, tuple[str, str], list[int]]]:
    """Each role with its colour and marker, and the places that have it; roles of `ROLES` first."""
    for role in dict.fromkeys([*(known for known in ROLES if known in roles), *roles]):
        yield role, ROLES.get(role, (INK, "hex")), [at for at, one in enumerate(roles) if one == role]


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
    label = long_name or str(values.attrs.get("long_name") or str(values.name or name).replace("_", " "))
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
    return f"L{_short(layer)}H{_short(head)}"


def _short(label: Any) -> str:
    return str(int(label)) if isinstance(label, int | float | np.number) and float(label).is_integer() else str(label)


def ticks(places: Sequence[Any] | Array, names: Sequence[str], pixels: float) -> list[tuple[Any, str]]:
    """Where labels stand along an axis of cells `pixels` wide: at all of them, or at every second, fifth, tenth, ..."""
    step = next(step for step in STEPS if step * pixels >= LINE_HEIGHT or step == STEPS[-1])
    return [
        (place.item() if isinstance(place, np.generic) else place, name)
        for place, name in zip(places, names, strict=True)
    ][::step]


def heat_map(table: Mapping[str, Any], kdims: Sequence[Any], vdims: Sequence[Any]) -> Any:
    """A ``HeatMap`` of columns; text stays plain objects, since HoloViews cannot reshape the text type of pandas 3."""
    import pandas as pd

    columns = {
        name: pd.Series(list(values), dtype=object) if _is_text(values) else np.asarray(values)
        for name, values in table.items()
    }
    return hv.HeatMap(pd.DataFrame(columns), list(kdims), list(vdims))


def _is_text(values: Any) -> bool:
    return np.asarray(values).dtype.kind not in "biuf"


def cells(scale: ColourScale, width: int, height: int, label: str, colorbar: bool = True) -> dict[str, Any]:
    """Options of a heat map of `width` by `height` pixels: its scale, and a labelled colour bar below.

    Parameters
    ----------
    scale : ColourScale
    width, height : int
        Pixels of all cells together.
    label : str
        Of the colour bar.
    colorbar : bool

    Returns
    -------
    dict
        Options of the Bokeh backend.
    """
    return {
        "cmap": list(scale.colours),
        "clim": (scale.low, scale.high),
        "clipping_colors": {"NaN": PALE},
        "frame_width": max(width, NARROWEST),
        "frame_height": height,
        "colorbar": colorbar,
        **bar(label, max(width, NARROWEST)),
        "line_color": "#ffffff",
        "line_width": 1,
        "padding": 0,
    }


def write_in_cells(pixels: int) -> Callable[[Any, Any], None]:
    """Bokeh hook: write column ``text`` in colour ``ink`` into the cells."""

    def hook(plot: Any, element: Any) -> None:
        """Write the texts into the drawn cells."""
        x, y = (dim.name for dim in element.kdims)
        look = {"text_align": "center", "text_baseline": "middle", "text_font_size": f"{pixels}px", "level": "overlay"}
        plot.state.text(x=x, y=y, text="text", text_color="ink", source=plot.handles["source"], **look)

    return hook
