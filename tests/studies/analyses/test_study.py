"""The flagship study: right on the planted circuit, silent where there is none, and stored whole."""

import json
import math

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ResultError
from headwise.metrics import induction, previous_token
from headwise.studies import InductionStudy, RepeatedTokens
from headwise.studies.analyses.conclusion import conclude
from headwise.studies.analyses.heads import describe_heads, untrained_scores
from headwise.studies.analyses.induction import STAGES
from tests.oracles.planted import INDUCTION, LENGTH, PREVIOUS, VOCAB
from tests.oracles.raw_hooks import random_gpt2

STUDY = InductionStudy(n=8, length=LENGTH, draws=20)


@pytest.fixture(scope="module")
def tree(planted):
    return STUDY.run(planted)


def name(place):
    return f"L{place[0]}H{place[1]}"


def test_it_finds_the_planted_heads_and_no_other(tree):
    assert json.loads(tree.attrs["heads"]) == {"induction": [name(INDUCTION)], "previous-token": [name(PREVIOUS)]}
    roles = tree["heads"]["role"].values
    assert roles[INDUCTION] == "induction"
    assert roles[PREVIOUS] == "previous-token"
    assert int((tree["heads"]["q_induction"] <= 0.05).sum()) >= 1
    assert float(tree["heads"]["p_induction"][INDUCTION]) == pytest.approx(1 / 401)


def test_behaviour_before_and_after_the_repeat(tree):
    behaviour = tree["behaviour"].to_dataset()
    assert float(behaviour["accuracy_after"].sel(run="clean").mean()) == 1.0
    assert float(behaviour["accuracy_before"].sel(run="clean").mean()) < 0.2
    by_hand = behaviour["loss"].sel(run="clean").isel(position=slice(LENGTH, 2 * LENGTH - 1)).mean("position")
    np.testing.assert_allclose(behaviour["loss_after"].sel(run="clean"), by_hand, atol=1e-6)
    assert np.isnan(behaviour["loss"].isel(position=-1)).all()


def test_sets_against_controls(tree):
    sets = tree["sets"].to_dataset()
    assert sets["set"].values.tolist() == ["induction heads", "previous-token heads", "both"]
    assert sets["draws"].sel(control="same layers").values.tolist() == [9, 9, 20]
    assert sets["exhaustive"].sel(control="same layers").values.tolist() == [1, 1, 0]
    for row, heads in enumerate(sets["heads"].values):
        for drawn in sets["control_heads"].values[row].ravel():
            assert not set(heads.split()) & set(drawn.split())
    matched = sets.sel(control="same layers")
    np.testing.assert_allclose(matched["control_accuracy"].mean("example").fillna(1.0), 1.0)
    np.testing.assert_allclose(matched["p_loss"].sel(set="induction heads"), 1 / 10)
    np.testing.assert_allclose(matched["p_loss"].sel(set="both"), 1 / 21)


def test_patching_says_what_carries_what(tree):
    patching = tree["patching"].to_dataset()
    clean = float(patching["clean_induction"].mean())
    score, ratio = patching["set_induction"].mean("example"), patching["set_normalized"]
    assert float(score.sel(component="q")) == pytest.approx(clean, abs=1e-4)
    assert float(score.sel(component="k")) < 0.1
    assert float(score.sel(component="v")) == pytest.approx(clean, abs=1e-4)
    assert float(ratio.sel(component="q")) == pytest.approx(1, abs=1e-4)
    assert float(ratio.sel(component="v")) < 0
    assert int(np.nanargmin(patching["noising_normalized"].values)) == np.ravel_multi_index(
        (2, *INDUCTION), patching["noising_normalized"].shape
    )


def test_causal_check(tree):
    ds = tree["composition"].to_dataset()
    assert float(ds["receiver_induction"].mean()) == pytest.approx(1, abs=1e-4)
    assert float(ds["ablated_induction"].max()) < 0.2
    np.testing.assert_allclose(ds["control_induction"], 1, atol=1e-4)
    np.testing.assert_allclose(ds["p_induction"], 1 / 10)


def test_what_the_planted_heads_write(tree, planted):
    ds, direct = tree["attribution"].to_dataset(), hw.direct_logit_attribution(planted, STUDY.task)
    for layer, head in np.ndindex(*ds["attribution"].shape[:2]):
        here = direct["attribution"].sel(source=f"L{layer}H{head}")
        np.testing.assert_array_equal(ds["attribution"].sel(layer=layer, head=head), here)
    parts = ds["attribution"].sum(("layer", "head")) + ds["other"].sum("part")
    np.testing.assert_allclose(parts, ds["whole"], rtol=1e-4)
    mean = ds["attribution"].mean("example").values
    assert np.unravel_index(int(mean.argmax()), mean.shape) == INDUCTION
    assert float(ds["set_attribution"]) == pytest.approx(float(mean[INDUCTION]))
    assert ds["p_attribution"].values == pytest.approx([1 / 10, 1 / 20])
    assert float(ds["copying"][INDUCTION]) == float(ds["set_copying"]) == 1.0
    assert np.isnan(ds["p_copying"]).all()  # other heads have no weights, so that none copies more or less


