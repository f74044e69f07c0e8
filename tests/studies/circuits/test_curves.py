"""Labelled scores of circuits: curves and areas of what was measured, edges that are chosen again, files of MIB."""

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

import headwise as hw
from headwise.errors import AdviceWarning, DeclarationError, ResultError
from headwise.metrics.intervals import ratio_interval
from tests.oracles import raw_edges
from tests.oracles.raw_families import random_model
from tests.oracles.raw_hooks import random_gpt2

GRAPH = hw.Graph(2, 8)


def measured(seed=0, examples=8, by="share", **dims):
    """A metric of circuits that grow, and of the empty circuit and the whole model."""
    random, sizes = np.random.default_rng(seed), hw.circuit_sizes(GRAPH, by)
    empty, gap = random.normal(1, 0.3, examples), random.normal(5, 0.5, examples)
    kept = random.uniform(0, 1.2, (*map(len, dims.values()), len(sizes), 1))
    values = empty + gap * kept + random.normal(0, 0.2, (*kept.shape[:-1], examples))
    values[..., -1, :] = empty + gap
    coords = {**sizes.coords, **dims}
    array = xr.DataArray(values, coords=coords, dims=(*dims, by, "example"), name="logit_diff")
    return array, *(xr.DataArray(one, dims="example") for one in (empty, empty + gap))


def test_a_curve_is_a_ratio_of_means_and_its_areas_are_sums():
    values, empty, model = measured()
    ds = hw.circuit_curve(values, empty, model)
    gap = float(model.mean() - empty.mean())
    wanted = [(float(values[n].mean()) - float(empty.mean())) / gap for n in range(10)]
    assert ds["faithfulness"].values == pytest.approx(wanted)
    cpr, cmd = raw_edges.areas(raw_edges.SHARES, wanted)
    assert (float(ds["cpr"]), float(ds["cmd"])) == pytest.approx((cpr, cmd))
    log = np.log(raw_edges.SHARES)
    cpr, cmd = raw_edges.areas((log - log[0]) / (log[-1] - log[0]), wanted)
    assert (float(ds["cpr_log"]), float(ds["cmd_log"])) == pytest.approx((cpr, cmd))
    assert ds["edges"].values.tolist() == [0, 0, 1, 3, 6, 15, 31, 62, 155, 310]
    low, high = ratio_interval(values.values - empty.values, model.values - empty.values)
    assert ds["faithfulness_low"].values == pytest.approx(low)
    assert ds["faithfulness_high"].values == pytest.approx(high)
    for name in ("cpr", "cmd", "cpr_log", "cmd_log"):
        assert float(ds[f"{name}_low"]) < float(ds[name]) < float(ds[f"{name}_high"])
    without = hw.circuit_curve(values, empty, model, level=None)
    assert without.equals(ds.drop_vars([name for name in ds if name.endswith(("_low", "_high"))]))


def test_the_area_of_a_ratio_has_the_interval_of_one_ratio():
    """Faithfulness is linear in what was measured, so the area under it is one ratio of means."""
    values, empty, model = measured(seed=4)
    ds = hw.circuit_curve(values, empty, model)
    change, shares = values.values - empty.values, np.array(raw_edges.SHARES)
    area = (np.diff(shares)[:, None] * (change[1:] + change[:-1]) / 2).sum(0)
    low, high = ratio_interval(area, model.values - empty.values)
    assert (float(ds["cpr_low"]), float(ds["cpr_high"])) == pytest.approx((float(low), float(high)))


def test_cpr_is_of_the_signed_selection_and_cmd_of_the_absolute_one():
    values, empty, model = measured(draw=[0, 1, 2], selection=["abs", "signed"])
    both = hw.circuit_curve(values, empty, model)
    assert both["cpr"].dims == both["cmd_low"].dims == ("draw",)
    assert both["faithfulness"].dims == ("draw", "selection", "share")
    for draw in range(3):
        signed, absolute = (
            hw.circuit_curve(values.isel(draw=draw).sel(selection=one), empty, model) for one in ("signed", "abs")
        )
        assert float(both["cpr"][draw]) == float(signed["cpr"])
        assert float(both["cmd"][draw]) == float(absolute["cmd"])
        assert float(both["cmd_log_high"][draw]) == float(absolute["cmd_log_high"])


