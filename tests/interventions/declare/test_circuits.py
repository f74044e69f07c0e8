"""Graphs and circuits as values: which edges there are, which go when pruned, which the largest scores are of."""

import dataclasses
import json
import re
import types

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.interventions.declare.circuits import Edge
from tests.oracles import raw_edges
from tests.oracles.raw_families import random_model
from tests.oracles.raw_hooks import random_gpt2

MODELS = {
    "gpt-2": lambda: random_gpt2(layers=2, heads=3, d_head=4, vocab=20, context=12),
    "grouped": lambda: random_model("llama"),
    "parallel": lambda: random_model("pythia"),
    "one after the other": lambda: random_model("neox, one after the other"),
}


def serial_edges(layers, heads):
    """Counted by hand: 3 H receivers of attention, the MLP and the logits, and the senders before each."""
    return sum((3 * heads + 1) * (1 + n * (heads + 1)) + heads for n in range(layers)) + 1 + layers * (heads + 1)


def scores_of(values, **attrs):
    names = {
        side: ("edge", [text.split("->")[at] for text in values]) for at, side in enumerate(("sender", "receiver"))
    }
    return xr.DataArray(list(values.values()), coords=names, dims="edge", attrs=attrs)


SCORES = {"input->m0": 1.0, "m0->logits": -3.0, "input->a0.h1<k>": -2.0, "a0.h1->logits": 3.0, "input->logits": 0.5}


@pytest.mark.parametrize(("layers", "heads", "edges"), [(12, 12, 32491), (2, 8, 310)])
def test_edges_are_counted_as_mib_counts_them(layers, heads, edges):
    graph = hw.Graph(layers, heads)
    assert len(graph) == edges == serial_edges(layers, heads) == len(set(graph.edges))


@pytest.mark.parametrize("kind", MODELS)
def test_the_graph_of_a_model_has_the_edges_of_its_stream(kind):
    module = MODELS[kind]()
    graph = hw.Graph.of(hw.load(module))
    assert list(graph.edges) == raw_edges.edges(module)
    assert len(graph) == len(graph.edges)
    assert hw.Circuit(reversed(graph.edges)).edges == graph.edges
    assert all(edge in graph for edge in graph.edges)


def test_groups_and_parallel_blocks_have_fewer_edges():
    assert len(hw.Graph(2, 4, kv_heads=2)) == serial_edges(2, 4) - 4 * 1 - 4 * 6
    assert len(hw.Graph(2, 4, parallel=True)) == serial_edges(2, 4) - 2 * 4
    assert ("a0.h1", "m0") in hw.Graph(2, 4)
    assert ("a0.h1", "m0") not in hw.Graph(2, 4, parallel=True)
    assert hw.Graph(2, 4, kv_heads=2).nodes_of("a1.h1<k>") == ("a1.h2", "a1.h3")
    assert hw.Graph(2, 4, kv_heads=2).nodes_of("a1.h1<q>") == ("a1.h1",)


def test_circuits_are_sets_in_forward_order():
    one = hw.Circuit(["m1->logits", ("input", "a0.h3<v>"), "a0.h3->a1.h1<k>"])
    assert one == hw.Circuit(["a0.h3 -> a1.h1<k>", "input->a0.h3<v>", "m1->logits", "m1->logits"])
    assert hash(one) == hash(hw.Circuit(reversed(one.edges)))
    assert list(one) == [Edge("input", "a0.h3<v>"), Edge("a0.h3", "a1.h1<k>"), Edge("m1", "logits")]
    other = hw.Circuit(["m1->logits", "a0.h3->a1.h1<q>"])
    assert (one | other, len(one | other)) == (hw.Circuit([*one, *other]), 4)
    assert one & other == hw.Circuit(["m1->logits"])
    assert (one - other).edges == one.edges[:2]
    assert one ^ other == (one | other) - hw.Circuit(["m1->logits"])
    assert (one <= one, one & other <= one, one <= other, hw.Circuit() <= one) == (True, True, False, True)
    assert "m1->logits" in one
    assert ("m0", "logits") not in one
    assert None not in one
    assert 7 not in hw.Graph(2, 4)
    with pytest.raises(hw.errors.DeclarationError, match="is no edge"):
        assert "a mistyped edge" not in one
    assert hw.Graph(2, 4).nodes(one) == ("input", "a0.h3", "a1.h1", "m1", "logits")
    assert hw.Graph(2, 4, kv_heads=2).nodes(hw.Circuit(["m0->a1.h1<k>"])) == ("m0", "a1.h2", "a1.h3")
    assert len(hw.Circuit()) == 0
    assert not hw.Circuit()
    with pytest.raises(TypeError):
        one | {"m1->logits"}


