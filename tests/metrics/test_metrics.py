"""Metrics against independent loops, their cards, and their errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import DeclarationError, HeadwiseError
from headwise.metrics import (
    OUTPUTS,
    SCORES,
    VARIANTS,
    Card,
    Metric,
    PromptFacts,
    accuracy,
    attention_entropy,
    chance,
    duplicate_token,
    duplicate_token_abs,
    duplicate_token_mul,
    first_token,
    in_context,
    induction,
    induction_abs,
    induction_bos,
    induction_mul,
    induction_stripe,
    kl,
    logit_diff,
    loss,
    prefix_matching,
    previous_token,
    previous_token_abs,
    previous_token_mul,
    prob,
    rank,
    self_attention,
)
from headwise.studies import RepeatedTokens, measure
from tests.oracles import naive

L = 6


def patterns(examples, heads, size, seed):
    """Random causal attention patterns ``(example, head, query, key)``."""
    scores = np.random.default_rng(seed).normal(0, 2, (examples, heads, size, size))
    scores[..., np.triu(np.ones((size, size), dtype=bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def repeated(examples, bos, seed):
    random = np.random.default_rng(seed)
    half = np.stack([random.permutation(40)[:L] + 1 for _ in range(examples)])
    front = np.zeros((examples, int(bos)), dtype=int)
    return PromptFacts(np.concatenate([front, half, half], axis=1), period=L, start=int(bos))


def apply(metric, pattern, run):
    arguments = {name: torch.as_tensor(value) for name, value in metric.prepare(run).items()}
    return metric.kernel(torch.as_tensor(pattern), **arguments).numpy()


PLAIN = {
    induction: lambda a, run: naive.induction(a, L, run.start),
    previous_token: lambda a, run: naive.previous_token(a),
    duplicate_token: lambda a, run: naive.duplicate_token(a, L, run.start),
    first_token: lambda a, run: naive.first_token(a),
    self_attention: lambda a, run: naive.self_attention(a),
    prefix_matching: lambda a, run: naive.prefix_matching(a, run.tokens),
    attention_entropy: lambda a, run: naive.entropy(a),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("metric", PLAIN, ids=repr)
@given(st.integers(0, 1000))
def test_attention_scores_equal_the_loops(metric, bos, seed):
    run = repeated(3, bos, seed)
    pattern = patterns(3, 2, run.tokens.shape[1], seed)
    np.testing.assert_allclose(apply(metric, pattern, run), PLAIN[metric](pattern, run), atol=1e-6)


@given(st.integers(0, 1000))
def test_stripes_equal_the_loops(seed):
    for metric, loops, bos in (
        (induction_stripe, naive.induction_stripe, False),
        (induction_bos, naive.induction_bos, True),
    ):
        run = repeated(2, bos, seed)
        pattern = patterns(2, 3, run.tokens.shape[1], seed)
        np.testing.assert_allclose(apply(metric, pattern, run), loops(pattern, L), atol=1e-6)


def test_stripe_has_one_query_more_and_bos_two():
    run, with_bos = repeated(1, False, 0), repeated(1, True, 0)
    assert (induction.prepare(run)["weights"] > 0).sum() == L
    assert (induction_stripe.prepare(run)["weights"] > 0).sum() == L + 1
    assert (induction_bos.prepare(with_bos)["weights"] > 0).sum() == L + 2


@given(st.integers(0, 1000))
def test_head_detector_scores_equal_the_loops(seed):
    run = repeated(2, False, seed)
    pattern = patterns(2, 3, 2 * L, seed)
    masks = {
        (previous_token_mul, previous_token_abs): lambda tokens: naive.detection_previous(len(tokens)),
        (duplicate_token_mul, duplicate_token_abs): naive.detection_duplicate,
        (induction_mul, induction_abs): naive.detection_induction,
    }
    for (mul, closeness), mask in masks.items():
        for metric, loops in ((mul, naive.mul), (closeness, naive.abs_score)):
            wanted = loops(pattern, np.stack([mask(tokens) for tokens in run.tokens]))
            np.testing.assert_allclose(apply(metric, pattern, run), wanted, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_mul_divides_by_the_sum_of_what_is_there(scale):
    """Of a pattern whose rows do not sum to 1, as `Scale` makes it."""
    run = repeated(2, False, 3)
    pattern = patterns(2, 3, 2 * L, 3)
    for metric, mask in (
        (previous_token_mul, lambda tokens: naive.detection_previous(len(tokens))),
        (duplicate_token_mul, naive.detection_duplicate),
        (induction_mul, naive.detection_induction),
    ):
        wanted = naive.mul(scale * pattern, np.stack([mask(tokens) for tokens in run.tokens]))
        np.testing.assert_allclose(apply(metric, scale * pattern, run), wanted, rtol=1e-6)
        np.testing.assert_allclose(apply(metric, scale * pattern, run), apply(metric, pattern, run), rtol=1e-6)


@pytest.mark.parametrize("metric", [*SCORES, attention_entropy, *VARIANTS], ids=repr)
def test_chance_is_the_score_of_uniform_attention(metric):
    run = repeated(3, metric is induction_bos, 5)
    uniform = np.tile(naive.uniform(run.tokens.shape[1]), (3, 1, 1, 1))
    np.testing.assert_allclose(chance(metric, run), apply(metric, uniform, run)[:, 0], atol=1e-6)


def test_entropy_by_hand():
    """One key; two alike; and the chance level, ln of the keys that each query has."""
    run = PromptFacts(np.array([[1, 2, 3]]))
    one, two = np.array([[1.0, 0, 0]] * 3), np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    found = apply(attention_entropy, np.stack([one, two])[None], run)
    np.testing.assert_allclose(found, [[0, np.log(2)]], atol=1e-7)
    np.testing.assert_allclose(chance(attention_entropy, run), (np.log(2) + np.log(3)) / 2, atol=1e-6)


def test_chance_of_induction_by_hand():
    expected = np.mean([1 / (i + 1) for i in range(L, 2 * L)])
    np.testing.assert_allclose(chance(induction, repeated(1, False, 0)), expected, atol=1e-7)


def test_induction_looks_after_the_copy_not_at_it():
    size = 2 * L
    after, at = np.zeros((1, 1, size, size)), np.zeros((1, 1, size, size))
    for query in range(L, size):
        after[0, 0, query, query - L + 1] = at[0, 0, query, query - L] = 1
    run = repeated(1, False, 0)
    for metric, pattern, value in (
        (induction, after, 1),
        (induction, at, 0),
        (duplicate_token, at, 1),
        (duplicate_token, after, 0),
    ):
        assert apply(metric, pattern, run).item() == pytest.approx(value, abs=1e-6)


def test_prefix_matching_is_missing_where_nothing_repeats():
    run = PromptFacts(np.array([[1, 2, 3, 4], [1, 2, 1, 3]]))
    found = apply(prefix_matching, patterns(2, 1, 4, 0), run)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_scores_without_a_query_are_missing():
    one_token = PromptFacts(np.array([[3]]))
    for metric in (previous_token, first_token, prefix_matching):
        assert np.isnan(apply(metric, np.ones((1, 2, 1, 1)), one_token)).all()
        assert np.isnan(chance(metric, one_token)).all()
    assert (apply(self_attention, np.ones((1, 2, 1, 1)), one_token) == 1).all()


@given(st.integers(0, 1000))
def test_output_metrics_equal_the_loops(seed):
    random = np.random.default_rng(seed)
    logits, base = random.normal(0, 3, (2, 3, 4, 9))
    targets = random.integers(0, 9, (3, 4))
    distractors = (targets + 1 + random.integers(0, 8, (3, 4))) % 9
    given_logits, given_targets = torch.as_tensor(logits), torch.as_tensor(targets)
    for metric in (loss, accuracy, rank, prob):
        np.testing.assert_allclose(
            metric(given_logits, given_targets).numpy(), getattr(naive, metric.name)(logits, targets), atol=1e-5
        )
    np.testing.assert_allclose(
        logit_diff(given_logits, given_targets, torch.as_tensor(distractors)).numpy(),
        naive.logit_diff(logits, targets, distractors),
        atol=1e-5,
    )
    np.testing.assert_allclose(kl(given_logits, torch.as_tensor(base)).numpy(), naive.kl(base, logits), atol=1e-5)


@pytest.mark.parametrize("where", [0, 2, 4], ids=["target", "distractor", "another"])
@pytest.mark.parametrize("metric", OUTPUTS, ids=repr)
def test_a_logit_that_is_nan_makes_the_metrics_that_look_at_it_nan(metric, where):
    logits = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(0))
    logits[0, 1, where] = float("nan")
    targets, distractors = torch.tensor([[0, 0]]), torch.tensor([[2, 2]])
    given = {"targets": targets, "distractors": distractors}
    run = {"base_logits": torch.zeros(1, 2, 6)} if metric.needs_base else {name: given[name] for name in NEEDS[metric]}
    found = metric(logits, **run)
    assert torch.isfinite(found[0, 0])
    assert bool(found[0, 1].isnan()) == (metric is not logit_diff or where != 4)
    if metric.needs_base:
        assert metric(torch.zeros(1, 2, 6), base_logits=logits)[0, 1].isnan()


NEEDS = {metric: ("targets", "distractors") if metric is logit_diff else ("targets",) for metric in OUTPUTS}


@pytest.mark.parametrize("metric", OUTPUTS, ids=repr)
def test_output_metrics_keep_float64(metric):
    random = np.random.default_rng(0)
    logits, base = random.normal(0, 3, (2, 3, 4, 9))
    targets, distractors = random.integers(0, 9, (2, 3, 4))
    given = {"targets": targets, "distractors": distractors}
    run = {"base_logits": base} if metric.needs_base else {name: given[name] for name in NEEDS[metric]}
    found = metric(torch.as_tensor(logits), **{name: torch.as_tensor(value) for name, value in run.items()})
    plain = [base, logits] if metric is kl else [logits, *run.values()]
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, getattr(naive, metric.name)(*plain), rtol=1e-12, atol=1e-12)
    half = metric(torch.as_tensor(logits).bfloat16(), **{name: torch.as_tensor(value) for name, value in run.items()})
    assert half.dtype == torch.float32


def test_kl_is_that_of_the_base_run():
    """KL(base || other) of two known distributions, in nats; it is not symmetric."""
    base, other = torch.log(torch.tensor([[[0.5, 0.5]]])), torch.log(torch.tensor([[[0.9, 0.1]]]))
    assert kl(other, base).item() == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), abs=1e-6)


def test_a_metric_reads_logits_or_patterns():
    with pytest.raises(DeclarationError, match="mine reads 'gradient': a metric reads logits and pattern"):
        Metric(Card("mine", "mine", "1", (0.0, 1.0)), "gradient", lambda logits: logits, lambda run: {})


def test_cards_are_complete_and_names_differ():
    metrics = [*OUTPUTS, *SCORES, attention_entropy, *VARIANTS]
    assert len({metric.name for metric in metrics}) == len(metrics) == 21
    assert {metric.card.units for metric in metrics} == {"nat", "1", "logit"}
    assert all(metric.card.long_name and metric.card.bounds[0] < metric.card.bounds[1] for metric in metrics)
    assert (loss.card.better, accuracy.card.better, rank.card.better) == ("lower", "higher", "lower")
    assert repr(loss) == "loss"


@pytest.mark.parametrize(
    ("metric", "run", "message"),
    [
        (
            induction,
            PromptFacts(np.array([[1, 2, 1]])),
            "induction needs a repeated sequence (RepeatedTokens); prefix_matching works",
        ),
        (
            induction_stripe,
            repeated(1, True, 0),
            "induction_stripe is defined without a BOS: use RepeatedTokens(bos=False)",
        ),
        (induction_bos, repeated(1, False, 0), "induction_bos is defined with a BOS: use RepeatedTokens(bos=True)"),
        (loss, PromptFacts(np.array([[1, 2]])), "loss needs targets"),
        (logit_diff, PromptFacts(np.array([[1]]), (0,), np.array([[1]])), "logit_diff needs distractors"),
    ],
    ids=str,
)
def test_metrics_say_what_they_need(metric, run, message):
    with pytest.raises(DeclarationError) as caught:
        metric.prepare(run)
    assert message in str(caught.value)
    assert isinstance(caught.value, HeadwiseError)


def test_the_in_context_score_is_the_late_loss_less_the_early_one_on_long_prompts(words_model):
    task = RepeatedTokens(n=3, length=32, score="all")
    found = measure(words_model, task, None, [in_context(5, 64), in_context(20, 50), "in_context_2_3"])
    prompts = task.draw(words_model).runs["clean"]
    assert prompts.shape == (3, 64)
    for early, late in ((5, 64), (20, 50), (2, 3)):
        for number, tokens in enumerate(prompts.tolist()):
            losses = {}
            for place in (early, late):  # the place-th token, from those before it, alone
                with torch.no_grad():
                    logits = words_model.module(torch.tensor([tokens[: place - 1]])).logits[0, -1].double()
                losses[place] = float(logits.logsumexp(-1) - logits[tokens[place - 1]])
            value = float(found[f"in_context_{early}_{late}"][number])
            assert value == pytest.approx(losses[late] - losses[early], abs=2e-5)
