"""Words in context: which answers survive without the induction heads, and whether the same heads fire."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from .heads import names_of_heads
from .parts.dots import dots, names_beside, row_chart, rows_of
from .parts.inputs import need, per_head
from .parts.style import BLUE, GREEN, GREY, INK, ORANGE, by_role, dimension, hover, overlay, styled

LOOKS = {"zero": (ORANGE, "diamond"), "mean": (GREEN, "triangle")}
NAMED, AWAY, NEAR, CROWD = 12, 0.12, 0.05, 3
"""Heads that are named at most; how far from where most heads are; and of how many at most that are so near."""
TEXTS = ("prompt", "answer", "guess")


def words_table(ds: xr.Dataset) -> Any:
    """One row for each word list: prompt, answer, and the answer's probability and rank.

    Parameters
    ----------
    ds : Dataset
        ``prompt``, ``answer``, ``prob`` ``(example)``; where there are any, ``rank`` and ``guess`` ``(example)`` and
        ``ablated_prob(ablation, example)``.

    Returns
    -------
    holoviews.Table
    """
    ds = need(ds, "words_table", "prompt", "answer", "prob")
    texts: dict[str, Any] = {name: [str(text) for text in ds[name].values] for name in TEXTS if name in ds}
    numbers = {name: np.asarray(ds[name].values, dtype=float) for name in ("prob", "rank") if name in ds}
    for method in ds["ablation"].values if "ablated_prob" in ds else ():
        numbers[f"prob, {method} ablation"] = np.asarray(ds["ablated_prob"].sel(ablation=method).values, dtype=float)
    return hv.Table(texts | numbers, list(texts), list(numbers))


def words_grid(ds: xr.Dataset, *, title: str = "") -> Any:
    """Probability of the right next word in each list, with the induction heads and without them.

    Parameters
    ----------
    ds : Dataset
        ``prob(example)``, ``prompt``, ``answer``; ``ablated_prob(ablation, example)`` where there were heads to ablate.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Points`` for the model as it is and for each ablation, joined by ``Segments``, one row for each list.
    """
    ds = need(ds, "words_grid", "prob", "prompt", "answer")
    prompts, answers = ([str(text) for text in ds[name].values] for name in ("prompt", "answer"))
    names = [f"{(prompt.split() or [''])[-1]} → {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    rows, shown = rows_of(prompts), dimension("prob", ds["prob"])
    runs: dict[str, tuple[Any, tuple[str, str]]] = {"all heads": (ds["prob"].values, (BLUE, "circle"))}
    for method in ds["ablation"].values if "ablated_prob" in ds else ():
        values = ds["ablated_prob"].sel(ablation=method).values
        runs[f"induction heads: {method} ablation"] = (values, LOOKS.get(str(method), (INK, "square")))
    every = np.stack([np.asarray(values, dtype=float) for values, _ in runs.values()])
    joins = hv.Segments((every.min(0), rows, every.max(0), rows), ["low", "row", "high", "row_high"])
    parts = [styled(joins, color=GREY, line_width=1)]
    tips = hover(shown, "@prob{0.000}", ("prompt", "@prompt"), ("right word", "@answer"), ("run", "@heads"))
    for (name, (_, look)), values in zip(runs.items(), every, strict=True):
        table = {"prob": values, "row": rows, "prompt": prompts, "answer": answers, "heads": [name] * len(prompts)}
        parts.append(dots(table, [shown, "row"], name, look, 10, **tips))
    shape: dict[str, Any] = {"width": 560, "height": 160 + 24 * len(prompts), "xlim": (-0.03, 1.03), "legend_cols": 1}
    return row_chart(parts, shown, names, title=title, **shape)


def words_agreement(
    ds: xr.Dataset, heads_ds: xr.Dataset, *, name: str = "prefix_matching", where: str = "words", title: str = ""
) -> Any:
    """Each head's prefix-matching on words, or another score, against its induction score on repeated random tokens.

    Parameters
    ----------
    ds : Dataset
        ``<name>(layer, head[, example])``; ``chance_<name>`` where it is there.
    heads_ds : Dataset
        ``induction(layer, head[, example])``; ``role(layer, head)`` and ``chance_induction`` where they are there.
    name, where : str
        The score, and what it was measured on.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Points`` for each role, lines at chance, ``Labels`` of heads that stand out.
    """
    ds = need(ds, "words_agreement", name)
    heads_ds = need(heads_ds, "words_agreement", "induction")
    sides = [per_head(one, "words_agreement") for one in (heads_ds["induction"], ds[name])]
    names = names_of_heads(sides[0])
    x, y = (np.asarray(one.values, dtype=float).ravel() for one in sides)
    roles = ["other"] * x.size
    if "role" in heads_ds:
        roles = [str(role) for role in heads_ds["role"].transpose("layer", "head").values.ravel()]
    axes = [
        dimension(axis, side, f"{side.attrs.get('long_name', axis)}, {place}")
        for axis, side, place in zip(("random", "words"), sides, ("random tokens", where), strict=True)
    ]
    parts = [
        styled(line(float(source[chance].mean())), color=GREY, line_dash="dashed", line_width=1)
        for line, source, chance in ((hv.VLine, heads_ds, "chance_induction"), (hv.HLine, ds, f"chance_{name}"))
        if chance in source
    ]
    also = (("head", "@name"), ("role", "@role"), (axes[0].label, "@random{0.000}"))
    tips = hover(axes[1], "@words{0.000}", *also)
    for role, look, here in by_role(roles):
        table = {"random": x[here], "words": y[here], "name": [names[at] for at in here], "role": [role] * len(here)}
        parts.append(dots(table, axes, role, look, 9, alpha=0.85, **tips))
    ends = (-0.03, max(1.0, float(np.nanmax(y))) * 1.08)
    far = np.hypot(x - np.nanmedian(x), y - np.nanmedian(y))
    crowd = (np.hypot(x[:, None] - x, y[:, None] - y) < NEAR).sum(axis=1)
    order = np.argsort(-np.nan_to_num(far), kind="stable")
    named = [int(at) for at in order if far[at] > AWAY and crowd[at] <= CROWD][:NAMED]
    parts += names_beside(x, y, names, named, ends)
    labels = {"xlabel": axes[0].pprint_label, "ylabel": axes[1].pprint_label}
    return overlay(parts, width=470, height=460, title=title, legend_cols=2, xlim=ends, ylim=ends, **labels)