def test_a_circuit_is_stored_as_json():
    circuit = hw.Circuit(["m1->logits", "input->a0.h3<v>"])
    assert json.loads(hw.to_json(circuit)) == {
        "type": "Circuit",
        "edges": [["input", "a0.h3<v>"], ["m1", "logits"]],
    }
    assert hw.from_json(hw.to_json(circuit)) == circuit
    assert hw.from_json(hw.to_json(hw.Circuit())) == hw.Circuit()


def test_the_repr_is_short():
    assert repr(hw.Circuit(["input->m0"])) == "Circuit(1 edge: input->m0)"
    many = hw.Circuit(hw.Graph(2, 2).edges)
    assert repr(many) == f"Circuit({len(many)} edges: input->a0.h0<q>, input->a0.h1<q>, input->a0.h0<k>, ...)"


@pytest.mark.parametrize(
    ("edge", "says"),
    [
        ("m1->m0", "m1 does not come before m0"),
        ("m0->a0.h1<q>", "does not come before"),
        ("a0.h1->a0.h2<v>", "does not come before"),
        ("a0.h1<q>->m0", "cannot send; possible are input, heads such as a0.h3"),
        ("logits->m0", "cannot send"),
        ("a0.h1->a1.h1", "cannot receive; possible are q, k or v of a head"),
        ("m0->input", "cannot receive"),
        ("a00.h1->logits", "cannot send"),
        ("m0", "is no edge"),
        (("m0", "m1", "m2"), "is no edge"),
        (7, "is no edge"),
    ],
)
def test_what_is_no_edge_is_refused(edge, says):
    with pytest.raises(hw.errors.DeclarationError, match=says):
        hw.Circuit([edge])


def test_patches_of_edges_take_the_edges_of_a_circuit_of_all_positions_and_the_same_source():
    edges = ["m1->logits", "input->a0.h3<v>"]
    same = hw.EdgePatches(edges, source="mean")
    assert same == hw.EdgePatches(hw.Circuit(edges), source="mean")
    assert same == hw.EdgePatches(hw.Circuit(edges, source="mean"), source="mean")
    for circuit in (hw.Circuit(edges, source="mean"), hw.Circuit(edges, positions=[1])):
        with pytest.raises(hw.errors.DeclarationError, match=r"for its edges alone give edges=circuit[.]edges"):
            hw.EdgePatches(circuit)


def test_a_circuit_takes_a_list():
    with pytest.raises(hw.errors.DeclarationError, match="takes a list of edges"):
        hw.Circuit("input->m0")


def test_top_takes_the_largest_change_or_the_worst():
    scores = scores_of(SCORES)
    assert hw.Circuit.top(scores, 0) == hw.Circuit()
    assert hw.Circuit.top(scores, 3) == hw.Circuit(["m0->logits", "a0.h1->logits", "input->a0.h1<k>"])
    worst = hw.Circuit(["m0->logits", "input->a0.h1<k>"])
    assert hw.Circuit.top(scores_of(SCORES, better="higher"), 2, by="signed") == worst
    assert hw.Circuit.top(scores, 2, by="signed", better="higher") == worst
    of_a_loss = scores_of(SCORES, better="lower")
    assert hw.Circuit.top(of_a_loss, 2, by="signed") == hw.Circuit(["a0.h1->logits", "input->m0"])
    assert hw.Circuit.top(of_a_loss, 2, by="signed", better="higher") == worst
    assert hw.Circuit.top(scores, 5) == hw.Circuit(SCORES)
    assert hw.Circuit.top(scores.to_dataset(name="exact"), 3) == hw.Circuit.top(scores, 3)


