"""measure and capture: a task, interventions and metrics in; a labelled dataset out. Joins the other two packages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..errors import DeclarationError
from ..interventions.codec import encode
from ..interventions.edits import Intervention
from ..interventions.grid import Grid
from ..interventions.plan import make_plan
from ..interventions.sites import Component, Site
from ..metrics.card import Metric
from ..metrics.outputs import loss
from .batch import Batch
from .progress import Progress
from .results import card_attrs, provenance
from .tables import TASKS
from .tasks import Task, reference_tokens

if TYPE_CHECKING:
    from ..interventions.models import Model

Array = np.ndarray[Any, Any]
What = Intervention | Mapping[str, Intervention] | Grid | None


def measure(
    model: Model,
    task: Task,
    what: What = None,
    metrics: Metric | Sequence[Metric] = (loss,),
    *,
    base: str = "clean",
    per_position: bool = False,
    batch_size: int | str = "auto",
    progress: Callable[[int, int], None] | bool | None = None,
) -> xr.Dataset:
    """Measure what interventions do to a model on a task.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    task : Task
    what : Intervention, mapping of names to interventions, Grid, or None
        None measures the baseline alone.
    metrics : Metric or sequence of Metric
    base : str
        The run that is intervened on.
    per_position : bool
        Keep the values of the logits metrics at each scored position (NaN elsewhere) instead of their mean.
    batch_size : int or "auto"
        Rows of one forward pass; never changes a number.
    progress : callable or bool, optional
        Called with passes done and in all; True and False force a bar on or off; by default a bar is shown in a
        terminal once the work has taken two seconds.

    Returns
    -------
    Dataset
        One variable for each metric, with the dims of `what` (none, ``condition``, or the axes of the grid), then
        ``example`` (and ``position``; for attention metrics ``read_layer``, ``read_head``: the head that was looked
        at), and ``baseline_<metric>`` with ``run``. Effects are derived: see `headwise.effect`.

    Raises
    ------
    DeclarationError, UnknownNameError
        Something that was asked for does not exist or cannot be; raised before any forward pass.
    """
    from ..interventions import engine

    started = time.monotonic()
    chosen = _metrics(metrics)
    axes, interventions = _conditions(what)
    batch = task.draw(model)
    groups = batch.groups()
    plan = make_plan(
        [intervention.edits() for intervention in interventions],
        model=model.name,
        shape=model.shape,
        groups=groups,
        runs=list(batch.runs),
        base=base,
        batch_size=batch_size,
        reads_patterns=any(metric.kind == "pattern" for metric in chosen),
    )
    readers = [
        engine.Reader(
            metric.name,
            metric.kind,
            metric.kernel,
            {run: tuple(metric.prepare(batch.facts(run, group)) for group in groups) for run in batch.runs},
            metric.needs_base,
        )
        for metric in chosen
    ]
    inputs = engine.Inputs(
        {run: tuple(batch.tokens(run, group) for group in groups) for run in batch.runs},
        reference_tokens(task, model, base, groups) if plan.uses_reference else (),
    )
    with Progress("measuring", progress) as bar:
        outcome = engine.run_plan(model, plan, readers, inputs, bar.update)

    dataset = xr.Dataset(coords=_coordinates(model, batch, base) | {name: list(values) for name, values in axes})
    shape, names = tuple(len(values) for _, values in axes), tuple(name for name, _ in axes)
    for metric in chosen:
        dims, place = _layout(metric, batch, per_position)
        if interventions:
            pieces = [place(outcome.values[metric.name, number], number) for number in range(len(groups))]
            whole = _assemble(pieces, batch, groups)
            dataset[metric.name] = ((*names, *dims), whole.reshape(*shape, *whole.shape[1:]), card_attrs(metric.card))
        runs = []
        for run in batch.runs:
            pieces = [place(outcome.baseline[metric.name, run, number][None], number) for number in range(len(groups))]
            runs.append(_assemble(pieces, batch, groups)[0])
        attrs = card_attrs(metric.card, long_name=f"{metric.card.long_name}, no intervention")
        dataset[f"baseline_{metric.name}"] = (("run", *dims), np.stack(runs), attrs)
    dataset = _number_dims(dataset)
    direction = {"clean": "noising", "corrupted": "denoising"}.get(base, base) if plan.sources() else "none"
    dataset.attrs = provenance(model) | {
        "base": base,
        "direction": direction,
        "task": json.dumps(encode(task, TASKS)),
        "interventions": json.dumps(encode(what, TASKS)),
        "metrics": json.dumps([metric.name for metric in chosen]),
        "seconds": f"{time.monotonic() - started:.3f}",
    }
    return dataset


def capture(model: Model, task: Task, sites: Site | Sequence[Site], *, run: str = "clean") -> xr.Dataset:
    """Read activations and attention patterns, without any intervention.

    Parameters
    ----------
    model : Model
    task : Task
    sites : Site or sequence of Site
        Such as ``Head(1, 2).pattern`` or ``Layer(0).resid_post``.
    run : str

    Returns
    -------
    Dataset
        One variable for each site, named like ``L1H2_pattern``: dims ``example``, then ``query key`` for patterns,
        ``position`` and ``d_head`` or ``d_model`` for the rest, with ``head`` before them where the site names a whole
        layer. NaN beyond the end of shorter prompts.
    """
    from ..interventions import engine

    wanted = [sites] if isinstance(sites, Site) else list(dict.fromkeys(sites))
    batch = task.draw(model)
    groups = batch.groups()
    make_plan([], model=model.name, shape=model.shape, groups=groups, runs=list(batch.runs), base=run)
    engine.check_sites(model, wanted, groups)
    dataset = xr.Dataset(coords=_coordinates(model, batch, run))
    found: dict[Site, list[Array]] = {site: [] for site in wanted}
    for group in groups:
        points = engine.read_points(model, batch.tokens(run, group), wanted)
        for site in wanted:
            found[site].append(engine.capture_site(model, points, site).float().cpu().numpy())
    for site, pieces in found.items():
        dims = _site_dims(site)
        size = [max(piece.shape[axis] for piece in pieces) for axis in range(len(dims))]
        whole = np.full((len(batch.lengths), *size[1:]), np.nan, dtype=np.float32)
        for group, piece in zip(groups, pieces, strict=True):
            whole[np.ix_(group.examples, *(range(width) for width in piece.shape[1:]))] = piece
        array = xr.DataArray(whole, dims=dims, attrs={"long_name": str(site), "units": "1", "site": repr(site)})
        name = str(site).replace(" ", "_").replace(",", "").replace("-", "m")
        if site.positions is not None:  # a dimension of its own, since it holds some positions only
            own = f"{name}_{'query' if 'query' in dims else 'position'}"
            array = array.rename({own.rsplit("_", 1)[1]: own}).assign_coords({own: list(site.positions)})
        dataset[name] = array
    dataset = _number_dims(dataset)
    dataset.attrs = provenance(model) | {
        "run": run,
        "task": json.dumps(encode(task, TASKS)),
        "sites": json.dumps(encode(tuple(wanted), TASKS)),
    }
    return dataset


def _number_dims(dataset: xr.Dataset) -> xr.Dataset:
    """Give the dims that count from 0 (heads, layers, positions) their coordinate."""
    counted = ("read_layer", "read_head", "head", "query", "key")
    bare = {dim: np.arange(size) for dim, size in dataset.sizes.items() if dim in counted and dim not in dataset.coords}
    return dataset.assign_coords(bare)


def _metrics(given: Metric | Sequence[Metric]) -> list[Metric]:
    chosen = [given] if isinstance(given, Metric) else list(given)
    for metric in chosen:
        if not isinstance(metric, Metric):
            raise DeclarationError(f"{metric!r} is no metric: import one from headwise.metrics, such as loss")
    if not chosen:
        raise DeclarationError("nothing to measure: name at least one metric, such as loss")
    if len({metric.name for metric in chosen}) < len(chosen):
        raise DeclarationError(f"metrics must differ, got {chosen}")
    return chosen


def _conditions(what: What) -> tuple[list[tuple[str, tuple[Any, ...]]], list[Intervention]]:
    """Axes (name and coordinates) and interventions in the order of their product."""
    if what is None:
        return [], []
    if isinstance(what, Intervention):
        return [], [what]
    if isinstance(what, Grid):
        return list(what.axes), list(what.interventions)
    if not isinstance(what, Mapping):
        raise DeclarationError(f"cannot measure {what!r}: give an intervention, a mapping of names to them, or a Grid")
    for name, intervention in what.items():
        if not isinstance(intervention, Intervention):
            raise DeclarationError(f"{name!r} is {intervention!r}: each condition must be an intervention")
    if not what:
        raise DeclarationError("the mapping of conditions is empty; leave it out to measure the baseline alone")
    return [("condition", tuple(map(str, what)))], list(what.values())


def _layout(metric: Metric, batch: Batch, per_position: bool) -> tuple[tuple[str, ...], Callable[[Array, int], Array]]:
    """Dims after the conditions, and how a group's ``(condition, example, ...)`` values are brought to them."""
    groups = batch.groups()
    if metric.kind == "pattern":
        return ("example", "read_layer", "read_head"), lambda value, number: value
    if not per_position:
        return ("example",), lambda value, number: value.mean(axis=-1)

    def spread(value: Array, number: int) -> Array:
        whole = np.full((*value.shape[:2], int(batch.lengths.max())), np.nan, dtype=np.float32)
        whole[..., list(groups[number].scored)] = value
        return whole

    return ("example", "position"), spread


