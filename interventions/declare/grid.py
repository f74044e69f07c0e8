"""Grid: a labelled family of interventions, one condition for each combination of its axes. Knows no model."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...errors import DeclarationError, check_name, check_text, choices
from .edits import Intervention

Label = int | float | str
RESERVED = (
    "example",
    "query",
    "key",
    "run",
    "read_layer",
    "read_head",
    "token",
    "token_id",
    "condition",
    "position_label",
)
SELECTORS = ("method", "tolerance", "drop", "indexers")
"""Names that xarray's ``sel`` takes for itself, so that an axis of that name could not be selected by it."""


@dataclass(frozen=True, init=False)
class Grid:
    """One intervention for each combination of labelled axes.

    Parameters
    ----------
    make : callable
        Called once for each combination with the axes as keywords, so that its arguments are called as they are;
        returns the intervention. It runs here and is not kept, so a grid stays a plain value.
    **axes : iterable of int, float or str
        Axis names become dimensions of the results, their values the coordinates.

    Raises
    ------
    DeclarationError
        An axis is empty, has equal values, mixes numbers and text, or has a name that results use themselves; or
        `make` takes other arguments, or gives something else than an intervention.

    Examples
    --------
    >>> hw.Grid(lambda layer, head: hw.ZeroAblate(hw.Head(layer, head)), layer=range(2), head=range(8))
    Grid(layer=2, head=8)
    """

    axes: tuple[tuple[str, tuple[Label, ...]], ...]
    interventions: tuple[Intervention, ...]

    def __init__(self, make: Callable[..., Intervention], **axes: Iterable[Label]) -> None:
        if not callable(make):
            raise DeclarationError(f"a grid takes a function of its axes, such as a lambda, got {make!r}")
        if not axes:
            raise DeclarationError("a grid needs at least one axis, such as layer=model.layers")
        values = {name: _labels(name, axis) for name, axis in axes.items()}
        _check_arguments(make, values)
        made = tuple(
            make(**dict(zip(values, combination, strict=True))) for combination in itertools.product(*values.values())
        )
        self._fill(tuple(values.items()), made)

    @classmethod
    def of(cls, axes: Iterable[tuple[str, tuple[Label, ...]]], interventions: Iterable[Intervention]) -> Grid:
        """A grid from its axes and interventions (in the order of their product), as read back from JSON."""
        grid = cls.__new__(cls)
        grid._fill(tuple((name, tuple(values)) for name, values in axes), tuple(interventions))
        return grid

    def _fill(self, axes: tuple[tuple[str, tuple[Label, ...]], ...], made: tuple[Intervention, ...]) -> None:
        size = 1
        for name, values in axes:
            check_name(name, "the grid axis")
            if name in RESERVED:
                raise DeclarationError(
                    f"a grid axis cannot be called {name!r}: results use {choices(RESERVED)} themselves"
                )
            if name in SELECTORS:
                raise DeclarationError(
                    f"a grid axis cannot be called {name!r}: xarray's sel({name}=...) means something else"
                )
            if not values:
                raise DeclarationError(f"axis {name!r} of the grid is empty")
            if len(set(values)) < len(values):
                raise DeclarationError(f"axis {name!r} of the grid has equal values: {values}")
            for value in values:
                if isinstance(value, str):
                    check_text(value, f"the label of axis {name!r}")
                elif isinstance(value, float):
                    if not math.isfinite(value):
                        raise DeclarationError(f"axis {name!r} of the grid has {value}: give finite numbers")
                elif not -(2**63) <= value < 2**63:
                    raise DeclarationError(f"axis {name!r} of the grid has {value}: a file holds numbers below 2**63")
            size *= len(values)
        for intervention in made:
            if not isinstance(intervention, Intervention):
                raise DeclarationError(f"a grid is made of interventions, got {intervention!r}")
        if size != len(made):
            raise DeclarationError(f"the axes have {size} combinations, but {len(made)} interventions were given")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "interventions", made)

    @property
    def shape(self) -> dict[str, int]:
        """Length of each axis."""
        return {name: len(values) for name, values in self.axes}

    def __len__(self) -> int:
        return len(self.interventions)

    def __repr__(self) -> str:
        return f"Grid({', '.join(f'{name}={size}' for name, size in self.shape.items())})"


def _labels(axis: str, values: Iterable[object]) -> tuple[Label, ...]:
    """The labels of an axis: all whole numbers, all numbers, or all text."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DeclarationError(f"axis {axis!r} of the grid needs several values, got {values!r}")
    given = tuple(values)
    if all(isinstance(value, str) for value in given):
        return tuple(map(str, given))
    try:
        return tuple(map(operator.index, given))  # type: ignore[arg-type]  # int and NumPy integers, not floats
    except TypeError:
        if all(isinstance(value, numbers.Real) for value in given):
            return tuple(float(value) for value in given)  # type: ignore[arg-type]
        raise DeclarationError(f"axis {axis!r} of the grid takes numbers, or text, got {given}") from None


def _check_arguments(make: Callable[..., object], axes: Iterable[str]) -> None:
    """Refuse a function that does not take the axes by their names."""
    names = list(axes)
    try:
        signature = inspect.signature(make)
    except ValueError:  # of what is written in C, nobody knows
        return
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError:
        raise DeclarationError(
            f"the function of a grid gets its axes by name, {choices(names)}: this one takes "
            f"{choices(signature.parameters) or 'nothing'}"
        ) from None
