"""How long the vectors are that heads move from one position to another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ...errors import DeclarationError, UnknownNameError, choices, whole
from ...interventions.declare.sites import Layer
from ...interventions.plan.validate import check_site
from ..measuring.context import check_remote
from ..measuring.labels import check_is_model, coordinates, number_dims, task_json
from ..storage.provenance import provenance

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ..tasks.tasks import Task


def weighted_value_norms(
    model: Model,
    task: Task,
    layers: int | Iterable[int] | None = None,
    *,
    run: str = "clean",
    check: bool = True,
    remote: bool | None = None,
) -> xr.Dataset:
    """The norm of what each head moves from each key to each query: of its attention times the value through ``W_O``.

    ``norm[query, key] = |A[query, key] * v[key] W_O|``, with the value bias and without the output bias. Attention to a
    token whose value is short moves little, whatever its weight.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    task : Task
    layers : int or iterable of int, optional
        All where left out.
    run : str
        The run of the task that is read.
    check, remote
        As for `capture`; of a server, the norms come back and nothing else.

    Returns
    -------
    Dataset
        ``norm(layer, head, example, query, key)``, in units of the stream; NaN beyond the end of shorter prompts.

    Raises
    ------
    DeclarationError
        The model has no such layer.
    UnknownNameError
        The task has no such run.
    ModelError, ServerError
        As `capture`.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> hw.weighted_value_norms(model, task, layers=1)["norm"].dims
    ('layer', 'head', 'example', 'query', 'key')

    References
    ----------
    Kobayashi et al. 2020, Attention is Not Only a Weight: Analyzing Transformers with Vector Norms.
    """
    from ...interventions.begin import begin

    check_is_model(model)
    check_remote(model, remote)
    given = [*model.layers] if layers is None else [*layers] if isinstance(layers, Iterable) else [layers]
    wanted = [whole(layer, "a layer") for layer in given]
    declared, batch = task_json(task), task.draw(model)
    groups = batch.groups()
    if run not in batch.runs:
        raise UnknownNameError(f"run={run!r}: the task has the runs {choices(batch.runs)}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise DeclarationError(f"layers={layers!r}: give layers that differ, such as [0, 1]")
    for layer in wanted:
        check_site(Layer(layer).pattern, model.name, model.shape, groups)
    with begin(model, check=check, length=int(batch.lengths.max())) as call:
        found = model.backend.norms(wanted, [batch.tokens(run, group) for group in groups])
    longest = int(batch.lengths.max())
    shape = (len(wanted), model.shape.heads, len(batch.lengths), longest, longest)
    values = np.full(shape, np.nan, dtype=found[0].dtype)
    for group, norms in zip(groups, found, strict=True):
        places = range(norms.shape[-1])
        values[np.ix_(range(shape[0]), range(shape[1]), group.examples, places, places)] = norms
    attrs = {"long_name": "norm of the attention-weighted value", "units": "1"}
    dims = ("layer", "head", "example", "query", "key")
    result = xr.Dataset({"norm": (dims, values, attrs)}, coords=coordinates(model, batch, run, [run]))
    result = number_dims(result.assign_coords(layer=wanted))
    return result.assign_attrs(provenance(model, call.identity) | {"run": run, "task": declared})
