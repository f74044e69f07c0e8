"""What a write puts in, as far as it is known before the activations are: a deferred value. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DeclarationError
from ..declare.changes import FromRun, Reduce
from ..declare.circuits import Circuit
from ..declare.paths import PathPatch
from ..plan.writes import Keys, Value

if TYPE_CHECKING:
    from ..traced import specs


def deferred_value(
    value: Value,
    site: specs.ReadSite,
    columns: slice,
    pattern: specs.PatternColumns | None,
    stop: int,
    positions: specs.Index,
    examples: tuple[int, int],
    drawn: int,
) -> specs.Value:
    """Say what to put at a site, as far as that is known before the runs are read.

    Parameters
    ----------
    value : Value
        Of a write; not masked keys, nor what a path or a circuit brings.
    site : ReadSite
        The tensor that holds the site.
    columns : slice
        Of that tensor.
    pattern : PatternColumns, optional
        How the value is made, where it is a pattern.
    stop : int
        Positions that are computed.
    positions : slice or list of int
        Those that are wanted.
    examples : tuple of int
        Start and stop of the examples of the group that are being run; resampling pairs each with its own partner.
    drawn : int
        Examples of the reference draw.

    Returns
    -------
    None, float, Vector or FromRun
        Zeros, a factor, or what a trace makes a tensor of.

    Raises
    ------
    DeclarationError
        Fewer than two examples are drawn, and each needs a partner.
    """
    assert not isinstance(value, Keys | PathPatch | Circuit)
    if value is None or isinstance(value, float):
        return value
    if not isinstance(value, FromRun):
        return {"kind": "vector", "numbers": value}
    paired = value.reduce is Reduce.PARTNER
    return {
        "kind": "run",
        "run": value.run,
        "site": site,
        "columns": columns,
        "pattern": pattern,
        "stop": stop,
        "positions": positions,
        "reduce": value.reduce.value,
        "partners": derangement(drawn, value.seed)[np.arange(*examples) % drawn] if paired else None,
    }


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
