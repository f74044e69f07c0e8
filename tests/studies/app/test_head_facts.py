"""What the app draws and says of a head: variables, numbers, scores, effects and partners are those of the file."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from headwise.interventions import Head, ZeroAblate
from headwise.metrics import bootstrap_interval, induction
from headwise.studies import RepeatedTokens, measure
from headwise.studies.app import head_facts, variables
from headwise.studies.app import text as sentences
from headwise.studies.app.folder import Folder, Listed
from tests.support.app import (
    SWEEP,
    named,
)


def test_variables_by_head_are_offered_with_their_other_dims(tree):
    one = named(tree, "ablation/loss")
    assert one.shows == ("change", "value", "share")
    assert dict(one.others) == {
        "ablation": ("zero", "mean", "resample"),
        "example": ("mean of all", "0", "1", "2", "3"),
    }
    keys = {one.key for one in variables.variables(tree)}
    assert {"heads/induction", "heads/q_induction", "patching/noising", "words/prefix_matching"} <= keys
    assert not {"heads/role", "heads/induction_low", "behaviour/loss"} & keys
    assert variables.usual(variables.variables(tree)).key == "heads/induction"


def test_what_a_study_of_a_circuit_found_to_be_lost_is_that_of_the_head():
    numbers = xr.DataArray([[0.1, 0.2], [0.3, 0.4]], dims=("layer", "head"), coords={"layer": [0, 1], "head": [0, 1]})
    found = xr.DataTree.from_dict({"/nodes": xr.Dataset({"lost": numbers.assign_attrs(long_name="share lost")})})
    assert head_facts.lost(found, Head(1, 0)) == ("share lost", 0.3)
    assert head_facts.lost(xr.DataTree.from_dict({"/a": xr.Dataset({"b": numbers})}), Head(1, 0)) is None


def test_values_are_effects_values_and_shares(tree):
    ds, one = tree["ablation"].to_dataset(), named(tree, "ablation/loss")
    wanted = hw.effect(ds, "loss").sel(ablation="mean").mean("example")
    found = variables.values(tree, one, "change", {"ablation": "mean"})
    xr.testing.assert_allclose(found.drop_vars("ablation", errors="ignore"), wanted.drop_vars("ablation"))
    assert found.name == "effect_loss"
    single = variables.values(tree, one, "value", {"ablation": "resample", "example": "2"})
    np.testing.assert_array_equal(single, ds["loss"].sel(ablation="resample", example=2))
    share = variables.values(tree, one, "share", {})
    np.testing.assert_allclose(share, hw.normalized(ds, "loss").sel(ablation="zero"))
    with pytest.raises(UnknownNameError, match="it has zero, mean and resample"):
        variables.values(tree, one, "value", {"ablation": "knockout"})
    with pytest.raises(UnknownNameError, match="possible are value"):
        variables.values(tree, named(tree, "heads/induction"), "change", {})


def test_heads_that_were_only_looked_at_make_a_grid_too(words_model):
    ds = measure(words_model, RepeatedTokens(n=2, length=6), ZeroAblate(Head(0, 0)), [induction])
    tree = xr.DataTree(ds)
    one = named(tree, "baseline_induction")
    assert dict(one.others) == {"run": ("clean", "corrupted"), "example": ("mean of all", "0", "1")}
    wanted = ds["baseline_induction"].sel(run="corrupted").mean("example").values
    np.testing.assert_allclose(variables.values(tree, one, "value", {"run": "corrupted"}), wanted)
    assert head_facts.scores(tree, Head(1, 2))[0].value == pytest.approx(
        float(ds["baseline_induction"].sel(run="clean", read_layer=1, read_head=2).mean())
    )


def test_heads_of_a_measurement_without_intervention(words_model):
    ds = measure(words_model, RepeatedTokens(n=2, length=6), None, [induction])
    tree = xr.DataTree(ds)
    one = named(tree, "induction")
    assert one.shows == ("value",)
    np.testing.assert_allclose(variables.values(tree, one, "value", {}), ds["induction"].mean("example"))
    (score,) = head_facts.scores(tree, Head(1, 2))
    assert score.value == pytest.approx(float(ds["induction"].sel(layer=1, head=2).mean()))
    assert head_facts.effects(tree, Head(1, 2)) == []


def test_facts_of_a_head_are_those_of_the_file(tree):
    head = Head(1, 2)
    assert head_facts.role(tree, head) == "induction"
    heads, ablation = (tree[name].to_dataset().sel(layer=1, head=2) for name in ("heads", "ablation"))
    scores = {one.name: one for one in head_facts.scores(tree, head)}
    assert scores["induction"].value == pytest.approx(float(heads["induction"].mean()))
    assert scores["induction"].low == pytest.approx(float(heads["induction_low"]))
    assert scores["induction"].chance == pytest.approx(float(heads["chance_induction"].mean()))
    assert {"previous_token", "duplicate_token", "first_token", "self"} <= set(scores)
    effects = {(one.metric, one.condition): one for one in head_facts.effects(tree, head)}
    assert {condition for metric, condition in effects if metric == "loss"} == {"zero", "mean", "resample"}
    change = hw.effect(tree["ablation"].to_dataset(), "loss").sel(layer=1, head=2, ablation="zero").mean()
    assert effects["loss", "zero"].mean == pytest.approx(float(change))
    assert effects["loss", "zero"].low == pytest.approx(float(ablation["loss_effect_low"].sel(ablation="zero")))
    assert effects["loss", "zero"].unit == "nat"
    assert head_facts.role(tree, Head(7, 0)) == ""
    assert head_facts.scores(tree, Head(7, 0)) == head_facts.effects(tree, Head(7, 0)) == []


def test_effects_of_a_sweep_get_intervals_of_their_own(folder):
    tree = Folder(folder).open(SWEEP)
    (one,) = [one for one in head_facts.effects(tree, Head(0, 3)) if one.metric == "loss"]
    change = hw.effect(tree.to_dataset(), "loss").sel(layer=0, head=3)
    assert one.mean == pytest.approx(float(change.mean()))
    low, high = bootstrap_interval(change.values)
    assert (one.low, one.high) == (pytest.approx(float(low)), pytest.approx(float(high)))
    assert one.low < one.mean < one.high
    assert head_facts.partners(tree, Head(0, 3)) == {}
    assert head_facts.stored_patterns(tree) is None


def test_partners_are_the_strongest_of_other_layers_on_either_side():
    score = np.full((1, 3, 2, 3, 2), np.nan)
    score[0, 0, :, 1, 0], score[0, 1, 0, 2, :] = [0.2, 0.7], [0.4, 0.3]
    dims = ("kind", "sender_layer", "sender_head", "receiver_layer", "receiver_head")
    coords = {dim: range(3) if dim.endswith("layer") else range(2) for dim in dims[1:]}
    ds = xr.Dataset(
        {"composition": (dims, score), "floor_mean": ("kind", [0.1]), "floor_sd": ("kind", [0.2])},
        coords=coords | {"kind": ["k"]},
    )
    found = head_facts.partners(xr.DataTree(ds), Head(1, 0), top=2)
    assert [(str(one.head), one.score) for one in found["from", "k"]] == [("L0H1", 0.7), ("L0H0", 0.2)]
    assert [(str(one.head), one.score) for one in found["into", "k"]] == [("L2H0", 0.4), ("L2H1", 0.3)]
    assert found["from", "k"][0].deviations == pytest.approx(3.0)
    assert set(head_facts.partners(xr.DataTree(ds), Head(0, 0))) == {("into", "k")}


def large(layers=2, heads=2, labels=2, long="x"):
    """A file that a page could not bear: many heads, many labels, long texts."""
    return xr.DataTree(
        xr.Dataset(
            {
                "loss": (
                    ("layer", "head", "step"),
                    np.zeros((layers, heads, labels)),
                    {"long_name": long, "units": long},
                )
            },
            coords={"layer": range(layers), "head": range(heads), "step": [f"{long}{n}" for n in range(labels)]},
        )
    )


def test_what_a_page_cannot_bear_is_not_offered():
    tree = large(layers=1000, heads=100)
    (one,) = variables.variables(tree)
    with pytest.raises(DeclarationError, match="100000 heads: at most 20000 can be drawn"):
        variables.heads(tree, one)
    assert len(variables.heads(large(100, 200), named(large(100, 200), "loss"))) == 20_000
    (one,) = variables.variables(large(labels=30_000))
    assert len(one.others["step"]) == 1000
    assert one.others["step"][999] == "x999"
    assert float(variables.values(large(labels=30_000), one, "value", {"step": "x999"}).sum()) == 0.0
    (one,) = variables.variables(large(long="\u202e" + "y" * 5_000_000))
    assert len(one.label) < 300
    assert "\u202e" not in one.label
    assert len(variables.variables(xr.DataTree(xr.Dataset({f"v{n}": large()["loss"] for n in range(1500)})))) == 1000


def test_texts_of_megabytes_are_cut():
    long = "\u202e\x1b[31m<b>" + "y" * 5_000_000
    score, effect = head_facts.Score(long, long, 0.5, 0.4, 0.6, 0.1), head_facts.Effect(long, long, long, 0.5, 0.4, 0.6)
    shown = sentences.scores_table([score]) + sentences.effects_table([effect]) + sentences.prompt_heading(long)
    shown += sentences.heading("L0H0", long) + sentences.note(long) + sentences.files([Listed(long, long)] * 5000, long)
    assert len(shown) < 200_000
    assert not {"\u202e", "\x1b"} & set(shown)
    assert "<b>y" not in shown
    assert "and 4900 more" in shown


def test_only_so_many_effects_are_computed(monkeypatch):
    """A file of 100,000 conditions does not keep the page."""
    asked = []
    monkeypatch.setattr(head_facts, "bootstrap_interval", lambda numbers: asked.append(len(numbers)) or (0.0, 1.0))
    shape = (1, 1, 100_000, 2)
    ds = xr.Dataset(
        {
            "loss": (("layer", "head", "step", "example"), np.zeros(shape)),
            "baseline_loss": (("run", "example"), np.zeros((1, 2))),
        },
        coords={"layer": [0], "head": [0], "run": ["clean"]},
        attrs={"base": "clean"},
    )
    assert len(head_facts.effects(xr.DataTree(ds), Head(0, 0))) == len(asked) == head_facts.MOST
