"""What `measure` and studies give is drawn as it is: a measurement of one metric, and a part of a study's result."""

from __future__ import annotations

import math
from dataclasses import replace

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

from headwise.errors import DeclarationError, UnknownNameError
from headwise.interventions import Grid, Head, Patch, ZeroAblate
from headwise.metrics import accuracy, logit_diff, loss
from headwise.studies import RepeatedTokens, effect, measure, normalized, plots
from headwise.studies.plots.parts.inputs import alone
from tests.support.elements import labelled, of_type, option

HEADS = [(layer, head) for layer in range(2) for head in range(8)]


@pytest.fixture(scope="module")
def task():
    return RepeatedTokens(n=5, length=8)


@pytest.fixture(scope="module")
def ablated(words_model, task):
    heads = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))
    return measure(words_model, task, heads, [loss, accuracy])


@pytest.fixture(scope="module")
def patched(words_model, task):
    axes = {"component": ["q", "k", "v"], "layer": range(2), "head": range(8)}
    return {
        base: measure(
            words_model,
            task,
            Grid(lambda component, layer, head: Patch(Head(layer, head).site(component), source=source), **axes),  # noqa: B023
            [logit_diff],
            base=base,
        )
        for base, source in (("clean", "corrupted"), ("corrupted", "clean"))
    }


def held(grid):
    return {(int(one), int(two)): value for one, two, value in zip(grid["layer"], grid["head"], grid["value"])}  # noqa: B905


def test_a_measurement_of_one_metric_stands_for_its_change(ablated):
    one = ablated[["loss", "baseline_loss"]]
    base = one["baseline_loss"].sel(run="clean")
    for grid in (plots.head_grid(one), plots.picture(one), next(iter(plots.ablation_grids(one)))):
        assert isinstance(grid, hv.HeatMap)
        values = held(grid)
        for layer, head in HEADS:
            wanted = np.mean([float(one["loss"][layer, head, at]) - float(base[at]) for at in range(5)])
            assert values[layer, head] == pytest.approx(wanted, abs=1e-6)
        assert grid.vdims[0].label == "change in next-token cross-entropy"
        low, high = option(grid, "clim")
        assert low == -high
        assert option(grid, "title") == ("ablation" if option(grid, "title") else "")
    best = of_type(plots.ranked_heads(one), hv.Points)[0]
    assert best["name"][0] == "L0H3"
    assert best["score"][0] == pytest.approx(values[0, 3], abs=1e-6)
    far = of_type(plots.ranked_conditions(one), hv.Points)[0]
    assert dict(zip(far["name"], far["value"], strict=True))["L0H3"] == pytest.approx(values[0, 3], abs=1e-6)


def test_named_or_without_interventions_it_is_the_values(ablated):
    one = ablated[["loss", "baseline_loss"]]
    assert held(plots.head_grid(one["loss"]))[0, 3] == pytest.approx(float(one["loss"][0, 3].mean()), abs=1e-6)
    bare = xr.Dataset(
        {
            "score": (("layer", "head", "example"), np.arange(8.0).reshape(2, 2, 2)),
            "baseline_score": (("run", "layer", "head", "example"), np.arange(8.0).reshape(1, 2, 2, 2)),
        },
        coords={"run": ["clean"]},
        attrs={"interventions": "null", "base": "clean"},
    )
    assert held(plots.head_grid(bare)) == {(0, 0): 0.5, (0, 1): 2.5, (1, 0): 4.5, (1, 1): 6.5}


def test_of_several_metrics_one_is_named(ablated):
    assert alone(ablated) is None
    for draw in (plots.head_grid, plots.ranked_heads, plots.picture, plots.ablation_grids, plots.qkv_grids):
        with pytest.raises((DeclarationError, UnknownNameError), match=r"loss, baseline_loss, accuracy and"):
            draw(ablated)
    with pytest.raises(UnknownNameError, match="baseline_loss is without intervention: name 'loss'"):
        plots.ablation_grids(ablated, "baseline_loss")
    with pytest.raises(DeclarationError, match=r"it has no position"):
        plots.by_position(ablated, "loss")
    with pytest.raises(DeclarationError, match=r"measure\(\.\.\., per_position=True\) gives it by position"):
        plots.by_position(ablated.isel(layer=0, head=0, drop=True), "loss")


