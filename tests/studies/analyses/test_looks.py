"""As many prompts as the verdicts need: what was measured is kept, and looking more than once errs no more often."""

import json
import re

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.interventions import Head, Patch
from headwise.interventions.run.backend import LocalBackend
from headwise.metrics import bootstrap_interval, logit_diff, loss
from headwise.metrics.intervals import level_at, looks, settled
from headwise.metrics.statistics import null_p_value, over_looks, ranking_settled, t_test
from headwise.studies import InductionStudy, RepeatedTokens
from headwise.studies.analyses import ablation, estimates
from headwise.studies.analyses.prices import price_study, sweeps_of
from headwise.studies.measuring.looks import measure_some, until_settled
from tests.oracles.planted import INDUCTION, LENGTH, PREVIOUS
from tests.oracles.raw_hooks import random_gpt2

NUMBER = re.compile(r"(?<![LH\d.])[-+]?\d[\d.]*%?")
"""A number in a sentence, not that of a layer or a head."""
WAYS = re.compile(r"# under [a-z #,]*ablation")
"""What each ablation leaves: those that leave the same to two digits are told together."""


def test_the_numbers_at_which_one_looks():
    assert [looks(32, 8), looks(20, 8), looks(8, 8), looks(4, 8), looks(32)] == [
        (8, 16, 32),
        (8, 16, 20),
        (8,),
        (4,),
        (32,),
    ]
    assert (level_at(1), level_at(4)) == (0.95, pytest.approx(0.9875))
    np.testing.assert_array_equal(over_looks(np.array([0.01, 0.5]), 3), [0.03, 1.0])
    ends = np.array([[0.1, 9.0], [-0.04, 0.06], [-0.04, 0.07]])
    assert settled(ends[:, 0], ends[:, 1], 0.05).tolist() == [True, True, False]


def test_looking_thrice_errs_no_more_often_than_stated():
    """Mean 0, looked at after 8, 16 and 32 values: how often some look calls it an effect."""
    values, counts = np.random.RandomState(0).normal(size=(1500, 32)), looks(32, 8)

    def wrong(level, p_of):
        ends = [bootstrap_interval(values[:, :count], level, resamples=500) for count in counts]
        by_interval = np.any([(low > 0) | (high < 0) for low, high in ends], axis=0)
        return by_interval.mean(), np.any([p_of(values[:, :count]) <= 0.05 for count in counts], axis=0).mean()

    naive, allowed = wrong(0.95, t_test), wrong(level_at(3), lambda some: over_looks(t_test(some), 3))
    assert min(naive) > 0.085  # what the error rate would be
    assert max(allowed) <= 0.065  # 0.05, and 2.7 standard errors of 1500 cases


def test_the_place_among_random_sets_keeps_its_p_value():
    """20 sets that differ by chance: the first is in the highest twentieth as often as any, whenever one stops."""
    random, found = np.random.RandomState(1), []
    for _ in range(600):
        values = random.normal(size=(20, 1)) * random.choice([0.1, 1.0]) + random.normal(size=(20, 32))
        count = next(count for count in looks(32, 8) if count == 32 or ranking_settled(values[:, :count], 0.5))
        means = values[:, :count].mean(axis=1)
        found.append(null_p_value(means[0], means[1:]))
    assert 0.03 <= np.mean(np.array(found) <= 0.05) <= 0.075  # 0.05, and 2.8 standard errors


def test_a_ranking_is_settled_by_size_or_by_sharpness():
    spread = np.linspace(-1, 1, 5)[:, None] + np.zeros((5, 8))
    noise = np.random.RandomState(0).normal(size=(5, 8))
    assert ranking_settled(spread + 0.1 * noise, margin=0.0)
    assert not ranking_settled(noise, margin=0.1)
    assert ranking_settled(noise, margin=3.0)
    assert ranking_settled(noise + 100 * np.arange(8), margin=3.0)  # what all sets share does not matter


def test_prompts_a_few_at_a_time_are_those_of_all_at_once(small_model):
    """Resampling finds each prompt's own partner, whichever prompts run with it."""
    task, grid = RepeatedTokens(n=7, length=6), ablation.each_head(small_model, ablation.METHODS)
    whole = hw.measure(small_model, task, grid, [loss])
    parts = [measure_some(small_model, task, grid, [loss], span) for span in ((0, 2), (2, 5), (5, 7))]
    joined = until_settled((2, 5, 7), lambda span: {"one": parts[[0, 2, 5].index(span[0])]}, lambda found: False)["one"]
    np.testing.assert_allclose(joined["loss"], whole["loss"], atol=1e-5)
    np.testing.assert_array_equal(joined["token_id"], whole["token_id"])
    np.testing.assert_array_equal(joined["example"], whole["example"])
    assert (json.loads(joined.attrs["looks"]), joined.attrs["settled"]) == ([2, 5, 7], 0)


