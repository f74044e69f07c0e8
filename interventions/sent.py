"""What is known of a job that is sent to a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nnsight.schema.response import Status

from . import book

if TYPE_CHECKING:
    from .office import Job


@dataclass
class Sent:
    """Where a job is.

    Attributes
    ----------
    job : Job
    number : str
        Of the job at the server.
    state : str
        ``new``; ``unsure``, whether the server has it; ``sent``.
    wait : float
        Seconds until it is asked for again.
    kept : Book
        Where it is written down.
    marker : bool
        Whether it does nothing, and is sent only to see whether the server runs it before another.
    session : str
        Of the websocket that it is answered on; empty where its status is stored.
    silent, unknown, unread : float, optional
        Since when there is no answer of use, the server does not know it, and its result cannot be read.
    begun : float
        When it was sent; 0 where another process did.
    said : object
        The last status and its description.
    stood, passed : float, optional
        Since when that is all that is said; since when a job that was sent after `stood` is known to have run.
    losses : int
        Times that the server lost it.
    hidden : bool
        Whether the server wrote something over how it ended, as far as can be told.
    again : float
        When to ask next.
    status : str
        As it is told.
    """

    job: Job
    number: str
    state: str
    wait: float
    kept: book.Book
    marker: bool = False
    session: str = ""
    silent: float | None = None
    unknown: float | None = None
    unread: float | None = None
    begun: float = 0.0
    said: Any = None
    stood: float | None = None
    passed: float | None = None
    losses: int = 0
    hidden: bool = False
    again: float = 0.0
    status: str = "sending"

    @property
    def waits(self) -> bool:
        """Whether the server has said that it has the job, and neither that it runs nor how it ended."""
        known = self.stood is not None and self.unknown is None
        return known and not self.marker and self.said[0] != Status.RUNNING

    def hear(self, said: Any, now: float) -> None:
        """Take a status."""
        if said != self.said:
            self.said, self.stood, self.passed = said, now, None

    def forget(self) -> None:
        """It is as if it had not been sent."""
        self.state, self.status, self.session = "new", "sending", ""
        self.unknown = self.said = self.stood = self.passed = None


def nothing(root: Any, program: dict[str, Any]) -> dict[str, Any]:
    """What a marker does on the server."""
    return {}