@pytest.mark.parametrize(("base", "direction", "neutral"), [("clean", "noising", 1.0), ("corrupted", "denoising", 0.0)])
def test_qkv_grids_draw_what_measure_gives(patched, base, direction, neutral):
    ds = patched[base]
    runs = {run: float(ds["baseline_logit_diff"].sel(run=run).mean()) for run in ("clean", "corrupted")}
    layout = plots.qkv_grids(ds)
    assert [option(panel, "title") for panel in layout] == [f"{one}, {direction}" for one in "qkv"]
    for panel, component in zip(layout, "qkv", strict=True):
        low, high = option(panel, "clim")
        assert (low + high) / 2 == pytest.approx(neutral)
        mean = ds["logit_diff"].sel(component=component).mean("example")
        for (layer, head), value in held(panel).items():
            wanted = (float(mean[layer, head]) - runs["corrupted"]) / (runs["clean"] - runs["corrupted"])
            assert value == pytest.approx(wanted, abs=1e-5)
    same = plots.qkv_grids(normalized(ds, "logit_diff"), direction)
    assert [held(panel) for panel in same] == [held(panel) for panel in layout]
    with pytest.raises(DeclarationError, match="say which way was patched: 'noising' and 'denoising'"):
        plots.qkv_grids(normalized(ds, "logit_diff"))
    other = {"noising": "denoising", "denoising": "noising"}[direction]
    with pytest.raises(UnknownNameError, match=f"this was measured by {direction}, not by {other}"):
        plots.qkv_grids(ds, other)


def test_qkv_grids_draw_the_change_where_nothing_can_be_normalized(patched):
    ds = patched["clean"]
    one = ds.sel(run=["clean"])
    change = effect(ds, "logit_diff").mean("example")
    for layout in (plots.qkv_grids(one), plots.qkv_grids(effect(ds, "logit_diff"))):
        (panel, *_) = layout
        assert held(panel)[0, 3] == pytest.approx(float(change.sel(component="q", layer=0, head=3)), abs=1e-6)
        assert panel.vdims[0].label == "change in logit difference, target minus distractor"
    with pytest.raises(DeclarationError, match=r"\(component, layer, head\), and normalized_logit_diff has layer"):
        plots.qkv_grids(ds.isel(component=0, drop=True))


def test_a_part_of_a_result_is_drawn_and_a_result_is_searched(ablated):
    scores = xr.DataArray(np.eye(2), dims=("layer", "head"), name="induction")
    words = xr.Dataset({"prompt": ("example", ["a"]), "answer": ("example", ["b"]), "prob": ("example", [0.5])})
    tree = xr.DataTree.from_dict({"/heads": scores.to_dataset(), "/words": words, "/ablation": ablated[["loss"]]})
    assert held(plots.head_grid(tree["heads"])) == {(0, 0): 1, (0, 1): 0, (1, 0): 0, (1, 1): 1}
    assert plots.words_table(tree)["prob"].tolist() == [0.5]
    (found,) = of_type(plots.ranked_heads(tree, "induction"), hv.Points)
    assert list(found["name"]) == ["L0H0", "L1H1", "L0H1", "L1H0"]
    with pytest.raises(DeclarationError, match=r"the parts are heads, words and ablation, such as tree\['heads'\]"):
        plots.head_grid(tree)
    with pytest.raises(DeclarationError, match="no part has exact and estimate: the parts are heads"):
        plots.estimate_against_exact(tree)