def test_over_numbers_of_edges_the_share_is_that_of_all():
    values, empty, model = measured(by="edges")
    ds = hw.circuit_curve(values, empty, model)
    shares = [n / 310 for n in (1, 2, 5, 10, 20, 50, 100, 200, 310)]
    cpr, cmd = raw_edges.areas(shares, ds["faithfulness"].values.tolist())
    assert (float(ds["cpr"]), float(ds["cmd"])) == pytest.approx((cpr, cmd))
    assert "from a share of 0.00323 to 1" in ds["cpr"].attrs["long_name"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, e, w: (m, e, e), "both have a mean of"),
        (lambda m, e, w: (m.drop_vars("share"), e, w), "coordinates share and edges: this has the dims share"),
        (lambda m, e, w: (m.mean("example"), e, w), "takes what was measured with the dims"),
        (lambda m, e, w: (m, e[:3], w), "takes empty of the same 8 prompts, with the dim example: it has example 3"),
        (lambda m, e, w: (m, e, w.mean()), "takes model of the same 8 prompts"),
        (lambda m, e, w: (m.to_dataset(), e, w), "takes measured as a DataArray, got Dataset"),
        (lambda m, e, w: (m, 0.0, w), "takes empty as a DataArray, got float"),
        (lambda m, e, w: (m[::-1], e, w), "shares that rise"),
        (lambda m, e, w: (m[:-1], e, w), "shares that rise from above 0 to 1"),
        (lambda m, e, w: (m.expand_dims(selection=["abs"]), e, w), "takes the selections 'signed' and 'abs'"),
    ],
)
def test_curves_refuse(change, says):
    with pytest.raises(DeclarationError, match=says):
        hw.circuit_curve(*change(*measured()))


@pytest.mark.parametrize("kind", ["gpt-2", "grouped", "parallel"])
def test_scores_circuits_and_areas_are_those_of_a_direct_computation(kind):
    """From scores of edges to CPR and CMD, with `raw_edges` in the place of the model that runs circuits."""
    made = {
        "gpt-2": lambda: random_gpt2(layers=2, heads=2, d_head=4, vocab=20, context=12),
        "grouped": lambda: random_model("llama", num_hidden_layers=2),
        "parallel": lambda: random_model("pythia", num_hidden_layers=2),
    }
    module = made[kind]().double()
    graph, random = hw.Graph.of(hw.load(module)), np.random.default_rng(0)
    clean, corrupted = (torch.tensor(random.integers(0, 20, (4, 6))) for _ in range(2))

    def score(logits):
        return logits[:, 3:, 1].mean(1) - logits[:, 3:, 2].mean(1)

    exact = raw_edges.exact_scores(module, clean, corrupted, score)
    names = {side: ("edge", [getattr(edge, side) for edge in graph.edges]) for side in ("sender", "receiver")}
    values = np.stack([exact[edge].numpy() for edge in graph.edges])
    scores = xr.DataArray(values, coords=names, dims=("edge", "example")).mean("example")
    with torch.no_grad():
        other = raw_edges.forward(module, corrupted).sent

    def run(circuit):
        return raw_edges.measured(module, clean, score, circuit.edges, other).numpy()

    sizes = hw.circuit_sizes(graph)
    curves = [
        [run(graph.prune(hw.Circuit.top(scores, n, by, "higher"))) for n in sizes.values] for by in ("signed", "abs")
    ]
    coords = {**sizes.coords, "selection": ["signed", "abs"]}
    measured = xr.DataArray(curves, coords=coords, dims=("selection", "share", "example"))
    empty, model = (xr.DataArray(run(one), dims="example") for one in (hw.Circuit(), hw.Circuit(graph.edges)))
    ds = hw.circuit_curve(measured, empty, model)
    mean = {edge: float(value.mean()) for edge, value in exact.items()}
    for at, absolute in enumerate((False, True)):
        wanted = raw_edges.faithfulness(module, clean, corrupted, score, mean, absolute)
        assert ds["faithfulness"].values[at] == pytest.approx(wanted, abs=1e-9)
        found = float(ds["cmd"] if absolute else ds["cpr"])
        assert found == pytest.approx(raw_edges.areas(raw_edges.SHARES, wanted)[at], abs=1e-9)
    assert (ds["faithfulness"].values[:, 5:9] != 0).any()


def test_sizes_are_by_share_or_by_number():
    with pytest.raises(DeclarationError, match="possible are 'share' and 'edges'"):
        hw.circuit_sizes(GRAPH, by="size")
    with pytest.raises(DeclarationError, match="takes a Graph, such as"):
        hw.circuit_sizes(310)


