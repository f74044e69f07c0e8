"""Lines on standard error on how jobs are doing, where no bar says it. A leaf."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...errors import printable

QUIET_SECONDS = 2.0
LONGEST = 600.0
"""Seconds between two lines at most, where standard error is no terminal."""


@contextmanager
def telling(
    label: str, also: Callable[[str], None] | None = None, quiet: bool = False
) -> Iterator[Callable[[str], None]]:
    """Gives what shows a text on standard error, once two seconds have passed.

    A terminal has one line, which is cleared at the end. Elsewhere lines are printed, each after twice the time of the
    one before.

    Parameters
    ----------
    label : str
        Begins the line.
    also : callable, optional
        Gets each text, and shows it in a terminal.
    quiet : bool
        Show nothing.
    """
    started, shown, gap = time.monotonic(), 0, QUIET_SECONDS
    due = started + gap

    def say(text: str) -> None:
        """Show a line, or pass it on, where that is due."""
        nonlocal shown, gap, due
        if also is not None:
            also(text)
        now, terminal = time.monotonic(), sys.stderr is not None and sys.stderr.isatty()
        if quiet or (also is not None and terminal) or now < (started + QUIET_SECONDS if terminal else due):
            return
        if not terminal:
            _write(printable(f"{label}: {text}, after {now - started:.0f} s") + "\n")
            gap = min(LONGEST, 2 * gap)
            due = now + gap
            return
        line = printable(f"{label}: {text}")[: shutil.get_terminal_size().columns - 1]
        _write(f"\r{line:<{shown}}")
        shown = len(line)

    try:
        yield say
    finally:
        if shown:
            _write(f"\r{'':<{shown}}\r")


def _write(text: str) -> None:
    """Write to standard error; work is not lost where that is closed, or its disk full."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()