def test_what_was_measured_is_not_measured_again(planted):
    spans = []

    def part(span):
        spans.append(span)
        return {"one": xr.Dataset({"loss": ("example", np.arange(*span))}, attrs={"seconds": "1.0"})}

    found = until_settled((8, 16, 32), part, lambda found: found["one"].sizes["example"] == 16)["one"]
    assert spans == [(0, 8), (8, 16)]
    assert found["loss"].values.tolist() == list(range(16))
    assert (found.attrs["settled"], found.attrs["seconds"]) == (1, "2.000")


def test_what_one_head_does_alone_is_not_measured_again(small_model, monkeypatch):
    """Sets of one head are those of `every_head`, as far as its prompts go; the numbers are those of measuring all."""
    task = RepeatedTokens(n=8, length=6)
    sets = {"one": [Head(0, 1)], "two": [Head(0, 1), Head(1, 0)]}
    how = {"draws": 3, "seed": 2, "first": 4}
    whole = ablation.sets_against_controls(small_model, task, sets, **how)
    alone = ablation.every_head(small_model, task).isel(example=slice(0, 4))
    asked, plain = [], ablation.measure_some
    monkeypatch.setattr(ablation, "CLEAR", {"loss": 0.0, "accuracy": 0.0})  # never settled: all prompts are used
    monkeypatch.setattr(
        ablation,
        "measure_some",
        lambda model, task, what, *rest: asked.append((len(what), rest[1])) or plain(model, task, what, *rest),
    )
    shared = ablation.sets_against_controls(small_model, task, sets, **how, alone=alone)
    every = {len(heads.split()) for heads in shared["control_heads"].values.ravel().tolist() if heads}
    assert every == {1, 2}
    assert [span for _, span in asked] == [(0, 4), (4, 8)]
    assert asked[0][0] < asked[1][0] == len(json.loads(shared.attrs["interventions"])["interventions"])
    for name in ("loss", "accuracy", "control_loss", "control_accuracy"):
        np.testing.assert_allclose(shared[name].isel(example=slice(0, whole.sizes["example"])), whole[name], atol=1e-5)


@pytest.fixture(scope="module")
def adaptive(planted):
    """The study with looks at 4, 8 and 16 prompts, and the passes that each of its stages ran."""
    ran, stage, plain = {}, [], LocalBackend.run_plan

    def counted(self, plan, *args, **kwargs):
        if stage and self.model is planted:
            ran[stage[-1]] = ran.get(stage[-1], 0) + plan.steps
        return plain(self, plan, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalBackend, "run_plan", counted)
        tree = InductionStudy(n=16, length=LENGTH, draws=20, first=4).run(planted, stage.append)
    return tree, ran


def test_fewer_prompts_give_the_verdicts_of_all(adaptive, planted):
    tree, _ = adaptive
    used = {name: tree[name].sizes["example"] for name in ("ablation", "sets", "patching", "composition")}
    assert used["sets"] == used["patching"] == used["composition"] == 4
    whole = InductionStudy(n=16, length=LENGTH, draws=20, first=16).run(planted)
    few, all_at_once = (json.loads(one.attrs["conclusion"]) for one in (tree, whole))
    for group in ("summary", "ablation", "patching", "composition"):
        said = [
            [WAYS.sub("#", NUMBER.sub("#", one["text"])) for one in found if one["group"] == group]
            for found in (few, all_at_once)
        ]
        assert said[0] == said[1], group
    limits = [f["text"] for f in json.loads(tree.attrs["conclusion"]) if f["group"] == "limits"]
    assert any("4 for sets, 4 for patching and 4 for composition" in text and "3 looks" in text for text in limits)
    assert not any("looks" in text for text in map(str, json.loads(whole.attrs["conclusion"])))


def test_the_prices_are_those_of_what_runs(adaptive, planted):
    """The passes that each stage ran are those of the plans that it was priced by."""
    tree, ran = adaptive
    study = InductionStudy(n=16, length=LENGTH, draws=20, first=4)
    found = {"previous-token": [Head(*PREVIOUS)], "induction": [Head(*INDUCTION)]}
    sweeps = sweeps_of(study, planted, found)
    for name in ("ablation", "sets", "patching", "composition"):
        every = tree[name].sizes["example"] == 16
        assert ran[name] == sum(plan.steps for one in sweeps[name] for plan in one.plans(planted, every)), name
    plan = price_study(study, planted, timed=False)
    assert list(plan.least) == list(plan.most)
    assert all(plan.most[name].forwards >= plan.least[name].forwards for name in plan.least)
    assert plan.least["sets"].forwards > 0 == plan.bare["sets"].forwards
    assert "in all" in str(plan)
    assert "sets" not in plan.line.split(";")[0]


