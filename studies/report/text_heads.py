"""The report of what heads do on text: what each is called, the claims that fit, and what their ablation costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from .. import plots
from ..output.page import Page, folded, number, table
from ..output.phrases import count, listed, rounded
from ..storage.attributes import json_in
from .induction import Section

QUESTION = "What does each head do on text, as far as its attention tells?"


def sentences(ds: xr.Dataset) -> dict[str, list[str]]:
    """What was found and what it does not show, in words, by section of the report."""
    called = np.ravel(ds["called"].values)
    names = [*map(str, ds["claim"].values)]
    found = []
    for name in names:
        if heads := _heads(ds, ds["called"] == name):
            gap = _gap(ds).sel(claim=name).where(ds["called"] == name)
            best = f"at most {float(gap.max()):.2f} above the nearer control"
            found.append(f"{count(len(heads), 'head')} called {name} ({listed(heads)}): {best}.")
    unnamed = int(np.sum(~np.isin(called, names)))
    rows = [f"{called.size - unnamed} of {called.size} heads have a name; of {unnamed} no claim is true by the rule."]
    lacking = [name for name in names if not int(ds["queries"].sel(claim=name).sum())]
    if lacking:
        rows.append(f"The text has nothing to tell of {listed(lacking)}.")
    limits = [
        "Attention says where a head looks, not what it moves: a name is no proof of what the head is for.",
        f"The rule: {ds['called'].attrs.get('rule', '')}.",
        "What is called by no name may do what no claim here asks for.",
    ]
    if "loss_without" not in ds:
        limits.append("No head was ablated; text_heads(..., controls=20) does that.")
    return {"summary": [*rows, *found], "limits": limits, "text_heads": _ablated(ds)}


def _gap(ds: xr.Dataset) -> xr.DataArray:
    """Score less the nearer control, mean over units, ``(claim, layer, head)``."""
    gap: xr.DataArray = (ds["score"] - ds["control_score"]).mean("unit").min("control")
    return gap.transpose("claim", "layer", "head")


def _heads(ds: xr.Dataset, chosen: xr.DataArray) -> list[str]:
    """Names of the heads of which something is true."""
    places = np.argwhere(chosen.transpose("layer", "head").values)
    return [f"L{int(ds['layer'][layer])}H{int(ds['head'][head])}" for layer, head in places]


def _ablated(ds: xr.Dataset) -> list[str]:
    """Of each claim, what the loss at its own places rises by without its heads, against random heads."""
    if "loss_without" not in ds:
        return []
    found = []
    for at, name in enumerate(map(str, ds["ablated"].values)):
        one = ds.isel(ablated=at).sel(place=str(ds["helps_with"].sel(claim=name).values))
        rise = float((one["loss_without"] - one["loss_whole"]).mean("window"))
        if np.isnan(rise):
            continue
        random = (one["loss_without_random"] - one["loss_whole"]).mean("window").sel(random="all layers")
        found.append(
            f"Without {one['ablated_heads'].values!s} ({name}), the loss of {one['place'].values!s} changes by "
            f"{rounded(rise, '+.3f')} nats; without as many random heads by {rounded(random.mean(), '+.3f')} on "
            f"average, p = {float(one['p_without'].sel(random='all layers')):.2g}."
        )
    return found


def fill(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    """Append the grid of names, and tables of claims, to a page."""
    page.figure(
        plots.heads_on_text(ds),
        "What each head is called, layer 0 at the bottom; white: none of these. Hover for how far above the nearer "
        "control it is, and for all claims that fit.",
    )
    gap, rows = _gap(ds), []
    for name in map(str, ds["claim"].values):
        one = gap.sel(claim=name)
        if one.isnull().all():
            continue
        row, column = np.unravel_index(int(np.nanargmax(one.values)), one.shape)
        best = ds.isel(layer=int(row), head=int(column)).sel(claim=name)
        controls = best["control_score"].mean("unit")
        near = int(controls.fillna(-np.inf).argmax("control"))
        ends = [float(best[f"difference_{end}"].isel(control=near)) for end in ("low", "high")]
        values = [float(best["score"].mean("unit")), *(float(value) for value in controls.values), *ends]
        fit = _heads(ds, ds["fits"].sel(claim=name) == 1)
        rows.append([name, f"L{int(best['layer'])}H{int(best['head'])}", *map(number, values),
                     number(float(best["q"]), ".2g"), listed(fit) or "none"])  # fmt: skip
    titles = ["claim", "best head", "score", *map(str, ds["control"].values), "from", "to", "q", "heads it fits"]
    caption = "Attention from 0 to 1; from and to: 95% interval of the score less the nearer control."
    page.add(table(titles, rows, caption=caption, long=(len(titles) - 1,)))
    words = [[str(ds[one].sel(claim=name).values) for one in ("looks_from", "looks_at", "compared_with", "helps_with")]
             for name in ds["claim"].values]  # fmt: skip
    said = [[str(name), *texts] for name, texts in zip(ds["claim"].values, words, strict=True)]
    head = ["claim", "looks from", "looks at", "mismatch", "may help with"]
    page.add(folded("What each claim says", table(head, said, long=(1, 2, 3, 4))))


def lead(attrs: Mapping[Any, Any]) -> str:
    """On what text, in a sentence."""
    size = json_in(attrs, "text_heads", dict).get("context", "?")
    return f"{attrs.get('windows', '?')} windows of {size} tokens, from {attrs.get('files', '?')} files."


SECTION = Section("text_heads", "Heads on text", QUESTION, fill)
