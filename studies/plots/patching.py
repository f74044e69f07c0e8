"""Activation patching: q, k and v of every head alone, of the induction heads together, and along single paths."""

from __future__ import annotations

import math
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import DeclarationError, UnknownNameError, choices
from ...interventions.declare.sites import Head
from ...metrics.intervals import bootstrap_interval, ratio_interval
from ..measuring.effects import effect, normalized
from .heads import head_grids
from .parts.dots import dots, intervals, reference, row_chart, rows_of
from .parts.few import marks_few
from .parts.inputs import dataset_of, names_of, need, need_dims, part_of, with_base
from .parts.style import BLUE, GREY, ORANGE, dimension, hover, styled

UNTOUCHED = {"noising": 1.0, "denoising": 0.0}
"""Normalised logit difference of a patch that changes nothing: the clean run's, and the corrupted run's."""


def qkv_grids(ds: xr.Dataset | xr.DataArray, direction: str | None = None, *, metric: str | None = None) -> Any:
    """What a patch of q, k or v of one head does: three head grids on one scale.

    Parameters
    ----------
    ds : Dataset or DataArray
        What `measure` gives for a grid of ``component``, ``layer`` and ``head``: drawn is the metric normalized, 0 for
        the corrupted run and 1 for the clean one, or its change where the two runs do not differ or one is not there.
        Or ``<direction>_normalized(component, layer, head)``, as in the part ``patching`` of an `InductionStudy`'s
        result; or an array with these dims.
    direction : {"noising", "denoising"}, optional
        Which way was patched; needed where `ds` does not say so, or holds both.
    metric : str, optional
        Needed where a measurement has several.

    Returns
    -------
    holoviews.Layout
        A `head_grid` for each component; the neutral colour is the value of a patch that changes nothing.

    Raises
    ------
    UnknownNameError
        For a direction or a metric that is not there.
    DeclarationError
        Where dims are missing, or a direction is needed.
    """
    if direction not in (None, *UNTOUCHED):
        raise UnknownNameError(f"unknown direction {direction!r}: possible are {choices(UNTOUCHED)}")
    values, direction = _patched(ds, direction, metric)
    title = f", {direction}" if direction else ""
    missing = [dim for dim in ("component", "layer", "head") if dim not in values.dims]
    if missing:
        has = choices(values.dims) or "no dims"
        raise DeclarationError(f"qkv_grids draws (component, layer, head), and {values.name or 'this'} has {has}")
    centre = UNTOUCHED.get(str(direction), 0.0) if "normalized" in str(values.name) else None
    return head_grids(values, "component", centre=centre, title=title)


def _patched(ds: Any, direction: str | None, metric: str | None) -> tuple[xr.DataArray, str | None]:
    """What to draw, and the direction, as far as it is known."""
    if isinstance(ds, xr.DataArray):
        if direction is None and str(ds.name).startswith("normalized_"):
            raise DeclarationError(f"qkv_grids: say which way was patched: {choices(map(repr, UNTOUCHED))}")
        return ds, direction
    names = {one: f"{one}_normalized" for one in UNTOUCHED}
    if isinstance(ds, xr.DataTree):
        ds = part_of(ds, "qkv_grids", names.get(str(direction), "noising_normalized"))
    stored = [one for one in UNTOUCHED if isinstance(ds, xr.Dataset) and names[one] in ds]
    if len(stored) > 1 and direction is None:
        raise DeclarationError(f"qkv_grids draws one direction: there are {choices(map(repr, stored))}")
    if stored:
        direction = direction or stored[0]
        return need(ds, "qkv_grids", names[direction])[names[direction]], direction
    ds, metric = dataset_of(ds, "qkv_grids", metric)
    ds = with_base(ds, metric, "qkv_grids")
    measured = str(ds.attrs.get("direction", ""))
    if measured in UNTOUCHED and direction not in (None, measured):
        raise UnknownNameError(f"this was measured by {measured}, not by {direction}")
    direction = measured if measured in UNTOUCHED else direction
    if direction and {"clean", "corrupted"} <= {*names_of(ds, "run")}:
        ratio = normalized(ds, metric)
        if np.isfinite(ratio).any():
            return ratio, direction
    return effect(ds, metric), direction


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
    ds = need(ds, "qkv_of_set", "set_induction", "clean_induction", "set_normalized")
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


def path_grids(ds: xr.Dataset) -> Any:
    """What path patching changes in the logit difference: a head grid of the senders for each end of the paths.

    Parameters
    ----------
    ds : Dataset
        ``path_logit_diff(path, sender[, example])``, with senders such as ``L0H3``, and ``path_baseline(run[,
        example])``, as in the part ``composition`` of an `InductionStudy`'s result.

    Returns
    -------
    holoviews.Layout
        A `head_grid` for paths into k, into q and into v, all on one colour scale; layers without a sender are left
        out, heads that send nothing are grey.

    Raises
    ------
    UnknownNameError
        Where a variable is missing.
    DeclarationError
        Where dims are missing, or a sender is no head.
    """
    ds = need(ds, "path_grids", "path_logit_diff", "path_baseline")
    need_dims(ds, "path_grids", {"path_logit_diff": ("path", "sender"), "path_baseline": ("run",)})
    runs = names_of(ds, "run")
    before = ds["path_baseline"].isel(run=runs.index("clean") if "clean" in runs else 0, drop=True)
    change = ds["path_logit_diff"] - before
    change = change.mean("example") if "example" in change.dims else change
    heads = [Head.parse(name) for name in names_of(ds, "sender")]
    layers, paths = sorted({head.layer for head in heads}), names_of(ds, "path")
    table = np.full((len(paths), len(layers), 1 + max(head.head for head in heads)), np.nan)
    for head, values in zip(heads, change.transpose("sender", "path").values, strict=True):
        table[:, layers.index(head.layer), head.head] = values
    told = ds["path_logit_diff"].attrs
    words = f"change in {str(told.get('long_name', 'logit difference')).partition(',')[0]}"
    grids = xr.DataArray(
        table,
        dims=("path", "layer", "head"),
        coords={"path": [f"into {path}" for path in paths], "layer": layers},
        attrs=told | {"long_name": words},
    )
    return head_grids(grids, "path", centre=0.0)
