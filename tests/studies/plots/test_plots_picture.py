"""The picture chosen for a variable, and the pictures of any axes: grids, graphs, ranks, curves."""

from __future__ import annotations

import holoviews as hv
import numpy as np
import pytest
import xarray as xr
from scipy import stats

from headwise.errors import DeclarationError, UnknownNameError
from headwise.studies import plots
from tests.support.elements import option

OF_1_AND_3 = stats.t.interval(0.95, 1, 2.0, 1.0)
"""The interval of the mean of 1 and 3."""
PAIR = ("sender_layer", "sender_head", "receiver_layer", "receiver_head")


def parts(element, kind):
    return [part for part in element if type(part) is kind]


def held(element, *names):
    """Rows of an element, as a set."""
    return set(zip(*(element[name] for name in names), strict=True))


@pytest.fixture
def ablated():
    """Ablating head h of layer l costs (10 l + h) times 1, 2 for zero and mean, on a base of 3; two examples."""
    cost = np.array([[0.0, 1.0], [10.0, 11.0]])
    loss = np.stack([3 + cost, 3 + 2 * cost])[..., None] + np.array([-0.5, 0.5])
    return xr.Dataset(
        {
            "loss": (("ablation", "layer", "head", "example"), loss, {"long_name": "loss", "units": "nat"}),
            "baseline_loss": (("run", "example"), [[2.5, 3.5], [9.0, 9.0]]),
            "score": (("layer", "head"), cost),
            "role": (("layer", "head"), np.full((2, 2), "other")),
        },
        coords={"ablation": ["zero", "mean"], "run": ["clean", "corrupted"], "layer": [0, 1], "head": [0, 1]},
        attrs={"base": "clean"},
    )


def test_a_measured_metric_is_drawn_as_its_effect_at_what_was_selected(ablated):
    drawn = plots.picture(ablated, "loss", ablation="mean")
    assert isinstance(drawn, hv.HeatMap)
    assert held(drawn, "name", "value") == {("L0H0", 0.0), ("L0H1", 2.0), ("L1H0", 20.0), ("L1H1", 22.0)}
    assert option(drawn, "title") == "ablation mean"
    assert drawn.vdims[0].pprint_label == "change in loss (nat)"
    low, high = option(drawn, "clim")
    assert low == -high


def test_values_of_a_command_line_select(ablated):
    text = plots.picture(ablated, "loss", ablation="zero", layer="1")
    assert option(text, "title") == "ablation zero, layer 1"
    (points,) = parts(text, hv.Points)
    assert list(zip(points["name"], points["value"], strict=True)) == [("head 1", 11.0), ("head 0", 10.0)]
    assert option(plots.picture(ablated, "loss", ablation="zero", layer=1), "title") == "ablation zero, layer 1"
    steps = xr.Dataset({"loss": (("step", "layer", "head"), np.ones((2, 1, 1)))}, coords={"step": [0.0, 0.5]})
    assert option(plots.picture(steps, "loss", step="0.50"), "title") == "step 0.5"


def test_what_must_be_selected_is_said_with_what_is_possible(ablated):
    says = (
        "loss has ablation, layer, head and example: select ablation, zero or mean, or all for one grid each; on the "
    )
    says += "command line --select ablation=zero"
    with pytest.raises(DeclarationError, match=says):
        plots.picture(ablated, "loss")
    grids = plots.picture(ablated, "loss", ablation="all")
    assert [option(panel, "title") for panel in grids] == ["zero", "mean"]
    assert {option(panel, "clim") for panel in grids} == {(-22.0, 22.0)}
    with pytest.raises(UnknownNameError, match="no ablation 'zap': possible are zero or mean"):
        plots.picture(ablated, "loss", ablation="zap")
    with pytest.raises(UnknownNameError, match="loss has no 'step' to select from: it has ablation, layer"):
        plots.picture(ablated, "loss", step=1)
    with pytest.raises(UnknownNameError, match="no variable 'los': there are loss, baseline_loss, score and role"):
        plots.picture(ablated, "los")
    with pytest.raises(UnknownNameError, match="name a variable: there are"):
        plots.picture(ablated)
    with pytest.raises(DeclarationError, match="role holds text"):
        plots.picture(ablated, "role")
    with pytest.raises(DeclarationError, match="the single number 11: there is nothing"):
        plots.picture(ablated, "score", layer=1, head=1)
    with pytest.raises(DeclarationError, match="got ndarray"):
        plots.picture(np.zeros(3), "x")


