"""Metrics of the logits at scored positions. Kernels are plain functions of tensors; imports `card` only.

Values have the number format of the logits, and float32 at least. A logit that is NaN makes every metric NaN that looks
at it: `logit_diff` looks at two, all others at the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch

from ..errors import DeclarationError, choices, whole
from .card import Array, Card, Metric, PromptFacts, need


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -logits.to(wide).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _log_prob(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -_loss(logits, targets)


def _prob(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    best, first = logits.max(-1)  # NaN where there is one; an index or a comparison would not show it
    return (first == targets).to(wide).masked_fill(best.isnan(), float("nan"))


def _rank(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    missing = logits.amax(-1).isnan()
    larger = (logits > logits.gather(-1, targets.unsqueeze(-1))).sum(-1)
    return larger.to(wide).masked_fill(missing, float("nan"))


def _logit_diff(logits: torch.Tensor, targets: torch.Tensor, distractors: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    both = logits.gather(-1, torch.stack([targets, distractors], dim=-1)).to(wide)
    return both[..., 0] - both[..., 1]


def _kl(logits: torch.Tensor, base_logits: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    base, other = base_logits.to(wide).log_softmax(-1), logits.to(wide).log_softmax(-1)
    return (base.exp() * (base - other)).sum(-1)


def _with_targets(distractors: bool) -> dict[str, str]:
    """What a metric needs of a run, and what is said where that is missing."""
    answers = {"targets": "targets: give the task answers"}
    return answers | (
        {"distractors": "distractors: give the task a wrong answer for each prompt"} if distractors else {}
    )


def _prepare(needs: dict[str, str], name: str, run: PromptFacts) -> Mapping[str, Array]:
    return {field: need(getattr(run, field), name, why) for field, why in needs.items()}


def _output(
    card: Card, kernel: object, *, distractors: bool = False, targets: bool = True, counts: bool = False
) -> Metric:
    needs = _with_targets(distractors) if targets else {}
    return Metric(
        card,
        "logits",
        kernel,  # type: ignore[arg-type]
        lambda run: _prepare(needs, card.name, run),
        needs_base=not targets,
        tokens=tuple(needs) if distractors else (),
        differentiable=not counts,
    )


INF = float("inf")

loss = _output(Card("loss", "next-token cross-entropy", "nat", (0.0, INF), "lower", "natural logarithm"), _loss)
"""Next-token cross-entropy at the scored positions, in nats: ``-log p(target)``."""

accuracy = _output(
    Card("accuracy", "next-token accuracy", "1", (0.0, 1.0), "higher", "argmax equals target"), _accuracy, counts=True
)
"""Whether the target has the largest logit, 0 or 1 (of equal logits, the first token wins); NaN where any is NaN."""

rank = _output(Card("rank", "rank of the target", "1", (0.0, INF), "lower", "0 is best"), _rank, counts=True)
"""How many tokens have a larger logit than the target; 0 is best; NaN where any logit is NaN."""

prob = _output(Card("prob", "probability of the target", "1", (0.0, 1.0), "higher"), _prob)
"""Probability of the target token."""

logit_diff = _output(
    Card("logit_diff", "logit difference, target minus distractor", "logit", (-INF, INF), "higher"),
    _logit_diff,
    distractors=True,
)
"""``logit(target) - logit(distractor)``; which token is the distractor of repeated tokens, `RepeatedTokens` says."""

kl = _output(
    Card("kl", "KL divergence, base run from intervened run", "nat", (0.0, INF), "", "KL(base || intervened)"),
    _kl,
    targets=False,
)
"""``KL(base || intervened)`` at the scored positions, in nats; 0 where nothing changed."""

ANSWERS = {
    "loss": replace(
        loss,
        card=Card("loss", "cross-entropy of the answer", "nat", (0.0, INF), "lower", "summed over its tokens"),
        over="sum",
    ),
    "accuracy": replace(
        accuracy,
        card=Card("accuracy", "accuracy of the answer", "1", (0.0, 1.0), "higher", "argmax equals each of its tokens"),
        over="least",
    ),
    "prob": replace(
        prob,
        card=Card("prob", "probability of the answer", "1", (0.0, 1.0), "higher", "product over its tokens"),
        over="product",
    ),
    "logit_diff": replace(
        _output(
            Card(
                "logit_diff",
                "log-probability of the answer less that of the distractor",
                "nat",
                (-INF, INF),
                "higher",
                "each summed over its tokens",
            ),
            _log_prob,
        ),
        over="difference",
    ),
}
"""The metrics of answers of several tokens, each token after those before it, by the name of that of one token."""


def of_answer(metric: Metric) -> Metric:
    """What a metric is for answers of several tokens.

    Parameters
    ----------
    metric : Metric

    Raises
    ------
    DeclarationError
        It is not defined for them.
    """
    if metric.kind != "logits" or metric.over != "mean":
        return metric
    if metric not in OUTPUTS or metric.name not in ANSWERS:
        raise DeclarationError(
            f"{metric.name} is not defined for an answer of several tokens: possible are {choices(ANSWERS)}, those of "
            "attention, and metrics of your own that say how values make up that of an answer, Metric(..., over='sum')"
        )
    return ANSWERS[metric.name]


def _late_less_early(logits: torch.Tensor, targets: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    found = _loss(logits, targets)
    return signs.to(found.dtype) * found


def _signs(early: int, late: int, run: PromptFacts) -> Mapping[str, Array]:
    """1 where the later token is predicted, -1 where the earlier one is, 0 elsewhere, ``(example, scored)``."""
    name = f"in_context({early}, {late})"
    targets = need(run.targets, name, "targets: give the task answers, or leave them out")
    lacking = [token for token in (early, late) if token - 2 not in run.scored]
    if lacking:
        at = [position + 2 for position in run.scored]
        raise DeclarationError(
            f"{name} needs the loss of the tokens {early} and {late} (the first is 1): the prompts are scored on "
            f"{at[0]} to {at[-1]}; give longer ones, RepeatedTokens(..., score='all'), or other tokens"
        )
    signs = np.asarray([(at == late - 2) - (at == early - 2) for at in map(int, run.scored)], dtype=np.float64)
    return {"targets": targets, "signs": np.tile(signs, (len(targets), 1))}


@cache
def in_context(early: int = 50, late: int = 500) -> Metric:
    """The in-context-learning score: the loss of a late token of the context less that of an early one, in nats.

    The lower, the more a model learns from its context. Variable ``in_context_<early>_<late>``.

    Parameters
    ----------
    early, late : int
        Tokens of the prompt, the first is 1 (and cannot be predicted). The paper compares the 50th with the 500th.

    Returns
    -------
    Metric
        Always the same one for the same tokens.

    Raises
    ------
    DeclarationError
        They are no such numbers; where prompts are too short, that is seen when they are drawn.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=20, score="all")
    >>> ds = hw.measure(model, task, None, [hw.metrics.in_context(10, 35)])
    >>> float(ds["in_context_10_35"].mean()) < -2
    True

    References
    ----------
    Olsson et al. (2022), "In-context Learning and Induction Heads".
    """
    early = whole(early, "early, the early token,", low=2)
    late = whole(late, "late, the late token,", low=early + 1)
    words = f"loss of token {late} less loss of token {early} of the context, the first is 1; Olsson et al. (2022)"
    card = Card(f"in_context_{early}_{late}", "in-context-learning score", "nat", (-INF, INF), "lower", words)
    return Metric(card, "logits", _late_less_early, partial(_signs, early, late), over="sum")


def loss_over(card: Card, shares: Array) -> Metric:
    """The loss at some positions of each prompt: the sum over scored positions of the loss times `shares`.

    Parameters
    ----------
    card : Card
    shares : array (example, scored)
        For prompts of one length; 1 over the number of positions at those that count and 0 elsewhere gives their mean,
        and NaN a missing value.

    Returns
    -------
    Metric
    """

    def prepare(run: PromptFacts) -> Mapping[str, Array]:
        return {"targets": need(run.targets, card.name, "targets: give the task answers"), "signs": shares}

    return Metric(card, "logits", _late_less_early, prepare, over="sum")


def _token_at(logits: torch.Tensor, ranks: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)  # whole numbers are exact up to 2**24
    return logits.topk(int(top.max()), -1).indices.gather(-1, ranks.unsqueeze(-1)).squeeze(-1).to(wide)


def _logit_at(logits: torch.Tensor, ranks: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.topk(int(top.max()), -1).values.gather(-1, ranks.unsqueeze(-1)).squeeze(-1).to(wide)


def _prob_at(logits: torch.Tensor, ranks: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).softmax(-1).topk(int(top.max()), -1).values.gather(-1, ranks.unsqueeze(-1)).squeeze(-1)


RANKED = {
    "token_id": (Card("token_id", "token id, -1 where there is none", "1", (0.0, INF)), _token_at),
    "logit": (Card("logit", "logit of the token", "logit", (-INF, INF)), _logit_at),
    "prob": (Card("prob", "probability of the token", "1", (0.0, 1.0)), _prob_at),
}
"""What `ranked` tells of the tokens in the order of their logits."""


def ranked(name: str, rank: int, top: int) -> Metric:
    """What `RANKED` calls `name`, of the token with `rank` larger logits, of `top`. Variable ``<name>_<rank>``.

    All ranks are read from one list of `top` tokens, so that of tokens with equal logits each stands in it once.
    """
    card, kernel = RANKED[name]

    def ranks(run: PromptFacts) -> Mapping[str, Array]:
        of = (len(run.tokens), len(run.scored))
        return {"ranks": np.full(of, rank, dtype=np.int64), "top": np.full(of, top, dtype=np.int64)}

    return Metric(replace(card, name=f"{name}_{rank}"), "logits", kernel, ranks, differentiable=name != "token_id")


OUTPUTS = (loss, accuracy, rank, prob, logit_diff, kl)