def test_top_carries_what_the_scores_were_measured_with():
    scores = scores_of(SCORES).assign_attrs(source="mean")
    assert hw.Circuit.top(scores, 1) == hw.Circuit(["a0.h1->logits"], source="mean")
    assert hw.Circuit.top(-scores.expand_dims(example=2).mean("example"), 1).source == "mean"
    assert hw.Circuit.top(scores, 1, source="other").source == "other"


def test_of_equal_scores_the_first_receiver_wins_whatever_the_order_of_the_array():
    edges = hw.Graph(1, 2).edges
    random = np.random.default_rng(0)
    for n in range(len(edges) + 1):
        order = random.permutation(len(edges))
        scores = scores_of({str(edges[at]): 2.0 for at in order})
        assert hw.Circuit.top(scores, n).edges == edges[:n]
        assert hw.Circuit.top(-scores, n, by="signed", better="higher").edges == edges[:n]


@pytest.mark.parametrize(
    ("scores", "more", "says"),
    [
        (scores_of(SCORES).expand_dims(example=3), {}, "have the dim example too; take scores.mean"),
        (scores_of(SCORES | {"m0->logits": np.nan}), {}, "of 5 scores are NaN those of 1 edge: m0->logits"),
        (scores_of(SCORES), {"n": 6}, "n=6: these are scores of 5 edges, so n can be 0 to 5"),
        (scores_of(SCORES), {"n": -1}, "0 or more"),
        (scores_of(SCORES), {"n": 1.5}, "whole number"),
        (scores_of(SCORES), {"by": "size"}, "possible are 'abs' and 'signed'"),
        (scores_of(SCORES).drop_vars("sender"), {}, "with the coordinates sender and receiver"),
        (xr.concat([scores_of(SCORES)] * 2, "edge"), {}, "come more than once"),
        (xr.Dataset({"a": scores_of(SCORES), "b": scores_of(SCORES)}), {}, "this Dataset has a and b; give one"),
        (xr.Dataset(), {}, "none along the dim edge"),
        ([1.0, 2.0], {}, "takes a DataArray"),
        (scores_of(SCORES).astype(str), {}, "takes numbers as scores: these are of the type <U"),
    ],
)
def test_top_refuses(scores, more, says):
    with pytest.raises(hw.errors.DeclarationError, match=says):
        hw.Circuit.top(scores, **{"n": 1, **more})


@pytest.mark.parametrize("kind", MODELS)
def test_pruned_is_what_lies_on_a_way_from_the_input_to_the_logits(kind):
    module = MODELS[kind]()
    graph, random = hw.Graph.of(hw.load(module)), np.random.default_rng(0)
    sizes = []
    for share in (0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.4) * 3:
        circuit = hw.Circuit(edge for edge in graph.edges if random.random() < share)
        found = graph.prune(circuit)
        assert set(found) == raw_edges.pruned(module, circuit.edges)
        assert graph.prune(found) == found
        sizes.append((len(found), len(circuit)))
    assert any(0 < some < whole for some, whole in sizes)
    assert graph.prune(hw.Circuit(graph.edges)) == hw.Circuit(graph.edges)


