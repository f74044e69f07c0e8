"""Who may use a module: threads take turns. A leaf.

What nnsight 0.8 holds of a trace lies with the modules that are traced, or with the thread, so that models that have no
part in common run side by side; modules that share parts count as one. Opening and making models changes what belongs
to the whole process (transformers replaces functions of torch for that long, random weights come from its one
generator), so that one thread does it at a time. None of this is seen by a thread that calls a model, or makes one,
without headwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Condition, RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent

from ...errors import DeclarationError
from ...signals import undisturbed
from ..traced.structure import evaluating

MOMENT = 0.1
"""Seconds in which who waits for a turn takes Ctrl-C."""


class Turn:
    """A lock that its holder may take again, and that says where two threads would wait for each other for ever."""

    def __init__(self, number: int) -> None:
        self.number, self.holder, self.depth = number, 0, 0
        self.within: Any = None
        """The greenlet that took it first. What runs inside a pass runs in another one of the same thread."""

    def take(self) -> bool:
        """Take it, or wait a moment for who has it; whether it was taken."""
        me = get_ident()
        with _CHANGED:
            if self.holder not in (0, me):
                if self._waits_for(me):
                    raise DeclarationError(
                        "two threads wait for each other: each is in a call on a model, and calls the other's in it; "
                        "make calls inside calls on the same model, or in one thread"
                    )
                _WAITING[me] = self
                try:
                    _CHANGED.wait(MOMENT)
                finally:
                    del _WAITING[me]
                return False
            if not self.depth:
                self.holder, self.within = me, getcurrent()
            self.depth += 1
            return True

    def give_back(self) -> None:
        """Once for each time that it was taken."""
        with _CHANGED:
            self.depth -= 1
            if not self.depth:
                self.holder, self.within = 0, None
                _CHANGED.notify_all()

    def _waits_for(self, me: int) -> bool:
        """Whether who holds it waits, perhaps through others, for what this thread holds."""
        turn: Turn | None = self
        while turn is not None and turn.holder not in (0, me):
            turn = _WAITING.get(turn.holder)
        return turn is not None and turn.holder == me


_CHANGED = Condition()
"""Guards what follows, and says that a turn came to its end."""
_TURNS: WeakKeyDictionary[torch.nn.Module, Turn] = WeakKeyDictionary()
"""Of each module and all its parts."""
_WAITING: dict[int, Turn] = {}
_MAKING = RLock()
_count = 0


def _turns_of(module: torch.nn.Module) -> list[Turn]:
    """The turns of a module: one, unless it was put together from parts that had others. Always in the same order."""
    global _count
    with _CHANGED:
        parts = list(module.modules())
        found = {turn.number: turn for part in parts if (turn := _TURNS.get(part)) is not None}
        if not found:
            _count += 1
            found = {_count: Turn(_count)}
        turns = [found[number] for number in sorted(found)]
        for part in parts:
            _TURNS.setdefault(part, turns[0])
        return turns


@contextmanager
def turn_of(module: torch.nn.Module, *, mode: bool = True, passes: bool = False) -> Iterator[None]:
    """Meanwhile no other thread uses a module or a part of it.

    Parameters
    ----------
    module : torch.nn.Module
    mode : bool
        It is in evaluation mode meanwhile.
    passes : bool
        Passes of it are going to be run, which cannot be inside one.

    Raises
    ------
    DeclarationError
        Another thread, which uses it, waits for a module that this thread uses; or a pass of it is under way.
    """
    taken: list[Turn] = []
    try:
        with undisturbed():
            turns = _turns_of(module)
        for turn in turns:
            while turn not in taken:
                with undisturbed():  # an interrupt in here would leave it taken
                    if turn.take():
                        taken.append(turn)
            if passes and turn.within is not getcurrent():
                raise DeclarationError(
                    "a pass of this model is under way, and no other can begin inside it: a metric may call headwise "
                    "on another model, or on a copy, but not on the model that it scores"
                )
        with evaluating(module) if mode else nullcontext():
            yield
    finally:
        try:
            _give_back(taken)
        finally:  # again, where Ctrl-C came just before
            _give_back(taken)


def _give_back(taken: list[Turn]) -> None:
    with undisturbed():
        while taken:
            taken.pop().give_back()


@contextmanager
def making() -> Iterator[None]:
    """Meanwhile no other thread opens or makes a model. Nothing inside may wait for a turn."""
    with _MAKING:
        yield


def _after_fork() -> None:
    """A forked process has one thread: what the others held there is free."""
    global _CHANGED, _MAKING
    for turn in {*_TURNS.values()}:
        turn.holder, turn.depth, turn.within = 0, 0, None
    _CHANGED, _MAKING = Condition(), RLock()
    _WAITING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
