"""Rows of a planned pass: how they join, are written into, and go through a module. Runs inside a trace."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .specs import Join, PassSpec, Points, ReadSite, TensorWrite, WriteSite


def append_joining_rows(
    value: torch.Tensor | None, base: Points, site: ReadSite, at: Any, spec: PassSpec, join: Join
) -> Any:
    """`value` (None where no row is at work) with the rows that join here behind it, as the base run has them.

    Parameters
    ----------
    value : tensor (row, ...), optional
    base : Points
    site : ReadSite
        Where the base run has the rows that join.
    at : slice or tensor
        Positions of them.
    spec : PassSpec
    join : Join

    Returns
    -------
    tensor (row, ...) or None
    """
    count = spec["joins"].get(join)
    return value if count is None else append_rows(value, base[site][:, at].repeat(count, 1, 1))


def append_rows(value: torch.Tensor | None, more: torch.Tensor | None) -> Any:
    """Rows and more rows, if there are any."""
    if value is None or more is None:
        return more if value is None else value
    return torch.cat([value, more])


def apply_writes(value: Any, site: WriteSite, spec: PassSpec, keep: dict[WriteSite, Any]) -> Any:
    """`value` (None where no row is at work) after what is written at a site; kept where that is asked for.

    Parameters
    ----------
    value : tensor (row, position, column), optional
    site : WriteSite
    spec : PassSpec
    keep : dict
        Gets the value where the site is one of its keys.

    Returns
    -------
    tensor (row, position, column) or None
    """
    writes = spec["writes"].get(site, [])
    if value is not None and writes:
        value = write_into(value.clone() if torch.is_grad_enabled() else value, writes)
    if site in keep and value is not None:
        keep[site] = value
    return value


def write_into(value: torch.Tensor, writes: list[TensorWrite]) -> torch.Tensor:
    """Write into `value`, in place."""
    for write in writes:
        rows, positions, columns = write["rows"], write["positions"], write["columns"]
        new: Any = write["value"]
        if write["how"] == "set":
            value[rows, positions, columns] = 0 if new is None else new.to(value.dtype)
        elif write["how"] == "scale":
            value[rows, positions, columns] *= new
        elif write["how"] == "project":
            value[rows, positions, columns] = projected_out(value[rows, positions, columns], new)
        else:
            value[rows, positions, columns] += new.to(value.dtype)
    return value


def projected_out(value: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """`value` without its part along a direction ``(column,)``; worked out in float32 at least."""
    wide = torch.promote_types(value.dtype, torch.float32)
    unit = direction.to(wide) / direction.to(wide).norm()
    full = value.to(wide)
    rest: torch.Tensor = full - (full * unit).sum(-1, keepdim=True) * unit
    return rest.to(value.dtype)


def normed(block: Any, path: str | None, stream: torch.Tensor) -> torch.Tensor:
    """What a norm of a block (None: it has none) makes of the stream, as a tensor of its own, not the stream itself."""
    made = stream if path is None else call_module(block, path, stream)
    return made.clone() if made is stream else made


def after(block: Any, path: str | None, value: torch.Tensor) -> torch.Tensor:
    """`value` after a norm of a block (None: it has none)."""
    return value if path is None else call_module(block, path, value)


def split_last_axis(value: torch.Tensor, *sizes: int) -> torch.Tensor:
    """`value` with its last axis in several, of these sizes."""
    return value.reshape(*value.shape[:-1], *sizes)


def call_module(block: Any, path: str, value: torch.Tensor) -> torch.Tensor:
    """What a module of a block makes of `value` (the first, where it returns several)."""
    made: Any = operator.attrgetter(path)(block)(value)
    first: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return first


def no_tokens(device: Any) -> torch.Tensor:
    """Tokens for a trace that never goes through the model itself."""
    return torch.zeros((1, 1), dtype=torch.long, device=device)