def _assemble(pieces: list[Array], batch: Batch, groups: Sequence[Any]) -> Array:
    """Groups ``(condition, example of the group, ...)`` as ``(condition, example, ...)``."""
    first = pieces[0]
    whole = np.full((first.shape[0], len(batch.lengths), *first.shape[2:]), np.nan, dtype=np.float32)
    for group, piece in zip(groups, pieces, strict=True):
        whole[:, list(group.examples)] = piece
    return whole


def _coordinates(model: Model, batch: Batch, run: str) -> dict[str, Any]:
    ids = batch.runs[run].astype(np.float64)
    ids[np.arange(ids.shape[1]) >= batch.lengths[:, None]] = np.nan
    known = np.unique(batch.runs[run])
    words = dict(zip(known.tolist(), model.token_text(known.tolist()), strict=True))
    text = [["" if np.isnan(token) else words[int(token)] for token in row] for row in ids]
    return {
        "run": ("run", np.asarray(list(batch.runs), dtype=object)),
        "example": np.arange(ids.shape[0]),
        "position": np.arange(ids.shape[1]),
        "token": (("example", "position"), np.asarray(text, dtype=object), {"long_name": f"token of the {run} run"}),
        "token_id": (("example", "position"), ids, {"long_name": f"token id of the {run} run"}),
    }


def _site_dims(site: Site) -> tuple[str, ...]:
    head = () if site.head is not None else ("head",)
    if site.component is Component.pattern:
        return ("example", *head, "query", "key")
    if not site.component.per_head:
        return ("example", "position", "d_model")
    return ("example", "position", *head, "d_model" if site.component is Component.head_out else "d_head")
