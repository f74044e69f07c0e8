"""rerun: the same numbers again, and what it says where they are not, or where nothing can be repeated."""

import json
import re

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import ModelError, ResultError
from headwise.interventions import ZeroAblate
from headwise.metrics import Card, Metric, loss
from headwise.studies import InductionStudy, measure
from headwise.studies.cli.main import main
from headwise.studies.reproduce.agreement import compare
from headwise.studies.reproduce.rerun import rerun
from tests.oracles.planted import planted_model
from tests.support.changed_files import MEASURED, TASK, changed, every_head, own


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_is_measured_again(files, name):
    found = rerun(files[name])
    stored = hw.open_result(files[name], load=True)
    assert found.agrees, str(found)
    numeric = [str(key) for key, one in stored.variables.items() if one.dtype.kind in "biuf"]
    assert set(found.differences) == set(numeric)
    assert found.largest <= 1e-6
    assert found.only_in_one == {}
    assert found.notes == ()


def test_a_study_is_done_again(words_model, tmp_path):
    study = InductionStudy(n=4, length=8, draws=3, threshold=0.3)
    path = hw.write_netcdf(study.run(words_model), tmp_path / "study.nc")
    said = []
    found = rerun(path, progress=said.append)
    assert found.agrees, str(found)
    assert found.largest <= 1e-6
    assert {"heads/induction", "sets/p_accuracy", "estimates/patching/estimate", "ablation/loss"} <= {
        *found.differences
    }
    assert found.notes == ()
    assert said[0] == "opening words-2l"
    assert "every head ablated" in said


def test_one_changed_number_is_named_with_its_size_and_place(files, tmp_path):
    def change(tree):
        tree["loss"].values[1, 2, 0, 8] += 0.25

    found = rerun(changed(files["heads"], tmp_path / "changed.nc", change))
    assert not found.agrees
    assert list(found.beyond) == ["loss"]
    assert found.differences["loss"] == pytest.approx(0.25)
    assert {size for name, size in found.differences.items() if name != "loss"} == {0.0}
    assert "1 of 576 values differ, by 0.25 at most (at layer 1, head 2, example 0, position 8)" in str(found)
    assert "does not agree" in str(found)
    assert rerun(tmp_path / "changed.nc", tolerance=0.3).agrees


def test_it_is_ready_for_json(files, tmp_path):
    def change(tree):
        tree["baseline_loss"].values[0, 0] = np.nan

    told = json.loads(
        json.dumps(rerun(changed(files["baseline"], tmp_path / "a.nc", change)).to_dict(), allow_nan=False)
    )
    assert told["agrees"] is False
    assert told["beyond"].keys() == {"baseline_loss"}
    assert told["tolerance"] == 1e-6
    assert told["differences"]["baseline_induction"] == 0


def test_text_shapes_missing_values_and_missing_variables_count():
    old = xr.Dataset(
        {
            "same": ("x", [1.0, np.nan, np.inf]),
            "text": ("x", ["a", "b", "c"]),
            "gap": ("x", [1.0, np.nan, 2.0]),
            "shape": ("x", [1.0, 2.0, 3.0]),
            "turned": (("x", "y"), np.arange(6.0).reshape(3, 2)),
            "large": ("x", [1e6, 1.0, 0.0]),
            "gone": ("x", [0, 1, 2]),
        },
        coords={"x": [0, 1, 2]},
    )
    new = old.drop_vars(["gone", "shape"]).assign(
        text=("x", ["a", "d", "e"]),
        gap=("x", [1.0, 5.0, 2.0]),
        shape=("z", [1.0, 2.0]),
        turned=old["turned"].T,
        large=("x", [1e6 + 0.5, 1.0, 0.0]),
        more=("x", [0.0, 0.0, 0.0]),
    )
    trees = [xr.DataTree.from_dict({"/": xr.Dataset(), "/part": one}) for one in (old, new)]
    found = compare(*trees, "old.nc")
    assert found.beyond == {
        "part/text": "2 of 3 texts differ (at x 1): 'd' instead of 'b'",
        "part/gap": "1 of 3 values are missing or infinite in one only (at x 1): 5 instead of nan",
        "part/shape": "has (z 2) instead of (x 3)",
    }
    assert found.only_in_one == {"part/gone": "the file", "part/more": "the repetition"}
    assert found.differences == {"part/x": 0.0, "part/same": 0.0, "part/turned": 0.0, "part/large": 0.5}
    assert compare(*trees, tolerance=1e-7).beyond.keys() == {"part/text", "part/gap", "part/shape", "part/large"}
    assert "no longer computed: part/gone\nnew: part/more" in str(found)


