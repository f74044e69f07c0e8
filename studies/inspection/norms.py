"""How long the vectors are that heads move from one position to another."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, whole
from ...interventions.declare.sites import Layer
from ..measuring.capture import capture
from ..measuring.labels import check_axes, check_is_model, number_dims
from ..measuring.request import What, conditions
from .predict import asked_for

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.traced.specs import WeightsRead
    from ..tasks.tasks import Task

Array = np.ndarray[Any, Any]
DIMS = ("layer", "head", "example", "query", "key")


def weighted_value_norms(
    model: Model,
    task: Task,
    layers: int | Iterable[int] | None = None,
    *,
    what: What = None,
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
    what : Intervention, mapping of names to interventions, sequence of interventions, Grid, or None
        As for `capture`: by the attention and the values under each intervention. What is written to ``z``,
        ``head_out`` or ``attn_out``, after the values were moved, changes no norm of its own layer.
    run : str
        The run of the task that is read.
    check, remote
        As for `capture`; of a server, patterns, values and the products ``W_O W_O^T`` of heads come back.

    Returns
    -------
    Dataset
        ``norm(layer, head, example, query, key)``, in units of the stream; NaN beyond the end of shorter prompts. With
        `what` its dims come first (none, ``condition``, or the axes of the grid); the others are ``read_layer`` and
        ``read_head`` where ``layer`` or ``head`` is an axis of the grid.

    Raises
    ------
    DeclarationError
        The model has no such layer, an intervention cannot be, or memory does not hold the norms.
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
    model.check_laid_open("weighted_value_norms")
    given = [*model.layers] if layers is None else [*layers] if isinstance(layers, Iterable) else [layers]
    wanted = [whole(layer, "a layer") for layer in given]
    if not wanted or len(set(wanted)) < len(wanted):
        raise DeclarationError(f"layers={layers!r}: give layers that differ, such as [0, 1]")
    axes = [name for name, _ in conditions(what, model)[0]]
    check_axes([(name, ()) for name in axes], {"norm", *DIMS[2:], "read_layer", "read_head"})
    sites = [place for layer in map(Layer, wanted) for place in (layer.pattern, layer.v)]
    found = capture(model, task, sites, what=what, run=run, check=check, remote=remote)
    shape = model.shape
    sizes = (len(wanted), shape.heads, shape.d_head, shape.d_head)
    with begin(model, check=False):
        products = model.backend.score_weights(partial(_products, layers=wanted), sizes)
    keys = [shape.key_head(head) for head in model.heads]
    read = [one.values for one in found.data_vars.values()]
    norms = [
        pattern * _lengths(values[..., keys, :], product)[..., None, :]
        for pattern, values, product in zip(read[::2], read[1::2], products, strict=True)
    ]
    by_layer = np.stack(norms, len(axes))  # axes, layer, example, head, query, key
    names = tuple(f"read_{dim}" if dim in axes else dim for dim in DIMS)
    array = xr.DataArray(
        np.moveaxis(by_layer, len(axes) + 2, len(axes) + 1).astype(read[0].dtype),
        dims=(*axes, *names),
        attrs={"long_name": "norm of the attention-weighted value", "units": "1"},
    )
    kept = {name: one for name, one in found.coords.items() if {*one.dims} <= {*array.dims, "position", "run"}}
    result = number_dims(xr.Dataset({"norm": array}, coords=kept).assign_coords({names[0]: wanted}))
    attrs = {name: value for name, value in found.attrs.items() if name != "sites"}
    return result.assign_attrs(attrs | asked_for("weighted_value_norms", layers=wanted))


def _products(read: WeightsRead, layers: list[int]) -> Array:
    """``W_O W_O^T`` of each head, ``(layer, head, d_head, d_head)``, float64."""
    found = []
    for layer in layers:
        out: Any = read["heads"](layer)[3]
        wide = out.detach().double().cpu()
        found.append((wide @ wide.transpose(1, 2)).numpy())
    return np.stack(found)


def _lengths(values: Array, product: Array) -> Array:
    """How long values are after ``W_O``, ``(..., head, position)``, of values ``(..., position, head, d_head)``."""
    wide = values.astype(np.float64)
    squares = np.einsum("...phd,hde,...phe->...hp", wide, product, wide, optimize=True)
    lengths: Array = np.sqrt(np.maximum(squares, 0.0))
    return lengths
