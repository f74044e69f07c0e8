"""Which heads are which: attention scores of every head, against chance and untrained models, and a role for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, ModelError
from ...interventions.base.memory import shortage
from ...interventions.declare.sites import Head
from ...metrics.attention import SCORES, chance
from ...metrics.card import Metric
from ...metrics.intervals import bootstrap_interval, interval_attrs
from ...metrics.statistics import benjamini_hochberg, null_p_value
from ..measuring import context
from ..measuring.measure import measure
from ..output.progress import Lines
from ..storage.provenance import card_attrs
from ..tasks.tasks import RepeatedTokens, Task

if TYPE_CHECKING:
    from ...interventions.models.model import Model

ROLES = {"induction": "induction", "previous_token": "previous-token", "duplicate_token": "duplicate-token"}
"""Scores that give a head its role, and the role's name."""
RESTING = {"first_token": "first-token", "self": "current-token"}
"""Where a head without such a role mostly rests."""
OTHER = "other"
RESTING_SHARE = 0.5


def head_scores(model: Model, task: Task, metrics: Sequence[Metric] = SCORES, *, check: bool = True) -> xr.Dataset:
    """Attention scores of every head on the clean run.

    Parameters
    ----------
    model : Model
    task : Task
    metrics : sequence of Metric
        Of attention patterns.
    check : bool
        As for `measure`.

    Returns
    -------
    Dataset
        ``<score>(layer, head, example)`` and ``chance_<score>(example)``, the value of uniform causal attention.
    """
    measured = measure(model, task, None, metrics, check=check)
    batch = task.draw(model)
    scores = xr.Dataset(attrs=measured.attrs)
    for metric in metrics:
        scores[metric.name] = measured[metric.name]
        level = np.full(len(batch.lengths), np.nan)
        for group in batch.groups():
            level[list(group.examples)] = chance(metric, batch.facts("clean", group))
        attrs = card_attrs(metric.card, long_name=f"{metric.card.long_name} of uniform attention")
        scores[f"chance_{metric.name}"] = ("example", level, attrs)
    return scores


def untrained_scores(model: Model, task: Task, metrics: Sequence[Metric], seeds: Sequence[int]) -> xr.Dataset:
    """Scores (mean over examples) of models of the same shape with random weights, ``(seed, layer, head)``.

    They are made and run here, one after the other, also where `model` is on a server: memory for one is needed.

    Parameters
    ----------
    model : Model
    task : Task
    metrics : sequence of Metric
        Attention metrics.
    seeds : sequence of int
        Of the random weights, one model for each.

    Returns
    -------
    Dataset
        ``<score>(seed, layer, head)``.

    Raises
    ------
    ModelError
        The model was changed in place so that random weights of its class do not fit it.
    """
    from ...interventions.begin import begin
    from ...interventions.load import load
    from ...interventions.run.untrained import untrained_module

    found = []
    told = Lines(f"{context.current().label}, untrained models", "models")
    with begin(model, check=False) as call:
        for number, seed in enumerate(seeds):
            told.update(number, len(seeds))
            module = untrained_module(model, call.identity, seed)
            untrained = load(module, device=str(model.device), dtype=model.dtype, tokenizer=model.tokenizer)
            scores = head_scores(untrained, task, metrics, check=False)  # built as `model`, which is checked
            found.append(scores[[metric.name for metric in metrics]].mean("example", keep_attrs=True))
    return xr.concat(found, xr.DataArray(list(seeds), dims="seed", name="seed"))


