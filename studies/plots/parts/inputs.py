"""What pictures take: arrays and datasets from anywhere, made ready for drawing, or refused in words.

A dataset that somebody built by hand may have dims and nothing else: no attributes, no coordinates, no names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ....errors import DeclarationError, UnknownNameError, choices
from ...measuring.effects import effect, intervened

Array = np.ndarray[Any, Any]

READ = {"read_layer": "layer", "read_head": "head"}
"""Dims of the head that an attention metric was read at, and what they are for a picture of it."""
MAKERS = {
    "pattern": "capture(model, task, [Head(0, 0).pattern])",
    "composition": "composition_scores(model)",
    "exact": "compare_estimates(model, task, what, metric)",
    "attribution": "the part attribution of an InductionStudy's result",
    "prompt": "the part words of an InductionStudy's result",
    "set_induction": "the part patching of an InductionStudy's result",
    "ablated_induction": "the part composition of an InductionStudy's result",
    "path_logit_diff": "the part composition of an InductionStudy's result",
}
"""What gives the datasets that some variables are in."""
LISTED = 12
"""How many possible values a message lists."""


def array_of(values: Any, what: str, dims: Sequence[str]) -> xr.DataArray:
    """`values` as an array of numbers; a Dataset of one variable stands for it, one of one metric for its change.

    Parameters
    ----------
    values : DataArray or Dataset
    what : str
        Name of the picture, for messages.
    dims : sequence of str
        What the picture draws, for messages.

    Raises
    ------
    DeclarationError
        For anything else, a dataset of several variables, and values that are no numbers.
    """
    wanted = f"({', '.join(dims)})"
    if isinstance(values, xr.Dataset | xr.DataTree):
        ds = part_of(values, what)
        name = alone(ds)
        if name is None:
            names = list(ds.data_vars)
            example = f", such as ds[{names[0]!r}]" if names else ""
            raise DeclarationError(
                f"{what} draws one variable {wanted}, and this dataset has {listed(names) or 'none'}: give one{example}"
            )
        ds, name = changed(ds, name)
        values = ds[name]
    if not isinstance(values, xr.DataArray):
        raise DeclarationError(
            f"{what} draws a DataArray {wanted}, got {type(values).__name__}: "
            f"xarray.DataArray(values, dims={tuple(dims)!r}) makes one"
        )
    if values.dtype.kind not in "biuf":
        raise DeclarationError(f"{what} draws numbers, and {values.name or 'this array'} holds {_kind(values)}")
    return values


def reduced(values: Any, what: str, dims: Sequence[str]) -> xr.DataArray:
    """`values` with exactly `dims`, in that order: its mean over examples is taken, dims of one value are dropped.

    Raises
    ------
    DeclarationError
        Where a dim is missing, or another one is there from which a value must be selected first.
    """
    values = array_of(values, what, dims)
    if "layer" in dims and "layer" not in values.dims:
        values = values.rename({dim: READ[dim] for dim in READ if dim in values.dims})
    if "example" in values.dims and "example" not in dims:
        values = values.mean("example", keep_attrs=True)
    values = values.squeeze([dim for dim in values.dims if dim not in dims and values.sizes[dim] == 1])
    if set(values.dims) != set(dims):
        extra = [str(dim) for dim in values.dims if dim not in dims]
        whole = set(values.dims) > set(dims)
        advice = (
            f"select one {extra[0]} first, {possible(values, extra[0])}" if whole else "plots.picture draws other dims"
        )
        wanted = f"({', '.join(dims)})"
        raise DeclarationError(f"{what} draws {wanted}, and this has {choices(values.dims) or 'no dims'}: {advice}")
    drawn: xr.DataArray = values.transpose(*dims)
    return drawn


def per_head(values: Any, what: str) -> xr.DataArray:
    """`values` as ``(layer, head)``, see `reduced`."""
    return reduced(values, what, ("layer", "head"))


def part_of(values: Any, what: str, *names: str) -> Any:
    """`values`, or of a tree the only part that has variables, and these; a study's result is a tree."""
    if not isinstance(values, xr.DataTree):
        return values
    parts = [node for node in values.subtree if node.data_vars and {*names} <= {*node.data_vars}]
    if len(parts) == 1:
        return parts[0].to_dataset()
    known = [node.path.strip("/") for node in (parts or values.subtree) if node.data_vars]
    wanted = f"with {choices(names)} " if names and parts else ""
    missing = f"no part has {choices(names)}: " if names and not parts else ""
    example = f", such as tree[{known[0]!r}]" if known else ""
    found = f"{missing}the parts {wanted}are {listed(known) or 'none'}{example}"
    raise DeclarationError(f"{what} draws one part of a result: {found}")


