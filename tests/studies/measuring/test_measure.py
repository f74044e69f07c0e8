"""measure, effect, normalized: labels, units, and numbers derived from what was measured."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from headwise.interventions import Grid, Head, Layer, MeanAblate, Patch, ZeroAblate
from headwise.metrics import accuracy, induction, kl, logit_diff, loss, previous_token
from headwise.studies import Prompts, RepeatedTokens, capture, composition_scores, measure

TASK = RepeatedTokens(n=6, length=7, seed=2)


def test_a_grid_becomes_dims(small_model):
    grid = Grid(
        lambda component, layer, head: Patch(Head(layer, head).site(component)),
        component=["k", "v"],
        layer=small_model.layers,
        head=[1, 3],
    )
    ds = measure(small_model, TASK, grid, [loss, accuracy])
    assert ds["loss"].dims == ("component", "layer", "head", "example")
    assert ds["component"].values.tolist() == ["k", "v"]
    assert ds["head"].values.tolist() == [1, 3]
    one = measure(small_model, TASK, Patch(Head(1, 3).v), [loss])
    assert one["loss"].dims == ("example",)
    np.testing.assert_allclose(ds["loss"].sel(component="v", layer=1, head=3), one["loss"], atol=1e-5)
    named = measure(small_model, TASK, {"it": Patch(Head(1, 3).v), "not": ZeroAblate(Head(0, 0))}, [loss])
    assert named["loss"].dims == ("condition", "example")
    np.testing.assert_allclose(named["loss"].sel(condition="it"), one["loss"], atol=1e-5)


def test_positions_can_be_swept(small_model):
    grid = Grid(
        lambda layer, position: ZeroAblate(Layer(layer).resid_pre.at(position)), layer=[0, 1], position=[2, 8, 9]
    )
    ds = measure(small_model, TASK, grid, [loss])
    assert ds["loss"].dims == ("layer", "position", "example")
    one = measure(small_model, TASK, ZeroAblate(Layer(1).resid_pre.at(9)), [loss])["loss"]
    np.testing.assert_allclose(ds["loss"].sel(layer=1, position=9), one, atol=1e-5)
    tokens = measure(small_model, TASK, None, [loss])["token"]
    assert (ds["token"].values == tokens.sel(position=[2, 8, 9]).values).all()


def test_a_task_of_ones_own_is_measured_and_named(small_model):
    class Mine:
        def draw(self, model):
            return TASK.draw(model)

        reference = draw

        def __repr__(self):
            return "Mine()"

    ds = measure(small_model, Mine(), ZeroAblate(Head(0, 0)), [loss])
    np.testing.assert_array_equal(ds["loss"], measure(small_model, TASK, ZeroAblate(Head(0, 0)), [loss])["loss"])
    assert ds.attrs["task"] == '{"repr": "Mine()"}'


def test_variables_say_what_they_are(small_model):
    ds = measure(small_model, TASK, ZeroAblate(Head(0, 0)), [loss, logit_diff])
    assert ds["loss"].attrs == {
        "long_name": "next-token cross-entropy",
        "units": "nat",
        "metric": "loss",
        "references": "natural logarithm",
    }
    assert ds["baseline_loss"].attrs["long_name"] == "next-token cross-entropy, no intervention"
    assert ds["logit_diff"].attrs["units"] == "logit"
    assert ds["run"].values.tolist() == ["clean", "corrupted"]
    assert ds["token"].dims == ds["token_id"].dims == ("example", "position")
    np.testing.assert_array_equal(ds["token_id"], TASK.draw(small_model).runs["clean"])


def test_the_baseline_alone(small_model):
    ds = measure(small_model, TASK, None, [loss], runs="all")
    assert list(ds.data_vars) == ["loss", "baseline_loss"]
    batch = TASK.draw(small_model)
    (group,) = batch.groups()
    with torch.no_grad():
        for run in ("clean", "corrupted"):
            logits = small_model.module(torch.as_tensor(batch.runs[run])).logits[:, list(group.scored)]
            targets = torch.as_tensor(batch.facts(run, group).targets)
            wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
            np.testing.assert_allclose(ds["baseline_loss"].sel(run=run), wanted.numpy(), atol=1e-5)


def test_per_position_averages_to_the_mean_and_is_missing_elsewhere(small_model):
    whole = measure(small_model, TASK, ZeroAblate(Head(1, 1)), [loss])
    each = measure(small_model, TASK, ZeroAblate(Head(1, 1)), [loss], per_position=True)
    assert each["loss"].dims == ("example", "position")
    np.testing.assert_allclose(each["loss"].mean("position"), whole["loss"], atol=1e-5)
    scored = list(range(7, 13))
    assert np.isfinite(each["loss"].isel(position=scored)).all()
    assert np.isnan(each["loss"].drop_isel(position=scored)).all()


def test_effect_is_the_change_from_the_base_run(small_model):
    ds = measure(small_model, TASK, ZeroAblate(Head(0, 0)), [loss])
    change = hw.effect(ds, "loss")
    np.testing.assert_allclose(change, ds["loss"].values - ds["baseline_loss"].sel(run="clean").values)
    assert change.attrs["units"] == "nat"
    assert change.attrs["long_name"] == "change in next-token cross-entropy"
    other = measure(small_model, TASK, ZeroAblate(Head(0, 0)), [loss], base="corrupted")
    np.testing.assert_allclose(hw.effect(other, "loss"), other["loss"] - other["baseline_loss"].sel(run="corrupted"))
    assert "loss" in ds


def test_direction_is_named(small_model):
    assert measure(small_model, TASK, Patch(Head(0, 0).k), [loss]).attrs["direction"] == "noising"
    denoised = measure(small_model, TASK, Patch(Head(0, 0).k, source="clean"), [loss], base="corrupted")
    assert denoised.attrs["direction"] == "denoising"
    assert measure(small_model, TASK, ZeroAblate(Head(0, 0)), [loss]).attrs["direction"] == "none"


def test_normalized_is_one_for_clean_and_zero_for_corrupted(planted):
    task = RepeatedTokens(n=6, length=10)
    ds = measure(planted, task, {"all": Patch(Layer(0).resid_pre), "none": Patch(Head(0, 0).v)}, [logit_diff])
    ratio = hw.normalized(ds, "logit_diff")
    np.testing.assert_allclose(ratio.sel(condition="all"), 0, atol=1e-5)
    np.testing.assert_allclose(ratio.sel(condition="none"), 1, atol=1e-5)
    assert ratio.dims == ("condition",)


def test_attention_metrics_under_a_sweep(small_model):
    grid = Grid(lambda head: ZeroAblate(Head(0, head)), head=small_model.heads)
    ds = measure(small_model, TASK, grid, [induction, previous_token])
    assert ds["induction"].dims == ("head", "example", "read_layer", "read_head")
    change = hw.effect(ds, "induction")
    np.testing.assert_allclose(change.sel(read_layer=0), 0, atol=1e-6)  # a layer's own patterns come before its z
    assert float(np.abs(change.sel(read_layer=1)).max()) > 1e-3


def test_kl_is_zero_without_change_and_positive_with(small_model):
    ds = measure(small_model, TASK, {"same": Patch(Head(0, 0), source="clean"), "other": ZeroAblate(Head(0, 0))}, [kl])
    np.testing.assert_allclose(ds["kl"].sel(condition="same"), 0, atol=1e-6)
    assert float(ds["kl"].sel(condition="other").min()) > 1e-4
    np.testing.assert_allclose(ds["baseline_kl"].sel(run="clean"), 0, atol=1e-6)


def test_names_stand_for_metrics(small_model):
    """Their names in results, or in hw.metrics; a metric of one's own stands for itself."""
    mine = hw.metrics.Metric(
        hw.metrics.Card("mine", "mine", "1", (0, 1), "higher"), "logits", loss.kernel, loss.prepare
    )
    ds = measure(small_model, TASK, None, ["loss", "logit_diff", "self", mine, induction])
    assert json.loads(ds.attrs["metrics"]) == ["loss", "logit_diff", "self", "mine", "induction"]
    wanted = measure(small_model, TASK, None, [loss, logit_diff, hw.metrics.self_attention, mine, induction])
    xr.testing.assert_equal(ds, wanted)
    xr.testing.assert_equal(measure(small_model, TASK, None, "self_attention")["self"], wanted["self"])
    assert str(hw.plan(small_model, TASK, None, "logit_diff", timed=False)) == str(
        hw.plan(small_model, TASK, None, [logit_diff], timed=False)
    )
    grid = Grid(lambda head: Patch(Head(0, head).v), head=range(3))
    named, itself = (
        hw.compare_estimates(small_model, TASK, grid, metric, estimators="gradient") for metric in ("loss", loss)
    )
    xr.testing.assert_equal(named, itself)


