"""What is finished of a result, on disk while the rest is computed, so that killed work goes on where it was.

Beside ``NAME.nc`` lies ``NAME.nc.parts/`` until the result is whole: one NetCDF file for each pass of a plan and each
stage of a study, each written beside its name, flushed and renamed; and a ``.job`` for each job that a server has of
it (its number there, never a key). A name holds the hash of everything that the
numbers depend on, so that only work that asks the same finds them, and the hash of the file, so that damage is seen.
A part must have the form of what is asked; that its numbers were computed and not made up cannot be seen.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xarray as xr

from ...errors import DeclarationError, ResultError, ResultWarning, choices
from ...interventions.base.hashing import short_hash
from ...interventions.declare.codec import read_json
from ...interventions.models.identity import Identity, stored_fingerprint
from ...signals import undisturbed
from ..output.progress import Stopped, Terminated, Terminating
from .files import beside, check_writable, flush, write_beside
from .netcdf import Source, is_of_now, why, write
from .parts_folder import ABOUT, BEHIND, LONGEST, PartsFolder

MADE_BY = "made_by"
"""Attribute of a part that holds the fingerprint of its model."""


class UnfinishedResult(PartsFolder):
    """The finished parts of a result that is not whole yet.

    Parameters
    ----------
    target : Path
        The file that the result will be.
    resume : bool
        Whether a file that is whole is taken for the result, where it was made from the same.
    """

    def __init__(self, target: Path, resume: bool) -> None:
        super().__init__(target)
        self.resume = resume
        self.taken: list[str] = []
        """Stages that were found, not made."""

    def load(
        self, key: str, identity: Identity, check: Callable[[xr.Dataset], None] = lambda part: None
    ) -> xr.Dataset | None:
        """What is stored under a key; None where there is nothing that can be used.

        A file that is damaged, that is not what it should be, or that a model made which computes otherwise than this
        one on the prompt of its fingerprint, is set aside with a warning.

        Parameters
        ----------
        key : str
        identity : Identity
        check : callable, optional
            Raises where a part, whose values were not read yet, is not what is asked for.
        """
        from .reading import loaded, open_group

        for path in self.files(f"{key}.", ".nc"):
            try:
                whole = path.read_bytes()
                if path.name != f"{key}.{short_hash(whole)}.nc":
                    raise ValueError("it is not what was written")
                source = Source(path, whole)
                with source.open():
                    stored = open_group(source, "")
                check(stored)
                with source.open():
                    part = loaded(source, {"": stored})[""]
                unlike = _unlike(part.attrs.pop(MADE_BY, None), identity)
            except Exception as error:  # whatever the library, or what somebody put there, makes of it
                if is_of_now(error):
                    raise
                self._aside(path, f"is damaged ({why(error)})", "damaged")
                continue
            if not unlike:
                return part
            self._aside(path, f"was made with another model than the one in hand: {unlike}", "other")
        return None

    def describe(self, about: Mapping[str, object], identity: Identity) -> None:
        """Write down what the result will be, for those who look; say what is not taken, as another model made it."""
        self._tell_others(identity)
        note = dict(about) | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        self.check_there()
        write_beside(self.folder / ABOUT, lambda path: path.write_text(json.dumps(note, indent=1)))

    def _tell_others(self, identity: Identity) -> None:
        """Warn where what is finished, or begun, comes from another model: it is computed again."""
        found: dict[str, Any] = {}
        if self.files("", ".nc"):
            with suppress(OSError, ValueError):
                found = read_json((self.folder / ABOUT).read_text())
        elif self.resume and self.target.is_file():
            found = self._target_attrs()
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
        with suppress(FileNotFoundError):
            os.replace(path, aside)
        text = f"{path} {why}: set aside as {aside.name}, and computed again"
        warnings.warn(text, ResultWarning, stacklevel=3)

    def keys(self, start: str) -> list[str]:
        """Keys under which something is stored, of those that start so."""
        return sorted({path.name.split(".")[0] for path in self.files(start, ".nc")})

    def save(self, key: str, part: xr.Dataset, identity: Identity) -> None:
        """Store a finished part, and what its model computes on the prompt of its fingerprint."""
        self.check_there()
        part = part.assign_attrs({MADE_BY: identity.attrs().get("fingerprint", "")})
        kept = "; what was finished before is kept there, and the same call goes on from it"
        with beside(self.folder, self.folder, kept) as path:
            write(part, path)
            flush(path)
            os.replace(path, self.folder / f"{key}.{short_hash(path.read_bytes())}.nc")
            flush(self.folder)

    def stage(
        self, key: str, make: Callable[[], xr.Dataset], identity: Identity, sizes: Mapping[str, int] | None = None
    ) -> xr.Dataset:
        """Load the stage of a study that is stored under a key; make and store it where there is none.

        Parameters
        ----------
        key : str
        make : callable
            Computes the stage.
        identity : Identity
            Of the model in hand.
        sizes : mapping of str to int, optional
            Dim to the size that it must have where the stage has that dim.

        Returns
        -------
        Dataset
            As it was read from the disk.

        Raises
        ------
        ResultError
            The folder cannot be written, or does not keep what is written to it.
        """

        def check(part: xr.Dataset) -> None:
            """Refuse a part with other sizes than those that are asked for."""
            for dim, size in (sizes or {}).items():
                if part.sizes.get(dim, size) != size:
                    raise ValueError(f"it has {part.sizes[dim]} along {dim}, where {size} are asked for")

        if (there := self.load(key, identity, check)) is not None:
            self.taken.append(key)
            return there
        self.save(key, make(), identity)
        if (there := self.load(key, identity, check)) is None:
            raise ResultError(f"{self.folder} does not keep what is written to it")
        return there

    def finished(self, inputs: str, identity: Identity) -> xr.DataTree | None:
        """The result, where it is whole already and was made from these inputs by a model that computes the same."""
        if not self.is_whole(inputs, identity):
            return None
        from .reading import as_tree, open_result

        try:
            tree = as_tree(open_result(self.target, load=True))
        except ResultError as error:
            if is_of_now(error):
                raise
            return None
        self.clear()
        return tree

    def is_whole(self, inputs: str, identity: Identity) -> bool:
        """Whether the file of the result was made from these inputs by a model that computes the same."""
        if not (self.resume and self.target.is_file()):
            return False
        if (attrs := self._target_attrs()).get("inputs") != inputs:
            return False
        if unlike := _unlike(attrs.get("fingerprint"), identity):
            text = f"{self.target} was made with another model than the one in hand: {unlike}: it is computed again"
            warnings.warn(text, ResultWarning, stacklevel=3)
            return False
        return True

    def _target_attrs(self) -> dict[str, Any]:
        """What the file in the place of the result says of itself; empty where it cannot be read."""
        from .reading import open_result

        try:
            return {str(name): one for name, one in open_result(self.target).attrs.items()}
        except ResultError as error:
            if is_of_now(error):
                raise
            return {}

    def finish(self, result: xr.Dataset | xr.DataTree) -> None:
        """Write the result whole, then take away the parts."""
        folder = self.folder if self.is_there() else self.target.parent
        write_beside(self.target, lambda path: write(result, path), folder)
        self.clear()

    def job(self, key: str) -> dict[str, Any] | None:
        """What is known of a job that was sent to a server; None where nothing is, or where it cannot be read."""
        try:
            found = read_json(self._job(key).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def note_job(self, key: str, record: dict[str, Any]) -> None:
        """Keep what is known of a job, on the disk before anything else is done."""
        self.check_there()
        text = json.dumps(record)
        write_beside(self._job(key), lambda path: path.write_text(text))

    def drop_job(self, key: str) -> None:
        """Forget a job, whose values are stored."""
        self._job(key).unlink(missing_ok=True)

    def _job(self, key: str) -> Path:
        return self.folder / f"{key}.job"

    def left(self) -> str:
        """What the same call would go on from, in words."""
        found = []
        if self.files("", ".nc"):
            found.append(f"what was finished is kept in {self.folder}")
        if any("id" in (self.job(path.stem) or {}) for path in self.files("", ".job")):
            found.append("jobs that were sent go on at the server, and the same call finds them again")
        return "; ".join(found)


def _unlike(text: object, identity: Identity) -> str:
    """Why what is stored, with this fingerprint, was not made by the model in hand; empty where nothing shows that."""
    stored = stored_fingerprint(text)
    if identity.fingerprint is None:  # a model that fails on a short prompt: the facts in the name are all there is
        return ""
    if stored is None:
        return "it says nothing of what its model computes"
    return identity.fingerprint.unlike(stored, identity.dtype)


@contextmanager
def keeping(out: str | os.PathLike[str], resume: bool) -> Iterator[UnfinishedResult]:
    """The parts of the result `out`, for one process at a time.

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
    parts = UnfinishedResult(netcdf_path(out), resume)
    with Terminating() as ending:
        try:
            try:
                with undisturbed():
                    parts.acquire()
                if not resume:
                    parts.clear()
                yield parts
            finally:
                with undisturbed():
                    parts.release()
        except Terminated as error:
            ending.said = _stop_text(error, "stopped by SIGTERM", parts.left())
            raise
        except KeyboardInterrupt as error:
            if str(error) or not (left := parts.left()):
                raise
            raise Stopped(_stop_text(error, "stopped", left)) from error


def _stop_text(error: KeyboardInterrupt, stopped: str, left: str) -> str:
    """What is said of work that was stopped."""
    return str(error) or "; ".join([stopped, *([left] if left else [])])


def netcdf_path(out: str | os.PathLike[str]) -> Path:
    """`out` as a file that can be written; or an error that says why not."""
    if Path(out).suffix != ".nc":
        raise DeclarationError(f"out={os.fspath(out)!r}: results are NetCDF files, end the name in .nc")
    target = check_writable(out)
    if (size := len(os.fsencode(target.name))) > LONGEST:
        raise DeclarationError(
            f"out={target.name[:20]!r}...: the name has {size} bytes, possible are {LONGEST}, since unfinished work is "
            f"kept in a folder of that name with {BEHIND} behind it"
        )
    return target
