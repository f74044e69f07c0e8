"""What happens without a head, and without a set of heads, against sets of other heads drawn at random."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy import stats

from ..interventions.edits import Compose, Intervention, MeanAblate, ResampleAblate, ZeroAblate
from ..interventions.grid import Grid
from ..interventions.sites import Head, Layer
from ..metrics.card import Metric
from ..metrics.outputs import accuracy, loss
from ..metrics.statistics import benjamini_hochberg, bootstrap_interval, control_sets, null_p_value
from .measurement import capture, measure
from .results import effect
from .tasks import Task

if TYPE_CHECKING:
    from ..interventions.models import Model

METHODS = {"zero": ZeroAblate, "mean": MeanAblate, "resample": ResampleAblate}
CONTROLS = {"same layers": True, "all layers": False}
"""Control drawn in the same layers as the set, and over all layers."""
WORSE = {"loss": 1, "accuracy": -1}
"""Sign that turns a change of the metric into damage."""


def ablate(heads: Iterable[Head], method: str = "zero") -> Intervention:
    """Ablate several heads in one forward pass."""
    return Compose(*(METHODS[method](head) for head in heads))


def every_head(model: Model, task: Task, metrics: Sequence[Metric] = (loss, accuracy)) -> xr.Dataset:
    """Zero, mean and resample ablation of every head.

    Returns
    -------
    Dataset
        ``<metric>(ablation, layer, head, example)`` and its baseline; for the effect of each, ``<metric>_effect_low`` and
        ``_high`` (95% bootstrap interval over examples) and ``<metric>_effect_q`` (t-test over examples,
        Benjamini-Hochberg over heads and methods); ``constant_share(layer, head)``, see `constant_share`.
    """
    grid = Grid(
        lambda ablation, layer, head: METHODS[ablation](Head(layer, head)),
        ablation=METHODS,
        layer=model.layers,
        head=model.heads,
    )
    measured = measure(model, task, grid, metrics)
    where = ("ablation", "layer", "head")
    for metric in metrics:
        change = effect(measured, metric.name)
        low, high = bootstrap_interval(change.values)
        attrs = {"units": metric.card.units}
        measured[f"{metric.name}_effect_low"] = (where, low, attrs | {"long_name": "effect, lower end of 95% interval"})
        measured[f"{metric.name}_effect_high"] = (where, high, attrs | {"long_name": "effect, upper end of 95% interval"})
        q = benjamini_hochberg(_t_test(change.values))
        measured[f"{metric.name}_effect_q"] = (where, q, {"long_name": "q of the effect", "units": "1"})
    measured["constant_share"] = constant_share(model, task)
    return measured


def constant_share(model: Model, task: Task) -> xr.DataArray:
    """How much of a head's output is the same for every prompt, ``(layer, head)``, between 0 and 1.

    The squared norm of the mean of ``z`` over examples (for each position), over the mean squared norm of ``z``. Near
    1, the head acts like a bias: zero ablation takes that constant away, mean ablation leaves it.
    """
    shares = []
    for layer in model.layers:
        z = capture(model, task, Layer(layer).z)[f"L{layer}_z"].astype("float64")
        constant = (z.mean("example") ** 2).sum(("position", "d_head"))
        shares.append(constant / (z**2).mean("example").sum(("position", "d_head")))
    joined = xr.concat(shares, xr.DataArray(list(model.layers), dims="layer", name="layer"))
    return joined.assign_attrs(long_name="share of the output that is the same for every prompt", units="1")


def sets_against_controls(
    model: Model,
    task: Task,
    sets: Mapping[str, Sequence[Head]],
    *,
    metrics: Sequence[Metric] = (loss, accuracy),
    draws: int = 50,
    seed: int = 0,
) -> xr.Dataset:
    """Ablate sets of heads together, and as many random sets of other heads.

    Parameters
    ----------
    model : Model
    task : Task
    sets : mapping of name to heads
    metrics : sequence of Metric
        ``loss`` and ``accuracy``, or one of them.
    draws : int
        Random sets of each control; all distinct sets where there are fewer.
    seed : int

    Returns
    -------
    Dataset
        ``<metric>(set, ablation, example)``; ``<metric>_effect_low`` and ``_high`` (95% bootstrap interval of the change);
        ``control_<metric>(set, control, ablation, draw, example)``, NaN beyond the sets that exist;
        ``control_heads(set, control, draw)`` as text; ``draws(set, control)``; ``exhaustive(set, control)``, 1 where
        every distinct set was used; ``p_<metric>(set, control, ablation)``, one-sided: how often a random set does at
        least as much damage. It cannot be below ``1 / (1 + draws)``.
    """
    wanted = {name: tuple(heads) for name, heads in sets.items() if heads}
    drawn = {
        (name, control): control_sets(
            [(head.layer, head.head) for head in heads],
            model.shape.layers,
            model.shape.heads,
            draws,
            seed,
            matched,
        )
        for name, heads in wanted.items()
        for control, matched in CONTROLS.items()
    }
    unique: dict[tuple[Head, ...], None] = {tuple(sorted(heads)): None for heads in wanted.values()}
    for places in drawn.values():
        unique |= {tuple(sorted(Head(*place) for place in picked)): None for picked in places}
    numbers = {heads: number for number, heads in enumerate(unique)}
    grid = Grid.of(
        [("ablation", tuple(METHODS)), ("number", tuple(range(len(unique))))],
        [ablate(heads, method) for method in METHODS for heads in unique],
    )
    measured = measure(model, task, grid, metrics)

    most = max((len(places) for places in drawn.values()), default=0)
    result = xr.Dataset(
        coords={
            "set": np.asarray(list(wanted), dtype=object),
            "ablation": np.asarray(list(METHODS), dtype=object),
            "control": np.asarray(list(CONTROLS), dtype=object),
            "draw": np.arange(most),
            "example": measured["example"],
            "run": measured["run"],
        },
        attrs=measured.attrs | {"sets": json.dumps({name: [str(head) for head in heads] for name, heads in wanted.items()})},
    )
    result["heads"] = ("set", np.asarray([" ".join(map(str, heads)) for heads in wanted.values()], dtype=object))
    names = np.full((len(wanted), len(CONTROLS), most), "", dtype=object)
    counts = np.zeros((len(wanted), len(CONTROLS)), dtype=np.int64)
    for (row, heads), (column, control) in _pairs(wanted, CONTROLS):
        picked = drawn[heads, control]
        counts[row, column] = len(picked)
        names[row, column, : len(picked)] = [" ".join(str(Head(*place)) for place in one) for one in picked]
    result["control_heads"] = (("set", "control", "draw"), names)
    result["draws"] = (("set", "control"), counts, {"long_name": "random sets drawn"})
    every = (counts < draws).astype(np.int8)
    result["exhaustive"] = (("set", "control"), every, {"long_name": "1 where these are all distinct sets there are"})

    for metric in metrics:
        name, values = metric.name, measured[metric.name].transpose("ablation", "number", "example")
        chosen = values.isel(number=[numbers[tuple(sorted(heads))] for heads in wanted.values()])
        result[name] = (("set", "ablation", "example"), chosen.values.swapaxes(0, 1), values.attrs)
        result[f"baseline_{name}"] = measured[f"baseline_{name}"]
        change = effect(result, name)
        low, high = bootstrap_interval(change.values)
        attrs = {"units": metric.card.units}
        result[f"{name}_effect_low"] = (("set", "ablation"), low, attrs | {"long_name": "effect, lower end of 95% interval"})
        result[f"{name}_effect_high"] = (("set", "ablation"), high, attrs | {"long_name": "effect, upper end of 95% interval"})
        control = np.full((len(wanted), len(CONTROLS), len(METHODS), most, values.sizes["example"]), np.nan, dtype=np.float32)
        p = np.full((len(wanted), len(CONTROLS), len(METHODS)), np.nan)
        base = measured[f"baseline_{name}"].sel(run=measured.attrs["base"]).values
        for (row, heads), (column, kind) in _pairs(wanted, CONTROLS):
            picked = [numbers[tuple(sorted(Head(*place) for place in one))] for one in drawn[heads, kind]]
            control[row, column, :, : len(picked)] = values.values[:, picked]
            damage = WORSE[name] * (control[row, column, :, : len(picked)] - base).mean(-1)
            own = WORSE[name] * change.values[row].mean(-1)
            p[row, column] = [null_p_value(own[method], damage[method]) for method in range(len(METHODS))]
        dims = ("set", "control", "ablation")
        long = f"{metric.card.long_name} without as many random heads"
        result[f"control_{name}"] = ((*dims, "draw", "example"), control, {"long_name": long, **attrs})
        result[f"p_{name}"] = (dims, p, {"long_name": "p: random sets that do at least as much damage", "units": "1"})
    return result


def _pairs(left: Iterable[str], right: Iterable[str]) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    return [(row, column) for row in enumerate(left) for column in enumerate(right)]


def _t_test(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Two-sided p that the mean over the last axis is 0; 1 where every value is exactly 0."""
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], np.nan)
    spread = values.std(axis=-1, ddof=1)
    flat = spread == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = values.mean(axis=-1) / (spread / np.sqrt(values.shape[-1]))
    p = 2 * stats.t.sf(np.abs(t), values.shape[-1] - 1)
    result: np.ndarray[Any, Any] = np.where(flat, np.where(values.mean(axis=-1) == 0, 1.0, 0.0), p)
    return result
