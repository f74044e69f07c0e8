"""Pictures of circuits of edges, tested by what they hold."""

from __future__ import annotations

import itertools

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from headwise.studies import plots
from headwise.studies.plots.circuits import bends
from tests.support.elements import labelled, of_type, option

GRAPH = hw.Graph(2, 3)
SCORES = {
    "input->a0.h1<v>": -4.0,
    "input->m0": 0.5,
    "a0.h1->a1.h2<k>": -2.0,
    "m0->a1.h2<k>": 1.0,
    "m0->a1.h2<q>": -1.0,
    "a1.h2->logits": -3.0,
}


def scores_of(values):
    names = {
        side: ("edge", [text.split("->")[at] for text in values]) for at, side in enumerate(("sender", "receiver"))
    }
    attrs = {"long_name": "change in logit difference", "units": "logit"}
    return xr.DataArray(list(values.values()), coords=names, dims="edge", name="exact", attrs=attrs)


def paths(picture):
    return [part for part in of_type(picture, hv.Path) if part.vdims]


def segments(picture):
    return {one["edge"]: part for part in paths(picture) for one in part.data}


def line(picture, edge):
    (found,) = [one for part in paths(picture) for one in part.data if one["edge"] == edge]
    return found


def legend(picture):
    """Labels of the lines of the legend, with their dash, colour and width."""
    entries = [part for part in of_type(picture, hv.Curve) if np.isnan(part.dimension_values(0)).all()]
    return {
        part.label: [option(part, name, "style") for name in ("line_dash", "color", "line_width")] for part in entries
    }


def test_a_circuit_is_drawn_with_an_edge_for_each_of_its_edges():
    drawn = plots.circuit_graph(hw.Circuit(SCORES), scores_of(SCORES))
    found = segments(drawn)
    assert {*found} == {*SCORES}
    assert {edge: line(drawn, edge)["value"] for edge in SCORES} == SCORES
    widths = {edge: line(drawn, edge)["width"] for edge in SCORES}
    assert widths["input->a0.h1<v>"] == 7
    assert widths["m0->a1.h2<k>"] == widths["m0->a1.h2<q>"] == 1 + 6 * 0.25
    colours = {edge: option(part, "color", "style") for edge, part in found.items()}
    assert colours["a0.h1->a1.h2<k>"] == colours["m0->a1.h2<k>"] != colours["m0->a1.h2<q>"]
    assert colours["input->m0"] == colours["a1.h2->logits"]
    dashes = {edge: option(part, "line_dash", "style") for edge, part in found.items()}
    assert {edge for edge, dash in dashes.items() if dash == "dashed"} == {"input->m0", "m0->a1.h2<k>"}
    assert found["input->m0"].vdims[0].pprint_label == "change in logit difference (logit)"


@pytest.mark.parametrize(("better", "against"), [("higher", 1), ("lower", -1), (None, 1)])
def test_edges_that_work_against_the_behaviour_are_dashed_and_the_legend_has_every_reader(better, against):
    scores = scores_of(SCORES)
    drawn = plots.circuit_graph(hw.Circuit(SCORES), scores.assign_attrs({"better": better} if better else {}))
    dashes = {edge: option(part, "line_dash", "style") for edge, part in segments(drawn).items()}
    wanted = {edge for edge, value in SCORES.items() if against * value > 0}
    assert {edge for edge, dash in dashes.items() if dash == "dashed"} == wanted
    said = "dashed: against the behaviour" if better else "dashed: score above 0"
    entries = legend(drawn)
    assert [label for label, (dash, *_) in entries.items() if dash == "dashed"] == [said]
    readers = {label: look for label, look in entries.items() if label != said}
    assert [*readers] == ["read as query", "read as key", "read as value", "by MLP or logits"]
    assert all(width == 5 for *_, width in readers.values())
    assert len({colour for _, colour, _ in readers.values()}) == 4
    edge = segments(drawn)["m0->a1.h2<k>"]
    assert readers["read as key"][1] == option(edge, "color", "style")
    assert not any(part.label for part in paths(drawn))  # else a dashed first edge would dash its entry
    hv.render(drawn, backend="bokeh")


def test_nodes_stand_in_forward_order_from_the_bottom():
    drawn = plots.circuit_graph(hw.Circuit(SCORES))
    heights = {}
    for part in of_type(drawn, hv.Points):
        heights |= dict(zip(part["name"], part["row"], strict=True))
    order = ["input", "a0.h1", "m0", "a1.h2", "logits"]
    assert sorted(heights, key=heights.get) == order
    assert sorted(name for part in of_type(drawn, hv.Labels) for name in part["name"]) == sorted(order)
    assert option(drawn, "yticks") == [(0, "input"), (1, "heads 0"), (2, "MLP 0"), (3, "heads 1"), (4, "logits")]
    read = labelled(drawn, "head")
    counts = dict(zip(read["name"], zip(read["reads"], read["sends"], strict=True), strict=True))
    assert counts == {"a0.h1": (1, 1), "a1.h2": (3, 1)}