def test_what_another_version_computes_is_no_disagreement(files, tmp_path):
    def change(tree):
        del tree["induction"]
        tree["of_before"] = ("example", np.zeros(tree.sizes["example"]))

    found = rerun(changed(files["baseline"], tmp_path / "old.nc", change))
    assert found.agrees
    assert found.only_in_one["induction"] == "the repetition"
    text = str(found)
    assert "old.nc agrees: all" in text
    assert "no longer computed: of_before" in text
    assert "new: induction" in text
    assert main(["rerun", str(tmp_path / "old.nc")]) == 0

    def and_a_number(tree):
        change(tree)
        tree["baseline_loss"].values[0, 0] += 1e-3

    other = rerun(changed(files["baseline"], tmp_path / "other.nc", and_a_number))
    assert not other.agrees
    assert re.search(r"does not agree: 1 variable of \d+ differs \(numbers agree to 1e-06\)", str(other))
    assert main(["rerun", str(tmp_path / "other.nc")]) == 1


def test_labels_that_one_lacks_are_named_and_the_others_compared():
    values, dims = np.arange(6.0).reshape(3, 2), ("estimator", "head")
    old = xr.Dataset({"estimate": (dims, values), "exact": ("head", [0.0, 1.0])}, {"estimator": ["a", "b", "c"]})
    new = old.isel(estimator=[2, 0])
    found = compare(*(xr.DataTree.from_dict({"/part": one}) for one in (old, new)))
    assert found.agrees
    assert found.only_in_one == {"part/estimator b": "the file"}
    assert found.differences == {"part/estimate": 0.0, "part/exact": 0.0}
    back = compare(*(xr.DataTree.from_dict({"/part": one}) for one in (new, old)))
    assert back.agrees
    assert back.only_in_one == {"part/estimator b": "the repetition"}
    renamed = compare(xr.DataTree(old), xr.DataTree(old.assign_coords(estimator=["a", "b", "d"])))
    assert not renamed.agrees
    assert renamed.beyond == {"estimator": "1 of 3 texts differ (at estimator 2): 'd' instead of 'c'"}
    moved = compare(xr.DataTree(old), xr.DataTree(new.assign(estimate=new["estimate"] + 0.5)))
    assert moved.beyond.keys() == {"estimate"}
    nothing = compare(xr.DataTree(old[["exact"]].rename(exact="mine")), xr.DataTree(old))
    assert not nothing.agrees
    assert "does not agree: no variable is in both" in str(nothing)


