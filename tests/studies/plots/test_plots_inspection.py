"""Pictures of what is inside a model: predictions, the logit lens, direct logit attribution, activations."""

from __future__ import annotations

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from headwise.studies import plots
from tests.support.elements import of_type, option

TEXT = "apple banana cherry apple banana cherry apple"


def bars(panel):
    (boxes,) = of_type(panel, hv.Rectangles)
    return {name: np.asarray(boxes[name]).tolist() for name in ("token", "value", "right", "colour")}


@pytest.fixture(scope="module")
def said(words_model):
    what = {"clean": None, "without L0H3": hw.ZeroAblate("L0H3")}
    return hw.predict(words_model, [TEXT, "dog cat dog"], what, top=4)


@pytest.fixture(scope="module")
def lens(words_model):
    return hw.logit_lens(words_model, [TEXT, "dog cat dog"], top=2, positions="all")


@pytest.fixture(scope="module")
def direct(words_model):
    return hw.direct_logit_attribution(words_model, hw.RepeatedTokens(n=3, length=6))


def test_predictions_are_bars_from_the_likeliest_down(said):
    drawn = plots.picture(said.sel(condition="clean"), example=1)
    assert isinstance(drawn, hv.Overlay)
    wanted = said.sel(condition="clean").isel(example=1)
    found = bars(drawn)
    np.testing.assert_array_equal(found["value"], wanted["prob"])
    np.testing.assert_array_equal(found["right"], wanted["prob"])
    assert found["token"] == wanted["token"].values.tolist()
    (labels,) = of_type(drawn, hv.Labels)
    assert list(labels["text"]) == [f"{one:.3f}" for one in wanted["prob"].values]
    ticks = option(drawn, "yticks")
    assert [name for _, name in sorted(ticks, reverse=True)] == wanted["token"].values.tolist()
    assert option(drawn, "ylabel") == "after “dog cat dog”"


def test_conditions_stand_side_by_side_on_one_scale(said):
    drawn = plots.picture(said)
    assert isinstance(drawn, hv.Layout)
    assert [option(panel, "title") for panel in drawn] == ["clean", "without L0H3"]
    assert len({option(panel, "xlim") for panel in drawn}) == 1
    first = said["token"].sel(condition="clean")[0, 0].item()
    for panel, condition in zip(drawn, said["condition"].values, strict=True):
        found = bars(panel)
        np.testing.assert_array_equal(found["value"], said["prob"].sel(condition=condition)[0])
        orange = {token for token, colour in zip(found["token"], found["colour"], strict=True) if colour != "#0072b2"}
        assert orange == {first} & set(found["token"])


def test_logits_and_the_text_of_tokens_are_drawn_too(said):
    one = said.sel(condition="clean")
    np.testing.assert_array_equal(bars(plots.picture(one, "logit"))["value"], one["logit"][0])
    for name in ("token", "token_id"):
        np.testing.assert_array_equal(bars(plots.picture(one, name))["value"], one["prob"][0])
    assert len(bars(plots.predictions(one, top=2))["value"]) == 2


def test_negative_logits_reach_to_the_left():
    ds = xr.Dataset({"token": ("rank", ["a", "b"]), "logit": ("rank", [1.0, -3.0])})
    drawn = plots.predictions(ds, "logit")
    (boxes,) = of_type(drawn, hv.Rectangles)
    assert list(boxes["left"]) == [0.0, -3.0]
    assert option(drawn, "xlim")[0] < -3


@pytest.mark.parametrize("example", [0, 1])
def test_the_lens_has_the_token_of_each_layer_and_position_in_its_cell(lens, example):
    drawn = plots.picture(lens, example=example)
    assert isinstance(drawn, hv.HeatMap)
    wanted = lens.isel(example=example, rank=0)
    size = 7 if example == 0 else 3
    assert len(drawn) == 3 * size
    for layer, position, value, token in zip(
        *(drawn[name] for name in ("layer", "position", "value", "token")), strict=True
    ):
        at = wanted.sel(layer=int(layer), position=int(position))
        assert value == float(at["prob_of_token"])
        assert token == at["token"].item()
    assert option(drawn, "clim") == (0.0, 1.0)
    assert option(drawn, "invert_yaxis") is False
    names = [name for _, name in option(drawn, "xticks")]
    assert names == [f"{at} {word}" for at, word in enumerate([TEXT, "dog cat dog"][example].split())]


