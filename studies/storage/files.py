"""Results on disk: NetCDF files, written beside their final name and renamed."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, ResultError, check_text
from ...signals import undisturbed
from .netcdf import why, write


def check_writable(path: str | os.PathLike[str]) -> Path:
    """`path`, made absolute, as a file that can be written, its folder made; or an error, before any work is done.

    A link in its place is replaced by the file, once that is whole; what the link leads to stays as it is.
    """
    check_text(os.fspath(path), "the file name")
    try:
        target = Path(path).expanduser().absolute()
        if target.is_dir():
            raise ResultError(f"{target} is a folder: give the name of a file in it")
        if target.exists() and not target.is_file():  # its place would be taken by the file
            raise ResultError(f"{target} is a device, a pipe or a socket: give the name of a file")
        if target.parent.is_symlink() and not target.parent.exists():
            raise ResultError(f"cannot write {target}: {target.parent} is a link to nothing")
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.lstat(target)  # says where a name is too long
        with undisturbed(), tempfile.NamedTemporaryFile(dir=target.parent, prefix=".writable-"):
            pass
    except ResultError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of nobody who is known
        raise ResultError(f"cannot write {os.fspath(path)}: {why(error)}") from error
    return target


def write_netcdf(result: xr.Dataset | xr.DataTree | xr.DataArray, path: str | os.PathLike[str]) -> Path:
    """Write a result as NetCDF: beside its final name, then renamed, so that no file is ever half-written.

    Folders that are missing are made. Ctrl-C and SIGTERM wait until the file is written.

    Parameters
    ----------
    result : Dataset, DataTree or DataArray
        Of headwise, or any other. A DataArray is written as the only variable of a Dataset, with its attributes.
    path : str or path
        The file; what is there is replaced once the new one is whole.

    Returns
    -------
    Path
        The file, absolute.

    Raises
    ------
    ResultError
        It cannot be written.
    DeclarationError
        It is something else.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, hw.ZeroAblate(hw.Head(0, 3)))
    >>> hw.write_netcdf(ds, "results/loss.nc").name
    'loss.nc'
    """
    if isinstance(result, xr.DataArray):
        result = result.to_dataset(name=result.name or "value", promote_attrs=True)
    if not isinstance(result, xr.Dataset | xr.DataTree):
        raise DeclarationError(f"{type(result).__name__} is no result: write a Dataset, a DataArray or a DataTree")
    target = check_writable(path)
    return write_beside(target, lambda beside: write(result, beside))


def write_beside(target: Path, write: Callable[[Path], object], folder: Path | None = None) -> Path:
    """Call ``write(path)`` on a new name beside `target`, flush and rename; what was there before stays until then.

    Parameters
    ----------
    target : Path
    write : callable
    folder : Path, optional
        Where the new name is; that of `target` when left out.
    """
    with beside(folder or target.parent, target) as path:
        write(path)
        flush(path)
        os.replace(path, target)
        flush(target.parent)
    return target


@contextmanager
def beside(folder: Path, cannot: Path, kept: str = "") -> Iterator[Path]:
    """A new file in a folder, for the block to fill and rename; it is gone afterwards where it was not renamed.

    Its name is one that nobody else can know, so that no link can stand there. Ctrl-C and SIGTERM wait meanwhile.

    Parameters
    ----------
    folder : Path
    cannot : Path
        What cannot be written where something fails.
    kept : str
        Said after the reason.

    Raises
    ------
    ResultError
        It cannot be written.
    """
    path = folder / f".{secrets.token_hex(8)}.part"
    with undisturbed():
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield path
        except ResultError:
            raise
        except (OSError, RuntimeError) as error:  # netCDF4 says RuntimeError where the disk is full
            told = _no_room(folder) or why(error)
            told += " (is the disk full?)" if "HDF error" in told else ""
            raise ResultError(f"cannot write {cannot}: {told}{kept}") from error
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _no_room(folder: Path) -> str:
    """Why a little more cannot be written to a folder; empty where it can.

    The NetCDF library says "Permission denied" of any file that it cannot begin, and "HDF error" of any other failure.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return why(error)
    return ""


def array_on_disk(folder: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """An array of zeros whose numbers are on the disk: in a file without a name in a folder, which goes with the array.

    Parameters
    ----------
    folder : Path
    shape : tuple of int
    dtype : dtype

    Returns
    -------
    array

    Raises
    ------
    ResultError
        There is not enough room.
    """
    size = prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a disk that is full ends the process that writes into such an array
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype=dtype, mode="r+", shape=shape).view(np.ndarray)
    except OSError as error:
        raise ResultError(f"cannot write {size:,} bytes to {folder}: {why(error)}") from error


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
