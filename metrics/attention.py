"""Metrics of attention patterns: how much a head attends where a named kind of head would. Imports `card` only.

The docstring of the package defines each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from ..errors import DeclarationError
from .card import Array, Card, Metric, PromptFacts

INDUCTION_PAPER = "Olsson et al. 2022, In-context Learning and Induction Heads"
LENS = "TransformerLens, head_detector"


def _sum(pattern: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("rhqk,rqk->rh", pattern, weights.to(pattern.dtype))


def _portion(pattern: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("rhqk,rqk->rh", pattern, weights.to(pattern.dtype)) / pattern.sum((-2, -1))


def _closeness(pattern: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    wanted = weights.to(pattern.dtype).unsqueeze(1)
    return 1 - (pattern - wanted).abs().mean(dim=(-2, -1)) * pattern.shape[-1]


def _entropy(pattern: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return _sum(torch.special.entr(pattern), weights)


def _along(run: PromptFacts, queries: range, back: int) -> Array:
    """Weights that average ``A[i, i - back]`` over `queries`."""
    examples, size = run.tokens.shape
    weights: Array = np.zeros((examples, size, size), dtype=np.float32)
    index = np.array(queries, dtype=int)
    weights[:, index, index - back] = 1 / max(len(index), 1)
    if len(index) == 0:
        weights[:] = np.nan  # no such query: the score is missing, not 0
    return weights


def _period(run: PromptFacts, name: str) -> int:
    if run.period is None:
        raise DeclarationError(f"{name} needs a repeated sequence (RepeatedTokens); prefix_matching works on any text")
    return run.period


def _second_half(run: PromptFacts, name: str) -> range:
    half = _period(run, name)
    return range(run.start + half, run.start + 2 * half)


def _stripe(run: PromptFacts, name: str, bos: int) -> Array:
    half = _period(run, name)
    if run.start != bos:
        raise DeclarationError(
            f"{name} is defined {'with' if bos else 'without'} a BOS: use RepeatedTokens(bos={bool(bos)})"
        )
    return _along(run, range(half - 1, run.tokens.shape[1]), half - 1)


def repeats_of(tokens: Array) -> Array:
    """``D[i, j] = 1`` where ``t[j] = t[i]`` and ``j < i``: the duplicate token. Shape ``(example, query, key)``."""
    same: Array = tokens[:, :, None] == tokens[:, None, :]
    return np.tril(same, -1).astype(np.float32)


def after_repeats_of(tokens: Array) -> Array:
    """``D[i, j] = 1`` where ``t[j - 1] = t[i]`` and ``j <= i``: the token after an earlier copy of the query."""
    shifted = np.zeros((*tokens.shape, tokens.shape[1]), dtype=np.float32)
    shifted[:, :, 1:] = repeats_of(tokens)[:, :, :-1]
    return shifted


def _prefix(run: PromptFacts) -> Array:
    targets: Array = after_repeats_of(run.tokens)
    queries = targets.any(axis=-1).sum(axis=-1).astype(np.float32)
    queries[queries == 0] = np.nan  # nothing repeats: the score is missing, not 0
    share: Array = targets / queries[:, None, None]
    return share


def _subdiagonal(tokens: Array) -> Array:
    return np.broadcast_to(np.eye(tokens.shape[1], k=-1, dtype=np.float32), (*tokens.shape, tokens.shape[1]))


def _attention(
    name: str,
    long_name: str,
    weights: Callable[[PromptFacts], Array],
    reference: str,
    kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _sum,
    bounds: tuple[float, float] = (0.0, 1.0),
    units: str = "1",
) -> Metric:
    def prepare(run: PromptFacts) -> Mapping[str, Array]:
        return {"weights": np.ascontiguousarray(weights(run))}

    return Metric(Card(name, long_name, units, bounds, "", reference), "pattern", kernel, prepare)


def attention_over(card: Card, weights: Array) -> Metric:
    """The attention of each head times `weights`, summed over queries and keys.

    Parameters
    ----------
    card : Card
    weights : array (example, query, key)
        For prompts of one length.

    Returns
    -------
    Metric
    """
    return Metric(card, "pattern", _sum, lambda run: {"weights": weights})


def _from(first: int) -> Callable[[PromptFacts], range]:
    return lambda run: range(first, run.tokens.shape[1])


induction = _attention(
    "induction",
    "induction score",
    lambda run: _along(run, _second_half(run, "induction"), _period(run, "induction") - 1),
    f"mean of A[i, i-L+1], i = L..2L-1; {INDUCTION_PAPER}",
)
"""Mean of ``A[i, i-L+1]`` over ``i = L..2L-1``: attention to the token *after* the earlier copy of the query."""

previous_token = _attention(
    "previous_token",
    "previous-token score",
    lambda run: _along(run, _from(1)(run), 1),
    f"mean of A[i, i-1], i = 1..S-1; {INDUCTION_PAPER}",
)
"""Mean of ``A[i, i-1]`` over ``i = 1..S-1``."""

duplicate_token = _attention(
    "duplicate_token",
    "duplicate-token score",
    lambda run: _along(run, _second_half(run, "duplicate_token"), _period(run, "duplicate_token")),
    "mean of A[i, i-L], i = L..2L-1; Wang et al. 2022, Interpretability in the Wild",
)
"""Mean of ``A[i, i-L]`` over ``i = L..2L-1``: attention to the earlier copy itself."""


def _first(run: PromptFacts) -> Array:
    examples, size = run.tokens.shape
    weights = np.full((examples, size, size), np.nan if size == 1 else 0.0, dtype=np.float32)
    weights[:, 1:, 0] = 1 / max(size - 1, 1)
    return weights


first_token = _attention("first_token", "first-token score", _first, "mean of A[i, 0], i = 1..S-1")
"""Mean of ``A[i, 0]`` over ``i = 1..S-1``: how much of the head's attention rests on the first token."""