def test_an_edge_into_a_shared_key_ends_at_each_head_that_shares_it():
    grouped, circuit = hw.Graph(2, 4, kv_heads=2), hw.Circuit(["m0->a1.h1<k>", "m0->a1.h1<q>"])
    drawn = plots.circuit_graph(circuit, graph=grouped)
    heads = labelled(drawn, "head")
    assert list(heads["name"]) == ["a1.h1", "a1.h2", "a1.h3"]
    assert list(heads["reads"]) == [1, 1, 1]
    assert sum(one["edge"] == "m0->a1.h1<k>" for part in paths(drawn) for one in part.data) == 2
    alone = plots.circuit_graph(circuit)
    assert list(labelled(alone, "head")["reads"]) == [2]
    with pytest.raises(DeclarationError, match=r"no edge m0->a1[.]h1<k>"):
        plots.circuit_graph(circuit, graph=hw.Graph(2, 4, kv_heads=1))


def test_of_many_edges_the_strongest_are_drawn_and_the_title_says_so():
    random = np.random.default_rng(0)
    values = {str(edge): float(value) for edge, value in zip(GRAPH.edges, random.normal(size=len(GRAPH)), strict=True)}
    each = scores_of(values).expand_dims(example=2) * xr.DataArray([0.5, 1.5], dims="example")
    drawn = plots.circuit_graph(hw.Circuit(GRAPH.edges), each, most=10, title="all")
    assert {*segments(drawn)} == {*sorted(values, key=lambda edge: -abs(values[edge]))[:10]}
    assert option(drawn, "title") == f"all: the 10 strongest of {len(GRAPH)} edges"


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: plots.circuit_graph(hw.Circuit()), "this circuit has none"),
        (lambda: plots.circuit_graph(hw.Circuit(SCORES), most=0), "most, the number of edges that are drawn"),
        (lambda: plots.circuit_graph(["input->m0"]), "draws a Circuit, got list"),
        (lambda: plots.circuit_graph(hw.Circuit(SCORES), xr.DataArray([1.0], dims="edge")), "with the coordinates"),
        (lambda: plots.circuit_curve(curve().expand_dims(draw=2)), "select one of the others first"),
        (lambda: plots.edge_inclusion(included().isel(edge=slice(0, 0))), "none is"),
    ],
)
def test_pictures_of_circuits_refuse(draw, says):
    with pytest.raises(DeclarationError, match=says):
        draw()


def curve(seed=0, level=0.95, by="share", **dims):
    random, sizes = np.random.default_rng(seed), hw.circuit_sizes(GRAPH, by)
    empty, model = random.normal(0, 0.1, 6), random.normal(4, 0.1, 6)
    kept = random.uniform(0, 1, (*map(len, dims.values()), len(sizes), 1))
    coords = {**sizes.coords, **dims}
    measured = xr.DataArray(empty + kept * (model - empty), coords=coords, dims=(*dims, by, "example"))
    return hw.circuit_curve(measured, *(xr.DataArray(one, dims="example") for one in (empty, model)), level=level)


@pytest.mark.parametrize("by", ["share", "edges"])
def test_a_curve_has_its_intervals_and_random_circuits_behind_it(by):
    ds, random = curve(by=by, selection=["signed", "abs"]), curve(1, None, by, draw=range(3))
    drawn = plots.circuit_curve(ds, random)
    for name, selection in (("signed selection", "signed"), ("absolute selection", "abs")):
        (part,) = [one for one in of_type(drawn, hv.Points) if one.label == name]
        np.testing.assert_allclose(part["value"], ds["faithfulness"].sel(selection=selection))
        np.testing.assert_allclose(part["low"], ds["faithfulness_low"].sel(selection=selection))
        np.testing.assert_allclose(part["at"], ds[by])
        np.testing.assert_allclose(part["edges"], ds["edges"])
        (behind,) = [one for one in of_type(drawn, hv.Curve) if one.label == name and not isinstance(one, hv.Area)]
        np.testing.assert_allclose(behind.dimension_values(1), part["value"])
    curves = [part for part in of_type(drawn, hv.Curve) if not isinstance(part, hv.Area)]
    assert len(curves) == 3 + 2
    for number in range(3):
        np.testing.assert_allclose(curves[number].dimension_values(1), random["faithfulness"].isel(draw=number))
    assert len(of_type(drawn, hv.Area)) == 2
    areas = f"CPR {float(ds['cpr']):.3f}, CMD {float(ds['cmd']):.3f}"  # those of MIB are over its shares
    assert option(drawn, "title") == (areas if by == "share" else "by number of edges")
    assert len(of_type(plots.circuit_curve(curve(by=by)), hv.Area)) == 1
    with pytest.raises(UnknownNameError, match="no cmd"):
        plots.circuit_curve(ds.drop_vars("cmd"))


def included():
    values = scores_of(SCORES)
    ds = xr.Dataset({"inclusion": ("edge", [1.0, 0.0, 0.9, 0.4, 0.2, 1.0])}, coords=values.coords)
    return ds.assign(in_circuit=("edge", [True, False, True, False, False, True]), jaccard=0.73)


