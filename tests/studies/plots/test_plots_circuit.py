"""Pictures of patching, composition, words and estimates, tested by what they hold."""

from __future__ import annotations

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

from headwise.errors import UnknownNameError
from headwise.studies import plots
from headwise.studies.plots.parts import dots
from tests.support.elements import HEADS, LAYERS, METHODS, labelled, of_type, option


def patched_dataset():
    values = np.ones((3, LAYERS, HEADS))
    values[2, 1, 2] = -1.0
    attrs = {"long_name": "normalized logit difference", "units": "1"}
    return xr.Dataset(
        {
            "noising_normalized": (("component", "layer", "head"), values, attrs),
            "set_induction": (("component", "example"), [[0.9, 0.9], [0.1, 0.3], [0.9, 0.9]]),
            "clean_induction": ("example", [0.9, 0.9]),
            "set_normalized": ("component", [1.0, 0.1, -0.9]),
        },
        coords={"component": ["q", "k", "v"]},
    )


def test_qkv_grids_are_neutral_where_a_patch_changes_nothing():
    layout = plots.qkv_grids(patched_dataset(), "noising")
    assert [option(panel, "title") for panel in layout] == ["q, noising", "k, noising", "v, noising"]
    assert {option(panel, "clim") for panel in layout} == {(-1.0, 3.0)}  # symmetric around 1, the clean run
    with pytest.raises(UnknownNameError, match="noising and denoising"):
        plots.qkv_grids(patched_dataset(), "sideways")
    with pytest.raises(UnknownNameError, match="denoising_normalized"):
        plots.qkv_grids(patched_dataset(), "denoising")


def test_qkv_of_set_shows_pattern_and_answer():
    pattern, answer = plots.qkv_of_set(patched_dataset())
    held = labelled(pattern, "patched")
    assert dict(zip(held["component"], held["score"], strict=True))["k"] == pytest.approx(0.2)
    assert labelled(pattern, "clean run, 0.90")["score"][0] == pytest.approx(0.9)
    assert list(labelled(answer, "patched")["answer"]) == [1.0, 0.1, -0.9]
    assert {"clean run, 1.00", "corrupted run, 0.00"} <= {part.label for part in answer}


def test_path_grids_show_the_change_of_each_sender_where_it_stands():
    values = np.array([[[1.0, 3.0], [5.0, 5.0], [6.0, 6.0]], [[5.0, 7.0], [6.0, 6.0], [9.0, 9.0]]])
    attrs = {"long_name": "logit difference, corrupted on the path from a head", "units": "logit"}
    ds = xr.Dataset(
        {
            "path_logit_diff": (("path", "sender", "example"), values, attrs),
            "path_baseline": (("run", "example"), [[0.0, 0.0], [5.0, 7.0]]),
        },
        coords={"path": ["k", "q"], "sender": ["L0H1", "L0H3", "L2H0"], "run": ["corrupted", "clean"]},
    )
    layout = plots.path_grids(ds)
    assert [option(panel, "title") for panel in layout] == ["into k", "into q"]
    assert {option(panel, "clim") for panel in layout} == {(-4.0, 4.0)}
    drawn = [dict(zip(panel["name"], panel["value"], strict=True)) for panel in layout]
    assert [{name: value for name, value in one.items() if not np.isnan(value)} for one in drawn] == [
        {"L0H1": -4.0, "L0H3": -1.0, "L2H0": 0.0},
        {"L0H1": 0.0, "L0H3": 0.0, "L2H0": 3.0},
    ]
    assert next(iter(layout)).vdims[0].pprint_label == "change in logit difference (logit)"
    assert [panel.dimensions() for panel in plots.picture(ds, "path_logit_diff")] == [
        panel.dimensions() for panel in layout
    ]


