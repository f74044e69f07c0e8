"""How induction forms: curves over the steps of training with the change marked, and when each curve changes."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import DeclarationError, choices
from ..dynamics.formation_changes import COMPOSED, REFERENCE
from .parts.dots import dots, row_chart, rows_of
from .parts.inputs import Array
from .parts.style import BLUE, GREY, INK, ORANGE, hover, overlay, styled
from .steps import axis_of, over_steps

PANELS = {
    "Scores of the best heads": ("previous_token", "further_back", REFERENCE, "induction"),
    "Composition with the induction head": [*COMPOSED][:4],
}
"""Curves of the main training that share a panel."""
COMPARED = {
    "behind": ("Attention behind the earlier copy", "attention"),
    "in_context": ("In-context-learning score", "difference of losses"),
    "repeat_loss": ("Loss on repeated tokens", "loss"),
    "repeat_accuracy": ("Accuracy on repeated tokens", "accuracy"),
}
"""Curves that are drawn for every training: title, and words of the axis."""


def formation(result: xr.DataTree, panel: str | None = None) -> Any:
    """The phase change in one figure, after Olsson et al. (2022): every curve, main training and controls.

    Parameters
    ----------
    result : DataTree
        Of a `FormationStudy`.
    panel : str, optional
        One panel alone: ``scores``, ``composition``, ``behind``, ``in_context``, ``repeat_loss`` or
        ``repeat_accuracy``.

    Returns
    -------
    holoviews.Layout, or an Overlay for one panel
        Means over seeds with 95% intervals over seeds against the step. Shaded: from 10% to
        90% of the change of attention behind the earlier copy in the main training; its change point is dashed.

    Raises
    ------
    DeclarationError
        `result` is of something else, or there is no such panel.

    References
    ----------
    Olsson et al. (2022), "In-context Learning and Induction Heads".
    """
    curves, changes = _parts(result)
    made = {}
    if "main" in curves["training"]:
        for key, (title, names) in zip(("scores", "composition"), PANELS.items(), strict=True):
            there = [
                name for name in names if name in curves and bool(curves[name].sel(training="main").notnull().any())
            ]
            if there:
                each = [_over_seeds(curves[name].sel(training="main", drop=True)) for name in there]
                labels = np.asarray([name.replace("_", " ") for name in there], dtype=object)
                values = xr.concat(each, xr.DataArray(labels, dims="curve", name="curve"), combine_attrs="drop")
                words = "score" if key == "scores" else "composition score"
                made[key] = (title, values.assign_attrs(long_name=words, units="1"))
    for name, (title, words) in COMPARED.items():
        values = _over_seeds(curves[name])
        made[name] = (title, values.assign_attrs(values.attrs | {"long_name": words}))
    if panel is not None and panel not in made:
        raise DeclarationError(f"there is no panel {panel!r}: possible are {choices(made)}")
    band = _band(changes)
    drawn = {key: _marked(values, title, band) for key, (title, values) in made.items() if panel in (None, key)}
    return drawn[panel] if panel is not None else hv.Layout(list(drawn.values())).cols(2)


def change_points(result: xr.DataTree, training: str = "main") -> Any:
    """When each curve of a training changes: each seed with its interval over prompts, and the mean over seeds.

    Parameters
    ----------
    result : DataTree
        Of a `FormationStudy`.
    training : str

    Returns
    -------
    holoviews.Overlay
        ``Points`` for seeds and means, ``Segments`` for intervals; across, the logarithm of the step.

    Raises
    ------
    DeclarationError
        `result` is of something else, there is no such training, or nothing changed in it.
    """
    curves, changes = _parts(result)
    if training not in changes["training"]:
        raise DeclarationError(f"there is no training {training!r}: possible are {choices(changes['training'].values)}")
    here = changes.sel(training=training)
    names = [str(name) for name in here["curve"].values if float(here["appeared"].sel(curve=name))]
    if not names:
        raise DeclarationError(f"no curve of the training {training!r} has a change point")
    here, rows = here.sel(curve=names), rows_of(names)
    shown = hv.Dimension("place", label="step of training")
    parts: list[Any] = []
    for seed in here["seed"].values:
        one = here.sel(seed=seed)
        parts += _dots(
            one, ("change_step", "change_low", "change_high"), rows - 0.22, names, shown, "each seed", BLUE, 6
        )
    parts += _dots(
        here, ("mean_step", "mean_low", "mean_high"), rows + 0.12, names, shown, "mean over seeds", ORANGE, 10
    )
    words = [fill(str(curves[name].attrs.get("long_name", name)), 28) for name in names]
    last = float(curves["step"].max())
    known = np.concatenate(
        [np.ravel(here[name].values) for name in ("change_low", "change_step", "mean_low", "mean_step")]
    )
    first = float(np.nanmin(known[known > 0]))
    ends = (np.log10(max(first / 1.6, 1.0)), np.log10(last * 1.05))
    ticks = [(np.log10(at), f"{at:g}") for at in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000)]
    look: dict[str, Any] = {"width": 860, "height": 110 + 46 * len(names), "legend_cols": 1, "show_legend": True}
    look |= {"xlim": ends, "xticks": [tick for tick in ticks if ends[0] <= tick[0] <= ends[1]]}
    return row_chart(parts, shown, words, **look)


def _parts(result: Any) -> tuple[xr.Dataset, xr.Dataset]:
    if not isinstance(result, xr.DataTree) or not {"curves", "changes"} <= {*result.children}:
        raise DeclarationError("this draws the result of a FormationStudy, a DataTree with curves and changes")
    return result["curves"].to_dataset(), result["changes"].to_dataset()


def _over_seeds(values: xr.DataArray) -> xr.DataArray:
    """A curve with seeds in the place of examples, so that intervals are over seeds."""
    mean = values.mean("example", keep_attrs=True) if "example" in values.dims else values
    return mean.rename(seed="example").rename(values.name)


def _band(changes: xr.Dataset) -> tuple[float, float, float] | None:
    """10%, 50% and 90% of the change of `REFERENCE` in the main training: steps, geometric means over seeds."""
    if "main" not in changes["training"]:
        return None
    here = changes.sel(training="main", curve=REFERENCE)
    if not float(here["appeared"]):
        return None
    begin, middle, end = (
        float(np.exp(np.nanmean(np.log(here[name].values)))) for name in ("begin_step", "change_step", "end_step")
    )
    return begin, middle, end


def of_seeds(drawn: Any) -> Any:
    """A figure of values whose examples are seeds, which says so where there are few."""
    look = hv.Store.lookup_options("bokeh", drawn, "plot").kwargs
    title = look["title"].replace(" prompts ", " seeds ")
    return overlay(list(drawn), **look | {"title": title, "legend_cols": 2})


def _marked(values: xr.DataArray, title: str, band: tuple[float, float, float] | None) -> Any:
    """A curve with the phase change marked."""
    drawn = of_seeds(over_steps(values.to_dataset(name="value"), "value", title=title))
    if band is None:
        return drawn
    steps = np.sort(values["step"].values.astype(float))
    begin, middle, end = _places(steps, np.asarray(band))
    span = styled(hv.VSpan(begin, end), color=GREY, alpha=0.18, line_alpha=0)
    line = styled(hv.VLine(middle), color=INK, line_dash="dashed", line_width=1)
    look = hv.Store.lookup_options("bokeh", drawn, "plot").kwargs
    return overlay([span, *drawn, line], **look)


def _places(steps: Array, at: Array) -> Array:
    """Where steps lie on the axis of `over_steps`."""
    place = axis_of(steps)
    if np.array_equal(place, steps):
        return np.clip(at, steps[0], steps[-1])
    found: Array = np.log10(np.clip(at, steps[steps > 0][0], steps[-1]))
    return found


def _dots(
    ds: xr.Dataset,
    names: tuple[str, str, str],
    rows: Array,
    curves: list[str],
    shown: Any,
    label: str,
    colour: str,
    size: float,
) -> list[Any]:
    """Change points with their intervals, a row for each curve."""
    step, low, high = (ds[name].values.astype(float) for name in names)
    known = np.isfinite(step)
    low, high = np.where(np.isfinite(low), low, step), np.where(np.isfinite(high), high, step)
    place, left, right = (np.log10(one[known]) for one in (step, low, high))
    segments = hv.Segments((left, rows[known], right, rows[known]), ["low", "row", "high", "row_high"])
    table = {"place": place, "row": rows[known], "step": step[known], "low_step": low[known], "high_step": high[known]}
    table["curve"] = [name.replace("_", " ") for name, there in zip(curves, known, strict=True) if there]
    text = "@step{0} (95%: @low_step{0} to @high_step{0})"
    points = dots(table, [shown, "row"], label, (colour, "circle"), size, **hover(shown, text, ("curve", "@curve")))
    return [styled(segments, color=colour, line_width=2), points]
