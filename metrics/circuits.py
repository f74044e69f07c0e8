"""What OV and QK circuits say of pairs of tokens, from their factors. Torch, in float64; imports nothing of headwise.

A circuit is a matrix ``left @ right`` of tokens by tokens, with ``left`` ``(token, d_head)`` and ``right``
``(d_head, token)``. No function here holds the whole matrix. With ``W_E`` and ``W_U`` ``(token, d_model)``,

- OV: ``left = W_E @ W_V``, ``right = W_O @ W_U.T``. Row: the token that is read; column: the token that is written.
- QK: ``left = W_E @ W_Q``, ``right = (W_E @ W_K).T``. Row: the token of the query; column: the token of the key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
NOTHING = 1e-10
"""An eigenvalue below this share of the norm of its matrix is none: what rounding leaves of 0."""


def eigenvalues(inner: torch.Tensor) -> Array:
    """Eigenvalues of ``left @ right`` but for those that are 0 in every such matrix.

    Parameters
    ----------
    inner : tensor (d_head, d_head)
        ``right @ left``, which has the same eigenvalues.

    Returns
    -------
    array (d_head,), complex
        The largest in absolute value first, of a conjugate pair the one with a positive imaginary part. What is 0 up to
        rounding is 0.
    """
    found: Array = torch.linalg.eigvals(inner).cpu().numpy()
    size = np.abs(found)
    found = np.where(size > NOTHING * float(torch.linalg.matrix_norm(inner)), found, 0)
    return found[np.lexsort((-found.imag, -size))]


def copying(values: Array) -> float:
    """The share of eigenvalues whose real part is positive, of those that are not 0; NaN where all are.

    A circuit of random weights has about half.
    """
    values = values[values != 0]
    return float((values.real > 0).mean()) if len(values) else float("nan")


def eigenvalue_score(values: Array) -> float:
    """``sum(eigenvalues) / sum(abs(eigenvalues))``, between -1 and 1; NaN where all are 0.

    1 where each is real and positive: whatever direction of tokens is read raises itself.

    References
    ----------
    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    total = float(np.abs(values).sum())
    return float(values.sum().real) / total if total else float("nan")
