"""Circuits as interventions: every logit as `raw_edges` makes it, receiver by receiver, in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from tests.oracles import raw_edges
from tests.oracles.raw_families import random_model
from tests.oracles.raw_hooks import random_gpt2
from tests.support.architectures import build

MODELS = {
    "gpt-2": lambda: random_gpt2(layers=2, heads=3, d_head=4, vocab=20, context=20),
    "grouped": lambda: random_model("llama", num_hidden_layers=2),
    "parallel": lambda: random_model("pythia", num_hidden_layers=2),
    "one after the other": lambda: random_model("neox, one after the other"),
}
TASK = hw.RepeatedTokens(n=3, length=5, seed=1)
HEAVY = pytest.mark.heavy
NEAR = {"rtol": 1e-5, "atol": 1e-5}


class Opened:
    """A model, the oracle's copy of it in float64, and the prompts of a task."""

    def __init__(self, module: Any) -> None:
        self.exact = copy.deepcopy(module).double()
        self.model = hw.load(module.eval())
        self.graph = hw.Graph.of(self.model)
        self.runs = {name: torch.tensor(tokens) for name, tokens in TASK.draw(self.model).runs.items()}

    def sent(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each sender writes."""
        with torch.no_grad():
            return dict(raw_edges.forward(self.exact, tokens).sent)

    def means(self) -> dict[str, torch.Tensor]:
        """The same, its mean over the reference draw."""
        tokens = torch.tensor(TASK.reference(self.model).runs["clean"])
        return {name: value.mean(0, keepdim=True) for name, value in self.sent(tokens).items()}

    def logits(self, keep: Any, other: Any, run: str = "clean", fixed: Any = None) -> np.ndarray[Any, Any]:
        """All logits of a circuit."""
        with torch.no_grad():
            return raw_edges.forward(self.exact, self.runs[run], keep, other, fixed).logits.numpy()

    def captured(self, what: Any, base: str = "clean", **options: Any) -> np.ndarray[Any, Any]:
        """The same as headwise has them."""
        return hw.capture(self.model, TASK, "logits", what=what, run=base, **options)["logits"].values

    def some(self, seed: int, share: float = 0.5) -> hw.Circuit:
        """A random circuit."""
        random = np.random.default_rng(seed)
        return hw.Circuit(edge for edge in self.graph.edges if random.random() < share)


@pytest.fixture(params=MODELS)
def opened(request: pytest.FixtureRequest) -> Opened:
    return Opened(MODELS[request.param]())


@pytest.fixture
def gpt2() -> Opened:
    return Opened(MODELS["gpt-2"]())


def by_position(pairs: list[tuple[hw.Circuit, list[int]]], length: int) -> raw_edges.Keep:
    """Which edges are kept where circuits are at some positions each."""

    def keep(sender: str, receiver: str) -> torch.Tensor:
        kept = torch.ones(length, 1, dtype=torch.bool)
        for circuit, positions in pairs:
            kept[positions] = (sender, receiver) in circuit
        return kept

    return keep


def test_circuits_in_one_pass_are_those_of_the_oracle(opened: Opened) -> None:
    circuits = {
        "half": opened.some(0),
        "few": opened.some(1, 0.1),
        "most": opened.some(2, 0.9),
        "one": hw.Circuit([opened.graph.edges[-1]]),
    }
    found, other = opened.captured(circuits), opened.sent(opened.runs["corrupted"])
    for values, circuit in zip(found, circuits.values(), strict=True):
        np.testing.assert_allclose(values, opened.logits(raw_edges.kept_only([*circuit]), other), **NEAR)
    assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_a_pass_leaves_what_the_next_one_reads(opened: Opened, batch_size: int) -> None:
    circuits = {str(seed): opened.some(seed) for seed in range(5)}
    found = opened.captured(circuits, batch_size=batch_size)
    other = opened.sent(opened.runs["corrupted"])
    for values, circuit in zip(found, circuits.values(), strict=True):
        np.testing.assert_allclose(values, opened.logits(raw_edges.kept_only([*circuit]), other), **NEAR)


def test_circuits_of_the_shipped_model_are_those_of_the_oracle_to_what_float32_holds(words_model: hw.Model) -> None:
    task, graph = hw.RepeatedTokens(n=4, length=25, seed=0), hw.Graph.of(words_model)
    exact, random = copy.deepcopy(words_model.module).double(), np.random.default_rng(0)
    clean, corrupted = (torch.tensor(task.draw(words_model).runs[run]) for run in ("clean", "corrupted"))
    circuits = [hw.Circuit(e for e in graph.edges if random.random() < share) for share in (0.02, 0.1, 0.3, 0.6, 0.9)]
    found = hw.capture(words_model, task, "logits", what=circuits)["logits"].values
    with torch.no_grad():
        other = raw_edges.forward(exact, corrupted).sent
        for values, circuit in zip(found, circuits, strict=True):
            wanted = raw_edges.forward(exact, clean, raw_edges.kept_only([*circuit]), other).logits.numpy()
            np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_empty_circuit_is_the_other_run_and_the_whole_one_its_own(opened: Opened) -> None:
    found = opened.captured([hw.Circuit(), hw.Circuit(opened.graph.edges)])
    other = opened.captured(None, base="corrupted")
    np.testing.assert_allclose(found[0], other, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found[1], opened.captured(None), rtol=0, atol=1e-5)


def test_other_edges_can_carry_means_over_the_reference_draw(opened: Opened) -> None:
    circuit = opened.some(3)
    found = opened.captured(hw.Circuit(circuit, source="mean"))
    np.testing.assert_allclose(found, opened.logits(raw_edges.kept_only([*circuit]), opened.means()), **NEAR)


def test_the_run_that_is_intervened_on_can_be_the_corrupted_one(gpt2: Opened) -> None:
    circuit, other = gpt2.some(4), gpt2.sent(gpt2.runs["clean"])
    found = gpt2.captured(hw.Circuit(circuit, source="clean"), base="corrupted")
    np.testing.assert_allclose(found, gpt2.logits(raw_edges.kept_only([*circuit]), other, "corrupted"), **NEAR)


def test_circuits_at_positions_compose_and_keep_all_edges_elsewhere(opened: Opened) -> None:
    early, late = opened.some(5), opened.some(6)
    length = opened.runs["clean"].shape[1]
    places = [[1, 2], [length - 2, length - 1]]
    both = hw.Circuit(early, positions=places[0]) + hw.Circuit(late, positions=[-2, -1])
    keep = by_position([(early, places[0]), (late, places[1])], length)
    found = opened.captured([hw.Circuit(early, positions=places[0]), both])
    other = opened.sent(opened.runs["corrupted"])
    np.testing.assert_allclose(found[1], opened.logits(keep, other), **NEAR)
    np.testing.assert_allclose(found[0], opened.logits(by_position([(early, places[0])], length), other), **NEAR)


def test_circuits_at_positions_can_carry_values_of_two_runs(gpt2: Opened) -> None:
    early, late, length = gpt2.some(7), gpt2.some(8), gpt2.runs["clean"].shape[1]
    places = [[*range(4)], [*range(4, length)]]
    both = hw.Circuit(early, "mean", positions=places[0]) + hw.Circuit(late, positions=places[1])
    means, corrupted = gpt2.means(), gpt2.sent(gpt2.runs["corrupted"])
    first = (torch.arange(length) < 4)[:, None]
    other = {name: torch.where(first, means[name], corrupted[name]) for name in means}
    keep = by_position([(early, places[0]), (late, places[1])], length)
    np.testing.assert_allclose(gpt2.captured(both), gpt2.logits(keep, other), **NEAR)


def test_a_head_and_an_mlp_can_be_changed_beside_a_circuit(gpt2: Opened) -> None:
    circuit, other = gpt2.some(9, 0.7), gpt2.sent(gpt2.runs["corrupted"])
    what = circuit + hw.ZeroAblate(hw.Head(0, 1)) + hw.Patch(hw.Layer(1).mlp_out)
    zeros = torch.zeros_like(other["a0.h1"])
    fixed = {"a0.h1": zeros, "m1": other["m1"]}
    found = gpt2.captured(what)
    np.testing.assert_allclose(found, gpt2.logits(raw_edges.kept_only([*circuit]), other, fixed=fixed), **NEAR)


def test_a_metric_of_scored_positions_is_that_of_the_oracle(opened: Opened) -> None:
    circuits = {"a": opened.some(10), "b": opened.some(11)}
    found = hw.measure(opened.model, TASK, circuits, "loss", batch_size=4)
    other, tokens = opened.sent(opened.runs["corrupted"]), opened.runs["clean"]
    batch = TASK.draw(opened.model)
    for name, circuit in circuits.items():
        logits = torch.tensor(opened.logits(raw_edges.kept_only([*circuit]), other))
        each = -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].numpy()
        wanted = (each * batch.scored[:, :-1]).sum(1) / batch.scored[:, :-1].sum(1)
        np.testing.assert_allclose(found["loss"].sel(condition=name).values, wanted, **NEAR)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (hw.Circuit() + hw.ZeroAblate(hw.Layer(1).resid_pre), "reads a stream of its own: possible beside it are q, k"),
        (hw.Circuit() + hw.PathPatch(hw.Head(0, 1), hw.Head(1, 0).q), "and no paths"),
        (hw.Circuit(["m0->m7"]), "no edge m0->m7 in Graph"),
        (hw.Circuit(source="noise"), "the task has the runs clean"),
        (hw.Circuit(positions=40), "position 40 does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_any_pass(gpt2: Opened, what: Any, said: str) -> None:
    with pytest.raises((DeclarationError, hw.errors.UnknownNameError), match=said):
        hw.plan(gpt2.model, TASK, what, "loss")


def test_what_receivers_do_not_share_is_not_captured(gpt2: Opened) -> None:
    with pytest.raises(DeclarationError, match="reads a stream of its own"):
        hw.capture(gpt2.model, TASK, "L1.resid_pre", what=hw.Circuit())


def test_two_circuits_at_one_position_are_refused() -> None:
    with pytest.raises(DeclarationError, match="two edits of one place"):
        hw.Circuit(positions=[0, 1]) + hw.Circuit(positions=1)


FAMILIES = [
    *("gpt_neo", "gptj", "mistral", "ministral", "qwen2", "qwen3", "gemma", "phi3", "starcoder2", "mixtral"),
    *("qwen2_moe", "qwen3_moe", "gpt_oss", "nemotron"),
]


@pytest.mark.parametrize(
    "family", [name if name in ("gptj", "gemma", "gpt_oss") else pytest.param(name, marks=HEAVY) for name in FAMILIES]
)
def test_in_every_family_no_edges_are_the_other_run_and_all_its_own(family: str) -> None:
    model = hw.load(build(family, 1).eval())
    whole = hw.Circuit(hw.Graph.of(model).edges)
    found = hw.capture(model, TASK, "logits", what=[hw.Circuit(), whole])["logits"].values
    corrupted, clean = (hw.capture(model, TASK, "logits", run=run)["logits"].values for run in ("corrupted", "clean"))
    np.testing.assert_array_equal(found[0], corrupted)
    np.testing.assert_allclose(found[1], clean, rtol=0, atol=1e-5 * clean.std())
    assert np.abs(clean - corrupted).max() > 0.1


@pytest.mark.parametrize(
    "family", [name if name in ("gptj", "gemma", "gpt_oss") else pytest.param(name, marks=HEAVY) for name in FAMILIES]
)
def test_in_every_family_one_edge_is_the_circuit_of_all_others(family: str) -> None:
    """One edge that carries the other run, as a path and as a circuit: made in two ways that share little."""
    model = hw.load(build(family, 1).eval())
    every = hw.Circuit(hw.Graph.of(model).edges)
    drawn = np.random.default_rng(0).choice(len(every), 24, replace=False)
    some = hw.Circuit(every.edges[at] for at in drawn)
    found = hw.measure(model, TASK, hw.EdgePatches(some), "loss", per_position=True)
    wanted = hw.measure(model, TASK, [every - hw.Circuit([edge]) for edge in some], "loss", per_position=True)
    np.testing.assert_allclose(found["loss"].values, wanted["loss"].values, rtol=1e-5, atol=1e-5)
    base = found["baseline_loss"].sel(run="clean")
    assert float(abs(found["loss"] - base).max()) > 1e-3


def test_an_edge_can_carry_means_over_the_reference_draw(opened: Opened) -> None:
    what, means = hw.EdgePatches(source="mean"), opened.means()
    found = hw.capture(opened.model, TASK, "logits at -1", what=what)["logits_at_m1"].values[..., 0, :]
    for edge, values in list(zip(opened.graph.edges, found, strict=True))[::7]:
        kept = opened.logits(lambda *here, edge=edge: here != edge, means)
        np.testing.assert_allclose(values, kept[:, -1], **NEAR)


@pytest.mark.parametrize("estimator", ["eap", "eap-ig", "eap-ig-activations", "atp*", "relp"])
def test_estimates_take_means_as_they_take_a_run(words_model: hw.Model, estimator: str) -> None:
    texts, others = ["apple banana cherry apple"], ["grape banana cherry apple"]
    task = hw.Prompts(texts, corrupted=others, others=others * 2, answers=["banana"], distractors=["grape"])
    of_run, of_means = (
        hw.edge_scores(words_model, task, "logit_diff", source=source, estimator=estimator)["score"].values
        for source in ("corrupted", "mean")
    )
    np.testing.assert_allclose(of_means, of_run, rtol=1e-4, atol=1e-5)
    assert np.abs(of_run).max() > 0.1


@pytest.mark.parametrize("metrics", ["induction", ["logit_diff", "induction"]])
def test_what_heads_attend_to_is_measured_under_a_circuit(words_model: hw.Model, metrics: Any) -> None:
    task, graph = hw.RepeatedTokens(n=3, length=8), hw.Graph.of(words_model)
    what = [hw.Circuit(), hw.Circuit(graph.edges)]
    found = hw.measure(words_model, task, what, metrics)
    other = hw.measure(words_model, task, None, metrics, base="corrupted")
    order = ("layer", "head", "example")
    for at, run in enumerate(("corrupted", "clean")):
        wanted = hw.measure(words_model, task, None, "induction", base=run)["induction"]
        values = found["induction"].isel(condition=at).rename(read_layer="layer", read_head="head")
        np.testing.assert_allclose(values.transpose(*order), wanted.transpose(*order), rtol=0, atol=1e-5)
    assert other["induction"].max() < 0.5 < float(found["induction"].isel(condition=1).max())


@pytest.mark.parametrize("estimator", ["gradient", "integrated"])
def test_circuits_have_no_gradient_estimate(words_model: hw.Model, estimator: str) -> None:
    with pytest.raises(DeclarationError, match="has no gradient estimate"):
        hw.measure(words_model, hw.RepeatedTokens(n=2, length=5), hw.Circuit(), "logit_diff", estimator=estimator)


def test_a_pruned_circuit_carries_what_it_did() -> None:
    circuit = hw.Circuit(["input->a0.h3<v>", "input->m1", "a0.h3->logits"], source="mean")
    assert hw.Graph(2, 4).prune(circuit) == hw.Circuit(["input->a0.h3<v>", "a0.h3->logits"], source="mean")
