"""The mean difference of two runs at a site: a direction to steer with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, UnknownNameError, choices
from ...interventions.declare.codec import encode
from ...interventions.declare.components import Component
from ...interventions.declare.sites import Head, Neuron, Site, as_site
from ...interventions.plan.plan import make_plan
from ...interventions.plan.reads import dims_of
from ...interventions.plan.validate import check_site
from ..measuring.context import check_remote
from ..measuring.labels import check_is_model, counted, task_json
from ..storage.provenance import provenance
from ..tasks.prompts import rendered

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ..tasks.tasks import Task

Where = Site | Head | Neuron | str


def difference(
    model: Model,
    task: Task,
    site: Where | Sequence[Where],
    runs: tuple[str, str] = ("clean", "corrupted"),
    *,
    check: bool = True,
    remote: bool | None = None,
) -> xr.DataArray:
    """The mean of a site in one run less its mean in another, as a vector to steer with.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    task : Task
    site : Site, Head, Neuron or str, or sequence of these
        Not ``pattern``. A site without positions is read at the scored positions of the task, one that names some at
        those. Of several, which differ in their layer only, each is read.
    runs : tuple of str
        The run that is read, and the one whose mean is taken away.
    check, remote
        As for `capture`; of a server, the difference comes back and nothing else.

    Returns
    -------
    DataArray
        ``d_model``, ``d_head`` or ``neuron``, as the site has them, nothing of a neuron; before it ``layer`` of several
        sites. Every position of every prompt counts once. ``attrs["origin"]`` says in words what it is: `Add` and
        `ProjectOut` take the array as it is, and keep these words. To store it, write
        ``array.to_dataset(promote_attrs=True)``.

    Raises
    ------
    DeclarationError
        A site that the model or the prompts do not have, or that is a pattern; sites that differ in more than their
        layer; or the runs are one.
    UnknownNameError
        The task has no such run.
    ModelError, ServerError
        As `capture`.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=8, length=12)
    >>> away = hw.difference(model, task, hw.Layer(1).resid_pre)
    >>> away.dims
    ('d_model',)
    >>> ds = hw.measure(model, task, hw.Add(hw.Layer(1).resid_pre, away), "logit_diff", base="corrupted")
    >>> every = hw.difference(model, task, [hw.Layer(layer).resid_post for layer in model.layers])
    >>> what = hw.Grid(lambda layer: hw.ProjectOut(hw.Layer(layer).resid_post, every.sel(layer=layer)),
    ...                layer=model.layers)

    References
    ----------
    Rimsky et al. 2023, Steering Llama 2 via Contrastive Activation Addition; Turner et al. 2023, Activation Addition.
    """
    from ...interventions.begin import begin

    check_is_model(model)
    check_remote(model, remote)
    alone = isinstance(site, str) or not isinstance(site, Iterable)
    given: Any = [site] if alone else site
    sites = [as_site(place) for place in given]
    task = rendered(task, model)
    declared, batch = task_json(task), task.draw(model)
    groups = batch.groups()
    if (
        not isinstance(runs, list | tuple)
        or len(runs) != 2
        or runs[0] == runs[1]
        or not all(isinstance(run, str) for run in runs)
    ):
        raise DeclarationError(f"runs={runs!r}: give two that differ, such as ('clean', 'corrupted')")
    for run in runs:
        if run not in batch.runs:
            raise UnknownNameError(f"runs={runs!r}: the task has the runs {choices(batch.runs)}")
    make_plan([], model=model.name, shape=model.shape, groups=groups, runs=list(batch.runs), base=runs[0])
    if not sites:
        raise DeclarationError("nothing to compare: name at least one site, such as Layer(1).resid_pre")
    for one in sites:
        check_site(one, model.name, model.shape, groups)
    first = sites[0]
    if first.component is Component.pattern:
        raise DeclarationError(f"{first}: the difference of patterns is no vector: capture gives both")
    if len({one.layer for one in sites}) < len(sites) or any(replace(one, layer=first.layer) != first for one in sites):
        raise DeclarationError(f"sites {choices(map(str, sites))}: several differ in their layer, and in nothing else")
    weights = [np.zeros((len(group.examples), group.length)) for group in groups]
    for group, counts in zip(groups, weights, strict=True):
        places = group.scored if first.positions is None else group.count_out(first.positions)
        for place in places:
            counts[:, place] += 1
    total = sum(counts.sum() for counts in weights)
    tokens = [batch.tokens(run, group) for run in runs for group in groups]
    signed = [sign * counts / total for sign in (1, -1) for counts in weights]
    with begin(model, check=check, length=int(batch.lengths.max())) as call:
        found = model.backend.weighted_sums([replace(one, positions=None) for one in sites], tokens, signed)
    dims = dims_of(first, model.shape)[1:]
    values = found[0] if alone else np.stack(found)
    array = xr.DataArray(values, dims=dims if alone else ("layer", *dims), name="difference")
    array = array.assign_coords(counted(array.sizes, ()))
    array = array if alone else array.assign_coords(layer=[place.layer for place in sites])
    where = str(first) if alone else f"{first.component} of layers {choices(str(place.layer) for place in sites)}"
    array.attrs = provenance(model, call.identity) | {
        "long_name": f"{runs[0]} - {runs[1]} at {where}",
        "units": "1",
        "origin": f"{runs[0]} - {runs[1]} at {where}, {model.name} {call.identity.weights[:12]}, {task!r}",
        "run": runs[0],
        "task": declared,
        "difference": json.dumps({"sites": encode(tuple(sites)), "runs": list(runs)}),
    }
    return array
