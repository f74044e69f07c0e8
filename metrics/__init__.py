"""What is read off a run. Pure functions, each with a card; they know no model and no intervention."""

from .attention import (
    SCORES,
    VARIANTS,
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
from .outputs import OUTPUTS, accuracy, kl, logit_diff, loss, prob, rank
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
