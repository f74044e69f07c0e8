"""How far estimates from gradients can be trusted on this model, in plain sentences, every one from its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from ..measuring.compare import NOISE
from ..output.phrases import listed, percent, rounded

SMALL_MISS = 1 / 3
"""Largest miss, as a share of the largest effect, up to which estimates are said to tell the large effects. At 1 they
miss as much as a guess of 0 for everything would."""
GOOD_RANK = 0.8
"""Rank correlation from which they are also said to give the order of effects."""
GOOD_SIGNS = 0.9
"""Share of right signs, of the effects beyond noise, that goes with it."""
FLAT = 0.5
"""Size of all estimates, as a share of that of all effects, below which the slope is called flat."""

CLEAR = 0.1
"""A component is worth a word where its effects have this share, or more, of the size of those of another."""

SMALL = 0.1
"""Nats or logits up to which an effect that is not beyond noise is none."""

VERDICTS = {
    "all": "could have stood in for measuring",
    "large": "tells the large effects, and not the order or the sign of the small ones",
    "rough": "gives a rough picture and replaces no measurement",
    "nothing": "cannot be trusted and misses as much as a guess of 0 would",
    "none": "cannot be judged, as there is no effect",
}
NAMES = {
    "gradient": "the gradient at the run itself",
    "integrated": "the gradient integrated on the way to the changed values",
}

SHORT = {"gradient": "The estimate from the gradient", "integrated": "The integrated estimate"}


def verdict(here: xr.Dataset) -> str:
    """What one estimator tells here: a key of `VERDICTS`."""
    largest, signs = float(np.abs(here["exact"]).max()), float(here["sign_agreement"])
    if largest == 0:
        return "none"
    miss = float(here["largest_miss"]) / largest
    if miss > SMALL_MISS:
        return "rough" if miss < 1 else "nothing"
    ordered = float(here["rank_correlation"]) >= GOOD_RANK and (np.isnan(signs) or signs >= GOOD_SIGNS)
    return "all" if ordered else "large"


def on_estimates(ds: xr.Dataset) -> list[str]:
    """What a dataset of `compare_estimates` says: how far estimators can be trusted, and why the gradient misses."""
    kind = "ablations" if "ablation" in ds.dims else "patches of q, k or v"
    texts = [_about(ds.sel(estimator=name), str(name)) for name in ds["estimator"].values]
    texts[1:] = [text[0].upper() + text[1:] for text in texts[1:]]
    return [f"On {ds['exact'].size} {kind} of single heads, {'. '.join(texts)}.", *_flat(ds), *_not_run(ds)]


def _not_run(ds: xr.Dataset) -> Iterator[str]:
    """Which estimates were left out."""
    for name, times in json.loads(ds.attrs.get("too_dear", "{}")).items():
        yield f"{SHORT.get(name, name)} was not run: it costs {times:.2f} times what the exact values cost."


def _about(here: xr.Dataset, name: str) -> str:
    clear, correlation = int((here["exact_q"] <= NOISE).sum()), float(here["rank_correlation"])
    if not _any_effect(here):
        largest = float(np.abs(here["exact"]).max())
        nothing = f"no effect is beyond noise, and none exceeds {largest:.1g} {_unit(here)}"
        return f"{NAMES.get(name, name)} cannot be judged: {nothing}"
    facts = [] if np.isnan(correlation) else [f"rank correlation {correlation:.2f}"]
    facts += [f"{round(clear * float(here['sign_agreement']))} of {clear} signs right"] if clear else []
    most, found = int(here["strongest_found"].attrs["strongest"]), float(here["strongest_found"])
    if np.isfinite(found):
        facts.append(f"{round(most * found)} of the {most} strongest effects found")
    estimate, exact = here["estimate"].values, here["exact"].values
    at = np.unravel_index(int(np.argmax(np.abs(estimate - exact))), exact.shape)
    facts.append(
        f"{_condition(here, at)} missed most: {rounded(estimate[at], '+.2f')} {_unit(here)} where "
        f"{rounded(exact[at], '+.2f')} is exact"
    )
    return f"{NAMES.get(name, name)} {VERDICTS[verdict(here)]} ({', '.join(facts)})"


def _any_effect(ds: xr.Dataset) -> bool:
    """Whether an effect is beyond noise, or large: with few prompts, q says of none that it is beyond noise."""
    return bool((ds["exact_q"] <= NOISE).any() or np.abs(ds["exact"]).max() > SMALL)


def _condition(here: xr.Dataset, at: tuple[Any, ...]) -> str:
    labels = {str(dim): here[dim].values[place] for dim, place in zip(here["exact"].dims, at, strict=True)}
    head = f"L{labels['layer']}H{labels['head']}"
    return f"{head} under {labels['ablation']} ablation" if "ablation" in labels else f"{labels['component']} of {head}"


def _flat(ds: xr.Dataset) -> Iterator[str]:
    """That the slope at the run is flat, where it is, and for which component most."""
    exact = ds["exact"]
    size = {str(name): _size(ds["estimate"].sel(estimator=name), exact) for name in ds["estimator"].values}
    if not size.get("gradient", np.nan) < FLAT or not _any_effect(ds):
        return
    text = f"In all, gradient estimates have {percent(size['gradient'])} of the size of the exact changes"
    if size.get("integrated", 0.0) > 2 * size["gradient"]:
        text += (
            f" and integrated ones {percent(size['integrated'])}: at the run itself ("
            f"{str(ds['baseline'].attrs['long_name']).partition(',')[0]} {float(ds['baseline']):.2f} {_unit(ds)}) the "
            "slope is flat, and the change comes further on the way"
        )
    if "component" in ds.dims:
        whole = abs(exact).sum(["layer", "head"])
        sign: xr.DataArray = xr.apply_ufunc(np.sign, exact)
        seen = (ds["estimate"].sel(estimator="gradient") * sign).sum(["layer", "head"]) / whole
        clear = [
            name for name in ds["component"].values if float(whole.sel(component=name)) > CLEAR * float(whole.max())
        ]
        text += ". The gradient sees " + listed(
            f"{percent(seen.sel(component=name))} of what {name} changes" for name in clear
        )
    yield text + "."


def _size(estimate: xr.DataArray, exact: xr.DataArray) -> float:
    whole = float(np.abs(exact).sum())
    return float(np.abs(estimate).sum()) / whole if whole else float("nan")


def _unit(ds: xr.Dataset) -> str:
    unit = str(ds["exact"].attrs["units"])
    return {"nat": "nats", "logit": "logits"}.get(unit, unit)
