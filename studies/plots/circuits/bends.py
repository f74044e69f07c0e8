"""The way that an edge takes between two nodes: straight, or bent past the nodes that it does not touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..parts.inputs import Array

ACROSS, UP = 440.0, 62.0
"""Pixels of the whole width of a graph, and of a row."""
RADIUS = 5.5
"""Pixels from the middle of a node to its rim."""
FREE = 2.0
"""Pixels that stay free between an edge and a node that it does not touch."""
BENDS = (0.0, *(sign * 0.03 * step for step in range(1, 15) for sign in (1, -1)))
"""How far from straight the middle of an edge may be, as a share of the width: the least is tried first."""
POINTS = 25


def way(
    start: tuple[float, float],
    end: tuple[float, float],
    others: Sequence[tuple[float, float]],
    width: float = 1.0,
) -> tuple[Array, Array]:
    """Points from one place to another: straight, or with the least bend that passes by all others.

    Parameters
    ----------
    start, end : (float, float)
        Across (0 to 1), and the row.
    others : sequence of (float, float)
        The nodes that are to be passed by.
    width : float
        Pixels of the line.

    Returns
    -------
    (array, array)
        Across and up; of two points where the way is straight. Where no bend passes by all others, the one that comes
        least near to any.
    """
    best, farthest = 0.0, -np.inf
    for bend in BENDS:
        x, y = _curve(start, end, bend)
        if bend and not 0 <= (start[0] + end[0]) / 2 + bend <= 1:
            continue
        room = clearance(x, y, others)
        if room > farthest:
            best, farthest = bend, room
        if room >= RADIUS + width / 2 + FREE:
            break
    if best == 0.0:
        return np.array([start[0], end[0]]), np.array([start[1], end[1]])
    return _curve(start, end, best)


def clearance(x: Array, y: Array, nodes: Sequence[tuple[float, float]]) -> float:
    """Pixels between a line through points and the middle of the nearest node."""
    if not len(nodes):
        return float("inf")
    here = np.stack([np.asarray(x) * ACROSS, np.asarray(y) * UP], axis=-1)
    at = np.asarray(nodes, dtype=float) * (ACROSS, UP)
    first, along = here[:-1], np.diff(here, axis=0)
    away = at[:, None] - first
    share = np.clip((away * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-12), 0.0, 1.0)
    return float(np.linalg.norm(away - share[..., None] * along, axis=-1).min())


def others_of(nodes: Mapping[str, tuple[float, int, str]], ends: Sequence[str]) -> list[tuple[float, float]]:
    """Places of the nodes that an edge does not touch."""
    return [(across, float(row)) for name, (across, row, _) in nodes.items() if name not in ends]


def _curve(start: tuple[float, float], end: tuple[float, float], bend: float) -> tuple[Array, Array]:
    """A curve of the second degree whose middle is `bend` beside the straight line."""
    at = np.linspace(0.0, 1.0, POINTS)
    x, y = ((1 - at) * one + at * other for one, other in zip(start, end, strict=True))
    return x + 4 * at * (1 - at) * bend, y
