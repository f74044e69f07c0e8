"""Scores read off the weights alone: q-, k- and v-composition. Plain NumPy in float64; imports errors only.

Row-vector convention, ``x @ W``. For the heads of one layer ``W_Q``, ``W_K``, ``W_V`` have shape
``(head, d_model, d_head)`` and ``W_O`` has ``(head, d_head, d_model)``. In models that rotate q and k by their position
(rotary embedding), the rotation is left out of the products: ``M_QK`` is that of a query and a key at one position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..errors import MOST_DRAWS, UnknownNameError, choices, whole

Array = np.ndarray[Any, Any]
KINDS = ("q", "k", "v")


class Factors(NamedTuple):
    """Factors of all heads of a layer, float64.

    Attributes
    ----------
    W_Q, W_K, W_V : array (head, d_model, d_head)
    W_O : array (head, d_head, d_model)
    """

    W_Q: Array
    W_K: Array
    W_V: Array
    W_O: Array


def pair_table(layers: list[list[Array | None]], folded: bool, centred: bool) -> Array:
    """`composition` between all heads of different layers, ``(kind, layer, head, later layer, head)``; NaN elsewhere.

    Parameters
    ----------
    layers : list of lists of arrays
        ``W_Q W_K W_V W_O gain q_gain k_gain out_gain`` of each layer, as for `factors`.
    folded : bool
        Whether norms are folded in.
    centred : bool
        As for `factors`.
    """
    made: list[Any] = []
    for q, k, v, o, *gains in layers:
        made.append(folded_factors(q, k, v, o, centred, *(gains if folded else [None] * len(gains))))
    count, heads = len(made), len(made[0][0])
    table: Array = np.full((3, count, heads, count, heads), np.nan)
    for later in range(count):
        for earlier in range(later):
            for row, kind in enumerate(("q", "k", "v")):
                table[row, earlier, :, later, :] = _composition(kind, made[earlier], made[later])
    return table


def factors(
    W_Q: Array,
    W_K: Array,
    W_V: Array,
    W_O: Array,
    gain: Array | None = None,
    *,
    centred: bool = True,
    q_gain: Array | None = None,
    k_gain: Array | None = None,
    out_gain: Array | None = None,
) -> Factors:
    """Factors ready for composition; with `gain`, the norm around them is folded in.

    Parameters
    ----------
    W_Q : array (head, d_model, d_head)
    W_K, W_V : array (head, d_model, d_head)
        Or with fewer heads, each of which as many neighbouring heads read.
    W_O : array (head, d_head, d_model)
    gain : array (d_model,), optional
        What the norm that the layer reads through multiplies by: its weight, or 1 + weight in Gemma. It is multiplied
        into what reads. Left out: raw weights.
    centred : bool
        Whether that norm removes the mean over ``d_model``, as LayerNorm does and RMSNorm does not. If so, what reads
        and what writes is centred over ``d_model``, so that no score counts a direction that cannot pass. (The
        defaults of TransformerLens do the same.)
    q_gain, k_gain : array (d_head,), optional
        Of norms of q and k themselves, multiplied into what they read; how these norms scale a whole vector cannot be
        folded in. Of norms over all heads at once, ``(head, d_head)``.
    out_gain : array (d_model,), optional
        Of a norm between attention and the stream, multiplied into what heads write.

    Returns
    -------
    Factors
        Arrays of the same shapes in float64, keys and values repeated for each head that reads them.
    """
    return Factors(*folded_factors(W_Q, W_K, W_V, W_O, centred, gain, q_gain, k_gain, out_gain))


def folded_factors(
    W_Q: Any,
    W_K: Any,
    W_V: Any,
    W_O: Any,
    centred: bool,
    gain: Array | None,
    q_gain: Array | None,
    k_gain: Array | None,
    out_gain: Array | None = None,
) -> tuple[Array, ...]:
    """As `factors`, whose parameters these are, but plain arrays: for a server that has no `Factors`.

    Parameters
    ----------
    W_Q, W_K, W_V, W_O, centred, gain, q_gain, k_gain, out_gain
        As for `factors`.

    Returns
    -------
    tuple of arrays
        The fields of `Factors`.
    """
    q, k, v, o = (np.asarray(weight, dtype=np.float64) for weight in (W_Q, W_K, W_V, W_O))
    k, v = (np.repeat(weight, len(q) // len(weight), axis=0) for weight in (k, v))
    o = o if out_gain is None else o * np.asarray(out_gain, dtype=np.float64)
    if gain is not None:
        q, k, v = (weight * np.asarray(gain, dtype=np.float64)[:, None] for weight in (q, k, v))
        if centred:
            q, k, v = (weight - weight.mean(axis=1, keepdims=True) for weight in (q, k, v))
            o = o - o.mean(axis=2, keepdims=True)
    q, k = (side if one is None else side * _by_head(one, len(q)) for side, one in ((q, q_gain), (k, k_gain)))
    return q, k, v, o


def _by_head(gain: Any, heads: int) -> Array:
    """A gain of all heads, or of each ``(head, d_head)``, as it is multiplied into what they read."""
    whole = np.asarray(gain, dtype=np.float64)
    return whole if whole.ndim == 1 else np.repeat(whole, heads // len(whole), axis=0)[:, None]


def composition(kind: str, first: Factors, second: Factors) -> Array:
    """How much of what the heads of an earlier layer write is read by the heads of a later one.

    With ``M_OV = W_V @ W_O`` and ``M_QK = W_Q @ W_K.T``, and Frobenius norms,

    - ``q``: ``|M_OV1 @ M_QK2| / (|M_OV1| |M_QK2|)``
    - ``k``: ``|M_OV1 @ M_QK2.T| / (|M_OV1| |M_QK2|)``
    - ``v``: ``|M_OV1 @ M_OV2| / (|M_OV1| |M_OV2|)``

    computed from the ``d_head``-sized factors, never from ``d_model x d_model`` products.

    Returns
    -------
    array (first head, second head)
        Between 0 and 1; NaN where one of the two heads has no weights. Shapes with a small ``d_model`` have a high
        floor: compare with `random_composition`.

    References
    ----------
    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    if kind not in KINDS:
        raise UnknownNameError(f"composition {kind!r}: possible are {choices(KINDS)}")
    return _composition(kind, first, second)


