"""The best picture for any variable of any dataset, chosen by its dims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from ....errors import DeclarationError, UnknownNameError, choices
from ....interventions.declare.circuits import Circuit
from ..ablation import sets_against_null
from ..attention import attention
from ..attention_viewer import MOST, attention_viewer
from ..circuits.curves import circuit_curve, edge_inclusion
from ..circuits.graph import circuit_graph
from ..composition import composition_matrix
from ..curves import along, ranked_conditions
from ..estimates import estimate_against_exact
from ..grids import grid, layer_by_position
from ..heads import head_grid, head_grids
from ..inspection.activations import activations, captured
from ..inspection.attribution import attributed, attribution
from ..inspection.circuits import EIGENVALUES, eigenvalue_plane, token_bars, words_of
from ..inspection.predictions import predictions, says, token_grid
from ..parts.inputs import READ, alone, changed, listed, names_of, possible, where_read
from ..parts.pairs import PAIR
from ..parts.patterns import read_pattern
from ..parts.style import styled
from ..patching import UNTOUCHED, path_grids, qkv_grids
from ..steps import over_steps
from ..text.heads import NAMED, heads_on_text

ALL = "all"
"""Selecting it draws one head grid for each value."""
TOGETHER = "component"
"""Head grids for q, k and v belong side by side."""
UNORDERED = ("head", "draw", "control_draw", "seed", "number", "place", "condition")
"""Dims whose numbers are names."""
CURVES, FEW = ("run", "estimator", "seed"), 5
"""Dims whose values are curves of one figure, and how many."""


def picture(ds: Any, variable: str | None = None, **select: Any) -> Any:
    """The picture that suits a variable: by its dims, or by what it stands beside.

    ============================  =======================================================
    dims                          picture
    ============================  =======================================================
    layer, head                   `head_grid`; with component, one for each of q, k and v
    layer, position               `layer_by_position`
    query, key                    `attention_viewer`; of long prompts, `attention`
    sender and receiver           `composition_matrix`
    set, with random sets beside  `sets_against_null`
    random sets of `measure`      `sets_against_null`
    path, sender                  `path_grids`
    edge                          `circuit_graph` of the largest, `edge_inclusion`
    share, with cpr beside        `circuit_curve`
    estimate, with exact beside   `estimate_against_exact`
    rank, of `predict`            `predictions`
    layer, position, rank         `token_grid`; of `predict` at several positions too
    source                        `attribution`
    side, rank                    `token_bars`, of the weights of heads and neurons
    index, of eigenvalues         `eigenvalue_plane`
    position, neuron or vector    `activations`
    step                          `over_steps`; with layer and head, a curve for each head
    position, example, ...        a curve with its interval, for each run
    called, of `text_heads`       `heads_on_text`
    condition, any other text     `ranked_conditions`
    any other two                 `grid`
    ============================  =======================================================

    Examples are averaged, and give the intervals; of patterns, activations and tokens the first is drawn. A metric that
    was measured with its baseline is drawn as the change from the run without intervention.

    Parameters
    ----------
    ds : Dataset, DataArray or DataTree
    variable : str, optional
        Of a tree with its group, such as ``"ablation/loss"``. Needed where there are several, but for results of
        `predict`, `logit_lens`, `direct_logit_attribution` and `text_heads`.
    **select
        Value of a dim, as it is or as text: ``ablation="zero"``, ``layer="1"``; ``"all"`` draws a head grid for each.

    Returns
    -------
    HoloViews element, overlay or layout

    Raises
    ------
    UnknownNameError
        For a variable, a dim or a value that is not there; the text lists what is.
    DeclarationError
        Where more must be selected (the text says what, and the possible values), or there is nothing to draw.
    """
    ds, variable = _found(ds, variable)
    together = [dim for dim, value in select.items() if str(value) == ALL and dim in ds[variable].dims]
    ds, title = _selected(ds, variable, {dim: value for dim, value in select.items() if dim not in together})
    special = _special(ds, variable, title)
    if special is not None:
        return special
    values = ds[variable]
    if values.dtype.kind not in "biuf":
        raise DeclarationError(f"{variable} holds text: there is nothing to draw")
    if {"query", "key"} <= {str(dim).rsplit("_", 1)[-1] for dim in values.dims}:
        return _pattern(ds, variable, select, title)
    ds, variable = changed(ds, variable)
    return _drawn(ds, variable, title, together)


def _found(ds: Any, variable: str | None) -> tuple[xr.Dataset, str]:
    """The dataset that holds the variable, and its name in it."""
    if isinstance(ds, xr.DataArray):
        name = variable or str(ds.name or "value")
        return ds.to_dataset(name=name), name
    if isinstance(ds, xr.DataTree):
        return _in_tree(ds, variable)
    if not isinstance(ds, xr.Dataset):
        raise DeclarationError(f"picture draws a Dataset, DataArray or DataTree, got {type(ds).__name__}")
    names, variable = [str(name) for name in ds.data_vars], variable or alone(ds) or _usual(ds)
    if variable not in names:
        asked = f"there is no variable {variable!r}" if variable else "name a variable"
        raise UnknownNameError(f"{asked}: there are {listed(names) or 'none'}")
    return ds, variable


def _usual(ds: xr.Dataset) -> str | None:
    """The variable that is drawn of what looks inside a model: the likeliest tokens, or what parts write."""
    if "weight" in ds and words_of(ds, "weight"):
        return "weight"
    if {*NAMED} <= {*ds}:
        return "called"
    return says(ds) or ("attribution" if "attribution" in ds and attributed(ds, "attribution") else None)


def _in_tree(tree: xr.DataTree, variable: str | None) -> tuple[xr.Dataset, str]:
    groups = {node.path.strip("/"): node.to_dataset() for node in tree.subtree}
    group, _, name = (variable or "").strip("/").rpartition("/")
    if group and group not in groups:
        raise UnknownNameError(f"there is no group {group!r}: there are {listed([one for one in groups if one])}")
    holders = [one for one, held in groups.items() if name in held.data_vars and (not group or one == group)]
    if len(holders) == 1:
        return groups[holders[0]], name
    if holders:
        raise UnknownNameError(f"{name!r} is in several groups: {choices([f'{one}/{name}' for one in holders])}")
    inside = [f"{one}/{other}".strip("/") for one, held in groups.items() for other in held.data_vars]
    inside = [one for one in inside if not group or one.rpartition("/")[0] == group]
    asked = f"there is no variable {variable!r}" if variable else "name a variable"
    raise UnknownNameError(f"{asked}: there are {listed(inside) or 'none'}")


def _selected(ds: xr.Dataset, variable: str, select: Mapping[str, Any]) -> tuple[xr.Dataset, str]:
    """The dataset at the selected values, and these in words."""
    said = []
    for dim, value in select.items():
        if dim not in ds[variable].dims:
            has = choices(ds[variable].dims) or "no dims"
            raise UnknownNameError(f"{variable} has no {dim!r} to select from: it has {has}")
        names = names_of(ds, dim)
        place = _place(names, value)
        if place is None:
            raise UnknownNameError(f"there is no {dim} {str(value)!r}: possible are {possible(ds, dim)}")
        ds = ds.isel({dim: place})
        said.append(f"{dim} {names[place]}")
    return ds, ", ".join(said)


def _place(names: list[str], value: Any) -> int | None:
    """Where a value is among labels: as text, or as the number that it stands for."""
    text = str(value)
    if text in names:
        return names.index(text)
    try:
        number = float(text)
        numbers = [float(name) for name in names]
    except ValueError:
        return None
    return numbers.index(number) if number in numbers else None


def _special(ds: xr.Dataset, variable: str, title: str) -> Any:
    """Pictures of several variables together."""
    dims = set(map(str, ds[variable].dims))
    if variable in ("exact", "estimate") and {"exact", "estimate"} <= set(ds) and "estimator" in ds["estimate"].dims:
        return estimate_against_exact(ds)
    if "set" in dims and {f"control_{variable}", f"baseline_{variable}"} <= set(ds):
        return sets_against_null(ds, variable)
    metric = variable.removesuffix("_control")
    if variable != metric and {metric, f"baseline_{metric}"} <= set(ds):
        return sets_against_null(ds, metric)
    direction = variable.removesuffix("_normalized")
    if variable != direction and direction in UNTOUCHED and dims == {"component", "layer", "head"}:
        return qkv_grids(ds, direction)
    if variable == "called" and {*NAMED} <= {*ds}:
        return heads_on_text(ds, title=title)
    if variable == "path_logit_diff" and {"path", "sender"} <= dims:
        return path_grids(ds)
    if variable == "faithfulness" and {"cpr", "cmd"} <= set(ds):
        return circuit_curve(ds, title=title)
    if dims - {"example"} == {"edge"} and {"sender", "receiver"} <= {*ds.coords}:
        return _edges(ds, variable, title)
    if set(PAIR) <= dims:
        for dim in dims - set(PAIR) - {"variant"}:
            _ask(ds, variable, dim)
        renamed = ds.rename({variable: "composition"}) if variable != "composition" else ds
        return styled(composition_matrix(renamed), title=title)
    return _inside(ds, variable, title)


def _edges(ds: xr.Dataset, variable: str, title: str) -> Any:
    """How often edges are chosen, or the graph of those with the largest scores."""
    if variable == "inclusion" and "in_circuit" in ds:
        return edge_inclusion(ds, title=title)
    values = ds[variable]
    mean = values.mean("example", keep_attrs=True) if "example" in values.dims else values
    return circuit_graph(Circuit.top(mean, mean.size), mean, title=title)  # which says how many it leaves out


def _inside(ds: xr.Dataset, variable: str, title: str) -> Any:
    """Pictures of what looks inside a model."""
    if variable in EIGENVALUES and {*EIGENVALUES} <= {*ds}:
        return eigenvalue_plane(ds, title=title)
    if words_of(ds, variable):
        others = [str(dim) for dim in ds[variable].dims if dim not in ("side", "rank")]
        for dim in others:
            if ds.sizes[dim] > 1:
                _ask(ds, variable, dim)
        return token_bars(ds.squeeze(others), variable, title=title)
    if variable == "attribution" or says(ds):
        ds = where_read(ds)
    values, likely = ds[variable], says(ds)
    kinds = {str(dim) for dim in values.dims} - {"example"}
    if likely and variable in (likely, "token", "token_id", "logit"):
        shown = likely if variable.startswith("token") else variable
        if len(kinds) > 1 and kinds <= {"layer", "position", "rank"}:
            return token_grid(ds, shown, title=title)
        if "rank" in kinds:
            return predictions(ds, shown, title=title)
    if variable == "attribution" and kinds == {"source"} and attributed(ds, variable):
        return attribution(ds, title=title)
    if "site" in values.attrs and (width := captured(values)):
        others = [dim for dim in kinds if dim != width and not dim.endswith("position")]
        for dim in others:
            if values.sizes[dim] > 1:
                _ask(ds, variable, dim)
        return activations(values.squeeze(others), title=title)
    return None


def _pattern(ds: xr.Dataset, variable: str, select: Mapping[str, Any], title: str) -> Any:
    values = ds[variable]
    extra = [str(dim) for dim in values.dims if not str(dim).endswith(("query", "key")) and dim != "example"]
    for dim in extra:
        if values.sizes[dim] > 1:
            _ask(ds, variable, dim)
    of = ds.squeeze(extra) if extra else ds
    one = of[[name for name in (variable, "expected", "kind") if name in of]].rename({variable: "pattern"})
    if "token" in of:
        one = one.assign_coords(token=of["token"])
    if "example" in one["pattern"].dims:
        shown = names_of(one, "example")[0]
        one, title = one.isel(example=0), f"{title}{', ' if title else ''}example {shown}"
    name = variable.removesuffix("_pattern")
    title = title if name == "pattern" else f"{name}{', ' if title else ''}{title}"
    long = max(read_pattern(one).weights.shape) > MOST
    return attention(one, title) if long else attention_viewer(one, title)


def _drawn(ds: xr.Dataset, variable: str, title: str, together: list[str]) -> Any:
    """The picture of one variable by its dims."""
    values = ds[variable]
    read = {dim: READ[str(dim)] for dim in values.dims if dim in READ and READ[str(dim)] not in values.dims}
    if read:
        ds = ds[[name for name in (variable, f"{variable}_low", f"{variable}_high") if name in ds]]
        ds = ds.drop_vars([name for name in read.values() if name in ds.variables]).rename(read)
        values = ds[variable]
    single = [dim for dim in values.dims if values.sizes[dim] == 1 and dim not in ("layer", "head", "example")]
    ds, values = ds.squeeze(single), values.squeeze(single)
    dims = [str(dim) for dim in values.dims if dim != "example"]
    kinds = set(dims)
    rest = kinds - {"step"}
    if (
        rest < kinds
        and "step" not in together
        and (rest == {"layer", "head"} or len(rest - {"position"}) == len(dims) - 1 < 2)
    ):
        return over_steps(ds, variable, title=title)
    if {"layer", "head"} <= kinds:
        extra = [dim for dim in dims if dim not in ("layer", "head")]
        if not extra:
            return head_grid(values, title=title)
        if len(extra) == 1 and extra[0] in (*together, TOGETHER):
            return head_grids(values, extra[0], title=f", {title}" if title else "")
        _ask(ds, variable, next(dim for dim in extra if dim not in together))
    if kinds == {"layer", "position"}:
        return layer_by_position(values, title=title)
    curves = [dim for dim in dims if dim in CURVES and values.sizes[dim] <= FEW]
    axes = [dim for dim in dims if dim not in curves[:1]]
    if not dims or (len(axes) == 0 and "example" in values.dims and not curves):
        if "example" not in values.dims:
            raise DeclarationError(f"{variable} is the single number {float(values):.6g}: there is nothing to draw")
        return along(ds, variable, "example", title=title)
    if curves and not axes and "example" in values.dims and f"{variable}".startswith("baseline_"):
        return along(ds, variable, "example", curves=curves[0], title=title)
    if len(axes) == 1 and _counts(ds, axes[0]):
        return along(ds, variable, axes[0], curves=curves[0] if curves else None, title=title)
    if len(dims) == 1:
        return ranked_conditions(ds, variable, title=title)
    if len(dims) == 2 and "step" in kinds and not _counts(ds, next(iter(kinds - {"step"}))):
        return over_steps(ds, variable, title=title)
    if len(dims) == 2:
        upright, across = sorted(dims, key=lambda dim: (dim == "position", values.sizes[dim]))
        return grid(values, across, upright, title=title)
    _ask(ds, variable, next((dim for dim in dims if dim not in ("layer", "position", "head")), dims[0]))
    return None


def _counts(ds: xr.Dataset, dim: str) -> bool:
    """Whether an axis has an order of its own, as positions and steps have."""
    if dim in UNORDERED:
        return False
    return dim not in ds.coords or np.asarray(ds[dim].values).dtype.kind in "iuf"


def _ask(ds: xr.Dataset, variable: str, dim: str) -> None:
    more = f", or {ALL} for one grid each" if {"layer", "head"} <= set(ds[variable].dims) else ""
    others = choices(ds[variable].dims)
    one = f"{dim}={ds[dim].values[0] if dim in ds.coords else 0}"
    name = variable.removeprefix("effect_")
    raise DeclarationError(
        f"{name} has {others}: select {dim}, {possible(ds, dim)}{more}; on the command line --select {one}"
    )
