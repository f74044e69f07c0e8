"""What heads write towards the answer, against how far their weights copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from .heads import names_of_heads
from .parts.dots import PLAIN, dots, names_at, span_of, stand_out
from .parts.inputs import names_of, need, need_dims, per_head
from .parts.style import BLUE, GREY, ORANGE, SKY, dimension, overlay

RANDOM = {"same layers": (GREY, "circle"), "all layers": (SKY, "square")}
"""Where random sets were drawn from, and how their dots look."""
NUMBERS = ("copying", "attribution")
"""Variables across and up."""
CLEAR = 0.1
"""Share of the largest value from which a head gets its name."""


def direct_and_copying(ds: xr.Dataset, *, title: str = "") -> Any:
    """What each head adds to the answer directly, against how far its OV circuit copies; and random sets of heads.

    Parameters
    ----------
    ds : Dataset
        The part ``attribution`` of an `InductionStudy`'s result: ``attribution(layer, head, example)`` and
        ``copying(layer, head)``. Where there are any, ``heads`` as text, whose dots are orange, their means
        ``set_attribution`` and ``set_copying``, and those of random sets, ``control_attribution(control, draw)``,
        ``control_copying`` and ``control_heads``.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Points`` (copying, logits) of the random sets, of the other heads, of the heads and of their mean, and
        ``Labels`` of heads that stand out.
    """
    ds = need(ds, "direct_and_copying", "attribution", "copying")
    direct, copying = (per_head(ds[name], "direct_and_copying") for name in ("attribution", "copying"))
    across, up = dimension("copying", copying), dimension("attribution", direct)
    names = np.asarray(names_of_heads(direct))
    x, y = (np.asarray(one.values, dtype=float).ravel() for one in (copying, direct))
    own = np.isin(names, str(ds["heads"].values).split() if "heads" in ds else [])
    numbers = [("share of positive eigenvalues", "@copying{0.00}"), (up.label, "@attribution{+0.000}")]
    numbers.append(("unit", up.unit or "pure number"))
    parts, beside = [], []
    if "control_attribution" in ds:
        wanted = dict.fromkeys(("control_attribution", "control_copying", "control_heads"), ("control", "draw"))
        need_dims(need(ds, "direct_and_copying", *wanted), "direct_and_copying", wanted)
        for control in names_of(ds, "control"):
            drawn = ds.isel(control=names_of(ds, "control").index(control))
            share, logits = (np.asarray(drawn[f"control_{name}"].values, dtype=float) for name in NUMBERS)
            kept = np.isfinite(logits) & np.isfinite(share)
            table: dict[str, Any] = {"copying": share[kept], "attribution": logits[kept]}
            beside.append(logits[kept])
            look = {"tools": ["hover"], "hover_tooltips": [("random heads, mean", "@heads"), *numbers]}
            table["heads"] = drawn["control_heads"].values[kept]
            label = f"random sets, {control}"
            colours = RANDOM.get(control, (SKY, "triangle"))
            parts.append(dots(table, [across, up], label, colours, 5, alpha=0.6, line_color=None, **look))
    for label, which, colour in (("other heads", ~own, BLUE), ("induction heads", own, ORANGE)):
        if which.any():
            table = {"copying": x[which], "attribution": y[which], "name": names[which]}
            look = {"tools": ["hover"], "hover_tooltips": [("head", "@name"), *numbers]}
            parts.append(dots(table, [across, up], label, (colour, "circle"), 9, **look))
    if "set_attribution" in ds and "set_copying" in ds:
        table = {"copying": [float(ds["set_copying"])], "attribution": [float(ds["set_attribution"])]}
        look = {"tools": ["hover"], "hover_tooltips": [("mean of", " ".join(names[own])), *numbers]}
        parts.append(dots(table, [across, up], "their mean", (ORANGE, "diamond"), 15, line_width=1.5, **look))
    named = [at for at in stand_out(x, y, list(names)) if own[at] or abs(y[at]) > CLEAR * np.abs(y).max()]
    labels = names_at(x, y, list(names), named)
    shape = {"width": 520, "height": 520, "xlim": span_of([x, 0.0, 1.0]), "ylim": span_of([y, 0.0, *beside])}
    unit = f" ({up.unit})" if up.unit else ""
    axes = {"xlabel": "share of positive eigenvalues of the OV circuit", "ylabel": f"added directly{unit}"}
    return overlay([*parts, *labels], title=title, legend_cols=1, yformatter=PLAIN, **shape, **axes)
