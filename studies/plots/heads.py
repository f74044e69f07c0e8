"""Head grids and ranked heads: one number for each head of a model."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import DeclarationError
from ..storage.attributes import number_in
from .parts.dots import dots, intervals, reference, row_chart, rows_of, span_of
from .parts.few import marks_few
from .parts.inputs import array_of, dataset_of, names_of, per_head, places_of
from .parts.style import (
    BLUE,
    GREY,
    INK,
    by_role,
    cells,
    dimension,
    head_name,
    heat_map,
    hover,
    scale_for,
    styled,
    ticks,
    unit_of,
    write_in_cells,
)

WRITTEN = 64
"""Up to this many heads the value is written in each cell."""
TOP = 12
AS_ROW = 4
"""Head grids side by side in one row."""


def head_grid(
    values: xr.DataArray | xr.Dataset,
    *,
    limits: tuple[float, float] | None = None,
    centre: float | None = None,
    title: str = "",
    colorbar: bool = True,
) -> Any:
    """One cell for each head, layer 0 at the bottom, as the residual stream flows upward.

    Parameters
    ----------
    values : DataArray (layer, head), optionally with ``example``, or Dataset
        Averaged over examples. A Dataset of `measure` with one metric stands for the change of that metric. Label and
        unit come from its attributes, numbers of layers and heads from its coordinates; without them they count from 0.
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
        (its colour), ``unit``. Missing values are grey.

    Raises
    ------
    DeclarationError
        Where the array has other dimensions, such as ``ablation``: select one first.
    """
    grid = per_head(values, "head_grid")
    values = array_of(values, "head_grid", ("layer", "head"))
    if centre is None and str(values.name).startswith("effect_"):
        centre = 0.0
    scale = scale_for(grid.values, limits, centre)
    (layers, layer_names), (heads, head_names) = (places_of(grid, dim) for dim in ("layer", "head"))
    layer, head = (at.ravel() for at in np.meshgrid(layers, heads, indexing="ij"))
    flat = np.asarray(grid.values, dtype=float).ravel()
    columns = {
        "head": head,
        "layer": layer,
        "value": flat,
        "name": names_of_heads(grid),
        "text": scale.text(flat),
        "ink": scale.ink(flat),
        "unit": [unit_of(values) or "pure number"] * flat.size,
    }
    shown = dimension("value", values)
    written = flat.size <= WRITTEN
    cell = int(
        np.clip((280 if len(heads) <= 24 else 480) / len(heads), 30 if written else min(18, 400 // len(heads)), 42)
    )
    return styled(
        heat_map(columns, ["head", "layer"], [shown, "name", "text", "ink", "unit"]),
        **cells(scale, len(heads) * cell, len(layers) * cell, shown.pprint_label, colorbar),
        **hover(shown, "@value{0.0000}", ("head", "@name"), ("layer", "@layer"), ("number in the layer", "@head")),
        title=title,
        xticks=ticks(heads, head_names, cell * 0.7),
        yticks=ticks(layers, layer_names, cell),
        xlim=(heads[0] - 0.5, heads[-1] + 0.5),
        ylim=(layers[0] - 0.5, layers[-1] + 0.5),
        hooks=[write_in_cells(11 if cell > 32 else 10)] if written else [],
    )


def head_grids(values: xr.DataArray | xr.Dataset, dim: str, *, centre: float | None = None, title: str = "") -> Any:
    """A head grid for each value along `dim`, all on one colour scale.

    Parameters
    ----------
    values : DataArray (layer, head, `dim`), optionally with ``example``, or Dataset
        As for `head_grid`.
    dim : str
        Such as ``"ablation"``, ``"component"`` or ``"step"``.
    centre : float, optional
        As for `head_grid`.
    title : str
        Written after each value of `dim`.

    Returns
    -------
    holoviews.Layout
        A `head_grid` each; the last has the colour bar.
    """
    values = array_of(values, "head_grids", ("layer", "head", dim))
    if "example" in values.dims:
        values = values.mean("example", keep_attrs=True)
    if dim not in values.dims:
        return hv.Layout([head_grid(values, centre=centre, title=title.strip(" ,"))])
    if centre is None and str(values.name).startswith("effect_"):
        centre = 0.0
    scale = scale_for(values.values, centre=centre)
    names = names_of(values, dim)
    panels = []
    for number, name in enumerate(names):
        here, last = values.isel({dim: number}, drop=True), number == len(names) - 1
        limits = (scale.low, scale.high)
        panels.append(head_grid(here, limits=limits, centre=centre, title=f"{name}{title}", colorbar=last))
    return hv.Layout(panels).cols(3 if len(panels) != AS_ROW else AS_ROW)


def names_of_heads(grid: xr.DataArray) -> list[str]:
    """``L0H0``, ``L0H1``, ... of a ``(layer, head)`` array, layer by layer."""
    layers, heads = (grid[dim].values if dim in grid.coords else range(grid.sizes[dim]) for dim in ("layer", "head"))
    return [head_name(layer, head) for layer in layers for head in heads]


@marks_few
def ranked_heads(ds: xr.Dataset | xr.DataArray, score: str | None = None, *, top: int = TOP, title: str = "") -> Any:
    """The heads with the highest `score`, with what they are compared with.

    Parameters
    ----------
    ds : Dataset or DataArray
        ``<score>(layer, head[, example])``; where there are any: ``<score>_low`` and ``_high`` (interval),
        ``chance_<score>``, ``untrained_<score>``, ``role(layer, head)`` and the attribute ``threshold``.
    score : str, optional
        Needed for a dataset of several variables.
    top : int
        How many heads.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Points`` for each role (``score``, ``row``; name, role, interval), ``Segments`` for the intervals, and a
        ``Curve`` for chance, for the best untrained head and for the threshold.

    Raises
    ------
    UnknownNameError
        For a score that is not there.
    DeclarationError
        Where all values are missing, or the score has other dims.
    """
    ds, score = dataset_of(ds, "ranked_heads", score, change=True)
    mean = per_head(ds[score], "ranked_heads")
    order = np.argsort(-np.nan_to_num(np.ravel(mean.values).astype(float), nan=-np.inf), kind="stable")
    order = order[np.isfinite(np.ravel(mean.values)[order])][:top]
    if not len(order):
        raise DeclarationError(f"ranked_heads: {score} has no value that is not missing")
    every = names_of_heads(mean)
    names = [every[at] for at in order]
    rows = rows_of(names)
    value = np.ravel(mean.values).astype(float)[order]
    low, high = (_at(ds, f"{score}_{end}", order, value) for end in ("low", "high"))
    role = ["other"] * len(order)
    if "role" in ds:
        role = [str(one) for one in ds["role"].transpose("layer", "head").values.ravel()[order]]

    shown = dimension("score", ds[score])
    compared = _references(ds, score)
    parts = [reference(at, name, rows, shown, *look) for name, at, look in compared]
    parts.append(intervals(low, rows, high))
    for name, look, here in by_role(role):
        table = {"score": value[here], "row": rows[here], "name": [names[index] for index in here]}
        table |= {"role": [name] * len(here), "low": low[here], "high": high[here]}
        known = f"{score}_low" in ds
        text = "@score{0.000} (95%: @low{0.000} to @high{0.000})" if known else "@score{0.000}"
        tips = hover(shown, text, ("head", "@name"), ("role", "@role"))
        parts.append(dots(table, [shown, "row"], name, look, 9, **tips))
    ends = span_of([low, value, high, [at for _, at, _ in compared]], share=_is_share(ds[score]))
    height = 100 + 22 * len(names) + 22 * ((len(parts) + 1) // 2)
    legend = {"show_legend": "role" in ds or bool(compared)}
    return row_chart(parts, shown, names, width=520, height=height, xlim=ends, legend_cols=2, title=title, **legend)


def _is_share(values: xr.DataArray) -> bool:
    """Whether values are shares of 1, as attention scores are, so that the axis goes from 0 to 1."""
    finite = values.values[np.isfinite(values.values)]
    return unit_of(values) is None and bool(finite.size) and finite.min() >= 0 and 0.05 < finite.max() <= 1


def _at(ds: xr.Dataset, name: str, order: Any, otherwise: Any) -> Any:
    if name not in ds:
        return otherwise
    return np.ravel(per_head(ds[name], "ranked_heads").values).astype(float)[order]


def _references(ds: xr.Dataset, score: str) -> list[tuple[str, float, tuple[str, str]]]:
    """What a score is compared with: name, value, colour and dash."""
    found = []
    if f"chance_{score}" in ds:
        found.append(("chance", float(ds[f"chance_{score}"].mean()), (GREY, "dashed")))
    if f"untrained_{score}" in ds:
        found.append(("best untrained", float(ds[f"untrained_{score}"].max()), (BLUE, "dotted")))
    if (threshold := number_in(ds.attrs, "threshold")) is not None:
        found.append(("threshold", threshold, (INK, "solid")))
    return found
