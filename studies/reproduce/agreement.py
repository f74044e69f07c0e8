"""Whether two results hold the same numbers: `Agreement`, and the comparison behind it. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xarray as xr

from ...errors import printable
from ..output.phrases import count

Groups = dict[str, xr.Dataset]
"""Path of each group, to what it holds by itself."""
SHOWN = 12
"""Variables that the text lists; the rest is counted."""
ROUNDING = 1e-12
"""Differences up to this share of the largest stored number of a variable are rounding, as of sums in another order."""


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
    relative : mapping of str to float
        The same as a share of the largest stored number of the variable.
    beyond : mapping of str to str
        What differs by more than the tolerance, or cannot be subtracted and is not the same (text, shapes, missing
        values): variable to what differs, in words.
    only_in_one : mapping of str to str
        What one of the two lacks, as where another version of headwise made the file: a variable, or a label
        (``estimates/ablation/estimator integrated``), to ``"the file"`` or ``"the repetition"``, the one that has it.
    notes : tuple of str
        What else was not the same: versions, device, weights.
    """

    path: str
    tolerance: float
    differences: Mapping[str, float]
    relative: Mapping[str, float]
    beyond: Mapping[str, str]
    only_in_one: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether nothing that both hold differs beyond the tolerance, and both hold something."""
        return not self.beyond and bool(self.differences or not self.only_in_one)

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
        rounded = {name: share for name, share in self.relative.items() if 0 < share <= ROUNDING}
        far = [size for name, size in self.differences.items() if size and name not in rounded]
        if self.beyond:
            differ = "differs" if len(self.beyond) == 1 else "differ"
            lines = [f"{path} does not agree: {count(len(self.beyond), 'variable')} of {total} {differ} ({least})."]
        elif not self.agrees:
            lines = [f"{path} does not agree: no variable is in both."]
        elif equal == total:
            lines = [f"{path} agrees: all {total} numeric variables are the same to the last bit."]
        else:
            lines = [f"{path} agrees: of {total} numeric variables, {equal} are the same to the last bit"]
            if rounded:
                lines[0] += f", {len(rounded)} but for rounding (a share of {max(rounded.values()):.1g} at most)"
            lines[0] += f", and {len(far)} differ by {max(far):.2g} at most ({least})." if far else "."
        beyond = {printable(name): printable(words) for name, words in self.beyond.items()}
        width = max(map(len, beyond), default=0)
        lines += _some(f"  {name:<{width}}  {words}" for name, words in beyond.items())
        for place, words in (("the file", "no longer computed"), ("the repetition", "new")):
            if names := [printable(name) for name, one in self.only_in_one.items() if one == place]:
                lines.append(f"{words}: {', '.join(names)}")
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
    missing: dict[str, str] = {}
    before, after = (_variables(one) for one in _at_shared_labels(stored, again, missing))
    differences: dict[str, float] = {}
    relative: dict[str, float] = {}
    beyond: dict[str, str] = {}
    for name in before:
        if name in after:
            size, words = _compare(before[name], after[name], tolerance)
            if size is not None:
                differences[name], relative[name] = size, size / (_largest(before[name]) or 1.0)
            beyond |= {name: words} if words else {}
    missing |= {name: "the file" for name in before if name not in after}
    missing |= {name: "the repetition" for name in after if name not in before}
    order = dict(sorted(beyond.items(), key=lambda pair: -differences.get(pair[0], np.inf)))
    return Agreement(path, tolerance, differences, relative, order, missing, tuple(notes))


def _at_shared_labels(stored: xr.DataTree, again: xr.DataTree, missing: dict[str, str]) -> tuple[Groups, Groups]:
    """The groups of both at the labels of text dims that both have, where one has more; notes these in `missing`."""
    old, new = ({node.path: node.to_dataset(inherit=False) for node in tree.subtree} for tree in (stored, again))
    for more, less, place in ((old, new, "the file"), (new, old, "the repetition")):
        for path in {*more} & {*less}:
            for dim in {*more[path].dims} & {*less[path].dims}:
                names, kept = _labels(more[path], dim), _labels(less[path], dim)
                if kept and len({*names}) == len(names) and {*kept} < {*names}:
                    more[path] = more[path].isel({dim: [names.index(one) for one in kept]})
                    missing |= {f"{path}/{dim} {one}".lstrip("/"): place for one in names if one not in kept}
    return old, new


def _labels(ds: xr.Dataset, dim: Any) -> list[str]:
    """The labels of a dim where they are text, else none."""
    return [str(one) for one in ds[dim].values] if dim in ds.coords and not _numeric(ds[dim].values) else []


def _largest(variable: xr.Variable) -> float:
    """The largest finite absolute number."""
    numbers = np.abs(np.asarray(variable.values, dtype=np.float64))
    return float(numbers[np.isfinite(numbers)].max(initial=0.0))


def _variables(groups: Groups) -> dict[str, xr.Variable]:
    """Every variable of every group under ``group/name``."""
    return {
        f"{path}/{name}".lstrip("/"): variable for path, ds in groups.items() for name, variable in ds.variables.items()
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
