"""Signals that ask for the end wait where an interrupt would leave a lock taken or a file half-written. A leaf."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask for the end."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Meanwhile Ctrl-C and SIGTERM wait, however many; what they would have done is done once the block has ended.

    Signals come to the main thread only, so elsewhere nothing is to be done. Whoever handles them (Python, asyncio, a
    function of the user) gets them afterwards.
    """
    waiting: list[_Waiting] = []
    try:
        for number in ENDING if is_main() else ():
            handler = signal.getsignal(number)
            if callable(handler) or handler is signal.SIG_DFL:
                waiting.append(_Waiting(handler))
                signal.signal(number, waiting[-1])
        yield
    finally:
        try:
            _give_back(waiting)
        except BaseException:  # of a signal that came as soon as it was given back
            _give_back(waiting)
            raise
        finally:
            for one in waiting:
                one.over = True
        for one in waiting:
            one.catch_up()


def _give_back(waiting: list[_Waiting]) -> None:
    for one in waiting:
        one.give_back()


class _Waiting:
    """Handles a signal by writing it down, until it is over."""

    def __init__(self, handler: Any) -> None:
        self.handler, self.over, self.process = handler, False, os.getpid()
        self.came: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.over or os.getpid() != self.process:  # a child that was forked meanwhile has nothing to wait for
            pass_on(self.handler, number, frame)
        else:
            self.came = (number, frame)

    def give_back(self) -> None:
        """Let the one before handle the signal again."""
        for number in ENDING:
            now: object = signal.getsignal(number)
            if now is self:
                signal.signal(number, self.handler)

    def catch_up(self) -> None:
        """Do what the signal asked for."""
        came, self.came = self.came, None
        if came is not None:
            pass_on(self.handler, *came)


def is_main() -> bool:
    """Whether this is the thread that gets signals."""
    return threading.current_thread() is threading.main_thread()


def pass_on(handler: Any, number: int, frame: FrameType | None) -> None:
    """Handle a signal as the handler from before would have."""
    if callable(handler):
        handler(number, frame)
    else:
        signal.signal(number, handler)
        signal.raise_signal(number)
