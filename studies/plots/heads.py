"""Head grids and ranked heads: one number for each head of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from .base import (
    BLUE,
    GREY,
    INK,
    PALE,
    ROLES,
    Scale,
    bar,
    dimension,
    head_name,
    hover,
    need,
    numbers_of,
    per_head,
    scale_for,
    styled,
    unit_of,
)
from .rows import dots, intervals, reference, row_chart, rows_of

WRITTEN = 64
"""Up to this many heads the value is written in each cell."""
TOP = 12


def head_grid(
    values: xr.DataArray,
    *,
    limits: tuple[float, float] | None = None,
    centre: float | None = None,
    title: str = "",
    colorbar: bool = True,
) -> Any:
    """One cell for each head, layer 0 at the bottom, as the residual stream flows upward.

    Parameters
    ----------
    values : DataArray (layer, head), optionally with ``example``
        Averaged over examples. Label and unit come from its attributes.
    limits : (low, high), optional
        Ends of the colour scale, so that several grids can share one.
    centre : float, optional
        Value of the neutral colour of a diverging, symmetric scale. Without it the scale is sequential, or centred at
        0 where there are negative values or the array is an effect.
    title : str
    colorbar : bool

    Returns
    -------
    holoviews.HeatMap
        Dimensions ``head``, ``layer``; ``value``, ``name`` (``L1H2``), ``text`` (what is written in the cell), ``ink``
        (its colour), ``unit``.

    Raises
    ------
    DeclarationError
        Where the array has other dimensions, such as ``ablation``: select one first.
    """
    grid = per_head(values, "head_grid")
    if centre is None and str(values.name).startswith("effect_"):
        centre = 0.0
    scale = scale_for(grid.values, limits, centre)
    layers, heads = numbers_of(grid, "layer"), numbers_of(grid, "head")
    layer, head = (at.ravel() for at in np.meshgrid(layers, heads, indexing="ij"))
    flat = np.asarray(grid.values, dtype=float).ravel()
    columns = {
        "head": head,
        "layer": layer,
        "value": flat,
        "name": [head_name(*at) for at in zip(layer, head, strict=True)],
        "text": scale.text(flat),
        "ink": scale.ink(flat),
        "unit": [unit_of(values) or "pure number"] * flat.size,
    }
    shown = dimension("value", values)
    written = flat.size <= WRITTEN
    cell = int(np.clip(280 / len(heads), 30 if written else 18, 42))
    return styled(
        hv.HeatMap(columns, ["head", "layer"], [shown, "name", "text", "ink", "unit"]),
        **cells(scale, len(heads) * cell, len(layers) * cell, shown.pprint_label, colorbar),
        **hover(shown, "@value{0.0000}", ("head", "@name"), ("layer", "@layer"), ("number in the layer", "@head")),
        title=title,
        xticks=[(int(at), str(at)) for at in heads],
        yticks=[(int(at), str(at)) for at in layers],
        hooks=[_write_in_cells(11 if cell > 32 else 10)] if written else [],
    )


def cells(scale: Scale, width: int, height: int, label: str, colorbar: bool = True) -> dict[str, Any]:
    """Options of a heat map of `width` by `height` pixels: its scale, and a labelled colour bar below."""
    return {
        "cmap": list(scale.colours),
        "clim": (scale.low, scale.high),
        "clipping_colors": {"NaN": PALE},
        "frame_width": max(width, 160),
        "frame_height": height,
        "colorbar": colorbar,
        **bar(label, max(width, 160)),
        "line_color": "#ffffff",
        "line_width": 1,
        "padding": 0,
    }


def _write_in_cells(pixels: int) -> Callable[[Any, Any], None]:
    """Bokeh hook: write column ``text`` in colour ``ink`` into the cells."""

    def hook(plot: Any, element: Any) -> None:
        x, y = (dim.name for dim in element.kdims)
        look = {"text_align": "center", "text_baseline": "middle", "text_font_size": f"{pixels}px", "level": "overlay"}
        plot.state.text(x=x, y=y, text="text", text_color="ink", source=plot.handles["source"], **look)

    return hook


def ranked_heads(ds: xr.Dataset, score: str, *, top: int = TOP, title: str = "") -> Any:
    """The heads with the highest `score`, with what they are compared with.

    Parameters
    ----------
    ds : Dataset
        ``<score>(layer, head[, example])``; where there are any: ``<score>_low`` and ``_high`` (interval),
        ``chance_<score>``, ``untrained_<score>``, ``role(layer, head)`` and the attribute ``threshold``.
    score : str
    top : int
        How many heads.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Points`` for each role (``score``, ``row``; name, role, interval), ``Segments`` for the intervals, and a
        ``Curve`` for chance, for the best untrained head and for the threshold.
    """
    need(ds, "ranked_heads", score)
    mean = per_head(ds[score], "ranked_heads")
    order = sorted(np.ndindex(mean.shape), key=lambda at: -np.nan_to_num(float(mean.values[at]), nan=-np.inf))[:top]
    layers, heads = numbers_of(mean, "layer"), numbers_of(mean, "head")
    names = [head_name(layers[at[0]], heads[at[1]]) for at in order]
    rows = rows_of(names)
    value = np.array([float(mean.values[at]) for at in order])
    low, high = (_at(ds, f"{score}_{end}", order, value) for end in ("low", "high"))
    role = [str(ds["role"].transpose("layer", "head").values[at]) if "role" in ds else "other" for at in order]

    shown = dimension("score", ds[score])
    parts = [reference(at, name, rows, shown, *look) for name, at, look in _references(ds, score)]
    parts.append(intervals(low, rows, high))
    for name in dict.fromkeys([*(known for known in ROLES if known in role), *role]):
        here = [index for index, one in enumerate(role) if one == name]
        table = {"score": value[here], "row": rows[here], "name": [names[index] for index in here]}
        table |= {"role": [name] * len(here), "low": low[here], "high": high[here]}
        tips = hover(shown, "@score{0.000} (95%: @low{0.000} to @high{0.000})", ("head", "@name"), ("role", "@role"))
        parts.append(dots(table, [shown, "row"], name, ROLES.get(name, (INK, "hex")), 9, **tips))
    ends = (min(0.0, float(np.nanmin(low))) - 0.02, max(1.0, float(np.nanmax(high))) + 0.02)
    height = 100 + 22 * len(names) + 22 * ((len(parts) + 1) // 2)
    return row_chart(parts, shown, names, width=520, height=height, xlim=ends, legend_cols=2, title=title)


def _at(ds: xr.Dataset, name: str, order: list[tuple[int, ...]], otherwise: Any) -> Any:
    if name not in ds:
        return otherwise
    return np.array([float(ds[name].transpose("layer", "head").values[at]) for at in order])


def _references(ds: xr.Dataset, score: str) -> list[tuple[str, float, tuple[str, str]]]:
    """What a score is compared with: name, value, colour and dash."""
    found = []
    if f"chance_{score}" in ds:
        found.append(("chance", float(ds[f"chance_{score}"].mean()), (GREY, "dashed")))
    if f"untrained_{score}" in ds:
        found.append(("best untrained", float(ds[f"untrained_{score}"].max()), (BLUE, "dotted")))
    if "threshold" in ds.attrs:
        found.append(("threshold", float(ds.attrs["threshold"]), (INK, "solid")))
    return found