self_attention = _attention(
    "self", "current-token score", lambda run: _along(run, _from(0)(run), 0), "mean of A[i, i], i = 0..S-1"
)
"""Mean of ``A[i, i]``: attention of a token to itself. Its name in results is ``self``."""

prefix_matching = _attention(
    "prefix_matching",
    "prefix-matching score",
    _prefix,
    f"attention summed over the keys j <= i with t[j-1] = t[i], mean over queries that have one; {INDUCTION_PAPER}",
)
"""Mean over the queries with a target of the attention summed over their targets ``{j <= i : t[j-1] = t[i]}``.

Works on any text. NaN for a prompt in which nothing repeats.
"""


def _each_query(run: PromptFacts) -> Array:
    examples, size = run.tokens.shape
    weights = np.full((examples, size, size), np.nan if size == 1 else 0.0, dtype=np.float32)
    weights[:, 1:] = 1 / max(size - 1, 1)
    return weights


attention_entropy = _attention(
    "attention_entropy",
    "entropy of attention",
    _each_query,
    "mean over the queries i = 1..S-1 of -sum_j A[i, j] ln A[i, j]",
    _entropy,
    (0.0, np.inf),
    "nat",
)
"""Mean over ``i = 1..S-1`` of ``-sum_j A[i, j] ln A[i, j]``: 0 where each query attends to one key.

``exp`` of it is about how many keys a query attends to. The first query, which has one key, is left out.
"""

induction_stripe = _attention(
    "induction_stripe",
    "induction score, whole stripe",
    lambda run: _stripe(run, "induction_stripe", 0),
    "mean of the diagonal 1-L of A, all L+1 entries; TransformerLens demos",
)
"""Mean of the diagonal ``1 - L`` of ``A``, all ``L + 1`` entries: one query more than `induction`."""

induction_bos = _attention(
    "induction_bos",
    "induction score with a BOS, whole stripe",
    lambda run: _stripe(run, "induction_bos", 1),
    "BOS in front, mean of the diagonal -L+1 of A, all L+2 entries; ARENA teaching notebooks",
)
"""With a BOS in front: mean of the diagonal ``-L + 1`` of ``A``, all ``L + 2`` entries."""


def _detector(head: str, words: str, mask: Callable[[Array], Array]) -> tuple[Metric, Metric]:
    return (
        _attention(
            f"{head}_mul",
            f"{words} score, mul",
            lambda run: mask(run.tokens),
            f"sum(A * D) / sum(A); {LENS}, mul",
            _portion,
        ),
        _attention(
            f"{head}_abs",
            f"{words} score, abs",
            lambda run: mask(run.tokens),
            f"1 - S * mean|A - D|, not rounded; {LENS}, abs",
            _closeness,
            (-np.inf, 1.0),
        ),
    )


induction_mul, induction_abs = _detector("induction", "induction", after_repeats_of)
previous_token_mul, previous_token_abs = _detector("previous_token", "previous-token", _subdiagonal)
duplicate_token_mul, duplicate_token_abs = _detector("duplicate_token", "duplicate-token", repeats_of)

SCORES = (induction, previous_token, duplicate_token, first_token, self_attention, prefix_matching)
VARIANTS = (
    induction_stripe,
    induction_bos,
    induction_mul,
    induction_abs,
    previous_token_mul,
    previous_token_abs,
    duplicate_token_mul,
    duplicate_token_abs,
)


def chance(metric: Metric, run: PromptFacts) -> Array:
    """The value that uniform causal attention gives on the same prompts, ``(example,)``."""
    size = run.tokens.shape[1]
    uniform = torch.tril(torch.ones(size, size, dtype=torch.float32)) / torch.arange(1, size + 1).unsqueeze(1)
    arguments = {name: torch.as_tensor(value) for name, value in metric.prepare(run).items()}
    value: Array = metric.kernel(uniform.expand(len(run.tokens), 1, size, size), **arguments)[:, 0].numpy()
    return value
