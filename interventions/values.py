"""The value that an edit puts in, from what was read of other runs. Owns the sums of mean and resample ablation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import DeclarationError
from .edits import MeanAblate, Patch, ResampleAblate, SiteEdit, ZeroAblate


def edit_value(
    edit: SiteEdit,
    source: torch.Tensor | None,
    cols: slice,
    positions: list[int] | None,
    examples: tuple[int, int],
) -> torch.Tensor | None:
    """What to put at the site, broadcastable to ``(example, position, column)``; None stands for zeros.

    Parameters
    ----------
    edit : SiteEdit
    source : Tensor (example, position, width), optional
        The point of the site in the source run (for those same examples) or in the whole reference draw.
    cols : slice
        Columns of the site at its point.
    positions : list of int, optional
    examples : tuple of int
        Start and stop of the examples of the group that are being run; resampling pairs each with its own partner.
    """
    if isinstance(edit, ZeroAblate):
        return None
    if source is None:
        raise DeclarationError(f"{edit!r}: nothing was read for it")
    value = source[:, :, cols]
    if isinstance(edit, MeanAblate):
        value = value.mean(dim=0, keepdim=True) if edit.over == "example" else value.mean(dim=(0, 1), keepdim=True)
        if value.shape[1] == 1:
            return value
    elif isinstance(edit, ResampleAblate):
        partners = derangement(len(source), edit.seed)[np.arange(*examples) % len(source)]
        value = value[torch.as_tensor(partners, device=source.device)]
    elif not isinstance(edit, Patch):
        raise DeclarationError(f"{edit!r} is no intervention that the engine knows")
    return value if positions is None else value[:, positions]


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
