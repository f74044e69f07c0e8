"""Published numbers, where the weights can be had: GPT-2 small from the Hugging Face Hub."""

import os

import pytest

import headwise as hw
from headwise.interventions import Head
from headwise.studies import RepeatedTokens
from headwise.studies.analyses.heads import head_scores, ranked

PUBLISHED = {Head(5, 5): 0.93, Head(6, 9): 0.91, Head(7, 10): 0.91, Head(5, 1): 0.91, Head(7, 2): 0.83}
"""Induction heads of GPT-2 small on repeated random tokens, and their scores."""


@pytest.mark.hub
def test_gpt2_small_has_its_published_heads():
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        pytest.skip("needs openai-community/gpt2 from the Hub: run with HEADWISE_HUB=1")
    scores = head_scores(hw.load("openai-community/gpt2"), RepeatedTokens(n=16, length=50)).mean("example")
    best = dict(ranked(scores["induction"], 5))
    assert set(best) == set(PUBLISHED)
    for head, value in PUBLISHED.items():
        assert best[head] == pytest.approx(value, abs=0.05)
    assert ranked(scores["previous_token"], 1)[0][0] == Head(4, 11)