# --- inclusion -------------------------------------------------------------------------------------------------------


def edge_scores(seed=0, noise=0.5, examples=6, graph=GRAPH):
    random = np.random.default_rng(seed)
    values = random.normal(0, 1, (len(graph), 1)) + random.normal(0, noise, (len(graph), examples))
    names = {side: ("edge", [getattr(edge, side) for edge in graph.edges]) for side in ("sender", "receiver")}
    return xr.DataArray(values, coords=names, dims=("edge", "example"))


@pytest.mark.parametrize("by", ["abs", "signed"])
def test_inclusion_is_how_often_top_takes_an_edge(by):
    scores, draws = edge_scores(noise=1.5, graph=hw.Graph(1, 2)), 30
    scores.attrs["better"] = "lower"
    with pytest.warns(AdviceWarning, match=r"share 0\.\d\d of their edges .* depends on the 6 prompts"):
        found = hw.edge_inclusion(scores.isel(edge=slice(None, None, -1)), 4, by, resamples=draws, seed=3)
    counts = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=draws)
    circuits = []
    for row in counts:
        again = np.repeat(np.arange(6), row)
        circuits.append(hw.Circuit.top(scores.isel(example=again).mean("example", keep_attrs=True), 4, by))
    names = list(zip(found["sender"].values, found["receiver"].values, strict=True))
    assert names == [tuple(edge) for edge in hw.Graph(1, 2).edges]
    for at, name in enumerate(names):
        assert float(found["inclusion"][at]) == pytest.approx(sum(name in one for one in circuits) / draws)
    overlaps = [len(a & b) / len(a | b) for a, b in itertools.combinations(circuits, 2)]
    assert float(found["jaccard"]) == pytest.approx(sum(overlaps) / len(overlaps))
    chosen = hw.Circuit.top(scores.mean("example", keep_attrs=True), 4, by)
    assert {name for name, inside in zip(names, found["in_circuit"].values, strict=True) if inside} == set(chosen)


def test_equal_scores_do_not_pass_for_sure():
    graph, n = hw.Graph(2, 8), 20
    nothing = edge_scores(examples=4, graph=graph) * 0
    with pytest.warns(AdviceWarning, match="which edges are in depends on"):
        found = hw.edge_inclusion(nothing, n, resamples=400)
    both = np.arange(n + 1)
    by_chance = float((stats.hypergeom(310, n, n).pmf(both) * both / (2 * n - both)).sum())
    assert float(found["jaccard"]) == pytest.approx(by_chance, abs=2e-3)
    assert float(found["inclusion"].max()) < 0.15
    some = nothing.copy()
    some[:5] = 1.0  # as sure as can be: the other 15 are any
    with pytest.warns(AdviceWarning):
        found = hw.edge_inclusion(some, n, resamples=400)
    assert (found["inclusion"].values >= 1).sum() == 5


def test_stable_circuits_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hw.edge_inclusion(edge_scores(noise=0.001), 20)
    assert float(found["jaccard"]) > 0.95
    assert float(found["inclusion"].sum()) == pytest.approx(20)


@pytest.mark.parametrize(
    ("scores", "n", "says"),
    [
        (edge_scores().mean("example"), 3, "takes a DataArray with the dims edge and example: this has edge"),
        (edge_scores(examples=1), 3, "needs two or more"),
        (edge_scores(), 311, "n can be 0 to 310"),
        (edge_scores().where(edge_scores() > -2), 3, "scores are NaN"),
    ],
)
def test_inclusion_refuses(scores, n, says):
    with pytest.raises(DeclarationError, match=says):
        hw.edge_inclusion(scores, n)


# --- files of MIB ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small():
    return hw.load(random_gpt2(layers=2, heads=3, d_head=4, vocab=20, context=12))