def test_other_ranks_and_one_position(words_model, lens):
    second = plots.picture(lens, rank=1)
    assert set(second["value"]) == set(lens["prob_of_token"].isel(example=0, rank=1).values.ravel())
    last = hw.logit_lens(words_model, TEXT, top=3, positions=-1)
    drawn = plots.picture(last)
    assert [dim.name for dim in drawn.kdims] == ["rank", "layer"]
    assert set(drawn["value"]) == set(last["prob_of_token"].values.ravel())
    every = hw.predict(words_model, TEXT, top=2, positions="all")
    drawn = plots.picture(every)
    assert [dim.name for dim in drawn.kdims] == ["position", "rank"]
    assert option(drawn, "invert_yaxis") is True
    assert set(drawn["token"]) == set(every["token"].values.ravel())


def test_attribution_is_a_grid_of_heads_beside_bars(direct):
    grid, others = plots.picture(direct)
    mean = direct["attribution"].mean("example")
    for name, value in zip(grid["name"], grid["value"], strict=True):
        assert value == pytest.approx(float(mean.sel(source=name)))
    assert len(grid) == int((direct["kind"] == "head").sum())
    (boxes,) = of_type(others, hv.Rectangles)
    rest = [str(one) for one in direct["source"].values[direct["kind"].values != "head"]]
    assert list(boxes["source"]) == rest[::-1]
    np.testing.assert_allclose(boxes["value"], [float(mean.sel(source=one)) for one in rest[::-1]], rtol=1e-5)
    assert "3 prompts say little" in option(others, "title")
    total = np.sum(grid["value"]) + np.sum(boxes["value"])
    assert total == pytest.approx(float(direct["whole"].mean()), abs=1e-4)


def test_by_position_attribution_is_a_grid_of_sources(words_model):
    ds = hw.direct_logit_attribution(words_model, hw.RepeatedTokens(n=2, length=5), per_position=True)
    drawn = plots.picture(ds)
    assert {dim.name for dim in drawn.kdims} == {"position", "source"}
    with pytest.raises(DeclarationError, match=r"attribution draws \(source\): select position"):
        plots.attribution(ds)


def test_of_many_parts_those_farthest_from_0_are_drawn(words_model):
    ds = hw.direct_logit_attribution(words_model, hw.RepeatedTokens(n=6, length=5), parts="L1")
    drawn = plots.picture(ds)
    (boxes,) = of_type(drawn, hv.Rectangles)
    size = abs(ds["attribution"].mean("example")).to_series().sort_values()[-26:]
    assert set(boxes["source"]) == set(size.index)
    assert option(drawn, "title") == "the 26 of 129 farthest from 0"


def test_neurons_of_one_prompt_by_position(words_model):
    task = hw.RepeatedTokens(n=2, length=4)
    ds = hw.capture(words_model, task, [hw.Layer(0).mlp_post, hw.Layer(1).z, hw.Layer(1).resid_post.at([2, 5])])
    drawn = plots.picture(ds, "L0_mlp_post", example=1)
    assert [dim.name for dim in drawn.kdims] == ["neuron", "position"]
    table = np.full((8, words_model.shape.d_mlp), np.nan)
    table[drawn["position"].astype(int), drawn["neuron"].astype(int)] = drawn["value"]
    np.testing.assert_array_equal(table, ds["L0_mlp_post"][1])
    assert option(drawn, "invert_yaxis") is True
    assert [name for _, name in option(drawn, "yticks")] == [
        f"{at} {token}" for at, token in enumerate(ds["token"][1].values)
    ]
    drawn = plots.picture(ds, "L1_z", head=3)
    assert set(drawn["value"]) == set(ds["L1_z"].sel(head=3)[0].values.ravel().astype(float))
    with pytest.raises(DeclarationError, match="select head"):
        plots.picture(ds, "L1_z")
    drawn = plots.picture(ds, "L1_resid_post_at_2_5")
    assert len(drawn) == 2 * words_model.shape.d_model
    assert [name for _, name in option(drawn, "yticks")] == ["2", "5"]


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda said, lens: plots.predictions(said, example=2), "example=2: there are 2, from 0 on"),
        (
            lambda said, lens: plots.predictions(said, "loss"),
            "predictions needs token and loss: this dataset has no loss",
        ),
        (lambda said, lens: plots.predictions(lens), "select layer|select position"),
        (lambda said, lens: plots.token_grid(said), "select condition"),
        (lambda said, lens: plots.token_grid(said.isel(condition=0)), "two of layer, position and rank, and has rank"),
        (lambda said, lens: plots.attribution(said), "attribution"),
        (lambda said, lens: plots.activations(said["prob"]), r"activations draws \(position, neuron\)"),
        (lambda said, lens: plots.picture(said.drop_vars("prob")), "name a variable"),
    ],
)
def test_what_cannot_be_drawn_is_refused(said, lens, draw, says):
    with pytest.raises((DeclarationError, UnknownNameError), match=says):
        draw(said, lens)