def alone(ds: xr.Dataset) -> str | None:
    """The variable that a dataset stands for, its only one or a measurement's only metric; None where it has more."""
    names = [str(name) for name in ds.data_vars]
    own = [name for name in names if not (name.startswith("baseline_") and name.removeprefix("baseline_") in names)]
    return own[0] if len(own) == 1 else None


def changed(ds: xr.Dataset, name: str) -> tuple[xr.Dataset, str]:
    """The change from the baseline, with its interval, where there is a baseline; without interventions the values."""
    baseline = f"baseline_{name}"
    if baseline not in ds or "run" not in ds[baseline].dims or not intervened(ds):
        return ds, name
    ds = with_base(ds, name, "picture")
    change = effect(ds, name)
    stored = {end: f"{name}_effect_{end}" for end in ("low", "high")}
    ends = {f"effect_{name}_{end}": ds[one] for end, one in stored.items() if one in ds}
    return ds.drop_vars(name).assign({str(change.name): change, **ends}), str(change.name)


def with_base(ds: Any, metric: str, what: str) -> xr.Dataset:
    """`ds` with a baseline by run and an attribute that says which is the base; by default the clean or the first."""
    own = str(metric).removeprefix("baseline_")
    if own != metric:
        raise UnknownNameError(f"{what} draws what was changed, and {metric} is without intervention: name {own!r}")
    ds = need(ds, what, metric, f"baseline_{metric}")
    if "run" not in ds[f"baseline_{metric}"].dims:
        single = ds[f"baseline_{metric}"].drop_vars("run", errors="ignore").expand_dims(run=["clean"])
        ds = ds.drop_vars("run", errors="ignore").assign({f"baseline_{metric}": single})
    runs = names_of(ds, "run")
    base = str(ds.attrs.get("base", "clean" if "clean" in runs else runs[0]))
    based: xr.Dataset = ds.assign_coords(run=runs).assign_attrs(base=base if base in runs else runs[0])
    return based


def dataset_of(values: Any, what: str, name: str | None = None, *, change: bool = False) -> tuple[xr.Dataset, str]:
    """A dataset and the name of the variable to draw; a DataArray becomes a dataset of one variable.

    Parameters
    ----------
    values : Dataset, DataArray or a part of a DataTree
    what : str
    name : str, optional
        Needed for a dataset of several variables.
    change : bool
        Whether a measurement that is given without a name stands for what its interventions changed.

    Returns
    -------
    tuple of (Dataset, str)

    Raises
    ------
    DeclarationError, UnknownNameError
        For what is no dataset, one of several variables without a name, and a name that is not there.
    """
    values = part_of(values, what, *([name] if name else []))
    if isinstance(values, xr.DataArray):
        name = name or str(values.name or "value")
        return values.to_dataset(name=name), name
    if not isinstance(values, xr.Dataset):
        raise DeclarationError(f"{what} draws a Dataset or a DataArray, got {type(values).__name__}")
    if name is None:
        name = alone(values)
        if name is None:
            raise DeclarationError(f"{what} draws one variable: this dataset has {listed(values.data_vars)}: name one")
        if change:
            values, name = changed(values, name)
    return need(values, what, name), name


