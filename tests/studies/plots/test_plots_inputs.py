"""Pictures take datasets that somebody built by hand, and say what is wrong with those that cannot be drawn."""

from __future__ import annotations

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

from headwise.errors import DeclarationError, UnknownNameError
from headwise.studies import plots
from tests.support.elements import option

PAIR = ("sender_layer", "sender_head", "receiver_layer", "receiver_head")
RNG = np.random.default_rng(0)


def array(**sizes):
    """Numbers 0, 1, 2, ... with dims and nothing else."""
    return xr.DataArray(np.arange(float(np.prod(list(sizes.values())))).reshape(*sizes.values()), dims=tuple(sizes))


def parts(element, kind):
    return [part for part in element if isinstance(part, kind)]


def pairs(layers=2, heads=2):
    values = np.full((layers, heads, layers, heads), np.nan)
    for sender in range(layers):
        for receiver in range(sender + 1, layers):
            values[sender, :, receiver, :] = RNG.uniform(0.1, 0.3, (heads, heads))
    return xr.DataArray(values, dims=PAIR)


def measured():
    """zero costs 1, mean costs 2, on a base of 3."""
    loss = np.stack([np.full((1, 2, 4), 4.0), np.full((1, 2, 4), 5.0)])
    return xr.Dataset(
        {"loss": (("ablation", "layer", "head", "example"), loss), "baseline_loss": ("example", np.full(4, 3.0))},
        coords={"ablation": ["zero", "mean"]},
    )


