"""capture: activations and attention patterns of a task's prompts, labelled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import UnknownNameError, choices
from ...interventions.base.shape import Group, Shape
from ...interventions.declare.codec import encode
from ...interventions.declare.components import Component
from ...interventions.declare.sites import Head, Neuron, Site, as_site
from ...interventions.plan.plan import make_plan
from ..storage.provenance import provenance
from ..storage.registry import TASKS
from ..tasks.tasks import Task
from .context import check_remote
from .labels import check_is_model, coordinates, number_dims, task_json

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]


def capture(
    model: Model,
    task: Task,
    sites: Site | Head | Neuron | str | Sequence[Site | Head | Neuron | str],
    *,
    run: str = "clean",
    remote: bool | None = None,
    check: bool = True,
) -> xr.Dataset:
    """Read activations and attention patterns, without any intervention.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    task : Task
    sites : Site, str, or sequence of these
        Such as ``Head(1, 2).pattern`` or ``Layer(0).resid_post``, or as text ``"L1H2.pattern"``; a bare head stands for
        its ``z``, a bare neuron for its ``mlp_post``.
    run : str
        The run of the task that is read.
    remote : bool, optional
        As for `measure`; of a server, the values of these sites come back and nothing else.
    check : bool
        Before the first measurement or capture on a model, check that the table of its family fits it.

    Returns
    -------
    Dataset
        One variable for each site, named like ``L1H2_pattern``: dims ``example``, then ``query key`` for patterns,
        ``position`` and ``d_head``, ``neuron`` or ``d_model`` for the rest (``position`` alone of one neuron), with
        ``head`` before them where the site names a whole layer (``kv_head`` where heads share the keys and values in
        question). NaN beyond the end of shorter prompts.
        The positions of a site that names some are a dim of its own, by number or label.

    Raises
    ------
    ModelError
        A self-check failed.
    DeclarationError
        A site that the model or the prompts do not have.
    UnknownNameError
        The task has no such run.
    ServerError
        The server of a remote model cannot be reached, or refuses.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.capture(model, task, ["L1H2.pattern", hw.Layer(0).resid_post])
    >>> ds["L1H2_pattern"].dims, ds["L0_resid_post"].dims
    (('example', 'query', 'key'), ('example', 'position', 'd_model'))
    """
    from ...interventions.begin import begin
    from ...interventions.run.activations import check_sites

    check_is_model(model)
    check_remote(model, remote)
    given = [sites] if isinstance(sites, Site | Head | Neuron | str) else sites
    wanted = list(dict.fromkeys(as_site(site) for site in given))
    declared = task_json(task)
    batch = task.draw(model)
    groups = batch.groups()
    if run not in batch.runs:
        raise UnknownNameError(f"run={run!r}: the task has the runs {choices(batch.runs)}")
    make_plan([], model=model.name, shape=model.shape, groups=groups, runs=list(batch.runs), base=run)
    check_sites(model, wanted, groups)
    dataset = xr.Dataset(coords=coordinates(model, batch, run))
    found: dict[Site, list[Array]] = {site: [] for site in wanted}
    sizes = {label: max(map(len, places)) for label, places in batch.labels.items()}
    read = [_as_read(site, groups) for site in wanted]
    with begin(model, check=check, length=int(batch.lengths.max())) as call:
        captured = model.backend.capture(read, [batch.tokens(run, group) for group in groups])
        for group, values in zip(groups, captured, strict=True):
            for site, seen, value in zip(wanted, read, values, strict=True):
                found[site].append(value if seen == site else _at_places(site, value, group, model.shape, sizes))
    for site, by_group in found.items():
        dims = _site_dims(site, model.shape)
        size = [max(value.shape[axis] for value in by_group) for axis in range(len(dims))]
        whole = np.full((len(batch.lengths), *size[1:]), np.nan, dtype=by_group[0].dtype)
        for group, value in zip(groups, by_group, strict=True):
            whole[np.ix_(group.examples, *(range(width) for width in value.shape[1:]))] = value
        array = xr.DataArray(whole, dims=dims, attrs={"long_name": str(site), "units": "1", "site": repr(site)})
        name = str(site).replace(" ", "_").replace(",", "").replace("-", "m")
        if site.positions is not None:  # a dimension of its own, since it holds some positions only
            own = f"{name}_{'query' if 'query' in dims else 'position'}"
            array = array.rename({own.rsplit("_", 1)[1]: own}).assign_coords({own: _names(site, sizes)})
        dataset[name] = array
    dataset = number_dims(dataset)
    dataset.attrs = provenance(model, call.identity) | {
        "run": run,
        "task": declared,
        "sites": json.dumps(encode(tuple(wanted), TASKS)),
    }
    return dataset


def _as_read(site: Site, groups: Sequence[Group]) -> Site:
    """The site as it is read: the whole of it, where its positions are not the same numbers in each prompt."""
    same = not site.labels and all(group.prompt == group.length for group in groups)
    return site if site.positions is None or same else replace(site, positions=None)


def _at_places(site: Site, value: Array, group: Group, shape: Shape, sizes: Mapping[str, int]) -> Array:
    """A whole site at the positions that were asked for; NaN where a label has more of them in another prompt."""
    dims = _site_dims(site, shape)
    axis = dims.index("query" if "query" in dims else "position")
    parts = []
    for place in site.positions or ():
        part = np.moveaxis(value.take(group.count_out([place]), axis=axis), axis, 0)
        missing = sizes.get(str(place), len(part)) - len(part)
        parts.append(np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1), constant_values=np.nan))
    return np.moveaxis(np.concatenate(parts), 0, axis)


def _names(site: Site, sizes: Mapping[str, int]) -> list[int] | list[str]:
    """The positions of a site as coordinates: numbers, or text where there are labels (``S2``; ``S2 0``, ``S2 1``)."""
    if not site.labels:
        return [place for place in site.positions or () if not isinstance(place, str)]
    names: list[str] = []
    for place in map(str, site.positions or ()):
        names += [f"{place} {at}" for at in range(sizes[place])] if sizes.get(place, 1) > 1 else [place]
    return names


def _site_dims(site: Site, shape: Shape) -> tuple[str, ...]:
    shared = site.component.of_keys and shape.kv_heads < shape.heads
    head = () if site.head is not None else ("kv_head" if shared else "head",)
    if site.component is Component.pattern:
        return ("example", *head, "query", "key")
    if site.component.per_neuron:
        return ("example", "position", *(("neuron",) if site.neuron is None else ()))
    if not site.component.per_head:
        return ("example", "position", "d_model")
    return ("example", "position", *head, "d_model" if site.component is Component.head_out else "d_head")
