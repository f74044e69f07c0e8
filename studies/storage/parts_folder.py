"""The folder of a result that is not whole yet: for one process at a time, and safe where others write too.

It holds no links, and of what is in it only files with names of headwise are touched: anything else stays, and then so
does the folder.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from contextlib import suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

from ...errors import ResultError, ResultWarning
from .netcdf import why

ABOUT, LOCK = "about.json", "lock"
OURS = re.compile(
    rf"{re.escape(ABOUT)}|{LOCK}|\.[0-9a-f]{{16}}\.part"
    r"|([a-z]+-)?[0-9a-f]{16,64}(-[0-9a-z-]+)?(\.[0-9a-f]{16})?\.(nc|job|damaged|other|part)"
    r"|whole\.part|\.about\.json\.[0-9]+\.part"  # of versions before
)
"""Names of the files that headwise writes among the parts."""
BEHIND = ".parts"
LONGEST = 255 - len(BEHIND)
"""Bytes of the name of a result, so that a name for its parts is left."""
LONGEST_RECORD = 1024
"""Bytes of a lock."""


class PartsFolder:
    """``NAME.nc.parts``, beside ``NAME.nc``.

    Parameters
    ----------
    target : Path
        The file that the result will be.

    Attributes
    ----------
    folder : Path
    """

    def __init__(self, target: Path) -> None:
        self.target, self.folder = target, target.with_name(f"{target.name}{BEHIND}")
        self.lock = SoftFileLock(self.folder / LOCK, timeout=0)
        self.made: tuple[int, int] | None = None

    def clear(self) -> None:
        """Take away all parts, and nothing else that is there."""
        for path in self.files():
            if path.name != LOCK:
                with suppress(OSError):
                    path.unlink()

    def files(self, start: str = "", end: str = "") -> list[Path]:
        """The files among the parts that headwise wrote, of those whose names start and end so."""
        if not self.is_there():
            return []
        with os.scandir(self.folder) as found:
            names = [
                one.name
                for one in found
                if one.name.startswith(start)
                and one.name.endswith(end)
                and OURS.fullmatch(one.name)
                and one.is_file(follow_symlinks=False)
            ]
        return [self.folder / name for name in sorted(names)]

    def is_there(self) -> bool:
        """Whether the folder is the one that was there when the work began."""
        return self.made is not None and _place(self.folder) == self.made

    def check_there(self) -> None:
        """Make the folder again where somebody removed it meanwhile, and say so; refuse another one in its place."""
        if self.is_there():
            return
        if os.path.lexists(self.folder):
            raise ResultError(
                f"cannot write {self.target}: somebody put another folder, or a link, in the place of {self.folder} "
                "meanwhile: what was finished before is gone"
            )
        self.lock.release()
        self.acquire()
        text = f"{self.folder} was removed meanwhile: of {self.target.name}, only what is finished from now on is kept"
        warnings.warn(text, ResultWarning, stacklevel=3)

    def acquire(self) -> None:
        """Make the folder and take its lock; an error where it cannot be used, or another process has it."""
        try:
            try:
                self._check_ours()
                self.lock.acquire()
            except FileNotFoundError:  # another process was done, and removed it just now
                self._check_ours()
                self.lock.acquire()
        except Timeout:
            raise ResultError(
                f"{self.target} is being made by {_owner(self.folder / LOCK)}: wait for it, or write elsewhere; if "
                f"that process is gone, remove {self.folder / LOCK}"
            ) from None
        except ResultError:
            raise
        except OSError as error:
            raise ResultError(f"cannot write {self.target}: {why(error)}") from error
        for path in self.files("", ".part"):  # of a process that was killed
            path.unlink(missing_ok=True)

    def _check_ours(self) -> None:
        """Make the folder, or refuse one that is a link, or that holds links, or what is no file, under our names."""
        cannot = f"cannot write {self.target}: {self.folder}"
        if self.folder.is_symlink():
            raise ResultError(
                f"{cannot} is a link, and finished work is kept in a folder of its own: remove the link, or write "
                "elsewhere"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise ResultError(f"{cannot} is no folder: remove it, or write elsewhere")
        self.folder.mkdir(exist_ok=True)
        self.made = _place(self.folder)
        with os.scandir(self.folder) as found:
            for one in found:
                if one.is_symlink():
                    raise ResultError(f"{cannot} holds the link {one.name}: remove it, or write elsewhere")
                if OURS.fullmatch(one.name) and not one.is_file(follow_symlinks=False):
                    raise ResultError(f"{cannot} holds {one.name}, which is no file: remove it, or write elsewhere")
        if _is_foreign(self.folder / LOCK):
            raise ResultError(
                f"{cannot} holds a file {LOCK} that headwise did not write: move it away, or write elsewhere"
            )

    def release(self) -> None:
        """Let go of the folder, which is removed where nothing is left to go on from."""
        if not self.lock.is_locked:
            return
        if not any(path.suffix in (".nc", ".job") for path in self.files()):
            self.clear()
        self.lock.release()
        if self.is_there():
            with suppress(OSError):  # parts are left for the next time, or another process has begun
                self.folder.rmdir()


def _place(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from all others; None for a link, and where there is none."""
    try:
        found = os.lstat(folder)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None


def _record(lock: Path) -> tuple[str, str] | None:
    """Process and host that a lock file names; None where it names none."""
    try:
        pid, host, *_ = lock.read_text().splitlines()
    except (OSError, ValueError):
        return None
    return (pid, host) if pid.isdigit() else None


def _is_foreign(lock: Path) -> bool:
    """Whether a file is no lock: one whose process was killed may be empty."""
    size = lock.stat().st_size if lock.is_file() else 0
    return size > LONGEST_RECORD or (size > 0 and _record(lock) is None)


def _owner(lock: Path) -> str:
    """``process 12 on host``, as the lock file says."""
    if (found := _record(lock)) is None:
        return "another process"
    pid, host = found
    return f"process {pid} on {host}" + (", this one" if pid == str(os.getpid()) else "")