def composed(layers=2, heads=3):
    table = np.full((3, layers, heads, layers, heads), np.nan)
    rng = np.random.default_rng(0)
    for sender in range(layers):
        for receiver in range(sender + 1, layers):
            table[:, sender, :, receiver, :] = rng.uniform(0.0, 0.2, (3, heads, heads))
    table[1, 0, 1, 1, 2] = 0.5
    pair = ("sender_layer", "sender_head", "receiver_layer", "receiver_head")
    return xr.Dataset(
        {
            "composition": (("kind", *pair), table, {"long_name": "composition score", "units": "1"}),
            "floor_mean": ("kind", [0.1] * 3),
            "floor_sd": ("kind", [0.02] * 3),
        },
        coords={"kind": ["q", "k", "v"]} | {name: range(table.shape[1 + at]) for at, name in enumerate(pair)},
    )


def test_composition_matrix_has_only_earlier_into_later():
    grid = plots.composition_matrix(composed(), "k")
    assert set(grid["sender"]) == {"L0H0", "L0H1", "L0H2"}
    assert set(grid["receiver"]) == {"L1H0", "L1H1", "L1H2"}
    pairs = dict(zip(zip(grid["sender"], grid["receiver"], strict=True), grid["value"], strict=True))
    assert pairs["L0H1", "L1H2"] == pytest.approx((0.5 - 0.1) / 0.02)
    low, high = option(grid, "clim")
    assert low == -high
    assert grid.vdims[0].unit == "deviations"
    raw = plots.composition_matrix(composed(), "k", deviations=False)
    assert max(raw["value"]) == 0.5
    assert raw.vdims[0].unit is None
    with pytest.raises(UnknownNameError, match="q, k and v"):
        plots.composition_matrix(composed(), "o")


def test_composition_of_many_heads_keeps_the_named_and_the_strongest():
    ds = composed(layers=4, heads=12)
    weakest = ds["composition"].sel(kind="k").max(("receiver_layer", "receiver_head")).argmin(...)
    name = f"L{int(weakest['sender_layer'])}H{int(weakest['sender_head'])}"
    grid = plots.composition_matrix(ds, "k", heads=[name])
    assert len(set(grid["sender"])) <= 16
    assert name in grid["sender"]
    assert "L0H1" in grid["sender"]
    strip = labelled(plots.composition_strip(ds), "a pair of heads")
    assert 1500 < len(strip) <= 3 * 610
    assert max(strip["score"]) == 0.5


def test_composition_strip_marks_the_pairs():
    ds = composed().assign(pair_mean=("kind", [0.1, 0.4, 0.1]), pair_z=("kind", [0.0, 15.0, 0.0]))
    strip = plots.composition_strip(ds)
    mark = labelled(strip, "mean, previous-token to induction")
    assert list(mark["score"]) == [0.1, 0.4, 0.1]
    assert len(labelled(strip, "a pair of heads")) == 27
    (floor,) = of_type(strip, hv.Rectangles)
    np.testing.assert_allclose(floor.array()[0, [0, 2]].astype(float), [0.06, 0.14])
    assert len(plots.composition_strip(composed())) == 2


@pytest.mark.parametrize("draws", [0, 3])
def test_causal_check_with_and_without_controls(draws):
    ds = xr.Dataset(
        {
            "receiver_induction": ("example", [0.9, 1.0], {"long_name": "induction score", "units": "1"}),
            "ablated_induction": (("ablation", "example"), np.full((3, 2), 0.1)),
            "control_induction": (("ablation", "control_draw"), np.full((3, draws), 0.9)),
            "p_induction": ("ablation", [0.25] * 3),
        },
        coords={"ablation": METHODS},
    )
    drawn = plots.causal_check(ds)
    np.testing.assert_allclose(labelled(drawn, "without the previous-token heads")["score"], 0.1)
    assert len(labelled(drawn, "without as many random heads")) == 3 * draws
    assert labelled(drawn, "before, 0.95")["score"][0] == pytest.approx(0.95)
    hv.render(drawn, backend="bokeh")


def words_dataset(values):
    return xr.Dataset(
        {
            "prob": ("example", [0.9, 0.8], {"long_name": "probability of the target, no intervention", "units": "1"}),
            "rank": ("example", [0.0, 0.0]),
            "prompt": ("example", ["sun moon star sun", "car bus train car"]),
            "answer": ("example", ["moon", "bus"]),
            "ablated_prob": (("ablation", "example"), [[0.1, 0.2]]),
            "prefix_matching": values.expand_dims(example=2).rename("prefix_matching"),
        },
        coords={"ablation": ["zero"]},
    )


