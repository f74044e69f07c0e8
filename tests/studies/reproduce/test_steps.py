"""Results of a model at steps of its training: told apart, lined up, and measured again at the same step."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import headwise as hw
from headwise.studies.measuring import executors
from headwise.studies.reproduce.recipe import recipe
from headwise.studies.storage.record import Record

STEPS = (1024, 8, 256)


@pytest.fixture(scope="module")
def by_step(tmp_path_factory):
    """A file for each of `STEPS`, and the numbers that went into it."""
    folder, task = tmp_path_factory.mktemp("steps"), hw.RepeatedTokens(n=3, length=6)
    measured = {}
    for step in STEPS:
        model = hw.load("words-2l", step=step)
        measured[step] = hw.measure(model, task, hw.ZeroAblate(hw.Head(0, 3)), out=folder / f"at-{step}.nc")
    return folder, measured


def test_steps_stand_in_rows_tables_and_labels(by_step):
    folder, measured = by_step
    results = hw.Results(folder)
    assert {entry.path: entry.step for entry in results} == {f"at-{step}.nc": step for step in STEPS}
    assert " step " in repr(results)
    assert "<th" in results._repr_html_()
    assert ">1024</td>" in results._repr_html_()
    table = results.table("loss")
    assert list(table.columns[:3]) == ["file", "model", "step"]
    for step in STEPS:
        (value,) = table.loc[table["step"] == step, "value"]
        assert value == pytest.approx(float(measured[step]["loss"].mean()))
    assert list(results.table("loss", where="step < 500", sort="step")["step"]) == [8, 256]
    together = results.combine("step")
    assert list(together["step"].values) == [8, 256, 1024]
    for step in STEPS:
        np.testing.assert_array_equal(together["loss"].sel(step=step), measured[step]["loss"])


def test_a_folder_without_steps_has_no_such_column(by_step, tmp_path, words_model):
    for seed in (0, 1):
        hw.measure(
            words_model,
            hw.RepeatedTokens(n=2, length=4, seed=seed),
            hw.ZeroAblate(hw.Head(0, 3)),
            out=tmp_path / f"{seed}.nc",
        )
    results = hw.Results(tmp_path)
    assert " step " not in repr(results)
    assert ">step<" not in results._repr_html_()
    assert "step" not in results.table("loss").columns
    assert "step" not in results.open("0").attrs


def test_the_same_step_is_opened_again(by_step):
    folder, _ = by_step
    agreement = hw.rerun(folder / "at-256.nc")
    assert agreement.agrees
    assert agreement.largest == 0
    with pytest.raises(hw.errors.DeclarationError, match="step of a model that is given by its name"):
        hw.rerun(folder / "at-256.nc", step=8)
    other = hw.rerun(folder / "at-256.nc", model="words-2l", step=8)
    assert not other.agrees
    assert any("another model: weights" in note for note in other.notes)
    assert hw.rerun(folder / "at-256.nc", model="words-2l", step=256).agrees


def test_a_recipe_names_the_step(by_step, tmp_path, monkeypatch):
    folder, measured = by_step
    ds = hw.open_result(folder / "at-8.nc", load=True)
    told = recipe(ds.attrs, ds, "at-8.nc")
    assert "model = hw.load('words-2l', step=8)" in told.python
    monkeypatch.chdir(tmp_path)
    exec(told.python, {})
    np.testing.assert_array_equal(hw.open_result(tmp_path / "again.nc")["loss"], measured[8]["loss"])


@pytest.mark.parametrize(
    ("attrs", "opening"),
    [
        ({"model_revision": "shipped", "step": 8}, {"step": 8}),
        ({"model_revision": "local", "step": np.int64(8)}, {"step": 8}),
        ({"model_revision": "step8", "step": 8}, {"revision": "step8"}),
        ({"model_revision": "memory", "step": 8}, {}),
        ({"model_revision": "main"}, {}),
        ({"model_revision": "shipped", "step": "no number"}, {}),
        ({}, {}),
    ],
)
def test_what_opens_the_model_of_a_file_again(attrs, opening):
    assert Record.from_attrs(attrs).opening == opening


def test_workers_open_the_same_step(by_step, monkeypatch):
    _, measured = by_step
    executors._opened.cache_clear()
    task, what = hw.RepeatedTokens(n=3, length=6), hw.ZeroAblate(hw.Head(0, 3))
    with ThreadPoolExecutor(1) as pool:
        ds = hw.measure(hw.load("words-2l", step=8), task, what, executor=pool)
    np.testing.assert_array_equal(ds["loss"], measured[8]["loss"])
    assert executors._opened.cache_info().currsize == 1


def test_what_is_said_of_a_result_names_the_step(by_step):
    folder, _ = by_step
    assert "words-2l (shipped, step 256): 2 layers of 8 heads" in str(hw.summary(folder / "at-256.nc"))
