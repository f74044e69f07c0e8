"""Exact scores of edges: against plain torch, their labels, their file, what is refused, and what they cost."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import AutoModelForCausalLM

import headwise as hw
from headwise.errors import AdviceWarning, DeclarationError, UnknownNameError
from headwise.interventions.base.shape import Group, Shape
from headwise.interventions.declare.codec import from_json, to_json
from headwise.interventions.models.locate import SHIPPED
from headwise.interventions.plan.cost import block_flops, logits_flops
from headwise.interventions.plan.plan import make_plan
from tests.oracles import raw_edges
from tests.oracles.raw_families import random_model
from tests.oracles.raw_hooks import random_gpt2
from tests.support.workers import Here

MODELS = {
    "gpt-2": lambda: random_gpt2(layers=3, heads=3, d_head=4, vocab=40, context=24),
    "grouped": lambda: random_model("llama", num_hidden_layers=2),
    "parallel": lambda: random_model("pythia", num_hidden_layers=2),
    "one after the other": lambda: random_model("neox, one after the other"),
}
TASK = hw.RepeatedTokens(n=3, length=6, seed=1)
WORDS = hw.RepeatedTokens(n=32, length=25, seed=0)
EDGES = ["input->a0.h3<v>", "a0.h3->a1.h1<k>", "m0->m1", "a1.h1->m1", "m1->logits"]


def wanted(module, batch, source="corrupted", base="clean"):
    """Scores by the oracle, in float64: edge to (example,)."""
    scored = np.flatnonzero(batch.scored[0])
    targets, distractors = (torch.tensor(ids[:, scored, None]) for ids in (batch.targets, batch.distractors))

    def logit_diff(logits):
        here = logits[:, scored]
        return (here.gather(-1, targets) - here.gather(-1, distractors))[..., 0].mean(1)

    tokens, other = (torch.tensor(batch.runs[run]) for run in (base, source))
    found = raw_edges.exact_scores(module.double(), tokens, other, logit_diff)
    return {edge: value.numpy() for edge, value in found.items()}


def equal(scores, edges):
    """All edges of the oracle, in its order, by the same numbers."""
    names = list(zip(scores["sender"].values, scores["receiver"].values, strict=True))
    assert names == list(edges)
    exact = np.stack([*edges.values()])
    np.testing.assert_allclose(scores["score"].values, exact, atol=1e-5 * max(1, np.abs(exact).max()), rtol=0)
    assert np.abs(exact).max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_exact_scores_equal_plain_torch(name):
    module = MODELS[name]()
    model = hw.load(module)
    batch = TASK.draw(model)
    equal(hw.edge_scores(model, TASK, "logit_diff"), wanted(MODELS[name](), batch))
    back = hw.edge_scores(model, TASK, "logit_diff", base="corrupted", source="clean", batch_size=5)
    equal(back, wanted(MODELS[name](), batch, "clean", "corrupted"))


def test_the_key_of_a_group_is_one_receiver():
    model = hw.load(MODELS["grouped"]())
    scores = hw.edge_scores(model, TASK, "loss")
    keys = [name for name in scores["receiver"].values if name.startswith("a1") and name.endswith("<k>")]
    assert len(set(keys)) == model.shape.kv_heads < model.shape.heads
    # one key-value head by a path patch, and all heads that read it change with it
    path = hw.PathPatch(hw.Layer(0).mlp_out, hw.Head(1, 0).k, through_mlps=False)
    change = hw.effect(hw.measure(model, TASK, path, "loss"), "loss")
    np.testing.assert_array_equal(scores["score"].sel(edge="m0->a1.h0<k>"), change)


@pytest.mark.heavy
def test_the_shipped_model_equals_plain_torch(words_model):
    module = AutoModelForCausalLM.from_pretrained(str(SHIPPED / "words-2l")).eval()
    equal(hw.edge_scores(words_model, WORDS, "logit_diff"), wanted(module, WORDS.draw(words_model)))


def test_the_largest_edges_of_the_shipped_model(words_model):
    scores = hw.edge_scores(words_model, WORDS, hw.metrics.logit_diff)
    assert (scores.sizes["edge"], scores.sizes["example"]) == (310, 32) == (len(hw.Graph.of(words_model)), WORDS.n)
    mean = scores.mean("example")
    largest = mean["score"].isel(edge=np.argsort(-abs(mean["score"].values))[:3])
    assert largest["edge"].values.tolist() == ["input->a0.h3<v>", "m1->logits", "a0.h3->a1.h1<k>"]
    assert mean["score"].attrs["better"] == "higher"
    assert mean["score"].attrs["units"] == "logit"
    circuit = hw.Circuit.top(mean, n=3)
    assert circuit == hw.Circuit.top(scores["score"].mean("example"), n=3) == hw.Circuit(largest["edge"].values)
    assert hw.Circuit.top(mean, n=1, by="signed") == hw.Circuit(["input->a0.h3<v>"])
    assert {**scores["baseline_logit_diff"].sizes} == {"run": 2, "example": 32}
    assert scores.attrs["estimator"] == scores["score"].attrs["estimator"] == "exact"


def test_of_a_loss_more_is_worse(words_model):
    scores = hw.edge_scores(words_model, TASK, "loss", edges=EDGES).mean("example")
    assert scores["score"].attrs["better"] == "lower"
    assert float(scores["score"].max()) > 1
    assert hw.Circuit.top(scores, 1, by="signed") == hw.Circuit(["input->a0.h3<v>"])


def test_prompts_of_different_lengths_are_scored_as_if_alone(words_model):
    texts = ["apple banana cherry apple", "tiger lion tiger"]
    corrupted = ["grape banana cherry apple", "zebra lion tiger"]
    options = {"answers": ["banana", "lion"], "distractors": ["grape", "zebra"]}
    together = hw.edge_scores(words_model, hw.Prompts(texts, corrupted=corrupted, **options), "logit_diff")
    for at in range(2):
        one = {name: [values[at]] for name, values in {"corrupted": corrupted, **options}.items()}
        alone = hw.edge_scores(words_model, hw.Prompts([texts[at]], **one), "logit_diff")
        np.testing.assert_allclose(together["score"][:, at], alone["score"][:, 0], atol=2e-5)
    assert float(abs(together["score"]).max()) > 0.1


def test_some_edges_are_the_same_as_among_all(words_model):
    every = hw.edge_scores(words_model, TASK, "logit_diff")
    some = hw.edge_scores(words_model, TASK, "logit_diff", edges=EDGES)
    np.testing.assert_allclose(some["score"], every["score"].sel(edge=some["edge"]), atol=1e-5)
    ds = hw.measure(words_model, TASK, hw.EdgePatches(EDGES), ["logit_diff", "loss"], per_position=True)
    assert ds["loss"].dims == ("edge", "example", "position")
    assert ds["sender"].dims == ("edge",)
    np.testing.assert_allclose(hw.effect(ds, "logit_diff").mean("position"), some["score"], atol=1e-5)


def test_a_server_and_workers_give_the_same(words_model, server):
    wanted = hw.edge_scores(words_model, TASK, "logit_diff")
    there = hw.load("words-2l", remote=True)
    found = hw.edge_scores(there, TASK, "logit_diff", progress=False)
    np.testing.assert_allclose(found["score"], wanted["score"], atol=1e-5)
    assert found["receiver"].equals(wanted["receiver"])
    xr.testing.assert_equal(hw.edge_scores(words_model, TASK, "logit_diff", executor=Here()), wanted)


def test_a_file_says_what_it_holds(words_model, tmp_path):
    scores = hw.edge_scores(words_model, TASK, "logit_diff", out=tmp_path / "edges.nc")
    words = "change of logit_diff of the clean run by each of 310 edges that carries the corrupted run, exact"
    assert f"Scores of edges of words-2l what {words}" in " ".join(str(hw.summary(scores)).split())
    assert "edge_scores" in str(hw.Results(tmp_path))
    page = hw.write_report(scores, tmp_path / "edges.html").read_text()
    assert "edge" in page
    advised = hw.measure(words_model, TASK, hw.EdgePatches(EDGES), "logit_diff")
    assert "1 condition" not in str(hw.summary(advised))
    assert "5 conditions (edge 5) of EdgePatches on the clean run" in str(hw.summary(advised))
    with pytest.warns(AdviceWarning, match="measured by prob alone"):
        hw.edge_scores(words_model, TASK, "prob", edges=EDGES)


def test_as_a_value():
    every, some = hw.EdgePatches(), hw.EdgePatches(hw.Circuit(EDGES), source="other")
    assert some == hw.EdgePatches(EDGES[::-1], "other") != every == hw.EdgePatches()
    assert len({some, every}) == 2
    for one in (every, some):
        assert from_json(to_json(one)) == one == hw.from_json(hw.to_json(one))
    assert to_json(every) == '{"type": "EdgePatches", "edges": null, "source": "corrupted"}'
    sweep = hw.Sweep(TASK, some, "loss")
    assert hw.Sweep.from_json(sweep.to_json()) == sweep


def test_a_file_holds_all_and_is_made_again(words_model, tmp_path):
    out = tmp_path / "edges.nc"
    made = hw.edge_scores(words_model, TASK, "logit_diff", edges=EDGES, out=out)
    stored = hw.open_result(out)
    assert stored.equals(made)
    assert stored.attrs["edge_scores"] == '{"estimator": "exact"}'
    created = out.stat().st_mtime_ns
    again = hw.edge_scores(words_model, TASK, "logit_diff", edges=EDGES, out=out)
    assert again.equals(made)
    assert out.stat().st_mtime_ns == created
    other = hw.edge_scores(words_model, TASK, "logit_diff", edges=EDGES[:2], out=out)
    assert other.sizes["edge"] == 2
    assert out.stat().st_mtime_ns > created
    assert json.loads(other.attrs["interventions"])["edges"]["type"] == "Circuit"


@pytest.mark.parametrize("edges", [None, EDGES])
def test_a_file_is_repeated(words_model, tmp_path, edges):
    for name, make in (
        ("scores", lambda out: hw.edge_scores(words_model, TASK, "logit_diff", edges=edges, base="clean", out=out)),
        ("measured", lambda out: hw.measure(words_model, TASK, hw.EdgePatches(edges), "logit_diff", out=out)),
    ):
        make(tmp_path / f"{name}.nc")
        found = hw.rerun(tmp_path / f"{name}.nc")
        assert found.agrees
        assert found.largest <= 1e-6
        assert ("score" if name == "scores" else "logit_diff") in found.differences


REFUSED = {
    "estimator='guess': possible are": {"estimator": "guess"},
    "steps=5: estimator='exact' takes none": {"steps": 5},
    "then_exact=3: all scores of estimator='exact' are exact": {"then_exact": 3},
    "no edge m7->logits in Graph": {"edges": ["m7->logits"]},
    "EdgePatches of no edge": {"edges": []},
    "m1->m0: m1 does not come before m0": {"edges": ["m1->m0"]},
    "source='dirty': the task has no such run, possible are corrupted and mean": {"source": "dirty"},
    "source=3": {"source": 3},
    "induction is no metric of logits": {"metric": "induction"},
    "edge_scores takes one metric": {"metric": ["loss", "logit_diff"]},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_before_any_pass(words_model, text, monkeypatch):
    monkeypatch.setattr(type(words_model.backend), "run_plan", None)
    given = {"metric": "logit_diff"} | REFUSED[text]
    with pytest.raises((DeclarationError, UnknownNameError)) as error:
        hw.edge_scores(words_model, TASK, given.pop("metric"), **given)
    assert text in str(error.value)


def test_models_without_edges_are_refused():
    gemma = hw.load(random_model("gemma2"))
    with pytest.raises(DeclarationError, match="edges are not defined for a model that has a norm between"):
        hw.edge_scores(gemma, TASK, "loss")
    parallel, path = hw.load(MODELS["parallel"]()), hw.PathPatch(hw.Head(0, 1), hw.Layer(0).mlp_in, through_mlps=False)
    with pytest.raises(DeclarationError, match="from L0H1 z to L0 mlp_in: attention and MLP of a layer of GPTNeoX"):
        hw.measure(parallel, TASK, path, "loss")
    with pytest.raises(DeclarationError, match="no direct path from L1 mlp_out to L1 mlp_in"):
        hw.PathPatch(hw.Layer(1).mlp_out, hw.Layer(1).mlp_in)


def planned(shape, length=50, rows=32):
    group = Group(tuple(range(rows)), length, tuple(range(length)))
    patches = hw.EdgePatches().patches(type("Counts", (), {"shape": shape})())
    runs = ["clean", "corrupted"]
    options = {"groups": [group], "runs": runs, "base": "clean", "columns": 1}
    return make_plan([[one] for one in patches], model="counts", shape=shape, **options)


@pytest.mark.parametrize(
    ("shape", "edges", "share"),
    [(Shape(2, 8, 64, 8, 256, 800, 128), 310, 0.37), (Shape(12, 12, 768, 64, 3072, 50257, 1024), 32491, 0.34)],
    ids=["words-2l", "GPT-2 small"],
)
def test_an_edge_costs_no_more_than_its_share_of_the_blocks(shape, edges, share):
    plan = planned(shape)
    assert len(plan.conditions) == edges
    blocks = shape.layers * block_flops(shape, 32, 50, 50)
    passes = plan.cost().passes - edges * logits_flops(shape, 32, 50, 1)
    assert 0.9 * share < round(passes / (edges * blocks), 2) <= share
    assert f"counts: {edges} conditions" in str(plan)


def test_a_model_says_what_its_edges_cost(words_model):
    plan = hw.plan(words_model, WORDS, hw.EdgePatches(), "logit_diff", timed=False)
    assert len(plan.conditions) == 310
    assert 0.05 < plan.cost().share < 0.2
    assert "310 conditions on 32 prompts" in str(plan)
    assert "mlp_in" in str(plan)