def _composition(kind: str, first: tuple[Array, ...], second: tuple[Array, ...]) -> Array:
    _, _, V1, O1 = first
    Q2, K2, V2, O2 = second
    reader, rest = {
        "q": (Q2, _gram(K2)),
        "k": (K2, _gram(Q2)),
        "v": (V2, _gram(O2.swapaxes(1, 2))),
    }[kind]
    between = np.einsum("aim,bmj->abij", O1, reader, optimize=True)
    squared = np.einsum("aki,abij,bjl,abkl->ab", _gram(V1), between, rest, between, optimize=True)
    writer_norm = _norm(_gram(V1), _gram(O1.swapaxes(1, 2)))
    reader_norm = _norm(_gram(reader), rest)
    scale = writer_norm[:, None] * reader_norm[None, :]
    score: Array = np.sqrt(np.clip(squared, 0, None)) / np.where(scale > 0, scale, np.nan)
    return score


def random_composition(d_model: int, d_head: int, draws: int = 200, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each score for random Gaussian factors of this shape: the floor.

    Parameters
    ----------
    d_model, d_head : int
        Widths of the residual stream and of a head.
    draws, seed : int
        Number and seed of the random pairs of heads.

    Returns
    -------
    dict of str to (float, float)
        ``q``, ``k`` and ``v``: mean and standard deviation over the draws, pure numbers.

    Raises
    ------
    DeclarationError
        `draws` is not possible.
    """
    whole(draws, "draws", high=MOST_DRAWS)
    random = np.random.default_rng(seed)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(draws):
        first, second = (
            Factors(*(random.standard_normal((1, *shape)) for shape in [(d_model, d_head)] * 3 + [(d_head, d_model)]))
            for _ in range(2)
        )
        for kind in KINDS:
            found[kind].append(float(composition(kind, first, second)[0, 0]))
    return {kind: (float(np.mean(scores)), float(np.std(scores, ddof=1))) for kind, scores in found.items()}


def _gram(weight: Array) -> Array:
    """``W.T @ W`` of each head."""
    product: Array = weight.swapaxes(1, 2) @ weight
    return product


def _norm(left: Array, right: Array) -> Array:
    """``|A @ B|`` of each head from the Gram matrices of ``A`` and of ``B.T``."""
    norm: Array = np.sqrt(np.einsum("hij,hji->h", left, right))
    return norm
