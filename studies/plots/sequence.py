"""Along the sequence: metrics by position, and what heads attend to on one prompt."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import UnknownNameError, choices
from .base import BLUE, GREY, INK, ORANGE, WEIGHTS, Scale, dimension, hover, need, numbers_of, overlay, styled
from .heads import cells

LONGEST = 12
"""Characters of a token that an axis shows; hover shows all."""
RUNS = {"clean": (BLUE, "solid"), "corrupted": (ORANGE, "dashed")}


def by_position(ds: xr.Dataset, metric: str, *, title: str = "") -> Any:
    """Mean of a metric at each position with its interval, for every run; where the repeat starts is marked.

    Parameters
    ----------
    ds : Dataset
        ``<metric>([run,] [example,] position)``; where there are any, ``<metric>_low`` and ``_high``
        ``([run,] position)``, and the attribute ``repeat_starts``.
    metric : str
    title : str

    Returns
    -------
    holoviews.Overlay
        An ``Area`` (interval) and a ``Curve`` (``position``, ``mean``) for each run, and a ``VLine`` where the repeat
        starts.
    """
    need(ds, "by_position", metric)
    values = ds[metric]
    shown, position = dimension("mean", values), hv.Dimension("position")
    parts: list[Any] = []
    top = 0.0
    for run in values["run"].values if "run" in values.dims else [""]:
        here = ds.sel(run=run) if run else ds
        mean = here[metric].mean("example") if "example" in here[metric].dims else here[metric]
        known = np.isfinite(mean.values)
        ends = (here.get(f"{metric}_{end}", mean) for end in ("low", "high"))
        low, high = (end.values[known] for end in ends)
        at = numbers_of(mean, "position")[known]
        table = {"position": at, "mean": mean.values[known], "low": low, "high": high}
        colour, dash = RUNS.get(str(run), (INK, "dotted"))
        band = hv.Area((at, low, high), position, [shown, "high"])
        curve = hv.Curve(table, position, [shown, "low", "high"], label=str(run))
        value = "@mean{0.000} (95%: @low{0.000} to @high{0.000})"
        tips = hover(shown, value, ("run", str(run) or "the only one"), ("position", "@position"))
        parts.append(styled(band, color=colour, alpha=0.2, line_alpha=0))
        parts.append(styled(curve, color=colour, line_dash=dash, line_width=2, **tips))
        top = max(top, float(np.nanmax(high)))
    top = top if top > 0 else 1.0
    if "repeat_starts" in ds.attrs:
        start = float(ds.attrs["repeat_starts"])
        note = hv.Labels(([start], [top * 1.06], [" the repeat starts"]), [position, shown], "text")
        look = {"text_align": "left", "text_baseline": "bottom", "text_font_size": "11px", "text_color": INK}
        parts += [styled(hv.VLine(start), color=GREY, line_dash="dashed", line_width=1.5), styled(note, **look)]
    labels = {"xlabel": "position", "ylabel": shown.pprint_label}
    limits = (min(0.0, float(values.min())), top * 1.2)
    return overlay(parts, width=520, height=340, title=title, ylim=limits, legend_cols=2, **labels)


def attention(ds: xr.Dataset, shown: str, *, colorbar: bool = True) -> Any:
    """What one head attends to on a prompt: query tokens from top to bottom, key tokens from left to right.

    Parameters
    ----------
    ds : Dataset
        ``pattern(shown, query, key)``, ``token(position)``; where there are any, ``expected(shown, query)``, the key
        that each query should attend to (NaN for none), and ``kind(shown)``.
        Or the result of `headwise.capture`, of which the first example is drawn: select another with
        ``.isel(example=[3])``.
    shown : str
        Name of the head, such as ``"L1H2"``.
    colorbar : bool

    Returns
    -------
    holoviews.Overlay
        A ``HeatMap`` (``key``, ``query``; weight and tokens) and ``Rectangles`` around the expected keys. The
        weight of a key after the query is NaN: nothing can attend to it.
    """
    ds = _from_capture(ds, shown)
    need(ds, "attention", "pattern", "token")
    names = [str(name) for name in ds["shown"].values]
    if shown not in names:
        raise UnknownNameError(f"no pattern of {shown!r} is here: there are {choices(names)}")
    row = names.index(shown)
    pattern = ds["pattern"].isel(shown=row).transpose("query", "key")
    tokens = [str(token).strip() or repr(str(token)) for token in ds["token"].values]
    at = np.meshgrid(numbers_of(pattern, "query"), numbers_of(pattern, "key"), indexing="ij")
    query, key = (one.ravel() for one in at)
    table: dict[str, Any] = {
        "key": key,
        "query": query,
        "weight": np.where(key <= query, pattern.values.ravel(), np.nan),
    }
    table |= {name: [tokens[one] for one in ends] for name, ends in (("to_token", key), ("from_token", query))}
    weight = dimension("weight", ds["pattern"])
    side = len(tokens) * int(np.clip(280 / len(tokens), 12, 22))
    ends = (("query", "@from_token (position @query)"), ("key", "@to_token (position @key)"))
    grid = styled(
        hv.HeatMap(table, ["key", "query"], [weight, "to_token", "from_token"]),
        **cells(Scale(0.0, 1.0, WEIGHTS), side, side, weight.pprint_label, colorbar) | {"line_color": "#eeeeee"},
        **hover(weight, "@weight{0.000}", *ends),
    )
    boxes = styled(_boxes(ds, row), fill_alpha=0, line_color=ORANGE, line_width=2)
    short = [token if len(token) <= LONGEST else token[: LONGEST - 1] + "…" for token in tokens]
    axes = {axis: list(enumerate(short)) for axis in ("xticks", "yticks")}
    edges = (-0.5, len(tokens) - 0.5)
    return overlay(
        [grid, boxes],
        **axes,
        frame_width=side,
        frame_height=side,
        invert_yaxis=True,
        xrotation=90,
        xlabel="key token",
        ylabel="query token",
        xlim=edges,
        ylim=edges,
        title=f"{shown}{_in_boxes(ds, row)}",
    )


def _from_capture(ds: xr.Dataset, shown: str) -> xr.Dataset:
    """A captured pattern ``<shown>_pattern(example, query, key)`` of the first example, in the form drawn here."""
    name = f"{shown}_pattern"
    if "pattern" in ds or name not in ds or set(ds[name].dims) != {"example", "query", "key"}:
        return ds
    first = ds.isel(example=0)
    size = int(first[name].notnull().any("key").sum())
    span = {"query": slice(size), "key": slice(size)}
    pattern = first[name].isel(span).expand_dims(shown=[shown])
    return xr.Dataset(
        {"pattern": pattern.assign_attrs(long_name="attention")},
        coords={"token": ("position", first["token"].values[:size])},
    )


def _boxes(ds: xr.Dataset, row: int) -> Any:
    """Outlines of the expected cells, as rectangles around ``(key, query)``."""
    outlined = []
    if "expected" in ds:
        expected = ds["expected"].isel(shown=row)
        for query, key in zip(numbers_of(expected, "query").astype(float), expected.values, strict=True):
            if np.isfinite(key):
                outlined.append((key - 0.5, query - 0.5, key + 0.5, query + 0.5))
    return hv.Rectangles(outlined, ["left", "bottom", "right", "top"])


def _in_boxes(ds: xr.Dataset, row: int) -> str:
    """How much of its attention a head has in its boxes, in words."""
    if "expected" not in ds:
        return ""
    pattern, expected = ds["pattern"].isel(shown=row).transpose("query", "key"), ds["expected"].isel(shown=row).values
    boxed = np.flatnonzero(np.isfinite(expected))
    if not boxed.size:
        return ""
    share = pattern.values[boxed, np.searchsorted(numbers_of(pattern, "key"), expected[boxed])].mean()
    kind = f"{str(ds['kind'].values[row]).replace('_', '-')} boxes" if "kind" in ds else "the boxes"
    return f": {share:.0%} in {kind}"


def attention_row(ds: xr.Dataset, *, columns: int = 3) -> Any:
    """The patterns of all heads of a dataset side by side as a ``Layout``, see `attention`."""
    need(ds, "attention_row", "pattern", "token")
    names = [str(name) for name in ds["shown"].values]
    panels = [attention(ds, name, colorbar=name == names[-1]) for name in names]
    return hv.Layout(panels).cols(columns)