def test_what_lacks_something_says_what_gives_it():
    with pytest.raises(UnknownNameError, match=r"; capture\(model, task, \[Head\(0, 0\)\.pattern\]\) gives it"):
        plots.attention(xr.Dataset({"loss": ("example", [1.0])}))


def test_scores_that_were_read_under_a_sweep_are_drawn_without_it():
    values = np.arange(8.0).reshape(1, 2, 2, 2)
    ds = xr.Dataset(
        {
            "baseline_induction": (("run", "example", "read_layer", "read_head"), values),
            "induction": (("layer", "head", "example", "read_layer", "read_head"), np.zeros((1, 1, 2, 2, 2))),
        },
        coords={"run": ["clean"], "layer": [0], "head": [3]},
    )
    assert held(plots.picture(ds, "baseline_induction")) == {(0, 0): 2, (0, 1): 3, (1, 0): 4, (1, 1): 5}


@pytest.fixture(scope="module")
def losses(words_model, task):
    ds = measure(words_model, replace(task, score="all"), None, [loss, accuracy], per_position=True)
    names = ["baseline_loss", "baseline_accuracy"]
    return ds[names].rename({name: name.removeprefix("baseline_") for name in names})


def guesses(overlay):
    return [curve for curve in of_type(overlay, hv.Curve) if "uniform" in curve.label]


def test_a_loss_is_drawn_beside_that_of_a_uniform_guess(words_model, losses):
    chance = math.log(words_model.shape.vocabulary)
    drawn = plots.by_position(losses, "loss")
    (line,) = guesses(drawn)
    assert hv.render(drawn, backend="bokeh").legend[0].visible
    assert line.label == f"uniform guess, ln 857 = {chance:.2f}" == "uniform guess, ln 857 = 6.75"
    assert set(line["mean"]) == {chance}
    assert line["position"].tolist() == [0, 15]


def test_where_chance_is_far_or_unknown_no_line_is_drawn(losses):
    far = losses.assign(loss=(losses["loss"] * 0.01).assign_attrs(losses["loss"].attrs))
    change = losses.rename(loss="effect_loss")
    odd = [losses.assign_attrs(model_shape=text) for text in ("", "[]", '{"vocabulary": "many"}', '{"vocabulary": 1}')]
    for ds, name in [(losses, "accuracy"), (far, "loss"), (change, "effect_loss"), *((one, "loss") for one in odd)]:
        assert guesses(plots.by_position(ds, name)) == []


def test_conditions_stand_beside_their_random_sets(words_model, task):
    heads = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))
    ds = measure(words_model, task, heads, [loss, accuracy], controls=3)
    (panel,) = plots.sets_against_null(ds, "loss")
    own, random = labelled(panel, "these heads"), labelled(panel, "random heads, all layers")
    change = {head: float(effect(ds, "loss")[head].mean()) for head in HEADS}
    rows = sorted(HEADS, key=lambda head: -abs(change[head]))[:12]
    assert list(own["method"]) == [f"L{layer}H{head}" for layer, head in rows]
    np.testing.assert_allclose(own["change"], [change[head] for head in rows], atol=1e-6)
    np.testing.assert_allclose(own["p_1"], [float(ds["p_loss"][head].sel(control="all layers")) for head in rows])
    drawn = [(name, one, value) for name, one, value in zip(random["method"], random["heads"], random["change"])]  # noqa: B905
    assert len(drawn) == 12 * 3
    for name, one, value in drawn:
        assert value == pytest.approx(change[Head.parse(one).layer, Head.parse(one).head], abs=1e-5), name
        assert one != name
    same = [[part.label for part in one] for one in plots.picture(ds, "loss_control")]
    assert same == [[part.label for part in panel]]
    single = measure(words_model, task, ZeroAblate(Head(0, 3)), loss, controls=2)
    (alone_,) = plots.sets_against_null(single, "loss")
    assert float(labelled(alone_, "these heads")["change"][0]) == pytest.approx(change[0, 3], abs=1e-5)
