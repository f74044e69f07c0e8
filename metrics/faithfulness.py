"""How much of a behaviour circuits of growing size keep: faithfulness, and areas under it. Plain NumPy.

With ``m`` the mean of a metric over prompts, faithfulness is ``f = (m(circuit) - m(empty)) / (m(model) - m(empty))``, a
ratio of means: 0 for the empty circuit, 1 for the whole model, and perhaps above 1 or below 0 between them. The share
of a circuit is its number of edges before any is pruned, over that of the model.

References
----------
Mueller et al. (2025), "MIB: A Mechanistic Interpretability Benchmark", arXiv:2504.13151.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DeclarationError

Array = np.ndarray[Any, Any]
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of all edges at which MIB measures circuits."""
ROUNDING = 1e-5
"""Share of the mean size of the values up to which a gap counts as rounding."""


def mib_sizes(edges: int) -> tuple[int, ...]:
    """Number of edges at each of `SHARES`, ``int(share * edges)``: several are 0 where there are few edges."""
    return tuple(int(share * edges) for share in SHARES)


def even_sizes(edges: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... edges, up to all."""
    steps = (digit * 10**power for power in range(len(str(edges))) for digit in (1, 2, 5))
    return (*(step for step in steps if step < edges), edges)


def faithfulness(circuit: Array, empty: Array, model: Array) -> Array:
    """``(mean circuit - mean empty) / (mean model - mean empty)`` over the last axis (examples).

    Parameters
    ----------
    circuit : array (..., example)
        A metric of a circuit.
    empty, model : array (example,)
        The same metric of the empty circuit and of the whole model.

    Returns
    -------
    array (...)
        A pure number; NaN where a value is missing.

    Raises
    ------
    DeclarationError
        The whole model and the empty circuit have the same mean, up to rounding in single precision: there is nothing
        to keep.
    """
    circuit, empty, model = (np.asarray(part, dtype=np.float64) for part in (circuit, empty, model))
    gap = (model - empty).mean()
    if abs(gap) <= ROUNDING * max(np.abs(model).mean(), np.abs(empty).mean()):
        raise DeclarationError(
            f"the whole model and the empty circuit both have a mean of {float(model.mean()):.6g}, so there is nothing "
            "for a circuit to keep: take another corrupted run, or another metric"
        )
    found: Array = (circuit - empty).mean(axis=-1) / gap
    return found


def cpr(values: Array, shares: Array, log: bool = False) -> Array:
    """The circuit performance ratio: the area under faithfulness, by the trapezoid rule over shares; higher is better.

    Parameters
    ----------
    values : array (..., share)
        Faithfulness.
    shares : array (share,)
        In rising order; with `SHARES`, the area is that of MIB, and f = 1 throughout gives 0.999.
    log : bool
        Over the logarithm of the share, divided by the length of the axis: the mean of f over orders of magnitude.

    Returns
    -------
    array (...)

    Raises
    ------
    DeclarationError
        Shares do not rise, or one is not above 0 in a logarithm.
    """
    return _area(np.asarray(values, dtype=np.float64), shares, log)


def cmd(values: Array, shares: Array, log: bool = False) -> Array:
    """The circuit-model distance: the area under ``|1 - f|``, by the trapezoid rule over shares; lower is better.

    Parameters
    ----------
    values, shares, log
        As for `cpr`; f = 1 throughout gives 0.

    Returns
    -------
    array (...)

    Raises
    ------
    DeclarationError
        As for `cpr`.
    """
    return _area(np.abs(1 - np.asarray(values, dtype=np.float64)), shares, log)


def _area(values: Array, shares: Array, log: bool) -> Array:
    at = np.asarray(shares, dtype=np.float64)
    if at.ndim != 1 or len(at) < 2 or not (np.diff(at) > 0).all() or at[0] < 0 or (log and at[0] == 0):
        raise DeclarationError(
            f"an area needs two or more shares that rise{', the first above 0' if log else ''}, got {at.tolist()}"
        )
    at = np.log(at) if log else at
    found: Array = np.trapezoid(values, at, axis=-1) / (at[-1] - at[0] if log else 1.0)
    return found