BARE = {
    "head_grid": lambda: plots.head_grid(array(layer=2, head=3)),
    "head_grids": lambda: plots.head_grids(array(layer=2, head=3, step=4), "step"),
    "ranked_heads": lambda: plots.ranked_heads(array(layer=2, head=3)),
    "ablation_grids": lambda: plots.ablation_grids(measured(), "loss"),
    "zero_against_mean": lambda: plots.zero_against_mean(measured(), "loss"),
    "sets_against_null": lambda: plots.sets_against_null(
        xr.Dataset({"loss": array(example=2), "baseline_loss": array(example=2), "control_loss": array(draw=5)}), "loss"
    ),
    "attention": lambda: plots.attention(array(query=3, key=3) / 9),
    "attention of a dataset": lambda: plots.attention(xr.Dataset({"pattern": array(example=2, query=3, key=3)})),
    "attention_viewer": lambda: plots.attention_viewer(array(query=3, key=3) / 9),
    "attention_row": lambda: plots.attention_row(xr.Dataset({"pattern": array(shown=2, query=3, key=3)})),
    "by_position": lambda: plots.by_position(array(position=4)),
    "along": lambda: plots.along(array(step=4, example=3), None, "step"),
    "layer_by_position": lambda: plots.layer_by_position(array(layer=2, position=5)),
    "grid": lambda: plots.grid(array(layer=2, component=3), "component", "layer"),
    "ranked_conditions": lambda: plots.ranked_conditions(array(condition=3, example=4)),
    "composition_matrix": lambda: plots.composition_matrix(pairs()),
    "composition_graph": lambda: plots.composition_graph(pairs()),
    "composition_strip": lambda: plots.composition_strip(
        xr.Dataset(
            {
                "composition": pairs().expand_dims(kind=3),
                "floor_mean": ("kind", np.zeros(3)),
                "floor_sd": ("kind", np.ones(3)),
            }
        ).drop_vars("kind", errors="ignore")
    ),
    "qkv_grids": lambda: plots.qkv_grids(
        xr.Dataset({"noising_normalized": array(component=3, layer=2, head=2)}), "noising"
    ),
    "qkv_of_set": lambda: plots.qkv_of_set(
        xr.Dataset(
            {
                "set_induction": array(component=3, example=2),
                "clean_induction": array(example=2),
                "set_normalized": array(component=3),
            }
        )
    ),
    "path_grids": lambda: plots.path_grids(
        xr.Dataset({"path_logit_diff": array(path=3, sender=2), "path_baseline": array(run=2)}).assign_coords(
            sender=["L0H1", "L2H0"]
        )
    ),
    "direct_and_copying": lambda: plots.direct_and_copying(
        xr.Dataset({"attribution": array(layer=2, head=3, example=2), "copying": array(layer=2, head=3)})
    ),
    "causal_check": lambda: plots.causal_check(
        xr.Dataset(
            {
                "receiver_induction": array(example=2),
                "ablated_induction": array(ablation=2, example=2),
                "control_induction": array(ablation=2, control_draw=3),
            }
        )
    ),
    "estimate_against_exact": lambda: plots.estimate_against_exact(
        xr.Dataset({"exact": array(layer=2, head=2), "estimate": array(estimator=1, layer=2, head=2)})
    ),
    "words_grid": lambda: plots.words_grid(
        xr.Dataset({"prob": array(example=2), "prompt": ("example", ["a b", ""]), "answer": ("example", ["c", "d"])})
    ),
    "words_agreement": lambda: plots.words_agreement(
        xr.Dataset({"prefix_matching": array(layer=2, head=2)}), xr.Dataset({"induction": array(layer=2, head=2)})
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_dims_are_enough_and_elements_combine(name):
    element = BARE[name]()
    hv.render(element, backend="bokeh")
    beside = element + hv.Curve([1, 2])
    assert isinstance(beside, hv.Layout)
    assert len(beside) == (len(element) if isinstance(element, hv.Layout) else 1) + 1
    if not isinstance(element, hv.Layout):
        assert isinstance(element * hv.VLine(0), hv.Overlay)
        assert option(element.opts(backend="bokeh", title="mine"), "title") == "mine"
        hv.render(element * hv.VLine(0), backend="bokeh")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plots.head_grid(np.zeros((2, 2))), r"head_grid draws a DataArray \(layer, head\), got ndarray"),
        (lambda: plots.head_grid(xr.Dataset({"a": array(layer=2), "b": array(head=2)})), r"has a and b: give one.*'a'"),
        (lambda: plots.head_grid(array(layer=2, head=2, ablation=3)), "select one ablation first, 0, 1 or 2"),
        (lambda: plots.head_grid(array(layer=2, head=2).astype(str)), "draws numbers, and this array holds text"),
        (lambda: plots.ranked_heads(array(layer=2, head=2) * np.nan), "no value that is not missing"),
        (lambda: plots.ranked_conditions(array(condition=2) * np.nan), "no value that is not missing"),
        (lambda: plots.by_position(array(layer=2)), r"\(\[run,\] \[example,\] position\), and value has layer"),
        (lambda: plots.by_position(array(position=2, head=3)), "select one head first"),
        (lambda: plots.layer_by_position(array(layer=2, head=2)), r"draws \(layer, position\), and this has layer and"),
        (lambda: plots.attention(array(query=3, key=3, head=2)), "select one head first"),
        (lambda: plots.attention(array(layer=3, head=3)), r"one pattern \(query, key\), and this has layer and head"),
        (lambda: plots.attention(array(query=3, key=3) * np.nan), "no value that is not missing"),
        (lambda: plots.attention(xr.Dataset({"pattern": array(example=2, query=3, key=3)}), example=7), "are 0 to 1"),
        (lambda: plots.attention_viewer(array(query=200, key=200)), "up to 150 tokens, this one has 200: select"),
        (
            lambda: plots.composition_matrix(pairs().expand_dims(kind=["q", "k"])),
            "draws one kind: name it: there are q",
        ),
        (lambda: plots.composition_graph(pairs().expand_dims(kind=["q", "v"])), "no 'k'-composition is here"),
        (lambda: plots.composition_matrix(array(layer=2, head=2)), "and this has layer and head"),
        (lambda: plots.composition_matrix(pairs() * np.nan), "no pair of heads has a score"),
        (lambda: plots.composition_matrix(pairs(), deviations=True), "in deviations needs floor_mean and floor_sd"),
        (lambda: plots.composition_graph(pairs(), senders=["L9H9"]), "no pair has L9H9"),
        (
            lambda: plots.sets_against_null(measured().assign(control_loss=array(ablation=2)), "loss"),
            r"\(draw, \.\.\.\)",
        ),
        (
            lambda: plots.path_grids(
                xr.Dataset({"path_logit_diff": array(path=3, sender=2), "path_baseline": array(run=2)})
            ),
            "cannot read '0' as a head: write L5H1",
        ),
        (lambda: plots.direct_and_copying(xr.Dataset()), "attribution of an InductionStudy's result gives it"),
        (lambda: plots.path_grids(xr.Dataset({"path_baseline": array(run=2)})), "composition of an InductionStudy's"),
        (lambda: plots.zero_against_mean(measured().isel(ablation=[0]), "loss"), "needs the ablations zero and mean"),
        (lambda: plots.ablation_grids(measured().drop_vars("baseline_loss"), "loss"), "no baseline_loss: it has"),
        (lambda: plots.qkv_grids(xr.Dataset({"noising_normalized": array(layer=2)}), "noising"), "has layer"),
        (lambda: plots.estimate_against_exact(xr.Dataset({"exact": array(a=2), "estimate": array(a=2)})), "estimator"),
        (lambda: plots.words_grid(array(example=2)), "draws a Dataset with prob, prompt and answer, got DataArray"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(call, says):
    with pytest.raises((DeclarationError, UnknownNameError), match=says):
        call()


def test_labels_stand_in_for_numbers_that_do_not_count_by_one():
    values = array(layer=3, head=2).assign_coords(layer=[0, 6, 11], head=["first", "second"])
    drawn = plots.head_grid(values)
    assert set(zip(drawn["layer"], drawn["name"], strict=True)) >= {(1, "L6Hfirst"), (2, "L11Hsecond")}
    assert option(drawn, "yticks") == [(0, "0"), (1, "6"), (2, "11")]
    later = plots.head_grid(array(layer=2, head=2).assign_coords(layer=[5, 6]))
    assert set(later["layer"]) == {5, 6}


def test_scales_of_constants_negatives_and_missing_values():
    negative = plots.head_grid(array(layer=1, head=3) - 5.0)
    assert option(negative, "clim") == (-5.0, 5.0)
    assert option(plots.head_grid(array(layer=2, head=2) * 0), "clim") == (0.0, 1.0)
    assert option(plots.head_grid(array(layer=2, head=2) * 0 + 0.5), "clim") == (0.0, 0.5)
    nothing = plots.head_grid(array(layer=2, head=2) * np.nan)
    assert np.isnan(nothing["value"]).all()
    hv.render(nothing, backend="bokeh")


@pytest.mark.parametrize("shape", [(1, 4), (12, 12), (24, 16), (48, 64)])
def test_grids_of_large_models_keep_a_size_and_labels_that_can_be_read(shape):
    drawn = plots.head_grid(array(layer=shape[0], head=shape[1]))
    width, height = option(drawn, "frame_width"), option(drawn, "frame_height")
    assert width <= 560
    assert height <= 900
    labels = option(drawn, "yticks")
    assert (height / shape[0]) * shape[0] / len(labels) >= 11
    assert width / len(option(drawn, "xticks")) >= 14


def test_ranked_heads_of_any_unit_show_all_values_and_zero():
    drawn = plots.ranked_heads((array(layer=2, head=3) - 9).assign_attrs(units="nat"), top=2)
    low, high = option(drawn, "xlim")
    assert low < -5.0
    assert 0.0 <= high < 1.0
    (points,) = parts(drawn, hv.Points)
    assert list(points["name"]) == ["L1H2", "L1H1"]
    assert points.kdims[0].pprint_label == "value (nat)"


def test_sets_against_null_from_a_few_numbers():
    ds = xr.Dataset(
        {
            "loss": ("example", [5.0, 7.0]),
            "baseline_loss": ("example", [1.0, 1.0]),
            "control_loss": ("draw", [1.0, 1.5, 2.0]),
        }
    )
    (panel,) = plots.sets_against_null(ds, "loss")
    own = next(part for part in panel if part.label == "these heads")
    assert list(own["change"]) == [5.0]
    null = next(part for part in panel if part.label == "random heads")
    assert list(null["change"]) == [0.0, 0.5, 1.0]
