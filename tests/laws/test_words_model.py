"""The shipped model: it does what its card says, and the causal story holds on it."""

import json
import re

import numpy as np
import pytest

import headwise as hw
from headwise.interventions import Head, Scale
from headwise.interventions.models.locate import SHIPPED
from headwise.metrics import accuracy, loss
from headwise.studies import InductionStudy, Prompts, RepeatedTokens, compare_estimates, measure
from headwise.studies.analyses.estimate_verdicts import verdict
from headwise.studies.analyses.estimates import sweep_of
from headwise.studies.analyses.heads import head_scores


@pytest.fixture(scope="module")
def tree(words_model):
    return InductionStudy(n=16).run(words_model)


def test_it_repeats_what_it_has_seen(words_model):
    ds = measure(words_model, RepeatedTokens(n=64), None, [accuracy], runs="all")["baseline_accuracy"]
    assert float(ds.sel(run="clean").mean()) >= 0.95
    assert float(ds.sel(run="corrupted").mean()) < 0.05


def test_apple_banana_cherry_apple(words_model):
    ds = measure(words_model, Prompts(["apple banana cherry apple"], answers=["banana"]), None, [accuracy])
    assert float(ds["accuracy"][0]) == 1.0


def test_any_words_of_the_vocabulary(words_model):
    words = [text for text in words_model.token_text(range(words_model.shape.vocabulary)) if text.isalpha()]
    assert len(words) >= 500
    random = np.random.RandomState(0)
    lists = [[words[i] for i in random.permutation(len(words))[:3]] for _ in range(100)]
    task = Prompts([" ".join([*three, three[0]]) for three in lists], answers=[three[1] for three in lists])
    assert float(measure(words_model, task, None, [accuracy])["accuracy"].mean()) >= 0.9


def test_heads_differ(tree):
    heads = tree["heads"].to_dataset().mean("example")
    assert float(heads["previous_token"].sel(layer=0).max()) >= 0.7
    assert float(heads["induction"].sel(layer=1).max()) >= 0.7
    neither = (heads["previous_token"] < 0.2) & (heads["induction"] < 0.2)
    assert int(neither.sel(layer=0).sum()) >= 3
    assert int(neither.sel(layer=1).sum()) >= 3


def test_the_causal_story_holds(tree):
    sets = tree["sets"].to_dataset()
    base = float(sets["baseline_accuracy"].sel(run="clean").mean())
    for ablation in ("zero", "mean", "resample"):
        here = sets.sel(set="induction heads", ablation=ablation)
        drop = base - float(here["accuracy"].mean())
        control = base - here["control_accuracy"].sel(control="same layers").mean("example")
        assert drop >= 0.5
        assert float(control.max()) < drop - 0.3
    causal = tree["composition"].to_dataset()
    before, after = float(causal["receiver_induction"].mean()), causal["ablated_induction"].mean("example")
    assert (after < before - 0.3).all()
    assert float(causal["pair_z"].sel(kind="k")) > 3


def test_what_estimates_miss(words_model):
    """The slope does not see the head that costs most, whose half can be taken away at no cost; the way does."""
    found = []
    for name in ("ablation", "patching"):
        grid, metric, base = sweep_of(words_model, name)
        found.append(compare_estimates(words_model, RepeatedTokens(n=16), grid, metric, steps=4, base=base))
    for ds, units in zip(found, (8.0, 12.0), strict=True):
        place = {"layer": 0, "head": 3} | ({"component": "v"} if "component" in ds.dims else {"ablation": "zero"})
        exact = float(ds["exact"].sel(place))
        slope, way = (float(ds["estimate"].sel({"estimator": name, **place})) for name in ("gradient", "integrated"))
        assert abs(exact) > 0.9 * units
        assert slope * exact < 0  # even the sign is wrong
        assert abs(slope) < 0.1 * abs(exact)
        assert way == pytest.approx(exact, rel=0.3)
        gradient, integrated = ds["rank_correlation"].values
        assert gradient < 0.8 <= integrated
        assert verdict(ds.sel(estimator="gradient")) == "nothing"
        assert verdict(ds.sel(estimator="integrated")) in ("all", "large")
    half = measure(words_model, RepeatedTokens(n=16), Scale(Head(0, 3), 0.5), [loss])
    assert abs(float(hw.effect(half, "loss").mean())) < 0.05


def test_the_same_heads_fire_on_words(tree):
    words = tree["words"].to_dataset()
    assert words.attrs["left_out"] == ""
    assert float(words["accuracy"].mean()) >= 0.9
    assert float(words["ablated_accuracy"].sel(ablation="zero").mean()) <= 0.3
    found = json.loads(tree.attrs["heads"])["induction"]
    fired = words["prefix_matching"].mean("example")
    best = {
        f"L{at[0]}H{at[1]}"
        for at, value in sorted(np.ndenumerate(fired.values), key=lambda item: -item[1])[: len(found)]
    }
    assert best == set(found)


def test_the_card_is_true(words_model):
    """The table of the card: previous-token, induction, duplicate, self and first score of every head."""
    card = (SHIPPED / "words-2l" / "README.md").read_text()
    rows = re.findall(r"^\| (\d) \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", card, re.M)
    assert len(rows) == 16
    scores = head_scores(words_model, RepeatedTokens(n=64, seed=7)).mean("example")
    for layer, head, *values in rows:
        for name, value in zip(
            ("previous_token", "induction", "duplicate_token", "self", "first_token"), values, strict=True
        ):
            assert float(scores[name][int(layer), int(head)]) == pytest.approx(float(value), abs=0.05), (
                layer,
                head,
                name,
            )
