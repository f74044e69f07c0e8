"""What an edit puts in, as far as it is known before the activations are: an open value of `fill`. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import DeclarationError
from ..declare.edits import Edit, MeanAblate, Patch, ResampleAblate, ZeroAblate
from ..declare.steering import Add, Scale


def open_value(
    edit: Edit, at: tuple[int, str], columns: Any, positions: Any, examples: tuple[int, int], drawn: int
) -> Any:
    """What to put at the site: None for zeros, a factor, or what `fill.value_of` makes a tensor of.

    Parameters
    ----------
    edit : Edit
    at : tuple of (layer, point)
        The tensor that holds the site.
    columns : slice or tuple
        Of it; for a pattern as `fill` says.
    positions : slice or list of int
        Those that are wanted.
    examples : tuple of int
        Start and stop of the examples of the group that are being run; resampling pairs each with its own partner.
    drawn : int
        Examples of the reference draw.
    """
    if isinstance(edit, ZeroAblate):
        return None
    if isinstance(edit, Add):
        return {"constant": edit.vector}
    if isinstance(edit, Scale):
        return edit.factor
    taken = {"of": edit.run, "at": at, "columns": columns, "positions": positions, "how": "same", "rows": None}
    if isinstance(edit, MeanAblate):
        return {**taken, "how": "mean" if edit.over == "example" else "mean of all"}
    if isinstance(edit, ResampleAblate):
        return {**taken, "how": "rows", "rows": derangement(drawn, edit.seed)[np.arange(*examples) % drawn]}
    if isinstance(edit, Patch):
        return taken
    raise DeclarationError(f"{edit!r} is no intervention that the engine knows")


def derangement(size: int, seed: int) -> np.ndarray[Any, Any]:
    """A seeded permutation of ``range(size)`` that leaves nothing in its place (Sattolo's cycle).

    Drawn from `numpy.random.RandomState`, whose stream is frozen, so that a seed means the same everywhere.
    """
    if size < 2:
        raise DeclarationError("resampling needs at least two examples of one length in the reference draw")
    random = np.random.RandomState(seed)
    order = np.arange(size)
    for last in range(size - 1, 0, -1):
        other = random.randint(0, last)
        order[[last, other]] = order[[other, last]]
    return order
