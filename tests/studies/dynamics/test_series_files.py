"""Files of a study over steps of training: listed, summed up, reported, and measured again."""

import json

import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError, ResultError
from headwise.studies.reproduce.recipe import recipe

STUDY = hw.Sweep(hw.RepeatedTokens(n=5, length=6), metrics=["induction", "loss"])
STEPS = [0, 512, 2000]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    path = tmp_path_factory.mktemp("series") / "a.nc"
    return path, hw.over_checkpoints("words-2l", STUDY, STEPS, out=path)


def test_it_is_listed_and_summed_up(series):
    path, ds = series
    (entry,) = hw.Results(path.parent)
    assert (entry.model, entry.study, entry.state) == ("words-2l", "Sweep", "complete")
    said = hw.summary(path)
    wanted = "induction and loss without intervention, at 3 steps of training, 0 to 2000"
    assert dict(said.facts)["what"] == wanted
    scores = ds["induction"].mean("example")
    layer, head = np.unravel_index(int(np.argmax(scores.sel(step=2000).values)), scores.shape[1:])
    first, last = (float(scores.sel(step=step).max()) for step in (0, 2000))
    assert any(
        text.startswith(f"the largest induction score of a head is {first:.3g} (L")
        and text.endswith(f"and {last:.3g} (L{layer}H{head}) at step 2000")
        for text in said.points
    )
    assert float(ds.attrs["seconds"]) == pytest.approx(float(ds["step_seconds"].sum()), abs=1e-3)
    assert ds.attrs["created"] == max(ds["step_created"].values)


def test_its_report_shows_curves_a_slider_and_the_values(series, tmp_path):
    path, ds = series
    page = hw.write_report(hw.open_result(path), tmp_path / "a.html").read_text()
    assert "<h1>Induction score and next-token cross-entropy of words-2l over training</h1>" in page
    assert "Measured at 3 steps of training, from 0 to 2000." in page
    assert page.count('class="frame"') == 3
    assert f"{float(ds['loss'].sel(step=512).mean()):.4g}" in page
    assert f"{float(ds['induction'].sel(step=2000).mean('example').max()):.3f}" in page
    assert "headwise rerun a.nc" in page


def test_it_is_measured_again_step_by_step(series, tmp_path):
    path, ds = series
    again = hw.rerun(path)
    assert again.agrees
    assert again.largest == 0
    assert "loss" in again.differences
    changed = ds.copy(deep=True)
    changed["loss"][1] += 1.0
    hw.write_netcdf(changed, tmp_path / "b.nc")
    found = hw.rerun(tmp_path / "b.nc")
    assert [*found.beyond] == ["loss"]
    assert "by 1 at most (at step 1" in found.beyond["loss"]
    with pytest.raises(DeclarationError, match=r"a\.nc holds several steps: step cannot be said of all of them"):
        hw.rerun(path, model="words-2l", step=8)


def test_the_lines_that_make_it_again_run(series, tmp_path, monkeypatch):
    _, ds = series
    monkeypatch.chdir(tmp_path)
    hw.write_netcdf(ds, "a.nc")
    space = {}
    exec(recipe(ds.attrs, ds, "a.nc").python, space)
    np.testing.assert_array_equal(space["again"]["loss"], ds["loss"])


def test_of_models_in_memory_the_checkpoints_must_be_named(tmp_path):
    modules = {step: hw.load("words-2l", step=step).module for step in (0, 2000)}
    tokenizer = hw.load("words-2l").tokenizer
    ds = hw.over_checkpoints(modules, STUDY, tokenizer=tokenizer, out=tmp_path / "a.nc")
    assert ds["step"].values.tolist() == [0, 2000]
    with pytest.raises(ResultError, match="was measured on a module in memory"):
        hw.rerun(tmp_path / "a.nc")
    again = hw.rerun(tmp_path / "a.nc", model="words-2l")
    assert again.largest == 0


@pytest.mark.heavy
def test_a_study_of_several_parts_is_reported_and_taken_up(tmp_path, monkeypatch):
    study = hw.InductionStudy(n=2, length=6, draws=2, untrained=20)
    whole = hw.over_checkpoints("words-2l", study, [2000], out=tmp_path / "a.nc")
    page = hw.write_report(hw.open_result(tmp_path / "a.nc"), tmp_path / "a.html").read_text()
    assert "<h1>InductionStudy of words-2l over training</h1>" in page
    assert json.loads(whole.attrs["study"])["type"] == "InductionStudy"
    monkeypatch.delattr(hw.InductionStudy, "run")  # what is whole is read and not done again
    again = hw.over_checkpoints("words-2l", study, [2000], out=tmp_path / "a.nc")
    np.testing.assert_array_equal(again["heads"]["induction"], whole["heads"]["induction"])
    assert again["behaviour"]["loss"].dims[0] == "step"
