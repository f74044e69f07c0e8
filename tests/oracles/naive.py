"""Owns the second opinion on metrics: explicit loops and explicit matrices, straight from the definitions.

Imports numpy, and torch only to read weights off a Hugging Face GPT-2. Attention is ``A (example, head, query, key)``;
attention scores come back as (example, head). Output metrics take ``logits (row, scored, vocab)`` and token ids
``(row, scored)`` and come back as (row, scored); taking means is the caller's business. ``start`` is 1 where a BOS
stands in front of the repeated tokens, else 0. Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _per_head(attention: ArrayLike, one: Callable[[int, Array], float]) -> Array:
    """Call ``one(example, pattern (query, key))`` for every example and head."""
    a = np.asarray(attention, dtype=np.float64)
    scores = np.full(a.shape[:2], np.nan)
    for example in range(a.shape[0]):
        for head in range(a.shape[1]):
            scores[example, head] = one(example, a[example, head])
    return scores


def _offset(attention: ArrayLike, queries: range, back: int) -> Array:
    """Mean of ``A[i, i - back]`` over the given queries."""
    return _per_head(attention, lambda _, a: sum(a[i, i - back] for i in queries) / len(queries))


def _size(attention: ArrayLike) -> int:
    return int(np.asarray(attention).shape[-1])


def _check_repeated(attention: ArrayLike, length: int, start: int) -> None:
    if _size(attention) != 2 * length + start:
        raise ValueError(f"{_size(attention)} positions, not 2 * {length} + {start}")


def uniform(size: int) -> Array:
    """Uniform causal attention (query, key): ``1 / (i + 1)`` on keys ``0 .. i``."""
    pattern = np.zeros((size, size))
    for i in range(size):
        for j in range(i + 1):
            pattern[i, j] = 1.0 / (i + 1)
    return pattern


def induction(attention: ArrayLike, length: int, start: int = 0) -> Array:
    """Mean of ``A[i, i - L + 1]``, ``i = L .. 2L - 1``, all shifted by ``start``."""
    _check_repeated(attention, length, start)
    return _offset(attention, range(length + start, 2 * length + start), length - 1)


def duplicate_token(attention: ArrayLike, length: int, start: int = 0) -> Array:
    """Mean of ``A[i, i - L]``, ``i = L .. 2L - 1``, all shifted by ``start``."""
    _check_repeated(attention, length, start)
    return _offset(attention, range(length + start, 2 * length + start), length)


def previous_token(attention: ArrayLike) -> Array:
    """Mean of ``A[i, i - 1]``, ``i = 1 .. S - 1``; a BOS counts as a position like any other."""
    return _offset(attention, range(1, _size(attention)), 1)


def first_token(attention: ArrayLike) -> Array:
    """Mean of ``A[i, 0]``, ``i = 1 .. S - 1``."""
    size = _size(attention)
    return _per_head(attention, lambda _, a: sum(a[i, 0] for i in range(1, size)) / (size - 1))


def self_attention(attention: ArrayLike) -> Array:
    """Mean of ``A[i, i]``, ``i = 0 .. S - 1``."""
    return _offset(attention, range(_size(attention)), 0)


def entropy(attention: ArrayLike) -> Array:
    """Mean, over the queries ``1 .. S - 1``, of the entropy of their attention, in nats."""
    size = _size(attention)

    def one(_: int, a: Array) -> float:
        return sum(-w * math.log(w) for i in range(1, size) for w in a[i].tolist() if w > 0) / (size - 1)

    return _per_head(attention, one)


def prefix_matching(attention: ArrayLike, tokens: ArrayLike) -> Array:
    """Mean, over queries with a target, of the attention summed over ``{1 <= j <= i : t[j-1] = t[i]}``.

    ``tokens`` is (example, position). NaN for an example in which no query has a target.
    """
    t = np.asarray(tokens)

    def one(example: int, a: Array) -> float:
        sums = []
        for i in range(t.shape[1]):
            targets = [j for j in range(1, i + 1) if t[example, j - 1] == t[example, i]]
            if targets:
                sums.append(sum(a[i, j] for j in targets))
        return sum(sums) / len(sums) if sums else float("nan")

    return _per_head(attention, one)


def _stripe(attention: ArrayLike, length: int) -> Array:
    size = _size(attention)
    entries = [(i, i + 1 - length) for i in range(size) if i + 1 - length >= 0]
    return _per_head(attention, lambda _, a: sum(a[i, j] for i, j in entries) / len(entries))


def induction_stripe(attention: ArrayLike, length: int) -> Array:
    """Mean of the whole diagonal ``j - i = 1 - L`` of 2L positions: L + 1 entries, one of them no induction."""
    _check_repeated(attention, length, 0)
    return _stripe(attention, length)


def induction_bos(attention: ArrayLike, length: int) -> Array:
    """Mean of the whole diagonal ``j - i = 1 - L`` of BOS and 2L positions: L + 2 entries."""
    _check_repeated(attention, length, 1)
    return _stripe(attention, length)


def detection_previous(size: int) -> Array:
    """TransformerLens' detection pattern of a previous token head (query, key): ones below the diagonal."""
    return np.array([[float(j == i - 1) for j in range(size)] for i in range(size)])


