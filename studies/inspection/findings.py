"""What was found inside a model, in sentences: for the summary of a result and for its report. Runs nothing."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ...errors import printable
from ..measuring.effects import condition_names
from ..output.phrases import count, listed

PROMPTS, CONDITIONS, TOKENS, PARTS = 4, 6, 3, 4
"""How many of each are named."""
LETTERS = 40
"""Of a prompt."""


def findings(ds: xr.Dataset) -> list[str]:
    """Sentences on what `predict`, `logit_lens`, `direct_logit_attribution` or `weighted_value_norms` gave."""
    if {"token", "prob_of_token", "token_id"} <= {*ds} and {"layer", "rank"} <= {*ds["token_id"].dims}:
        return _lens(ds)
    if {"token", "prob"} <= {*ds} and {"example", "rank"} <= {*ds["prob"].dims}:
        return _predictions(ds)
    if {"attribution", "whole"} <= {*ds} and "source" in ds["attribution"].dims:
        return _parts(ds)
    if "norm" in ds and {"query", "key"} <= {*ds["norm"].dims}:
        return [f"to a position, most is moved by {listed(f'{name} {size:.3g}' for name, size in movers(ds))}"]
    return []


def movers(ds: xr.Dataset) -> list[tuple[str, float]]:
    """The heads that move most: the norms to a query, summed over its keys, on average."""
    layer, head = (f"read_{dim}" if f"read_{dim}" in ds["norm"].dims else dim for dim in ("layer", "head"))
    summed = ds["norm"].sum("key", min_count=1)
    means = summed.mean([dim for dim in summed.dims if dim not in (layer, head)]).transpose(layer, head)
    order = np.argsort(-means.values, axis=None, kind="stable")[:PARTS]
    at = [np.unravel_index(one, means.shape) for one in order]
    return [(f"L{means[layer].values[i]}H{means[head].values[j]}", float(means.values[i, j])) for i, j in at]


def _predictions(ds: xr.Dataset) -> list[str]:
    """The likeliest tokens after the first prompts, at the last position that was asked for."""
    said = []
    for example in range(min(ds.sizes["example"], PROMPTS)):
        of = ds[["token", "prob"]].isel(example=example)
        if "position" in of.dims:
            known = np.flatnonzero(of["prob"].notnull().any([dim for dim in of["prob"].dims if dim != "position"]))
            of = of.isel(position=int(known[-1]) if known.size else -1)
        first = of.isel(rank=0)["prob"]
        names = condition_names(first).ravel() if first.ndim else [""]
        flat = of.transpose(..., "rank")
        rows = zip(names, _rows(flat["token"]), _rows(flat["prob"]), strict=True)
        for name, tokens, probs in list(rows)[:CONDITIONS]:
            pairs = zip(tokens[:TOKENS], probs[:TOKENS], strict=True)
            likely = listed(f"{_text(token)} {share:.2g}" for token, share in pairs if np.isfinite(share))
            said.append(f"{_after(ds, example)}{f', {name}' if name else ''}: {likely}")
    return said


def _lens(ds: xr.Dataset) -> list[str]:
    """At how many places each layer's stream says what the last one says."""
    ids = ds["token_id"].isel(rank=0)
    extra = [dim for dim in ids.dims if dim not in ("layer", "example", "position")]
    if extra:
        return []
    last = ids.isel(layer=-1)
    places = int((last >= 0).sum())
    said = []
    for layer in ids["layer"].values[:-1]:
        same = int(((ids.sel(layer=layer) == last) & (last >= 0)).sum())
        where = "before the first layer" if layer < 0 else f"after layer {layer}"
        said.append(f"the stream {where} says what the last says at {same} of {count(places, 'place')}")
    return said


def _parts(ds: xr.Dataset) -> list[str]:
    """The whole, and the parts that add and take most, on average."""
    of = ds[["attribution", "whole"]]
    of = of.mean([dim for dim in ("example", "position") if dim in of.dims])
    if set(of["attribution"].dims) != {"source"}:
        return []
    values, names = of["attribution"].values, [str(one) for one in of["source"].values]
    order = [at for at in np.argsort(-np.abs(values), kind="stable") if np.isfinite(values[at])][:PARTS]
    most = listed(f"{names[at]} {values[at]:+.3g}" for at in order)
    words = str(ds["whole"].attrs.get("long_name", "the whole"))
    return (
        [f"{words} is {float(of['whole']):.3g}; of {count(len(names), 'part')}, most is written by {most}"]
        if order
        else []
    )


def _rows(values: xr.DataArray) -> np.ndarray:
    return np.asarray(values.values).reshape(-1, values.sizes["rank"])


def _after(ds: xr.Dataset, example: int) -> str:
    if "prompt" not in ds.coords:
        return f"prompt {example}"
    text = printable(str(ds["prompt"].values[example]))
    return f"after “{text if len(text) <= LETTERS else '…' + text[1 - LETTERS :]}”"


def _text(token: object) -> str:
    return printable(str(token)).strip() or repr(str(token))