def test_a_list_of_interventions_is_labelled_by_what_each_does(words_model, tmp_path):
    what = [
        ZeroAblate(Head(0, 3)),
        MeanAblate(Head(0, 3)),
        MeanAblate(Head(0, 3), over=("example", "position")),
        Patch(Head(1, 2).k),
        ZeroAblate(Head(0, 3)) + Patch(Head(1, 2).k),
        sum(ZeroAblate(Head(0, head)) for head in range(6)),
        hw.PathPatch(Head(0, 3), [Head(1, 2).k, Head(1, 0).k]),
        hw.Scale(Layer(0).mlp_out.at([3, 4]), 0.5),
    ]
    task = RepeatedTokens(n=3, length=6)
    ds = measure(words_model, task, what, "loss", out=tmp_path / "list.nc")
    assert ds["condition"].values.tolist() == [
        "L0H3 zero",
        "L0H3 mean (1)",
        "L0H3 mean (2)",
        "L1H2 k patch",
        "L0H3 zero + L1H2 k patch",
        "L0H0 + L0H1 + L0H2 + L0H3 + 2 more zero",
        "L0H3 to L1H2 k and L1H0 k path",
        "L0 mlp_out at 3, 4 scale",
    ]
    for number, one in enumerate(what):
        alone = measure(words_model, task, one, "loss")["loss"]
        np.testing.assert_allclose(ds["loss"].isel(condition=number), alone, atol=2e-5)
    assert hw.rerun(tmp_path / "list.nc").largest == 0.0
    assert hw.from_json(ds.attrs["interventions"]) == tuple(what)
    xr.testing.assert_equal(measure(words_model, task, tuple(what), "loss")["loss"], ds["loss"])
    few = what[:2]
    estimates = hw.compare_estimates(words_model, task, few, "loss", estimators="gradient")
    assert estimates["condition"].values.tolist() == ["L0H3 zero", "L0H3 mean"]
    assert hw.plan(words_model, task, few, timed=False).passes == 1


