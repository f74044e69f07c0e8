"""capture: activations and attention patterns of a task's prompts, labelled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import UnknownNameError, choices
from ...interventions.base.shape import Shape
from ...interventions.declare.codec import encode
from ...interventions.declare.components import Component
from ...interventions.declare.sites import Head, Site, as_site
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
    sites: Site | Head | Sequence[Site | Head],
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
    sites : Site or sequence of Site
        Such as ``Head(1, 2).pattern`` or ``Layer(0).resid_post``; a bare head stands for its ``z``.
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
        ``position`` and ``d_head`` or ``d_model`` for the rest, with ``head`` before them where the site names a whole
        layer (``kv_head`` where heads share the keys and values in question). NaN beyond the end of shorter prompts.

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
    >>> ds = hw.capture(model, task, [hw.Head(1, 2).pattern, hw.Layer(0).resid_post])
    >>> ds["L1H2_pattern"].dims, ds["L0_resid_post"].dims
    (('example', 'query', 'key'), ('example', 'position', 'd_model'))
    """
    from ...interventions.begin import begin
    from ...interventions.run.activations import check_sites

    check_is_model(model)
    check_remote(model, remote)
    given = [sites] if isinstance(sites, Site | Head | str) else sites
    wanted = list(dict.fromkeys(as_site(site) for site in given))
    batch = task.draw(model)
    groups = batch.groups()
    if run not in batch.runs:
        raise UnknownNameError(f"run={run!r}: the task has the runs {choices(batch.runs)}")
    make_plan([], model=model.name, shape=model.shape, groups=groups, runs=list(batch.runs), base=run)
    check_sites(model, wanted, groups)
    dataset = xr.Dataset(coords=coordinates(model, batch, run))
    found: dict[Site, list[Array]] = {site: [] for site in wanted}
    with begin(model, check=check, length=int(batch.lengths.max())) as call:
        for values in model.backend.capture(wanted, [batch.tokens(run, group) for group in groups]):
            for site, value in zip(wanted, values, strict=True):
                found[site].append(value)
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
            array = array.rename({own.rsplit("_", 1)[1]: own}).assign_coords({own: list(site.positions)})
        dataset[name] = array
    dataset = number_dims(dataset)
    dataset.attrs = provenance(model, call.identity) | {
        "run": run,
        "task": task_json(task),
        "sites": json.dumps(encode(tuple(wanted), TASKS)),
    }
    return dataset


def _site_dims(site: Site, shape: Shape) -> tuple[str, ...]:
    shared = site.component.of_keys and shape.kv_heads < shape.heads
    head = () if site.head is not None else ("kv_head" if shared else "head",)
    if site.component is Component.pattern:
        return ("example", *head, "query", "key")
    if not site.component.per_head:
        return ("example", "position", "d_model")
    return ("example", "position", *head, "d_model" if site.component is Component.head_out else "d_head")
