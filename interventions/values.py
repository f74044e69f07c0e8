"""The value that an edit puts in, from what was read of other runs. Owns the sums of mean and resample ablation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import DeclarationError
from .edits import Edit, MeanAblate, Patch, ResampleAblate, ZeroAblate
from .steering import Add, Scale


def edit_value(
    edit: Edit,
    source: torch.Tensor | None,
    positions: Any,
    examples: tuple[int, int],
    like: torch.Tensor,
) -> Any:
    """What to put at the site, broadcastable to ``(example, position, column)``; None stands for zeros.

    Parameters
    ----------
    edit : Edit
    source : Tensor (example, position, column), optional
        The site in the source run (for the examples of the group that are being run) or in the whole reference draw.
        For a pattern, ``(example, query, head, key)``.
    positions : slice or list of int
        Those that are wanted.
    examples : tuple of int
        Start and stop of the examples of the group that are being run; resampling pairs each with its own partner.
    like : Tensor
        Gives device and number format.
    """
    if isinstance(edit, ZeroAblate):
        return None
    if isinstance(edit, Add):
        return torch.tensor(edit.vector, dtype=like.dtype, device=like.device)
    if isinstance(edit, Scale):
        return edit.factor
    if source is None:
        raise DeclarationError(f"{edit!r}: nothing was read for it")
    if isinstance(edit, MeanAblate):
        if edit.over == "example":
            return source[:, positions].mean(dim=0, keepdim=True)
        return source.mean(dim=(0, 1), keepdim=True)
    if isinstance(edit, ResampleAblate):
        partners = derangement(len(source), edit.seed)[np.arange(*examples) % len(source)]
        return source[torch.as_tensor(partners, device=source.device)][:, positions]
    if isinstance(edit, Patch):
        return source[:, positions]
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
