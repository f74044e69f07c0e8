"""What an edit does to the numbers at its site: how they change, and what value goes in. Knows no model and no tensor.

Each kind of edit says this of itself (`Edit.change`); the plan turns it into writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class How(StrEnum):
    """What a write does to the numbers at its point.

    ``PROJECT`` takes away what they have along a unit vector; ``MASK`` makes attention scores minus infinity.
    """

    SET = "set"
    ADD = "add"
    SCALE = "scale"
    PROJECT = "project"
    MASK = "mask"


class Reduce(StrEnum):
    """What an example takes of all examples of a run: its own values, those of a partner, or a mean."""

    OWN = "own"
    PARTNER = "partner"
    EXAMPLE = "mean over example"
    EXAMPLE_POSITION = "mean over example and position"


@dataclass(frozen=True)
class FromRun:
    """A value that is read of a run.

    Attributes
    ----------
    run : str, optional
        None for the reference draw.
    reduce : Reduce
    seed : int
        Of the pairing, for ``Reduce.PARTNER``.
    """

    run: str | None
    reduce: Reduce = Reduce.OWN
    seed: int = 0


MEAN = "mean"
"""In the place of the name of a run: means over the reference draw, one for each position."""


def from_source(source: str) -> FromRun:
    """The values of a run, or means over the reference draw."""
    return FromRun(None, Reduce.EXAMPLE) if source == MEAN else FromRun(source)


class Change(NamedTuple):
    """What an edit does to its site.

    Attributes
    ----------
    how : How
    value : FromRun, tuple of float, float or None
        Values of a run or a vector (to ``SET`` or ``ADD``), a unit vector (to ``PROJECT``), a factor (to ``SCALE``), or
        zeros (None, to ``SET``).
    """

    how: How
    value: FromRun | tuple[float, ...] | float | None
