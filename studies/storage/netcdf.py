"""One way into NetCDF files: in turn, open for the moment only, and the same file each time. Imports no xarray.

The NetCDF library is not made for threads. And where a file that holds text is open twice in a process, closing it once
makes the next use of it read memory that was given back, which ends the process (issue 1444 of netcdf4-python). So
nothing here keeps a file open: who needs values opens it, reads them and closes it, within `alone`. What is not too
large is read as bytes first and opened from memory, which shares nothing with handles that others have of the file.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...errors import HeadwiseError, ResultError
from ...interventions.base.memory import shortage
from ...signals import undisturbed

if TYPE_CHECKING:
    import netCDF4
    import xarray as xr

_LOCK = threading.RLock()
IMAGE = 64 * 2**20
"""Bytes of a file that is opened from memory."""
DRAWN = 12
"""Times the bytes of values that it takes to draw them: copies, a column for each dim, and text."""
UNASKED = 256 * 2**20
"""Bytes that are read without asking how much memory there is."""
ALWAYS = 4 * 2**30
"""Bytes that are read at most where the system does not say how much memory there is."""
MOST = 5_000
"""Groups and variables of a file: results have some hundred, and each takes a millisecond and 40 kB."""
UNFINISHED = "an unfinished run: the same call or command again goes on where it stopped"
SIGNATURES = (b"\x89HDF\r\n\x1a\n", b"CDF\x01", b"CDF\x02", b"CDF\x05")
"""How NetCDF files begin."""
READERS = {"netCDF4", "xarray", "numpy", "pandas", "cftime"}
"""Libraries that fail in any way on a damaged file."""
OF_NOW = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EINTR)
OBJECT = b"OHDR"
"""How HDF5 marks the header of a group or a variable."""


@contextmanager
def alone() -> Iterator[None]:
    """Meanwhile no other thread calls the NetCDF library; Ctrl-C and SIGTERM, which would keep locks taken, wait."""
    with _LOCK, undisturbed():
        yield


_within = False


@contextmanager
def _lock_of_xarray() -> Iterator[None]:
    """The lock that xarray takes when it calls the NetCDF library for the user, who may read in another thread."""
    global _within
    backend = sys.modules.get("xarray.backends.netCDF4_")
    if backend is None or _within:  # it cannot be taken twice
        yield
        return
    with backend.NETCDF4_PYTHON_LOCK:
        _within = True
        try:
            yield
        finally:
            _within = False


def _after_fork() -> None:
    """A forked process has one thread: what another held there is free."""
    global _LOCK, _within
    _LOCK, _within = threading.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Damaged(ValueError):
    """An open file holds what no result does; `Source.open` says of which file."""


class NoRoom(ResultError):
    """What was to be read does not fit in memory."""


class Source:
    """A result file, which is the same file whenever it is opened.

    Parameters
    ----------
    path : str or path
    image : bytes, optional
        What the file holds, where it was read already.

    Raises
    ------
    ResultError
        There is no such file, or it is no file that can be read.
    """

    def __init__(self, path: str | os.PathLike[str], image: bytes | None = None) -> None:
        self.path, self.image = existing(path), image
        self.stamp: tuple[int, ...] | None = None
        self.root: netCDF4.Dataset | None = None
        self.used = False
        self.kept: dict[tuple[str, str], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"root": None}

    @contextmanager
    def open(self) -> Iterator[netCDF4.Dataset]:
        """The file, open until the block ends; within such a block it is not opened again.

        Raises
        ------
        ResultError
            It has gone, was replaced or written to since it was first opened, is damaged, or holds too much.
        """
        with alone():
            if self.root is not None:
                yield self.root
                return
            try:
                with _lock_of_xarray():
                    self.root = self._opened()
                    try:
                        yield self.root
                    finally:
                        root, self.root = self.root, None
                        root.close()
            except Exception as error:
                if not _is_of_file(error):
                    raise
                raise ResultError(f"{self.path} cannot be read: {why(error)}") from error

    def _opened(self) -> netCDF4.Dataset:
        import netCDF4

        image = self.image
        if image is None:
            with regular(self.path) as file:
                self._check_same(os.fstat(file.fileno()))
                size = os.fstat(file.fileno()).st_size
                start = file.read(8)
                image = start + file.read(size) if size <= IMAGE else None
        else:
            start = image[:8]
        if not start.startswith(SIGNATURES):
            raise ResultError(f"{self.path} cannot be read: it is no NetCDF file")
        if image is None:
            root = netCDF4.Dataset(self.path)
        elif image.count(OBJECT) > 2 * MOST:
            raise ResultError(
                f"{self.path} cannot be read: it holds {image.count(OBJECT)} objects, possible are {MOST}"
            )
        else:
            root = netCDF4.Dataset("result", memory=image)
        try:
            self._check_same(os.stat(self.path))
        except BaseException:
            root.close()
            raise
        return root

    def _check_same(self, told: os.stat_result) -> None:
        stamp = (told.st_ino, told.st_size, told.st_mtime_ns)
        if self.stamp not in (None, stamp):
            raise ResultError(f"{self.path} is not the file that was opened: it was replaced or changed; open it again")
        self.stamp = stamp


def write(result: xr.Dataset | xr.DataTree, path: Path) -> None:
    """Write a result to a file, while nobody else reads or writes one."""
    with alone():
        result.to_netcdf(path, engine="netcdf4")


def existing(path: str | os.PathLike[str]) -> Path:
    """`path` as that of a file that is there, or an error."""
    source = Path(path).expanduser()
    try:
        kind = source.stat().st_mode
    except FileNotFoundError:
        raise ResultError(f"there is no file {source}") from None
    except (OSError, ValueError, RuntimeError) as error:  # a folder that is closed, links in a ring, a NUL in the name
        raise ResultError(f"there is no file {source} that can be read: {why(error)}") from None
    if stat.S_ISDIR(kind) and source.suffix == ".parts":
        raise ResultError(f"{source} is {UNFINISHED}")
    if stat.S_ISDIR(kind):
        raise ResultError(f"{source} is a folder: open it with Results, or name a file in it")
    if not stat.S_ISREG(kind):
        raise ResultError(f"{source} is no regular file")
    return source.absolute()


@contextmanager
def regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading; whatever else has the name is refused, and nothing is waited for.

    Raises
    ------
    ResultError
        It is a folder, a FIFO, a device or a socket.
    OSError
        It cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ResultError(f"{path} is no regular file")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # replaced in between
            raise ResultError(f"{path} is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def text_of(path: Path, most: int) -> str:
    """The text of a regular file of at most `most` bytes; see `regular`."""
    with regular(path) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise ResultError(f"{path} has more than {most} bytes")
    return found.decode("utf-8")


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Whatever a damaged file makes a library raise becomes one line that names the file."""
    try:
        yield
    except (HeadwiseError, MemoryError):
        raise
    except Exception as error:  # HDF5 and xarray raise OSError, RuntimeError, ValueError, KeyError, ... on damage
        raise ResultError(f"{source} cannot be read: {why(error)}") from error


