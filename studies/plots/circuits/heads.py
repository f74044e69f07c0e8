"""How much of a behaviour sets of heads keep."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ..parts.dots import dots
from ..parts.inputs import need, need_dims
from ..parts.style import BLUE, GREY, ORANGE, dimension, hover, overlay, styled

WAYS = {
    "kept_by_score": ("by score", BLUE, "solid"),
    "kept_greedy": ("greedy", ORANGE, "dashed"),
}


def kept_by_heads(ds: xr.Dataset, *, title: str = "") -> Any:
    """The share of a behaviour that growing sets of heads keep, by score and greedily, beside random sets.

    Parameters
    ----------
    ds : Dataset
        The part ``nodes`` of a `CircuitStudy`'s result.
    title : str

    Returns
    -------
    holoviews.Overlay
        A ``Curve`` of each way; ``Points`` for random sets (``at``, ``value``), and for the sets that were found (with
        their heads); a line at the share that was to be kept.
    """
    ds = need(ds, "kept_by_heads", *WAYS, "random", "count", "heads", "faithfulness")
    need_dims(ds, "kept_by_heads", {**{name: ("size",) for name in WAYS}, "random": ("set", "draw")})
    across = hv.Dimension("at", label="heads that are kept, with all MLPs")
    shown = dimension("value", ds["faithfulness"], "share of the behaviour")
    at = np.asarray(ds["size"].values, dtype=float)
    parts: list[Any] = [styled(hv.HLine(float(ds.attrs.get("share", 1.0))), color=GREY, line_dash="dotted")]
    counts = np.asarray(ds["count"].values, dtype=float)
    random = np.asarray(ds["random"].transpose("set", "draw").values, dtype=float)
    places = np.repeat(counts, random.shape[1])
    _, first = np.unique(counts, return_index=True)  # both ways may find as many
    kept = np.isin(np.arange(len(counts)), first).repeat(random.shape[1])
    table = {"at": places[kept], "value": random.ravel()[kept]}
    tips = hover(shown, "@value{0.000}", (across.label, "@at"))
    parts.append(dots(table, [across, shown], "random sets", (GREY, "circle"), 5, alpha=0.6, **tips))
    values = [table["value"]]
    for name, (label, colour, dash) in WAYS.items():
        mean = np.asarray(ds[name].values, dtype=float)
        known = np.isfinite(mean)
        parts.append(
            styled(
                hv.Curve((at[known], mean[known]), across, shown, label=label),
                color=colour,
                line_dash=dash,
                line_width=2,
            )
        )
        values.append(mean[known])
    found = {
        "at": counts,
        "value": np.asarray(ds["faithfulness"].values, dtype=float),
        "heads": np.asarray([str(one) for one in ds["heads"].values], dtype=object),
    }
    tips = hover(shown, "@value{0.000}", ("heads", "@heads"), (across.label, "@at"))
    parts.append(dots(found, [across, shown], "smallest set", (ORANGE, "diamond"), 11, **tips))
    flat = np.concatenate([*values, [0.0, 1.0]])
    ends = (float(flat.min()) - 0.08, float(flat.max()) + 0.1)
    return overlay(
        parts,
        title=title,
        width=520,
        height=360,
        xlabel=across.label,
        ylabel=shown.pprint_label,
        ylim=ends,
        legend_cols=2,
    )
