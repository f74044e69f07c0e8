"""Composition between heads, from the weights, and whether it matters: a matrix, a strip, a causal check."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...metrics.intervals import bootstrap_interval
from .parts.dots import dots, intervals, reference, row_chart, rows_of, spread
from .parts.few import marks_few
from .parts.inputs import names_of, need, need_dims
from .parts.pairs import pairs_of
from .parts.style import BLUE, GREY, ORANGE, PALE, cells, dimension, heat_map, hover, scale_for, styled

WHOLE, STRONGEST = 24, 16
"""Up to this many senders and receivers all are drawn; else this many."""
DOTS, HIGHEST = 600, 10
"""Of more pairs than this, so many are drawn, evenly chosen by rank, and the highest."""


def composition_matrix(
    ds: xr.Dataset | xr.DataArray,
    kind: str | None = None,
    *,
    variant: str = "folded",
    deviations: bool | None = None,
    heads: Collection[str] = (),
    title: str = "",
) -> Any:
    """Composition of every sender (columns) into every receiver (rows) of a later layer.

    Parameters
    ----------
    ds : Dataset
        ``composition([kind, variant,] sender_layer, sender_head, receiver_layer, receiver_head)``, NaN where the sender
        is not in an earlier layer; for deviations also ``floor_mean([kind])`` and ``floor_sd([kind])``.
    kind : {"q", "k", "v"}, optional
        Needed where there are several.
    variant : {"folded", "raw"}
        Whether LayerNorm is folded into the weights.
    deviations : bool, optional
        Draw the distance from the floor of random weights, in deviations of that floor, instead of the score; by
        default where that floor is known.
    heads : collection of str
        Heads (``"L1H2"``) that are always drawn. In a model with more than 24 senders or receivers these and the
        strongest are, 16 of each.
    title : str

    Returns
    -------
    holoviews.HeatMap
        ``sender_at``, ``receiver_at`` (places along the axes); ``value``, ``sender``, ``receiver``, ``score``.
    """
    found = pairs_of(ds, kind, variant=variant, deviations=deviations, what="composition_matrix")
    table, shown, kind = found.table, found.shown, found.kind
    senders, receivers = (_picked(table, side, heads) for side in ("sender", "receiver"))
    keep = [s in senders and r in receivers for s, r in zip(table["sender"], table["receiver"], strict=True)]
    sender, receiver = (np.asarray(table[side], dtype=object)[keep] for side in ("sender", "receiver"))
    score, value = table["score"][keep], table["value"][keep]
    columns: dict[str, Any] = {
        "sender_at": [senders[name] for name in sender],
        "receiver_at": [receivers[name] for name in receiver],
    }
    columns |= {"value": value, "sender": sender, "receiver": receiver, "score": score}
    cell = int(np.clip(360 / max(len(senders), len(receivers), 1), 18, 34))
    scale = scale_for(np.asarray(value, dtype=float), centre=0.0 if found.above else None)
    return styled(
        heat_map(columns, ["sender_at", "receiver_at"], [shown, "sender", "receiver", "score"]),
        **cells(scale, len(senders) * cell, len(receivers) * cell, shown.pprint_label),
        **hover(shown, "@value{0.00}", ("from", "@sender"), ("into", "@receiver"), ("score", "@score{0.000}")),
        title=title,
        xticks=[(place, name) for name, place in senders.items()],
        yticks=[(place, name) for name, place in receivers.items()],
        xrotation=90,
        xlabel="from (sender)",
        ylabel="into (receiver)",
    )


def _picked(table: dict[str, Any], side: str, always: Collection[str]) -> dict[str, int]:
    """Heads of one side to draw, each with its place, in the order of the model."""
    best: dict[str, float] = {}
    for name, score in zip(table[side], table["score"], strict=True):
        best[name] = max(best.get(name, -np.inf), score)
    names = list(best)
    if len(names) > WHOLE:
        names = sorted(names, key=lambda name: (name not in always, -best[name]))[:STRONGEST]
    return {name: place for place, name in enumerate(sorted(names, key=_place))}


def _place(name: str) -> tuple[float, float, str]:
    """Where a head stands in the order of the model."""
    found = re.fullmatch(r"L(\d+)H(\d+)", name)
    return (int(found[1]), int(found[2]), name) if found else (math.inf, 0, name)


def composition_strip(ds: xr.Dataset, *, variant: str = "folded", title: str = "") -> Any:
    """All pairs of heads by kind of composition, with the pairs from previous-token to induction heads marked.

    Parameters
    ----------
    ds : Dataset
        As for `composition_matrix`, with ``floor_mean`` and ``floor_sd``; ``pair_mean(kind)`` is marked where it is
        there. Of more than 600 pairs an even choice by rank is drawn, and the highest 10.
    variant : {"folded", "raw"}
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Rectangles`` (random weights: mean and two deviations), ``Points`` of the pairs and of the marked mean.
    """
    ds = need(ds, "composition_strip", "composition", "floor_mean", "floor_sd")
    need_dims(ds, "composition_strip", {"composition": ("kind",), "floor_mean": ("kind",), "floor_sd": ("kind",)})
    kinds = names_of(ds, "kind")
    ds = ds.assign_coords(kind=kinds)
    names = [kind.upper() for kind in kinds]
    rows, shown = rows_of(kinds), dimension("score", ds["composition"])
    pairs: dict[str, list[Any]] = {"score": [], "row": [], "sender": [], "receiver": [], "kind": []}
    for row, kind in zip(rows, kinds, strict=True):
        table = pairs_of(ds, kind, variant=variant, deviations=False, what="composition_strip").table
        keep = _thinned(table["score"])
        pairs["score"] += list(table["score"][keep])
        pairs["row"] += list(row + spread(len(keep), 0.5))
        pairs["kind"] += [kind.upper()] * len(keep)
        for side in ("sender", "receiver"):
            pairs[side] += [table[side][at] for at in keep]
    floor, sd = (np.asarray(ds[name].sel(kind=kinds).values, dtype=float) for name in ("floor_mean", "floor_sd"))
    band = hv.Rectangles((floor - 2 * sd, rows - 0.38, floor + 2 * sd, rows + 0.38), ["left", "bottom", "right", "top"])
    tips = hover(shown, "@score{0.000}", ("from", "@sender"), ("into", "@receiver"), ("kind", "@kind"))
    parts = [
        styled(band, color=PALE, line_color=GREY, line_dash="dotted"),
        dots(pairs, [shown, "row"], "a pair of heads", (BLUE, "circle"), 5, alpha=0.5, line_color=None, **tips),
    ]
    if "pair_mean" in ds:
        marked = {"score": ds["pair_mean"].sel(kind=kinds).values, "row": rows, "kind": names}
        extra = [("previous-token to induction heads", "@kind")]
        for name, words in (("pair_z", "deviations from random weights"), ("other_mean", "mean of the other pairs")):
            if name in ds:
                marked[name] = ds[name].sel(kind=kinds).values
                extra.append((words, f"@{name}{{0.00}}"))
        look, label = (ORANGE, "diamond"), "mean, previous-token to induction"
        parts.append(dots(marked, [shown, "row"], label, look, 14, **hover(shown, "@score{0.000}", *extra)))
    return row_chart(parts, shown, names, width=520, height=330, title=title, legend_cols=1)


def _thinned(scores: Any) -> Any:
    """Which pairs to draw: all, or the highest and every so-manieth by rank, which keeps the shape of the crowd."""
    if len(scores) <= DOTS:
        return np.arange(len(scores))
    order = np.argsort(-scores, kind="stable")
    evenly = np.linspace(0, len(order) - 1, DOTS).astype(int)
    return order[np.unique(np.concatenate([np.arange(HIGHEST), evenly]))]


@marks_few
def causal_check(ds: xr.Dataset, *, title: str = "") -> Any:
    """Induction score of the induction heads with and without the previous-token heads, against random heads.

    Parameters
    ----------
    ds : Dataset
        ``receiver_induction(example)``, ``ablated_induction(ablation, example)``,
        ``control_induction(ablation, control_draw)`` and, where it is there, ``p_induction(ablation)``.
    title : str

    Returns
    -------
    holoviews.Overlay
        A ``Curve`` at the score before, ``Points`` for random sets, and for the score without the previous-token heads.
    """
    ds = need(ds, "causal_check", "receiver_induction", "ablated_induction", "control_induction")
    wanted = {"ablated_induction": ("ablation", "example"), "control_induction": ("ablation", "control_draw")}
    need_dims(ds, "causal_check", wanted)
    methods = names_of(ds, "ablation")
    rows, shown = rows_of(methods), dimension("score", ds["receiver_induction"])
    axes = [shown, "row"]
    after = np.asarray(ds["ablated_induction"].transpose("ablation", "example").values, dtype=float)
    low, high = bootstrap_interval(after, bounds=(0, 1))
    control = np.asarray(ds["control_induction"].transpose("ablation", "control_draw").values, dtype=float)
    count = control.shape[1]
    places = np.concatenate([row - 0.22 + spread(count, 0.2) for row in rows])
    random = {"score": control.ravel(), "row": places, "method": [one for one in methods for _ in range(count)]}
    own = {"score": after.mean(1), "row": rows, "method": methods, "low": low, "high": high}
    tips = [("ablation", "@method")]
    others = hover(shown, "@score{0.000}", *tips, ("ablated", "random heads of those layers"))
    if "p_induction" in ds:
        own["p"] = ds["p_induction"].values
        tips.append(("p", "@p{0.000}"))
    value = "@score{0.000} (95%: @low{0.000} to @high{0.000})"
    words = ("without as many random heads", "without the previous-token heads")
    parts = [
        reference(float(ds["receiver_induction"].mean()), "before", rows, shown, BLUE, "solid"),
        dots(random, axes, words[0], (GREY, "circle"), 6, alpha=0.7, line_color=None, **others),
        intervals(low, rows, high),
        dots(own, axes, words[1], (ORANGE, "diamond"), 13, **hover(shown, value, *tips)),
    ]
    shape = {"width": 520, "height": 330, "xlim": (-0.03, 1.03), "legend_cols": 1}
    return row_chart(parts, shown, methods, middle=-0.1, title=title, **shape)