def test_estimates_stand_beside_what_was_measured(tree):
    ablation, patching = (tree[f"estimates/{name}"].to_dataset() for name in ("ablation", "patching"))
    assert ablation["ablation"].values.tolist() == ["zero", "mean"]
    measured = hw.effect(tree["ablation"].to_dataset(), "loss").sel(ablation=["zero", "mean"]).mean("example")
    np.testing.assert_allclose(ablation["exact"], measured, atol=1e-6)
    clean = tree["patching"]["baseline_logit_diff"].sel(run="clean")
    np.testing.assert_allclose(patching["exact"], (tree["patching"]["noising"] - clean).mean("example"), atol=1e-6)
    assert (ablation["exact"].attrs["units"], patching["exact"].attrs["units"]) == ("nat", "logit")
    needed = f"{name(PREVIOUS)} mean"
    assert ablation["worst"].sel(estimator="gradient", place=1) == needed  # all attention is saturated: no slope
    assert float(np.abs(ablation["estimate"].sel(estimator="gradient")).max()) < 1e-3
    texts = [finding.text for finding in conclude(tree) if finding.group == "estimates"]
    assert any(f"{name(PREVIOUS)} under mean ablation missed most: 0.00 nats" in text for text in texts)


def test_every_sentence_holds_a_number_and_changes_with_it(tree):
    findings = [(finding.group, finding.text) for finding in conclude(tree)]
    assert [group for group, _ in findings] == [finding["group"] for finding in json.loads(tree.attrs["conclusion"])]
    assert all(any(letter.isdigit() for letter in text) for _, text in findings)
    assert any("as predicted, k carries the pattern" in text for _, text in findings)
    broken = tree.copy(deep=True)
    broken["patching"]["set_induction"].loc[{"component": "k"}] = 1.0
    changed = [finding.text for finding in conclude(broken)]
    assert any("does not break the attention as predicted" in text for text in changed)
    assert not any("as predicted, k carries the pattern" in text for text in changed)


def test_conclusions_need_what_they_say(tree):
    """Each claim goes when the number it rests on goes."""

    def says(change):
        other = tree.copy(deep=True)
        change(other)
        return " ".join(finding.text for finding in conclude(other))

    assert "It is causal" in says(lambda t: None)
    assert "so they feed the keys" in says(lambda t: None)

    def controls_fall_as_much(t):
        t["composition"]["control_induction"][:] = 0.0

    def other_pairs_are_stronger(t):
        t["composition"]["pair_above"][:] = 0.2

    def no_clear_answer(t):
        t["patching"]["clean_logit_diff"][:] = -1.0

    def nothing_costs(t):
        t["ablation"]["loss"][:] = t["ablation"]["baseline_loss"].sel(run="clean", drop=True).values - 0.5

    def zero_hurts_and_mean_does_not(t):
        base = t["ablation"]["baseline_loss"].sel(run="clean", drop=True).values
        t["ablation"]["loss"].loc[{"layer": 0, "head": 0, "ablation": "zero"}] = base + 2
        t["ablation"]["loss_effect_q"].loc[{"layer": 0, "head": 0, "ablation": "zero"}] = 1e-6
        t["ablation"]["constant_share"].loc[{"layer": 0, "head": 0}] = 0.97

    def another_head_writes_more(t):
        t["attribution"]["control_attribution"][:] = 1e6

    def nothing_is_written(t):
        t["attribution"]["set_attribution_low"][()] = -0.1

    def others_copy_too(t):
        t["attribution"]["control_copying"][:] = 1.0

    def nothing_copies(t):
        t["attribution"]["set_copying"][()] = 0.5

    assert "So they write the answer themselves." in says(lambda t: None)
    assert "not shown that they write the answer more than other heads do" in says(another_head_writes_more)
    assert "the interval does not lie above 0" in says(nothing_is_written)
    assert "So they copy, and that does not set them apart" in says(others_copy_too)
    assert "their weights alone do not show that they copy" in says(nothing_copies)
    assert "Not shown to be causal" in says(controls_fall_as_much)
    assert "the weights alone do not show that they feed the keys" in says(other_pairs_are_stronger)
    assert "cannot be judged (no clear answer before)" in says(no_clear_answer)
    assert "No head costs anything beyond noise under any ablation (none adds 0.01 nats)" in says(nothing_costs)
    changed = says(zero_hurts_and_mean_does_not)
    assert (
        "What L0H0 does depends on the ablation: necessary under zero (+2.00 nats), not necessary under mean" in changed
    )
    assert "97% of its output is the same for every prompt: zeroing takes that constant away" in changed