def test_a_tree_is_asked_by_its_path(ablated):
    tree = xr.DataTree.from_dict({"/ablation": ablated, "/other": ablated[["score"]]})
    assert held(plots.picture(tree, "ablation/score"), "name", "value") >= {("L1H1", 11.0)}
    assert option(plots.picture(tree, "loss", ablation="zero"), "title") == "ablation zero"
    with pytest.raises(UnknownNameError, match="in several groups: ablation/score and other/score"):
        plots.picture(tree, "score")
    with pytest.raises(UnknownNameError, match="no group 'nowhere': there are ablation and other"):
        plots.picture(tree, "nowhere/score")
    with pytest.raises(UnknownNameError, match="'other/loss': there are other/score"):
        plots.picture(tree, "other/loss")


def dataset(name="value", coords=None, **sizes):
    values = np.arange(float(np.prod(list(sizes.values())))).reshape(*sizes.values())
    return xr.Dataset({name: (tuple(sizes), values)}, coords=coords or {})


@pytest.mark.parametrize(
    ("ds", "kind", "axes"),
    [
        (dataset(layer=2, head=3, example=2), hv.HeatMap, ["head", "layer"]),
        (dataset(read_layer=2, read_head=3), hv.HeatMap, ["head", "layer"]),
        (dataset(layer=2, position=3), hv.HeatMap, ["position", "layer"]),
        (dataset(condition=3, position=4, coords={"condition": list("abc")}), hv.HeatMap, ["position", "condition"]),
        (dataset(run=2, position=4, example=2), hv.Overlay, ["position", "value"]),
        (dataset(example=4), hv.Overlay, ["example", "value"]),
        (dataset(step=4, coords={"step": [1, 10, 100, 1000]}), hv.Overlay, ["step of training", "value"]),
        (dataset(condition=3, coords={"condition": ["a", "b", "c"]}), hv.Overlay, ["value", "row"]),
        (dataset(query=3, key=3), hv.Overlay, ["key", "query"]),
        (dataset("L1H2_pattern", example=2, query=3, key=3), hv.Overlay, ["key", "query"]),
        (dataset(component=3, layer=2, head=2), hv.Layout, ["head", "layer"]),
        (dataset(sender_layer=2, sender_head=2, receiver_layer=2, receiver_head=2), hv.HeatMap, ["sender_at"]),
    ],
)
def test_dims_choose_the_picture(ds, kind, axes):
    drawn = plots.picture(ds)
    assert type(drawn) is kind
    first = next(iter(drawn)) if kind is hv.Layout else drawn
    found = (
        [parts(first, element) for element in (hv.HeatMap, hv.Points, hv.Curve)] if kind is hv.Overlay else [[first]]
    )
    (element, *_) = next(one for one in found if one)
    labels = [dim.name if isinstance(element, hv.HeatMap) else dim.label for dim in element.dimensions()]
    assert labels[: len(axes)] == axes
    hv.render(drawn, backend="bokeh")


def test_long_patterns_are_drawn_without_a_strip():
    drawn = plots.picture(xr.Dataset({"pattern": (("query", "key"), np.eye(200))}))
    assert len(parts(drawn, hv.HeatMap)) == 1
    assert not parts(drawn, hv.Labels)


def test_composition_of_a_study_asks_for_the_kind():
    values = np.full((3, 2, 1, 2, 1), np.nan)
    values[:, 0, 0, 1, 0] = [0.1, 0.2, 0.3]
    ds = xr.Dataset(
        {"composition": (("kind", *PAIR), values), "floor_mean": ("kind", [0.1] * 3), "floor_sd": ("kind", [0.05] * 3)},
        coords={"kind": ["q", "k", "v"]},
    )
    with pytest.raises(DeclarationError, match="select kind, q, k or v"):
        plots.picture(ds, "composition")
    drawn = plots.picture(ds, "composition", kind="k")
    assert held(drawn, "sender", "receiver", "score") == {("L0H0", "L1H0", 0.2)}
    assert drawn["value"][0] == pytest.approx(2.0)
    assert drawn.vdims[0].label == "K-composition above random weights"


