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
AT_ONCE = 2**21
"""Entries of a matrix that are made at a time."""
SPARE = 10
"""More pairs than are wanted, so that rounding loses none."""
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


def singular_values(left: torch.Tensor, right: torch.Tensor) -> Array:
    """Singular values of ``left @ right`` but for those that are 0 in every such matrix; the largest first."""
    inner = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    found: Array = torch.linalg.svdvals(inner).cpu().numpy()
    return found


def diagonal_z(left: torch.Tensor, right: torch.Tensor) -> float:
    """How far a token's entry for itself lies above its row, in standard deviations of the row: mean over tokens.

    Where pairs have nothing to do with each other it is about 0. NaN where every row is constant.
    """
    mean, size = right.mean(1, keepdim=True), right.shape[1]
    apart = right - mean
    own = (left * apart.T).sum(1)
    deviation = ((left @ (apart @ apart.T / size)) * left).sum(1).clamp_min(0).sqrt()
    known = deviation > NOTHING * deviation.max()
    return float((own[known] / deviation[known]).mean()) if bool(known.any()) else float("nan")


def top_pairs(left: torch.Tensor, right: torch.Tensor, top: int) -> tuple[Array, Array, Array, float]:
    """The highest and the lowest entries of ``left @ right``, each less the mean of its row; and how high tokens stand.

    What follows a circuit is a softmax over its columns, which takes no notice of a number added to a row. Some rows
    are made at a time; on the CPU in float32 to find the pairs, whose weights are then made in float64.

    Parameters
    ----------
    left : tensor (token, d_head)
    right : tensor (d_head, token)
    top : int

    Returns
    -------
    tuple of array (2, top), array (2, top), array (2, top) and float
        Weights, rows and columns: of the highest, the highest first; of the lowest, the lowest first. And the share of
        other columns whose entry is smaller than that of the token itself, mean over tokens: 0.5 by chance, 1 where
        each token prefers itself to all others; NaN for a matrix of zeros.
    """
    right = right - right.mean(1, keepdim=True)
    size, spare = len(left), top + SPARE
    rough = torch.float32 if left.device.type == "cpu" else torch.float64
    rows, columns = left.to(rough), right.to(rough)
    reach = float(left.norm(dim=1).max() * right.norm(dim=0).max())
    slack = 4 * torch.finfo(rough).eps * len(right) ** 0.5 * reach
    found: list[list[torch.Tensor]] = [[], []]
    least = [-float("inf")] * 2
    below, step = 0, max(1, AT_ONCE // size)
    for start in range(0, size, step):
        block = rows[start : start + step] @ columns
        less = block < block.diagonal(start)[:, None]
        below += int(np.count_nonzero(less.numpy()) if rough == torch.float32 else less.sum())
        for side, ends in enumerate((block.amax(1), -block.amin(1))):
            near = torch.nonzero(ends >= least[side] - slack)[:, 0]
            if not len(near):
                continue
            values, at = (block[near] * (1 - 2 * side)).topk(min(spare, size), 1)
            pairs = torch.stack([(near + start)[:, None].expand_as(at), at], -1).flatten(0, 1)
            if found[side]:
                values, pairs = torch.cat([found[side][0], values.flatten()]), torch.cat([found[side][1], pairs])
            best, order = values.flatten().topk(min(2 * spare, values.numel()))
            found[side] = [best, pairs[order]]
            least[side] = float(best[min(top, len(best)) - 1])
    made = np.zeros((3, 2, top))
    for side, (_, pairs) in enumerate(found):
        exact = (left[pairs[:, 0]] * right[:, pairs[:, 1]].T).sum(1).cpu().numpy()
        places = pairs.cpu().numpy()
        ranked = np.lexsort((places[:, 1], places[:, 0], (2 * side - 1) * exact))[:top]
        made[:, side] = exact[ranked], *places[ranked].T
    return made[0], made[1], made[2], below / (size * (size - 1)) if reach > 0 and size > 1 else float("nan")


def top_columns(rows: torch.Tensor, columns: torch.Tensor, top: int, centred: bool) -> tuple[Array, Array]:
    """The highest and the lowest entries of each row of ``rows @ columns.T``.

    Parameters
    ----------
    rows : tensor (row, width)
        Float64.
    columns : tensor (token, width)
        Of any number format; some are made float64 at a time.
    top : int
    centred : bool
        Whether the mean of its row is taken away from an entry.

    Returns
    -------
    tuple of array (row, 2, top) and array (row, 2, top)
        Weights and tokens: the highest, the highest first; the lowest, the lowest first.
    """
    total = torch.zeros_like(rows[:, 0])
    values = [rows.new_zeros((len(rows), 0))] * 2
    tokens = [torch.zeros((len(rows), 0), dtype=torch.long, device=rows.device)] * 2
    step = max(1, AT_ONCE // len(rows))
    for start in range(0, len(columns), step):
        made = rows @ columns[start : start + step].to(rows).T
        total += made.sum(1)
        for side, sign in enumerate((1, -1)):
            some, at = (made * sign).topk(min(top, made.shape[1]), 1)
            both, ids = torch.cat([values[side], some], 1), torch.cat([tokens[side], at + start], 1)
            values[side], order = both.topk(min(top, both.shape[1]), 1)
            tokens[side] = ids.gather(1, order)
    weights = torch.stack([values[0], -values[1]], 1)
    weights = weights - (total / len(columns))[:, None, None] if centred else weights
    return weights.cpu().numpy(), torch.stack(tokens, 1).cpu().numpy()
