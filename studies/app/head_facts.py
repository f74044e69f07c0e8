"""What a result says about one head: role, scores, effects, partners, pattern. Knows no Panel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from ...interventions.declare.sites import Head
from ...metrics.intervals import bootstrap_interval
from ..catalogue.table import has_effect
from ..measuring.effects import effect, intervened
from .variables import HEAD, READ, datasets

PAIR = ("sender_layer", "sender_head", "receiver_layer", "receiver_head")
MOST = 24
"""Rows of scores, and of effects, that are shown at most."""
LONGEST = 256
"""Tokens of a stored pattern that can be drawn."""
MANY = 100_000
"""Examples beyond which no interval is computed for the page."""


@dataclass(frozen=True)
class Score:
    """A score of a head.

    Attributes
    ----------
    name, long_name : str
    value : float
        Mean over examples.
    low, high : float
        Ends of its 95% interval; NaN where they are not known.
    chance : float
        What chance gives; NaN where that is not known.
    examples : int
        How many there are; 0 where the score has none.
    """

    name: str
    long_name: str
    value: float
    low: float
    high: float
    chance: float
    examples: int = 0


@dataclass(frozen=True)
class Effect:
    """What intervening on a head changes.

    Attributes
    ----------
    condition, metric : str
    unit : str
        Of the metric; empty for a pure number.
    mean : float
        Over examples.
    low, high : float
        Ends of its 95% interval.
    examples : int
    """

    condition: str
    metric: str
    unit: str
    mean: float
    low: float
    high: float
    examples: int = 0


@dataclass(frozen=True)
class Partner:
    """A head of another layer that composes with this one.

    Attributes
    ----------
    head : Head
    score : float
        Composition score, from the weights.
    deviations : float
        Its distance from random weights, in their standard deviations; NaN where that is not known.
    """

    head: Head
    score: float
    deviations: float


def role(tree: xr.DataTree, head: Head) -> str:
    """The head's role as the file has it, such as ``induction``; empty where it has none."""
    for _, ds in datasets(tree):
        if "role" in ds and {*ds["role"].dims} == {*HEAD}:
            found = _at(ds["role"], head)
            if found is not None:
                return str(found.item())
    return ""


def scores(tree: xr.DataTree, head: Head) -> list[Score]:
    """The attention scores of a head on the run that was measured."""
    found: list[Score] = []
    for _, ds in datasets(tree):
        for name, array in ds.data_vars.items():
            name = str(name)
            if (
                "metric" not in array.attrs
                or name.startswith("chance_")
                or (f"baseline_{name}" in ds and intervened(ds))
            ):
                continue
            here = None
            if {*array.dims} in ({*HEAD}, {*HEAD, "example"}):
                here = _at(array, head)
            elif {*READ} <= {*array.dims} <= {*READ, "run", "example"}:
                name = name.removeprefix("baseline_")
                here = _at(array.rename(dict(zip(READ, HEAD, strict=True))), head)
                if here is not None and "run" in here.dims:
                    run = str(ds.attrs.get("base", here["run"].values[0]))
                    here = here.sel(run=run) if run in here["run"].values else here.isel(run=0)
            if here is not None and not any(one.name == name for one in found):
                found.append(_score(ds, name, here, head))
    return found[:MOST]


def _score(ds: xr.Dataset, name: str, here: xr.DataArray, head: Head) -> Score:
    low, high = (
        _number(_at(ds[f"{name}_{end}"], head)) if f"{name}_{end}" in ds else np.nan for end in ("low", "high")
    )
    chance = float(ds[f"chance_{name}"].mean()) if f"chance_{name}" in ds else np.nan
    long = str(here.attrs.get("long_name", name)).removesuffix(", no intervention")
    return Score(name, long, float(here.mean()), low, high, chance, ds.sizes.get("example", 0))


def effects(tree: xr.DataTree, head: Head) -> list[Effect]:
    """What intervening on the head changed, by every other axis of what was measured and by metric."""
    found: list[Effect] = []
    for group, ds in datasets(tree):
        if group.startswith("estimates"):
            continue
        for name, array in ds.data_vars.items():
            if not has_effect(ds, str(name)) or not {*HEAD, "example"} <= {*array.dims}:
                continue
            change = _at(effect(ds, str(name)), head)
            if change is not None and not {*READ} & {*change.dims}:
                found += _effects(str(name), change, ds, head)
    return found[:MOST]


