"""A line in a terminal on how jobs are doing, where no bar says it. A leaf."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

QUIET_SECONDS = 2.0
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Meanwhile, nothing is shown."""
    token = _QUIET.set(wanted or _QUIET.get())
    try:
        yield
    finally:
        _QUIET.reset(token)


@contextmanager
def telling(label: str) -> Iterator[Callable[[str], None]]:
    """Gives what shows a text on standard error, if that is a terminal, once two seconds have passed; cleared after."""
    started, shown = time.monotonic(), 0

    def say(text: str) -> None:
        nonlocal shown
        if _QUIET.get() or not sys.stderr.isatty() or time.monotonic() - started < QUIET_SECONDS:
            return
        line = f"{label}: {text}"[: shutil.get_terminal_size().columns - 1]
        print(f"\r{line:<{shown}}", end="", file=sys.stderr, flush=True)
        shown = len(line)

    try:
        yield say
    finally:
        if shown:
            print(f"\r{'':<{shown}}\r", end="", file=sys.stderr, flush=True)