def describe_heads(
    model: Model,
    task: Task,
    *,
    threshold: float = 0.4,
    alpha: float = 0.05,
    untrained: int = 20,
    seed: int = 0,
    untrained_task: Task | None = None,
) -> xr.Dataset:
    """Scores, chance, comparison with untrained models, and a role for every head.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    threshold : float
        Score from which a head takes the role of that score (the largest, where several reach it).
    alpha : float
        False discovery rate for standing out from the heads of untrained models.
    untrained : int
        Untrained models to compare with; 20 can tell a single head of any model from chance at 0.05.
    seed : int
        First seed of the untrained models.
    untrained_task : Task, optional
        What untrained models are measured on; `task` where left out. With fewer prompts their means spread a little
        more, so that a head of the model stands out less easily.

    Returns
    -------
    Dataset
        What `head_scores` gives, and for each role's score ``<score>_low``, ``<score>_high`` (95% bootstrap interval
        over examples), ``untrained_<score>(seed, layer, head)``, ``p_<score>`` (one-sided against all untrained heads),
        ``q_<score>`` (Benjamini-Hochberg over the heads), and ``role(layer, head)`` as text.

    Raises
    ------
    DeclarationError
        `untrained` or `alpha` is not possible, or the task has no scores of heads.
    ModelError
        An untrained model of the same shape does not fit in memory.

    Examples
    --------
    >>> ds = hw.describe_heads(hw.load("words-2l"), hw.RepeatedTokens(n=2, length=25))
    >>> str(ds["role"].sel(layer=0, head=3).item()), str(ds["role"].sel(layer=1, head=2).item())
    ('previous-token', 'induction')
    """
    check_untrained(untrained, alpha)
    check_room(model)
    scores = head_scores(model, task)
    measured = [metric for metric in SCORES if metric.name in ROLES]
    null = untrained_scores(model, untrained_task or task, measured, range(seed, seed + untrained))
    for metric in measured:
        name, where = metric.name, ("layer", "head")
        mean = scores[name].mean("example")
        low, high = bootstrap_interval(scores[name].values, bounds=metric.card.bounds)
        draws = null[name].values.ravel()
        p = np.array([[null_p_value(value, draws) for value in row] for row in mean.values])
        long = metric.card.long_name
        attrs = {"units": "1"} | interval_attrs(scores.sizes["example"])
        scores[f"{name}_low"] = (where, low, attrs | {"long_name": f"{long}, lower end of 95% interval"})
        scores[f"{name}_high"] = (where, high, attrs | {"long_name": f"{long}, upper end of 95% interval"})
        scores[f"untrained_{name}"] = null[name].assign_attrs(long_name=f"{long} of an untrained model", units="1")
        scores[f"p_{name}"] = (where, p, {"long_name": f"{long}: p against untrained heads", "units": "1"})
        scores[f"q_{name}"] = (where, benjamini_hochberg(p), {"long_name": f"{long}: q over all heads", "units": "1"})
    scores["role"] = (("layer", "head"), _roles(scores, threshold, alpha), {"long_name": "role of the head"})
    scores.attrs |= {"threshold": threshold, "alpha": alpha}
    return scores


def task_of_untrained(task: RepeatedTokens, first: int) -> RepeatedTokens:
    """The prompts of a study that untrained models are measured on: those that its sweeps start with."""
    return replace(task, n=min(first, task.n))


def check_room(model: Model) -> None:
    """Refuse a model of which an untrained one of the same shape, to compare scores with, does not fit in memory."""
    if short := shortage(4 * sum(weight.numel() for weight in model.module.parameters())):
        raise ModelError(
            "scores are compared with those of untrained models, which are made on this machine, one at a time: one of "
            f"the shape of {model.name} {short}; measure and capture need none"
        )


def check_untrained(untrained: int, alpha: float) -> None:
    """Refuse so few untrained models that a single head could never stand out from them."""
    if untrained * alpha < 1:
        raise DeclarationError(
            f"untrained={untrained}: with so few, no single head can stand out at {alpha}; "
            f"at least {math.ceil(1 / alpha)} are needed"
        )


def _roles(scores: xr.Dataset, threshold: float, alpha: float) -> Any:
    roles = np.full((scores.sizes["layer"], scores.sizes["head"]), OTHER, dtype=object)
    for layer, head in np.ndindex(roles.shape):
        here = {name: float(scores[name][layer, head].mean()) for name in (*ROLES, *RESTING)}
        able = {
            name: here[name]
            for name in ROLES
            if here[name] >= threshold and float(scores[f"q_{name}"][layer, head]) <= alpha
        }
        if able:
            roles[layer, head] = ROLES[max(able, key=able.__getitem__)]
            continue
        for name, words in RESTING.items():
            if here[name] >= RESTING_SHARE:
                roles[layer, head] = words
    return roles


def heads_with(scores: xr.Dataset, role: str, score: str) -> list[Head]:
    """The heads of a role, strongest first."""
    mean = scores[score].mean("example")
    found = [
        (float(mean[at]), Head(*map(int, at))) for at in zip(*np.nonzero((scores["role"] == role).values), strict=True)
    ]
    return [head for _, head in sorted(found, key=lambda pair: (-pair[0], pair[1]))]


def mean_of_heads(values: xr.DataArray, heads: Sequence[Head]) -> xr.DataArray:
    """Mean of an attention metric over some of the heads it was read at (``read_layer``, ``read_head``)."""
    places = {
        "read_layer": xr.DataArray([head.layer for head in heads], dims="member"),
        "read_head": xr.DataArray([head.head for head in heads], dims="member"),
    }
    return values.sel(places).mean("member").drop_vars(["read_layer", "read_head"], errors="ignore")


def ranked(values: xr.DataArray, top: int | None = None) -> list[tuple[Head, float]]:
    """Heads of a ``(layer, head)`` array by value, largest first."""
    pairs = [(Head(*at), float(value)) for at, value in np.ndenumerate(values.transpose("layer", "head").values)]
    return sorted(pairs, key=lambda pair: (-np.nan_to_num(pair[1], nan=-np.inf), pair[0]))[:top]