def test_inclusion_names_the_edges_that_are_ever_chosen():
    drawn = plots.edge_inclusion(included())
    inside, others = labelled(drawn, "in the circuit of all prompts"), labelled(drawn, "not in it")
    assert dict(zip(inside["edge"], inside["value"], strict=True)) == {
        "input->a0.h1<v>": 1.0,
        "a1.h2->logits": 1.0,
        "a0.h1->a1.h2<k>": 0.9,
    }
    assert list(others["edge"]) == ["m0->a1.h2<k>", "m0->a1.h2<q>"]
    assert list(others["row"]) == [-3, -4]
    assert option(drawn, "title") == "Jaccard overlap 0.73"
    few = plots.edge_inclusion(included(), top=2)
    assert option(few, "title") == "Jaccard overlap 0.73: 2 of 5 edges that are ever chosen"
    assert sum(len(part) for part in of_type(few, hv.Points)) == 2


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.circuit_graph(hw.Circuit(SCORES), scores_of(SCORES)),
        lambda: plots.circuit_curve(curve(selection=["signed", "abs"]), curve(1, None, draw=range(2))),
        lambda: plots.edge_inclusion(included()),
    ],
)
def test_pictures_of_circuits_render(draw):
    assert hv.render(draw(), backend="bokeh").renderers


def test_the_picture_of_edges_and_of_faithfulness_is_chosen():
    large = hw.Graph(2, 6)
    random = np.random.default_rng(0)
    values = {str(edge): float(value) for edge, value in zip(large.edges, random.normal(size=len(large)), strict=True)}
    each = scores_of(values).expand_dims(example=2)
    assert option(plots.picture(each), "title") == f"the 100 strongest of {len(large)} edges"
    assert {*segments(plots.picture(each))} == {*sorted(values, key=lambda edge: -abs(values[edge]))[:100]}
    assert {*segments(plots.picture(scores_of(SCORES)))} == {*SCORES}
    often = plots.picture(included(), "inclusion")
    assert list(labelled(often, "not in it")["edge"]) == ["m0->a1.h2<k>", "m0->a1.h2<q>"]
    ds = curve(selection=["signed", "abs"])
    (signed,) = [
        one for one in of_type(plots.picture(ds, "faithfulness"), hv.Points) if one.label == "signed selection"
    ]
    assert signed["value"] == pytest.approx(ds["faithfulness"].sel(selection="signed").values)
    alone = plots.picture(ds, "faithfulness", selection="abs")
    assert [len(part) for part in of_type(alone, hv.Points)] == [10]


def test_edges_end_at_their_nodes_and_pass_by_all_others():
    values = {**SCORES, "input->a1.h2<v>": -1.0, "input->logits": 0.3, "a0.h1->logits": -0.2}
    drawn = plots.circuit_graph(hw.Circuit(values), scores_of(values))
    at = {}
    for part in of_type(drawn, hv.Points):
        at |= {name: place for name, *place in zip(part["name"], part["at"], part["row"], strict=True)}
    pixels = np.array([bends.ACROSS, bends.UP])
    for edge in values:
        one = line(drawn, edge)
        way = np.stack([one["x"], one["y"]], axis=-1)
        sender, receiver = edge.split("->")
        receiver = receiver.partition("<")[0]
        for end, node in ((way[0], sender), (way[-1], receiver)):
            assert np.linalg.norm((end - at[node]) * pixels) < bends.RADIUS
        fine = np.concatenate([np.linspace(a, b, 50) for a, b in itertools.pairwise(way)])
        for node in {*at} - {sender, receiver}:
            assert np.linalg.norm((fine - at[node]) * pixels, axis=-1).min() > bends.RADIUS + one["width"] / 2, (
                edge,
                node,
            )


def test_a_curve_keeps_its_legend_with_many_random_circuits_and_its_axis_shows_all_intervals():
    ds = curve(selection=["signed", "abs"])
    ds["faithfulness_high"] = ds["faithfulness_high"] + 1.5
    drawn = plots.circuit_curve(ds, curve(1, None, draw=range(40)))
    entries = {item.label["value"]: item.renderers for item in hv.render(drawn, backend="bokeh").legend[0].items}
    assert {*entries} == {"random circuits", "signed selection", "absolute selection"}
    dashes = {name: {str(getattr(one.glyph, "line_dash", [])) for one in some} for name, some in entries.items()}
    assert dashes["signed selection"] == {"[]"}
    assert "[6]" in dashes["absolute selection"]
    low, high = option(drawn, "ylim")
    assert low < float(ds["faithfulness_low"].min())
    assert high > float(ds["faithfulness_high"].max())


def test_the_result_of_edge_scores_is_drawn_as_it_is():
    scores = scores_of(SCORES)
    ds = xr.Dataset({"baseline_logit_diff": ("example", [1.0, 2.0]), "score": scores.expand_dims(example=2)})
    assert {*segments(plots.circuit_graph(hw.Circuit(SCORES), ds))} == {*SCORES}
    assert line(plots.circuit_graph(hw.Circuit(SCORES), ds), "input->m0")["value"] == 0.5
    with pytest.raises(DeclarationError, match="circuit_graph takes one score of each edge"):
        plots.circuit_graph(hw.Circuit(SCORES), ds.assign(other=scores))