def test_result_survives_netcdf_and_is_written_whole_or_not_at_all(tree, tmp_path, monkeypatch):
    path = hw.write_netcdf(tree, tmp_path / "deep" / "result.nc")
    found = hw.open_result(path, load=True)
    path.rename(tmp_path / "elsewhere.nc")
    xr.testing.assert_identical(found, tree)  # all of it is in memory, also what is called like a group
    path = hw.write_netcdf(tree, path)
    before = path.read_bytes()

    def fails(self, target, **options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.DataTree, "to_netcdf", fails)
    with pytest.raises(ResultError, match=r"cannot write .*result\.nc: No space left on device"):
        hw.write_netcdf(tree, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["result.nc"]


def test_provenance_is_complete(tree):
    attrs = tree.attrs
    for key in (
        "schema_version",
        "model",
        "model_revision",
        "weight_hash",
        "tokenizer_hash",
        "device",
        "dtype",
        "created",
    ):
        assert attrs[key], key
    assert InductionStudy.from_json(attrs["study"]) == STUDY
    assert {"headwise", "torch", "transformers", "nnsight", "numpy", "xarray"} == set(json.loads(attrs["versions"]))
    assert set(json.loads(attrs["seconds_by_stage"])) == set(STAGES)
    assert all(isinstance(value, str | int | float) for node in tree.subtree for value in node.attrs.values())


def test_every_variable_is_labelled(tree):
    for node in tree.subtree:
        for variable, array in node.data_vars.items():
            if array.dtype.kind == "f":
                assert array.attrs.get("units"), f"{node.path}/{variable} has no units"
                assert array.attrs.get("long_name"), f"{node.path}/{variable} has no long_name"


def test_reading_a_file_that_is_none(tmp_path):
    with pytest.raises(ResultError, match="there is no file"):
        hw.open_result(tmp_path / "none.nc", load=True)
    (tmp_path / "text.nc").write_text("hello")
    with pytest.raises(ResultError, match=r"text\.nc cannot be read: it is no NetCDF file"):
        hw.open_result(tmp_path / "text.nc", load=True)


def test_a_model_without_the_circuit_gets_no_roles_and_says_so():
    model = hw.load(random_gpt2(2, 3, 8, 60, 40, scale=0.02))
    tree = InductionStudy(n=4, length=6, draws=5).run(model)
    assert json.loads(tree.attrs["heads"]) == {"induction": [], "previous-token": []}
    texts = [finding["text"] for finding in json.loads(tree.attrs["conclusion"])]
    assert any(text.startswith("No head is an induction head: the highest score is 0.1") for text in texts)
    assert not any("carries" in text or "causal" in text for text in texts)


@pytest.mark.heavy
def test_untrained_models_are_flagged_no_more_often_than_stated():
    """With the threshold out of the way, heads of untrained models pass the comparison with untrained heads at the rate
    that the false discovery rate allows.
    """
    task = RepeatedTokens(n=4, length=8)
    flagged = 0
    for seed in range(12):
        model = hw.load(type(random_gpt2(1, 1, 2, 8, 8))(random_gpt2(2, 4, 8, 60, 40).config))
        described = describe_heads(model, task, threshold=1e-9, untrained=20, seed=100 + 20 * seed)
        flagged += any((described[f"q_{name}"] <= 0.05).any() for name in ("induction",))
    assert flagged <= 3  # 12 models at 5%: more than 3 has probability 0.002


def test_untrained_scores_do_not_touch_the_models_own_randomness(small_model):
    import torch

    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    first = untrained_scores(small_model, RepeatedTokens(n=2, length=5), [induction, previous_token], [1, 2])
    assert torch.rand(1) == wanted
    assert first["induction"].dims == ("seed", "layer", "head")
    again = untrained_scores(small_model, RepeatedTokens(n=2, length=5), [induction, previous_token], [2])
    np.testing.assert_array_equal(first["induction"].sel(seed=2), again["induction"].sel(seed=2))
    assert not math.isclose(float(first["induction"][0, 0, 0]), float(first["induction"][1, 0, 0]), abs_tol=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 1}, "n, the number of prompts, must be 2 or more, got 1"),
        ({"threshold": 2}, "threshold=2: a score lies between 0 and 1"),
        ({"draws": 0}, "draws must be 1 or more, got 0"),
        ({"untrained": 5}, "untrained=5: with so few, no single head can stand out at 0.05; at least 20 are needed"),
    ],
)
def test_wrong_studies_are_refused(fields, message):
    with pytest.raises(DeclarationError, match=message):
        InductionStudy(**fields)


def test_a_study_too_long_for_the_model_is_refused_before_any_forward_pass(planted):
    passes = []
    handle = planted.module.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(DeclarationError, match=f"GPT2LMHeadModel reads at most {VOCAB}, so length can be 2 to 12"):
        InductionStudy(length=13).run(planted)
    handle.remove()
    assert passes == []
