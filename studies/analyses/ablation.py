"""What happens without a head, and without a set of heads, against sets of other heads drawn at random."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ...errors import check_text
from ...interventions.declare.edits import Compose, Intervention, MeanAblate, ResampleAblate, ZeroAblate
from ...interventions.declare.grid import Grid
from ...interventions.declare.sites import Head, Layer
from ...metrics.card import Metric
from ...metrics.outputs import accuracy, loss
from ...metrics.statistics import benjamini_hochberg, possible_control_sets, t_test
from ..measuring.capture import capture
from ..measuring.compare import compare_estimates
from ..measuring.controls import CONTROLS, control_p, random_sets
from ..measuring.effects import effect, effect_interval
from ..measuring.measure import measure
from ..tasks.tasks import Task

if TYPE_CHECKING:
    from ...interventions.models.model import Model

METHODS = {"zero": ZeroAblate, "mean": MeanAblate, "resample": ResampleAblate}
ESTIMATED = ("zero", "mean")
"""Ablations whose estimates are compared with the exact ones."""
WORSE = {"loss": 1, "accuracy": -1}
"""Sign that turns a change of the metric into damage."""


def ablate(heads: Iterable[Head], method: str = "zero") -> Intervention:
    """Ablate several heads in one forward pass."""
    return Compose(*(METHODS[method](head) for head in heads))


def ablation_grid(sets: Sequence[Iterable[Head]]) -> Grid:
    """Each set of heads ablated together in each way; axes ``ablation`` and ``number``, the place in `sets`."""
    return Grid.of(
        [("ablation", tuple(METHODS)), ("number", tuple(range(len(sets))))],
        [ablate(heads, method) for method in METHODS for heads in sets],
    )


def every_head(model: Model, task: Task, metrics: Sequence[Metric] = (loss, accuracy)) -> xr.Dataset:
    """Zero, mean and resample ablation of every head.

    Returns
    -------
    Dataset
        ``<metric>(ablation, layer, head, example)`` and its baseline; for the effect of each,
        ``<metric>_effect_low`` and ``_high`` (95% bootstrap interval over examples) and ``<metric>_effect_q`` (t-test
        over examples, Benjamini-Hochberg over heads and ablations); ``constant_share(layer, head)``, see
        `constant_share`.
    """
    measured = measure(model, task, _each_head(model, METHODS), metrics)
    for metric in metrics:
        measured = measured.assign(effect_interval(measured, metric.name))
        q = benjamini_hochberg(t_test(effect(measured, metric.name).values))
        attrs = {"long_name": f"q of the effect on {metric.name}", "units": "1"}
        measured[f"{metric.name}_effect_q"] = (("ablation", "layer", "head"), q, attrs)
    measured["constant_share"] = constant_share(model, task)
    return measured


def _each_head(model: Model, methods: Iterable[str]) -> Grid:
    return Grid(
        lambda ablation, layer, head: METHODS[ablation](Head(layer, head)),
        ablation=methods,
        layer=model.layers,
        head=model.heads,
    )


def estimates_of_every_head(model: Model, task: Task, exact: xr.Dataset, steps: int) -> xr.Dataset:
    """Zero and mean ablation of every head, estimated, beside the exact effects on the loss.

    Parameters
    ----------
    model : Model
    task : Task
    exact : Dataset
        From `every_head` with the same model and task.
    steps : int
        Of the integrated estimates.

    Returns
    -------
    Dataset
        As of `compare_estimates`; axes ``ablation``, ``layer``, ``head``.
    """
    grid = _each_head(model, ESTIMATED)
    measured = exact.sel(ablation=list(ESTIMATED))
    return compare_estimates(model, task, grid, loss, steps=steps, exact=measured).assign_attrs(
        long_name="zero and mean ablation of every head, by loss"
    )


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
        ``<metric>(set, ablation, example)``; ``<metric>_effect_low`` and ``_high`` (95% interval of the change);
        ``control_<metric>(set, control, draw, ablation, example)``, NaN beyond the sets that exist;
        ``control_heads(set, control, draw)`` as text; ``draws(set, control)``; ``exhaustive(set, control)``, 1 where
        every distinct set was used; ``p_<metric>(set, control, ablation)``, one-sided: how often a random set does at
        least as much damage; it cannot be below ``1 / (1 + draws)``; and ``q_<metric>``, the same after
        Benjamini-Hochberg.
    """
    for name in sets:
        check_text(name, "the name of the set")
    wanted = {name: tuple(sorted(heads)) for name, heads in sets.items() if heads}
    drawn = {
        (name, control): found
        for name, heads in wanted.items()
        for control, found in random_sets(heads, model.shape, draws, seed).items()
    }
    numbers = {
        heads: number for number, heads in enumerate(dict.fromkeys(itertools.chain(wanted.values(), *drawn.values())))
    }
    measured = measure(model, task, ablation_grid(list(numbers)), metrics)
    result = _drawn_sets(model, wanted, drawn)
    result.attrs = measured.attrs | {"sets": json.dumps({name: [*map(str, heads)] for name, heads in wanted.items()})}
    for metric in metrics:
        name, values = metric.name, measured[metric.name]
        own = values.isel(number=[numbers[heads] for heads in wanted.values()]).rename(number="set")
        result[name] = own.assign_coords(set=result["set"]).transpose("set", "ablation", "example")
        result[f"baseline_{name}"] = measured[f"baseline_{name}"]
        result = result.assign(effect_interval(result, name))
        shape = (*result["control_heads"].shape, len(METHODS), values.sizes["example"])
        control = np.full(shape, np.nan, dtype=values.dtype)
        for at, heads in np.ndenumerate(result["control_heads"].values):
            if heads:
                row = numbers[tuple(map(Head.parse, heads.split()))]
                control[at] = values.isel(number=row).transpose("ablation", "example")
        long = f"{metric.card.long_name} without as many random heads"
        dims = ("set", "control", "draw", "ablation", "example")
        result[f"control_{name}"] = (dims, control, {"long_name": long, "units": metric.card.units})
        result[f"p_{name}"] = _p_values(result, name)
        attrs = {"long_name": "q: p over all sets, controls and ablations", "units": "1"}
        result[f"q_{name}"] = (("set", "control", "ablation"), benjamini_hochberg(result[f"p_{name}"].values), attrs)
    return result


