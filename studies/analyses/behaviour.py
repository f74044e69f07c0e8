"""How well does the model do on repeated sequences? Loss and accuracy at each position; and what its heads look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ...interventions.declare.sites import Head
from ...metrics.intervals import bootstrap_interval, interval_attrs
from ...metrics.outputs import accuracy, loss
from ..measuring.capture import capture
from ..measuring.measure import measure
from ..storage.provenance import card_attrs
from ..tasks.tasks import RepeatedTokens

if TYPE_CHECKING:
    from ...interventions.models.model import Model

SHOWN_LENGTH = 8
"""Half length of the prompt whose patterns are drawn: short, so that its tokens can be read along the axes."""


def by_position(model: Model, task: RepeatedTokens) -> xr.Dataset:
    """Loss and accuracy at every position of both runs, and before against after the repeat.

    Returns
    -------
    Dataset
        ``loss`` and ``accuracy`` ``(run, example, position)``; ``<metric>_before`` and ``_after`` ``(run, example)``,
        the means over the queries ``0 .. L-2`` and ``L .. 2L-2``; for the mean over examples at each position
        ``<metric>_low`` and ``_high`` ``(run, position)``, a 95% bootstrap interval.
    """
    measured = measure(model, replace(task, score="all"), None, [loss, accuracy], runs="all", per_position=True)
    start, half = int(task.bos), task.length
    result = measured[["baseline_loss", "baseline_accuracy"]].rename(baseline_loss="loss", baseline_accuracy="accuracy")
    for metric in (loss, accuracy):
        values = result[metric.name]
        values.attrs |= card_attrs(metric.card)
        spans = {"before": slice(start, start + half - 1), "after": slice(start + half, start + 2 * half - 1)}
        for name, span in spans.items():
            words = f"{metric.card.long_name} {name} the repeat"
            result[f"{metric.name}_{name}"] = (
                values.isel(position=span).mean("position").assign_attrs(long_name=words, units=metric.card.units)
            )
        low, high = bootstrap_interval(values.transpose("run", "position", "example").values, bounds=metric.card.bounds)
        attrs = {"units": metric.card.units} | interval_attrs(values.sizes["example"])
        result[f"{metric.name}_low"] = (("run", "position"), low, attrs | {"long_name": "lower end of 95% interval"})
        result[f"{metric.name}_high"] = (("run", "position"), high, attrs | {"long_name": "upper end of 95% interval"})
    result.attrs["repeat_starts"] = start + half
    return result


def patterns(model: Model, task: RepeatedTokens, heads: Sequence[tuple[Head, str]]) -> xr.Dataset:
    """Attention patterns of some heads on one short prompt, with the key each query is expected to attend to.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
        Seed and options; the prompt drawn here is shorter.
    heads : sequence of (Head, kind)
        ``kind`` is ``"induction"`` or ``"previous_token"``: which key is expected.

    Returns
    -------
    Dataset
        ``pattern(shown, query, key)``, ``expected(shown, query)`` (key, NaN where none is), ``kind(shown)``,
        ``token(position)``; ``shown`` is the head's name.
    """
    short = replace(task, n=1, length=min(task.length, SHOWN_LENGTH))
    start, half = int(short.bos), short.length
    captured = capture(model, short, [head.pattern for head, _ in heads])
    stacked = np.stack([captured[f"{head}_pattern"].isel(example=0).values for head, _ in heads])
    size = stacked.shape[-1]
    expected = np.full((len(heads), size), np.nan)
    for row, (_, kind) in enumerate(heads):
        queries = np.arange(start + half, size) if kind == "induction" else np.arange(1, size)
        expected[row, queries] = queries - (half - 1 if kind == "induction" else 1)
    return xr.Dataset(
        {
            "pattern": (("shown", "query", "key"), stacked, {"long_name": "attention", "units": "1"}),
            "expected": (("shown", "query"), expected, {"long_name": "expected key (position)", "units": "1"}),
            "kind": ("shown", np.asarray([kind for _, kind in heads], dtype=object)),
        },
        coords={
            "shown": np.asarray([str(head) for head, _ in heads], dtype=object),
            "query": np.arange(size),
            "key": np.arange(size),
            "token": ("position", captured["token"].isel(example=0).values),
        },
        attrs=captured.attrs,
    )
