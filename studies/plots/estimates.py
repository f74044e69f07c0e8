"""Estimates from gradients against what was measured exactly."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...metrics.statistics import rank_correlation
from ..measuring.effects import condition_names
from .parts.dots import PLAIN, dots, equal_line, names_beside, square_ends
from .parts.inputs import labels_of, names_of, need, need_dims
from .parts.style import BLUE, GREEN, ORANGE, PALE, PURPLE, SKY, dimension, overlay, styled, unit_of

LOOKS = ((BLUE, "circle"), (ORANGE, "diamond"), (GREEN, "triangle"), (PURPLE, "square"), (SKY, "inverted_triangle"))
NAMED = 5
"""How many of the worst misses are named."""
WIDE = 42
"""Letters of an axis label that fit on a narrow screen."""


def estimate_against_exact(ds: xr.Dataset) -> Any:
    """Each condition's estimated effect against its exact one, a panel for each estimator.

    Parameters
    ----------
    ds : Dataset
        ``exact(axes...)`` and ``estimate(estimator, axes...)``, as `compare_estimates` gives them;
        ``rank_correlation(estimator)``, where it is not there, is computed.

    Returns
    -------
    holoviews.Layout
        For each estimator an ``Overlay``: a ``Curve`` (estimate equals exact), ``Points`` (``exact``, ``estimate``;
        name, miss, and each axis), for each value of the first axis of text where there is one (such as ``ablation``),
        and ``Labels`` of the 5 worst misses that are not on top of each other. All panels have the same axes.
    """
    ds = need(ds, "estimate_against_exact", "exact", "estimate")
    need_dims(ds, "estimate_against_exact", {"estimate": ("estimator", *map(str, ds["exact"].dims))})
    exact = ds["exact"]
    estimate = ds["estimate"].transpose("estimator", *exact.dims)
    ends = square_ends(exact.values, estimate.values, 0.0)
    panels = [_panel(ds, exact, estimate, number, ends) for number in range(estimate.sizes["estimator"])]
    return hv.Layout(panels).cols(2)


def _panel(ds: xr.Dataset, exact: xr.DataArray, estimates: xr.DataArray, number: int, ends: tuple[float, float]) -> Any:
    table = _table(exact, estimates.isel(estimator=number))
    x, y, miss, names = (table[column] for column in ("exact", "estimate", "miss", "name"))
    axes = [dimension("exact", exact), dimension("estimate", estimates)]
    equal = equal_line(ends, axes)
    parts = [styled(line(0.0), color=PALE, line_width=1) for line in (hv.VLine, hv.HLine)]
    parts.append(equal)
    asked = [("condition", "@name"), *((str(dim), f"@{{{dim}}}") for dim in exact.dims)]
    values = [("exact", "@exact{+0.000}"), ("estimate", "@estimate{+0.000}"), ("estimate - exact", "@miss{+0.000}")]
    tips = {"tools": ["hover"], "hover_tooltips": [*asked, *values, ("unit", unit_of(exact) or "pure number")]}
    kinds = _kinds(exact, table)
    for kind, look in zip(dict.fromkeys(kinds), LOOKS, strict=False):
        here = [at for at, one in enumerate(kinds) if one == kind]
        rows = {name: np.asarray(column)[here] for name, column in table.items()}
        parts.append(dots(rows, axes, kind, look, 9, alpha=0.85, **tips))
    worst = np.argsort(-np.abs(miss), kind="stable")[:NAMED]  # missing values are sorted to the end
    parts += names_beside(x, y, names, [int(at) for at in worst if abs(miss[at]) > 0], ends)
    stored = ds["rank_correlation"].values[number] if "rank_correlation" in ds else None
    correlation = rank_correlation(y, x) if stored is None else float(stored)
    said = "none" if np.isnan(correlation) else f"{correlation:.2f}"
    title = f"{names_of(ds, 'estimator')[number]}: rank correlation {said}"
    labels = {"xlabel": _in_lines(axes[0].pprint_label), "ylabel": _in_lines(axes[1].pprint_label)}
    columns = max(1, min(4, 40 // (max(map(len, (equal.label, *kinds))) + 4)))
    size = {
        "width": 500,
        "height": 540,
        "xticks": 6,
        "yticks": 6,
        "legend_cols": columns,
        "xformatter": PLAIN,
        "yformatter": PLAIN,
    }
    return overlay(parts, title=title, xlim=ends, ylim=ends, **labels, **size)


def _in_lines(label: str) -> str:
    """An axis label in lines of even length that a narrow screen holds."""
    lines = math.ceil(len(label) / WIDE)
    return textwrap.fill(label, math.ceil(len(label) / lines) + 6, break_on_hyphens=False)


def _table(exact: xr.DataArray, estimate: xr.DataArray) -> dict[str, Any]:
    """Columns, one row for each condition."""
    x, y = (np.asarray(one.values, dtype=float).ravel() for one in (exact, estimate))
    grids = np.meshgrid(*(labels_of(exact, str(dim)) for dim in exact.dims), indexing="ij")
    labels = {str(dim): grid.ravel() for dim, grid in zip(exact.dims, grids, strict=True)}
    return labels | {"exact": x, "estimate": y, "miss": y - x, "name": condition_names(exact).ravel()}


def _kinds(exact: xr.DataArray, table: dict[str, Any]) -> list[str]:
    """What tells the points of a grid apart by colour: its first axis of text, where that has few values."""
    for dim in exact.dims if exact.ndim > 1 else ():
        labels = table[str(dim)]
        if all(isinstance(label, str) for label in labels) and exact.sizes[dim] <= len(LOOKS):
            return [str(label) for label in labels]
    return ["conditions"] * exact.size
