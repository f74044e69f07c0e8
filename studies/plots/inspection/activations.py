"""What was captured, of one prompt: positions downward with their tokens, neurons or other numbers to the right."""

from __future__ import annotations

from typing import Any

import xarray as xr

from ....errors import DeclarationError, UnknownNameError
from ..grids import grid
from ..parts.inputs import array_of, possible

WIDTHS = ("neuron", "d_head", "d_model")
"""Dims of what is captured beside positions."""


def captured(values: xr.DataArray) -> str | None:
    """The dim of a captured activation that is drawn to the right; None of anything else."""
    dims = [str(dim) for dim in values.dims if dim != "example"]
    widths = [dim for dim in dims if dim in WIDTHS or dim.rsplit("_", 1)[-1] in WIDTHS]
    return widths[0] if len(widths) == 1 and _upward(dims) else None


def _upward(dims: list[str]) -> str | None:
    return next((dim for dim in dims if dim == "position" or dim.endswith("_position")), None)


def activations(values: xr.DataArray, *, example: int = 0, title: str = "") -> Any:
    """An activation of one prompt: a row for each position, neurons or the numbers of a vector to the right.

    Parameters
    ----------
    values : DataArray
        A variable that `headwise.capture` gave: ``([example,] position, neuron)``, or with ``d_head`` or ``d_model``
        in the place of ``neuron``. Of more than 160 columns, each is the value in a block that is farthest from 0.
    example : int
        Which prompt.
    title : str

    Returns
    -------
    holoviews.HeatMap
        ``position`` and the other dim; ``value`` and the labels of both. Tokens are written at the positions.

    Raises
    ------
    DeclarationError
        Other dims are there, such as ``head``: select first.
    UnknownNameError
        There is no such example.
    """
    values = array_of(values, "activations", ("position", "neuron"))
    across, upward = captured(values), _upward([str(dim) for dim in values.dims])
    if across is None or upward is None:
        raise DeclarationError(f"activations draws (position, neuron), and this has {', '.join(map(str, values.dims))}")
    if extra := [str(dim) for dim in values.dims if dim not in ("example", across, upward)]:
        raise DeclarationError(f"activations draws one {extra[0]}: select it, {possible(values, extra[0])}")
    if "example" in values.dims:
        if not 0 <= example < values.sizes["example"]:
            raise UnknownNameError(f"example={example}: there are {values.sizes['example']}, from 0 on")
        values = values.isel(example=example)
        values = values.isel({upward: values.notnull().any(across).values})  # up to the end of this prompt
        shown = values["example"].item() if "example" in values.coords else example
        title = f"{title}{', ' if title else ''}example {shown}"
    return grid(values.rename({upward: "position"}), across, "position", centre=0.0, title=title)