def test_rounding_is_told_as_rounding():
    old = xr.Dataset({"same": ("x", [1.0, 2.0]), "sum": ("x", [0.1, 4.0]), "near": ("x", [1.0, 3.0])})
    off = np.array([2**-54, 0.0])
    new = old.assign(sum=old["sum"] + off)
    assert (new["sum"] != old["sum"]).any()
    found = compare(xr.DataTree(old), xr.DataTree(new), "a.nc")
    share = float(abs(new["sum"] - old["sum"]).max()) / 4.0
    assert found.relative == {"same": 0.0, "sum": share, "near": 0.0}
    agrees = "a.nc agrees: of 3 numeric variables, 2 are the same to the last bit, 1 but for rounding (a share of"
    assert str(found) == f"{agrees} {share:.1g} at most)."
    far = compare(xr.DataTree(old), xr.DataTree(new.assign(near=old["near"] + 5e-7)), "a.nc")
    assert str(far).endswith("at most), and 1 differ by 5e-07 at most (numbers agree to 1e-06).")
    assert far.agrees


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"schema_version": "99"}, ResultError, r"newer headwise \(schema 99; this one reads up to 1\)"),
        ({"schema_version": None, "dtype": None}, ResultError, r"has no attribute schema_version and dtype"),
        ({"task": None}, ResultError, r"no attribute task of a measurement"),
        ({"metrics": '["loss", "mine"]'}, ResultError, r"the metric mine is one of your own.*accuracy"),
        ({"task": '{"repr": "MyTask(3)"}'}, ResultError, r"its task is one of your own, MyTask\(3\)"),
        ({"interventions": '{"type": "Mine"}'}, ResultError, r"unknown type 'Mine'"),
        ({"interventions": "{"}, ResultError, r"not JSON"),
        ({"metrics": "{"}, ResultError, r"not JSON"),
        ({"metrics": "3"}, ResultError, r"what it declares cannot be read"),
        ({"interventions": '{"type": "mapping"}'}, ResultError, r"what it declares cannot be read"),
        ({"task": "[1]"}, ResultError, r"its task is no task"),
        ({"interventions": "7"}, ResultError, r"cannot measure 7"),
        ({"study": '{"type": "MyStudy"}'}, ResultError, r"unknown type 'MyStudy' in JSON: possible are InductionStudy"),
        ({"estimator": "guess"}, ResultError, r"its estimator 'guess' is not known"),
        ({"metrics": '["accuracy"]'}, ResultError, r"has no baseline_accuracy"),
        (
            {"weight_hash": "0123"},
            ModelError,
            r"words-2l is not the model of the file: weights 0123 then, [0-9a-f]{16} now",
        ),
        ({"tokenizer_hash": "0123"}, ModelError, r"words-2l is not the model of the file: tokenizer 0123 then"),
        ({"model": "words-9l"}, ModelError, r"cannot get words-9l from the Hugging Face Hub"),
        ({"model_revision": "memory"}, ResultError, r"a module in memory, words-2l: give it as rerun"),
        ({"model_revision": "local", "model": "../elsewhere"}, ResultError, r"measured on the folder \.\./elsewhere"),
    ],
)
def test_what_cannot_be_repeated_is_said(files, tmp_path, words, error, message):
    path = changed(files["baseline"], tmp_path / "changed.nc", own(words))
    with pytest.raises(error, match=message) as told:
        rerun(path)
    assert "\n" not in str(told.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ResultError, match="there is no file"):
        rerun(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("hello")
    with pytest.raises(ResultError, match="no NetCDF file"):
        rerun(tmp_path / "text.nc")
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(tmp_path / "foreign.nc")
    with pytest.raises(ResultError, match="has no attribute schema_version"):
        rerun(tmp_path / "foreign.nc")
    with pytest.raises(ResultError, match="takes the path of a file, and was given a Dataset: write_netcdf makes one"):
        hw.rerun(xr.Dataset())
    with pytest.raises(ResultError, match="tolerance=nan"):
        rerun(tmp_path / "foreign.nc", tolerance=float("nan"))


def test_a_metric_of_ones_own_is_named(words_model, tmp_path):
    mine = Metric(Card("mine", "my metric", "1", (0.0, 1.0)), "logits", loss.kernel, loss.prepare)
    path = hw.write_netcdf(measure(words_model, TASK, None, [loss, mine]), tmp_path / "mine.nc")
    with pytest.raises(ResultError, match="the metric mine is one of your own"):
        rerun(path)


def test_a_model_in_memory_is_given_and_other_weights_are_noted(tmp_path):
    model = hw.load(planted_model())
    path = hw.write_netcdf(measure(model, TASK, every_head(model, ZeroAblate), [loss]), tmp_path / "planted.nc")
    assert rerun(path, model=model).agrees
    other = planted_model()
    other.lm_head.weight.data.mul_(1.5)
    found = rerun(path, model=hw.load(other))
    assert not found.agrees
    assert re.search("another model: weights [0-9a-f]{16} then, [0-9a-f]{16} now", found.notes[0])
    assert found.differences["loss"] > 1e-3


def test_a_folder_beside_the_file_is_found_and_asked_for(words_model, tmp_path, monkeypatch):
    words_model.module.save_pretrained(tmp_path / "mine")
    words_model.tokenizer.save_pretrained(tmp_path / "mine")
    model = hw.load(tmp_path / "mine")
    path = hw.write_netcdf(measure(model, TASK, None, [loss]), tmp_path / "mine.nc")
    with pytest.raises(ResultError, match=rf"asks to open the model in the folder {tmp_path}/mine: .*yes=True"):
        rerun(path)
    asked = []
    assert rerun(path, yes=lambda text: asked.append(text) or True).agrees
    assert asked == [f"{path} asks to open the model in the folder {tmp_path}/mine"]
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "mine.nc")
    with pytest.raises(ResultError, match="files do not keep where folders are"):
        rerun(moved, yes=True)
    assert rerun(moved, model=tmp_path / "mine").agrees
    assert main(["rerun", str(moved), "--model", str(tmp_path / "mine")]) == 0
    monkeypatch.chdir(tmp_path)
    assert rerun(moved, yes=True).agrees
    assert main(["rerun", str(moved)]) == 1
    assert main(["rerun", str(moved), "--yes"]) == 0


def test_other_versions_are_noted(files, tmp_path):
    def change(tree):
        versions = json.loads(tree.attrs["versions"]) | {"torch": "1.0"}
        tree.attrs |= {"versions": json.dumps(versions), "device": "cuda:0"}

    found = rerun(changed(files["baseline"], tmp_path / "old.nc", change))
    assert found.agrees
    assert found.notes[0].startswith("torch: 1.0 then, ")
    assert found.notes[1] == "device: cuda:0 then, cpu now"
    assert "note: torch: 1.0 then" in str(found)
