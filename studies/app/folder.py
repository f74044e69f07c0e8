"""The folder that the app serves: what is in it, what of that can be opened, and nothing outside it. Knows no Panel."""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xarray as xr

from ...errors import ResultError, UnknownNameError, choices
from ..catalogue.results import Results
from ..storage.attributes import with_plain_attrs
from ..storage.netcdf import reading
from ..storage.reading import as_tree, open_result

if TYPE_CHECKING:
    from pathlib import Path

KEPT = 4
"""Files that are kept in memory, those used last."""
SHOWN = 10
"""Names that an error lists at most."""


@dataclass(frozen=True)
class Listed:
    """A file of the folder.

    Attributes
    ----------
    name : str
        Its path in the folder, with ``/``: results are found by exactly this name.
    reason : str
        Why it cannot be shown; empty for a result.
    """

    name: str
    reason: str = ""


class Folder:
    """The results in a folder, by name; safe to use from several threads.

    Parameters
    ----------
    path : str or path

    Raises
    ------
    ResultError
        There is no such folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Results(path).folder.resolve()
        self.name = self.path.name or str(self.path)
        self._lock = threading.Lock()
        self._trees: dict[tuple[str, int, int], xr.DataTree] = {}

    def files(self) -> list[Listed]:
        """What the folder holds now, results first; each file that is no result says why."""
        results = Results(self.path)
        unfinished = "is not finished: the same call or command again goes on where it stopped"
        found = [Listed(one.path, "" if one.state == "complete" else unfinished) for one in results.entries]
        bad = [Listed(one.path, one.reason) for one in results.problems]
        return sorted([*found, *bad], key=lambda one: bool(one.reason))

    def open(self, name: str) -> xr.DataTree:
        """The result called `name`, whole in memory; sessions share it, so nothing may change it.

        Raises
        ------
        UnknownNameError
            Nothing of exactly that name is listed: it is a path to somewhere else, or it is gone.
        ResultError
            It leads out of the folder, is not finished, or cannot be read.
        """
        listed = {one.name: one.reason for one in self.files()}
        if name not in listed:
            good = [one for one, reason in listed.items() if not reason]
            more = [f"{len(good) - SHOWN} more"] if len(good) > SHOWN else []
            there = f"there is {choices([*good[:SHOWN], *more])}" if good else "there is none yet"
            raise UnknownNameError(f"no result in {self.name} is called {name!r}: {there}")
        if listed[name]:
            raise ResultError(f"{name} cannot be shown: {listed[name]}")
        path = self.path / name
        try:
            told = path.resolve(strict=True).stat()
        except (OSError, RuntimeError) as error:
            raise ResultError(f"{name} has just gone") from error
        if not path.resolve().is_relative_to(self.path) or not stat.S_ISREG(told.st_mode):
            raise ResultError(f"{name} leads out of the folder")  # replaced by a link since it was listed
        key = (name, told.st_mtime_ns, told.st_size)
        with self._lock:
            if key not in self._trees:
                tree = _read(path)
                while len(self._trees) >= KEPT:
                    del self._trees[next(iter(self._trees))]
                self._trees[key] = tree
            self._trees[key] = self._trees.pop(key)  # the one used last comes last
            return self._trees[key]


def _read(path: Path) -> xr.DataTree:
    """A file whole in memory."""
    with reading(path):
        tree: xr.DataTree = with_plain_attrs(as_tree(open_result(path, load=True)))
        return tree