def detection_duplicate(tokens: ArrayLike) -> Array:
    """Detection pattern of a duplicate token head for one prompt (position,): ``t[i] == t[j]``, ``j < i``."""
    t = np.asarray(tokens)
    return np.array([[float(j < i and t[i] == t[j]) for j in range(len(t))] for i in range(len(t))])


def detection_induction(tokens: ArrayLike) -> Array:
    """Detection pattern of an induction head: the duplicate pattern one key to the right, nothing at key 0."""
    t = np.asarray(tokens)
    return np.array([[float(0 < j <= i and t[j - 1] == t[i]) for j in range(len(t))] for i in range(len(t))])


def _against(attention: ArrayLike, detection: ArrayLike, one: Callable[[Array, Array], float]) -> Array:
    d = np.asarray(detection, dtype=np.float64)
    return _per_head(attention, lambda example, a: one(a, d if d.ndim == 2 else d[example]))


def mul(attention: ArrayLike, detection: ArrayLike) -> Array:
    """TransformerLens ``error_measure="mul"``: ``sum(A * D) / sum(A)``; D is (query, key) or (example, query, key)."""
    return _against(attention, detection, lambda a, d: float((a * d).sum() / a.sum()))


def abs_score(attention: ArrayLike, detection: ArrayLike) -> Array:
    """TransformerLens ``error_measure="abs"`` without its rounding: ``1 - mean(|A - D|) * S``."""
    return _against(attention, detection, lambda a, d: float(1.0 - np.abs(a - d).mean() * len(a)))


def _log_probs(row: Array) -> Array:
    shifted: Array = row - row.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _per_token(logits: ArrayLike, one: Callable[[int, int, Array], float]) -> Array:
    x = np.asarray(logits, dtype=np.float64)
    out = np.full(x.shape[:2], np.nan)
    for row in range(x.shape[0]):
        for scored in range(x.shape[1]):
            out[row, scored] = one(row, scored, x[row, scored])
    return out


def loss(logits: ArrayLike, targets: ArrayLike) -> Array:
    """Cross-entropy of the target in nats."""
    t = np.asarray(targets)
    return _per_token(logits, lambda r, s, x: -float(_log_probs(x)[t[r, s]]))


def prob(logits: ArrayLike, targets: ArrayLike) -> Array:
    """Probability of the target."""
    t = np.asarray(targets)
    return _per_token(logits, lambda r, s, x: float(np.exp(_log_probs(x)[t[r, s]])))


def accuracy(logits: ArrayLike, targets: ArrayLike) -> Array:
    """1 where the greedy prediction is the target; of tied logits the lowest token id is the prediction."""
    t = np.asarray(targets)
    return _per_token(logits, lambda r, s, x: float(int(np.argmax(x)) == t[r, s]))


def rank(logits: ArrayLike, targets: ArrayLike) -> Array:
    """Number of tokens with a strictly larger logit than the target's; 0 is best."""
    t = np.asarray(targets)
    return _per_token(logits, lambda r, s, x: float(sum(value > x[t[r, s]] for value in x)))


def logit_diff(logits: ArrayLike, targets: ArrayLike, distractors: ArrayLike) -> Array:
    """Logit of the target minus logit of the distractor."""
    t, d = np.asarray(targets), np.asarray(distractors)
    return _per_token(logits, lambda r, s, x: float(x[t[r, s]] - x[d[r, s]]))


