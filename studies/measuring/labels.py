"""Labels of results: the coordinates that prompts, positions and grid axes give, and declarations as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from xarray.indexes import PandasIndex

from ...errors import DeclarationError, check_name, check_text, choices
from ...interventions.declare.circuits import Circuit, Edge
from ...interventions.declare.codec import encode
from ...interventions.declare.edits import Compose, Edit, Intervention
from ...interventions.declare.grid import RESERVED
from ...interventions.declare.paths import PathPatch
from ...metrics.card import Metric
from ..storage.registry import TASKS
from ..tasks.batch import Batch
from ..tasks.tasks import Task

if TYPE_CHECKING:
    from ...interventions.models.model import Model

NAMED = 4
"""Places of one intervention that its text names; further ones are counted."""
OWN = (*RESERVED, "position", "layer", "head")
"""Names of dims and coordinates of results, which no variable can have."""


def coordinates(model: Model, batch: Batch, run: str, runs: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, examples, positions, and tokens as text and id (empty and NaN beyond a prompt's end).

    NUL in the text of a token, at which files would cut it, stands as ``␀``.

    Parameters
    ----------
    model : Model
    batch : Batch
    run : str
        Whose tokens they are.
    runs : sequence of str, optional
        Those that were measured; all when left out.

    Returns
    -------
    dict
        As an xarray Dataset takes coordinates.
    """
    ids, beyond = batch.runs[run].astype(np.float64), np.arange(batch.runs[run].shape[1]) >= batch.lengths[:, None]
    known, places = np.unique(batch.runs[run], return_inverse=True)
    words = np.asarray([text.replace("\0", "␀") for text in model.token_text(known.tolist())], dtype=object)
    text = words[places.reshape(ids.shape)]
    text[beyond], ids[beyond] = "", np.nan
    ids = ids if np.isnan(ids).any() else ids.astype(np.int64)  # missing is NaN, which whole numbers cannot hold
    return {
        "run": ("run", np.asarray(list(batch.runs if runs is None else runs), dtype=object)),
        "example": np.arange(ids.shape[0]),
        "position": np.arange(ids.shape[1]),
        "token": (("example", "position"), text, {"long_name": f"token of the {run} run"}),
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


def with_axes(coords: Mapping[str, Any], axes: Sequence[tuple[str, tuple[Any, ...]]]) -> dict[str, Any]:
    """The coordinates of the prompts and of the axes.

    An axis called ``position`` sweeps positions of the prompts: the tokens are then those at its positions. Edges have
    their sender and their receiver as coordinates too.
    """
    found = dict(coords)
    for name, values in axes:
        if values and isinstance(values[0], Edge):
            found[name] = np.asarray([str(edge) for edge in values], dtype=object)
            for side in Edge._fields:
                found[side] = (name, np.asarray([getattr(edge, side) for edge in values], dtype=object))
            continue
        if name == "position":
            known = found["position"].tolist()
            if not set(values) <= set(known):
                raise DeclarationError(
                    f"axis 'position' takes positions of the prompts, {known[0]} to {known[-1]}: give the axis another "
                    "name, such as pos, for positions that count from the end"
                )
            for other, one in found.items():
                if isinstance(one, tuple) and "position" in one[0]:
                    dims, data, *attrs = one
                    found[other] = (dims, np.take(data, values, axis=dims.index("position")), *attrs)
        found[name] = list(values)
    return found


def dataset_of(variables: Mapping[str, xr.Variable], coords: Mapping[str, Any]) -> xr.Dataset:
    """A dataset of variables, with these coordinates and those of the dims that count from 0.

    Each index is made once here; left to xarray, each is made several times, which takes as long as a small pass.
    """
    sizes = {dim: size for one in variables.values() for dim, size in one.sizes.items()}
    made: dict[str, xr.Variable] = {}
    indexes = {}
    for name, given in {**coords, **counted(sizes, coords)}.items():
        dims, data, attrs = (*given, None)[:3] if isinstance(given, tuple) else ((name,), np.asarray(given), None)
        made[name] = xr.Variable(dims, data, attrs, fastpath=True)
        if made[name].dims == (name,):
            data, counting = made[name].values, np.arange(made[name].size)
            counts = data.dtype == counting.dtype and np.array_equal(data, counting)
            indexes[name] = _counting(name, data.size) if counts else _index(made[name])
            made |= indexes[name].create_variables({name: made[name]})
    return xr.Dataset(variables, xr.Coordinates(made, indexes))


def _index(variable: xr.Variable) -> PandasIndex:
    """The index of a coordinate that is its own dim."""
    return PandasIndex.from_variables({variable.dims[0]: variable}, options={})


@lru_cache(1000)
def _counting(name: str, size: int) -> PandasIndex:
    """The same for 0, 1, 2, ...; an index is never changed, so that datasets can share it."""
    return _index(xr.Variable((name,), np.arange(size)))


def number_dims(dataset: xr.Dataset) -> xr.Dataset:
    """Give the dims that count from 0 (heads, layers, positions) their coordinate."""
    return dataset.assign_coords(counted(dataset.sizes, dataset.coords))


def counted(sizes: Mapping[Any, int], there: Container[Any]) -> dict[str, Any]:
    """Coordinates of the dims that count from 0, of those that are not there."""
    dims = ("read_layer", "read_head", "layer", "head", "neuron", "query", "key")
    return {dim: np.arange(size) for dim, size in sizes.items() if dim in dims and dim not in there}


def texts_of(interventions: Sequence[Intervention]) -> tuple[str, ...]:
    """A short text for each intervention, such as ``L0H3 zero``; those with one text are numbered from 1."""
    texts = [_text_of(one) for one in interventions]
    in_all, so_far = Counter(texts), Counter[str]()
    named = []
    for text in texts:
        so_far[text] += 1
        named.append(f"{text} ({so_far[text]})" if in_all[text] > 1 else text)
    return tuple(named)


def _text_of(intervention: Intervention) -> str:
    """``L0H3 zero``, ``L0H3 + L0H5 zero``, ``L0H3 zero + L1H2 k patch``, ``L0H3 to L1H2 path``, ``3-edge circuit``."""
    by_kind: dict[str, list[str]] = {}
    for edit in intervention.parts if isinstance(intervention, Compose) else [intervention]:
        if isinstance(edit, PathPatch):
            kind, where = "path", f"{edit.sender} to {choices(edit.receivers)}"
        elif isinstance(edit, Circuit):
            kind, where = "circuit", f"{len(edit)}-edge"
        elif isinstance(edit, Edit):
            kind = re.sub("(?<=[a-z])(?=[A-Z])", " ", type(edit).__name__.removesuffix("Ablate")).lower()
            where = str(edit.site)
        else:  # of a class of one's own
            kind, where = type(edit).__name__, ""
        by_kind.setdefault(kind, []).append(re.sub(r"(H\d+) z\b|(N\d+) mlp_post\b", r"\1\2", where))
    parts = []
    for kind, places in by_kind.items():
        more = f" + {len(places) - NAMED} more" if len(places) > NAMED else ""
        parts.append(f"{' + '.join(places[:NAMED])}{more} {kind}".strip())
    return " + ".join(parts)


def check_names(
    axes: Sequence[tuple[str, tuple[Any, ...]]], metrics: Sequence[Metric], per_position: bool, controls: bool = False
) -> None:
    """Refuse names of metrics and axes that no file can hold, or that the results need for something else.

    Parameters
    ----------
    axes : sequence of (name, labels)
    metrics : sequence of Metric
    per_position : bool
        Whether values are kept at each scored position.
    controls : bool
        Whether random sets of heads are measured too.

    Raises
    ------
    DeclarationError
        The text says what is possible.
    """
    names = [metric.name for metric in metrics]
    baselines = {f"baseline_{name}" for name in names}
    if controls:
        baselines |= {f"{name}_control" for name in names} | {f"p_{name}" for name in names}
        baselines |= {"control", "draw", "control_heads"}
    for metric in metrics:
        check_name(metric.name, "the metric")
        for text in (metric.card.long_name, metric.card.units, metric.card.reference):
            check_text(text, f"a text of the metric {metric.name}:")
        if metric.name in OWN or metric.name in baselines:
            taken = choices(sorted({*OWN} | baselines))
            raise DeclarationError(f"a metric cannot be called {metric.name!r}: results use {taken} themselves")
    check_axes(axes, {*names} | baselines | ({"position"} if per_position else set()))


def check_axes(axes: Sequence[tuple[str, tuple[Any, ...]]], taken: Container[str]) -> None:
    """Refuse grid axes with the name of a variable or dim of the result."""
    for name, _ in axes:
        if name in taken:
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
