"""How much circuits of growing size keep, and how often each edge is chosen when prompts are drawn again."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ....errors import DeclarationError, choices
from ..parts.dots import dots, row_chart, rows_of
from ..parts.inputs import labels_of, need, need_dims, numbers_of
from ..parts.style import BLUE, GREY, ORANGE, dimension, hover, overlay, styled

LOOKS = ((BLUE, "solid", "circle"), (ORANGE, "dashed", "diamond"))
CONNECTED = "connected edges"
ENTRIES = 1000
"""Elements up to which a figure has a legend; HoloViews leaves it out beyond 25, fewer than the curves of 20 draws."""
TOP = 30
TICKS = (0.001, 0.01, 0.1, 1.0)
NAMED = {"signed": "signed selection", "abs": "absolute selection"}


def circuit_curve(ds: xr.Dataset, random: xr.Dataset | None = None, *, title: str = "") -> Any:
    """Faithfulness of circuits by their share of all edges, with intervals; random circuits of the same sizes behind.

    Parameters
    ----------
    ds : Dataset
        From `headwise.circuit_curve`: ``faithfulness([selection,] share or edges)``, ``cpr`` and ``cmd``.
    random : Dataset, optional
        The same of random circuits: ``faithfulness([kind,] draw, share or edges)``; of the kinds of a `CircuitStudy`,
        connected circuits are drawn.
    title : str
        CPR and CMD, by default; over numbers of edges, that it is by these.

    Returns
    -------
    holoviews.Overlay
        A ``Curve`` for each random draw; for each selection an ``Area`` (interval), and, in one entry of the
        legend, a ``Curve`` and ``Points`` (``at``, ``value``; number of edges, interval); lines at 0 and 1.

    Raises
    ------
    UnknownNameError, DeclarationError
        It is no such dataset.
    """
    ds = need(ds, "circuit_curve", "faithfulness", "cpr", "cmd")
    along = _along(ds)
    shown = dimension("value", ds["faithfulness"], "faithfulness")
    across = hv.Dimension("at", label="share of all edges" if along == "share" else "edges")
    at = numbers_of(ds["faithfulness"], along).astype(float)
    parts = [styled(hv.HLine(level), color=GREY, line_width=1, line_dash="dotted") for level in (0.0, 1.0)]
    reach = [0.0, 1.0]
    if random is not None:
        if "kind" in random.coords and "kind" in random.dims:
            random = random.sel(kind=CONNECTED)
        drawn = need(random, "circuit_curve", "faithfulness")["faithfulness"]
        need_dims(random, "circuit_curve", {"faithfulness": ("draw", along)})
        for number in range(drawn.sizes["draw"]):
            values = drawn.isel(draw=number).transpose(along).values
            label = "random circuits" if number == 0 else ""
            curve = hv.Curve((numbers_of(drawn, along).astype(float), values), across, shown, label=label)
            parts.append(styled(curve, color=GREY, alpha=0.5, line_width=1))
            reach += [*values]
    split = "selection" in ds["faithfulness"].dims
    for number, label in enumerate(labels_of(ds["faithfulness"], "selection") if split else [""]):
        here = ds.isel(selection=number) if split else ds
        values = np.asarray(here["faithfulness"].values, dtype=float)
        low, high = (
            np.asarray(here[f"faithfulness_{end}"].values, dtype=float) if f"faithfulness_{end}" in here else values
            for end in ("low", "high")
        )
        colour, dash, marker = LOOKS[number % len(LOOKS)]
        name = NAMED.get(str(label), str(label))
        table = {
            "at": at,
            "value": values,
            "low": low,
            "high": high,
            "edges": numbers_of(here["faithfulness"], "edges"),
        }
        text = "@value{0.000} (95%: @low{0.000} to @high{0.000})"
        tips = hover(shown, text, (across.label, "@at"), ("edges", "@edges"))
        parts += [
            styled(hv.Area((at, low, high), across, [shown, "high"]), color=colour, alpha=0.2, line_alpha=0),
            styled(hv.Curve((at, values), across, shown, label=name), color=colour, line_dash=dash, line_width=2),
            dots(table, [across, shown], name, (colour, marker), 7, **tips),
        ]
        reach += [*values, *low, *high]
    if not title and along == "edges":
        title = "by number of edges"
    elif not title and ds["cpr"].ndim == ds["cmd"].ndim == 0:
        title = f"CPR {float(ds['cpr']):.3f}, CMD {float(ds['cmd']):.3f}"
    axes: dict[str, Any] = {
        "xlabel": across.label,
        "ylabel": shown.pprint_label,
        "logx": True,
        "xlim": (at.min() * 0.8, 1.25 * at.max()),
    }
    ends = (float(np.nanmin(reach)) - 0.08, float(np.nanmax(reach)) + 0.12)  # of one prompt there are no intervals
    if along == "share":
        axes["xticks"] = [(share, f"{share:.1%}".replace(".0%", "%")) for share in TICKS if at.min() <= share]
    legend = {"show_legend": split or random is not None, "legend_cols": 2, "legend_limit": ENTRIES}
    return overlay(parts, title=title, width=520, height=360, ylim=ends, **axes, **legend)


def edge_inclusion(ds: xr.Dataset, *, top: int = TOP, title: str = "") -> Any:
    """How often each edge is chosen when prompts are drawn again, the most often first.

    Parameters
    ----------
    ds : Dataset
        From `headwise.edge_inclusion`: ``inclusion(edge)`` and ``in_circuit(edge)``.
    top : int
        Of more edges, so many; those that are never chosen are left out.
    title : str
        The Jaccard overlap, by default.

    Returns
    -------
    holoviews.Overlay
        ``Points`` (``value``, ``row``; edge, score) of edges in the circuit of all prompts, and of others.

    Raises
    ------
    UnknownNameError, DeclarationError
        It is no such dataset, or no edge is ever chosen.
    """
    ds = need(ds, "edge_inclusion", "inclusion", "in_circuit")
    need_dims(ds, "edge_inclusion", {"inclusion": ("edge",), "in_circuit": ("edge",)})
    often = np.asarray(ds["inclusion"].values, dtype=float)
    order = np.argsort(-often, kind="stable")
    order = order[often[order] > 0]
    if not len(order):
        raise DeclarationError("edge_inclusion draws edges that are chosen: none is")
    if not title:
        title = f"Jaccard overlap {float(ds['jaccard']):.2f}" if "jaccard" in ds else ""
    if len(order) > top:
        title = f"{title}{': ' if title else ''}{top} of {len(order)} edges that are ever chosen"
    order = order[:top]
    names = [f"{ds['sender'].values[at]}->{ds['receiver'].values[at]}" for at in order]
    rows, shown = rows_of(names), dimension("value", ds["inclusion"])
    inside = ds["in_circuit"].values.astype(bool)[order]
    parts = []
    for label, marks, here in (
        ("in the circuit of all prompts", (BLUE, "circle"), inside),
        ("not in it", (ORANGE, "diamond"), ~inside),
    ):
        table = {"value": often[order][here], "row": rows[here], "edge": np.asarray(names, dtype=object)[here]}
        if here.any():
            parts.append(
                dots(table, [shown, "row"], label, marks, 9, **hover(shown, "@value{0.000}", ("edge", "@edge")))
            )
    letters = max(map(len, names))
    look: dict[str, Any] = {
        "width": 380 + 7 * letters,
        "height": 110 + 22 * len(names),
        "xlim": (-0.03, 1.05),
        "title": title,
    }
    return row_chart(parts, shown, names, **look)


def _along(ds: xr.Dataset) -> str:
    """The dim along which circuits grow."""
    dims = {*map(str, ds["faithfulness"].dims)} - {"selection"}
    if dims not in ({"share"}, {"edges"}):
        raise DeclarationError(
            "circuit_curve draws faithfulness([selection,] share or edges): this has "
            f"{choices(ds['faithfulness'].dims) or 'no dims'}; select one of the others first"
        )
    return dims.pop()
