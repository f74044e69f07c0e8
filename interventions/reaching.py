"""Whether a server can be reached at all, asked once in a process before anything is sent to it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import httpx

from ..errors import ServerError
from .refusals import explain_unreached, first_line

REACH = 10.0
"""Seconds in which a server answers the first question, or the call ends."""
REACHED: set[str] = set()
"""Servers that have answered this process: one that is silent later is waited for."""
UNREACHED = (502, 503, 504)
"""Answers of what stands before a server that it cannot reach either."""


def reach(host: str, key: str, say: Callable[[str], None]) -> None:
    """Ask a server whether it is there, unless it has answered this process before.

    The question is asked in a thread, as nothing else puts an end to a name that is looked up for minutes.

    Parameters
    ----------
    host : str
        Address of the server.
    key : str
        That nnsight found; may be empty.
    say : callable
        Gets a line, again and again.

    Raises
    ------
    ServerError
        It does not answer within ten seconds; the text says what to do.
    """
    if host in REACHED:
        return
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    until = time.monotonic() + REACH
    threading.Thread(target=_ask, args=(host, until, answers), name="headwise first question", daemon=True).start()
    why = f"no answer within {REACH:g} seconds"
    while (left := until - time.monotonic()) > 0:
        say("connecting")
        try:
            error = answers.get(timeout=min(0.25, left))
        except queue.Empty:
            continue
        if error is None:
            REACHED.add(host)
            return
        why = why if isinstance(error, httpx.TimeoutException) else first_line(error, key)
        break
    raise ServerError(explain_unreached(host, why, key)) from None


def _ask(host: str, until: float, answers: queue.SimpleQueue[Exception | None]) -> None:
    """Any answer will do, but for that of a gateway that has not reached the server: then it is asked again."""
    try:
        while True:
            answer = httpx.get(f"{host}/ping", timeout=REACH)
            if answer.status_code not in UNREACHED:
                answers.put(None)
                return
            if time.monotonic() > until - 2:
                raise httpx.HTTPError(f"what stands before it answers {answer.status_code}")
            time.sleep(1.0)
    except Exception as error:
        answers.put(error)
