"""The study of a circuit where the metric, the runs or the size are unusual: what it says is what was measured."""

import dataclasses
import json

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import AdviceWarning, DeclarationError, ModelError
from headwise.metrics.faithfulness import even_sizes, mib_sizes
from headwise.studies.circuits import kept
from headwise.studies.circuits.findings import conclude
from tests.support.architectures import build

TASK = hw.RepeatedTokens(n=4, length=8)
FEW = {"draws": 1, "resamples": 2}


def told(tree, group):
    return [one.text for one in conclude(tree) if one.group == group]


@pytest.fixture(scope="module")
def divergence(words_model):
    """A metric that is neither better higher nor lower."""
    return hw.CircuitStudy(TASK, "kl", n=40, **FEW).run(words_model, False)


def test_a_metric_without_a_direction_gets_that_of_the_two_runs(words_model, divergence):
    assert "better" not in hw.edge_scores(words_model, TASK, "kl")["score"].attrs
    curve = divergence["curve"].to_dataset()
    assert float(curve["empty"].mean()) > float(curve["whole"].mean())
    scores = divergence["edges"]["score"].mean("example", keep_attrs=True)
    assert scores.attrs["better"] == "lower"
    largest = hw.Graph(2, 8).prune(
        hw.Circuit(scores.isel(edge=np.argsort(-scores.values)[:62])["edge"].values.tolist())
    )
    kept = hw.measure(words_model, TASK, largest, "kl")["kl"].mean()
    ends = (float(curve[name].mean()) for name in ("empty", "whole"))
    empty, whole = ends
    here = curve["faithfulness"].sel(selection="signed", share=0.2)
    assert float(here) == pytest.approx((float(kept) - empty) / (whole - empty), abs=1e-4)
    assert float(curve["cpr"]) > 0.8


def test_a_picture_dashes_what_works_against_the_behaviour(divergence):
    part = divergence["circuit"].to_dataset()
    assert float(part["score"].max()) > 0
    assert part["edge"].values.tolist() == [str(edge) for edge in hw.from_json(divergence.attrs["circuit"])]
    for name in ("edge", "sender", "receiver"):
        assert name in divergence["inclusion"].coords


def test_the_same_run_twice_leaves_nothing_to_keep(words_model):
    prompts = ["apple banana cherry apple", "dog cat house dog"]
    task = hw.Prompts(prompts, answers=["banana", "cat"], distractors=["cherry", "house"], corrupted=prompts)
    with pytest.raises(DeclarationError, match="so there is nothing for a circuit to keep"):
        hw.CircuitStudy(task, estimator="eap", **FEW).run(words_model, False)


def test_all_edges_that_were_asked_for_are_no_finding_on_smaller_ones(words_model):
    tree = hw.CircuitStudy(TASK, n=310, estimator="eap", **FEW).run(words_model, False)
    (first, *_) = told(tree, "circuit")
    assert first.startswith("A circuit of all 310 edges was asked for: it is the whole model")
    assert not any("No smaller" in text for text in told(tree, "summary"))
    tree["circuit"].attrs["asked"] = 0
    assert told(tree, "circuit")[0].startswith("No smaller circuit than the whole model, 310 edges, keeps 90%")


def test_a_circuit_that_is_large_or_no_better_than_chance_is_told_plainly(divergence):
    part = divergence["circuit"].to_dataset()
    other = divergence.copy()
    random = xr.DataArray(np.ones(20), dims="draw")
    part = part.drop_dims("draw").assign(random=random, p=((), 0.5))
    other["circuit"] = xr.DataTree(part)
    assert told(other, "summary")[0] == (
        "No small circuit was found by these scores: random circuits of as many connected edges may keep as much "
        "(p = 0.500)."
    )
    assert not any(text.startswith("No small circuit") for text in told(divergence, "summary"))
    every = divergence["edges"].to_dataset()
    large = hw.Graph(2, 8).edges[:200]
    score = every["score"].mean("example").isel(edge=slice(200))
    part = part.drop_dims("edge").assign(score=score, p=((), 0.04)).assign_attrs(asked=0, n=200)
    other["circuit"] = xr.DataTree(part)
    assert len(large) == 200
    assert told(other, "summary")[0] == ("No small circuit was found by these scores: this one has 200 of 310 edges.")


def test_means_take_the_place_of_a_run_that_the_task_lacks(words_model):
    prompts = ["apple banana cherry apple", "dog cat house dog"]
    task = hw.Prompts(prompts, answers=["banana", "cat"], distractors=["cherry", "house"])
    tree = hw.CircuitStudy(task, source="mean", n=40, **FEW).run(words_model, False)
    scores = hw.edge_scores(words_model, task, "logit_diff", source="mean")["score"]
    np.testing.assert_allclose(tree["edges"]["score"].values, scores.values, atol=1e-5)
    curve = tree["curve"].to_dataset()
    empty = hw.measure(words_model, task, hw.Circuit(source="mean"), "logit_diff")["logit_diff"].values
    np.testing.assert_allclose(curve["empty"].values, empty, atol=1e-5)


