"""`edge_scores` by estimators: their numbers, exact scores of the largest, and the bound on what was missed."""

import itertools
import json
import re

import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError
from headwise.metrics.intervals import most_in_all

TASK = hw.RepeatedTokens(n=3, length=6, seed=1)
EDGES = ["input->a0.h3<v>", "a0.h3->a1.h1<k>", "m0->m1", "a1.h1->m1", "m1->logits"]


@pytest.fixture(scope="module")
def exact():
    return hw.edge_scores(hw.load("words-2l"), TASK, "logit_diff")


@pytest.mark.parametrize("estimator", ["eap", "eap-ig", "eap-ig-activations", "atp*", "relp"])
def test_scores_are_changes_of_the_metric(words_model, exact, estimator):
    found = hw.edge_scores(words_model, TASK, "logit_diff", estimator=estimator)
    steps = {} if estimator in ("eap", "atp*", "relp") else {"steps": 5}
    ds = hw.measure(words_model, TASK, hw.EdgePatches(), "logit_diff", estimator=estimator, **steps)
    np.testing.assert_array_equal(found["score"], hw.effect(ds, "logit_diff"))
    assert {*found.data_vars} == {"score", "baseline_logit_diff"}
    assert "exact" not in found.coords
    said = f"{estimator}, 5 steps" if steps else estimator
    assert found.attrs["estimator"] == found["score"].attrs["estimator"] == ds.attrs["estimator"] == said
    assert {"better", "units", "metric"} <= {*found["score"].attrs}
    one, other = (edges["score"].mean("example").values for edges in (found, exact))
    assert np.corrcoef(one, other)[0, 1] > 0.4  # the same sign
    assert len(hw.Circuit.top(found.mean("example"), n=20)) == 20


def test_the_largest_become_exact_and_a_sample_bounds_the_others(words_model, exact):
    plain = hw.edge_scores(words_model, TASK, "logit_diff", estimator="eap", source="corrupted")
    given = {"estimator": "eap", "then_exact": 12, "sample": 40, "seed": 3}
    found = hw.edge_scores(words_model, TASK, "logit_diff", **given)
    order = np.argsort(-np.abs(plain["score"].mean("example").values.astype(float)), kind="stable")
    is_exact, drawn = found["exact"].values, found["sampled"].values
    assert is_exact.sum() == 52
    assert drawn.sum() == 40
    assert is_exact[order[:12]].all()
    assert not drawn[order[:12]].any()
    np.testing.assert_allclose(found["score"][is_exact], exact["score"][is_exact], atol=1e-5)
    np.testing.assert_array_equal(found["score"][~is_exact], plain["score"][~is_exact])
    sizes = np.abs(exact["score"].mean("example").values)
    threshold, exceeding = sizes[order[:12]].min(), (sizes[drawn] > sizes[order[:12]].min()).sum()
    told = found.attrs
    assert (told["verified"], told["sampled"], told["exceeding"]) == (12, 40, exceeding)
    assert told["threshold"] == pytest.approx(threshold, abs=1e-5)
    assert told["largest_sampled"] == pytest.approx(sizes[drawn].max(), abs=1e-5)
    assert told["exceeding_at_most"] == most_in_all(exceeding, 40, 298)
    assert (sizes[order[12:]] > threshold).sum() <= told["exceeding_at_most"]
    numbers = re.findall(r"\d+", told["verification"])
    assert numbers[:2] == ["12", "298"]
    missed = found["edge"].values[drawn & (sizes > sizes[order[:12]].min())]
    named = f" ({', '.join(missed)})" if exceeding else ""
    bound = f"{exceeding} exceed that{named}. With 95% confidence at most {told['exceeding_at_most']} of the 298 do"
    assert bound in told["verification"]
    again = hw.edge_scores(words_model, TASK, "logit_diff", **given)
    assert again.identical(found.assign_attrs({name: again.attrs[name] for name in found.attrs}))
    others = hw.edge_scores(words_model, TASK, "logit_diff", **given | {"seed": 4})
    assert not np.array_equal(others["sampled"], drawn)


def test_all_may_become_exact_or_none_be_drawn(words_model, exact):
    found = hw.edge_scores(words_model, TASK, "logit_diff", estimator="relp", edges=EDGES, then_exact=5)
    np.testing.assert_allclose(found["score"], exact["score"].sel(edge=found["edge"]), atol=1e-5)
    assert found["exact"].all()
    assert found.attrs["verification"] == "The scores of the 5 edges with the largest estimates are exact."
    few = hw.edge_scores(words_model, TASK, "logit_diff", estimator="relp", edges=EDGES, then_exact=2, sample=0)
    assert few["exact"].sum() == 2
    assert few.attrs["verification"].endswith("the other 3 are: sample=0.")
    whole = hw.edge_scores(words_model, TASK, "logit_diff", estimator="relp", edges=EDGES, then_exact=2)
    assert whole["exact"].all()
    assert whole.attrs["exceeding_at_most"] == whole.attrs["exceeding"]


def test_the_bound_covers_as_often_as_it_says():
    """By counting all draws: with any number in all, the bound is below it in no more than 5% of the draws."""
    for among, drawn in ((8, 3), (9, 5), (6, 6)):
        for number in range(among + 1):
            draws = [sum(one < number for one in some) for some in itertools.combinations(range(among), drawn)]
            missed = np.mean([most_in_all(found, drawn, among) < number for found in draws])
            assert missed <= 0.05
    assert most_in_all(0, 59, 10**6) == pytest.approx(0.05 * 10**6, rel=0.02)  # 1 - 0.05 ** (1 / 59)


def test_a_file_of_estimates_is_repeated(words_model, tmp_path):
    out = tmp_path / "edges.nc"
    given = {"estimator": "eap-ig", "steps": 2, "then_exact": 4, "sample": 6, "out": out}
    made = hw.edge_scores(words_model, TASK, "logit_diff", **given)
    stored = hw.open_result(out)
    assert stored.equals(made)
    assert stored["exact"].dtype == bool
    assert json.loads(stored.attrs["edge_scores"])["sample"] == 6
    found = hw.rerun(out)
    assert found.agrees
    assert found.largest <= 1e-6
    hw.measure(words_model, TASK, hw.EdgePatches(EDGES), "logit_diff", estimator="atp*", out=tmp_path / "measured.nc")
    assert hw.rerun(tmp_path / "measured.nc").agrees


REFUSED = {
    "estimator='eap_ig': possible are 'exact', 'eap', 'eap-ig'": {"estimator": "eap_ig"},
    "steps=5: estimator='eap' takes none": {"estimator": "eap", "steps": 5},
    "steps must be 1 or more, got 0": {"estimator": "eap-ig", "steps": 0},
    "then_exact=311: there are 310 edges": {"estimator": "eap", "then_exact": 311},
    "sample must be 0 or more, got -1": {"estimator": "eap", "then_exact": 1, "sample": -1},
    "kl is least at the base run": {"estimator": "atp*", "metric": "kl"},
    "accuracy has no gradient estimate": {"estimator": "relp", "metric": "accuracy"},
    "induction is no metric of logits": {"estimator": "eap", "metric": "induction"},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_before_any_pass(words_model, text, monkeypatch):
    for name in ("run_plan", "run_estimate"):
        monkeypatch.setattr(type(words_model.backend), name, None)
    given = {"metric": "logit_diff"} | REFUSED[text]
    with pytest.raises(DeclarationError) as error:
        hw.edge_scores(words_model, TASK, given.pop("metric"), **given)
    assert text in str(error.value)