def test_pruning_by_hand():
    graph = hw.Graph(2, 2)
    fed = ["input->a0.h0<v>", "a0.h0->a1.h1<k>", "a1.h1->logits"]
    loose = ["m0->logits", "input->m1", "a0.h1->m0", "input->a0.h1<q>"]
    assert graph.prune(hw.Circuit([*fed, "m0->logits", "input->m1"])) == hw.Circuit(fed)
    assert graph.prune(hw.Circuit([*fed, *loose])) == hw.Circuit([*fed, "m0->logits", "a0.h1->m0", "input->a0.h1<q>"])
    assert graph.prune(hw.Circuit(fed[1:])) == hw.Circuit()
    grouped = hw.Graph(2, 4, kv_heads=2)
    by_the_group = hw.Circuit(["input->a1.h1<k>", "a1.h3->logits"])
    assert grouped.prune(by_the_group) == by_the_group
    assert grouped.prune(hw.Circuit(["input->a1.h1<k>", "a1.h1->logits"])) == hw.Circuit()


def test_all_edges_between_nodes():
    graph = hw.Graph(2, 2)
    direct = hw.Circuit(["input->logits"])
    assert graph.between([]) == direct
    assert graph.between(["m0"]) == direct | hw.Circuit(["input->m0", "m0->logits"])
    assert len(graph.between(graph.senders)) == len(graph)
    one = graph.between(["a1.h0", "m0"])
    assert one - graph.between(["m0"]) == hw.Circuit(
        [*(f"{sender}->a1.h0<{part}>" for part in "qkv" for sender in ("input", "m0")), "a1.h0->logits"]
    )
    grouped = hw.Graph(1, 4, kv_heads=2)
    assert "input->a0.h1<v>" in grouped.between(["a0.h2"])
    assert "input->a0.h0<v>" not in grouped.between(["a0.h2"])


def test_a_graph_refuses_what_it_has_not():
    graph = hw.Graph(2, 4, kv_heads=2, parallel=True)
    for what, says in (
        (lambda: graph.check(hw.Circuit(["a0.h9->logits"])), "no edge a0.h9->logits in Graph"),
        (lambda: graph.prune(hw.Circuit(["a0.h0->m0"])), "do not send to the MLP of their layer"),
        (lambda: graph.check(hw.Circuit(["input->a0.h2<k>"])), "<k> and <v> to h1"),
        (lambda: graph.senders_of("a2.h0<q>"), "no receiver 'a2.h0<q>'"),
        (lambda: graph.between(["a0.h7"]), "no node a0.h7: possible are a0.h0 to a1.h3"),
        (lambda: graph.check(["input->m0"]), "is no Circuit"),
        (lambda: graph.prune(hw.Circuit(["input->m0"], positions=[3])), "cannot be pruned: at all other positions"),
        (lambda: hw.Graph.of("words-2l"), "takes a model, such as load"),
        (lambda: hw.Graph(0, 2), "layers must be 1 or more"),
        (lambda: hw.Graph(1, 4, kv_heads=3), "kv_heads=3 does not divide heads=4"),
    ):
        with pytest.raises(hw.errors.HeadwiseError, match=says):
            what()


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"normed_after": True}, "a norm between what heads write and the stream"),
        ({"lacks": (("resid_mid", "x"), ("z", "nothing takes it"))}, "that has no z: nothing takes it"),
    ],
)
def test_a_stream_that_is_no_sum_of_heads_and_mlps_has_no_graph(small_model, facts, says):
    shape = dataclasses.replace(small_model.shape, **facts)
    with pytest.raises(hw.errors.DeclarationError, match=says):
        hw.Graph.of(types.SimpleNamespace(shape=shape))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("L0H3->L1H1.k", "a0.h3->a1.h1<k>"),
        ("L0H3->m1", "a0.h3->m1"),
        (("0.3", "1.1.v"), "a0.h3->a1.h1<v>"),
    ],
)
def test_names_of_sites_are_translated_in_what_refuses_them(given, meant):
    with pytest.raises(hw.errors.DeclarationError, match=re.escape(f"is {meant!r} meant?")):
        hw.Circuit([given])
