"""The planted circuit: every detector, ablation and patch has an answer derived by hand."""

import math

import numpy as np
import pytest

import headwise as hw
from headwise.interventions import Grid, Head, Knockout, MeanAblate, Patch, PathPatch, ResampleAblate, ZeroAblate
from headwise.metrics import SCORES, accuracy, logit_diff, loss
from headwise.studies import RepeatedTokens, measure
from headwise.studies.analyses.heads import head_scores
from tests.oracles.planted import (
    INDUCTION,
    LENGTH,
    PREVIOUS,
    SELF,
    VOCAB,
    predicted_logit_diff_ablated,
    predicted_logit_diff_clean,
    predicted_logit_diff_k_noised,
    predicted_logit_diff_q_noised,
    predicted_logit_diff_v_noised,
    predicted_loss_clean,
    predicted_scores,
)

# Token 23 is the planted model's BOS; it stays out of the prompts, as in the derivations.
TASK = RepeatedTokens(n=16, length=LENGTH, tokens=(0, VOCAB - 1))


def test_every_head_has_its_planted_scores(planted):
    scores = head_scores(planted, TASK).mean("example")
    for layer in planted.layers:
        for head in planted.heads:
            wanted = predicted_scores(layer, head)
            for name in ("induction", "previous_token", "duplicate_token", "first_token", "self"):
                assert float(scores[name][layer, head]) == pytest.approx(wanted[name], abs=1e-5), (layer, head, name)
    assert float(scores["induction"][INDUCTION]) > 0.99
    assert float(scores["previous_token"][PREVIOUS]) > 0.99
    assert float(scores["prefix_matching"][INDUCTION]) > 0.99
    assert len(SCORES) == 6


def test_the_circuit_does_the_task(planted):
    ds = measure(planted, TASK, None, [loss, accuracy, logit_diff])
    clean = ds.sel(run="clean")
    np.testing.assert_array_equal(clean["baseline_accuracy"], 1.0)
    np.testing.assert_allclose(clean["baseline_loss"], predicted_loss_clean(), atol=1e-6)
    np.testing.assert_allclose(clean["baseline_logit_diff"], predicted_logit_diff_clean(), atol=1e-4)


@pytest.mark.parametrize("kind", [ZeroAblate, MeanAblate, ResampleAblate])
def test_ablating_a_planted_head_is_chance_and_any_other_changes_nothing(planted, kind):
    grid = Grid(lambda layer, head: kind(Head(layer, head)), layer=planted.layers, head=planted.heads)
    ds = measure(planted, TASK, grid, [accuracy, loss]).mean("example")
    for layer in planted.layers:
        for head in planted.heads:
            here = ds.sel(layer=layer, head=head)
            if (layer, head) in (PREVIOUS, INDUCTION):
                assert float(here["accuracy"]) <= 2 / VOCAB
                assert float(here["loss"]) > 2
            else:
                assert float(here["accuracy"]) == 1.0
                assert float(here["loss"]) == pytest.approx(float(ds["baseline_loss"].sel(run="clean")), abs=1e-4)


def test_zeroing_the_induction_head_leaves_every_token_equally_likely(planted):
    ds = measure(planted, TASK, ZeroAblate(Head(*INDUCTION)), [loss, logit_diff])
    np.testing.assert_allclose(ds["loss"], math.log(VOCAB), atol=1e-5)
    np.testing.assert_allclose(ds["logit_diff"], predicted_logit_diff_ablated(), atol=1e-5)


def test_noising_q_k_and_v_does_what_was_derived(planted):
    grid = Grid(lambda component: Patch(Head(*INDUCTION).site(component)), component=["q", "k", "v"])
    ds = measure(planted, TASK, grid, [logit_diff], per_position=True)["logit_diff"]
    scored = range(LENGTH, 2 * LENGTH - 1)
    np.testing.assert_allclose(ds.sel(component="q").isel(position=scored), predicted_logit_diff_q_noised(), atol=1e-4)
    np.testing.assert_allclose(ds.sel(component="v").isel(position=scored), predicted_logit_diff_v_noised(), atol=1e-4)
    for query in scored:
        wanted = predicted_logit_diff_k_noised(query)
        np.testing.assert_allclose(ds.sel(component="k").isel(position=query), wanted, atol=1e-4)