def test_the_keys_read_the_previous_token_head(adaptive):
    """On the planted circuit nothing else is read: corrupting that path alone takes the answer away."""
    ds = adaptive[0]["composition"].to_dataset()
    before = ds["path_baseline"].sel(run="clean").mean()
    after = ds["path_logit_diff"].mean("example")
    own = f"L{PREVIOUS[0]}H{PREVIOUS[1]}"
    assert ds["sender"].values[ds["is_sender"].values == 1].tolist() == [own]
    assert float(after.sel(path="k", sender=own)) < 0.1 * float(before)
    np.testing.assert_allclose(after.sel(path=["q", "v"], sender=own), before, atol=1e-3)
    np.testing.assert_allclose(after.drop_sel(sender=own).sel(path="k"), before, atol=1e-3)
    assert float(ds["p_path"].sel(path="k", sender=own)) == pytest.approx(0.1)
    texts = [finding["text"] for finding in json.loads(adaptive[0].attrs["conclusion"])]
    assert any(f"So it is their keys that read {own}." in text for text in texts)
    assert not any("only path patching would" in text for text in texts)


def test_paths_are_those_that_one_asks_measure_for(adaptive, planted):
    task = RepeatedTokens(n=4, length=LENGTH)
    one = hw.measure(planted, task, hw.PathPatch(Head(*PREVIOUS), [Head(*INDUCTION).k]), [logit_diff])["logit_diff"]
    own = f"L{PREVIOUS[0]}H{PREVIOUS[1]}"
    found = adaptive[0]["composition"]["path_logit_diff"].sel(path="k", sender=own)
    np.testing.assert_allclose(found, one, atol=1e-4)
    frozen = hw.measure(planted, task, Patch(Head(*INDUCTION).k), [logit_diff])["logit_diff"]
    np.testing.assert_allclose(found, frozen, atol=1e-4)  # by its weights, the key reads nothing else


def test_no_estimate_is_dearer_than_what_it_estimates(adaptive, planted):
    few, many = (hw.load(random_gpt2(2, heads, 4, 60, 40)) for heads in (4, 40))
    task = RepeatedTokens(n=2, length=5)
    assert estimates.prices(few, task, "ablation", 2).chosen == ["gradient"]
    assert estimates.prices(many, task, "ablation", 2).chosen == ["gradient", "integrated"]
    price = estimates.prices(planted, RepeatedTokens(n=16, length=LENGTH), "patching", 4)
    ds = adaptive[0]["estimates/patching"].to_dataset()
    assert ds["estimator"].values.tolist() == price.chosen
    assert json.loads(ds.attrs["too_dear"]) == price.too_dear
    texts = [finding["text"] for finding in json.loads(adaptive[0].attrs["conclusion"])]
    dear = any("was not run: it costs" in text for text in texts)
    assert dear == bool(price.too_dear | estimates.prices(planted, RepeatedTokens(16, LENGTH), "ablation", 16).too_dear)


def test_a_study_of_before_takes_all_prompts_at_once():
    text = '{"type": "InductionStudy", "n": 12, "length": 25, "seed": 3}'
    assert InductionStudy.from_json(text) == InductionStudy(n=12, seed=3, first=12)
    assert InductionStudy.from_json(InductionStudy(n=12, first=4).to_json()).first == 4


def false_verdicts(models):
    """On models with random weights, an arbitrary head against all others: how often it is said to do more."""
    wrong = 0
    for seed in range(models):
        model = hw.load(random_gpt2(2, 10, 4, 60, 40, seed=seed))
        task = RepeatedTokens(n=16, length=6, seed=seed)
        ds = ablation.sets_against_controls(model, task, {"one": [Head(0, 3)]}, metrics=[loss], draws=50, first=4)
        wrong += bool(ds["p_loss"].sel(control="all layers", ablation="zero") <= 0.05)
    return wrong


def test_an_arbitrary_head_of_a_random_model_is_not_called_special():
    assert false_verdicts(4) <= 2  # at 5%, more has probability 0.0005


@pytest.mark.heavy
def test_arbitrary_heads_are_called_special_as_often_as_stated():
    assert false_verdicts(60) <= 8  # at 5%, more has probability 0.004
