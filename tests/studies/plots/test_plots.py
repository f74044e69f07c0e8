"""Pictures are tested by what they hold: elements, their data, labels and limits. No pixels."""

from __future__ import annotations

import re
import subprocess
import sys

import holoviews as hv
import numpy as np
import pytest
import xarray as xr
from bokeh.core.validation import check_integrity

from headwise.errors import DeclarationError, UnknownNameError
from headwise.interventions import Head
from headwise.studies import RepeatedTokens, capture, plots
from headwise.studies.output.page import Page
from tests.support.elements import HEADS, LAYERS, METHODS, labelled, of_type, option


@pytest.fixture
def ablated():
    """Two examples, base loss 1; L1H2 costs 3 nats by zero ablation and 0.5 by mean ablation."""
    loss = np.ones((3, LAYERS, HEADS, 2))
    loss[0, 1, 2], loss[1, 1, 2], loss[2, 0, 0] = 4.0, 1.5, 0.0
    share = np.full((LAYERS, HEADS), 0.25)
    return xr.Dataset(
        {
            "loss": (("ablation", "layer", "head", "example"), loss, {"long_name": "cross-entropy", "units": "nat"}),
            "baseline_loss": (("run", "example"), np.ones((1, 2))),
            "constant_share": (("layer", "head"), share, {"long_name": "constant share", "units": "1"}),
        },
        coords={"ablation": METHODS, "run": ["clean"], "layer": range(LAYERS), "head": range(HEADS)},
        attrs={"base": "clean"},
    )


def test_head_grid_holds_values_names_and_label(values):
    grid = plots.head_grid(values, limits=(0, 1))
    assert isinstance(grid, hv.HeatMap)
    assert [dim.name for dim in grid.kdims] == ["head", "layer"]
    held = dict(zip(zip(grid["layer"], grid["head"], strict=True), grid["value"], strict=True))
    assert held == {(layer, head): values.values[layer, head] for layer in range(LAYERS) for head in range(HEADS)}
    names = dict(zip(grid["name"], grid["value"], strict=True))
    assert names["L1H2"] == pytest.approx(0.6)
    assert grid.vdims[0].label == "induction score"
    assert grid.vdims[0].unit is None
    assert option(grid, "clim") == (0, 1)
    assert set(grid["text"]) == {f"{value:.2f}" for value in values.values.ravel()}
    assert ("unit", "pure number") in option(grid, "hover_tooltips")


def test_head_grid_averages_examples_and_shows_the_unit(values):
    examples = xr.concat([values - 0.1, values + 0.1], "example").assign_attrs(long_name="loss", units="nat")
    grid = plots.head_grid(examples)
    np.testing.assert_allclose(sorted(grid["value"]), sorted(values.values.ravel()))
    assert grid.vdims[0].pprint_label == "loss (nat)"
    assert set(grid["unit"]) == {"nat"}


