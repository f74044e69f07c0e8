"""Activation patching of q, k and v: every head alone, and the induction heads together."""

from __future__ import annotations

import math
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import UnknownNameError, choices
from ...metrics.intervals import bootstrap_interval, ratio_interval
from .heads import head_grids
from .parts.dots import dots, intervals, reference, row_chart, rows_of
from .parts.few import marks_few
from .parts.inputs import names_of, need, need_dims
from .parts.style import BLUE, GREY, ORANGE, dimension, hover, styled

UNTOUCHED = {"noising": 1.0, "denoising": 0.0}
"""Normalised logit difference of a patch that changes nothing: the clean run's, and the corrupted run's."""


def qkv_grids(ds: xr.Dataset, direction: str) -> Any:
    """Normalised logit difference when q, k or v of one head is patched: three head grids on one scale.

    Parameters
    ----------
    ds : Dataset
        ``<direction>_normalized(component, layer, head)``: 0 is the corrupted run, 1 the clean one.
    direction : {"noising", "denoising"}

    Returns
    -------
    holoviews.Layout
        A `head_grid` for each component; the neutral colour is the value of a patch that changes nothing.
    """
    if direction not in UNTOUCHED:
        raise UnknownNameError(f"unknown direction {direction!r}: possible are {choices(UNTOUCHED)}")
    need(ds, "qkv_grids", f"{direction}_normalized")
    values = ds[f"{direction}_normalized"]
    need_dims(ds, "qkv_grids", {f"{direction}_normalized": ("component", "layer", "head")})
    return head_grids(values, "component", centre=UNTOUCHED[direction], title=f", {direction}")


@marks_few
def qkv_of_set(ds: xr.Dataset) -> Any:
    """Induction score and normalized logit difference when q, k or v of all induction heads is patched together.

    Parameters
    ----------
    ds : Dataset
        ``set_induction(component, example)``, ``clean_induction(example)`` and ``set_normalized(component)``; with
        ``set_logit_diff(component, example)`` and ``baseline_logit_diff(run, example)`` the latter gets an interval too
        (over examples, of the ratio of means).

    Returns
    -------
    holoviews.Layout
        Two overlays, one row for each of q, k and v: where the heads look, and what the model answers.
    """
    need(ds, "qkv_of_set", "set_induction", "clean_induction", "set_normalized")
    need_dims(ds, "qkv_of_set", {"set_induction": ("component", "example"), "set_normalized": ("component",)})
    ds = ds.assign_coords(component=names_of(ds, "component"))
    names = names_of(ds, "component")
    score, answer = ds["set_induction"].transpose("component", "example"), ds["set_normalized"].sel(component=names)
    clean = {"clean run": float(ds["clean_induction"].mean())}
    runs = {"clean run": 1.0, "corrupted run": 0.0}
    axis = dimension("answer", answer, "normalized logit difference")
    left = _panel(ds, score.mean("example").values, _interval(score.values), dimension("score", score), clean)
    right = _panel(ds, answer.values, _answer_interval(ds, answer.values), axis, runs)
    titled = (styled(left, title="where the heads look"), styled(right, title="what the model answers"))
    return hv.Layout(titled).cols(2)


def _interval(values: Any) -> tuple[Any, Any]:
    """Bootstrap interval; the mean itself where there are too few examples for one."""
    low, high = bootstrap_interval(np.asarray(values, dtype=float))
    mean = np.asarray(values, dtype=float).mean(-1)
    return np.where(np.isnan(low), mean, low), np.where(np.isnan(high), mean, high)


def _answer_interval(ds: xr.Dataset, otherwise: Any) -> tuple[Any, Any]:
    """Of the ratio of means; the ratio itself where there is none."""
    if "set_logit_diff" not in ds or "baseline_logit_diff" not in ds or not np.isfinite(otherwise).all():
        return otherwise, otherwise
    clean, corrupted = (ds["baseline_logit_diff"].sel(run=run).values.astype(float) for run in ("clean", "corrupted"))
    patched = ds["set_logit_diff"].transpose("component", "example").values - corrupted
    low, high = ratio_interval(patched, clean - corrupted)
    return np.where(np.isnan(low), otherwise, low), np.where(np.isnan(high), otherwise, high)


def _panel(ds: xr.Dataset, values: Any, interval: tuple[Any, Any], shown: Any, lines: dict[str, float]) -> Any:
    """A dot with its interval for each component, and a line for each value to compare with."""
    names = [str(name) for name in ds["component"].values]
    rows, (low, high) = rows_of(names), interval
    looks = ((BLUE, "solid"), (GREY, "dashed"))
    parts = [reference(at, name, rows, shown, *look) for (name, at), look in zip(lines.items(), looks, strict=False)]
    table = {shown.name: values, "row": rows, "component": names, "low": low, "high": high}
    tips = [("patched", "@component of all induction heads")]
    if "prediction" in ds:
        table["predicted"] = [str(text) for text in ds["prediction"].values]
        tips.append(("predicted", "@predicted"))
    value = f"@{shown.name}{{0.00}} (95%: @low{{0.00}} to @high{{0.00}})"
    parts.append(intervals(low, rows, high))
    parts.append(dots(table, [shown, "row"], "patched", (ORANGE, "circle"), 11, **hover(shown, value, *tips)))
    floor = min(0.0, *lines.values()) if len(lines) == 1 else -1.0
    ends = (min(floor, float(np.nanmin(low))) - 0.05, max(1.0, float(np.nanmax(high))) + 0.05)
    height = 238 + 26 * math.ceil((len(lines) + 1) / 2) + 26
    return row_chart(parts, shown, names, width=430, height=height, xlim=ends, legend_cols=2)
