"""What is read off a run. Pure functions, each with a card; they know no model and no intervention.

- of the output: ``loss`` (nats), ``accuracy``, ``prob``, ``logit_diff``, ``rank``, ``kl``; ``help(hw.Prompts)`` says
  what the first four are for an answer of several tokens
- of attention patterns: below
- of weights: ``composition`` of two heads, from their ``factors``
- how sure: ``bootstrap_interval``, ``null_p_value``, ``benjamini_hochberg``, ``control_sets``
- of your own: ``Metric``, with a ``Card``

With ``A[i, j]`` the attention from query ``i`` to key ``j`` (0-based), ``L`` the half length of a repeated sequence and
``S`` the length of the prompt, each score below is stated for a prompt without BOS; a BOS in front shifts every index
of the repeat by one. A score is the mean over the queries it names, so it lies between 0 and 1, and its chance level is
the score of uniform causal attention, ``A[i, j] = 1 / (i + 1)``. Where a prompt has none of the queries, it is NaN.

=====================  =========================================================================================
score                  definition
=====================  =========================================================================================
``induction``          mean of ``A[i, i-L+1]``, ``i = L..2L-1``: the token after the earlier copy of the query
``previous_token``     mean of ``A[i, i-1]``, ``i = 1..S-1``
``duplicate_token``    mean of ``A[i, i-L]``, ``i = L..2L-1``: the earlier copy itself
``first_token``        mean of ``A[i, 0]``, ``i = 1..S-1``
``self_attention``     mean of ``A[i, i]``, ``i = 0..S-1`` (in results: ``self``)
``prefix_matching``    sum of ``A[i, j]`` over ``{j <= i : t[j-1] = t[i]}``, mean over the queries that have one
``attention_entropy``  mean of ``-sum_j A[i, j] ln A[i, j]``, ``i = 1..S-1``, in nats (not bounded by 1)
``induction_stripe``   mean of the diagonal ``1-L`` of ``A``, all ``L+1`` entries
``induction_bos``      BOS in front: mean of the diagonal ``-L+1`` of ``A``, all ``L+2`` entries
``*_mul``, ``*_abs``   ``sum(A * D) / sum(A)`` and ``1 - S * mean|A - D|`` for the pattern ``D`` of that kind of head
=====================  =========================================================================================

A pattern that is all zeros has no ``*_mul`` score: it is NaN.

Examples
--------
>>> hw.metrics.loss.card.units, hw.metrics.loss.card.better
('nat', 'lower')
>>> [metric.name for metric in hw.metrics.OUTPUTS]
['loss', 'accuracy', 'rank', 'prob', 'logit_diff', 'kl']

A metric of your own is a function of tensors, here the largest logit at each scored position:

>>> card = hw.metrics.Card("largest", "largest logit", "logit", (float("-inf"), float("inf")))
>>> largest = hw.metrics.Metric(card, "logits", lambda logits: logits.amax(-1), lambda prompts: {})
>>> ds = hw.measure(hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8), metrics=[largest])
>>> ds["largest"].dims
('example',)
"""

from .attention import (
    SCORES,
    VARIANTS,
    attention_entropy,
    chance,
    duplicate_token,
    duplicate_token_abs,
    duplicate_token_mul,
    first_token,
    induction,
    induction_abs,
    induction_bos,
    induction_mul,
    induction_stripe,
    prefix_matching,
    previous_token,
    previous_token_abs,
    previous_token_mul,
    self_attention,
)
from .card import Card, Metric, PromptFacts
from .intervals import bootstrap_interval
from .outputs import OUTPUTS, accuracy, in_context, kl, logit_diff, loss, prob, rank
from .statistics import benjamini_hochberg, control_sets, normalized, null_p_value
from .weights import composition, factors, random_composition

__all__ = [
    "OUTPUTS",
    "SCORES",
    "VARIANTS",
    "Card",
    "Metric",
    "PromptFacts",
    "accuracy",
    "attention_entropy",
    "benjamini_hochberg",
    "bootstrap_interval",
    "chance",
    "composition",
    "control_sets",
    "duplicate_token",
    "duplicate_token_abs",
    "duplicate_token_mul",
    "factors",
    "first_token",
    "in_context",
    "induction",
    "induction_abs",
    "induction_bos",
    "induction_mul",
    "induction_stripe",
    "kl",
    "logit_diff",
    "loss",
    "normalized",
    "null_p_value",
    "prefix_matching",
    "previous_token",
    "previous_token_abs",
    "previous_token_mul",
    "prob",
    "random_composition",
    "rank",
    "self_attention",
]


def __dir__() -> list[str]:
    return __all__
