"""What is measured on windows: losses with and without the first occurrence, scores of heads, ablation of heads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...interventions.declare import codec
from ...interventions.declare.edits import Intervention
from ...interventions.declare.grid import Grid
from ...interventions.declare.sites import Head
from ...metrics.attention import prefix_matching
from ...metrics.card import Card, Metric
from ...metrics.outputs import loss
from ...metrics.statistics import null_p_value, rank_correlation, sign_flip, strongest_shared
from ..analyses.ablation import ablate, draw_sets
from ..analyses.heads import describe_heads, heads_with
from ..measuring.measure import measure
from ..storage.registry import TASKS
from ..tasks.tasks import RepeatedTokens, Task
from .occurrences import (
    Occurrences,
    bins_of,
    controlled,
    distance_weights,
    draw_replaced,
    find,
    mean_by_unit,
    successor_weights,
    units_of,
    weights_of,
)
from .windows import Windows

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
ENDS = ("", "_low", "_high")
SET = "induction heads"
SUCCESSOR = Metric(
    Card("successor", "attention to the first successor, summed", "1", (0.0, np.inf), "", "see TextInduction"),
    "pattern",
    prefix_matching.kernel,
    weights_of(successor_weights),
)
"""Attention from ``t - 1`` to ``j``, summed over the second occurrences of a window that have one candidate."""
DISTANCE = Metric(
    Card("distance", "attention at the same distances elsewhere, summed", "1", (0.0, np.inf), "", "see TextInduction"),
    "pattern",
    prefix_matching.kernel,
    weights_of(distance_weights),
)
"""The same at places of the same distances that are no successor."""
GAINS = {
    "gain": "loss at the first occurrence less loss at the second",
    "causal_gain": "loss at the second occurrence with the first replaced, less that of the text as it is",
    "elsewhere": "loss at the second occurrence with another place replaced, less that of the text as it is",
    "net_gain": "causal gain less what another place replaced does",
}
SIDES = {
    "gain": "gain of the second occurrence",
    "loss_second": "loss at second occurrences",
    "loss_first": "loss at first occurrences",
}
"""What ablation changes: the first is ``loss_first - loss_second``."""
BINS = {"distance": "tokens from the first occurrence to the second", "candidates": "tokens that followed before",
        "position": "position of the second occurrence in the window"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Text:
    """Windows with the pairs that recur in them.

    Attributes
    ----------
    cut : Windows
    found : Occurrences
        All second occurrences.
    """

    cut: Windows
    found: Occurrences

    @classmethod
    def of(cls, cut: Windows) -> Text:
        """Find the pairs that recur."""
        return cls(cut, find(cut.tokens))

    @property
    def single(self) -> Occurrences:
        """Second occurrences with one candidate, and a place of the same distance to compare attention with."""
        return controlled(self.cut.tokens)

    def units(self, found: Occurrences) -> tuple[str, Array]:
        """What is taken for independent, and that of each occurrence."""
        return units_of(found.window, self.cut.files)


def token_losses(model: Model, task: Task, what: Any = None) -> Array:
    """Loss of each token of prompts of one length, ``(condition..., example, position)``; NaN at position 0."""
    values = measure(model, task, what, [loss], per_position=True)["loss"]
    values = values.transpose(..., "example", "position")
    size = int(task.draw(model).lengths.max())
    losses = np.full((*values.shape[:-1], size), np.nan)
    queries = values["position"].values
    losses[..., queries[queries < size - 1] + 1] = values.values[..., queries < size - 1]
    return losses


def occurrences(model: Model, text: Text) -> xr.Dataset:
    """Every second occurrence with its place, and the loss there and at the first."""
    found, cut = text.found, text.cut
    losses = token_losses(model, cut)
    first, second = (losses[found.window, at] for at in (found.first, found.second))
    here = {
        "of_window": (found.window, "window"),
        "first": (found.first, "position of the first occurrence"),
        "second": (found.second, "position of the second occurrence"),
        "distance": (found.distance, BINS["distance"]),
        "candidates": (found.candidates, BINS["candidates"]),
        "cue": (cut.texts[found.window, found.second - 1], "token before"),
        "token": (cut.texts[found.window, found.second], "token that recurs after it"),
        "file": (np.asarray(cut.files, dtype=object)[found.window], "file"),
    }
    ds = xr.Dataset({name: ("occurrence", values, {"long_name": words}) for name, (values, words) in here.items()})
    for name, values, words in (
        ("loss_first", first, SIDES["loss_first"]),
        ("loss_second", second, SIDES["loss_second"]),
        ("gain", first - second, GAINS["gain"]),
    ):
        ds[name] = ("occurrence", values, {"long_name": words, "units": "nat"})
    ds["loss"] = (("window", "position"), losses, {"long_name": "loss of each token", "units": "nat"})
    return ds


def replaced(model: Model, text: Text, before: xr.Dataset, most: int, seed: int) -> xr.Dataset:
    """The loss at second occurrences where the first is replaced, and where another place is.

    Parameters
    ----------
    model : Model
    text : Text
    before : Dataset
        What `occurrences` gives of it.
    most : int
        Occurrences that are drawn, at most.
    seed : int

    Returns
    -------
    Dataset
        ``causal_gain``, ``elsewhere`` and ``net_gain`` ``(row)``, in nats.
    """
    drawn = draw_replaced(text.cut.tokens, text.cut.others, text.found, most, seed)
    own = text.found.where(drawn.occurrence)
    attrs = {"long_name": "number of the occurrence"}
    ds = xr.Dataset(coords={"row": np.arange(len(own))}).assign(occurrence=("row", drawn.occurrence, attrs))
    ds["place"] = ("row", drawn.place, {"long_name": "position of the other place"})
    at = (np.arange(len(own)), own.second)
    intact = before["loss_second"].values[drawn.occurrence]
    changed = {name: np.zeros(0) for name in ("causal_gain", "elsewhere")}
    if len(own):
        for name, rows in zip(changed, (drawn.without, drawn.elsewhere), strict=True):
            changed[name] = token_losses(model, replace(text.cut, tokens=rows))[at] - intact
    changed["net_gain"] = changed["causal_gain"] - changed["elsewhere"]
    for name, values in changed.items():
        ds[name] = ("row", values, {"long_name": GAINS[name], "units": "nat"})
    return ds


def gains(text: Text, before: xr.Dataset, after: xr.Dataset) -> xr.Dataset:
    """Mean gains over second occurrences with one candidate, with intervals: dim ``gain``."""
    single = text.found.candidates == 1
    rows = single[after["occurrence"].values]
    _, units = text.units(text.found)
    found = []
    for name in GAINS:
        values, of = _values(name, before, after, units)
        keep = single if name == "gain" else rows
        found.append((*mean_by_unit(values[keep], of[keep]), keep.sum()))
    ds = xr.Dataset(coords={"gain": list(GAINS)})
    for at, end in enumerate(("mean", "mean_low", "mean_high")):
        ds[end] = ("gain", [one[at] for one in found], {"long_name": "gain", "units": "nat"})
    ds["count"] = ("gain", [int(one[3]) for one in found], {"long_name": "occurrences", "units": "1"})
    for name in ("loss_first", "loss_second"):
        ds[name] = ((), float(before[name].values[single].mean()), {"long_name": SIDES[name], "units": "nat"})
    return ds.assign_attrs(unit=text.units(text.found)[0], units_of=len({*units[single].tolist()}))


def binned(text: Text, before: xr.Dataset, after: xr.Dataset, name: str) -> xr.Dataset:
    """Gains by distance, number of candidates or position, with intervals and counts: dim ``bin``.

    All but those by number of candidates are of occurrences with one candidate.

    Parameters
    ----------
    text : Text
    before, after : Dataset
        What `occurrences` and `replaced` give of it.
    name : {"distance", "candidates", "position"}

    Returns
    -------
    Dataset
    """
    numbers = {"distance": text.found.distance, "candidates": text.found.candidates, "position": text.found.second}
    axis, chosen = numbers[name], (text.found.candidates == 1) | (name == "candidates")
    _, units = text.units(text.found)
    ranges = [
        (low, high)
        for low, high in bins_of(name, text.cut.tokens.shape[1])
        if (chosen & (axis >= low) & (axis <= high)).any()
    ]
    labels = [str(low) if low == high else f"{low}-{high}" for low, high in ranges]
    ds = xr.Dataset(coords={"bin": np.asarray(labels, dtype=object)}, attrs={"long_name": BINS[name]})
    ds["bin"].attrs["long_name"] = BINS[name]
    edges = np.array(ranges).reshape(-1, 2)
    for at, end in enumerate(("from", "to")):
        ds[end] = ("bin", edges[:, at], {"long_name": f"{BINS[name]}, {end}"})
    for gain in GAINS:
        values, of = _values(gain, before, after, units)
        where = slice(None) if gain == "gain" else after["occurrence"].values
        here = [chosen[where] & (axis[where] >= low) & (axis[where] <= high) for low, high in ranges]
        rows = [mean_by_unit(values[one], of[one]) for one in here]
        for at, end in enumerate(ENDS):
            attrs = {"long_name": GAINS[gain], "units": "nat"}
            ds[f"{gain}{end}"] = ("bin", np.array([row[at] for row in rows], dtype=np.float64), attrs)
        counts = np.array([int(one.sum()) for one in here], dtype=np.int64)
        ds[f"count_{gain}"] = ("bin", counts, {"long_name": "occurrences", "units": "1"})
    return ds


def _values(name: str, before: xr.Dataset, after: xr.Dataset, units: Array) -> tuple[Array, Array]:
    """A gain of each occurrence that it was measured of, and the unit of each."""
    if name == "gain":
        return before["gain"].values, units
    return after[name].values, units[after["occurrence"].values]


def random_tokens(model: Model, seed: int) -> RepeatedTokens:
    """The repeated random tokens that heads are found on: those of `InductionStudy`, shorter where a model needs it."""
    return RepeatedTokens(length=min(25, model.shape.context // 2), seed=seed)


def heads(model: Model, text: Text, *, threshold: float, untrained: int, seed: int) -> xr.Dataset:
    """Attention of every head to first successors on the text, beside its induction score on random tokens.

    Parameters
    ----------
    model : Model
    text : Text
    threshold, untrained, seed
        As for `describe_heads`.

    Returns
    -------
    Dataset
        ``successor(layer, head)``, ``distance_control``, ``above_control``, each with ``_low`` and ``_high``;
        ``chance_successor``; and what `describe_heads` gives on random tokens. The attributes ``rank_correlation`` and
        ``shared`` (of the ``top`` heads on random tokens, the share among the top on text) tell how both agree.
    """
    single = text.single
    measured = measure(model, text.cut, None, [SUCCESSOR, DISTANCE])
    ds = describe_heads(
        model,
        task := random_tokens(model, seed),
        threshold=threshold,
        untrained=untrained,
        seed=seed,
        untrained_task=replace(task, n=8),
    )
    shape = (model.shape.layers, model.shape.heads)
    counts = np.bincount(single.window, minlength=len(text.cut.tokens)).astype(float)
    _, units = units_of(np.arange(len(counts)), text.cut.files)
    sums = {
        metric.name: measured[metric.name].transpose("layer", "head", "example").values
        for metric in (SUCCESSOR, DISTANCE)
    }
    parts = {
        "successor": (sums["successor"], "attention to the first successor"),
        "distance_control": (sums["distance"], "attention at the same distance elsewhere"),
        "above_control": (sums["successor"] - sums["distance"], "attention to the first successor above the control"),
    }
    for name, (values, words) in parts.items():
        rows = np.full((3, *shape), np.nan)
        for at in np.ndindex(shape):
            rows[(slice(None), *at)] = _of_sums(values[at], counts, units)
        rows = np.clip(rows, -1.0 if name == "above_control" else 0.0, 1.0)  # ends of intervals know no bounds
        for number, end in enumerate(ENDS):
            ds[f"{name}{end}"] = (("layer", "head"), rows[number], {"long_name": words, "units": "1"})
    chance = float((1 / single.second).mean())
    ds["chance_successor"] = ((), chance, {"long_name": "attention to one token of uniform attention", "units": "1"})
    own, on_random = ds["successor"].values, ds["induction"].mean("example").values
    top = max(1, min(5, on_random.size // 2))
    return ds.assign_attrs(
        rank_correlation=rank_correlation(on_random, own),
        top=top,
        shared=strongest_shared(on_random, own, top),
        occurrences=len(single),
    )


def _of_sums(sums: Array, counts: Array, units: Array) -> tuple[float, float, float]:
    """Mean over occurrences from sums and counts of windows, and its interval over units."""
    from ...metrics.intervals import ratio_interval

    _, number = np.unique(units, return_inverse=True)
    above, below = np.bincount(number, sums), np.bincount(number, counts)
    low, high = ratio_interval(above[below > 0], below[below > 0], counts=True)
    return float(sums.sum() / counts.sum()), float(low), float(high)


def single_heads(model: Model, method: str) -> Grid:
    """Every head ablated alone; axes ``layer`` and ``head``."""
    return Grid(lambda layer, head: ablate([Head(layer, head)], method), layer=model.layers, head=model.heads)


def sets_grid(sets: Sequence[Iterable[Head]], method: str) -> Grid:
    """Sets of heads, each ablated together; axis ``number``."""
    return Grid.of([("number", tuple(range(len(sets))))], [ablate(one, method) for one in sets])


def ablation(
    model: Model, text: Text, found: Sequence[Head], *, method: str, draws: int, seed: int, whole: xr.Dataset
) -> xr.Dataset:
    """Ablate the induction heads, as many random other heads, and every head alone.

    Parameters
    ----------
    model : Model
    text : Text
    found : sequence of Head
        The induction heads; where there are none, heads are ablated alone only.
    method : {"mean", "resample"}
    draws : int
        Random sets of each control; all distinct ones where there are fewer.
    seed : int
    whole : Dataset
        What `occurrences` gave.

    Returns
    -------
    Dataset
        For the gain and the losses at first and second occurrences with one candidate (see `SIDES`): ``<name>(set,
        ablation)``, ``baseline_<name>(run)``, ``<name>_effect_low`` and ``_high``, ``control_<name>(set, control, draw,
        ablation)``, ``p_<name>(set, control, ablation)``, one-sided: how often random heads do at least as much damage;
        ``control_heads(set, control, draw)``, ``draws(set, control)``; ``alone_<name>(layer, head)``, the change
        when a head is ablated alone; and ``p_alone_gain(layer, head)``, see `stands_out`.
    """
    single = text.found.candidates == 1
    own = text.found.where(single)
    _, units = text.units(own)
    before = {"loss_first": whole["loss_first"].values[single], "loss_second": whole["loss_second"].values[single]}
    before["gain"] = before["loss_first"] - before["loss_second"]

    def under(what: Intervention | Grid) -> dict[str, Array]:
        """Each side under conditions, ``(condition..., occurrence)``."""
        losses = token_losses(model, text.cut, what)
        sides = {"loss_first": losses[..., own.window, own.first], "loss_second": losses[..., own.window, own.second]}
        return {"gain": sides["loss_first"] - sides["loss_second"], **sides}

    alone = under(grid := single_heads(model, method))
    ds = xr.Dataset(coords={"layer": list(model.layers), "head": list(model.heads), "run": ["clean"]})
    for name, words in SIDES.items():
        attrs = {"long_name": words, "units": "nat"}
        ds[f"baseline_{name}"] = ("run", [before[name].mean()], attrs)
        change = (alone[name] - before[name]).mean(-1)
        ds[f"alone_{name}"] = (("layer", "head"), change, attrs | {"long_name": f"change in {words}, one head ablated"})
    p = {"long_name": "p: the gain falls by more than without the median head, corrected for all heads", "units": "1"}
    ds["p_alone_gain"] = (("layer", "head"), stands_out(before["gain"] - alone["gain"], units), p)
    ds.attrs |= {"base": "clean", "method": method, "occurrences": int(single.sum()), "metrics": json.dumps(["loss"])}
    ds.attrs["interventions"] = json.dumps(codec.encode(grid, TASKS))
    if not found:
        return ds
    wanted, drawn = draw_sets(model, {SET: found}, draws, seed)
    return _with_sets(ds, wanted[SET], {control: some for (_, control), some in drawn.items()}, under, before, units)


def stands_out(fall: Array, units: Array) -> Array:
    """P that the gain falls by more without a head than without the median head, corrected for the choice among heads.

    Parameters
    ----------
    fall : array (layer, head, occurrence)
        How much the gain of an occurrence falls without the head alone.
    units : array (occurrence,)
        Files or windows.

    Returns
    -------
    array (layer, head)
        How often the largest sum of all heads is as large as that of the head where the signs of units are flipped, of
        sums less their median over heads: as in `sign_flip`, no smaller than ``2 ** -n``. NaN for fewer than two units.
    """
    _, number = np.unique(units, return_inverse=True)
    sums = fall @ (number[:, None] == np.arange(number.max() + 1)).astype(float)
    return sign_flip(sums - np.median(sums, axis=(0, 1)), largest=True)


def _with_sets(
    ds: xr.Dataset,
    members: Sequence[Head],
    drawn: Mapping[str, list[tuple[Head, ...]]],
    under: Any,
    before: Mapping[str, Array],
    units: Array,
) -> xr.Dataset:
    """Add the induction heads and the random sets to what single heads do."""
    sets = [*dict.fromkeys([tuple(members), *(one for some in drawn.values() for one in some)])]
    number = {one: at for at, one in enumerate(sets)}
    method = ds.attrs["method"]
    values = under(grid := sets_grid(sets, method))
    ds.attrs["interventions"] = json.dumps(codec.encode(grid, TASKS))
    most = max(map(len, drawn.values()))
    names = np.full((1, len(drawn), most), "", dtype=object)
    for row, some in enumerate(drawn.values()):
        names[0, row, : len(some)] = [" ".join(map(str, one)) for one in some]
    ds = ds.assign_coords(set=[SET], control=list(drawn), ablation=[method], draw=np.arange(most))
    ds["heads"] = ("set", np.asarray([" ".join(map(str, members))], dtype=object))
    ds["control_heads"] = (("set", "control", "draw"), names)
    ds["draws"] = (("set", "control"), (names != "").sum(-1), {"long_name": "random sets drawn", "units": "1"})
    for name, words in SIDES.items():
        attrs, own = {"long_name": words, "units": "nat"}, values[name][0]
        ds[name] = (("set", "ablation"), [[own.mean()]], attrs)
        _, low, high = mean_by_unit(own - before[name], units)
        for end, value in (("low", low), ("high", high)):
            ds[f"{name}_effect_{end}"] = (("set", "ablation"), [[value]], attrs)
        random = np.full((1, len(drawn), most, 1), np.nan)
        for row, some in enumerate(drawn.values()):
            random[0, row, : len(some), 0] = [values[name][number[one]].mean() for one in some]
        ds[f"control_{name}"] = (("set", "control", "draw", "ablation"), random, attrs)
        sign = -1 if name == "gain" else 1
        base = before[name].mean()
        p = [null_p_value(sign * (own.mean() - base), sign * (part[:, 0] - base)) for part in random[0]]
        attrs = {"long_name": "p: (1 + random sets that do at least as much damage) / (1 + sets)", "units": "1"}
        ds[f"p_{name}"] = (("set", "control", "ablation"), np.array(p).reshape(1, -1, 1), attrs)
    return ds


def induction_heads(ds: xr.Dataset) -> list[Head]:
    """The induction heads on random tokens, strongest first."""
    return heads_with(ds, "induction", "induction")
