"""The edges that stand along the dim ``edge`` of scores and of results."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr

from ...interventions.declare.circuits import Edge, as_edge


def edges_of(found: xr.Dataset | xr.DataArray) -> list[Edge]:
    """The edges along the dim ``edge``, in its order.

    Parameters
    ----------
    found : Dataset or DataArray
        With the coordinates ``sender`` and ``receiver`` along ``edge``.

    Returns
    -------
    list of Edge
    """
    names = (map(str, found[side].values) for side in ("sender", "receiver"))
    return [as_edge(pair) for pair in zip(*names, strict=True)]


def edge_coords(edges: Iterable[Edge]) -> dict[str, tuple[str, np.ndarray]]:
    """Coordinates along ``edge``: the text of each edge, ``sender`` and ``receiver``."""
    some = list(edges)
    columns = {
        "edge": [str(edge) for edge in some],
        "sender": [edge.sender for edge in some],
        "receiver": [edge.receiver for edge in some],
    }
    return {name: ("edge", np.asarray(column, dtype=object)) for name, column in columns.items()}