def _drawn_sets(
    model: Model, wanted: Mapping[str, tuple[Head, ...]], drawn: Mapping[tuple[str, str], list[tuple[Head, ...]]]
) -> xr.Dataset:
    """The sets and their controls by name."""
    most = max(map(len, drawn.values()), default=0)
    names = np.full((len(wanted), len(CONTROLS), most), "", dtype=object)
    for row, name in enumerate(wanted):
        for column, control in enumerate(CONTROLS):
            found = drawn[name, control]
            names[row, column, : len(found)] = [" ".join(map(str, heads)) for heads in found]
    counts = (names != "").sum(axis=-1)
    possible = [
        [
            possible_control_sets([(head.layer, head.head) for head in heads], *_size(model), matched)
            for matched in CONTROLS.values()
        ]
        for heads in wanted.values()
    ]
    return xr.Dataset(
        {
            "heads": ("set", np.asarray([" ".join(map(str, heads)) for heads in wanted.values()], dtype=object)),
            "control_heads": (("set", "control", "draw"), names),
            "draws": (("set", "control"), counts, {"long_name": "random sets drawn", "units": "1"}),
            "exhaustive": (
                ("set", "control"),
                (counts == np.array(possible)).astype(np.int8),
                {"long_name": "1 where these are all distinct sets there are", "units": "1"},
            ),
        },
        coords={
            "set": np.asarray(list(wanted), dtype=object),
            "control": np.asarray(list(CONTROLS), dtype=object),
            "draw": np.arange(most),
        },
    )


def _size(model: Model) -> tuple[int, int]:
    return model.shape.layers, model.shape.heads


def _p_values(result: xr.Dataset, name: str) -> xr.DataArray:
    """For each set, control and ablation: how often a random set does at least as much damage."""
    base = result[f"baseline_{name}"].sel(run=result.attrs["base"], drop=True)
    p = control_p(result[name], result[f"control_{name}"], base, WORSE[name])
    return p.transpose("set", "control", "ablation")