def test_a_file_of_mib_is_read_and_written(tmp_path, small):
    graph = hw.Graph.of(small)
    scores = edge_scores(graph=graph).mean("example")
    circuit = hw.Circuit.top(scores, 12)
    path = hw.write_mib(tmp_path / "one.json", small, circuit, scores.isel(edge=slice(None, None, -1)))
    data = json.loads(path.read_text())
    assert data["cfg"] == {"n_layers": 2, "n_heads": 3, "parallel_attn_mlp": False, "d_model": 12}
    assert {*data["edges"]} == {*map(str, graph.edges)}
    for edge, value in zip(graph.edges, scores.values, strict=True):
        assert data["edges"][str(edge)] == {"score": value, "in_graph": edge in circuit}
    assert {*data["nodes"]} == {*graph.senders, "logits"}
    alive = {*graph.nodes(graph.prune(circuit)), "logits"}
    assert {name for name, node in data["nodes"].items() if node["in_graph"]} == alive
    again = hw.read_mib(path)
    assert (again.graph, again.circuit) == (graph, circuit)
    np.testing.assert_array_equal(again.scores.values, scores.values)
    without = hw.read_mib(hw.write_mib(tmp_path / "two.json", small, circuit))
    assert hw.Circuit.top(-without.scores, len(circuit), by="signed", better="higher") == circuit


def test_a_file_of_mib_is_written_from_a_dataset_and_refuses_what_it_cannot_say(tmp_path, small):
    scores = edge_scores(graph=hw.Graph.of(small)).mean("example")
    circuit = hw.Circuit.top(scores, 12)
    path = hw.write_mib(tmp_path / "one.json", small, circuit, -scores.to_dataset(name="score"))
    np.testing.assert_array_equal(hw.read_mib(path).scores.values, -scores.values)
    for given, more, says in (
        (hw.Circuit(circuit, positions=[1]), scores, "hold circuits of all positions"),
        (circuit, scores.where(scores < scores.max(), np.inf), "no finite one, of 1 edges"),
        (circuit, scores.isel(edge=slice(3)), r"of \d+ edges, such as"),
    ):
        with pytest.raises(DeclarationError, match=says):
            hw.write_mib(tmp_path / "two.json", small, given, more)
    assert not (tmp_path / "two.json").exists()


def test_a_file_written_by_hand_is_read(tmp_path):
    edges = {"input->a0.h0<q>": {"score": 0.5, "in_graph": True}, "m0->logits": {"in_graph": False}}
    cfg = {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": True, "d_model": 8}
    path = tmp_path / "hand.json"
    path.write_text(json.dumps({"cfg": cfg, "nodes": {"input": {"in_graph": True}}, "edges": edges}))
    graph, circuit, scores = hw.read_mib(path)
    assert graph == hw.Graph(1, 2, parallel=True)
    assert circuit == hw.Circuit(["input->a0.h0<q>"])
    assert scores.values[0] == 0.5
    assert np.isnan(scores.values[1:]).all()


CFG = {"n_layers": 1, "n_heads": 2}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"cfg": CFG, "edges": {}}, "is no circuit of MIB: that has cfg, nodes and edges, this has cfg and edges"),
        ([1], "this has list"),
        ({"cfg": {"n_layers": 1}, "nodes": {}, "edges": {}}, "cfg has no 'n_heads'"),
        ({"cfg": CFG | {"n_heads": 0}, "nodes": {}, "edges": {}}, "heads must be 1 or more"),
        ({"cfg": CFG, "nodes": {}, "edges": {"m7->logits": {}}}, "has edges that .* has not: m7->logits"),
        ({"cfg": CFG, "nodes": {"m0": {"neurons": [True]}}, "edges": {}}, "circuit of neurons"),
        ({"cfg": CFG, "nodes": {}, "edges": {"m0->logits": {"score": "high"}}}, "is 'high', no number"),
    ],
)
def test_what_is_no_file_of_mib_is_refused(tmp_path, data, says):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(DeclarationError, match=says):
        hw.read_mib(path)


def test_files_that_cannot_be_read_or_written(tmp_path, small):
    with pytest.raises(ResultError, match="cannot read"):
        hw.read_mib(tmp_path / "none.json")
    with pytest.raises(ResultError, match="cannot write"):
        hw.write_mib(tmp_path / "none" / "one.json", small, hw.Circuit())
    grouped = hw.load(random_model("llama"))
    with pytest.raises(DeclarationError, match=r"the 4 heads of .* share 2"):
        hw.write_mib(tmp_path / "one.json", grouped, hw.Circuit())
    with pytest.raises(DeclarationError, match=r"no edge a0[.]h9->logits"):
        hw.write_mib(tmp_path / "one.json", small, hw.Circuit(["a0.h9->logits"]))
    some = edge_scores(graph=hw.Graph.of(small)).mean("example")[1:]
    with pytest.raises(DeclarationError, match=r"no score, or no finite one, of 1 edges, such as input->a0[.]h0<q>"):
        hw.write_mib(tmp_path / "one.json", small, hw.Circuit(), some)
