"""At which steps of training a study is run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np

from ...errors import DeclarationError, whole


def log_spaced(last: int, count: int) -> tuple[int, ...]:
    """Step 0, and steps from 1 to `last` whose logarithms are evenly spaced: dense where most happens.

    Parameters
    ----------
    last : int
        The last step.
    count : int
        Steps in all; fewer come out where neighbours fall on the same step.

    Returns
    -------
    tuple of int
        Ascending.

    Raises
    ------
    DeclarationError
        `last` is below 1, or `count` below 2.

    Examples
    --------
    >>> hw.log_spaced(400, 6)
    (0, 1, 4, 20, 89, 400)
    """
    last, count = whole(last, "last, the last step,", low=1), whole(count, "count, the number of steps,", low=2)
    if count == 2:
        return (0, last)
    return (0, *sorted({round(float(step)) for step in np.geomspace(1, last, count - 1)}))


@dataclass
class Schedule:
    """When a study is due: exactly one of these is given.

    Attributes
    ----------
    steps : frozenset of int, optional
        Optimiser steps done; 0 is before the first one.
    every_n_train_steps, every_n_epochs : int, optional
    train_time_interval : timedelta, optional
    """

    steps: frozenset[int] | None = None
    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    train_time_interval: timedelta | None = None
    _last: float = field(default=0.0, init=False)

    @classmethod
    def of(
        cls,
        steps: Iterable[int] | None,
        every_n_train_steps: int | None,
        every_n_epochs: int | None,
        train_time_interval: timedelta | None,
    ) -> Schedule:
        """The schedule that is given.

        Parameters
        ----------
        steps, every_n_train_steps, every_n_epochs, train_time_interval
            See `Schedule`; all but one are None.

        Returns
        -------
        Schedule

        Raises
        ------
        DeclarationError
            None or several are given, or a number is not possible.
        """
        names = ("steps", "every_n_train_steps", "every_n_epochs", "train_time_interval")
        values = (steps, every_n_train_steps, every_n_epochs, train_time_interval)
        given = [name for name, value in zip(names, values, strict=True) if value is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none of them"
            raise DeclarationError(f"give exactly one of {', '.join(names)}: {said} given")
        if steps is not None:
            chosen = frozenset(whole(step, "a step") for step in steps)
            if not chosen:
                raise DeclarationError("steps names no step: give some, such as log_spaced(400, 12)")
            return cls(steps=chosen)
        if train_time_interval is not None:
            if not isinstance(train_time_interval, timedelta):
                raise DeclarationError(f"train_time_interval={train_time_interval!r}: give a datetime.timedelta")
            return cls(train_time_interval=train_time_interval)
        if every_n_epochs is not None:
            return cls(every_n_epochs=whole(every_n_epochs, "every_n_epochs", low=1))
        return cls(every_n_train_steps=whole(every_n_train_steps, "every_n_train_steps", low=1))

    def begin(self) -> None:
        """Training begins, or goes on: time counts from now."""
        self._last = time.monotonic()

    def due_at_start(self, step: int) -> bool:
        """Whether the study is due where training begins, or goes on, after so many optimiser steps."""
        return self.train_time_interval is None and self.due_at_step(step)

    def due_at_step(self, step: int) -> bool:
        """Whether the study is due after so many optimiser steps. After time, the answer belongs to this process."""
        if self.steps is not None:
            return step in self.steps
        if self.every_n_train_steps is not None:
            return step > 0 and step % self.every_n_train_steps == 0
        if self.train_time_interval is None:
            return False
        due = time.monotonic() - self._last >= self.train_time_interval.total_seconds()
        if due:
            self._last = time.monotonic()
        return due

    def due_at_epoch(self, epoch: int) -> bool:
        """Whether the study is due after so many epochs."""
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0