def test_words_show_answers_with_and_without_the_heads(values):
    ds = words_dataset(values)
    grid = plots.words_grid(ds)
    assert list(labelled(grid, "all heads")["prob"]) == [0.9, 0.8]
    assert list(labelled(grid, "induction heads: zero ablation")["prob"]) == [0.1, 0.2]
    assert [name for _, name in option(grid, "yticks")] == ["sun → moon", "car → bus"]
    table = plots.words_table(ds)
    assert isinstance(table, hv.Table)
    assert list(table["prob, zero ablation"]) == [0.1, 0.2]
    assert len(plots.words_grid(ds.drop_vars("ablated_prob").drop_vars("ablation"))) == 2


def test_words_agreement_pairs_the_two_scores_of_a_head(values):
    drawn = plots.words_agreement(words_dataset(values), xr.Dataset({"induction": values}))
    points = labelled(drawn, "other")
    assert list(points["random"]) == list(points["words"])
    assert points.kdims[1].label == "induction score, words"
    assert option(drawn, "legend_cols") == 2  # three do not fit into 390 pixels


def test_words_agreement_names_each_head_that_is_far_from_most():
    scores = np.full((LAYERS, HEADS), 0.02)
    scores[0, 1], scores[1, 2], scores[1, 3] = 0.80, 0.90, 0.91
    values = xr.DataArray(scores, dims=("layer", "head"), coords={"layer": range(LAYERS), "head": range(HEADS)})
    drawn = plots.words_agreement(xr.Dataset({"prefix_matching": values}), xr.Dataset({"induction": values}))
    labels = [name for part in of_type(drawn, hv.Labels) for name in part["name"]]
    assert sorted("\n".join(labels).split("\n")) == ["L0H1", "L1H2", "L1H3"]


def compared(**changes):
    """Exact effects 0, 1, 2, ... logits of (component, layer, head); the estimate of L1H2 k has the opposite sign."""
    exact = np.arange(16.0).reshape(2, LAYERS, HEADS)
    off = exact.copy()
    off[0, 1, 2] = -6.0
    attrs = {"units": "logit", "metric": "logit_diff"}
    dims = ("component", "layer", "head")
    return xr.Dataset(
        {
            "exact": (dims, exact, attrs | {"long_name": "change in logit difference, exact"}),
            "estimate": (("estimator", *dims), np.stack([off, exact]), attrs | {"long_name": "change, estimated"}),
        },
        coords={"estimator": ["gradient", "integrated"], "component": ["k", "v"], "head": range(HEADS)},
    ).assign(**changes)


def test_estimate_against_exact_names_the_worst_miss_and_says_the_correlation():
    gradient, integrated = plots.estimate_against_exact(compared())
    rho = 1 - 6 * (6**2 + 6 * 1**2) / (16 * (16**2 - 1))  # by hand: L1H2 k falls from rank 7 to 1, six rise by one
    assert option(gradient, "title") == f"gradient: rank correlation {rho:.2f}"
    assert option(integrated, "title") == "integrated: rank correlation 1.00"
    assert [name for part in of_type(gradient, hv.Labels) for name in part["name"]] == ["L1H2 k"]
    assert not of_type(integrated, hv.Labels)
    points = labelled(gradient, "k")
    at = list(points["name"]).index("L1H2 k")
    held = tuple(points[name][at] for name in ("exact", "estimate", "miss", "layer", "head"))
    assert held == (6.0, -6.0, -12.0, 1, 2)
    assert len(points) == len(labelled(gradient, "v")) == 8
    x, y = labelled(gradient, "equal").array().T
    assert list(x) == list(y)
    assert option(gradient, "xlim") == option(gradient, "ylim") == option(integrated, "ylim")
    assert option(gradient, "xlabel") == "change in logit difference, exact (logit)"
    tips = dict(option(points, "hover_tooltips"))
    assert {"layer", "head", "component", "exact", "estimate", "unit"} <= set(tips)
    assert tips["unit"] == "logit"
    hv.render(gradient, backend="bokeh")


