"""Which runs are measured; and a measurement without intervention: its dims, its numbers, what can be done with it."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import UnknownNameError
from headwise.interventions import Grid, Head, Patch, ZeroAblate
from headwise.metrics import induction, loss, previous_token
from headwise.studies import Prompts, RepeatedTokens, measure
from headwise.studies.reproduce.recipe import recipe

TASK = RepeatedTokens(n=5, length=7, seed=2)
THREE = Prompts(
    ["apple banana apple", "dog cat dog"],
    ["banana", "cat"],
    corrupted=["cat banana apple", "apple cat dog"],
    runs={"other": ["dog dog apple", "cat cat dog"]},
)


def by_hand(model, run="clean"):
    """Loss of each example, and induction and previous-token scores ``(layer, head, example)``, by explicit loops."""
    batch = TASK.draw(model)
    tokens, scored = torch.as_tensor(batch.runs[run]), batch.scored
    with torch.no_grad():
        out = model.module.to(torch.float32)(tokens, output_attentions=True)
    losses = []
    for row in range(len(tokens)):
        of_row = [-out.logits[row, at].log_softmax(-1)[batch.targets[row, at]] for at in np.flatnonzero(scored[row])]
        losses.append(float(torch.stack(of_row).mean()))
    shape = (len(model.layers), len(model.heads), len(tokens))
    found = {"induction": np.zeros(shape), "previous_token": np.zeros(shape)}
    half = TASK.length
    for layer, head, row in np.ndindex(shape):
        pattern = out.attentions[layer][row, head].numpy()
        found["induction"][layer, head, row] = np.mean([pattern[i, i - half + 1] for i in range(half, 2 * half)])
        found["previous_token"][layer, head, row] = np.mean([pattern[i, i - 1] for i in range(1, 2 * half)])
    return np.array(losses), found


@pytest.fixture
def eager(small_model):
    """The model, whose module gives attention patterns for as long as the test lasts."""
    before = small_model.module.config._attn_implementation
    small_model.module.set_attn_implementation("eager")
    yield small_model
    small_model.module.set_attn_implementation(before)


def test_without_intervention_the_metric_is_that_of_the_base_run(eager):
    losses, scores = by_hand(eager)
    ds = measure(eager, TASK, None, [loss, induction, previous_token])
    assert ds["loss"].dims == ("example",)
    np.testing.assert_allclose(ds["loss"], losses, atol=1e-5)
    assert ds["loss"].attrs["long_name"] == "next-token cross-entropy"
    for name, wanted in scores.items():
        assert ds[name].dims == ("layer", "head", "example")
        assert ds["layer"].values.tolist() == [0, 1]
        assert ds["head"].values.tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(ds[name], wanted, atol=1e-5)
        assert ds[f"baseline_{name}"].dims == ("run", "layer", "head", "example")
        xr.testing.assert_equal(ds[f"baseline_{name}"].sel(run="clean", drop=True), ds[name])
    assert ds["run"].values.tolist() == ["clean"]
    other = measure(eager, TASK, None, [loss, induction], base="corrupted")
    np.testing.assert_allclose(other["induction"], by_hand(eager, "corrupted")[1]["induction"], atol=1e-5)
    assert other["run"].values.tolist() == ["corrupted"]


def test_values_at_each_position_without_intervention(small_model):
    each = measure(small_model, TASK, None, [loss, induction], per_position=True)
    assert each["loss"].dims == ("example", "position")
    assert each["induction"].dims == ("layer", "head", "example")
    np.testing.assert_allclose(each["loss"].mean("position"), measure(small_model, TASK)["loss"], atol=1e-6)


@pytest.mark.parametrize(
    ("what", "given", "measured"),
    [
        (None, None, ["clean"]),
        (None, "other", ["clean", "other"]),
        (None, ["corrupted", "other"], ["clean", "corrupted", "other"]),
        (None, "all", ["clean", "corrupted", "other"]),
        (ZeroAblate(Head(0, 3)), None, ["clean", "corrupted", "other"]),
        (ZeroAblate(Head(0, 3)), "clean", ["clean"]),
        (ZeroAblate(Head(0, 3)), [], ["clean"]),
        (Patch(Head(0, 3)), "clean", ["clean", "corrupted"]),
        (Patch(Head(0, 3), source="other"), ["clean"], ["clean", "other"]),
    ],
)
def test_only_the_runs_that_were_asked_for_are_run(words_model, what, given, measured):
    """A forward pass of a run shows as an embedding of its tokens; what an intervention takes from is always run."""
    whole = measure(words_model, THREE, what, ["loss", "prob"], runs="all")
    seen = []
    inputs = {run: tokens.tolist() for run, tokens in THREE.draw(words_model).runs.items()}
    handle = words_model.module.transformer.wte.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].tolist())
    )
    try:
        ds = measure(words_model, THREE, what, ["loss", "prob"], runs=given, check=False)
    finally:
        handle.remove()
    assert [run for run, tokens in inputs.items() if tokens in seen] == measured
    assert ds["run"].values.tolist() == measured
    for name in ds.data_vars:
        xr.testing.assert_equal(ds[name], whole[name].sel(run=measured) if "run" in ds[name].dims else whole[name])
    assert hw.plan(words_model, THREE, what, runs=given, timed=False).runs == tuple(measured)
    assert ds.attrs.get("runs") == (None if given is None else json.dumps(given))


@pytest.mark.parametrize("what", [None, ZeroAblate(Head(0, 0))])
@pytest.mark.parametrize("call", [measure, hw.plan])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dirty", "runs='dirty': the task has the runs clean and corrupted"),
        (["clean", "dirty"], "runs='dirty': the task has the runs clean and corrupted"),
        (3, "runs=3: give 'all', the name of a run or several names: the task has the runs clean and corrupted"),
    ],
)
def test_a_run_that_is_not_there_is_refused(small_model, what, call, given, message):
    with pytest.raises(UnknownNameError) as caught:
        call(small_model, TASK, what, runs=given)
    assert str(caught.value) == message


def test_the_plan_says_which_runs_it_does(small_model):
    assert "runs            1  as they are: clean\n" in str(hw.plan(small_model, TASK, timed=False))
    assert "runs            2  as they are: clean and corrupted\n" in str(
        hw.plan(small_model, TASK, runs="all", timed=False)
    )


def test_nothing_was_intervened_on(small_model):
    ds = measure(small_model, TASK, None, [loss, induction], runs="all")
    for derived in (hw.effect, hw.normalized):
        with pytest.raises(UnknownNameError) as caught:
            derived(ds, "loss")
        assert str(caught.value) == (
            "nothing was intervened on here: ds['loss'] is the loss of the clean run as it is; give measure an "
            "intervention, such as ZeroAblate(Head(0, 0))"
        )
    table = hw.table(ds, "induction", sort="-value", top=1)
    at = np.unravel_index(int(ds["induction"].mean("example").values.argmax()), (2, 4))
    assert table["name"].tolist() == [f"L{at[0]}H{at[1]}"]
    assert "effect" not in table
    np.testing.assert_allclose(hw.table(ds, "loss")["value"], [float(ds["loss"].mean())])
    grid = hw.plots.head_grid(ds["induction"])
    np.testing.assert_allclose(
        grid.dimension_values("value"), ds["induction"].mean("example").values.ravel(), rtol=1e-6
    )
    assert "changed most" not in str(hw.summary(ds))
    assert hw.plots.picture(ds, "induction").dimension_values("value").shape == (8,)
    curve = next(part for part in hw.plots.picture(ds, "loss") if part.group == "Curve")
    np.testing.assert_allclose(curve.dimension_values(1), ds["loss"].values, rtol=1e-6)


@pytest.mark.parametrize("what", [None, Grid(lambda head: ZeroAblate(Head(0, head)), head=range(3))])
@pytest.mark.parametrize("runs", [None, "corrupted", "all"])
def test_a_file_is_measured_again_with_its_runs(words_model, tmp_path, monkeypatch, what, runs):
    monkeypatch.chdir(tmp_path)
    task = RepeatedTokens(n=3, length=6)
    ds = measure(words_model, task, what, [loss, induction], runs=runs, out="one.nc")
    found = hw.rerun("one.nc")
    assert found.agrees, str(found)
    assert found.largest == 0.0
    python = recipe(ds.attrs, ds, "one.nc").python
    assert ("runs=" in python) == (runs is not None)
    scope = {}
    exec(python.rpartition("\n")[0], scope)  # all but the line that writes a file
    xr.testing.assert_equal(scope["ds"].drop_attrs(), ds.drop_attrs())


def test_a_file_from_before_runs_could_be_asked_for_is_measured_again(words_model, tmp_path):
    """It holds baselines of every run, and dims of the head that was looked at."""
    ds = measure(words_model, RepeatedTokens(n=3, length=6), None, [loss, induction], runs="all")
    old = ds.drop_vars(["loss", "induction"]).rename(layer="read_layer", head="read_head")
    old = old.transpose("run", "example", "read_layer", "read_head", ...)
    del old.attrs["runs"]
    hw.write_netcdf(old, tmp_path / "old.nc")
    found = hw.rerun(tmp_path / "old.nc")
    assert found.agrees, str(found)
    assert found.largest == 0.0
    assert hw.table(old, "baseline_induction")["value"].size == 2 * 16
    assert "without intervention" in str(hw.summary(old))


def test_an_interrupted_measurement_of_other_runs_is_not_taken(words_model, tmp_path):
    """The same file asked for with other runs is another result."""
    task, path = RepeatedTokens(n=3, length=6), tmp_path / "one.nc"
    measure(words_model, task, None, [loss], out=path)
    both = measure(words_model, task, None, [loss], runs="all", out=path)
    assert both["run"].values.tolist() == ["clean", "corrupted"]
    assert hw.open_result(path)["run"].values.tolist() == ["clean", "corrupted"]
    one = measure(words_model, task, None, [loss], out=path)
    assert one["run"].values.tolist() == ["clean"]


@pytest.mark.parametrize("estimator", ["gradient", "integrated"])
def test_estimates_take_the_runs_that_were_asked_for(words_model, estimator):
    task, grid = RepeatedTokens(n=3, length=6), Grid(lambda head: ZeroAblate(Head(0, head)), head=range(3))
    both = measure(words_model, task, grid, [loss], estimator=estimator, steps=2)
    one = measure(words_model, task, grid, [loss], estimator=estimator, steps=2, runs="clean")
    assert one["run"].values.tolist() == ["clean"]
    xr.testing.assert_equal(one["loss"], both["loss"])
    xr.testing.assert_equal(one["baseline_loss"], both["baseline_loss"].sel(run=["clean"]))
    alone = measure(words_model, task, None, [loss], estimator=estimator, steps=2)
    xr.testing.assert_equal(alone["loss"], measure(words_model, task, None, [loss])["loss"])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (hw.Patch("L1H2.k", source="clean"), "takes from the run that it changes, clean"),
        (hw.PathPatch("L0H3", "L1H2.k", source="clean"), "takes from the run that it changes, clean"),
        (hw.Knockout("L1H2", 1, [3, 4]), "no query attends to a later key"),
    ],
)
def test_what_changes_nothing_is_told(words_model, what, says):
    task = RepeatedTokens(n=2, length=5)
    with pytest.warns(UserWarning, match=says):
        ds = measure(words_model, task, {"one": what, "none": None}, [loss])
    np.testing.assert_allclose(ds["loss"], ds["baseline_loss"].sel(run="clean").expand_dims(condition=2), atol=1e-5)


def test_axes_of_fractions(words_model):
    """Steering with several strengths: the loss of each is that of the intervention alone."""
    task = RepeatedTokens(n=2, length=5)
    ds = measure(words_model, task, Grid(lambda alpha: hw.Scale("L1H2", alpha), alpha=[-1, 0.5]), [loss])
    assert (ds["alpha"].dtype, ds["alpha"].values.tolist()) == ("float64", [-1.0, 0.5])
    for alpha in (-1.0, 0.5):
        alone = measure(words_model, task, hw.Scale("L1H2", alpha), [loss])["loss"]
        np.testing.assert_allclose(ds["loss"].sel(alpha=alpha), alone, atol=1e-5)
