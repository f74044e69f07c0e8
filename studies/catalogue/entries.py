"""What a result file says about itself, read from its attributes alone; or why it is no result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ...errors import printable
from ..results import SCHEMA
from .reading import why

NEEDED = ("model", "created", "versions")
"""Attributes that every result has, beside ``schema_version``."""
SIGNATURES = (b"\x89HDF\r\n\x1a\n", b"CDF\x01", b"CDF\x02", b"CDF\x05")
"""How NetCDF files begin."""


@dataclass(frozen=True)
class Entry:
    """A row of the catalogue: what one result file says about itself.

    Attributes
    ----------
    path : str
        Relative to the folder of the catalogue, with ``/``.
    model, revision : str
    study : str
        Name of the study, ``measure`` or ``capture``.
    task : str
        The task in short.
    size : int
        Bytes.
    date : str
        When it was made, ISO 8601.
    version : str
        Of headwise.
    state : str
        ``complete``, or ``partial``: a run that did not come to its end, and goes on when it is started again.
    seed, step : int or None
        Of the task, and of training.
    """

    path: str
    model: str
    study: str
    task: str
    size: int
    date: str
    version: str
    state: str = "complete"
    seed: int | None = None
    step: int | None = None
    revision: str = ""


@dataclass(frozen=True)
class Problem:
    """A file that is no result that can be read, and why, in one line."""

    path: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


class NoResult(Exception):
    """Why a file is no result; its text is the reason."""


def check_begins_like_netcdf(path: Path) -> None:
    """Refuse what no NetCDF file begins with."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise NoResult(why(error)) from None
    if not start.startswith(SIGNATURES):
        raise NoResult("no NetCDF file" if start else "an empty file")


def row_of(relative: str, attrs: Mapping[str, Any], size: int, state: str = "complete") -> Entry:
    """The row of a result with these attributes."""
    if "schema_version" not in attrs:
        raise NoResult("not written by headwise: it has no attribute schema_version")
    _check_schema(attrs["schema_version"])
    missing = [name for name in NEEDED if not attrs.get(name)]
    if missing:
        raise NoResult(f"not whole: it has no attribute {', '.join(missing)}")
    study, task, versions = (_object(attrs, name) for name in ("study", "task", "versions"))
    seeds = [part["seed"] for part in (study, task) if isinstance(part.get("seed"), int)]
    revision = str(attrs.get("model_revision", ""))
    return Entry(
        path=relative,
        model=_line(attrs["model"]),
        study=_line(study.get("type", "")) or ("capture" if "sites" in attrs else "measure"),
        task=in_short(task),
        size=size,
        date=_date(attrs["created"]),
        version=_line(versions.get("headwise", "")),
        state=state,
        seed=seeds[0] if seeds else None,
        step=_step(attrs.get("step"), revision),
        revision=_line(revision),
    )


def _check_schema(found: object) -> None:
    number = str(found).strip()
    if not number.isdecimal() or len(number) > 9:
        raise NoResult(f"its schema_version is {_line(found)!r}: this headwise knows {SCHEMA}")
    if int(number) > int(SCHEMA):
        raise NoResult(f"written by a newer headwise: schema {_line(number)}, this one reads up to {SCHEMA}")


def _object(attrs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A JSON object in an attribute; empty where there is none."""
    value = attrs.get(name) or "{}"
    try:
        read = value if isinstance(value, dict) else json.loads(str(value))
    except (ValueError, RecursionError):
        raise NoResult(f"its attribute {name} is no JSON") from None
    if not isinstance(read, dict):
        raise NoResult(f"its attribute {name} is no JSON object")
    return read


def in_short(task: Mapping[str, Any]) -> str:
    """A task as its call, without what is as usual; texts are counted."""
    if "repr" in task:
        return _line(task["repr"])
    usual: tuple[object, ...] = (None, False, "repeat", [])
    shown = [
        f"{len(value)} {name}" if isinstance(value, list) and name != "tokens" else f"{name}={value}"
        for name, value in task.items()
        if name != "type" and value not in usual
    ]
    return _line(f"{task['type']}({', '.join(shown)})") if "type" in task else ""


def _line(value: object) -> str:
    """Text on one line, cut where it is long, without control characters."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", str(value)).strip()
    return text if len(text) <= 200 else f"{text[:199]}…"


def _date(value: object) -> str:
    try:
        return datetime.fromisoformat(str(value)).isoformat(timespec="seconds")
    except ValueError:
        raise NoResult(f"its attribute created is no date: {_line(value)!r}") from None


def _step(attr: object, revision: str) -> int | None:
    """Step of training: the attribute ``step``, or a revision such as ``step1000`` or ``checkpoint-500``."""
    if attr is not None:
        text = str(attr).removesuffix(".0")
        return int(text) if text.isdecimal() else None
    named = re.fullmatch(r"(?:global_?)?(?:step|checkpoint)[-_]?(\d+)", revision)
    return int(named.group(1)) if named else None
