"""Whether a server can be reached at all, asked once in a process before anything is sent to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import httpx

from ...errors import ServerError
from .asking import STATUS, fetch
from .refusals import explain_unreached, first_line

REACH = 10.0
"""Seconds in which a server answers the first question, or the call ends."""
REACHED: set[str] = set()
"""Servers that have answered this process: one that is silent later is waited for."""
UNREACHED = (502, 503, 504)
"""Answers of what stands before a server that it cannot reach either."""


def reach(host: str, key: str, say: Callable[[str], None]) -> None:
    """Ask a server whether it is there, unless it has answered this process before.

    Any answer will do, but for that of a gateway that has not reached the server: then it is asked again.

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
    until, why = time.monotonic() + REACH, f"no answer within {REACH:g} seconds"
    try:
        while (left := until - time.monotonic()) > 0:
            tell = partial(say, "connecting")
            code = fetch("GET", f"{host}/ping", most=STATUS, silent=left, seconds=left, tick=tell).status_code
            if code not in UNREACHED:
                REACHED.add(host)
                return
            why = f"what stands before it answers {code}"
            if left < 2:
                break
            time.sleep(1.0)
    except httpx.TimeoutException:
        pass
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        why = first_line(error, key)
    raise ServerError(explain_unreached(host, why, key)) from None
