"""Opens result files, whatever they hold, as plain xarray; finds a variable in one by its name. Loads no data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xarray as xr

from ...errors import ResultError, UnknownNameError
from .names import find, group_names, variable_names

Result = xr.Dataset | xr.DataTree
"""What a file holds: a measurement is a Dataset, a study a DataTree."""


def open_result(path: str | os.PathLike[str]) -> Result:
    """Open one result file as plain xarray: a Dataset, or a DataTree where the file has groups.

    Values are read from the file when they are used: call ``.load()`` to have them all, ``.close()`` to let go of it.

    Parameters
    ----------
    path : str or path

    Raises
    ------
    ResultError
        There is no such file, or it cannot be read.
    """
    source = existing(path)
    with reading(source):
        if group_names(source):
            return xr.open_datatree(source, engine="netcdf4")
        return xr.open_dataset(source, engine="netcdf4")


def existing(path: str | os.PathLike[str]) -> Path:
    """`path` as that of a file that is there, or an error."""
    source = Path(path).expanduser()
    if source.is_dir() and source.suffix == ".parts":
        raise ResultError(f"{source} is an unfinished run: the same call or command again goes on where it stopped")
    if source.is_dir():
        raise ResultError(f"{source} is a folder: open it with Results, or name a file in it")
    if not source.is_file():
        raise ResultError(f"there is no file {source}")
    return source.absolute()


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Whatever a damaged file makes the NetCDF library raise becomes one line that names the file."""
    try:
        yield
    except (UnknownNameError, ResultError):
        raise
    except Exception as error:  # HDF5 and xarray raise OSError, RuntimeError, ValueError, KeyError, ... on damage
        raise ResultError(f"{source} cannot be read: {why(error)}") from error


def why(error: Exception) -> str:
    """The reason in an error of the NetCDF library, on one line and without the path that it repeats."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:200] or type(error).__name__


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


def open_variable(path: Path, variable: str, *, exact: bool = False) -> tuple[xr.Dataset, str]:
    """As `pick`, from a file, opening only the group that is asked for. Close the dataset when done with it."""
    source = existing(path)
    with reading(source):
        group, _, name = find(variable, variable_names(source), where=f" in {source.name}", exact=exact).rpartition("/")
        return open_group(source, group), name


def open_group(source: Path, group: str) -> xr.Dataset:
    """A group as a dataset, with the coordinates of its dims that a DataTree would have it inherit."""
    found = xr.open_dataset(source, engine="netcdf4", group=group or None)
    outer, close = group, found.close
    while outer and any(dim not in found.coords for dim in found.dims):
        outer = outer.rpartition("/")[0]
        with xr.open_dataset(source, engine="netcdf4", group=outer or None) as above:
            own = {dim: above[dim].load() for dim in above.indexes if dim in found.dims and dim not in found.coords}
        found = found.assign_coords(own)
        found.set_close(close)
    return found
