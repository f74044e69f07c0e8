"""Whether two results hold the same numbers: `Agreement`, and the comparison behind it. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xarray as xr

from ...errors import printable
from ..output.phrases import count

SHOWN = 12
"""Variables that the text lists; the rest is counted."""


@dataclass(frozen=True)
class Agreement:
    """How a repeated result agrees with the stored one.

    Attributes
    ----------
    path : str
        The file.
    tolerance : float
        Numbers agree up to this absolute difference; beyond 1, up to this share of the stored number.
    differences : mapping of str to float
        Every numeric variable and coordinate that could be compared (``group/name`` in a study), to the largest
        absolute difference, in its own units; 0 where all numbers are equal.
    beyond : mapping of str to str
        What differs by more than the tolerance, or cannot be subtracted and is not the same (text, shapes, missing
        values): variable to what differs, in words.
    only_in_one : mapping of str to str
        Variables that one of the two lacks, to ``"the file"`` or ``"the repetition"``, the one that has it.
    notes : tuple of str
        What else was not the same: versions, device, weights.
    """

    path: str
    tolerance: float
    differences: Mapping[str, float]
    beyond: Mapping[str, str]
    only_in_one: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether nothing differs beyond the tolerance and neither lacks a variable of the other."""
        return not self.beyond and not self.only_in_one

    @property
    def largest(self) -> float:
        """The largest absolute difference of a number; 0 where no numbers were compared."""
        return max(self.differences.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data."""
        return {"agrees": self.agrees, "largest": self.largest, **asdict(self), "notes": list(self.notes)}

    def __repr__(self) -> str:
        least, path = f"numbers agree to {self.tolerance:g}", printable(self.path)
        total, equal = len(self.differences), sum(size == 0 for size in self.differences.values())
        if not self.agrees:
            lines = [f"{path} does not agree: {count(len(self.beyond), 'variable')} of {total} differ ({least})."]
        elif equal == total:
            lines = [f"{path} agrees: all {total} numeric variables are the same to the last bit."]
        else:
            lines = [f"{path} agrees: of {total} numeric variables, {equal} are the same to the last bit"]
            lines[0] += f" and the largest difference is {self.largest:.2g} ({least})."
        beyond = {printable(name): printable(words) for name, words in self.beyond.items()}
        width = max(map(len, beyond), default=0)
        lines += _some(f"  {name:<{width}}  {words}" for name, words in beyond.items())
        for place in ("the file", "the repetition"):
            if names := [printable(name) for name, one in self.only_in_one.items() if one == place]:
                lines.append(f"only in {place}: {', '.join(names)}")
        return "\n".join([*lines, *(f"note: {printable(note)}" for note in self.notes)])


def _some(lines: Any) -> list[str]:
    every = list(lines)
    return every if len(every) <= SHOWN else [*every[:SHOWN], f"  and {len(every) - SHOWN} further"]


def compare(
    stored: xr.DataTree, again: xr.DataTree, path: str = "", tolerance: float = 1e-6, notes: Sequence[str] = ()
) -> Agreement:
    """Compare every variable and coordinate of two results by name. A missing number agrees with a missing one.

    Parameters
    ----------
    stored, again : DataTree
        The stored result and its repetition.
    path : str
        File of the stored result, for the text.
    tolerance : float
        See `Agreement`.
    notes : sequence of str
        What else differs, for the text.

    Returns
    -------
    Agreement
    """
    before, after = _variables(stored), _variables(again)
    differences: dict[str, float] = {}
    beyond: dict[str, str] = {}
    for name in before:
        if name in after:
            size, words = _compare(before[name], after[name], tolerance)
            differences |= {} if size is None else {name: size}
            beyond |= {name: words} if words else {}
    missing = {name: "the file" for name in before if name not in after}
    missing |= {name: "the repetition" for name in after if name not in before}
    order = dict(sorted(beyond.items(), key=lambda pair: -differences.get(pair[0], np.inf)))
    return Agreement(path, tolerance, differences, order, missing, tuple(notes))


def _variables(tree: xr.DataTree) -> dict[str, xr.Variable]:
    """Every variable of every group under ``group/name``."""
    return {
        f"{node.path}/{name}".lstrip("/"): variable
        for node in tree.subtree
        for name, variable in node.to_dataset(inherit=False).variables.items()
    }


def _compare(old: xr.Variable, new: xr.Variable, tolerance: float) -> tuple[float | None, str]:
    """The largest absolute difference (None where there is none to take), and in words what is too much."""
    if set(old.dims) != set(new.dims) or any(old.sizes[dim] != new.sizes[dim] for dim in old.dims):
        return None, f"has {_shape(new)} instead of {_shape(old)}"
    one, other = np.asarray(old.values), np.asarray(new.transpose(*old.dims).values)
    if not (_numeric(one) and _numeric(other)):
        unequal = np.array([str(a) != str(b) for a, b in zip(one.ravel(), other.ravel(), strict=True)], dtype=bool)
        if not unequal.any():
            return None, ""
        at = int(np.argmax(unequal))
        here = f"{str(other.ravel()[at])!r} instead of {str(one.ravel()[at])!r}"
        return None, f"{unequal.sum()} of {one.size} texts differ{_where(old, at)}: {here}"
    one, other = one.astype(np.float64), other.astype(np.float64)
    unlike = (np.isfinite(one) != np.isfinite(other)) | (np.isinf(one) & np.isinf(other) & (one != other))
    if unlike.any():
        at = int(np.argmax(unlike))
        here = f"{other.ravel()[at]:g} instead of {one.ravel()[at]:g}"
        return None, f"{unlike.sum()} of {one.size} values are missing or infinite in one only{_where(old, at)}: {here}"
    with np.errstate(invalid="ignore"):
        gap = np.where(np.isfinite(one), np.abs(one - other), 0.0)
    size = float(gap.max(initial=0.0))
    far = gap > tolerance * np.maximum(1.0, np.abs(np.nan_to_num(one, posinf=1.0, neginf=1.0)))
    if not far.any():
        return size, ""
    at = int(np.argmax(gap))
    here = f"{other.ravel()[at]:.9g} instead of {one.ravel()[at]:.9g}"
    return size, f"{far.sum()} of {one.size} values differ, by {size:.3g} at most{_where(old, at)}: {here}"


def _numeric(values: np.ndarray[Any, Any]) -> bool:
    return values.dtype.kind in "biuf"


def _shape(variable: xr.Variable) -> str:
    return f"({', '.join(f'{dim} {size}' for dim, size in variable.sizes.items())})"


def _where(variable: xr.Variable, at: int) -> str:
    """`` at layer 1, head 2``, counted from 0."""
    places = np.unravel_index(at, variable.shape) if variable.ndim else ()
    words = ", ".join(f"{dim} {place}" for dim, place in zip(variable.dims, places, strict=True))
    return f" (at {words})" if words else ""
