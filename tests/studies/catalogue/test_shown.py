"""What other tools and people see of results: plain NetCDF, listings and summaries."""

import json
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure
from headwise.studies.catalogue.results import Results
from headwise.studies.catalogue.summary import summary
from tests.support.results_by_hand import measured, studied


def test_files_can_be_read_with_netcdf4_alone(tmp_path, words_model):
    task = RepeatedTokens(n=3, length=5)
    grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=words_model.layers, head=words_model.heads)
    ds = measure(words_model, task, grid, loss)
    hw.write_netcdf(ds, tmp_path / "one.nc")
    with netCDF4.Dataset(tmp_path / "one.nc") as file:
        variable = file.variables["loss"]
        assert variable.dimensions == ("layer", "head", "example")
        assert (variable.units, variable.long_name) == ("nat", "next-token cross-entropy")
        np.testing.assert_array_equal(np.asarray(variable[:]), ds["loss"].values)
        assert list(file.variables["head"][:]) == list(range(8))
        assert list(file.variables["run"][:]) == ["clean", "corrupted"]
        assert file.variables["token"][0, 0] == ds["token"].values[0, 0]
        assert file.model == "words-2l"
        assert json.loads(file.task)["length"] == 5
        assert json.loads(file.versions)["headwise"] == hw.__version__


def test_shown_as_text(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)  # the line of the folder is as long as its name
    folder = Path(folder.name)
    (folder / "bad.nc").write_bytes(b"x")
    lines = repr(Results(folder)).splitlines()
    assert lines[0] == f"{folder}: 5 results, 1 not finished, 1 file that cannot be read"
    assert lines[1].split() == ["path", "model", "study", "task", "size", "date", "state"]
    assert [line.split()[0] for line in lines[3:8]] == ["a.nc", "c.nc", "deep/b.nc", "later.nc.parts", "study.nc"]
    assert "2026-03-04 05:06" in lines[3]
    assert lines[-1] == "cannot be read: bad.nc: no NetCDF file"
    assert max(map(len, lines)) <= 110
    assert repr(Results(folder).select(model="large")).startswith(f"{folder}: 1 selected result, 1 file")


def test_shown_in_a_notebook(folder):
    hw.write_netcdf(measured(model="<b>bold</b>"), folder / "z.nc")
    (folder / "<i>.nc").write_bytes(b"x")
    text = Results(folder)._repr_html_()
    assert text.count("<tr") == 7
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert "<b>" not in text
    assert "&lt;i&gt;.nc: no NetCDF file" in text
    assert "#" not in text.replace("&#", "")  # no colours of its own


def test_summary_of_a_measurement_by_hand(folder):
    said = summary(folder / "deep" / "b.nc")
    text = str(said)
    assert text.splitlines()[0] == "Measurement of small"
    assert "2 conditions (layer 1 x head 2) of ZeroAblate on the clean run, by loss" in text
    assert "2 prompts in which 3 random tokens are repeated once, seed 1" in text
    assert "2026-03-04 05:06 UTC, headwise 0.1.0" in text
    assert said.points == ("loss is 1 nat without intervention; changed most by L0H1 +8 and L0H0 +0.5",)
    assert "loss           layer 1 x head 2 x example 1  nat  next-token cross-entropy" in text
    assert summary(measured([[1.5, 9.0]], seed=1)) == said
    html = said._repr_html_()
    assert "L0H1 +8" in html
    assert "layer 1 x head 2 x example 1" in html


def test_summary_of_a_study(folder):
    tree = studied()
    tree.attrs["conclusion"] = json.dumps(
        [
            {"group": "summary", "text": "It does."},
            {"group": "x", "text": "More."},
            {"group": "limits", "text": "Less."},
        ]
    )
    said = summary(tree)
    assert said.title == "A study"
    assert said.points == ("It does.", "What was not shown: 1 limit, in the report.")
    assert [part.name for part in said.parts] == ["ablation", "words"]
    assert "More." not in str(said)
    assert json.loads(json.dumps(said.as_dict()))["facts"]["model"] == "small (main)"
    assert "prob  example 1" in said.text(full=True)


@pytest.mark.parametrize(
    "result",
    [
        xr.Dataset(),
        xr.Dataset({"a": ("x", [1.0])}),
        xr.Dataset(attrs={"task": "{", "study": "5", "conclusion": '[1, {"group": "summary"}]', "metrics": '["loss"]'}),
        xr.DataTree.from_dict({"/a": xr.Dataset({"b": 1.0})}),
        xr.DataTree(),
    ],
)
def test_summary_of_anything(result):
    said = summary(result)
    assert str(said).startswith(said.title)
    assert said._repr_html_()