def test_layer_by_position_writes_the_tokens_that_all_examples_share():
    values = xr.DataArray(
        [[[1.0, -2.0], [3.0, 5.0]], [[3.0, -4.0], [5.0, 7.0]]],
        dims=("example", "layer", "position"),
        coords={"token": (("example", "position"), [[" a", "b"], [" a", "b"]])},
    )
    drawn = plots.layer_by_position(values)
    assert held(drawn, "layer", "position", "value") == {(0, 0, 2.0), (0, 1, -3.0), (1, 0, 4.0), (1, 1, 6.0)}
    assert option(drawn, "clim") == (-6.0, 6.0)
    assert option(drawn, "xticks") == [(0, "a"), (1, "b")]
    assert option(drawn, "ylim") == (-0.5, 1.5)
    differ = values.assign_coords(token=(("example", "position"), [["a", "b"], ["c", "d"]]))
    assert option(plots.layer_by_position(differ), "xlabel") == "position"


def test_many_positions_are_drawn_in_blocks_that_keep_the_strongest():
    values = np.zeros((3, 1024))
    values[1, 700], values[1, 703], values[2, 0] = -5.0, 4.0, 1.0
    drawn = plots.layer_by_position(xr.DataArray(values, dims=("layer", "position"), name="effect_loss"))
    assert len(drawn) == 3 * 147  # blocks of 7
    assert sorted(value for value in drawn["value"] if value) == [-5.0, 1.0]
    at = int(np.argmin(drawn["value"]))
    assert (drawn["y_label"][at], drawn["x_label"][at]) == ("1", "700 to 706")
    assert option(drawn, "xticks") == 10  # Bokeh chooses that many places


def graph_of(values, **floor):
    table = np.full((2, 2, 2, 2), np.nan)
    table[0, :, 1, :] = values
    return xr.Dataset({"composition": (PAIR, table)} | floor)


def test_the_graph_has_an_edge_for_each_pair_beyond_random_weights():
    ds = graph_of([[0.5, 0.1], [0.2, 0.4]], floor_mean=0.1, floor_sd=0.05)
    roles = xr.DataArray([["previous-token", "other"], ["induction", "other"]], dims=("layer", "head"))
    drawn = plots.composition_graph(ds, roles=roles)
    (edges,) = parts(drawn, hv.Segments)
    found = {
        (s, r): (v, w) for s, r, v, w in zip(*(edges[n] for n in ("sender", "receiver", "value", "width")), strict=True)
    }
    assert set(found) == {("L0H0", "L1H0"), ("L0H1", "L1H1")}  # 0.2 is not more than two deviations above
    assert found["L0H0", "L1H0"] == (pytest.approx(8.0), pytest.approx(7.0))
    assert found["L0H1", "L1H1"][0] == pytest.approx(6.0)
    assert 1.0 < found["L0H1", "L1H1"][1] < 7.0
    assert list(edges["value"]) == sorted(edges["value"])  # the strongest is drawn last, on top
    ends = {(x0, y0, x1, y1) for x0, y0, x1, y1 in edges.array([0, 1, 2, 3])}
    assert ends == {(0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 1.0, 1.0)}
    points = {part.label: set(part["name"]) for part in parts(drawn, hv.Points)}
    assert points == {"previous-token": {"L0H0"}, "induction": {"L1H0"}, "other": {"L0H1", "L1H1"}}
    assert [set(labels["name"]) for labels in parts(drawn, hv.Labels)] == [{"L0H0", "L0H1"}, {"L1H0", "L1H1"}]
    only = plots.composition_graph(ds, senders=["L0H1"])
    assert list(parts(only, hv.Segments)[0]["receiver"]) == ["L1H1"]
    assert len(parts(plots.composition_graph(ds, top=1), hv.Segments)[0]) == 1


