"""Estimates of edge scores: against plain torch, on a linear model, one sign, chunks, servers, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions.models.locate import SHIPPED
from headwise.interventions.run import edge_estimates
from headwise.metrics import kl
from tests.laws.test_raw_edges import linear
from tests.oracles import raw_edge_estimates, raw_edges
from tests.oracles.raw_families import random_model
from tests.oracles.raw_hooks import random_gpt2

MODELS = {
    "gpt-2": lambda: random_gpt2(layers=3, heads=3, d_head=4, vocab=40, context=24),
    "grouped": lambda: random_model("llama", num_hidden_layers=2),
    "parallel": lambda: random_model("pythia", num_hidden_layers=2),
    "one after the other": lambda: random_model("neox, one after the other"),
}
TASK = hw.RepeatedTokens(n=3, length=6, seed=1)
WORDS = hw.RepeatedTokens(n=32, length=25, seed=0)
STEPS = 3
ESTIMATORS = ("eap", "eap-ig", "eap-ig-activations", "atp*", "relp")


def shares(steps):
    return [(step + 0.5) / steps for step in range(steps)]


def oracle(estimator, module, tokens, other, score, steps=STEPS):
    """Estimates in float64: edge to (example,)."""
    with torch.enable_grad():
        if estimator == "atp*":
            return raw_edge_estimates.atp_star_scores(module, tokens, other, score)
        if estimator == "relp":
            return raw_edge_estimates.relp_scores(module, tokens, other, score)
        some = [1.0] if estimator == "eap" else shares(steps)
        at = "activations" if estimator == "eap-ig-activations" else "inputs"
        return raw_edges.estimated_scores(module, tokens, other, score, some, at)


def of_batch(batch):
    """The mean logit difference over scored positions, of each example."""
    scored = np.flatnonzero(batch.scored[0])
    targets, distractors = (torch.tensor(ids[:, scored, None]) for ids in (batch.targets, batch.distractors))

    def logit_diff(logits):
        here = logits[:, scored]
        return (here.gather(-1, targets) - here.gather(-1, distractors))[..., 0].mean(1)

    return logit_diff


def measured(model, task, estimator, metric="logit_diff", edges=None, steps=STEPS, **options):
    """Estimated changes, (edge, example)."""
    what = hw.EdgePatches(edges, options.pop("source", "corrupted"))
    ds = hw.measure(model, task, what, metric, estimator=estimator, steps=steps, **options)
    return hw.effect(ds, str(metric)).transpose("edge", "example")


def equal(found, wanted):
    names = list(zip(found["sender"].values, found["receiver"].values, strict=True))
    assert names == list(wanted)
    numbers = np.stack([value.detach().numpy() for value in wanted.values()])
    np.testing.assert_allclose(found.values, numbers, atol=1e-5 * max(1, np.abs(numbers).max()), rtol=0)
    assert np.abs(numbers).max() > 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", MODELS)
def test_estimates_equal_plain_torch(name, estimator):
    model = hw.load(MODELS[name]())
    batch = TASK.draw(model)
    clean, corrupted = (torch.tensor(batch.runs[run]) for run in ("clean", "corrupted"))
    wanted = oracle(estimator, MODELS[name]().double(), clean, corrupted, of_batch(batch))
    equal(measured(model, TASK, estimator), wanted)


def test_the_other_way_round(words_model):
    batch = TASK.draw(words_model)
    clean, corrupted = (torch.tensor(batch.runs[run]) for run in ("clean", "corrupted"))
    module = AutoModelForCausalLM.from_pretrained(str(SHIPPED / "words-2l")).double().eval()
    for estimator in ("eap-ig", "atp*"):
        wanted = oracle(estimator, module, corrupted, clean, of_batch(batch))
        equal(measured(words_model, TASK, estimator, base="corrupted", source="clean"), wanted)


def test_on_a_linear_model_estimates_are_exact_with_their_sign():
    model = hw.load(linear(random_gpt2(layers=2, heads=3, d_head=4, vocab=40, context=24)))
    exact = measured(model, TASK, "exact", check=False)  # which sees that these are no norms
    assert float(np.abs(exact).max()) > 0.1
    runs = hw.measure(model, TASK, None, "logit_diff", runs="all", check=False)["baseline_logit_diff"]
    rounding = 1e-6 * float(np.abs(runs).max())  # without norms, logits are large
    for estimator in ("eap", "eap-ig"):
        np.testing.assert_allclose(measured(model, TASK, estimator, check=False), exact, atol=rounding)
    into_logits = exact["receiver"] == "logits"
    star = measured(model, TASK, "atp*", check=False)
    np.testing.assert_allclose(star[into_logits], exact[into_logits], atol=rounding)
    # what all senders change at the logits is the whole difference of the runs
    both = runs.sel(run="corrupted", drop=True) - runs.sel(run="clean", drop=True)
    np.testing.assert_allclose(exact[into_logits].sum("edge"), both, atol=10 * rounding)


def test_prompts_of_different_lengths_are_estimated_as_if_alone(words_model):
    texts = ["apple banana cherry apple", "tiger lion tiger"]
    corrupted = ["grape banana cherry apple", "zebra lion tiger"]
    options = {"answers": ["banana", "lion"], "distractors": ["grape", "zebra"]}
    for estimator in ESTIMATORS:
        together = measured(words_model, hw.Prompts(texts, corrupted=corrupted, **options), estimator)
        for at in range(2):
            one = {name: [values[at]] for name, values in {"corrupted": corrupted, **options}.items()}
            alone = measured(words_model, hw.Prompts([texts[at]], **one), estimator)
            np.testing.assert_allclose(together[:, at], alone[:, 0], atol=2e-5)
        assert float(abs(together).max()) > 0.1


@pytest.mark.parametrize("estimator", ["eap-ig", "atp*"])
def test_chunks_and_lack_of_memory_change_no_number(words_model, estimator, monkeypatch):
    from headwise.interventions.run import gradients

    whole, sizes, real = measured(words_model, TASK, estimator), [], gradients.gradients.edge_estimates
    some = {"eap-ig": ["m1->logits", "input->a0.h3<v>"], "atp*": ["a0.h3->a1.h1<k>"]}[estimator]
    few = measured(words_model, TASK, estimator, edges=some)
    np.testing.assert_allclose(few, whole.sel(edge=few["edge"]), atol=1e-6)

    def scarce(root, parts, cache, spec, device):
        sizes.append(len(cache["tokens"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(root, parts, cache, spec | {"rows": 1}, device)

    monkeypatch.setattr(gradients.gradients, "edge_estimates", scarce)
    np.testing.assert_allclose(measured(words_model, TASK, estimator), whole, atol=1e-5)
    assert sizes == [3, 1, 2, 1, 1]


def test_what_is_held_at_a_time_follows_the_memory(words_model):
    plan = hw.plan(words_model, WORDS, hw.EdgePatches(), "logit_diff", timed=False)
    from dataclasses import replace

    small = [replace(plan, budget=2**size) for size in (20, 24, 28, 40)]
    counts = [len(list(edge_estimates.chunks_of_edges(one, "atp*"))) for one in small]
    assert counts[0] == 32 > counts[1] >= counts[2] >= counts[3] == 1
    spans = [chunk.examples for chunk in edge_estimates.chunks_of_edges(small[1], "eap")]
    assert [start for start, _ in spans[1:]] == [stop for _, stop in spans[:-1]]
    assert spans[-1][1] == 32
    rows = [edge_estimates.described_edges(one, plan.chunks[0], "atp*", None)["rows"] for one in small]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]


def test_a_metric_that_is_least_at_the_base_run_needs_steps(words_model):
    found = measured(words_model, TASK, "eap-ig", "kl")
    assert float(found.max()) > 0.01
    for estimator in ("eap", "atp*", "relp"):
        with pytest.raises(DeclarationError, match="kl is least at the base run, where its slope is 0"):
            measured(words_model, TASK, estimator, kl.name)


REFUSED = {
    "estimator='eap' estimates scores of edges: possible of interventions are exact, gradient": (
        {"what": hw.ZeroAblate(hw.Head(0, 1)), "estimator": "eap"}
    ),
    "estimator='gradient' estimates interventions: possible of edges are exact, eap": {"estimator": "gradient"},
    "estimator='eap_ig': possible are exact, eap, eap-ig": {"estimator": "eap_ig"},
    "steps, of the eap-ig estimate,": {"estimator": "eap-ig", "steps": 0},
    "induction has no gradient estimate": {"estimator": "eap", "metrics": "induction"},
    "accuracy has no gradient estimate": {"estimator": "eap", "metrics": "accuracy"},
    "per_position=True: estimator='relp' gives the mean": {"estimator": "relp", "per_position": True},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_before_any_pass(words_model, text, monkeypatch):
    monkeypatch.setattr(type(words_model.backend), "run_estimate", None)
    given = {"what": hw.EdgePatches(), "metrics": "logit_diff"} | REFUSED[text]
    with pytest.raises(DeclarationError) as error:
        hw.measure(words_model, TASK, given.pop("what"), given.pop("metrics"), **given)
    assert text in str(error.value)


@pytest.mark.heavy
def test_the_shipped_model_gives_the_figures_of_an_independent_trial(words_model):
    """CPR of signed selections and CMD of absolute ones, by plain torch, of circuits of our estimates."""
    module = AutoModelForCausalLM.from_pretrained(str(SHIPPED / "words-2l")).double().eval().requires_grad_(False)
    batch = WORDS.draw(words_model)
    clean, corrupted = (torch.tensor(batch.runs[run]) for run in ("clean", "corrupted"))
    for estimator, cpr, cmd in (("eap-ig", 0.738, 0.110), ("eap", 0.275, 0.152)):
        found = measured(words_model, WORDS, estimator, steps=5).mean("example")
        names = zip(found["sender"].values, found["receiver"].values, strict=True)
        means = dict(zip(names, found.values.tolist(), strict=True))
        curves = [
            raw_edges.faithfulness(module, clean, corrupted, of_batch(batch), means, absolute)
            for absolute in (False, True)
        ]
        assert raw_edges.areas(raw_edges.SHARES, curves[0])[0] == pytest.approx(cpr, abs=0.0005)
        assert raw_edges.areas(raw_edges.SHARES, curves[1])[1] == pytest.approx(cmd, abs=0.0005)
