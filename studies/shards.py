"""What is finished of a result, on disk while the rest is computed, so that killed work goes on where it was.

Beside ``NAME.nc`` lies ``NAME.nc.parts/`` until the result is whole: one NetCDF file for each pass of a plan and each
stage of a study, each written beside its name, flushed and renamed; and a ``.job`` for each job that a server has of
it (its number there, never a key). A name holds the hash of everything that the
numbers depend on, so that only work that asks the same finds them, and the hash of the file, so that damage is seen.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xarray as xr
from filelock import SoftFileLock, Timeout

from ..errors import DeclarationError, ResultError, ResultWarning, choices
from ..interventions import book
from ..interventions.digest import short_hash
from ..interventions.identity import Identity, stored_fingerprint
from .progress import Stopped
from .results import check_writable, flush, open_tree, reason, write_beside

MADE_BY = "made_by"
"""Attribute of a part that holds the fingerprint of its model."""
_CURRENT: ContextVar[Shards | None] = ContextVar("shards", default=None)


class Shards:
    """The finished parts of a result that is not whole yet.

    Parameters
    ----------
    target : Path
        The file that the result will be.
    resume : bool
        Whether a file that is whole is taken for the result, where it was made from the same.
    """

    def __init__(self, target: Path, resume: bool) -> None:
        self.target, self.resume = target, resume
        self.folder = parts_of(target)
        self.lock = SoftFileLock(self.folder / "lock", timeout=0)

    def load(self, key: str, identity: Identity) -> xr.Dataset | None:
        """What is stored under a key; None where there is nothing that can be used.

        A file that is damaged, or that a model made which computes otherwise than this one on the prompt of its
        fingerprint, is set aside with a warning.
        """
        for path in sorted(self.folder.glob(f"{key}.*.nc")):
            try:
                whole = path.read_bytes()
                if path.name != f"{key}.{short_hash(whole)}.nc":
                    raise ValueError("it is not what was written")
                with xr.open_dataset(path, engine="netcdf4") as stored:
                    part = stored.load()
            except (OSError, ValueError) as error:
                self._aside(path, f"is damaged ({error})", "damaged")
                continue
            if not (why := _unlike(part.attrs.pop(MADE_BY, None), identity)):
                return part
            self._aside(path, f"was made with another model than the one in hand: {why}", "other")
        return None

    def describe(self, about: Mapping[str, object], identity: Identity) -> None:
        """Write down what the result will be, for those who look; say what is not taken, as another model made it."""
        self._tell_others(identity)
        note = dict(about) | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        write_beside(self.folder / "about.json", lambda path: path.write_text(json.dumps(note, indent=1)))

    def _tell_others(self, identity: Identity) -> None:
        """Warn where what is finished, or begun, comes from another model: it is computed again."""
        found: dict[str, Any] = {}
        if any(self.folder.glob("*.nc")):
            with suppress(OSError, ValueError):
                found = json.loads((self.folder / "about.json").read_text())
        elif self.resume and self.target.is_file():
            with suppress(ResultError):
                found = {str(name): one for name, one in open_tree(self.target).attrs.items()}
        if not isinstance(found, dict) or "weight_hash" not in found:
            return
        then = Identity.from_attrs(found)
        if differ := then.differences(identity, "then", "now"):
            why = f"was begun with another model than the one in hand: {'; '.join(differ)}"
        elif lacking := [
            name for name in then.unknown(identity) if not (name == "fingerprint" and identity.fingerprint is None)
        ]:
            why = f"does not say which {choices(lacking)} its model had, so that it may be another one"
        else:
            return
        warnings.warn(f"{self.target} {why}. It is computed again", ResultWarning, stacklevel=4)

    def _aside(self, path: Path, why: str, suffix: str) -> None:
        aside = path.with_suffix(f".{suffix}")
        os.replace(path, aside)
        text = f"{path} {why}: set aside as {aside.name}, and computed again"
        warnings.warn(text, ResultWarning, stacklevel=3)

    def keys(self, start: str) -> list[str]:
        """Keys under which something is stored, of those that start so."""
        return sorted({path.name.split(".")[0] for path in self.folder.glob(f"{start}*.nc")})

    def save(self, key: str, part: xr.Dataset, identity: Identity) -> None:
        """Store a finished part, and what its model computes on the prompt of its fingerprint."""
        beside = self.folder / f"{key}.part"
        part = part.assign_attrs({MADE_BY: identity.attrs().get("fingerprint", "")})
        try:
            part.to_netcdf(beside, engine="netcdf4")
            flush(beside)
            os.replace(beside, self.folder / f"{key}.{short_hash(beside.read_bytes())}.nc")
            flush(self.folder)
        except (OSError, RuntimeError) as error:  # netCDF4 says RuntimeError where the disk is full
            raise ResultError(
                f"cannot write to {self.folder}: {reason(error)}; what was finished before is kept there, and the same "
                "call goes on from it"
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def stage(self, key: str, make: Callable[[], xr.Dataset], identity: Identity) -> xr.Dataset:
        """What is stored under a key, made and stored now where there is nothing."""
        if (there := self.load(key, identity)) is None:
            self.save(key, make(), identity)
            there = self.load(key, identity)
        if there is None:
            raise ResultError(f"{self.folder} does not keep what is written to it")
        return there

    def finished(self, inputs: str, identity: Identity) -> xr.DataTree | None:
        """The result, where it is whole already and was made from these inputs by a model that computes the same."""
        if not (self.resume and self.target.is_file()):
            return None
        try:
            tree = open_tree(self.target)
        except ResultError:
            return None
        if tree.attrs.get("inputs") != inputs:
            return None
        if why := _unlike(tree.attrs.get("fingerprint"), identity):
            text = f"{self.target} was made with another model than the one in hand: {why}: it is computed again"
            warnings.warn(text, ResultWarning, stacklevel=2)
            return None
        self.clear()
        return tree

    def finish(self, result: xr.Dataset | xr.DataTree) -> None:
        """Write the result whole, then take away the parts."""
        beside = self.folder / "whole.part"
        write_beside(self.target, lambda path: result.to_netcdf(path, engine="netcdf4"), beside)
        self.clear()

    def job(self, key: str) -> dict[str, Any] | None:
        """What is known of a job that was sent to a server; None where nothing is, or where it cannot be read."""
        try:
            found = json.loads(self._job(key).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def note_job(self, key: str, record: dict[str, Any]) -> None:
        """Keep what is known of a job, on the disk before anything else is done."""
        text = json.dumps(record)
        write_beside(self._job(key), lambda path: path.write_text(text), self.folder / f"{key}.part")

    def drop_job(self, key: str) -> None:
        """Forget a job, whose values are stored."""
        self._job(key).unlink(missing_ok=True)

    def _job(self, key: str) -> Path:
        return self.folder / f"{key}.job"

    def left(self) -> str:
        """What the same call would go on from, in words."""
        found = []
        if any(self.folder.glob("*.nc")):
            found.append(f"what was finished is kept in {self.folder}")
        if any("id" in (self.job(path.stem) or {}) for path in self.folder.glob("*.job")):
            found.append("jobs that were sent go on at the server, and the same call finds them again")
        return "; ".join(found)

    def clear(self) -> None:
        """Take away all parts."""
        for path in self.folder.iterdir():
            if path != Path(self.lock.lock_file):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _acquire(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            self.lock.acquire()
        except Timeout:
            raise ResultError(
                f"{self.target} is being made by {_owner(self.folder / 'lock')}: wait for it, or write elsewhere; if "
                f"that process is gone, remove {self.folder / 'lock'}"
            ) from None
        except OSError as error:
            raise ResultError(f"cannot write {self.target}: {reason(error)}") from error
        for path in self.folder.glob("*.part"):  # of a process that was killed
            path.unlink(missing_ok=True)

    def _release(self) -> None:
        if not any(path.suffix in (".nc", ".job") for path in self.folder.iterdir()):
            self.clear()
        self.lock.release()
        with suppress(OSError):  # parts are left for the next time, or another process has begun
            self.folder.rmdir()


def _unlike(text: object, identity: Identity) -> str:
    """Why what is stored, with this fingerprint, was not made by the model in hand; empty where nothing shows that."""
    stored = stored_fingerprint(text)
    if identity.fingerprint is None:  # a model that fails on a short prompt: the facts in the name are all there is
        return ""
    if stored is None:
        return "it says nothing of what its model computes"
    return identity.fingerprint.unlike(stored, identity.dtype)


@contextmanager
def keeping(out: str | os.PathLike[str], resume: bool) -> Iterator[Shards]:
    """The parts of the result `out`, for one process at a time; measurements made meanwhile keep their passes there.

    Parameters
    ----------
    out : path
        Ends in ``.nc``.
    resume : bool
        Whether parts that are there are used; else they are removed.

    Raises
    ------
    DeclarationError, ResultError
        The name is wrong, the folder cannot be written, or another process is at work on the same result.
    """
    shards = Shards(netcdf_path(out), resume)
    shards._acquire()
    try:
        if not resume:
            shards.clear()
        token = _CURRENT.set(shards)
        try:
            with book.writing(shards):
                yield shards
        except KeyboardInterrupt as error:
            if str(error) or not (left := shards.left()):
                raise
            raise Stopped(f"stopped; {left}") from error
        finally:
            _CURRENT.reset(token)
    finally:
        shards._release()


def current() -> Shards | None:
    """The parts of the result that is being made, if it is one that is written."""
    return _CURRENT.get()


def netcdf_path(out: str | os.PathLike[str]) -> Path:
    """`out` as a file that can be written; or an error that says why not."""
    if Path(out).suffix != ".nc":
        raise DeclarationError(f"out={os.fspath(out)!r}: results are NetCDF files, end the name in .nc")
    return check_writable(out)


def parts_of(target: Path) -> Path:
    """Where the finished parts of a result are kept."""
    return target.with_name(f"{target.name}.parts")


def _owner(lock: Path) -> str:
    """``process 12 on host``, as the lock file says."""
    try:
        pid, host, *_ = lock.read_text().splitlines()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}" + (", this one" if pid == str(os.getpid()) else "")