def kl(base: ArrayLike, other: ArrayLike) -> Array:
    """KL(base || other) in nats."""
    y = np.asarray(other, dtype=np.float64)

    def one(row: int, scored: int, x: Array) -> float:
        p, q = _log_probs(x), _log_probs(y[row, scored])
        return float(sum(np.exp(p[v]) * (p[v] - q[v]) for v in range(len(p))))

    return _per_token(base, one)


def normalized(x: ArrayLike, clean: ArrayLike, corrupted: ArrayLike) -> float:
    """``(mean x - mean corrupted) / (mean clean - mean corrupted)``; NaN where the denominator is exactly 0."""
    zero, one, here = (float(np.mean(np.asarray(values))) for values in (corrupted, clean, x))
    return float("nan") if one == zero else (here - zero) / (one - zero)


def raw(model: Any, layer: int, head: int) -> dict[str, Array]:
    """W_Q, W_K, W_V (d_model, d_head) and W_O (d_head, d_model) of one head, as they stand."""
    attention, d_model = model.transformer.h[layer].attn, model.config.n_embd
    d_head = d_model // model.config.n_head
    stacked = attention.c_attn.weight.detach().cpu().numpy().astype(np.float64)
    rows = slice(head * d_head, (head + 1) * d_head)
    weights = {f"W_{name}": stacked[:, n * d_model : (n + 1) * d_model][:, rows] for n, name in enumerate("QKV")}
    weights["W_O"] = attention.c_proj.weight.detach().cpu().numpy().astype(np.float64)[rows]
    return weights


def folded(model: Any, layer: int, head: int) -> dict[str, Array]:
    """The same as TransformerLens holds them: gain of ln_1 multiplied in, then centred.

    W_Q, W_K and W_V are centred over their d_model input (LayerNorm has taken the mean away), W_O over its d_model
    output (every later LayerNorm takes it away).
    """
    gain = model.transformer.h[layer].ln_1.weight.detach().cpu().numpy().astype(np.float64)
    centre = np.eye(len(gain)) - np.ones((len(gain), len(gain))) / len(gain)
    weights = raw(model, layer, head)
    read = {name: centre @ np.diag(gain) @ weights[name] for name in ("W_Q", "W_K", "W_V")}
    return {**read, "W_O": weights["W_O"] @ centre}


def composition(kind: str, first: Mapping[str, Array], second: Mapping[str, Array]) -> float:
    """Composition (q, k or v) of an earlier head into a later one; NaN where a norm is 0.

    On purpose through d_model x d_model matrices, and for row vectors: ``M_OV = W_V @ W_O``, ``M_QK = W_Q @ W_K.T``.
    """
    kind = kind.lower()
    ov = np.asarray(first["W_V"], dtype=np.float64) @ np.asarray(first["W_O"], dtype=np.float64)
    if kind in ("q", "k"):
        later = np.asarray(second["W_Q"], dtype=np.float64) @ np.asarray(second["W_K"], dtype=np.float64).T
        later = later if kind == "q" else later.T
    elif kind == "v":
        later = np.asarray(second["W_V"], dtype=np.float64) @ np.asarray(second["W_O"], dtype=np.float64)
    else:
        raise ValueError(f"kind is 'q', 'k' or 'v', not {kind!r}")
    norms = float(np.linalg.norm(ov) * np.linalg.norm(later))
    return float("nan") if norms == 0 else float(np.linalg.norm(ov @ later)) / norms


def benjamini_hochberg(p: ArrayLike) -> Array:
    """q-values in the order given: ``min over k >= rank of p_(k) * n / k``, at most 1."""
    values = np.asarray(p, dtype=np.float64)
    n = len(values)
    ranked = sorted(float(value) for value in values)
    q = np.ones(n)
    for index in range(n):
        for k in range(1, n + 1):
            if ranked[k - 1] >= values[index]:
                q[index] = min(q[index], ranked[k - 1] * n / k)
    return q


def null_p_value(observed: float, null: ArrayLike) -> float:
    """``(1 + #{null >= observed}) / (1 + n)``."""
    values = np.asarray(null, dtype=np.float64).ravel()
    return (1 + sum(bool(value >= observed) for value in values)) / (1 + len(values))