def need(ds: Any, what: str, *names: str) -> xr.Dataset:
    """The dataset that a picture is made of; what is none, or lacks one of the variables, is refused."""
    made = next((f"; {MAKERS[name]} gives it" for name in names if name in MAKERS), "")
    ds = part_of(ds, what, *names)
    if not isinstance(ds, xr.Dataset):
        raise DeclarationError(f"{what} draws a Dataset with {choices(names)}, got {type(ds).__name__}{made}")
    missing = [name for name in names if name not in ds]
    if missing:
        has = f": it has {listed(ds.data_vars)}" if ds.data_vars else ""
        raise UnknownNameError(f"{what} needs {choices(names)}: this dataset has no {choices(missing)}{has}{made}")
    return ds


def where_read(ds: xr.Dataset) -> xr.Dataset:
    """`ds` with ``read_layer`` and ``read_head`` as ``layer`` and ``head``, where no axis of a grid has these names."""
    names = {old: new for old, new in READ.items() if {old} & {*ds.dims, *ds.coords} and new not in ds.dims}
    return ds.drop_vars([new for new in names.values() if new in ds.coords]).rename(names)


def need_dims(ds: xr.Dataset, what: str, wanted: Mapping[str, Sequence[str]]) -> None:
    """Refuse a dataset in which one of the variables `wanted` lacks a dim."""
    for name, dims in wanted.items():
        missing = [dim for dim in dims if dim not in ds[name].dims]
        if missing:
            has = choices(ds[name].dims) or "no dims"
            raise DeclarationError(f"{what} needs {name}({', '.join(dims)}): this {name} has {has}")


def names_of(values: xr.DataArray | xr.Dataset, dim: str) -> list[str]:
    """Labels along `dim` as text, counted from 0 where it has no coordinate."""
    return [str(one) for one in (values[dim].values if dim in values.coords else range(values.sizes[dim]))]


def labels_of(values: xr.DataArray, dim: str) -> Array:
    """Coordinate of `dim`, counted from 0 where it has none."""
    return np.asarray(values[dim].values if dim in values.coords else np.arange(values.sizes[dim]))


def numbers_of(values: xr.DataArray, dim: str) -> Array:
    """Coordinate of `dim`, counted from 0 where it has none, or none of numbers."""
    known = values[dim].values if dim in values.coords else None
    return np.arange(values.sizes[dim]) if known is None or known.dtype.kind not in "iuf" else np.asarray(known)


def places_of(values: xr.DataArray, dim: str) -> tuple[Array, list[str]]:
    """Where the cells along `dim` go, one apart, and what is written there.

    The coordinate itself where it counts in steps of one; else 0, 1, 2, ..., with the coordinate as labels.
    """
    known = numbers_of(values, dim)
    even = known.size == 1 or bool(np.all(np.diff(known) == 1))
    at = known if even and float(known[0]).is_integer() else np.arange(known.size)
    return at.astype(int), names_of(values, dim)


def with_dims(values: xr.DataArray, dims: Mapping[str, str]) -> xr.DataArray:
    """`values` with the dims that it lacks, each of one value with the given label, or the one it was selected at."""
    for dim, label in dims.items():
        if dim not in values.dims:
            values = values.expand_dims(dim if dim in values.coords else {dim: [label]})
    return values


def possible(values: xr.DataArray | xr.Dataset, dim: str) -> str:
    """The values along `dim` that can be selected, in words: ``zero, mean or resample``."""
    names = names_of(values, dim)
    return f"{names[0]} to {names[-1]}" if len(names) > LISTED else choices(names).replace(" and ", " or ")


def listed(names: Any) -> str:
    """``a, b and c``, shortened where there are many."""
    shown = [str(name) for name in names]
    return choices(shown) if len(shown) <= LISTED else f"{', '.join(shown[:LISTED])} and {len(shown) - LISTED} more"


def _kind(values: xr.DataArray) -> str:
    return {"c": "complex numbers", "M": "dates", "m": "durations"}.get(values.dtype.kind, "text")