def test_denoising_needs_both_k_and_v(planted):
    head = Head(*INDUCTION)
    conditions = {
        "q": Patch(head.q, source="clean"),
        "v": Patch(head.v, source="clean"),
        "k and v": Patch(head.k, source="clean") + Patch(head.v, source="clean"),
    }
    ds = measure(planted, TASK, conditions, [logit_diff], base="corrupted")
    ratio = hw.normalized(ds, "logit_diff")
    assert float(ratio.sel(condition="k and v")) == pytest.approx(1.0, abs=1e-4)
    assert float(ratio.sel(condition="q")) == pytest.approx(0.0, abs=1e-4)
    assert 0 < float(ratio.sel(condition="v")) < 0.3


def test_the_effect_of_the_previous_token_head_passes_through_k(planted):
    """Noising the previous-token head's z is noising the induction head's k, exactly."""
    ds = measure(
        planted, TASK, {"z": Patch(Head(*PREVIOUS)), "k": Patch(Head(*INDUCTION).k)}, [logit_diff], per_position=True
    )
    np.testing.assert_allclose(*(ds["logit_diff"].sel(condition=name) for name in ("z", "k")), atol=1e-4)


def test_the_bystander_writes_but_nobody_reads(planted):
    ds = measure(planted, TASK, {"self": ZeroAblate(Head(*SELF))}, [accuracy])
    np.testing.assert_array_equal(ds["accuracy"], 1.0)


def test_the_whole_effect_takes_the_path_into_k(planted):
    """From the previous-token head to k of the induction head; q, v, other heads and the logits carry nothing."""
    sender, head = Head(*PREVIOUS), Head(*INDUCTION)
    others = [Head(INDUCTION[0], other) for other in planted.heads if other != INDUCTION[1]]
    what = {
        "k": PathPatch(sender, head.k),
        "k, frozen": PathPatch(sender, head.k, through_mlps=False),
        "q": PathPatch(sender, head.q),
        "v": PathPatch(sender, head.v),
        "logits": PathPatch(sender, "logits"),
        "others": PathPatch(sender, [other.site(part) for other in others for part in "qkv"]),
        "from another": PathPatch(Head(*SELF), head.k),
        "whole": Patch(sender),
    }
    ds = measure(planted, TASK, what, [logit_diff], per_position=True)["logit_diff"]
    scored = range(LENGTH, 2 * LENGTH - 1)
    for name in ("k", "k, frozen", "whole"):
        for query in scored:
            wanted = predicted_logit_diff_k_noised(query)
            np.testing.assert_allclose(ds.sel(condition=name).isel(position=query), wanted, atol=1e-4)
    for name in ("q", "v", "logits", "others", "from another"):
        found = ds.sel(condition=name).isel(position=scored)
        np.testing.assert_allclose(found, predicted_logit_diff_clean(), atol=1e-4, err_msg=name)


def test_knocking_out_the_attention_to_the_target(planted):
    """Without key ``i - L + 1`` the scores left are equal but for key 0, so attention is uniform over ``i - 1`` keys.

    Those hold the target 0 times, the ``m = i - L`` tokens before it twice and the other tokens of the half once, each
    worth ``20 / (i - 1) * sqrt(10 / (8 + 2 squares))`` of logit. Other queries see nothing of it.
    """
    query = LENGTH + 4
    out = Knockout(Head(*INDUCTION), query, query - LENGTH + 1)
    ds = measure(planted, TASK, {"one": out}, [loss, logit_diff], per_position=True).sel(condition="one")
    squares = (3 * query - 2 * LENGTH - 1) / (query - 1) ** 2
    once = 20 / (query - 1) * math.sqrt(10 / (8 + 2 * squares))
    twice, single = 4, LENGTH - 5
    total = twice * math.exp(2 * once) + single * math.exp(once) + VOCAB - twice - single
    np.testing.assert_allclose(ds["logit_diff"].isel(position=query), 0, atol=1e-4)
    np.testing.assert_allclose(ds["loss"].isel(position=query), math.log(total), atol=1e-4)
    rest = [position for position in range(LENGTH, 2 * LENGTH - 1) if position != query]
    np.testing.assert_allclose(ds["logit_diff"].isel(position=rest), predicted_logit_diff_clean(), atol=1e-4)
    diagonal = sum(Knockout(Head(*INDUCTION), i, i - LENGTH + 1) for i in range(LENGTH, 2 * LENGTH - 1))
    everywhere = measure(planted, TASK, diagonal, [accuracy])
    np.testing.assert_array_equal(everywhere["accuracy"], 0.0)
