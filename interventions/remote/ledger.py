"""Where jobs that were sent away are written down, so that a later process finds them. A leaf."""

from __future__ import annotations

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
    """A ledger that lasts as long as it is held."""

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
