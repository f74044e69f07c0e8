"""Labels of results: the coordinates that prompts, positions and grid axes give, and declarations as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, check_name, check_text, choices
from ...interventions.declare.codec import encode
from ...interventions.declare.grid import RESERVED
from ...metrics.card import Metric
from ..storage.registry import TASKS
from ..tasks.batch import Batch
from ..tasks.tasks import Task

if TYPE_CHECKING:
    from ...interventions.models.model import Model

OWN = (*RESERVED, "position", "layer", "head")
"""Names of dims and coordinates of results, which no variable can have."""


def coordinates(model: Model, batch: Batch, run: str) -> dict[str, Any]:
    """Runs, examples, positions, and the tokens of `run` as text and id (empty and NaN beyond a prompt's end).

    NUL in the text of a token, at which files would cut it, stands as ``␀``.
    """
    ids = batch.runs[run].astype(np.float64)
    ids[np.arange(ids.shape[1]) >= batch.lengths[:, None]] = np.nan
    known = np.unique(batch.runs[run])
    texts = (text.replace("\0", "␀") for text in model.token_text(known.tolist()))
    words = dict(zip(known.tolist(), texts, strict=True))
    text = [["" if np.isnan(token) else words[int(token)] for token in row] for row in ids]
    ids = ids if np.isnan(ids).any() else ids.astype(np.int64)  # missing is NaN, which whole numbers cannot hold
    return {
        "run": ("run", np.asarray(list(batch.runs), dtype=object)),
        "example": np.arange(ids.shape[0]),
        "position": np.arange(ids.shape[1]),
        "token": (("example", "position"), np.asarray(text, dtype=object), {"long_name": f"token of the {run} run"}),
        "token_id": (("example", "position"), ids, {"long_name": f"token id of the {run} run"}),
    } | _position_labels(batch)


def _position_labels(batch: Batch) -> dict[str, Any]:
    """Which positions have a label, ``(example, position)``: empty where none, with commas where several."""
    if not batch.labels:
        return {}
    text = np.full(batch.scored.shape, "", dtype=object)
    for label, places in batch.labels.items():
        for row, several in enumerate(places):
            for at in several:
                text[row, at] = f"{text[row, at]}, {label}" if text[row, at] else label
    return {"position_label": (("example", "position"), text, {"long_name": "label of the position"})}


def labelled(coords: dict[str, Any], axes: Sequence[tuple[str, tuple[Any, ...]]]) -> xr.Dataset:
    """An empty dataset with the coordinates of the prompts and of the axes.

    An axis called ``position`` sweeps positions of the prompts: the tokens are then those at its positions.
    """
    dataset = xr.Dataset(coords=coords)
    for name, values in axes:
        if name == "position":
            known = dataset["position"].values
            if not set(values) <= set(known.tolist()):
                raise DeclarationError(f"axis 'position' takes positions of the prompts, {known[0]} to {known[-1]}")
            dataset = dataset.sel(position=list(values))
        dataset = dataset.assign_coords({name: list(values)})
    return dataset


def number_dims(dataset: xr.Dataset) -> xr.Dataset:
    """Give the dims that count from 0 (heads, layers, positions) their coordinate."""
    counted = ("read_layer", "read_head", "head", "query", "key")
    bare = {dim: np.arange(size) for dim, size in dataset.sizes.items() if dim in counted and dim not in dataset.coords}
    return dataset.assign_coords(bare)


def check_names(axes: Sequence[tuple[str, tuple[Any, ...]]], metrics: Sequence[Metric], per_position: bool) -> None:
    """Refuse names of metrics and axes that no file can hold, or that the results need for something else."""
    names = [metric.name for metric in metrics]
    baselines = {f"baseline_{name}" for name in names}
    for metric in metrics:
        check_name(metric.name, "the metric")
        for text in (metric.card.long_name, metric.card.units, metric.card.reference):
            check_text(text, f"a text of the metric {metric.name}:")
        if metric.name in OWN or metric.name in baselines:
            taken = choices(sorted({*OWN} | baselines))
            raise DeclarationError(f"a metric cannot be called {metric.name!r}: results use {taken} themselves")
    for name, _ in axes:
        if name in {*names} | baselines or (name == "position" and per_position):
            raise DeclarationError(f"a grid axis cannot be called {name!r} here: a variable or dim of the result is")


def check_is_model(model: object) -> None:
    """Refuse what is no opened model."""
    if not hasattr(model, "shape") or not hasattr(model, "traced"):
        raise DeclarationError(f"{model!r} is no model: open one with headwise.load, such as load('words-2l')")


def task_json(task: Task) -> str:
    """The declaration of a task; of one that headwise does not know, its repr."""
    if type(task).__name__ in TASKS:
        return json.dumps(encode(task, TASKS))
    if not hasattr(task, "draw"):
        raise DeclarationError(f"{task!r} is no task: give RepeatedTokens(...) or Prompts([...])")
    return json.dumps({"repr": repr(task)})
