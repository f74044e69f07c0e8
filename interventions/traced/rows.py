"""Rows of a planned pass: how they join, are written into, and go through a module. A leaf: imports torch only.

Runs inside a trace: plain functions, as `forward` says.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

Base = dict[tuple[int, str], torch.Tensor]
Writes = list[Any]


def append_joining_rows(
    value: Any, base: Base, point: tuple[int, str], at: Any, job: dict[str, Any], join: tuple[int, int]
) -> Any:
    """`value` (None where no row is at work) with the rows that join here behind it, as the base run has them."""
    count = job["joins"].get(join)
    return value if count is None else together(value, base[point][:, at].repeat(count, 1, 1))


def together(value: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    """Rows and more rows."""
    return more if value is None else torch.cat([value, more])


def apply_writes(value: Any, layer: int, place: str, job: dict[str, Any], keep: dict[Any, torch.Tensor]) -> Any:
    """`value` (None where no row is at work) after what is written at a place; kept where that is asked for."""
    writes = job["writes"].get((layer, place), [])
    if value is not None and writes:
        value = write_into(value.clone() if torch.is_grad_enabled() else value, writes)
    if (layer, place) in keep and value is not None:
        keep[(layer, place)] = value
    return value


def write_into(value: torch.Tensor, writes: Writes) -> torch.Tensor:
    """Write into `value`, in place: ``(rows, positions, columns, how, new)``; a new value of None is zeros."""
    for rows, positions, columns, how, new in writes:
        if how == "set":
            value[rows, positions, columns] = 0 if new is None else new.to(value.dtype)
        elif how == "scale":
            value[rows, positions, columns] *= new
        else:
            value[rows, positions, columns] += new.to(value.dtype)
    return value


def split_last_axis(value: torch.Tensor, *sizes: int) -> torch.Tensor:
    """`value` with its last axis in several, of these sizes."""
    return value.reshape(*value.shape[:-1], *sizes)


def call_module(block: Any, path: str, value: torch.Tensor) -> torch.Tensor:
    """What a module of a block makes of `value`."""
    made: torch.Tensor = operator.attrgetter(path)(block)(value)
    return made