def _is_of_file(error: Exception) -> bool:
    """Whether an error tells of a file: a library that reads it raised it, or the system; not the code that asks."""
    if isinstance(error, HeadwiseError | MemoryError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__")  # compiled code, as that of netCDF4, has none
    return isinstance(error, OSError | Damaged) or module is None or module.partition(".")[0] in READERS


def why(error: Exception) -> str:
    """The reason in an error of a library, on one line and without the path that it repeats."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said[:2000].split())[:200] or type(error).__name__


def is_of_now(error: BaseException | None) -> bool:
    """Whether a failure to read says nothing of the file: memory is short, too much is open, or it may not be read."""
    while error is not None:
        if isinstance(error, NoRoom | MemoryError) or (isinstance(error, OSError) and error.errno in OF_NOW):
            return True
        error = error.__cause__
    return False


def check_room(needed: int, what: str) -> None:
    """Refuse to read what memory does not hold, before anything is read.

    Parameters
    ----------
    needed : int
        Bytes, decoded.
    what : str
        What would be read, such as ``the variable 'loss' (layer 200000, head 200000)``.

    Raises
    ------
    NoRoom
    """
    if needed > UNASKED and (short := shortage(needed, 3 / 4, ALWAYS)):
        raise NoRoom(f"{what} {short}")
