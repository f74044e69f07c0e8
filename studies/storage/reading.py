"""Opens result files, whatever they hold, as plain xarray; finds a variable in one by its name.

Values are read when they are used, as `headwise.studies.storage.netcdf` reads: no file is held open for them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray, NetCDF4DataStore
from xarray.core import indexing

from ...errors import ResultError
from .names import find, groups, names_in
from .netcdf import IMAGE, Source, alone, check_room

Result = xr.Dataset | xr.DataTree
"""What a file holds: a measurement is a Dataset, a study a DataTree."""
SMALL = 2**20
"""Bytes of a small variable: when a second one of a file is used, all are read at once, as opening takes longer."""
NUMBER, TEXT = 8, 64
"""Bytes of a number that was decoded, and of a short text."""
LONGEST = 50_000_000
"""Letters of an attribute."""


def open_result(path: str | os.PathLike[str], load: bool = False) -> Result:
    """Open one result file as plain xarray: a Dataset, or a DataTree where the file has groups.

    Parameters
    ----------
    path : str or path
        A NetCDF file: of headwise, or any other.
    load : bool
        True reads all values at once. False reads values from the file when they are used, and does not hold it open
        meanwhile. Where the file was replaced, changed or removed since, asking for values that were not read yet
        raises `ResultError`.

    Returns
    -------
    Dataset or DataTree
        A measurement is a Dataset, a study a DataTree with a group for each stage.

    Raises
    ------
    ResultError
        There is no such file, it cannot be read, or it does not fit into memory (with ``load=False``: its coordinates
        alone do not).

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, {"prev": hw.ZeroAblate(hw.Head(0, 3))}, out="loss.nc")
    >>> hw.open_result("loss.nc")["loss"].dims
    ('condition', 'example')
    """
    source = Source(path)
    if not load:
        return _opened(source)
    with source.open():
        result = _opened(source)
        if isinstance(result, xr.Dataset):
            return loaded(source, {"": result})[""]
        # group by group: `DataTree.load` leaves out variables that are called like a group
        parts = {node.path: node.to_dataset(inherit=False) for node in result.subtree}
        return xr.DataTree.from_dict(loaded(source, parts))


def as_tree(result: Result) -> xr.DataTree:
    """A result as a DataTree: a Dataset becomes one without groups."""
    return result if isinstance(result, xr.DataTree) else xr.DataTree(result)


def loaded(source: Source, parts: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Groups with all their values, after a look at how large they say they are."""
    declared = {
        f"{path}/{name}": (one.dims, one.shape, _bytes(one.shape, one.dtype))
        for path, ds in parts.items()
        for name, one in ds.variables.items()
    }
    _check(source, declared)
    return {path: ds.load() for path, ds in parts.items()}


def _opened(source: Source) -> Result:
    with source.open() as root:
        found = {path: _dataset(source, group, path) for path, group in groups(root).items()}
        return xr.DataTree.from_dict(found) if len(found) > 1 else found[""]


def _dataset(source: Source, group: Any, path: str) -> xr.Dataset:
    """A group of an open file: its coordinates are read, its variables when they are used."""
    labels = [one for name, one in group.variables.items() if one.dimensions == (name,)]
    twice = 2  # as values and as an index
    _check(source, {one.name: (one.dimensions, one.shape, twice * _bytes(one.shape, one.dtype)) for one in labels})
    ds = xr.open_dataset(_Store(source, group, path), engine="store")
    ds.set_close(None)  # the file is not its own
    ds.encoding["source"] = str(source.path)
    return ds


def _check(source: Source, declared: Mapping[str, tuple[Sequence[Any], Sequence[int], int]]) -> None:
    """Refuse variables that do not fit into memory, each and together, by what they declare."""
    for name, (dims, shape, needed) in declared.items():
        check_room(needed, _described(source, name, dims, shape))
    check_room(
        sum(needed for *_, needed in declared.values()), f"{source.path}: what its {len(declared)} variables hold"
    )


def _described(source: Source, name: str, dims: Sequence[Any], shape: Sequence[int]) -> str:
    sizes = " x ".join(f"{dim} {size}" for dim, size in zip(dims, shape, strict=True))
    return f"{source.path}: the variable {name.strip('/')} ({sizes or 'one value'})"


def _bytes(shape: Iterable[int], dtype: Any) -> int:
    """Bytes of values in memory."""
    size = TEXT if dtype is str or np.dtype(dtype).kind == "O" else np.dtype(dtype).itemsize
    return math.prod(map(int, shape)) * size


class _Store(NetCDF4DataStore):
    """A group of an open file, for xarray, with variables that outlive the opening."""

    def __init__(self, source: Source, group: Any, path: str) -> None:
        super().__init__(group)  # type: ignore[no-untyped-call]
        self.source, self.place = source, path

    def get_attrs(self) -> Mapping[str, Any]:
        """Attributes of the group."""
        return _checked(self.source, super().get_attrs())  # type: ignore[no-untyped-call]

    def open_store_variable(self, name: str, var: Any) -> xr.Variable:
        """A variable whose values are read when they are used."""
        found = super().open_store_variable(name, var)
        attrs, encoding = _checked(self.source, found.attrs), found.encoding | {"source": str(self.source.path)}
        data = indexing.LazilyIndexedArray(_Stored(self.source, self.place, name, found))
        return xr.Variable(found.dims, data, attrs, encoding)


