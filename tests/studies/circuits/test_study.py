"""The study of a circuit against `raw_edges`, plain torch that runs every edge by itself."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ModelError, ResultError, UnknownNameError
from headwise.studies.circuits import kept
from headwise.studies.circuits.at_random import ANY, CONNECTED, random_circuits
from headwise.studies.circuits.findings import conclude
from tests.oracles import raw_edges

TASK = hw.RepeatedTokens(n=4, length=8)
STAGES = ["edges", "curve", "numbers", "random", "circuit", "nodes", "inclusion"]


@pytest.fixture(scope="module")
def study():
    return hw.CircuitStudy(TASK, draws=3, resamples=20)


@pytest.fixture(scope="module")
def tree(study, words_model):
    return study.run(words_model, False)


@pytest.fixture(scope="module")
def oracle(words_model):
    """Mean logit difference of a circuit over the prompts, by the oracle in float64."""
    import copy

    module, batch = copy.deepcopy(words_model.module).double(), TASK.draw(words_model)
    clean, corrupted = (torch.as_tensor(batch.runs[run]) for run in ("clean", "corrupted"))
    scored, answers, wrong = (torch.as_tensor(one) for one in (batch.scored, batch.targets, batch.distractors))

    def score(logits):
        gap = logits.gather(-1, answers[..., None]) - logits.gather(-1, wrong[..., None])
        return (gap[..., 0] * scored).sum(-1) / scored.sum(-1)

    with torch.no_grad():
        other = raw_edges.forward(module, corrupted).sent

    def faithfulness(circuit):
        whole, empty, here = (
            float(raw_edges.measured(module, clean, score, [*map(tuple, one)], other).mean())
            for one in (raw_edges.edges(module), [], circuit)
        )
        return (here - empty) / (whole - empty)

    return faithfulness


def mean_scores(tree):
    return tree["edges"]["score"].mean("example", keep_attrs=True)


def edges_of(part):
    return hw.Circuit(zip(map(str, part["sender"].values), map(str, part["receiver"].values), strict=True))


def test_curves_are_those_of_pruned_circuits_of_the_oracle(tree, oracle):
    graph, scores = hw.Graph(2, 8), mean_scores(tree)
    for by in ("signed", "abs"):
        for size in (6, 15, 31, 62, 155):
            circuit = graph.prune(hw.Circuit.top(scores, size, by))
            here = tree["curve"].to_dataset().set_xindex("edges").sel(selection=by, edges=size)
            assert int(here["left"]) == len(circuit)
            assert float(here["faithfulness"]) == pytest.approx(oracle(circuit), abs=1e-4)
    curve = tree["curve"].to_dataset()
    cpr, _ = raw_edges.areas(raw_edges.SHARES, curve["faithfulness"].sel(selection="signed").values.tolist())
    _, cmd = raw_edges.areas(raw_edges.SHARES, curve["faithfulness"].sel(selection="abs").values.tolist())
    assert (float(curve["cpr"]), float(curve["cmd"])) == pytest.approx((cpr, cmd))
    assert curve["faithfulness"].values[:, -1] == pytest.approx(1, abs=1e-6)


def test_the_circuit_is_the_smallest_that_was_tried_and_keeps_the_share(tree, oracle):
    part, scores = tree["circuit"].to_dataset(), mean_scores(tree)
    graph, n = hw.Graph(2, 8), int(part.attrs["n"])
    circuit = edges_of(part)
    assert circuit == graph.prune(hw.Circuit.top(scores, n)) == hw.from_json(tree.attrs["circuit"])
    assert float(part["faithfulness"]) == pytest.approx(oracle(circuit), abs=1e-4)
    assert float(part["complement"]) == pytest.approx(oracle(hw.Circuit(graph.edges) - circuit), abs=1e-4)
    tried = dict(zip(part["tried_edges"].values.tolist(), part["tried"].values.tolist(), strict=True))
    assert tried[n] >= 0.9 > max(value for size, value in tried.items() if size < n)
    assert n == 1 or tried.get(n - 1, 0) < 0.9  # the number before it was tried
    for name in ("curve", "numbers"):
        one = tree[name].to_dataset()
        assert (one["faithfulness"].sel(selection="abs").values[one["edges"].values < n] < 0.9).all()
    where = dict(zip(edges_of(tree["edges"]).edges, range(310), strict=True))
    assert part["score"].values == pytest.approx(scores.values[[where[edge] for edge in circuit]])
    p = (1 + int((part["random"] >= part["faithfulness"]).sum())) / 4
    assert float(part["p"]) == p


def test_on_other_prompts_the_circuit_is_measured_by_itself(tree, words_model):
    part, circuit = tree["circuit"], hw.from_json(tree.attrs["circuit"])
    others = hw.RepeatedTokens(n=4, length=8, seed=1)
    ds = hw.measure(words_model, others, circuit, "logit_diff", runs="all")
    clean, corrupted = (float(ds["baseline_logit_diff"].sel(run=run).mean()) for run in ("clean", "corrupted"))
    wanted = (float(ds["logit_diff"].mean()) - corrupted) / (clean - corrupted)
    assert float(part["on_others"]) == pytest.approx(wanted, abs=1e-5)


def test_sets_of_heads_are_circuits_of_nodes_and_none_of_them_can_go(tree, oracle):
    part, graph = tree["nodes"].to_dataset(), hw.Graph(2, 8)
    heads = [f"a{layer}.h{head}" for layer in range(2) for head in range(8)]

    def keeps(some):
        return oracle(graph.between([*some, "m0", "m1"]))

    for layer, head in ((0, 3), (1, 2)):
        without = [one for one in heads if one != f"a{layer}.h{head}"]
        assert float(part["lost"].sel(layer=layer, head=head)) == pytest.approx(1 - keeps(without), abs=1e-4)
    order = [heads[at] for at in np.argsort(-part["lost"].values.ravel(), kind="stable")]
    for size in (0, 3, 6):
        assert float(part["kept_by_score"].sel(size=size)) == pytest.approx(keeps(order[:size]), abs=1e-4)
    for name in ("by score", "greedy"):
        one = part.sel(set=name)
        found = str(one["heads"].values).split()
        assert len(found) == int(one["count"])
        assert float(one["faithfulness"]) == pytest.approx(keeps(found), abs=1e-4)
        assert float(one["complement"]) == pytest.approx(keeps([head for head in heads if head not in found]), abs=1e-4)
    by_score = int(part["count"].sel(set="by score"))
    assert (part["kept_by_score"].values[:by_score] < 0.9).all()
    assert {*str(part["heads"].sel(set="greedy").values).split()} <= {*order[:by_score]}
    found = str(part["heads"].sel(set="greedy").values).split()
    assert max(keeps([one for one in found if one != head]) for head in found) < 0.9


def test_random_circuits_grow_are_connected_and_the_same_for_a_seed():
    for graph in (hw.Graph(2, 8), hw.Graph(3, 4, kv_heads=2), hw.Graph(3, 3, parallel=True)):
        sizes = [3, 8, 20, 60, len(graph)]
        for kind in (ANY, CONNECTED):
            drawn = random_circuits(graph, sizes, 4, 0, kind)
            assert drawn == random_circuits(graph, sizes, 4, 0, kind)
            assert drawn != random_circuits(graph, sizes, 4, 1, kind)
            for draw in drawn:
                assert [len(circuit) for circuit in draw] == sizes
                assert all(len(small - large) == 0 for small, large in itertools.pairwise(draw))
        for size in (1, 2, 3, 4, 5, 9, 20):
            for (circuit,) in random_circuits(graph, [size], 200, 0):
                assert (graph.prune(circuit), len(circuit)) == (circuit, size)
        for draw in random_circuits(graph, [1, *sizes], 40, 0):
            assert all(graph.prune(circuit) == circuit for circuit in draw)
        drawn = {circuit for (circuit,) in random_circuits(graph, [2], 200, 0)}
        assert len(drawn) > 10
    first = {edge for draw in random_circuits(hw.Graph(2, 8), [40], 100, 0) for circuit in draw for edge in circuit}
    assert len(first) == 310  # every edge can come


def test_random_circuits_keep_what_was_measured(tree, oracle):
    graph = hw.Graph(2, 8)
    for kind in (ANY, CONNECTED):
        draws = random_circuits(graph, hw.circuit_sizes(graph).values.tolist(), 3, 0, kind)
        here = tree["random"]["faithfulness"].sel(kind=kind, draw=2)
        assert float(here[-2]) == pytest.approx(oracle(graph.prune(draws[2][-2])), abs=1e-4)


def test_the_figures_of_an_independent_trial(words_model):
    """Of issue 19: exact scores of words-2l, 32 prompts of twice 25 tokens."""
    study = hw.CircuitStudy(hw.RepeatedTokens(n=32, length=25, seed=0), draws=1, resamples=20)
    behaviour = kept.Behaviour(words_model, study.task, study.metric, "corrupted")
    scores = hw.edge_scores(words_model, study.task, study.metric)["score"].mean("example", keep_attrs=True)
    curve = kept.curve(behaviour, scores, "share")
    assert float(curve["cpr"]) == pytest.approx(0.926, abs=5e-4)
    assert float(curve["cmd"]) == pytest.approx(0.089, abs=5e-4)
    random = kept.drawn(behaviour, 2, 0).mean("draw").sel(kind=ANY)
    assert float(random["cpr"]) == pytest.approx(0.251, abs=0.01)
    assert float(random["cmd"]) == pytest.approx(0.748, abs=0.01)
    first = hw.Circuit.top(scores, 3)
    assert first == hw.Circuit(["input->a0.h3<v>", "m1->logits", "a0.h3->a1.h1<k>"])


def test_findings_say_the_numbers(tree):
    told = {}
    for one in json.loads(tree.attrs["conclusion"]):
        told.setdefault(one["group"], []).append(one["text"])
    assert [*told] == ["summary", "circuit", "curve", "edges", "nodes", "inclusion", "limits"]
    part, curve = tree["circuit"].to_dataset(), tree["curve"].to_dataset()
    assert f"a circuit of {part.attrs['n']} edges" in told["summary"][0]
    assert f"keeps a share of {float(part['faithfulness']):.2f} (95%: " in told["summary"][0]
    assert f"CPR is {float(curve['cpr']):.3f} (95%: " in told["curve"][0]
    assert f"CMD {float(curve['cmd']):.3f} (95%: " in told["curve"][0]
    assert "of 310 edges are input->a0.h3<v> (" in told["edges"][0]
    assert f"share {float(tree['inclusion']['jaccard']):.2f} of their edges" in told["inclusion"][0]
    assert "so few cannot tell" in told["circuit"][1]


def test_an_unstable_circuit_is_warned_of_in_words(tree):
    other = tree.copy()
    other["inclusion"]["jaccard"] = xr.DataArray(0.5)
    said = [one.text for one in conclude(other) if one.group == "inclusion"]
    assert said[1].startswith("Warning: circuits of ")
    assert "share 0.50 of their edges" in said[1]


def test_means_in_the_place_of_the_corrupted_run(words_model):
    study = hw.CircuitStudy(TASK, source="mean", n=40, draws=1, resamples=2)
    tree = study.run(words_model, False)
    circuit = hw.from_json(tree.attrs["circuit"])
    assert circuit.source == "mean"
    ends = {"empty": hw.Circuit(source="mean"), "circuit": circuit}
    ds = hw.measure(words_model, TASK, ends, "logit_diff")
    empty, here = ds["logit_diff"].mean("example").values
    whole = float(ds["baseline_logit_diff"].sel(run="clean").mean())
    assert float(tree["circuit"]["faithfulness"]) == pytest.approx((here - empty) / (whole - empty), abs=1e-4)
    limits = " ".join(one.text for one in conclude(tree) if one.group == "limits")
    assert "carry means" in limits
    assert "tried_edges" not in tree["circuit"].dims


def test_what_was_verified_of_an_estimate_is_said(words_model):
    study = hw.CircuitStudy(TASK, "loss", estimator="eap-ig", then_exact=20, n=40, draws=1, resamples=2)
    tree = study.run(words_model, False)
    told = {}
    for one in conclude(tree):
        told.setdefault(one.group, []).append(one.text)
    how = "Scored by an estimate (eap-ig, 5 steps), the 20 with the largest estimates exactly"
    assert told["edges"][0].startswith(f"{how}, the largest of 310 edges are input->")
    assert told["edges"][1] in told["summary"]
    assert any(text.startswith("95% intervals over 4 prompts only") for text in told["summary"])
    assert told["edges"][1].startswith("The scores of the 20 edges with the largest estimates are exact.")
    assert any(
        text.startswith("Scores are estimates (eap-ig), but for those that were verified") for text in told["limits"]
    )
    assert float(tree["edges"]["score"].mean("example").max()) > 1  # a loss: above 0 where an edge matters
    assert float(tree["curve"]["cpr"]) > 0.8
    assert hw.CircuitStudy.from_json(tree.attrs["study"]) == study


def test_a_study_is_kept_taken_from_where_it_was_listed_and_repeated(words_model, study, tmp_path, tree):
    stages = []
    first = study.run(words_model, stages.append, out=tmp_path / "circuit.nc")
    assert stages == STAGES
    study.run(words_model, stages.append, out=tmp_path / "circuit.nc")
    assert stages == STAGES
    for name in STAGES:
        assert first[name].to_dataset().drop_attrs().equals(tree[name].to_dataset().drop_attrs()), name
    assert hw.CircuitStudy.from_json(first.attrs["study"]) == study
    found = hw.rerun(tmp_path / "circuit.nc")
    assert found.agrees, str(found)
    assert hw.Results(tmp_path).frame["study"].tolist() == ["CircuitStudy"]
    assert "keeps a share of" in str(hw.summary(tmp_path / "circuit.nc"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"draws": 500}, "it asks for 500 random circuits and holds 3: it contradicts itself"),
        ({"task": {"n": 400}}, "it asks for 400 prompts and holds 4: it contradicts itself"),
        ({"metric": "nothing"}, "there is no metric 'nothing'"),
        ({"more": 1}, "JSON of a CircuitStudy has missing or unknown fields"),
    ],
)
def test_a_file_that_asks_for_more_than_it_holds_is_refused(tree, tmp_path, change, says):
    other = tree.copy()
    declared = json.loads(tree.attrs["study"])
    for name, value in change.items():
        declared[name] = declared[name] | value if isinstance(value, dict) else value
    other.attrs["study"] = json.dumps(declared)
    hw.write_netcdf(other, tmp_path / "other.nc")
    with pytest.raises(ResultError, match=re.escape(says)):
        hw.rerun(tmp_path / "other.nc")


def test_a_circuit_whose_ends_are_wrong_is_refused(words_model, monkeypatch):
    behaviour = kept.Behaviour(words_model, TASK, hw.metrics.logit_diff, "corrupted")
    right = kept.measure

    def wrong(*given, **options):
        ds = right(*given, **options)
        ds["logit_diff"][1] += 0.5
        return ds

    monkeypatch.setattr(kept, "measure", wrong)
    with pytest.raises(ModelError, match=r"the whole circuit has a mean logit_diff of .*the clean run one of"):
        behaviour.of([])


def test_a_plan_prices_every_stage(words_model, study):
    plan = study.plan(words_model, timed=False)
    assert [*plan.stages] == STAGES
    assert plan.edges == 310
    assert plan.circuits["random"] == 2 * 3 * 10
    assert "310 edges, 4 prompts" in str(plan)
    assert plan.stages["random"].forwards > plan.stages["curve"].forwards > 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"task": 3}, "task=3: give a task"),
        ({"others": "x"}, "others='x': give a task"),
        ({"metric": ["loss", "logit_diff"]}, "metric=loss and logit_diff: circuits are judged by one metric"),
        ({"metric": "induction"}, "metric=induction: circuits are judged by one metric of the logits"),
        ({"source": "clean"}, "source='clean': possible are a run such as 'corrupted', and 'mean'"),
        ({"share": 0}, "share=0: a share of the behaviour lies above 0"),
        ({"share": 1.1}, "share=1.1: a share"),
        ({"draws": 0}, "draws, the random circuits of each size, must be 1 or more, got 0"),
        ({"resamples": 1}, "resamples must be 2 or more, got 1"),
        ({"n": 0}, "n must be 1 or more, got 0"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"steps": 3}, "steps=3: estimator='exact' takes none"),
        ({"estimator": "guess"}, "estimator='guess': possible are 'exact', 'eap'"),
        ({"then_exact": 3}, "then_exact=3: all scores of estimator='exact' are exact"),
    ],
)
def test_values_that_are_not_possible_are_refused(given, says):
    with pytest.raises(DeclarationError, match=re.escape(says)):
        hw.CircuitStudy(**({"task": TASK} | given))


def test_what_a_model_or_a_task_lacks_is_refused_before_any_pass(words_model):
    with pytest.raises(DeclarationError, match="n=311: words-2l has 310 edges, so n can be 1 to 310"):
        hw.CircuitStudy(TASK, n=311).run(words_model)
    with pytest.raises(DeclarationError, match="then_exact=311: words-2l has 310 edges"):
        hw.CircuitStudy(TASK, estimator="eap", then_exact=311).run(words_model)
    text = hw.Prompts(["apple banana apple"], answers=["banana"], distractors=["cherry"])
    with pytest.raises(DeclarationError, match="task has no run corrupted, which edges outside of a circuit carry"):
        hw.CircuitStudy(text).run(words_model)
    for ask in (
        hw.CircuitStudy(text).run,
        lambda model: hw.edge_scores(model, text, "logit_diff"),
        lambda model: hw.measure(model, text, hw.Circuit(), "logit_diff"),
        lambda model: hw.measure(model, text, hw.ZeroAblate(hw.Head(0, 1)), "logit_diff", base="corrupted"),
    ):
        with pytest.raises(HeadwiseError, match=re.escape("as in Prompts(..., corrupted=[...])")):
            ask(words_model)
    with pytest.raises(UnknownNameError, match="source='corrupted': the task has no such run, possible is mean; give"):
        hw.edge_scores(words_model, text, "logit_diff", estimator="eap")
    with pytest.raises(DeclarationError, match="does not hold a CircuitStudy"):
        hw.CircuitStudy.from_json('{"type": "Sweep"}')
