"""Progress in a terminal: nothing for quick work, a bar with the time left for the rest. Imports rich when shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

QUIET_SECONDS = 2.0


class Progress:
    """A bar that appears once the work has taken two seconds, if standard error is a terminal.

    Parameters
    ----------
    label : str
    show : callable or bool, optional
        A callable gets ``(done, total)`` instead of any bar; True shows the bar at once; False never.
    """

    def __init__(self, label: str, show: Callable[[int, int], None] | bool | None = None) -> None:
        self.label = label
        self.callback = show if callable(show) else None
        self.wanted = sys.stderr.isatty() if show is None else show is True
        self.patience = 0.0 if show is True else QUIET_SECONDS
        self.started = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        return self

    def update(self, done: int, total: int) -> None:
        """Say that `done` of `total` passes are done."""
        if self.callback is not None:
            self.callback(done, total)
        elif self.wanted and time.monotonic() - self.started >= self.patience:
            if self.bar is None:
                self._open(total)
            self.bar.update(self.task, completed=done, total=total)

    def _open(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task(self.label, total=total)
        self.bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