def _checked(source: Source, attrs: Mapping[Any, Any]) -> Mapping[Any, Any]:
    for name, value in attrs.items():
        if isinstance(value, str) and len(value) > LONGEST:
            raise ResultError(f"{source.path}: its attribute {name} has {len(value)} letters, possible are {LONGEST}")
    return attrs


class _Stored(BackendArray):
    """A variable of a file: each access reads what is selected, and leaves the file closed."""

    def __init__(self, source: Source, group: str, name: str, variable: xr.Variable) -> None:
        self.source, self.group, self.name, self.dims = source, group, name, variable.dims
        self.shape, self.dtype = variable.shape, variable.dtype
        self.least = _bytes(variable.encoding.get("chunksizes") or (), self.dtype)  # what one value takes to read

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        with alone():
            small = self.source.root is None and max(self.least, _bytes(self.shape, self.dtype)) <= SMALL
            first, self.source.used = not self.source.used, self.source.used or small
            if small and not first:
                found = _small(self.source).get((self.group, self.name))
                if found is not None:
                    picked = indexing.apply_indexer(indexing.as_indexable(found), key)  # type: ignore[no-untyped-call]
                    return np.array(picked, dtype=found.dtype)
            return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        shape = [_picked(one, size) for one, size in zip(key, self.shape, strict=True)]
        needed = max(self.least, _bytes(shape, self.dtype))
        check_room(needed, _described(self.source, f"{self.group}/{self.name}", self.dims, shape))
        with self.source.open() as root:
            return _raw(groups(root)[self.group].variables[self.name])[key]


def _small(source: Source) -> dict[tuple[str, str], Any]:
    """What is small in a file, all read at once; what is damaged is left out, and told of when it is used itself."""
    if source.kept is None:
        kept: dict[tuple[str, str], Any] = {}
        room = IMAGE
        with source.open() as root:
            each = [(path, one) for path, group in groups(root).items() for one in group.variables.values()]
            for path, variable in each:
                chunk = variable.chunking()
                shapes = (variable.shape, chunk if isinstance(chunk, list) else ())
                needed = max(_bytes(shape, variable.dtype) for shape in shapes)
                if needed <= min(SMALL, room):
                    room -= needed
                    with suppress(Exception):
                        kept[path, variable.name] = _raw(variable)[...]
        source.kept = kept
    return source.kept


def _raw(variable: Any) -> Any:
    """A variable of an open file, its values as they are stored."""
    variable.set_auto_maskandscale(False)
    variable.set_auto_chartostring(False)
    return variable


def _picked(key: Any, size: int) -> int:
    """How many of `size` places a key of one dim takes."""
    return len(range(*key.indices(size))) if isinstance(key, slice) else int(np.size(key))


def variables(result: Result) -> list[str]:
    """Names of all data variables: ``loss`` of a Dataset, ``ablation/loss`` of a DataTree."""
    if isinstance(result, xr.Dataset):
        return [str(name) for name in result.data_vars]
    return [
        f"{node.path.strip('/')}/{name}".lstrip("/") for node in result.subtree for name in node.to_dataset().data_vars
    ]


def pick(result: Result, variable: str) -> tuple[xr.Dataset, str]:
    """The dataset that holds `variable`, and the variable's name in it.

    Parameters
    ----------
    result : Dataset or DataTree
    variable : str
        ``loss``, ``ablation/loss``; a name without its group will do where only one group has it.

    Raises
    ------
    UnknownNameError
        There is none, or there are several.
    """
    full = find(variable, variables(result))
    group, _, name = full.rpartition("/")
    return (result if isinstance(result, xr.Dataset) else result[group or "/"].to_dataset()), name


def open_variable(source: Source, variable: str, *, exact: bool = False) -> tuple[xr.Dataset, str]:
    """As `pick`, from a file, opening only the group that is asked for."""
    with source.open() as root:
        group, _, name = find(variable, names_in(root), where=f" in {source.path.name}", exact=exact).rpartition("/")
        return open_group(source, group), name


def open_group(source: Source, group: str) -> xr.Dataset:
    """A group as a dataset, with the coordinates of its dims that a DataTree would have it inherit."""
    with source.open() as root:
        there = groups(root)
        found, outer = _dataset(source, there[group], group), group
        while outer and any(dim not in found.coords for dim in found.dims):
            outer = outer.rpartition("/")[0]
            above = _dataset(source, there[outer], outer)
            lacking = [dim for dim in above.indexes if dim in found.dims and dim not in found.coords]
            found = found.assign_coords({dim: above[dim] for dim in lacking})
    return found
