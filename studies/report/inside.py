"""The report of what looks inside a model: predictions, a logit lens, direct logit attribution."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import xarray as xr

from ..inspection.findings import movers
from ..output.page import Page
from . import generic
from .figures import draw
from .induction import Section

QUESTIONS = {
    "predict": "What does the model say next?",
    "logit_lens": "What would the stream of each layer say?",
    "direct_logit_attribution": "Which parts write the answer?",
    "weighted_value_norms": "How much does each head move, from where to where?",
}
SHOWN = {
    "predict": "prob",
    "logit_lens": "prob_of_token",
    "direct_logit_attribution": "attribution",
    "weighted_value_norms": "norm",
}
"""The variable that is drawn."""
HEADS = 3
"""Of norms: heads that move most, of which each has a figure."""
FIGURES = 6
"""At most: of the first prompts, and of the first conditions at several positions."""


def sections(kind: str) -> list[Section]:
    """The section of a result of a kind that is in `QUESTIONS`."""
    return [Section("inside", "What was found", QUESTIONS[kind], partial(_fill, kind=kind))]


def _fill(page: Page, ds: xr.Dataset, tree: xr.DataTree, *, kind: str) -> None:
    name = SHOWN[kind]
    if name in ds and kind == "direct_logit_attribution":
        whole = ds.mean("position", keep_attrs=True) if "position" in ds[name].dims else ds
        draw(page, whole, name, "What each part writes towards the answer, mean over prompts.")
        if whole is not ds:
            draw(page, ds, name, "What each part writes, at each scored position.")
    elif name in ds and kind == "weighted_value_norms":
        dims = [f"read_{dim}" if f"read_{dim}" in ds[name].dims else dim for dim in ("layer", "head")]
        first = {dim: 0 for dim in ds[name].dims if dim not in (*dims, "query", "key")}
        some = ds.isel(first)
        for text, _ in movers(ds)[:HEADS]:
            head = dict(zip(dims, map(int, text[1:].split("H")), strict=True))
            draw(page, some, name, f"How much {text} moves from each key to each query of the first prompt.", **head)
    elif name in ds:
        for select, words in _prompts(ds, name):
            draw(page, ds, name, f"The likeliest next tokens{words}.", **select)
    generic.overview(page, ds.drop_vars("token_id", errors="ignore"), pictures=0)


def _prompts(ds: xr.Dataset, name: str) -> list[tuple[dict[str, Any], str]]:
    """What is selected for each figure, and its words: a prompt; a condition or a head where it needs one picture."""
    dims = ["example"] if "example" in ds[name].dims else []
    if "position" in ds[name].dims or "layer" in ds[name].dims:
        dims += [str(dim) for dim in ds[name].dims if dim not in ("example", "layer", "position", "rank")]
    found = []
    for at in product(*(range(min(ds.sizes[dim], FIGURES)) for dim in dims)):
        labels = {
            dim: ds[dim].values[place] if dim in ds.coords else place for dim, place in zip(dims, at, strict=True)
        }
        said = [str(label) if isinstance(label, str) else f"{dim} {label}" for dim, label in labels.items()]
        found.append((labels, f", {', '.join(said)}" if said else ""))
    return found[:FIGURES]
