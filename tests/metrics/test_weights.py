"""Composition against explicit d_model x d_model products, folded as defined, and the planted pair."""

import numpy as np
import pytest

from headwise.errors import UnknownNameError
from headwise.metrics import composition, factors, random_composition
from headwise.metrics.weights import KINDS, Factors
from headwise.studies.analyses.composition import composition_scores, pair_scores
from tests.oracles import naive
from tests.oracles.planted import INDUCTION, PREVIOUS, SELF, predicted_k_composition


@pytest.mark.parametrize("variant", ["folded", "raw"])
def test_composition_equals_explicit_products(random_model, variant):
    scores = composition_scores(random_model, draws=3)["composition"].sel(variant=variant)
    of = naive.folded if variant == "folded" else naive.raw
    pairs = 0
    for later in random_model.layers:
        for earlier in range(later):
            for sender in random_model.heads:
                for receiver in random_model.heads:
                    for kind in KINDS:
                        wanted = naive.composition(
                            kind, of(random_model.module, earlier, sender), of(random_model.module, later, receiver)
                        )
                        found = scores.sel(kind=kind).values[earlier, sender, later, receiver]
                        assert found == pytest.approx(wanted, rel=1e-6)
                        pairs += 1
    assert pairs == 3 * random_model.shape.heads**2 * random_model.shape.layers * (random_model.shape.layers - 1) // 2


def test_pairs_that_cannot_compose_are_missing(small_model):
    scores = composition_scores(small_model, draws=3)["composition"]
    assert np.isnan(scores.sel(sender_layer=1)).all()
    assert np.isnan(scores.sel(receiver_layer=0)).all()
    assert np.isfinite(scores.sel(sender_layer=0, receiver_layer=1)).all()


def test_scores_lie_between_0_and_1(small_model):
    scores = composition_scores(small_model, draws=3)["composition"].sel(sender_layer=0, receiver_layer=1)
    assert float(scores.min()) > 0
    assert float(scores.max()) <= 1


def test_a_reader_of_exactly_what_is_written_scores_as_high_as_can_be():
    """One-dimensional heads: everything head 1 writes is what the keys of head 2 read."""
    write = np.array([[[3.0, 4.0]]])
    first = Factors(*(np.ones((1, 2, 1)) for _ in range(3)), write)
    second = Factors(np.ones((1, 2, 1)), write.swapaxes(1, 2), np.array([[[4.0], [-3.0]]]), np.ones((1, 1, 2)))
    assert composition("k", first, second)[0, 0] == pytest.approx(1.0)
    assert composition("v", first, second)[0, 0] == pytest.approx(0.0, abs=1e-12)


def test_planted_composition_singles_out_the_pair(planted):
    scores = composition_scores(planted, draws=20)
    folded = scores["composition"].sel(variant="folded", sender_layer=0, receiver_layer=1)
    pair = {"sender_head": PREVIOUS[1], "receiver_head": INDUCTION[1]}
    assert float(folded.sel(kind="k", **pair)) == pytest.approx(predicted_k_composition(), rel=1e-4)
    assert float(folded.sel(kind="q", **pair)) == pytest.approx(0, abs=1e-6)
    assert float(folded.sel(kind="v", **pair)) == pytest.approx(0, abs=1e-6)
    bystander = folded.sel(sender_head=SELF[1], receiver_head=INDUCTION[1])
    np.testing.assert_allclose(bystander, 0, atol=1e-6)
    assert int(np.isfinite(folded.sel(kind="k")).sum()) == 2  # all other pairs have a head without weights
    from headwise.interventions import Head

    summary = pair_scores(scores, [Head(*PREVIOUS)], [Head(*INDUCTION)])
    assert float(summary["pair_z"].sel(kind="k")) > 10
    assert float(summary["pair_z"].sel(kind="q")) < 0
    assert float(summary["pair_above"].sel(kind="k")) == 1


def test_random_floor_depends_on_the_shape_and_is_what_random_weights_give():
    floor = random_composition(64, 8, draws=100, seed=1)
    random = np.random.default_rng(7)

    def head():
        return {name: random.standard_normal((64, 8)) for name in ("W_Q", "W_K", "W_V")} | {
            "W_O": random.standard_normal((8, 64))
        }

    for kind in KINDS:
        drawn = [naive.composition(kind, head(), head()) for _ in range(100)]
        mean, deviation = floor[kind]
        assert mean == pytest.approx(np.mean(drawn), abs=5 * deviation / 10)
        assert deviation == pytest.approx(np.std(drawn, ddof=1), rel=0.5)
    assert random_composition(32, 8, draws=20)["k"][0] > floor["k"][0] + 0.03


def test_raw_and_folded_differ_and_folding_is_blind_to_what_layernorm_removes():
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(1, 10, 3)) for name in ("W_Q", "W_K", "W_V")} | {
        "W_O": random.normal(size=(1, 3, 10))
    }
    shifted = dict(weights, W_K=weights["W_K"] + 5.0, W_O=weights["W_O"] + 5.0)  # along the all-ones direction
    gain = np.ones(10)
    one, two = factors(**weights, gain=gain), factors(**shifted, gain=gain)
    np.testing.assert_allclose(composition("k", one, one), composition("k", two, two), atol=1e-12)
    assert composition("k", factors(**weights), factors(**weights)) != pytest.approx(
        composition("k", factors(**shifted), factors(**shifted)), abs=1e-3
    )


def test_unknown_kind_is_refused():
    with pytest.raises(UnknownNameError, match="composition 'o': possible are q, k and v"):
        composition("o", Factors(*[np.ones((1, 1, 1))] * 4), Factors(*[np.ones((1, 1, 1))] * 4))