def _effects(name: str, change: xr.DataArray, ds: xr.Dataset, head: Head) -> list[Effect]:
    axes = [str(dim) for dim in change.dims if dim not in ("example", "position")]
    labels = [change[dim].values if dim in change.coords else range(change.sizes[dim]) for dim in axes]
    found = []
    for place in itertools.islice(itertools.product(*(range(len(one)) for one in labels)), MOST):
        here = change.isel(dict(zip(axes, place, strict=True)))
        here = here.mean("position") if "position" in here.dims else here
        numbers = np.asarray(here.values, dtype=float)
        ends = [ds[f"{name}_effect_{end}"] for end in ("low", "high") if f"{name}_effect_{end}" in ds]
        if len(ends) == 2 and all({*end.dims} == {*HEAD, *axes} for end in ends):
            at = dict(zip(axes, place, strict=True))
            low, high = (_number(_at(end, head).isel(at)) for end in ends)  # type: ignore[union-attr]
        else:
            low, high = (
                (float(end) for end in bootstrap_interval(numbers)) if 1 < len(numbers) <= MANY else (np.nan, np.nan)
            )
        words = [
            str(label) if isinstance(label, str) else f"{dim} {label}"
            for dim, label in ((dim, one[at]) for dim, one, at in zip(axes, labels, place, strict=True))
        ]
        unit = str(change.attrs.get("units", "1"))
        mean = float(np.nanmean(numbers)) if np.isfinite(numbers).any() else np.nan
        found.append(Effect(" ".join(words), name, "" if unit == "1" else unit, mean, low, high, len(numbers)))
    return found


def lost(tree: xr.DataTree, head: Head) -> tuple[str, float] | None:
    """What a study of a circuit found to be lost without the head, in words and as a number; None where it did not."""
    for _, ds in datasets(tree):
        if "lost" in ds and {*ds["lost"].dims} == {*HEAD}:
            found = _at(ds["lost"], head)
            if found is not None:
                return str(ds["lost"].attrs.get("long_name", "lost without the head")), float(found)
    return None


def partners(tree: xr.DataTree, head: Head, top: int = 3) -> dict[tuple[str, str], list[Partner]]:
    """The heads that compose most strongly with `head`, by direction and kind.

    Returns
    -------
    dict
        ``("from", "k")``: earlier heads whose output its keys read, strongest first; ``("into", "k")``: later heads
        whose keys read its output. Empty where the file holds no composition scores.
    """
    found: dict[tuple[str, str], list[Partner]] = {}
    for _, ds in datasets(tree):
        if "composition" not in ds or not {"kind", *PAIR} <= {*ds["composition"].dims}:
            continue
        table = ds["composition"]
        if "variant" in table.dims:
            table = table.isel(variant=0)  # LayerNorm folded in
        for kind in map(str, table["kind"].values):
            floor = [float(ds[name].sel(kind=kind)) if name in ds else np.nan for name in ("floor_mean", "floor_sd")]
            for direction, own, other in (("from", "receiver", "sender"), ("into", "sender", "receiver")):
                here = _at(table.sel(kind=kind), head, f"{own}_layer", f"{own}_head")
                if here is not None:
                    found[direction, kind] = _strongest(here, other, floor, top)
        break
    return {key: some for key, some in found.items() if some}


def _strongest(scores: xr.DataArray, side: str, floor: list[float], top: int) -> list[Partner]:
    numbers = scores.transpose(f"{side}_layer", f"{side}_head")
    layers, heads = (numbers[dim].values for dim in numbers.dims)
    order = sorted(np.argwhere(np.isfinite(numbers.values)).tolist(), key=lambda at: -float(numbers.values[tuple(at)]))
    found = []
    for row, column in order[:top]:
        score = float(numbers.values[row, column])
        away = (score - floor[0]) / floor[1] if floor[1] else np.nan
        found.append(Partner(Head(int(layers[row]), int(heads[column])), score, away))
    return found


def stored_patterns(tree: xr.DataTree) -> xr.Dataset | None:
    """The patterns that the file holds, ``pattern(shown, query, key)``, or None."""
    for _, ds in datasets(tree):
        if {"pattern", "token"} <= {*ds.variables} and {*ds["pattern"].dims} == {"shown", "query", "key"}:
            return ds if max(ds.sizes["query"], ds.sizes["key"]) <= LONGEST else None
    return None


def _at(array: xr.DataArray, head: Head, layer: str = "layer", number: str = "head") -> xr.DataArray | None:
    """`array` at a head; None where it has no such head."""
    place = {}
    for dim, wanted in ((layer, head.layer), (number, head.head)):
        labels: Any = array[dim].values if dim in array.coords else np.arange(array.sizes[dim])
        found = np.flatnonzero(labels == wanted)
        if not found.size:
            return None
        place[dim] = int(found[0])
    return array.isel(place, drop=True)


def _number(value: xr.DataArray | None) -> float:
    return float(value) if value is not None and value.size == 1 else np.nan