def test_the_graph_of_bare_scores_and_of_none_beyond_random():
    bare = plots.composition_graph(graph_of([[0.5, 0.1], [0.2, 0.4]])["composition"])
    assert len(parts(bare, hv.Segments)[0]) == 4
    none = plots.composition_graph(graph_of([[0.1] * 2] * 2, floor_mean=0.1, floor_sd=0.05), title="K")
    assert len(parts(none, hv.Segments)[0]) == 0
    assert option(none, "title") == "K: no pair is above random weights"
    hv.render(none, backend="bokeh")


def test_the_graph_of_a_large_model_draws_the_heads_with_edges():
    rng = np.random.default_rng(0)
    table = np.full((12, 12, 12, 12), np.nan)
    for sender in range(12):
        for receiver in range(sender + 1, 12):
            table[sender, :, receiver, :] = rng.uniform(0, 1, (12, 12))
    drawn = plots.composition_graph(xr.DataArray(table, dims=PAIR), top=20)
    (edges,) = parts(drawn, hv.Segments)
    assert sorted(edges["score"]) == sorted(np.sort(table[np.isfinite(table)])[-20:])
    (points,) = parts(drawn, hv.Points)
    assert set(points["name"]) == {*edges["sender"], *edges["receiver"]}
    assert (edges["y0"] < edges["y1"]).all()
    hv.render(drawn, backend="bokeh")


def test_ranked_conditions_are_in_order_with_intervals():
    values = xr.DataArray(
        [[1.0, 3.0], [-6.0, -6.0], [0.5, 0.5]],
        dims=("condition", "example"),
        coords={"condition": ["pair", "x" * 80, "prev"]},
        name="effect_loss",
        attrs={"units": "nat"},
    )
    drawn = plots.ranked_conditions(values)
    (points,) = parts(drawn, hv.Points)
    assert list(points["value"]) == [2.0, 0.5, -6.0]
    assert list(points["name"]) == ["pair", "prev", "x" * 80]
    assert [len(name) for _, name in option(drawn, "yticks")] == [4, 4, 44]
    assert (points["low"][0], points["high"][0]) == pytest.approx(OF_1_AND_3)
    low, high = option(drawn, "xlim")
    assert low < -6.0
    assert high > 3.0
    stored = (
        values.mean("example")
        .to_dataset(name="loss")
        .assign(loss_low=("condition", [1.5, -7.0, 0.0]), loss_high=("condition", [2.5, -5.0, 1.0]))
    )
    (points,) = parts(plots.ranked_conditions(stored, "loss"), hv.Points)
    assert list(points["low"]) == [1.5, 0.0, -7.0]
    two = plots.ranked_conditions(stored, "loss", top=2)
    assert list(parts(two, hv.Points)[0]["name"]) == ["pair", "x" * 80]
    assert option(two, "title") == "the 2 of 3 farthest from 0"


def test_curves_have_the_interval_of_their_examples_or_the_stored_one():
    values = xr.DataArray([[1.0, 5.0], [3.0, np.nan]], dims=("example", "position"), name="loss")
    drawn = plots.by_position(values)
    (curve,) = parts(drawn, hv.Curve)
    assert (list(curve["mean"]), list(curve["position"])) == ([2.0, 5.0], [0, 1])
    assert (curve["low"][0], curve["high"][0]) == pytest.approx(OF_1_AND_3)
    assert curve["low"][1] == 5.0  # of one example there is no interval
    below = plots.by_position(-values)
    low, high = option(below, "ylim")
    assert low < -5.0
    assert high >= 0.0
    seeds = xr.DataArray([[1.0, 2.0], [3.0, 4.0]], dims=("seed", "step"), coords={"step": [0, 100]}, name="loss")
    two = plots.along(seeds, None, "step", curves="seed")
    assert [(part.label, list(part["mean"])) for part in parts(two, hv.Curve)] == [("0", [1.0, 2.0]), ("1", [3.0, 4.0])]
