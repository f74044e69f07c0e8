"""Values over the steps of training: as curves with intervals, and as a head grid with a slider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import DeclarationError
from .curves import OTHERS, interval_along
from .heads import head_grid
from .parts.few import marks_few
from .parts.inputs import Array, array_of, dataset_of, labels_of, listed, names_of, numbers_of, possible
from .parts.style import GREY, dimension, head_name, hover, overlay, scale_for, styled

TOP = 4
"""Curves with a colour and a name; more are grey."""
NEAREST = 0.06
"""Share of the axis that a written step takes."""


@marks_few
def over_steps(
    ds: xr.Dataset | xr.DataArray | xr.DataTree,
    variable: str | Sequence[str] | None = None,
    *,
    top: int = TOP,
    title: str = "",
) -> Any:
    """Mean over examples against the step of training, with 95% intervals: of each head, condition or run.

    Where steps are spaced by their logarithm, so is the axis, with step 0 at its left end.

    Parameters
    ----------
    ds : Dataset, DataArray or DataTree
        ``<variable>(step[, layer, head][, condition or another dim][, example])``, as `StudyCallback` and
        `over_checkpoints` give it.
    variable : str or sequence of str, optional
        Needed where there are several. Of a sequence, each gets a figure, two in a row.
    top : int
        Curves with a colour, a name and an interval: those with the largest mean (of changes: the farthest from 0) at
        any step. The others are grey.
    title : str

    Returns
    -------
    holoviews.Overlay, or a Layout of several
        For each curve with a name an ``Area`` (interval) and a ``Curve`` (``place`` on the axis; mean, low, high,
        step), for the others a ``Curve`` each.

    Raises
    ------
    UnknownNameError
        For a variable that is not there.
    DeclarationError
        Where the variable lacks ``step``, or has other dims from which a value must be selected first.

    Examples
    --------
    >>> study = hw.Sweep(hw.RepeatedTokens(n=5, length=8), metrics=["induction"])
    >>> formation = hw.over_checkpoints("words-2l", study, steps=[0, 256, 512, 2000])
    >>> len(hw.plots.over_steps(formation, "induction", top=2))  # 14 grey curves, 2 with intervals
    18
    """
    if variable is not None and not isinstance(variable, str):
        return hv.Layout([over_steps(ds, one, top=top, title=title) for one in variable]).cols(2)
    ds, name = dataset_of(ds, "over_steps", variable)
    values = array_of(ds[name], "over_steps", ("step",))
    if "step" in values.dims:
        values = values.isel(step=np.argsort(numbers_of(values, "step"), kind="stable"))
    lines = _lines(values, name)
    steps, place = names_of(values, "step"), axis_of(numbers_of(values, "step").astype(float))
    across, shown = hv.Dimension("place", label="step of training"), dimension("mean", values)
    drawn = {label: interval_along(one.to_dataset(name=name), name, "step") for label, one in lines.items()}
    order = sorted(drawn, key=lambda label: -np.nanmax(np.abs(drawn[label][0]), initial=0.0))
    named = [label for label in drawn if label in order[:top]]
    which = "head" if {"layer", "head"} <= {*values.dims} else "curve"
    parts: list[Any] = []
    for label in [*order[top:], *named]:
        mean, low, high, sure = drawn[label]
        known = np.flatnonzero(np.isfinite(mean))
        low, high = (np.where(np.isfinite(end), end, mean)[known] for end in (low, high))
        table = {"place": place[known], "mean": mean[known], "low": low, "high": high}
        table["step"] = [steps[at] for at in known]
        text = "@mean{0.000} (95%: @low{0.000} to @high{0.000})" if sure else "@mean{0.000}"
        tips = hover(shown, text, *([(which, label)] if label else []), ("step", "@step"))
        curve = hv.Curve(table, across, [shown, "low", "high", "step"], label=label if label in named else "")
        if label not in named:
            parts.append(styled(curve, color=GREY, line_width=1, alpha=0.45, **tips))
            continue
        colour, dash = OTHERS[named.index(label) % len(OTHERS)]
        band = hv.Area((place[known], low, high), across, [shown, "high"])
        parts.append(styled(band, color=colour, alpha=0.2, line_alpha=0))
        parts.append(styled(curve, color=colour, line_dash=dash, line_width=2, **tips))
    every = np.concatenate([end for part in parts for end in map(part.dimension_values, (1, 2))])
    ends = (min(0.0, *every), max(0.0, *every)) if every.size else (0.0, 1.0)
    reach = (ends[1] - ends[0]) or 1.0
    look: dict[str, Any] = {"ylim": (ends[0] - (0.06 * reach if ends[0] < 0 else 0.0), ends[1] + 0.08 * reach)}
    look |= {"xticks": _ticks(place, steps), "xlabel": "step of training", "ylabel": shown.pprint_label}
    return overlay(parts, width=520, height=340, title=title, legend_cols=4, show_legend=len(lines) > 1, **look)


def head_grid_over_steps(values: xr.DataArray | xr.Dataset, *, centre: float | None = None, title: str = "") -> Any:
    """A head grid with a slider for the step of training, all steps on one colour scale.

    ``plots.save(..., "formation.html")`` writes a page with the slider that opens without a network.

    Parameters
    ----------
    values : DataArray (step, layer, head), optionally with ``example``, or Dataset
        As for `head_grid`.
    centre : float, optional
        As for `head_grid`.
    title : str
        Written before each step.

    Returns
    -------
    holoviews.HoloMap
        A `head_grid` for each ``step``.

    Raises
    ------
    DeclarationError
        Where the array lacks ``step``, or has other dims.
    """
    values = array_of(values, "head_grid_over_steps", ("step", "layer", "head"))
    if "step" not in values.dims:
        raise DeclarationError(f"head_grid_over_steps draws (step, layer, head), and this has {listed(values.dims)}")
    if "example" in values.dims:
        values = values.mean("example", keep_attrs=True)
    if centre is None and str(values.name).startswith("effect_"):
        centre = 0.0
    scale = scale_for(values.values, centre=centre)
    front = f"{title}, " if title else ""
    grids = {}
    for number, step in enumerate(labels_of(values, "step")):
        here = values.isel(step=number, drop=True)
        limits = (scale.low, scale.high)
        grids[step.item()] = head_grid(here, limits=limits, centre=centre, title=f"{front}step {step}")
    return hv.HoloMap(grids, kdims=[hv.Dimension("step", label="step of training")])


def _lines(values: xr.DataArray, name: str) -> dict[str, xr.DataArray]:
    """The curves by their names, each ``(step[, example])``; one without a name where there is one only."""
    values = values.squeeze([dim for dim in values.dims if values.sizes[dim] == 1 and dim not in ("step", "example")])
    others = [str(dim) for dim in values.dims if dim not in ("step", "example")]
    if "step" not in values.dims:
        raise DeclarationError(
            f"over_steps draws what has a dim step, and {name} has {listed(values.dims) or 'no dims'}"
        )
    if others and {*others} != {"layer", "head"} and len(others) > 1:
        rest = next(dim for dim in others if dim not in ("layer", "head"))
        raise DeclarationError(
            f"over_steps draws ([layer, head,] [another dim,] [example,] step), and {name} has {listed(values.dims)}: "
            f"select one {rest} first, {possible(values, rest)}"
        )
    if {*others} == {"layer", "head"}:
        layers, heads = labels_of(values, "layer"), labels_of(values, "head")
        return {
            head_name(layer, head): values.isel(layer=at, head=place, drop=True)
            for at, layer in enumerate(layers)
            for place, head in enumerate(heads)
        }
    if not others:
        return {"": values}
    word = "" if values[others[0]].dtype.kind in "OUT" else f"{others[0]} "
    return {
        f"{word}{label}": values.isel({others[0]: at}, drop=True)
        for at, label in enumerate(names_of(values, others[0]))
    }


def axis_of(steps: Array) -> Array:
    """Where steps stand on an axis: by their logarithm where that spaces them more evenly, then 0 a tenth before them.

    Parameters
    ----------
    steps : array (step,)
        Ascending.

    Returns
    -------
    array (step,)
    """
    later = steps[steps > 0]
    if len({*later}) < 3 or _unevenness(np.log10(later)) >= _unevenness(later):
        return steps
    places = np.log10(np.maximum(steps, later[0]))
    made: Array = np.where(steps > 0, places, places[-1] - 1.1 * (places[-1] - places[0]))
    return made


def _unevenness(places: Array) -> float:
    gaps = np.diff(places)
    return float(gaps.std() / gaps.mean())


def _ticks(place: Array, steps: list[str]) -> list[tuple[float, str]]:
    """Steps that are written below the axis: the first and the last, and of the others those that have room."""
    apart = NEAREST * (place[-1] - place[0])
    kept = [0]
    for at in range(1, len(place) - 1):
        room = apart * (1 + len(steps[at]) / 3)
        if place[at] - place[kept[-1]] >= room and place[-1] - place[at] >= room:
            kept.append(at)
    kept += [len(place) - 1] if len(place) > 1 else []
    return [(float(place[at]), steps[at]) for at in kept]
