"""A job for a server, and what is known of one that was sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nnsight.schema.response import Status

from .ledger import Ledger
from .protocol import ROOM, Unfit


@dataclass
class RemoteJob:
    """Something for a server to do: ``function(root, program)``.

    Attributes
    ----------
    key : str
        A hash of what it asks; jobs with one key give the same.
    function : callable
        Of `server_jobs`; it is sent along, and runs where the model's weights are.
    program : dict
        What it takes beside the model: plain data, tensors and functions.
    read : callable
        Gives what came back as it is to be used; raises anything where that is not what was asked for.
    most : int
        Bytes of what may come back.
    """

    key: str
    function: Callable[[Any, Any], Any]
    program: dict[str, Any]
    read: Callable[[Any], Any] = dict
    most: int = ROOM

    def taken(self, results: Any) -> Any:
        """What came back, as it is to be used.

        Raises
        ------
        Unfit
            It is not what was asked for.
        """
        try:
            return self.read(results)
        except Unfit:
            raise
        except Exception as error:  # data of any kind fails in any way
            raise Unfit(f"it is not made as what was asked for is ({type(error).__name__})") from None


@dataclass
class Failed:
    """What a server said of a job that it could not run."""

    reason: str


@dataclass
class JobState:
    """Where a job is.

    Attributes
    ----------
    job : RemoteJob
    number : str
        Of the job at the server.
    phase : str
        ``new``; ``unsure``, whether the server has it; ``sent``.
    wait : float
        Seconds until it is asked for again.
    ledger : Ledger
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

    job: RemoteJob
    number: str
    phase: str
    wait: float
    ledger: Ledger
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
        self.phase, self.status, self.session = "new", "sending", ""
        self.unknown = self.said = self.stood = self.passed = None