def test_areas_over_numbers_of_edges_do_not_pass_for_those_of_mib(divergence):
    assert "not that of MIB" in divergence["numbers"]["cpr"].attrs["long_name"]
    assert "not that of MIB" not in divergence["curve"]["cpr"].attrs["long_name"]


def test_the_random_circuits_of_the_study_are_drawn_as_they_are(divergence):
    drawn = hw.plots.circuit_curve(divergence["curve"].to_dataset(), divergence["random"].to_dataset())
    wanted = divergence["random"]["faithfulness"].sel(kind="connected edges", draw=0).values
    lines = [one.dimension_values(1) for one in drawn.traverse(lambda part: part) if type(one).__name__ == "Curve"]
    assert any(line.shape == wanted.shape and np.array_equal(line, wanted) for line in lines)


def test_a_plan_counts_the_passes_of_estimates(words_model):
    def edges(**given):
        return hw.CircuitStudy(TASK, **FEW, **given).plan(words_model, timed=False).stages["edges"]

    one, five, more = (
        edges(estimator=name, steps=steps) for name, steps in (("eap", None), ("eap-ig", 5), ("eap-ig", 9))
    )
    assert five.forwards - one.forwards == pytest.approx(4 * 3 * 4)  # four more steps there and back, of four prompts
    assert more.forwards - five.forwards == pytest.approx(4 * 3 * 4)
    verified = edges(estimator="eap", then_exact=20)
    assert one.forwards < verified.forwards < edges().forwards + one.forwards


def test_findings_are_of_the_change_between_the_two_runs(divergence):
    text = told(divergence, "circuit")[0]
    assert "of the change of the " in text
    assert json.loads(divergence.attrs["study"])["metric"] == "kl"


