"""Tables over several results, and results that are combined along models, seeds and steps."""

import json

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.interventions import Grid, Head, MeanAblate, ZeroAblate
from headwise.metrics import accuracy, loss
from headwise.studies import RepeatedTokens, capture, measure
from headwise.studies.catalogue.results import Results
from tests.support.results_by_hand import attributes, measured, studied


def test_a_table_over_several_files(folder):
    results = Results(folder)
    frame = results.table("loss", where="effect > 0.5 and layer >= 0", sort="-effect", top=4)
    assert list(frame.columns) == ["file", "model", "name", "layer", "head", "value", "effect"]
    assert list(zip(frame["file"], frame["name"], frame["effect"], strict=True)) == [
        ("deep/b.nc", "L0H1", 8.0),
        ("c.nc", "L0H0", 3.0),
        ("a.nc", "L0H1", 2.0),
        ("a.nc", "L0H0", 1.0),
    ]
    assert list(results.table("loss", where="model == 'large'")["value"]) == [4.0, 1.0]
    assert list(results.table("ablation/loss")["effect"]) == [1.0, 2.0]
    alone = results.select(study="InductionStudy").table("ablation/loss", sort="-effect")
    assert list(alone.columns) == ["name", "layer", "head", "value", "effect"]
    assert list(alone["name"]) == ["L0H1", "L0H0"]
    with pytest.raises(hw.errors.UnknownNameError, match=r"there is no variable 'lost' in a.nc: did you mean loss"):
        results.table("lost")
    with pytest.raises(hw.errors.DeclarationError, match="there is no column 'effekt'"):
        results.table("loss", where="effekt > 1")


def test_coordinates_of_an_outer_group_are_found(tmp_path):
    inner = xr.Dataset({"score": (("layer",), [5.0, 6.0])})
    tree = xr.DataTree.from_dict({"/": xr.Dataset(coords={"layer": [3, 7]}), "/one/two": inner})
    tree.attrs = attributes()
    hw.write_netcdf(tree, tmp_path / "x.nc")
    assert Results(tmp_path).table("one/two/score").to_dict("list") == {"layer": [3, 7], "value": [5.0, 6.0]}


def test_combined_along_models_and_seeds(folder):
    results = Results(folder)
    seeds = results.select(study="measure", model="small", state="complete").combine("seed")
    assert seeds["loss"].dims == ("seed", "layer", "head", "example")
    assert list(seeds["seed"].values) == [0, 1]
    np.testing.assert_array_equal(seeds["loss"].sel(seed=1).values[0, :, 0], [1.5, 9.0])
    assert json.loads(seeds.attrs["combined"]) == ["a.nc", "deep/b.nc"]
    assert seeds.attrs["model"] == "small"
    assert "task" not in seeds.attrs
    np.testing.assert_array_equal(hw.effect(seeds, "loss").sel(seed=0).values[0, :, 0], [1.0, 2.0])
    hw.write_netcdf(measured([[7.0, 8.0]], model="other"), folder / "other.nc")
    models = results.refresh().select(where="seed == 0 and study == 'measure' and state == 'complete'").combine("model")
    assert list(models["model"].values) == ["small", "other"]
    np.testing.assert_array_equal(models["loss"].sel(model="other").values[0, :, 0], [7.0, 8.0])


def test_combined_along_steps(tmp_path):
    for step in (1000, 50):
        hw.write_netcdf(studied(model_revision=f"step{step}", loss=[[step, 0.0]]), tmp_path / f"{step}.nc")
    hw.write_netcdf(studied(step=7, loss=[[7, 0.0]]), tmp_path / "attribute.nc")
    results = Results(tmp_path)
    for what in ({"variable": "ablation/loss"}, {"group": "ablation"}):
        steps = results.combine("step", **what)
        assert list(steps["step"].values) == [7, 50, 1000]
        assert list(steps["loss"].values[:, 0, 0, 0]) == [7.0, 50.0, 1000.0]
        assert set(steps.data_vars) == {"loss", "baseline_loss"}
    with pytest.raises(hw.errors.UnknownNameError, match="has groups: say group= one of ablation and words"):
        results.combine("step")
    with pytest.raises(hw.errors.UnknownNameError, match="there is no group 'ablations' in"):
        results.combine("step", group="ablations")