def test_estimate_against_exact_draws_other_axes_and_what_is_stored():
    stored = compared(rank_correlation=("estimator", [0.123, np.nan]))
    titles = [option(panel, "title") for panel in plots.estimate_against_exact(stored)]
    assert titles == ["gradient: rank correlation 0.12", "integrated: rank correlation none"]
    flat = xr.Dataset(
        {"exact": ("condition", [1.0, -2.0]), "estimate": (("estimator", "condition"), [[1.0, np.nan]])},
        coords={"condition": ["pair", "prev"], "estimator": ["gradient"]},
    )
    (panel,) = plots.estimate_against_exact(flat)
    assert list(labelled(panel, "conditions")["name"]) == ["pair", "prev"]
    (panel,) = plots.estimate_against_exact(flat.isel(condition=0, drop=True))
    assert list(labelled(panel, "conditions")["exact"]) == [1.0]
    with pytest.raises(UnknownNameError, match="no estimate"):
        plots.estimate_against_exact(compared().drop_vars("estimate"))


def test_names_beside_points_hide_no_other_name():
    x, y = np.array([0.5, 0.5, 0.5, 0.52, 0.99, 0.0]), np.array([0.5, 0.5, 0.52, 0.5, 0.98, 0.0])
    names = ["one", "same place", "above", "right", "corner", "far"]
    parts = dots.names_beside(x, y, names, [0, 1, 2, 3, 4], (0.0, 1.0))
    found = {name: option(part, "text_align", "style") for part in parts for name in part["name"]}
    assert "one\nsame place" in found
    assert found["corner"] == "right"
    assert "far" not in found
    places = [(option(part, "text_align", "style"), option(part, "text_baseline", "style")) for part in parts]
    assert len(set(places)) == len(places) > 1


def test_direct_and_copying_sets_heads_beside_random_sets():
    direct = np.zeros((LAYERS, HEADS, 2))
    direct[1, 2], direct[1, 1] = [3.0, 5.0], [1.0, 3.0]
    copying = np.linspace(0, 1, LAYERS * HEADS).reshape(LAYERS, HEADS)
    random = np.array([[0.25, np.nan], [-0.5, 0.125]])
    ds = xr.Dataset(
        {
            "attribution": (("layer", "head", "example"), direct, {"units": "logit"}),
            "copying": (("layer", "head"), copying),
            "heads": ((), "L1H2 L1H1"),
            "set_attribution": ((), 3.0),
            "set_copying": ((), 0.75),
            "control_attribution": (("control", "draw"), random),
            "control_copying": (("control", "draw"), random + 0.5),
            "control_heads": (("control", "draw"), [["L1H0 L1H3", ""], ["L0H0 L0H1", "L0H2 L1H0"]]),
        },
        coords={"control": ["same layers", "all layers"], "layer": range(LAYERS), "head": range(HEADS)},
    )
    drawn = plots.direct_and_copying(ds)
    own, others = labelled(drawn, "induction heads"), labelled(drawn, "other heads")
    assert dict(zip(own["name"], own["attribution"], strict=True)) == {"L1H1": 2.0, "L1H2": 4.0}
    assert dict(zip(own["name"], own["copying"], strict=True)) == {"L1H1": copying[1, 1], "L1H2": copying[1, 2]}
    assert len(others) == LAYERS * HEADS - 2
    mean = labelled(drawn, "their mean")
    assert (mean["attribution"].tolist(), mean["copying"].tolist()) == ([3.0], [0.75])
    same, every = (labelled(drawn, f"random sets, {control}") for control in ("same layers", "all layers"))
    assert (same["attribution"].tolist(), same["heads"].tolist()) == ([0.25], ["L1H0 L1H3"])
    assert every["copying"].tolist() == [0.0, 0.625]
    named = {name for part in of_type(drawn, hv.Labels) for one in part["name"] for name in one.split(", ")}
    assert named == {"L1H1", "L1H2"}
    low, high = option(drawn, "ylim")
    assert low < -0.5 < 4.0 < high
    hv.render(drawn, backend="bokeh")