def test_circuits_over_steps_of_training_are_those_of_each_step():
    study = hw.CircuitStudy(hw.RepeatedTokens(n=2, length=6), n=20, draws=1, resamples=2)
    series = hw.over_checkpoints("words-2l", study, steps=[512, 2000])
    for step in (512, 2000):
        alone = study.run(hw.load("words-2l", step=step), False)["circuit"].to_dataset()
        scores = series["circuit"]["score"].sel(step=step).dropna("edge")
        assert {*scores["edge"].values.tolist()} == {*alone["edge"].values.tolist()}
        np.testing.assert_allclose(scores.sel(edge=alone["edge"]), alone["score"], rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Mine:
    """A task of one's own, whose text says nothing of its prompts."""

    n: int

    def __repr__(self):
        return "Mine()"

    def draw(self, model):
        return hw.RepeatedTokens(n=self.n, length=8).draw(model)


def test_a_file_of_another_metric_or_other_prompts_is_not_taken_for_the_result(words_model, tmp_path):
    def three_times(*arguments, **named):
        return 3 * hw.metrics.logit_diff.kernel(*arguments, **named)

    mine = dataclasses.replace(hw.metrics.logit_diff, kernel=three_times)
    path = tmp_path / "circuit.nc"
    whole = [
        float(hw.CircuitStudy(TASK, metric, n=20, **FEW).run(words_model, False, out=path)["curve"]["whole"].mean())
        for metric in ("logit_diff", mine, "logit_diff")
    ]
    assert whole[1] == pytest.approx(3 * whole[0], rel=1e-5)
    assert whole[2] == whole[0]
    with pytest.raises(DeclarationError, match="a metric of your own is called 'logit_diff'"):
        hw.CircuitStudy(TASK, mine).to_json()
    for n in (3, 5):
        study = hw.CircuitStudy(Mine(n), n=20, **FEW)
        assert study.run(words_model, False, out=path)["edges"].sizes["example"] == n
    for metric, size in (("logit_diff", 1), (mine, 3), ("logit_diff", 1)):
        ds = hw.edge_scores(words_model, TASK, metric, edges=["m1->logits"], out=path)
        alone = hw.edge_scores(words_model, TASK, "logit_diff", edges=["m1->logits"])["score"]
        np.testing.assert_allclose(ds["score"], size * alone, rtol=1e-4)


def test_where_the_model_is_worse_than_no_edge_that_is_the_behaviour_and_said(words_model):
    prompts, answers = ["apple banana cherry apple", "dog cat house dog"], ["banana", "cat"]
    corrupted = ["apple house cherry apple", "dog cherry house dog"]
    right = {"corrupted": corrupted, "answers": answers, "distractors": ["house", "cherry"]}
    wrong = right | {"answers": right["distractors"], "distractors": answers}
    one = hw.CircuitStudy(hw.Prompts(prompts, **right), n=20, **FEW).run(words_model, False)
    with pytest.warns(AdviceWarning, match="the whole model is worse than the empty circuit"):
        other = hw.CircuitStudy(hw.Prompts(prompts, **wrong), n=20, **FEW).run(words_model, False)
    assert float(one["curve"]["whole"].mean()) > float(one["curve"]["empty"].mean())
    for name in ("cpr", "cmd"):
        assert float(other["curve"][name]) == pytest.approx(float(one["curve"][name]), abs=1e-4)
    assert (one["edges"]["score"].attrs["better"], other["edges"]["score"].attrs["better"]) == ("higher", "lower")
    assert not any("worse" in text for text in told(one, "summary"))
    assert "the whole model is worse than the empty circuit" in told(other, "summary")[0]


def test_others_without_a_change_are_refused_first_and_those_of_the_next_seed_left_out(words_model, monkeypatch):
    prompts = ["apple banana cherry apple", "dog cat house dog"]
    same = hw.Prompts(prompts, answers=["banana", "cat"], distractors=["cherry", "house"], corrupted=prompts)
    stages = []
    with pytest.raises(DeclarationError, match=r"^others: .*nothing for a circuit to keep"):
        hw.CircuitStudy(TASK, n=20, others=same, **FEW).run(words_model, stages.append)
    assert stages == ["edges"]
    gap = kept.Behaviour.gap

    def none(self):
        if self.task.seed == 1:
            raise DeclarationError("nothing to keep")
        return gap(self)

    monkeypatch.setattr(kept.Behaviour, "gap", none)
    assert "on_others" not in hw.CircuitStudy(TASK, n=20, **FEW).run(words_model, False)["circuit"]


@pytest.mark.parametrize(("metric", "estimator"), [("kl", "eap"), ("accuracy", "eap-ig"), ("kl", "relp")])
def test_an_estimator_that_a_metric_cannot_have_is_refused_when_it_is_declared(metric, estimator):
    with pytest.raises(DeclarationError, match=metric):
        hw.CircuitStudy(TASK, metric, estimator=estimator)


def test_a_model_whose_blocks_are_called_is_refused_by_name():
    with pytest.raises(ModelError, match="CircuitStudy needs blocks that are laid open"):
        hw.CircuitStudy(hw.RepeatedTokens(n=2, length=4)).plan(hw.load(build("opt", 0)))


def test_the_smallest_number_is_found_by_halving_what_is_between(words_model, monkeypatch):
    asked = []

    class Known(kept.Behaviour):
        """Keeps 0.001 for each edge, but 0.95 from 47 on."""

        def of(self, circuits):
            asked.extend(map(len, circuits))
            return [len(circuit) for circuit in circuits]

        def kept(self, found):
            return np.array([0.95 if size >= 47 else size / 1000 for size in found])

    behaviour = Known(words_model, TASK, hw.metrics.logit_diff, "corrupted")
    monkeypatch.setattr(hw.Graph, "prune", lambda self, circuit: circuit)
    edges = behaviour.graph.edges
    coords = {"sender": ("edge", [one.sender for one in edges]), "receiver": ("edge", [one.receiver for one in edges])}
    scores = xr.DataArray(np.arange(310.0), dims="edge", coords=coords)
    curves = [
        xr.Dataset(
            {"faithfulness": (("selection", "size"), behaviour.kept(sizes)[None])},
            coords={"edges": ("size", list(sizes)), "selection": ["abs"]},
        )
        for sizes in (mib_sizes(310), even_sizes(310))
    ]
    assert [int(one["edges"][-1]) for one in curves] == [310, 310]
    found = kept.smallest(behaviour, scores, curves, 0.9)
    assert found.attrs["n"] == 47
    assert {46, 47} <= {*asked} <= {*range(31, 50)}  # between 31 (a share of 0.1) and 50
    tried = dict(zip(found["tried_edges"].values.tolist(), found["tried"].values.tolist(), strict=True))
    assert (tried[46], tried[47]) == (0.046, 0.95)


def test_one_prompt_has_no_intervals_and_is_drawn(words_model):
    tree = hw.CircuitStudy(hw.RepeatedTokens(n=1, length=8), n=20, **FEW).run(words_model, False)
    curve = tree["curve"].to_dataset()
    assert np.isnan(curve["cpr_low"])
    low, high = hw.plots.circuit_curve(curve).opts.get("plot").kwargs["ylim"]
    values = curve["faithfulness"].values
    assert low < values.min() < values.max() < high
    assert "inclusion" not in tree.children


def test_edges_without_a_score_are_not_told_as_found(words_model):
    tree = hw.CircuitStudy(TASK, "accuracy", n=250, **FEW).run(words_model, False)
    nothing = int((tree["edges"]["score"].mean("example") == 0).sum())
    assert nothing > 60
    left = 250 - (310 - nothing)
    assert f"Of these 250 edges, {left} have a score of exactly 0: they are in by their place" in str(
        told(tree, "summary")
    )
    tree["circuit"].attrs["asked"] = 0
    assert "this one has 250 of 310 edges" in told(tree, "summary")[0]
