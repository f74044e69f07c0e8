"""What ablation costs: every head by three methods, zero against mean, and sets of heads against random sets."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import DeclarationError, UnknownNameError, choices
from ..measuring.effects import condition_names, effect
from .heads import head_grids, names_of_heads
from .parts.dots import (
    PLAIN,
    dots,
    equal_line,
    intervals,
    names_at,
    row_chart,
    rows_of,
    span_of,
    spread,
    square_ends,
    stand_out,
)
from .parts.few import marks_few
from .parts.inputs import dataset_of, names_of, need, per_head, possible, with_base, with_dims
from .parts.style import BLUE, GREY, ORANGE, SEQUENTIAL, SKY, bar, dimension, hover, overlay, styled, unit_of

ROWS = 12
"""Conditions of a measurement that are drawn against random sets."""
CONTROLS = {"same layers": (GREY, "circle"), "all layers": (SKY, "square")}


def ablation_grids(ds: xr.Dataset, metric: str | None = None) -> Any:
    """What every head's ablation changes, a head grid for each method, all on one colour scale.

    Parameters
    ----------
    ds : Dataset
        ``<metric>([ablation,] layer, head, example)`` and ``baseline_<metric>``, as `measure` gives them.
    metric : str, optional
        Needed where there are several.

    Returns
    -------
    holoviews.Layout
        A `head_grid` for each method; blue is below the run without intervention, orange above it.
    """
    ds, metric = _measured(ds, metric, "ablation_grids")
    return head_grids(effect(ds, metric), "ablation", centre=0.0, title=" ablation")


def _measured(ds: Any, metric: str | None, what: str) -> tuple[xr.Dataset, str]:
    """A measurement with its base, and the metric: the one that is named, or its only one."""
    ds, metric = dataset_of(ds, what, metric)
    return with_base(ds, metric, what), metric


def zero_against_mean(ds: xr.Dataset, metric: str | None = None, *, title: str = "") -> Any:
    """Each head's effect under zero ablation against its effect under mean ablation.

    Parameters
    ----------
    ds : Dataset
        As for `ablation_grids`, with the methods ``zero`` and ``mean``; ``constant_share(layer, head)``, where it is
        there, colours the dots.
    metric : str, optional
        Needed where there are several.
    title : str
        By default what the two axes measure.

    Returns
    -------
    holoviews.Overlay
        A ``Curve`` (equal effects), ``Points`` (``zero``, ``mean``; name, share) and ``Labels`` of heads that stand
        out.
    """
    ds, metric = _measured(ds, metric, "zero_against_mean")
    change = effect(ds, metric)
    known = names_of(change, "ablation") if "ablation" in change.dims else []
    if not {"zero", "mean"} <= set(known):
        raise UnknownNameError(
            f"zero_against_mean needs the ablations zero and mean: there are {choices(known) or 'none'}"
        )
    zero, mean = (
        per_head(change.isel(ablation=known.index(method), drop=True), "zero_against_mean")
        for method in ("zero", "mean")
    )
    names = names_of_heads(zero)
    x, y = (np.asarray(one.values, dtype=float).ravel() for one in (zero, mean))
    ends = square_ends(x, y)
    axes = [dimension(name, change, f"under {name} ablation") for name in ("zero", "mean")]
    equal = equal_line(ends, axes)

    table: dict[str, Any] = {"zero": x, "mean": y, "name": names}
    tips = [("head", "@name"), ("zero ablation", "@zero{+0.000}"), ("mean ablation", "@mean{+0.000}")]
    look: dict[str, Any] = {}
    if "constant_share" in ds:
        share = per_head(ds["constant_share"], "zero_against_mean")
        table["share"] = np.asarray(share.values, dtype=float).ravel()
        axes.append(dimension("share", share))
        tips.append(("constant share", "@share{0.00}"))
        look = {"color": "share", "cmap": SEQUENTIAL, "clim": (0.0, 1.0), "colorbar": True}
        look |= bar(axes[-1].pprint_label, 240)
    tips.append(("unit", unit_of(change) or "pure number"))
    points = dots(table, axes, "heads", (BLUE, "circle"), 9, tools=["hover"], hover_tooltips=tips, **look)
    labels = names_at(x, y, names, stand_out(x, y, names))
    title = title or str(change.attrs["long_name"])
    axis_labels = {"xlabel": axes[0].pprint_label, "ylabel": axes[1].pprint_label}
    size = {"width": 470, "height": 500, "show_legend": False, "xticks": 6, "xformatter": PLAIN, "yformatter": PLAIN}
    return overlay([equal, points, *labels], title=title, xlim=ends, ylim=ends, **axis_labels, **size)


@marks_few
def sets_against_null(ds: xr.Dataset, metric: str) -> Any:
    """What sets of heads cost when they are ablated together, against random sets of as many other heads.

    Parameters
    ----------
    ds : Dataset
        What `measure` gives with ``controls``. Or the part ``sets`` of an `InductionStudy`'s result:
        ``<metric>(set, ablation, example)`` and its baseline, ``control_<metric>(set, control, ablation, draw,
        example)``. Where there are any, also ``<metric>_effect_low`` and ``_high``, ``control_heads`` and
        ``p_<metric>``.
    metric : str

    Returns
    -------
    holoviews.Layout
        For each set an ``Overlay`` of ``Points``: a dot for each random set, a diamond for the set itself, with its
        interval. Of a measurement one overlay, with a row for each condition; of more than 12, those that change most.
    """
    if isinstance(ds, xr.Dataset) and f"{metric}_control" in ds:
        ds = _measured_sets(need(ds, "sets_against_null", metric, f"baseline_{metric}"), metric)
    ds = need(ds, "sets_against_null", metric, f"baseline_{metric}", f"control_{metric}")
    ds = with_base(ds, metric, "sets_against_null")
    own = effect(ds, metric)
    own = own.mean("example", keep_attrs=True) if "example" in own.dims else own
    control = ds[f"control_{metric}"]
    control = control.mean("example") if "example" in control.dims else control
    base = ds[f"baseline_{metric}"].sel(run=ds.attrs["base"], drop=True)
    base = base.mean("example") if "example" in base.dims else base
    alone = {"set": "these heads", "ablation": "ablated"}
    own = with_dims(own, alone)
    control = with_dims(control - base, alone | {"control": "random"})
    if "draw" not in control.dims:
        has = choices(ds[f"control_{metric}"].dims) or "no dims"
        raise DeclarationError(f"sets_against_null needs control_{metric}(draw, ...): this control_{metric} has {has}")
    for dim in own.dims:
        if dim not in alone:
            raise DeclarationError(f"sets_against_null: select one {dim} first, {possible(own, str(dim))}")
    beside = {name: with_dims(ds[name], alone) for name in ds.data_vars if str(name).startswith(f"{metric}_effect")}
    beside |= {name: with_dims(ds[name], alone | {"control": "random"}) for name in (f"p_{metric}",) if name in ds}
    beside |= {name: with_dims(ds[name], {"set": "these heads"}) for name in ("heads",) if name in ds}
    beside |= {
        name: with_dims(ds[name], {"set": "these heads", "control": "random"})
        for name in ("control_heads",)
        if name in ds
    }
    whole = xr.Dataset(beside | {"own": own, "control_change": control})
    whole = whole.assign_coords({dim: names_of(whole, dim) for dim in ("set", "ablation", "control")})
    ends = [whole[name].values.ravel() for name in whole if str(name).endswith(("_effect_low", "_effect_high"))]
    both = np.concatenate([own.values.ravel(), control.values.ravel(), [0.0], *ends])
    limits = span_of([both])
    panels = [_set_panel(whole.isel(set=at), metric, limits) for at in range(whole.sizes["set"])]
    wide = 354 if len(panels) > 1 else 520
    return hv.Layout([styled(panel, width=wide) for panel in panels]).cols(3)


def _measured_sets(ds: xr.Dataset, metric: str) -> xr.Dataset:
    """What `measure` gives with random sets, as one set with a row for each condition, the largest change first."""
    ds = with_base(ds, metric, "sets_against_null").rename({f"{metric}_control": f"control_{metric}"})
    change = effect(ds, metric).mean("example")
    if not change.dims:
        return ds
    order = np.argsort(-np.abs(change.values.ravel()), kind="stable")[:ROWS]
    apart = ds.drop_dims([dim for dim in ds.dims if dim not in (*change.dims, "example", "run", "control", "draw")])
    rows = apart.stack(row=change.dims).isel(row=order)
    rows = rows.drop_vars(["row", *map(str, change.dims)]).rename(row="ablation")
    return rows.assign_coords(ablation=condition_names(change).ravel()[order].astype(str))


def _set_panel(ds: xr.Dataset, metric: str, limits: tuple[float, float]) -> Any:
    """One set: a row for each method, the set itself above its controls."""
    own, control = ds["own"], ds["control_change"]
    methods = [str(method) for method in ds["ablation"].values]
    kinds = [str(kind) for kind in ds["control"].values]
    shown = dimension("change", own)
    axes = [shown, "row"]
    parts = [styled(hv.VLine(0.0), color=GREY, line_width=1)]
    for column, kind in enumerate(kinds):
        drawn = _control_dots(ds, control.sel(control=kind), kind, methods, 0.2 * (column + 1))
        if not drawn["row"]:
            continue
        tips = hover(shown, "@change{+0.000}", ("random heads", "@heads"), ("ablation", "@method"))
        look = CONTROLS.get(kind, (BLUE, "triangle"))
        parts.append(
            dots(
                drawn,
                axes,
                "random heads" if kind == "random" else f"random heads, {kind}",
                look,
                5,
                alpha=0.7,
                line_color=None,
                **tips,
            )
        )
    rows = rows_of(methods)
    values = np.asarray(own.sel(ablation=methods).values, dtype=float)
    ends = (f"{metric}_effect_{end}" for end in ("low", "high"))
    low, high = (np.asarray(ds[end].sel(ablation=methods).values) if end in ds else values for end in ends)
    table: dict[str, Any] = {"change": values, "row": rows, "method": methods, "low": low, "high": high}
    p_rows = []
    if f"p_{metric}" in ds:
        for column, kind in enumerate(kinds):
            table[f"p_{column}"] = ds[f"p_{metric}"].sel(control=kind, ablation=methods).values
            p_rows.append((f"p, {kind}", f"@p_{column}{{0.000}}"))
    name = str(ds["set"].values)
    who = ("heads", str(ds["heads"].values) if "heads" in ds else name)
    known = f"{metric}_effect_low" in ds
    value = "@change{+0.000} (95%: @low{+0.000} to @high{+0.000})" if known else "@change{+0.000}"
    parts.append(intervals(low, rows, high))
    tips = hover(shown, value, who, ("ablation", "@method"), *p_rows)
    parts.append(dots(table, axes, "these heads", (ORANGE, "diamond"), 13, **tips))
    tall = 142 + (66 if len(methods) <= 3 else 44) * len(methods)
    shape = {"height": tall, "xlim": limits, "ylim": (float(rows[-1]) - 0.65, 0.35), "legend_cols": 1}
    return row_chart(parts, shown, methods, middle=-0.2, title=name, **shape)


def _control_dots(
    ds: xr.Dataset, values: xr.DataArray, kind: str, methods: list[str], below: float
) -> dict[str, list[Any]]:
    """The change each random set makes, in its method's row; sets that were not drawn are left out."""
    table: dict[str, list[Any]] = {"change": [], "row": [], "heads": [], "method": []}
    names = ds["control_heads"].sel(control=kind) if "control_heads" in ds else None
    for row, method in enumerate(methods):
        here = np.asarray(values.sel(ablation=method).values, dtype=float).ravel()
        drawn, text = np.flatnonzero(np.isfinite(here)), names
        if text is not None:
            text = text.sel(ablation=method) if "ablation" in text.dims else text
        table["change"] += list(here[drawn])
        table["row"] += list(-row - below + spread(len(drawn), 0.13))
        table["heads"] += [f"draw {draw}" if text is None else str(text.values[draw]) for draw in drawn]
        table["method"] += [method] * len(drawn)
    return table
