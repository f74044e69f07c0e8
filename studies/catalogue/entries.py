"""What a result file says about itself, read from its attributes alone; or why it is no result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import DeclarationError, ResultError, printable
from ...interventions.declare.codec import read_json
from ...interventions.models.checkpoints import NAMED
from ..storage.netcdf import SIGNATURES, regular, why
from ..storage.provenance import SCHEMA
from ..storage.record import kind_of

NEEDED = ("model", "created", "versions")
"""Attributes that every result has, beside ``schema_version``."""
CUT = 200
"""Letters of a text in a row."""
YEARS = (1970, 2200)
"""When a result can have been made: from the first, and before the second."""
FOREIGN = "not written by headwise: it has no attribute schema_version"
"""Why a NetCDF file of something else is no result."""
LARGEST = 2**63 - 1
"""Of a whole number in a table."""


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

    def __post_init__(self) -> None:
        """Refuse what no table, terminal or page could show, wherever it comes from."""
        for name in ("model", "study", "task", "version", "state", "revision"):
            _check_text(getattr(self, name), name)
        for name in ("size", "seed", "step"):
            _check_number(getattr(self, name), name, optional=name != "size")
        if self.state not in ("complete", "partial"):
            raise NoResult(f"its state is {self.state!r}")
        _date(self.date)


@dataclass(frozen=True)
class Problem:
    """A file that is no result that can be read, and why, in one line."""

    path: str
    reason: str

    @property
    def foreign(self) -> bool:
        """Whether it is a whole NetCDF file of something else, which a listing leaves out."""
        return self.reason == FOREIGN

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


class NoResult(Exception):
    """Why a file is no result; its text is the reason."""


def check_begins_like_netcdf(path: Path) -> None:
    """Refuse what no NetCDF file begins with."""
    try:
        with regular(path) as file:
            start = file.read(8)
    except (OSError, ResultError) as error:
        raise NoResult(why(error)) from None
    if not start.startswith(SIGNATURES):
        raise NoResult("no NetCDF file" if start else "an empty file")


def row_of(relative: str, attrs: Mapping[str, Any], size: int, state: str = "complete") -> Entry:
    """Make the row of a result file from its attributes.

    Parameters
    ----------
    relative : str
        Path of the file, relative to the folder of the catalogue, with ``/``.
    attrs : mapping of str to object
        Attributes of the file, none of them checked yet.
    size : int
        Bytes of the file.
    state : {"complete", "partial"}

    Returns
    -------
    Entry

    Raises
    ------
    NoResult
        An attribute is missing, or says what no result says; the text is the reason.
    """
    if "schema_version" not in attrs:
        own = attrs.get("Conventions") == "headwise"
        raise NoResult("not whole: it has no attribute schema_version" if own else FOREIGN)
    _check_schema(attrs["schema_version"])
    missing = [name for name in NEEDED if not attrs.get(name)]
    if missing:
        raise NoResult(f"not whole: it has no attribute {', '.join(missing)}")
    study, task, versions = (_object(attrs, name) for name in ("study", "task", "versions"))
    kind = kind_of(attrs)
    call = "measure" if kind in ("measurement", "estimates") else kind
    seeds = [part["seed"] for part in (study, task) if type(part.get("seed")) is int]
    revision = _text(attrs, "model_revision")
    return Entry(
        path=relative,
        model=_line(_text(attrs, "model")),
        study=_line(_text(study, "type", "of the study")) or call,
        task=in_short(task),
        size=size,
        date=_date(_text(attrs, "created")),
        version=_line(_text(versions, "headwise", "of versions")),
        state=state,
        seed=seeds[0] if seeds else None,
        step=_step(attrs.get("step"), revision),
        revision=_line(revision),
    )


def _text(values: Mapping[str, Any], name: str, where: str = "") -> str:
    """A text that is said under a name; empty where nothing is."""
    found = values.get(name, "")
    if not isinstance(found, str):
        raise NoResult(f"its attribute {name}{f' {where}' if where else ''} is no text: {_line(found)}")
    return found


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str) or len(value) > CUT:
        raise NoResult(f"its {name} is no text of at most {CUT} letters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NoResult(f"its {name} has half of a character: {value!r}") from None


def _check_number(value: Any, name: str, *, optional: bool) -> None:
    if value is None and optional:
        return
    if type(value) is not int or not -LARGEST <= value <= LARGEST:
        raise NoResult(f"its {name} is no whole number of at most {LARGEST}: {_line(value)}")


def _check_schema(found: object) -> None:
    number = str(found).strip() if isinstance(found, str | int) else ""
    if not number.isdecimal() or len(number) > 9:
        raise NoResult(f"its schema_version is {_line(found)!r}: this headwise knows {SCHEMA}")
    if int(number) > int(SCHEMA):
        raise NoResult(f"written by a newer headwise: schema {_line(number)}, this one reads up to {SCHEMA}")


def _object(attrs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A JSON object in an attribute; empty where there is none."""
    value = attrs.get(name) or "{}"
    try:
        read = value if isinstance(value, dict) else read_json(str(value))
    except DeclarationError:
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
    try:
        text = str(value)[: 4 * CUT]
    except (ValueError, RecursionError):  # a number of very many digits, lists in lists in lists
        text = type(value).__name__
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", text).strip()
    return text if len(text) <= CUT else f"{text[: CUT - 1]}…"


def _date(value: object) -> str:
    """A date as text of one kind, in UTC where it says its zone."""
    try:
        found = datetime.fromisoformat(str(value))
        found = found if found.tzinfo is None else found.astimezone(UTC)
        if not YEARS[0] <= found.year < YEARS[1]:
            raise ValueError
        return found.isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        raise NoResult(f"its attribute created is no date from {YEARS[0]} on: {_line(value)!r}") from None


def _step(attr: object, revision: str) -> int | None:
    """Step of training: the attribute ``step``, or a revision such as ``step1000`` or ``checkpoint-500``."""
    text = str(attr).removesuffix(".0") if isinstance(attr, str | int | float) else ""
    if attr is None:
        named = NAMED.fullmatch(revision)
        text = named.group(1) if named else ""
    if not text.isdecimal():
        return None
    if len(text) > len(str(LARGEST)):
        raise NoResult(f"its step has {len(text)} digits")
    return int(text)
