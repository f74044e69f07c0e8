"""What pictures take: arrays and datasets from anywhere, made ready for drawing, or refused in words.

A dataset that somebody built by hand may have dims and nothing else: no attributes, no coordinates, no names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ....errors import DeclarationError, UnknownNameError, choices

Array = np.ndarray[Any, Any]

READ = {"read_layer": "layer", "read_head": "head"}
"""Dims of the head that an attention metric was read at, and what they are for a picture of it."""
LISTED = 12
"""How many possible values a message lists."""


def array_of(values: Any, what: str, dims: Sequence[str]) -> xr.DataArray:
    """`values` as an array of numbers; a Dataset of one variable stands for that variable.

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
    if isinstance(values, xr.Dataset):
        names = list(values.data_vars)
        if len(names) != 1:
            example = f", such as ds[{names[0]!r}]" if names else ""
            raise DeclarationError(
                f"{what} draws one variable {wanted}, and this dataset has {listed(names) or 'none'}: give one{example}"
            )
        values = values[names[0]]
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
            f"select one {extra[0]} first, {possible(values, extra[0])}" if whole else "draw others with hv.HeatMap"
        )
        wanted = f"({', '.join(dims)})"
        raise DeclarationError(f"{what} draws {wanted}, and this has {choices(values.dims) or 'no dims'}: {advice}")
    drawn: xr.DataArray = values.transpose(*dims)
    return drawn


def per_head(values: Any, what: str) -> xr.DataArray:
    """`values` as ``(layer, head)``, see `reduced`."""
    return reduced(values, what, ("layer", "head"))


def dataset_of(values: Any, what: str, name: str | None = None) -> tuple[xr.Dataset, str]:
    """A dataset and the name of the variable to draw; a DataArray becomes a dataset of one variable.

    Parameters
    ----------
    values : Dataset or DataArray
    what : str
    name : str, optional
        Needed for a dataset of several variables.
    """
    if isinstance(values, xr.DataArray):
        name = name or str(values.name or "value")
        return values.to_dataset(name=name), name
    if not isinstance(values, xr.Dataset):
        raise DeclarationError(f"{what} draws a Dataset or a DataArray, got {type(values).__name__}")
    if name is None:
        if len(values.data_vars) != 1:
            raise DeclarationError(f"{what} draws one variable: this dataset has {listed(values.data_vars)}: name one")
        (name,) = map(str, values.data_vars)
    need(values, what, name)
    return values, name


def need(ds: Any, what: str, *names: str) -> None:
    """Refuse what is no dataset, and one that lacks what a picture is made of."""
    if not isinstance(ds, xr.Dataset):
        raise DeclarationError(f"{what} draws a Dataset with {choices(names)}, got {type(ds).__name__}")
    missing = [name for name in names if name not in ds]
    if missing:
        has = f": it has {listed(ds.data_vars)}" if ds.data_vars else ""
        raise UnknownNameError(f"{what} needs {choices(names)}: this dataset has no {choices(missing)}{has}")


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
