"""The result files below a folder, and a cache of what they say about themselves.

The cache, ``.headwise-index.json``, is never the truth: an entry counts only while size, times and inode of its file
are as they were, and the whole of it is dropped when it cannot be read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import ResultError
from ...interventions.declare.codec import read_json
from ..storage.files import write_beside
from ..storage.netcdf import text_of, why
from ..storage.provenance import SCHEMA
from .entries import Entry, NoResult, Problem, check_begins_like_netcdf, row_of
from .probe import Probe

INDEX = ".headwise-index.json"
INDEX_VERSION = 1
SUFFIXES = (".nc", ".nc4")
PARTS = ".parts"
ABOUT = "about.json"
LARGEST_TEXT = 64 * 2**20
"""Bytes of the cache, and of what an unfinished run says about itself."""
LONGEST = 400
"""Letters of a reason."""


def scan(
    folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[Entry], list[Problem]]:
    """All results below a folder, and all files that look like one and are none, both by path.

    Hidden files are left out, and folders that are links are not entered. Only files that the cache does not know as
    they are now are opened.
    """
    problems: list[Problem] = []
    places = list(_places(folder, problems))
    cached = _read_index(folder / INDEX)
    kept: dict[str, dict[str, Any]] = {}
    entries: list[Entry] = []
    with Probe() as probe:
        for number, (relative, path) in enumerate(places):
            progress(number, len(places))
            try:
                if "\ufffd" in relative:
                    raise NoResult("its name is not text in UTF-8")
                if relative.endswith(PARTS):
                    entries.append(_partial(folder, relative, path))
                    continue
                stamp = _stamp(folder, path)
                found = _known(relative, cached.get(relative, {}), stamp) or _read(probe, relative, path, stamp[0])
                if isinstance(found, str):
                    kept[relative] = {"stamp": stamp, "reason": found}
                    raise NoResult(found)
                row = asdict(found)
                del row["path"]
                kept[relative] = {"stamp": stamp, "row": row}
                entries.append(found)
            except Exception as bad:  # whatever a file does, the listing goes on
                problems.append(_problem(relative, bad))
    if kept != cached:
        _write_index(folder / INDEX, kept)
    return sorted(entries, key=lambda one: one.path), sorted(problems, key=lambda one: one.path)


def _places(folder: Path, problems: list[Problem]) -> Iterator[tuple[str, Path]]:
    """Everything below `folder` that is called like a result, and folders of unfinished runs."""

    def closed(error: OSError) -> None:
        place = Path(error.filename or folder)
        problems.append(Problem(_relative(folder, place), f"the folder cannot be read: {error.strerror}"))

    for where, inner, files in os.walk(folder, onerror=closed):
        here = Path(where)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in [name for name in inner if name.endswith(PARTS) and _is_result_name(name.removesuffix(PARTS))]:
            inner.remove(name)
            yield _relative(folder, here / name), here / name
        for name in sorted([*files, *inner]):
            if not name.startswith(".") and _is_result_name(name):
                yield _relative(folder, here / name), here / name


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix().encode(errors="surrogateescape").decode(errors="replace")


def _is_result_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _stamp(folder: Path, path: Path) -> list[int]:
    """What changes when a file changes; refuses what is no file of this folder."""
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(folder):
            raise NoResult("a link to a place outside of the folder" if path.exists() else "a link to nothing")
        found = path.stat()
    except FileNotFoundError:
        raise NoResult("a link to nothing" if path.is_symlink() else "it has just gone") from None
    except (OSError, RuntimeError) as error:
        raise NoResult("a link that leads nowhere" if path.is_symlink() else why(error)) from None
    if stat.S_ISDIR(found.st_mode):
        raise NoResult("a folder, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise NoResult("no regular file")
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read(probe: Probe, relative: str, path: Path, size: int) -> Entry | str:
    """The row of a file, or the reason why there is none."""
    try:
        check_begins_like_netcdf(path)
        return row_of(relative, probe.ask(path), size)
    except NoResult as bad:
        return str(bad)


def _known(relative: str, known: Mapping[str, Any], stamp: list[int]) -> Entry | str | None:
    """What the cache says of a file; None where the file changed, or this version did not write that."""
    if known.get("stamp") != stamp or len(known) != 2:
        return None
    if isinstance(reason := known.get("reason"), str):
        return reason
    try:
        return Entry(path=relative, **known["row"])
    except (NoResult, TypeError, KeyError):
        return None


def _partial(folder: Path, relative: str, path: Path) -> Entry:
    """The row of a run that did not come to its end."""
    try:
        if path.is_symlink() or not (path / ABOUT).resolve().is_relative_to(folder):
            raise NoResult("a link to a place outside of the folder")
        about = read_json(text_of(path / ABOUT, LARGEST_TEXT))
        size = sum(one.stat(follow_symlinks=False).st_size for one in os.scandir(path) if one.name.endswith(SUFFIXES))
    except FileNotFoundError:
        raise NoResult(f"an unfinished run without {ABOUT}") from None
    except (OSError, ValueError, RuntimeError) as error:  # RecursionError and links in a ring are RuntimeErrors
        raise NoResult(f"an unfinished run whose {ABOUT} cannot be read: {why(error)}") from None
    if not isinstance(about, dict):
        raise NoResult(f"an unfinished run whose {ABOUT} is no JSON object")
    return row_of(relative, about, size, state="partial")


def _problem(relative: str, bad: Exception) -> Problem:
    """Why a file is no result, in a line that can be printed."""
    said = str(bad) if isinstance(bad, NoResult) else f"it cannot be looked at: {why(bad)}"
    return Problem(relative, " ".join(said.encode("utf-8", "replace").decode().split())[:LONGEST])


def _read_index(path: Path) -> dict[str, dict[str, Any]]:
    """The cache as far as it makes sense."""
    try:
        read = json.loads(text_of(path, LARGEST_TEXT))
        if read["index_version"] != INDEX_VERSION or read["schema"] != SCHEMA:
            return {}
        return {name: known for name, known in read["files"].items() if isinstance(known, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return {}


def _write_index(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the cache, beside its name and renamed; nothing where that cannot be done."""
    text = json.dumps({"index_version": INDEX_VERSION, "schema": SCHEMA, "files": files})
    try:
        write_beside(path, lambda beside: Path(beside).write_text(text, encoding="utf-8"))
    except (OSError, ResultError):  # a folder that may only be read, a full disk: the next listing looks again
        return