def test_scores_are_sequential_and_effects_diverge_around_zero(values):
    score, effect = plots.head_grid(values), plots.head_grid((values - 0.2).rename("effect_loss"))
    assert option(score, "clim") == (0.0, pytest.approx(0.7))
    low, high = option(effect, "clim")
    assert (low, high) == (pytest.approx(-0.5), pytest.approx(0.5))
    colours = option(effect, "cmap", "style")
    assert colours[len(colours) // 2] == "#f7f7f7"
    assert option(plots.head_grid(values.rename("effect_loss")), "clim")[0] == pytest.approx(-0.7)


def test_head_grid_marks_missing_and_writes_only_where_there_is_room(values):
    grid = plots.head_grid(values.where(values != 0.3))
    assert np.isnan(grid["value"]).sum() == 1
    assert "" in grid["text"]
    assert len(option(grid, "hooks")) == 1
    large = xr.DataArray(np.zeros((12, 12)), dims=("layer", "head"))
    assert not option(plots.head_grid(large), "hooks")


def test_head_grid_names_the_dimension_it_cannot_draw(values):
    with pytest.raises(DeclarationError, match="select one ablation first"):
        plots.head_grid(values.expand_dims(ablation=METHODS))
    with pytest.raises(DeclarationError, match="picture draws other dims"):
        plots.head_grid(values.isel(layer=0))


def test_figures_with_a_fixed_frame_are_valid(values):
    page = Page("figures")
    for element in (plots.head_grid(values), plots.attention(attention_dataset(), "L0H3")):
        page.figure(element, "a figure")
    assert len(page.models) == 2
    for model in page.models.values():
        issues = check_integrity(model.references())
        assert not issues.error + issues.warning


def test_elements_combine_and_take_options(values):
    grid = plots.head_grid(values)
    assert len(grid + grid) == 2
    assert isinstance(grid * hv.VLine(0), hv.Overlay)
    assert option(grid.opts(title="mine"), "title") == "mine"
    hv.render(grid + grid, backend="bokeh")


def test_ranked_heads_orders_colours_and_compares(values):
    role = np.full((LAYERS, HEADS), "other", dtype=object)
    role[1, 3] = "induction"
    low = values - 0.05
    ds = xr.Dataset(
        {
            "induction": values,
            "induction_low": low,
            "induction_high": values + 0.05,
            "chance_induction": ("example", [0.02, 0.04]),
            "untrained_induction": (("seed", "layer", "head"), np.full((1, LAYERS, HEADS), 0.11)),
            "role": (("layer", "head"), role),
        },
        attrs={"threshold": 0.4},
    )
    ranked = plots.ranked_heads(ds, "induction", top=3)
    (best,) = [part for part in ranked if part.label == "induction"]
    assert list(best["name"]) == ["L1H3"]
    assert list(best["low"]) == [pytest.approx(0.65)]
    assert list(labelled(ranked, "other")["name"]) == ["L1H2", "L1H1"]
    assert list(labelled(ranked, "other")["row"]) == [-1.0, -2.0]
    lines = {part.label: part["score"][0] for part in of_type(ranked, hv.Curve)}
    assert lines == {"chance, 0.03": pytest.approx(0.03), "best untrained, 0.11": 0.11, "threshold, 0.40": 0.4}
    bare = plots.ranked_heads(xr.Dataset({"induction": values}), "induction")
    assert not of_type(bare, hv.Curve)
    assert len(labelled(bare, "other")) == LAYERS * HEADS


def test_by_position_draws_both_runs_and_the_repeat():
    loss = np.array([[[3.0, 3.0, 1.0, np.nan]] * 2, [[3.0, 3.0, 4.0, np.nan]] * 2])
    ds = xr.Dataset(
        {"loss": (("run", "example", "position"), loss, {"long_name": "loss, no intervention", "units": "nat"})},
        coords={"run": ["clean", "corrupted"], "position": range(4)},
        attrs={"repeat_starts": 2},
    )
    drawn = plots.by_position(ds, "loss")
    clean = labelled(drawn, "clean")
    assert list(clean["mean"]) == [3.0, 3.0, 1.0]
    assert clean.vdims[0].pprint_label == "loss (nat)"
    assert list(labelled(drawn, "corrupted")["mean"]) == [3.0, 3.0, 4.0]
    assert of_type(drawn, hv.VLine)[0].data == 2.0
    assert of_type(drawn, hv.Labels)[0]["text"][0].strip() == "the repeat starts"


def attention_dataset():
    pattern = np.tril(np.full((1, 3, 3), 0.25))
    pattern[0, 2, 1] = 0.5
    return xr.Dataset(
        {
            "pattern": (("shown", "query", "key"), pattern, {"long_name": "attention", "units": "1"}),
            "expected": (("shown", "query"), [[np.nan, 0.0, 1.0]]),
            "kind": ("shown", ["previous_token"]),
        },
        coords={"shown": ["L0H3"], "query": range(3), "key": range(3), "token": ("position", [" a", "bb", "a"])},
    )


def test_attention_boxes_stand_around_the_expected_keys():
    drawn = plots.attention(attention_dataset(), "L0H3")
    (boxes,) = of_type(drawn, hv.Rectangles)
    centres = {((left + right) / 2, (bottom + top) / 2) for left, bottom, right, top in boxes.array()}
    assert centres == {(0.0, 1.0), (1.0, 2.0)}  # (key, query)
    (grid,) = of_type(drawn, hv.HeatMap)
    held = {(query, key): weight for query, key, weight in zip(grid["query"], grid["key"], grid["weight"], strict=True)}
    assert held[2, 1] == 0.5
    assert np.isnan(held[0, 2])
    assert option(drawn, "invert_yaxis") is True
    assert option(drawn, "xticks") == [(0, "␣a"), (1, "bb"), (2, "a")]  # which differ by a space
    assert option(drawn, "title") == "L0H3: 38% in previous-token boxes"
    tokens = dict(zip(zip(grid["query"], grid["key"], strict=True), grid["to_token"], strict=True))
    assert tokens[2, 1] == "bb"
    hv.render(drawn, backend="bokeh")


def test_attention_of_an_unknown_head_lists_the_known():
    with pytest.raises(UnknownNameError, match="there are L0H3"):
        plots.attention(attention_dataset(), "L9H9")
    assert len(plots.attention_row(attention_dataset())) == 1


def test_ablation_grids_share_one_symmetric_scale(ablated):
    layout = plots.ablation_grids(ablated, "loss")
    assert {option(panel, "clim") for panel in layout} == {(-3.0, 3.0)}
    zero, mean, resample = layout
    assert zero["value"][list(zero["name"]).index("L1H2")] == 3.0
    assert mean["value"][list(mean["name"]).index("L1H2")] == 0.5
    assert resample["value"][list(resample["name"]).index("L0H0")] == -1.0
    assert zero.vdims[0].pprint_label == "change in cross-entropy (nat)"


def test_zero_against_mean_names_the_head_that_stands_out(ablated):
    drawn = plots.zero_against_mean(ablated, "loss")
    points = labelled(drawn, "heads")
    at = list(points["name"]).index("L1H2")
    assert (points["zero"][at], points["mean"][at], points["share"][at]) == (3.0, 0.5, 0.25)
    assert [name for part in of_type(drawn, hv.Labels) for name in part["name"]] == ["L1H2"]
    x, y = labelled(drawn, "equal").array().T
    assert list(x) == list(y)
    plots.zero_against_mean(ablated.drop_vars("constant_share"), "loss")


def test_sets_against_null_leaves_out_sets_that_were_not_drawn():
    control = np.full((1, 2, 3, 2, 2), 0.9)
    control[0, 0, :, 1] = np.nan
    ds = xr.Dataset(
        {
            "accuracy": (("set", "ablation", "example"), np.full((1, 3, 2), 0.25), {"units": "1"}),
            "baseline_accuracy": (("run", "example"), np.ones((1, 2))),
            "control_accuracy": (("set", "control", "ablation", "draw", "example"), control),
            "p_accuracy": (("set", "control", "ablation"), np.full((1, 2, 3), 0.5)),
        },
        coords={"set": ["induction heads"], "ablation": METHODS, "control": ["same layers", "all layers"]},
        attrs={"base": "clean"},
    ).assign_coords(run=["clean"])
    (panel,) = plots.sets_against_null(ds, "accuracy")
    own = labelled(panel, "these heads")
    np.testing.assert_allclose(own["change"], -0.75)
    np.testing.assert_allclose(own["p_1"], 0.5)
    assert len(labelled(panel, "random heads, same layers")) == 3
    random = labelled(panel, "random heads, all layers")
    assert len(random) == 6
    np.testing.assert_allclose(random["change"], -0.1)


def test_what_is_missing_is_named(values):
    with pytest.raises(UnknownNameError, match="no pattern"):
        plots.attention_row(xr.Dataset())
    with pytest.raises(UnknownNameError, match="ranked_heads needs previous_token"):
        plots.ranked_heads(xr.Dataset({"induction": values}), "previous_token")


def test_importing_pictures_registers_no_backend():
    code = "import headwise.studies.plots, holoviews as hv; assert not hv.Store.loaded_backends()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_saved_pictures_load_nothing_and_keep_their_size(tmp_path):
    values = xr.DataArray(np.arange(16.0).reshape(2, 8), dims=("layer", "head"), name="score")
    path = plots.save(plots.head_grid(values), tmp_path / "grid.html")
    text = path.read_text()
    assert not re.findall(r'<(?:link|img)[^>]*(?:src|href)="https?:', text)
    assert "default-src 'none'" in text  # the page forbids itself to load anything
    assert "<title>grid</title>" in text
    with pytest.raises(DeclarationError, match=r"grid\.jpg: pictures are saved as \.html, \.png and \.svg"):
        plots.save(plots.head_grid(values), tmp_path / "grid.jpg")


def test_attention_draws_what_was_captured(planted):
    captured = capture(planted, RepeatedTokens(n=2, length=5), [Head(1, 2).pattern])
    drawn = plots.attention(captured, "L1H2").HeatMap.I
    wanted = captured["L1H2_pattern"].isel(example=0).values
    found = {
        (q, k): w
        for k, q, w in zip(*(drawn.dimension_values(name) for name in ("key", "query", "weight")), strict=True)
    }
    for (query, key), value in np.ndenumerate(wanted):
        if key <= query:
            assert found[query, key] == pytest.approx(value, abs=1e-6)
    assert len(found) == 100