def test_tokens_may_differ_between_seeds(tmp_path):
    for seed, tokens in enumerate((["a", "b"], ["c", "d"])):
        ds = measured(seed=seed).assign_coords(token=(("example", "position"), [tokens]), position=[0, 1])
        hw.write_netcdf(ds, tmp_path / f"{seed}.nc")
    both = Results(tmp_path).combine("seed")
    assert both["token"].dims == ("seed", "example", "position")
    assert both["token"].sel(seed=1).values.tolist() == [["c", "d"]]


@pytest.mark.parametrize(
    ("one", "two", "dim", "message"),
    [
        (measured(layers=[0]), measured(layers=[1], model="b"), "model",
         r"1.nc and 2.nc differ in the coordinate 'layer': at place 0 it is 0 and 1"),
        (measured([[1, 2]]), measured([[1, 2, 3]], model="b"), "model",
         r"1.nc and 2.nc differ in the coordinate 'head': 2 values \(0 to 1\) and 3 \(0 to 2\)"),
        (measured(), measured(), "model",
         r"1.nc and 2.nc have the same model, small: select one of them, or combine along seed and step"),
        (measured(), measured(), "seed", r"1.nc and 2.nc have the same seed, 0"),
        (measured(), measured(), "step", "1.nc has no step: it has no attribute step"),
        (measured(), measured(), "layer", "dim='layer': results are combined along model, seed and step"),
        (measured(), measured(model="b", seed=3), "model",
         r"differ in task: RepeatedTokens\(n=2, length=3\) and RepeatedTokens\(n=2, length=3, seed=3\)"),
        (measured(), measured(model="b", interventions='{"type": "MeanAblate"}'), "model",
         r"differ in interventions: ZeroAblate\(\) and MeanAblate\(\)"),
        (measured(), measured(model="b", base="corrupted"), "model", "differ in base: clean and corrupted"),
        (measured(), measured(model="b").rename(loss="kl"), "model", "kl only in 2.nc, loss only in 1.nc"),
        (measured(), measured(model="b").transpose("head", "layer", ...), "model", "differ in the dims of loss"),
        (measured(), measured(model="b").assign_coords(extra=1), "model", "'extra' is in only one of"),
    ],
)  # fmt: skip
def test_what_cannot_stand_side_by_side_is_said(tmp_path, one, two, dim, message):
    hw.write_netcdf(one, tmp_path / "1.nc")
    hw.write_netcdf(two, tmp_path / "2.nc")
    with pytest.raises(hw.errors.HeadwiseError, match=message):
        Results(tmp_path).combine(dim)


def test_real_measurements_are_catalogued_and_combined(tmp_path, words_model):
    grid = Grid(lambda head: ZeroAblate(Head(1, head)), head=range(2))
    netcdf = {}
    for seed in range(3):
        netcdf[seed] = measure(words_model, RepeatedTokens(n=4, length=5, seed=seed), grid, [loss, accuracy])
        hw.write_netcdf(netcdf[seed], tmp_path / f"{seed}.nc")
    hw.write_netcdf(capture(words_model, RepeatedTokens(n=2, length=4), [Head(1, 2).pattern]), tmp_path / "pattern.nc")
    results = Results(tmp_path)
    assert [(entry.study, entry.seed) for entry in results] == [
        *(("measure", seed) for seed in range(3)),
        ("capture", 0),
    ]
    seeds = results.select(study="measure").combine("seed")
    frame = results.select(study="measure").table("loss")
    for seed, ds in netcdf.items():
        np.testing.assert_array_equal(seeds["loss"].sel(seed=seed), ds["loss"])
        change = hw.effect(ds, "loss").mean("example").values
        np.testing.assert_array_equal(frame["effect"][frame["file"] == f"{seed}.nc"], change)
    hw.write_netcdf(
        measure(words_model, RepeatedTokens(n=4, length=5, seed=9), MeanAblate(Head(0, 0)), loss), tmp_path / "9.nc"
    )
    with pytest.raises(hw.errors.DeclarationError, match="differ in interventions"):
        results.refresh().select(study="measure").combine("seed")
