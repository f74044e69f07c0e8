"""Where jobs that were sent away are written down, so that a later process finds them. A leaf."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

Record = dict[str, Any]


class Ledger(Protocol):
    """Keeps a record for each job, by the job's key."""

    def job(self, key: str) -> Record | None:
        """What was written down."""

    def note_job(self, key: str, record: Record) -> None:
        """Write it down, before anything else happens."""

    def drop_job(self, key: str) -> None:
        """Forget it."""


class InMemoryLedger:
    """A book that lasts as long as the process."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    def job(self, key: str) -> Record | None:
        """What was written down."""
        return self.records.get(key)

    def note_job(self, key: str, record: Record) -> None:
        """Write it down."""
        self.records[key] = record

    def drop_job(self, key: str) -> None:
        """Forget it."""
        self.records.pop(key, None)


_CURRENT: ContextVar[Ledger | None] = ContextVar("book", default=None)


def current() -> Ledger:
    """The book of the result that is being made; one that is thrown away where nothing is written."""
    return _CURRENT.get() or InMemoryLedger()


@contextmanager
def writing(book: Ledger) -> Iterator[None]:
    """Jobs that are sent meanwhile are written down in `book`."""
    token = _CURRENT.set(book)
    try:
        yield
    finally:
        _CURRENT.reset(token)