def test_progress_counts_every_pass(small_model):
    seen = []
    measure(small_model, TASK, ZeroAblate(Head(0, 0)), [loss], batch_size=4, progress=lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_bare_head_captures_its_z(small_model):
    found = capture(small_model, TASK, Head(1, 2))
    np.testing.assert_array_equal(found["L1H2_z"], capture(small_model, TASK, [Head(1, 2).z])["L1H2_z"])


def test_capture_labels(small_model):
    ds = capture(small_model, TASK, [Head(1, 2).pattern, Layer(0).mlp_out])
    assert ds["L1H2_pattern"].dims == ("example", "query", "key")
    assert ds["L0_mlp_out"].dims == ("example", "position", "d_model")
    np.testing.assert_allclose(ds["L1H2_pattern"].sum("key"), 1, atol=1e-5)


def test_capture_of_unequal_prompts_is_missing_beyond_their_end(words_model):
    ds = capture(words_model, Prompts(["apple banana apple", "dog cat cow dog"]), Head(1, 0).pattern)
    pattern = ds["L1H0_pattern"]
    assert pattern.sizes == {"example": 2, "query": 4, "key": 4}
    assert np.isnan(pattern.isel(example=0, query=3)).all()
    assert np.isfinite(pattern.isel(example=1)).all()
    assert ds["token"].values.tolist() == [["apple", "banana", "apple", ""], ["dog", "cat", "cow", "dog"]]
    assert np.isnan(ds["token_id"].values[0, 3])


def test_a_measurement_is_plain_xarray_and_survives_netcdf(small_model, tmp_path):
    ds = measure(small_model, TASK, {"a": ZeroAblate(Head(0, 0)), "b": MeanAblate(Head(0, 1))}, [loss, induction])
    ds.to_netcdf(tmp_path / "plain.nc")
    with xr.open_dataset(tmp_path / "plain.nc") as back:
        xr.testing.assert_identical(back.load(), ds)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: measure(m, TASK, "zero"),
            DeclarationError,
            "cannot measure 'zero': give an intervention, a list of them, a mapping",
        ),
        (lambda m: measure(m, "abc"), DeclarationError, "'abc' is no task: give RepeatedTokens(...) or Prompts([...])"),
        (lambda m: measure("words-2l", TASK), DeclarationError, "'words-2l' is no model: open one with headwise.load"),
        (lambda m: capture("words-2l", TASK, Head(0, 0)), DeclarationError, "'words-2l' is no model"),
        (lambda m: composition_scores("words-2l"), DeclarationError, "'words-2l' is no model"),
        (
            lambda m: measure(m, TASK, None, "los"),
            UnknownNameError,
            "there is no metric 'los': possible are accuracy, attention_entropy, duplicate_token",
        ),
        (lambda m: capture(m, TASK, Head(0, 0), run="dirt"), UnknownNameError, "run='dirt': the task has the runs"),
        (
            lambda m: measure(m, TASK, None, None),
            DeclarationError,
            "None is no metric: give a name such as 'loss', or a hw.metrics.Metric",
        ),
        (
            lambda m: measure(m, TASK, {1: ZeroAblate(Head(0, 0)), "1": ZeroAblate(Head(0, 1))}),
            DeclarationError,
            "the names of the conditions must differ as text, got ('1', '1')",
        ),
        (
            lambda m: measure(m, TASK, Grid(lambda loss: ZeroAblate(Head(0, loss)), loss=range(2)), [loss]),
            DeclarationError,
            "a grid axis cannot be called 'loss' here",
        ),
        (
            lambda m: measure(m, TASK, Grid(lambda position: ZeroAblate(Head(0, 0)), position=[99]), [loss]),
            DeclarationError,
            "axis 'position' takes positions of the prompts, 0 to 13",
        ),
        (lambda m: measure(m, TASK, {}), DeclarationError, "the mapping of conditions is empty"),
        (lambda m: measure(m, TASK, {"a": Head(0, 0)}), DeclarationError, "'a' is Head(0, 0): each condition must be"),
        (lambda m: measure(m, TASK, None, []), DeclarationError, "nothing to measure: name at least one metric"),
        (
            lambda m: measure(m, TASK, None, ["loss", 3]),
            DeclarationError,
            "3 is no metric: give a name such as 'loss', or a hw.metrics.Metric",
        ),
        (lambda m: measure(m, TASK, None, [loss, "loss"]), DeclarationError, "metrics must differ, got [loss, loss]"),
        (lambda m: measure(m, TASK, []), DeclarationError, "the list of conditions is empty"),
        (lambda m: measure(m, TASK, [Head(0, 0)]), DeclarationError, "cannot measure Head(0, 0) in a list: each"),
        (
            lambda m: measure(m, TASK, ZeroAblate(Head(0, 4))),
            DeclarationError,
            "L0H4 z: GPT2LMHeadModel has heads 0 to 3",
        ),
        (
            lambda m: measure(m, Prompts(["1 2 1"]), None, [induction]),
            DeclarationError,
            "induction needs a repeated sequence",
        ),
        (
            lambda m: measure(m, Prompts(["1 2 1"]), Patch(Head(0, 0)), [loss]),
            UnknownNameError,
            "the task has the runs clean",
        ),
        (lambda m: capture(m, TASK, []), DeclarationError, "nothing to capture: name at least one site"),
        (lambda m: capture(m, TASK, Head(2, 0).z), DeclarationError, "L2H0 z: GPT2LMHeadModel has layers 0 to 1"),
        (
            lambda m: capture(m, TASK, Head(0, 0).z, run="dirty"),
            UnknownNameError,
            "the task has the runs clean and corrupted",
        ),
        (
            lambda m: hw.effect(measure(m, TASK, None, [loss]), "loss"),
            UnknownNameError,
            "nothing was intervened on here: ds['loss'] is the loss of the clean run as it is",
        ),
        (
            lambda m: hw.normalized(measure(m, Prompts(["1 2 1"]), ZeroAblate(Head(0, 0)), [loss]), "loss"),
            UnknownNameError,
            "normalized needs the run 'corrupted': this task has clean",
        ),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_possible(small_model, call, error, message):
    with pytest.raises(error) as caught:
        call(small_model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "what",
    [
        ZeroAblate(Head(0, 9)),
        ZeroAblate(Layer(9).mlp_out),
        Patch(Head(0, 0), source="dirty"),
        ZeroAblate(Head(0, 0).z.at(99)),
    ],
    ids=repr,
)
def test_bad_input_is_refused_before_any_forward_pass(small_model, what):
    passes = []
    handle = small_model.module.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises((DeclarationError, UnknownNameError)):
            measure(small_model, TASK, what, [loss])
    finally:
        handle.remove()
    assert passes == []


