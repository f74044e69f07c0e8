"""What is known of the jobs that are sent to a server, one by one and in a call."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nnsight.schema.response import ResponseModel, Status

from . import book
from .listener import Listener

if TYPE_CHECKING:
    from .office import Job

STILL = 30.0
"""Seconds without news of a job after which a marker is sent."""
KEPT = "what was sent to it is written down where the result is, and the same call goes on from there"
NOT_KEPT = "with out= the same call could go on from there"


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


class Call:
    """What one call of `Office.run` knows beside its jobs.

    Attributes
    ----------
    kept : Book
    lasting : bool
        Whether a later process finds there what was sent.
    ran : float
        When the latest of the jobs that have run was sent: servers run them in the order in which they were sent.
    patience, still : float
        Seconds without news of a job after which a marker is sent, at first and by now.
    """

    def __init__(self, host: str) -> None:
        self.host, self.kept = host, book.current()
        self.lasting = not isinstance(self.kept, book.Memory)
        self.ran, self.still, self.patience = 0.0, STILL, STILL
        self.listener: Listener | None = None

    @property
    def goes_on(self) -> str:
        """What the same call would do after an error."""
        return KEPT if self.lasting else NOT_KEPT

    def session(self, sent: Sent, key: str) -> str:
        """What a job is sent under, where no later process could find it anyway or its end was hidden before."""
        if self.lasting and not sent.marker and not sent.hidden:
            return ""
        self.listener = self.listener or Listener(self.host, key)
        return self.listener.session if self.listener.open else ""

    def heard(self, sent: Sent) -> ResponseModel | None:
        """What the websocket has said of a job."""
        return self.listener.heard(sent.number) if self.listener and sent.session else None

    def listens(self, sent: Sent) -> bool:
        """Whether what becomes of a job will be heard, and need not be asked."""
        return bool(self.listener and sent.session and self.listener.open)

    def wait(self, until: float) -> set[str]:
        """Wait; the numbers of jobs of which something was heard meanwhile."""
        seconds = max(0.0, until - time.monotonic())
        if self.listener and self.listener.open:
            return self.listener.wait(seconds)
        time.sleep(seconds)
        return set()

    def has_run(self, sent: Sent) -> None:
        """A job has run."""
        self.ran = max(self.ran, sent.begun)
        if sent.marker:
            self.still = self.patience

    def forget(self, sent: Sent) -> None:
        """A job has ended."""
        if self.listener:
            self.listener.forget(sent.number)

    def close(self) -> None:
        """Nothing is listened to any more."""
        if self.listener:
            self.listener.close()


def nothing(root: Any, program: dict[str, Any]) -> dict[str, Any]:
    """What a marker does on the server."""
    return {}
