"""What happens without a head, and without a set of heads, against sets of other heads drawn at random."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import check_text
from ...interventions.declare import codec
from ...interventions.declare.edits import Compose, Intervention, MeanAblate, ResampleAblate, ZeroAblate
from ...interventions.declare.grid import Grid
from ...interventions.declare.sites import Head, Layer
from ...metrics.card import Metric
from ...metrics.intervals import level_at, looks, settled
from ...metrics.outputs import accuracy, loss
from ...metrics.statistics import (
    benjamini_hochberg,
    over_looks,
    possible_control_sets,
    ranking_settled,
    t_test,
)
from ..measuring.capture import capture
from ..measuring.controls import CONTROLS, control_p, random_sets
from ..measuring.effects import effect, effect_interval
from ..measuring.looks import Span, joined, measure_some, until_settled
from ..storage.registry import TASKS
from ..tasks.tasks import RepeatedTokens, Task

if TYPE_CHECKING:
    from ...interventions.models.model import Model

METHODS = {"zero": ZeroAblate, "mean": MeanAblate, "resample": ResampleAblate}
ESTIMATED = ("zero", "mean")
"""Ablations whose estimates are compared with the exact ones."""
WORSE = {"loss": 1, "accuracy": -1}
"""Sign that turns a change of the metric into damage."""
REAL = 0.05
"""False discovery rate up to which an effect is taken for real."""
CLEAR = {"loss": 0.05, "accuracy": 0.05}
"""Effect that is not worth a sentence, in nats, and as a share of the answers. Known to within this, one is settled."""
KEPT = 256 * 2**20
"""Bytes of activations that are read at once."""


def ablate(heads: Iterable[Head], method: str = "zero") -> Intervention:
    """Ablate several heads in one forward pass."""
    return Compose(*(METHODS[method](head) for head in heads))


def ablation_grid(sets: Sequence[Iterable[Head]]) -> Grid:
    """Each set of heads ablated together in each way; axes ``ablation`` and ``number``, the place in `sets`."""
    return Grid.of(
        [("ablation", tuple(METHODS)), ("number", tuple(range(len(sets))))],
        [ablate(heads, method) for method in METHODS for heads in sets],
    )


def every_head(
    model: Model, task: RepeatedTokens, metrics: Sequence[Metric] = (loss, accuracy), *, first: int | None = None
) -> xr.Dataset:
    """Zero, mean and resample ablation of every head.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    metrics : sequence of Metric
        ``loss`` and ``accuracy``, or one of them.
    first : int, optional
        Prompts to start with, doubled until the effect of each head on the loss is settled (see `heads_settled`) or all
        are used; left out, all at once. Intervals and q then hold for all looks together, see `intervals.looks`.

    Returns
    -------
    Dataset
        ``<metric>(ablation, layer, head, example)`` and its baseline; for the effect of each,
        ``<metric>_effect_low`` and ``_high`` (95% bootstrap interval over examples) and ``<metric>_effect_q`` (t-test
        over examples, Benjamini-Hochberg over heads and ablations); ``constant_share(layer, head)``, see
        `constant_share`.
    """
    counts, grid = looks(task.n, first), each_head(model, METHODS)

    def measure_part(span: Span) -> dict[str, xr.Dataset]:
        return {"heads": measure_some(model, task, grid, metrics, span)}

    def judged(measured: xr.Dataset) -> xr.Dataset:
        """Add intervals and q."""
        for metric in metrics:
            measured = measured.assign(effect_interval(measured, metric.name, level_at(len(counts))))
            p = over_looks(t_test(effect(measured, metric.name).values), len(counts))
            attrs = {"long_name": f"q of the effect on {metric.name}", "units": "1"}
            measured[f"{metric.name}_effect_q"] = (("ablation", "layer", "head"), benjamini_hochberg(p), attrs)
        return measured

    measured = until_settled(counts, measure_part, lambda found: heads_settled(judged(found["heads"])))["heads"]
    measured = judged(measured)
    measured["constant_share"] = constant_share(model, task)
    return measured


def heads_settled(ds: xr.Dataset, name: str = "loss") -> bool:
    """Whether the effect of each head is settled: known to within `CLEAR`, or beyond noise by interval and q."""
    low, high = (ds[f"{name}_effect_{end}"].values for end in ("low", "high"))
    known = high - low <= 2 * CLEAR[name]
    return bool((known | (settled(low, high, 0.0) & (ds[f"{name}_effect_q"].values <= REAL))).all())


def each_head(model: Model, methods: Iterable[str]) -> Grid:
    """Every head ablated in each way; axes ``ablation``, ``layer`` and ``head``."""
    return Grid(
        lambda ablation, layer, head: METHODS[ablation](Head(layer, head)),
        ablation=methods,
        layer=model.layers,
        head=model.heads,
    )


def constant_share(model: Model, task: Task) -> xr.DataArray:
    """How much of a head's output is the same for every prompt, ``(layer, head)``, between 0 and 1.

    The squared norm of the mean of ``z`` over examples (for each position), over the mean squared norm of ``z``. Near
    1, the head acts like a bias: zero ablation takes that constant away, mean ablation leaves it.
    """
    shares = []
    tokens = task.draw(model).runs["clean"].size
    together = max(1, KEPT // (4 * tokens * model.shape.width))
    for start in range(0, len(model.layers), together):
        layers = model.layers[start : start + together]
        captured = capture(model, task, [Layer(layer).z for layer in layers])
        for layer in layers:
            z = captured[f"L{layer}_z"].astype("float64")
            constant = (z.mean("example") ** 2).sum(("position", "d_head"))
            shares.append(constant / (z**2).mean("example").sum(("position", "d_head")))
    joined = xr.concat(shares, xr.DataArray(list(model.layers), dims="layer", name="layer"))
    return joined.assign_attrs(long_name="share of the output that is the same for every prompt", units="1")


def sets_against_controls(
    model: Model,
    task: RepeatedTokens,
    sets: Mapping[str, Sequence[Head]],
    *,
    metrics: Sequence[Metric] = (loss, accuracy),
    draws: int = 50,
    seed: int = 0,
    first: int | None = None,
    alone: xr.Dataset | None = None,
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
    first : int, optional
        Prompts to start with, doubled until the order of each set among its random sets is settled (see
        `statistics.ranking_settled`, with `CLEAR`) or all are used; left out, all at once.
    alone : Dataset, optional
        What `every_head` gave for the same model, task and metrics. Sets of one head are taken from it as far as its
        prompts go, and not measured again.

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
    wanted, drawn = draw_sets(model, sets, draws, seed)
    numbers = {
        heads: number for number, heads in enumerate(dict.fromkeys(itertools.chain(wanted.values(), *drawn.values())))
    }
    counts = looks(task.n, first)

    def measure_part(span: Span) -> dict[str, xr.Dataset]:
        """Measure some prompts, and take from `alone` what it holds of them."""
        known = alone is not None and span[1] <= alone.sizes["example"]
        single = {number: heads[0] for heads, number in numbers.items() if known and len(heads) == 1}
        asked = {number: heads for heads, number in numbers.items() if number not in single}
        parts = [_of_single_heads(alone, single, metrics, span)] if alone is not None and single else []
        if asked:
            measured = measure_some(model, task, ablation_grid(list(asked.values())), metrics, span)
            parts.insert(0, measured.assign_coords(number=list(asked)))
        return {"sets": joined(parts, "number").sortby("number")}

    def is_settled(found: dict[str, xr.Dataset]) -> bool:
        """Ask for each set with its random sets, ablation and metric."""
        return all(
            ranking_settled(
                change[:, [numbers[wanted[name]], *(numbers[one] for one in others)]][at], CLEAR[metric], level
            )
            for metric, change in changes(found["sets"]).items()
            for (name, _), others in drawn.items()
            for at in range(len(METHODS))
        )

    def changes(measured: xr.Dataset) -> dict[str, np.ndarray[Any, Any]]:
        order = ("ablation", "number", "example")
        return {metric.name: effect(measured, metric.name).transpose(*order).values for metric in metrics}

    level = level_at(len(counts))
    measured = until_settled(counts, measure_part, is_settled)["sets"]
    result = _drawn_sets(model, wanted, drawn)
    result.attrs = measured.attrs | {
        "sets": json.dumps({name: [*map(str, heads)] for name, heads in wanted.items()}),
        "interventions": json.dumps(codec.encode(ablation_grid(list(numbers)), TASKS)),
    }
    for metric in metrics:
        name, values = metric.name, measured[metric.name]
        own = values.isel(number=[numbers[heads] for heads in wanted.values()]).rename(number="set")
        result[name] = own.assign_coords(set=result["set"]).transpose("set", "ablation", "example")
        result[f"baseline_{name}"] = measured[f"baseline_{name}"]
        result = result.assign(effect_interval(result, name, level))
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


def _of_single_heads(
    alone: xr.Dataset, single: Mapping[int, Head], metrics: Sequence[Metric], span: Span
) -> xr.Dataset:
    """What `every_head` measured of single heads, by the number of their set, on the prompts `span`."""
    names = [name for metric in metrics for name in (metric.name, f"baseline_{metric.name}")]
    places = [xr.Variable("number", [getattr(head, axis) for head in single.values()]) for axis in ("layer", "head")]
    rows = alone[names].sel(layer=places[0], head=places[1]).drop_vars(["layer", "head"])
    return rows.isel(example=slice(*span)).assign_coords(number=[*single]).assign_attrs(seconds="0.000")


def first_of_sets(n: int, first: int) -> int:
    """Prompts of `n` that sets start with: half as many as `first`, since their order needs fewer than each effect."""
    return first if first >= n else min(first, max(4, first // 2))


def sets_of(found: Mapping[str, Sequence[Head]]) -> dict[str, list[Head]]:
    """The sets that are ablated where `found` are the heads with a role: those of each role, and all together."""
    sets = {f"{role} heads": list(members) for role, members in found.items() if members}
    if len(sets) > 1:
        sets["both"] = [head for members in found.values() for head in members]
    return sets


def draw_sets(
    model: Model, sets: Mapping[str, Sequence[Head]], draws: int, seed: int
) -> tuple[dict[str, tuple[Head, ...]], dict[tuple[str, str], list[tuple[Head, ...]]]]:
    """Draw the random sets that sets are compared with.

    Parameters
    ----------
    model : Model
    sets : mapping of name to heads
    draws : int
        Random sets of each control; all distinct sets where there are fewer.
    seed : int

    Returns
    -------
    tuple of dict and dict
        The sets by name, in order, and their random sets by name and control.
    """
    wanted = {name: tuple(sorted(heads)) for name, heads in sets.items() if heads}
    drawn = {
        (name, control): found
        for name, heads in wanted.items()
        for control, found in random_sets(heads, model.shape, draws, seed).items()
    }
    return wanted, drawn


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
