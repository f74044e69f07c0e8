"""What is known of a job that is sent to a server. A leaf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    silent, unknown, unread : float, optional
        Since when there is no answer of use, the server does not know it, and its result cannot be read.
    losses : int
        Times that the server lost it.
    again : float
        When to ask next.
    status : str
        As it is told.
    """

    job: Job
    number: str
    state: str
    wait: float
    silent: float | None = None
    unknown: float | None = None
    unread: float | None = None
    losses: int = 0
    again: float = 0.0
    status: str = "sending"
