"""Progress in a terminal or a notebook: nothing for quick work, else a bar with rate and time left; and a clean end.

What ends work from outside is Ctrl-C (SIGINT) and SIGTERM. Python takes either between any two of its steps, also
between those in which a library takes a lock and sees to its release: an interrupted write, or read, of a NetCDF file
would leave xarray's lock taken for ever. So both wait while a file is read or written (`undisturbed`), and while a pass
runs (`Progress`). Imports rich when the bar is shown in a terminal.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ...errors import printable
from ...signals import ENDING, is_main, pass_on
from .notebook import Line, notebook

QUIET_SECONDS = 2.0
WIDE = 24
"""Characters of a bar in a notebook."""
LINE_SECONDS = 30.0
"""Where standard error is no terminal, long work says so often how it is doing."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, taken at the end of a pass; its text says how far the work had come."""


class Terminated(Stopped):
    """SIGTERM, taken as Ctrl-C is."""


class Terminating:
    """Meanwhile SIGTERM unwinds what runs, as Ctrl-C does, and then ends the process as SIGTERM always does.

    Only where it would have ended the process at once, and in the main thread: a handler of the user stays.

    Attributes
    ----------
    said : str
        Printed before the process ends.
    """

    def __init__(self) -> None:
        self.said, self.came, self.process, self.ours = "stopped by SIGTERM", False, os.getpid(), False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        if os.getpid() != self.process:  # a child that was forked meanwhile, as workers are
            pass_on(signal.SIG_DFL, number, frame)
        self.came = True
        raise Terminated

    def __enter__(self) -> Terminating:
        self.ours = is_main() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self.ours:
            signal.signal(signal.SIGTERM, self)
        return self

    def __exit__(self, *error: object) -> None:
        if self.ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.came and os.getpid() == self.process:
            with suppress(OSError, ValueError, AttributeError):  # nobody reads standard error any more
                print(printable(f"headwise: {self.said}"), file=sys.stderr, flush=True)
            signal.raise_signal(signal.SIGTERM)


