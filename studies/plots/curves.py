"""Values with their intervals: as curves along the sequence or any other axis of numbers, or ranked by size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import DeclarationError
from ...metrics.intervals import bootstrap_interval
from ..measuring.effects import condition_names
from ..storage.attributes import json_in, number_in
from ..storage.registry import bounds_of
from .parts.dots import dots, intervals, reference, row_chart, rows_of, span_of
from .parts.few import marks_few
from .parts.inputs import array_of, dataset_of, listed, names_of, need, numbers_of
from .parts.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, dimension, hover, overlay, styled

RUNS = {"clean": (BLUE, "solid"), "corrupted": (ORANGE, "dashed")}
OTHERS = ((BLUE, "solid"), (ORANGE, "dashed"), (GREEN, "dotdash"), (PURPLE, "dotted"), (SKY, "dashdot"))
"""Colour and dash of curves: colour is never the only sign."""
TOP, LETTERS = 24, 44
"""How many conditions are drawn; letters of a name that are written, hover shows all."""
BINNED = ((BLUE, "circle"), (ORANGE, "diamond"), (GREEN, "square"), (PURPLE, "triangle"))
"""Colour and marker of values by bins."""


def by_position(ds: xr.Dataset | xr.DataArray, metric: str | None = None, *, title: str = "") -> Any:
    """Mean of a metric at each position with its interval, for every run; where the repeat starts is marked.

    Parameters
    ----------
    ds : Dataset or DataArray
        ``<metric>([run,] [example,] position)``; where there are any, ``<metric>_low`` and ``_high``
        ``([run,] position)``, and the attribute ``repeat_starts``. Without ends of an interval, it is the 95% bootstrap
        interval over examples.
    metric : str, optional
        Needed for a dataset of several variables.
    title : str
        What is measured, by default.

    Returns
    -------
    holoviews.Overlay
        An ``Area`` (interval) and a ``Curve`` (``position``, ``mean``) for each run, and a ``VLine`` where the repeat
        starts. Where a loss comes near that of a uniform guess, ``ln`` of the vocabulary, a dotted ``Curve`` shows it:
        the vocabulary is known from the attribute ``model_shape`` of a dataset that headwise measured.
    """
    return along(ds, metric, "position", curves="run", title=title)


@marks_few
def along(
    ds: xr.Dataset | xr.DataArray,
    name: str | None,
    dim: str,
    *,
    curves: str | None = None,
    title: str = "",
) -> Any:
    """Mean over examples along any axis of numbers, a curve for each value of another, with intervals.

    Parameters
    ----------
    ds : Dataset or DataArray
        ``<name>(dim[, curves][, example])`` and, where there are any, ``<name>_low`` and ``_high``.
    name : str, optional
    dim : str
        Drawn from left to right, such as ``position``, ``layer`` or ``step``.
    curves : str, optional
        A dim of a few values.
    title : str

    Returns
    -------
    holoviews.Overlay
        See `by_position`.

    Raises
    ------
    UnknownNameError
        For a variable that is not there.
    DeclarationError
        Where the variable lacks `dim`, or has other dims from which a value must be selected first.
    """
    what = f"by_{dim}"
    ds, name = dataset_of(ds, what, name)
    values = ds[name]
    others = {str(other) for other in values.dims} - {dim, "example", curves}
    if dim not in values.dims or others:
        advice = f"select one {sorted(others)[0]} first" if dim in values.dims else f"it has no {dim}"
        if dim == "position" and not {dim, "layer"} & {*values.dims} and "metric" in values.attrs:
            advice = "measure(..., per_position=True) gives it by position"
        wanted = f"([{curves},] [example,] {dim})" if curves else f"([example,] {dim})"
        raise DeclarationError(f"{what} draws {wanted}, and {name} has {listed(values.dims) or 'no dims'}: {advice}")
    shown, across = dimension("mean", values), hv.Dimension(dim)
    split = curves if curves in values.dims else None
    labels = names_of(values, split) if split else [""]
    parts: list[Any] = []
    ends = [0.0, 0.0]
    for number, label in enumerate(labels):
        here = ds.isel({split: number}) if split else ds
        mean, low, high, sure = interval_along(here, name, dim)
        known = np.isfinite(mean)
        low, high = (np.where(np.isfinite(end), end, mean)[known] for end in (low, high))
        at = numbers_of(values, dim)[known]
        table = {dim: at, "mean": mean[known], "low": low, "high": high}
        look = RUNS.get(label) or (OTHERS[number % len(OTHERS)] if label else (BLUE, "solid"))
        band = hv.Area((at, low, high), across, [shown, "high"])
        curve = hv.Curve(table, across, [shown, "low", "high"], label=label)
        value = "@mean{0.000} (95%: @low{0.000} to @high{0.000})" if sure else "@mean{0.000}"
        which = [(str(split), label)] if split else []
        tips = hover(shown, value, *which, (dim, f"@{{{dim}}}"))
        parts.append(styled(band, color=look[0], alpha=0.2, line_alpha=0))
        parts.append(styled(curve, color=look[0], line_dash=look[1], line_width=2, **tips))
        ends = [min([ends[0], *low]), max([ends[1], *high])]
    chance = _uniform_guess(ds, name) if dim == "position" else None
    near = chance is not None and bool(ends[1] >= chance[0] / 2)
    if chance is not None and near:
        at = numbers_of(values, dim)
        line = hv.Curve(([at.min(), at.max()], [chance[0]] * 2), across, shown, label=chance[1])
        parts.append(styled(line, color=GREY, line_dash="dotted", line_width=2))
        ends[1] = max(ends[1], chance[0])
    return _framed(parts, ds, dim, shown, ends, title, near or len(labels) > 1)


def _uniform_guess(ds: xr.Dataset, name: str) -> tuple[float, str] | None:
    """The loss of a model that gives every token the same probability, and its name; of another metric None."""
    size = json_in(ds.attrs, "model_shape", dict).get("vocabulary")
    if ds[name].attrs.get("metric") != "loss" or name.startswith("effect_") or not isinstance(size, int) or size < 2:
        return None
    return math.log(size), f"uniform guess, ln {size} = {math.log(size):.2f}"


def interval_along(ds: xr.Dataset, name: str, dim: str) -> tuple[Any, Any, Any, bool]:
    """Mean, low and high along `dim`, and whether the ends are known."""
    values = ds[name]
    whole = np.asarray(values.transpose(dim, ...).values, dtype=float)
    mean = whole
    if values.ndim > 1:
        counted = np.isfinite(whole).sum(-1)
        mean = np.where(counted, np.nansum(whole, -1) / np.maximum(counted, 1), np.nan)
    ends = _ends(ds, name, [dim])
    low, high = (mean, mean) if ends is None else ends
    return mean, low, high, ends is not None


def _ends(ds: xr.Dataset, name: str, dims: list[Any]) -> tuple[Any, Any] | None:
    """Ends of the intervals along `dims`: as stored, or else bootstrapped over examples; None where neither can be."""
    values = ds[name]
    stored = [ds[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in ds]
    if len(stored) == 2 and all(set(end.dims) == set(dims) for end in stored):
        low, high = (np.asarray(end.transpose(*dims).values, dtype=float) for end in stored)
        return low, high
    if values.ndim == len(dims) or values.sizes["example"] == 1:
        return None
    bounds = bounds_of(values) if not str(name).startswith("effect_") else (-math.inf, math.inf)
    return bootstrap_interval(np.asarray(values.transpose(*dims, "example").values, dtype=float), bounds=bounds)


def _framed(parts: list[Any], ds: xr.Dataset, dim: str, shown: Any, ends: list[float], title: str, legend: bool) -> Any:
    """The figure, with a line where the repeat starts."""
    top, low = ends[1] if ends[1] > ends[0] else ends[0] + 1.0, ends[0]
    reach = top - low
    start = number_in(ds.attrs, "repeat_starts")
    if dim == "position" and start is not None:
        across = hv.Dimension(dim)
        note = hv.Labels(([start], [top + 0.06 * reach], [" the repeat starts"]), [across, shown], "text")
        look = {"text_align": "left", "text_baseline": "bottom", "text_font_size": "11px", "text_color": INK}
        parts += [styled(hv.VLine(start), color=GREY, line_dash="dashed", line_width=1.5), styled(note, **look)]
    labels = {"xlabel": dim, "ylabel": shown.pprint_label}
    limits = (low - (0.06 * reach if low < 0 else 0.0), top + 0.2 * reach)
    return overlay(parts, width=520, height=340, title=title, ylim=limits, legend_cols=2, show_legend=legend, **labels)


@marks_few
def ranked_conditions(
    ds: xr.Dataset | xr.DataArray, name: str | None = None, *, top: int = TOP, title: str = ""
) -> Any:
    """Every condition with its value, the largest first, with a 95% interval over examples.

    Parameters
    ----------
    ds : Dataset or DataArray
        ``<name>(..., [example])`` with any other dims, such as ``condition``; ``<name>_low`` and ``_high`` without
        ``example`` where they are there, else the interval is bootstrapped from the examples.
    name : str, optional
        Needed for a dataset of several variables.
    top : int
        Of more conditions, so many with the values farthest from 0 are drawn.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Points`` (``value``, ``row``; name, interval), ``Segments`` for the intervals and a ``Curve`` at 0.

    Raises
    ------
    UnknownNameError
        For a variable that is not there.
    DeclarationError
        Where all values are missing, or are no numbers.
    """
    ds, name = dataset_of(ds, "ranked_conditions", name, change=True)
    values = array_of(ds[name], "ranked_conditions", ("condition",))
    where = [dim for dim in values.dims if dim != "example"]
    values = values.transpose(*where, ...)
    mean = values.mean("example", keep_attrs=True) if "example" in values.dims else values
    flat = np.ravel(mean.values).astype(float)
    known = np.flatnonzero(np.isfinite(flat))
    if not known.size:
        raise DeclarationError(f"ranked_conditions: {name} has no value that is not missing")
    far = known[np.argsort(-np.abs(flat[known]), kind="stable")][:top]
    order = far[np.argsort(-flat[far], kind="stable")]
    ends = _ends(ds, name, where)
    low, high = (np.where(np.isfinite(end), end, flat) for end in map(np.ravel, ends or (flat, flat)))
    whole = [str(one) for one in condition_names(mean).ravel()[order]]
    names = [one if len(one) <= LETTERS else one[: LETTERS - 1] + "…" for one in whole]
    rows, shown = rows_of(names), dimension("value", ds[name])
    table = {"value": flat[order], "row": rows, "name": whole, "low": low[order], "high": high[order]}
    text = "@value{0.0000} (95%: @low{0.0000} to @high{0.0000})" if ends else "@value{0.0000}"
    parts = [
        reference(0.0, "0", rows, shown, GREY, "solid"),
        intervals(low[order], rows, high[order]),
        dots(table, [shown, "row"], "conditions", (BLUE, "circle"), 9, **hover(shown, text, ("condition", "@name"))),
    ]
    if len(known) > len(order):
        title = f"{title}{': ' if title else ''}the {len(order)} of {len(known)} farthest from 0"
    letters = max(map(len, names))
    look = {"width": 380 + 7 * letters, "height": 90 + 24 * len(names), "show_legend": False}
    return row_chart(parts, shown, names, xlim=span_of([flat[order], low[order], high[order]]), title=title, **look)


def gains_by_bin(ds: xr.Dataset, names: Sequence[str] = ("gain", "net_gain"), *, title: str = "") -> Any:
    """Gains in bins of a distance, a number of candidates or a position, with intervals; hover tells the counts.

    Parameters
    ----------
    ds : Dataset
        ``<name>(bin)``, ``<name>_low``, ``<name>_high`` and ``count_<name>``, as in the parts ``distance``,
        ``candidates`` and ``position`` of a `TextInduction`'s result.
    names : sequence of str
        Which gains: ``gain``, ``causal_gain``, ``elsewhere``, ``net_gain``.
    title : str

    Returns
    -------
    holoviews.Overlay
        For each gain a ``Curve``, ``Segments`` for the intervals and ``Points`` (``bin``, ``value``; count).
    """
    wanted = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    ds = need(ds, "gains_by_bin", *wanted, *(f"count_{name}" for name in names))
    labels = [str(one) for one in ds["bin"].values]
    across = hv.Dimension("at", label=str(ds["bin"].attrs.get("long_name", "bin")))
    places, parts, spans = np.arange(len(labels), dtype=float), [], []
    for number, name in enumerate(names):
        shown = dimension("value", ds[name], "gain")
        value, low, high = (np.asarray(ds[f"{name}{end}"].values, dtype=float) for end in ("", "_low", "_high"))
        ends = [np.where(np.isfinite(end), end, value) for end in (low, high)]
        known, look = np.isfinite(value), BINNED[number % len(BINNED)]
        at = places + 0.12 * (number - (len(names) - 1) / 2)
        table = {"at": at, "value": value, "low": low, "high": high, "bin": labels, "count": ds[f"count_{name}"].values}
        table = {key: np.asarray(column)[known] for key, column in table.items()}
        text = "@value{+0.000} (95%: @low{+0.000} to @high{+0.000})"
        tips = hover(shown, text, (across.label, "@bin"), ("occurrences", "@count"))
        segments = hv.Segments((at[known], ends[0][known], at[known], ends[1][known]), ["at", "low", "at_high", "high"])
        parts += [
            styled(hv.Curve((at[known], value[known]), across, shown), color=look[0], alpha=0.4, line_width=1),
            styled(segments, color=look[0], line_width=2),
            dots(table, [across, shown], name.replace("_", " "), look, 9, **tips),
        ]
        reach = np.abs(value[known]).max(initial=0.0)  # an interval of few values may be many times as long
        spans += [value[known], *(np.clip(end[known], -reach, 2 * reach) for end in ends)]
    limits = span_of([*spans, np.zeros(1)])
    marks = {"xticks": list(zip(places.tolist(), labels, strict=True)), "xrotation": 45 if len(labels) > 6 else 0}
    shape = {"width": 460, "height": 360, "xlim": (-0.5, len(labels) - 0.5), "ylim": limits}
    zero = styled(hv.HLine(0.0), color=GREY, line_width=1)
    names_of_axes = {"xlabel": across.label, "ylabel": shown.pprint_label}
    return overlay([zero, *parts], title=title, legend_cols=2, **shape, **marks, **names_of_axes)
