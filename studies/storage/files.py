"""Results on disk: provenance, NetCDF written beside and renamed, effects derived from what was measured."""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...errors import ResultError, UnknownNameError, check_text, choices
from ...interventions.base.hashing import data_hash
from ...signals import undisturbed
from ...version import version
from .netcdf import write

if TYPE_CHECKING:
    from ...interventions.models.identity import Identity
    from ...interventions.models.model import Model
    from ...metrics.card import Card

SCHEMA = "1"
NUMBERS = "2"
"""Changes when headwise computes any number otherwise than before, so that old parts are not mixed with new ones."""
LIBRARIES = ("torch", "transformers", "nnsight", "numpy", "xarray")


def provenance(model: Model, identity: Identity) -> dict[str, str]:
    """What produced a result: model, versions, place and time. Text only, as NetCDF attributes want it.

    Parameters
    ----------
    model : Model
    identity : Identity
        Of the model when the call began, see `headwise.interventions.begin`.
    """
    return {
        "Conventions": "headwise",
        "schema_version": SCHEMA,
        "model": model.name,
        "model_revision": model.revision,
        "model_shape": json.dumps(vars(model.shape)),
        **identity.attrs(),
        "device": model.place,
        "executed": model.executed,
        "host": socket.gethostname(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def exact_facts(model: Model, identity: Identity) -> dict[str, Any]:
    """What the numbers of a model depend on, beside the prompts, as far as it can be hashed into names."""
    table = data_hash(model.family)  # which says how headwise reads the model
    return {"numbers": NUMBERS, "table": table, **identity.exact, "device": model.place, "versions": versions()}


@cache
def versions() -> str:
    """Versions of headwise and of the libraries that numbers depend on, as JSON."""
    return json.dumps({"headwise": version()} | {name: metadata.version(name) for name in LIBRARIES})


def card_attrs(card: Card, *, long_name: str | None = None) -> dict[str, str]:
    """NetCDF attributes of a variable that a metric fills."""
    attrs = {"long_name": long_name or card.long_name, "units": card.units, "metric": card.name}
    return attrs | ({"references": card.reference} if card.reference else {})


def effect(ds: xr.Dataset, name: str) -> xr.DataArray:
    """What the interventions changed: ``ds[name]`` minus the base run without intervention.

    Parameters
    ----------
    ds : Dataset
        From `measure`.
    name : str
        A metric in it, such as ``"loss"``.

    Returns
    -------
    DataArray
        The dims of ``ds[name]``; units of the metric.
    """
    values, baseline = _measured(ds, name)
    change: xr.DataArray = values - baseline.sel(run=ds.attrs["base"], drop=True)
    change = change.transpose(*values.dims).rename(f"effect_{name}")
    change.attrs = {**values.attrs, "long_name": f"change in {values.attrs.get('long_name', name)}"}
    return change


def effect_interval(ds: xr.Dataset, name: str) -> dict[str, xr.DataArray]:
    """``<name>_effect_low`` and ``_high``: a 95% bootstrap interval over examples of the mean `effect`.

    Over fewer than 5 examples, their attribute ``comment`` says that they tell little.
    """
    from ...metrics.intervals import bootstrap_interval, interval_attrs  # here, since reading results needs no torch

    change = effect(ds, name).transpose(..., "example")
    ends = bootstrap_interval(change.values)
    return {
        f"{name}_effect_{end}": xr.DataArray(
            values,
            dims=change.dims[:-1],
            attrs={
                "units": change.attrs["units"],
                "long_name": f"{change.attrs['long_name']}, 95% interval, {end} end",
                **interval_attrs(change.sizes["example"]),
            },
        )
        for end, values in zip(("low", "high"), ends, strict=True)
    }


def normalized(ds: xr.Dataset, name: str) -> xr.DataArray:
    """``(x - corrupted) / (clean - corrupted)`` as a ratio of means over examples: 0 is corrupted, 1 is clean.

    NaN where clean and corrupted are within noise of each other. Needs a task with a corrupted run.
    """
    from ...metrics.statistics import normalized as ratio_of_means

    values, baseline = _measured(ds, name)
    for run in ("clean", "corrupted"):
        if run not in baseline["run"]:
            raise UnknownNameError(f"normalized needs the run {run!r}: this task has {choices(baseline['run'].values)}")
    ratio: xr.DataArray = xr.apply_ufunc(
        ratio_of_means,
        values,
        baseline.sel(run="clean", drop=True),
        baseline.sel(run="corrupted", drop=True),
        input_core_dims=[["example"]] * 3,
    )
    ratio = ratio.rename(f"normalized_{name}")
    ratio.attrs = {"long_name": f"normalized {values.attrs.get('long_name', name)}", "units": "1"}
    return ratio


def _measured(ds: xr.Dataset, name: str) -> tuple[xr.DataArray, xr.DataArray]:
    if name not in ds or f"baseline_{name}" not in ds:
        measured = [str(other) for other in ds.data_vars if f"baseline_{other}" in ds]
        raise UnknownNameError(
            f"no intervention was measured by {name!r}: this dataset has {choices(measured) or 'none'}"
        )
    return ds[name], ds[f"baseline_{name}"]


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
        raise ResultError(f"cannot write {os.fspath(path)}: {reason(error)}") from error
    return target


def write_netcdf(result: xr.Dataset | xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a result as NetCDF: beside its final name, then renamed, so that no file is ever half-written.

    Folders that are missing are made. Ctrl-C and SIGTERM wait until the file is written.
    """
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
            told = _no_room(folder) or reason(error)
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
        return reason(error)
    return ""


def reason(error: Exception) -> str:
    """Why something could not be written or read, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error} (is the disk full?)" if "HDF error" in str(error) else str(error)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_tree(path: str | os.PathLike[str]) -> xr.DataTree:
    """Read a study's result whole into memory.

    Raises
    ------
    ResultError
        There is no such file, it cannot be read, or it does not fit into memory.
    """
    from .reading import load_result

    result = load_result(path)
    return result if isinstance(result, xr.DataTree) else xr.DataTree(result)


def as_attrs(values: Mapping[str, object]) -> dict[str, str | int | float]:
    """Attributes that NetCDF takes: numbers and text; the rest as JSON text."""
    return {
        key: value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)
        for key, value in values.items()
    }