class Lines:
    """A line now and then on how long work is doing, for an output that is no terminal.

    Parameters
    ----------
    label : str
    unit : str
        What is counted.
    """

    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        self.started = self.told = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Say that `done` of `total` are done, unless that was said a short while ago."""
        now = time.monotonic()
        if sys.stderr is None or sys.stderr.isatty() or now - self.told < LINE_SECONDS or not 0 < done < total:
            return
        self.told = now
        left = (now - self.started) * (total - done) / done
        text = f"{self.label}: {100 * done // total}% ({done} of {total} {self.unit}), about {duration(left)} left"
        with suppress(OSError, ValueError):  # nobody reads it any more
            print(printable(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``3.4 s``, ``12 s``, ``3.4 min``, ``2.1 h``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """A bar that appears once the work has taken two seconds, in a notebook and in a terminal; elsewhere lines tell.

    Ctrl-C lets the pass that runs come to its end, so that nothing is left half done, and then raises `Stopped`; a
    second Ctrl-C interrupts at once, unless a file is read or written. So does SIGTERM, within `Terminating`.

    Parameters
    ----------
    label : str
    show : callable or bool, optional
        A callable gets ``(done, total)`` instead of any bar; True shows the bar at once; False never.
    unit : str
        What is counted.
    kept : path, optional
        Where finished passes are kept.
    total : int
        How many there will be, as far as is known before the first `update`.
    stage : str, optional
        The stage that the work is a part of, in words: begins each line of a notebook. None shows nothing.
    """

    def __init__(
        self,
        label: str,
        show: Callable[[int, int], None] | bool | None = None,
        unit: str = "passes",
        kept: Path | None = None,
        total: int = 0,
        stage: str | None = "",
    ) -> None:
        self.label, self.unit, self.kept, self.total = label, unit, kept, total
        self.callback = show if callable(show) else None
        self.stage, self.inside = stage, notebook() is not None
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.wanted = (self.stage is not None and (self.inside or terminal)) if show is None else show is True
        self.lines = Lines(label, unit) if show is None and self.stage is not None and not self.inside else None
        self.patience = 0.0 if show is True else QUIET_SECONDS
        self.started = time.monotonic()
        self.bar: Any = None
        self.task: Any = None
        self.asked = 0
        self.before: dict[int, Any] = {}
        self.process = os.getpid()
        self.said, self.done, self.written = "", 0, False

    def __enter__(self) -> Progress:
        for number in ENDING if is_main() else ():
            handler = signal.getsignal(number)
            if handler is signal.default_int_handler or isinstance(handler, Terminating):
                self.before[number] = handler
                signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked or os.getpid() != self.process:
            pass_on(self.before[number], number, frame)
        self.asked = number
        if isinstance(self.before[number], Terminating):
            self.before[number].came = True

    def update(self, done: int, total: int) -> None:
        """Say that `done` of `total` passes are done."""
        if self.callback is not None:
            self.callback(done, total)
        elif self.wanted and time.monotonic() - self.started >= self.patience:
            seconds = time.monotonic() - self.started
            rate = f"{done / seconds:.3g} {self.unit}/s" if seconds else ""
            if self.inside:
                left = f"{duration((total - done) * seconds / done)} left" if done else ""
                self._write(done, total, rate, left)
            else:
                if self.bar is None:
                    self._open(total)
                self.bar.update(self.task, completed=done, total=total, rate=rate)
        elif self.lines is not None:
            self.lines.update(done, total)
        self._stop_if_asked(f"after {done} of {total} {self.unit}")

    def _stop_if_asked(self, when: str) -> None:
        if self.asked:
            kept = "nothing of this measurement is kept" if self.kept is None else f"they are kept in {self.kept}"
            raise self._stopped(f"{when}; {kept}")

    def _stopped(self, when: str) -> Stopped:
        by_term = isinstance(self.before.get(self.asked), Terminating)
        return Terminated(f"stopped by SIGTERM {when}") if by_term else Stopped(f"stopped {when}")

    def say(self, text: str) -> None:
        """Say how work is doing that runs elsewhere, beside what is done."""
        self.said = text
        shown = self.callback is None and self.wanted and time.monotonic() - self.started >= self.patience
        if shown and self.inside:
            self._write(self.done, self.total)
        elif shown and self.bar is None:
            self._open(self.total)
        if self.bar is not None:
            self.bar.update(self.task, description=printable(f"{self.label} ({text})"))
        self._stop_if_asked(f"while waiting ({text})")

    def _write(self, done: int, total: int, *more: str, last: bool = False) -> None:
        """Write how far it is into the notebook."""
        self.done, self.total, self.written = done, total, True
        full = WIDE * done // total if total else 0
        own = "" if self.stage and self.label in self.stage else self.label
        label = f"{own} ({self.said})" if self.said else own
        parts = [self.stage, label, "█" * full + "░" * (WIDE - full), f"{done}/{total}", *more]
        Line.write(printable("  ".join(part for part in parts if part)), last=last)

    def _end(self, stopped: bool) -> None:
        """Write into the notebook how much was done."""
        done = f"{self.done} of {self.total}" if stopped else str(self.total)
        took = duration(time.monotonic() - self.started)
        text = f"{self.label}: {'stopped after ' if stopped else ''}{done} {self.unit} in {took}"
        Line.write(printable("  ".join(part for part in (self.stage, text) if part)), last=True)

    def _open(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
        label = f"{self.label} ({self.said})" if self.said else self.label
        self.task = self.bar.add_task(printable(label), total=total, rate="")
        self.bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.written:
            self._end(kind is not None)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked and kind is None:  # asked for during the very last pass: the work is done, the wish is not lost
            raise self._stopped(f"after the last of the {self.unit}")