def test_metrics_that_do_not_fit_are_refused(small_model):
    from headwise.metrics import Card, Metric, kl

    card = Card("mine", "", "1", (0, 1))
    with pytest.raises(DeclarationError, match="compares with all base logits"):
        Metric(card, "logits", kl.kernel, kl.prepare, needs_base=True, tokens=("targets",))
    unknown = Metric(card, "logits", loss.kernel, loss.prepare, tokens=("target",))
    with pytest.raises(
        DeclarationError, match="tokens names 'target', which it does not prepare: possible are targets"
    ):
        measure(small_model, RepeatedTokens(n=2, length=5), None, [unknown])
    flat = Metric(card, "logits", lambda logits, targets: logits.sum((-1, -2)), loss.prepare)
    with pytest.raises(DeclarationError, match=r"its kernel gives \(2,\), where \(row, scored\) is \(2, 4\)"):
        measure(small_model, RepeatedTokens(n=2, length=5), None, [flat])
    other = Metric(card, "logits", loss.kernel, lambda run: {"targets": run.tokens})
    with pytest.raises(DeclarationError, match="its argument targets has shape"):
        measure(small_model, RepeatedTokens(n=2, length=5), None, [other])


def test_prompts_of_one_length_scored_at_different_positions(small_model):
    """Each row is judged where it is scored."""
    from headwise.studies import Batch

    tokens = np.array([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
    scored = np.array([[False, False, True, False, False], [False, False, False, True, False]])

    class Mine:
        def draw(self, model):
            return Batch({"clean": tokens}, np.array([5, 5]), scored, np.roll(tokens, -1, 1))

    found = measure(small_model, Mine(), ZeroAblate(Head(0, 1)), [loss], per_position=True)["loss"].values
    assert np.isfinite(found).tolist() == scored.tolist()
