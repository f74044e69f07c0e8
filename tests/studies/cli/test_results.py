"""`headwise results`: what it lists, shows, queries and exports."""

import json
import sys

import netCDF4
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import headwise as hw
from headwise.studies.cli.main import main
from tests.support import results_by_hand as hand
from tests.support.commands import printed, rows


def test_ls(folder, capsys):
    said = printed(capsys, "results", "ls", folder)
    assert said.out.splitlines()[0] == f"{folder}: 3 results, 1 not finished, 1 file that cannot be read"
    assert [(row[0], row[1], row[-1]) for row in rows(said.out)] == [
        ("a.nc", "small", "complete"),
        ("b.nc", "large", "complete"),
        ("later.nc.parts", "small", "partial"),
    ]
    assert said.err == "cannot be read: bad.nc: no NetCDF file\n"


def test_ls_selects(folder, capsys):
    said = printed(capsys, "results", "ls", folder, "--model", "l*", "--where", "state == 'complete'")
    assert [row[0] for row in rows(said.out)] == ["b.nc"]
    said = printed(capsys, "results", "ls", folder, "--study", "Nothing")
    assert "none matches: models are large, small; studies are measure" in said.err
    said = printed(capsys, "results", "ls", folder, "--where", "sized > 1", status=1)
    assert said.err.startswith("headwise: where='sized > 1', character 1: there is no column 'sized'")


def test_ls_as_json(folder, capsys):
    found = json.loads(printed(capsys, "results", "ls", folder, "--json").out)
    assert [row["path"] for row in found["results"]] == ["a.nc", "b.nc", "later.nc.parts"]
    assert found["results"][1] | {"size": 0} == {
        "path": "b.nc",
        "model": "large",
        "study": "measure",
        "task": "RepeatedTokens(n=2, length=3)",
        "size": 0,
        "date": "2026-03-04T05:06:07+00:00",
        "version": "0.1.0",
        "state": "complete",
        "seed": 0,
        "step": None,
        "revision": "main",
    }
    assert found["problems"] == [{"path": "bad.nc", "reason": "no NetCDF file"}]


def test_ls_says_nothing_of_files_of_other_programs_unless_asked(folder, capsys):
    xr.Dataset({"temperature": ("x", [1.0])}).to_netcdf(folder / "weather.nc", engine="netcdf4")
    for options, named in (([], ["bad.nc"]), (["--all"], ["bad.nc", "weather.nc"])):
        said = printed(capsys, "results", "ls", folder, *options)
        lines = [line for line in said.err.splitlines() if line.startswith("cannot be read: ")]
        assert [line.split(": ")[1] for line in lines] == named
        found = json.loads(printed(capsys, "results", "ls", folder, "--json", *options).out)
        assert [one["path"] for one in found["problems"]] == named


def test_ls_tells_steps_apart(folder, capsys):
    assert " step " not in printed(capsys, "results", "ls", folder).out
    hw.write_netcdf(hand.measured(step=512), folder / "s.nc")
    lines = printed(capsys, "results", "ls", folder).out.splitlines()
    assert lines[1].split()[:3] == ["path", "model", "step"]
    (row,) = [line.split() for line in lines if line.startswith("s.nc")]
    assert row[:3] == ["s.nc", "small", "512"]


@pytest.mark.parametrize("columns", ["40", "80", "120"])
def test_ls_keeps_to_the_width_of_the_terminal(folder, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    said = printed(capsys, "results", "ls", folder)
    assert max(map(len, said.out.splitlines()[1:])) <= int(columns)
    assert "".join(line.split()[0] for line in said.out.splitlines()[3:]) .startswith("a.ncb.nc")  # fmt: skip


def test_show(folder, study, capsys):
    out = printed(capsys, "results", "show", folder / "a.nc").out
    assert out.splitlines()[0] == "Measurement of small"
    assert "L0H1 +2 and L0H0 +1" in out
    out = printed(capsys, "results", "show", study).out
    assert out.splitlines()[0] == "Induction heads of words-2l"
    tree = hw.open_result(study, load=True)
    for finding in json.loads(tree.attrs["conclusion"]):
        if finding["group"] == "summary":
            assert finding["text"] in " ".join(out.split())
    full = printed(capsys, "results", "show", study, "--all").out
    for node in tree.subtree:
        for name, array in node.to_dataset().data_vars.items():
            shape = " x ".join(f"{dim} {size}" for dim, size in array.sizes.items()) or "one value"
            assert any(line.split()[:1] == [name] and shape in line for line in full.splitlines())
    found = json.loads(printed(capsys, "results", "show", study, "--json").out)
    assert found["facts"]["task"] == "4 prompts in which 8 random tokens are repeated once, seed 0"
    assert {part["name"] for part in found["parts"]} >= {"heads", "ablation", "estimates/patching"}


def test_query(folder, capsys):
    out = printed(capsys, "results", "query", folder, "loss", "--where", "effect > 1", "--sort", "-effect").out
    assert out.splitlines()[0] == "loss: next-token cross-entropy, nat"
    assert out.splitlines()[1].split() == ["file", "model", "name", "layer", "head", "value", "effect"]
    assert rows(out) == [["b.nc", "large", "L0H0", "0", "0", "9", "8"], ["a.nc", "small", "L0H1", "0", "1", "3", "2"]]
    out = printed(capsys, "results", "query", folder / "a.nc", "loss", "--sort", "value", "--top", "1").out
    assert rows(out) == [["L0H0", "0", "0", "2", "1"]]
    said = printed(capsys, "results", "query", folder / "a.nc", "loss", "--where", "effect > 99")
    assert (rows(said.out), said.err) == ([], "no row meets the condition\n")


def test_a_table_that_is_wider_than_the_window_tells_what_all_rows_share_beneath(study, tmp_path, capsys, monkeypatch):
    for name in ("a-longer-name-1.nc", "a-longer-name-2.nc"):
        (tmp_path / name).write_bytes(study.read_bytes())
    question = ("results", "query", tmp_path, "ablation/loss", "--where", "layer == 0 and head == 3")
    whole = printed(capsys, *question).out
    monkeypatch.setenv("COLUMNS", "80")
    narrow = printed(capsys, *question).out
    assert max(map(len, whole.splitlines())) > 80 >= max(map(len, narrow.splitlines()))
    assert narrow.splitlines()[1].split()[:4] == ["file", "name", "ablation", "value"]
    assert "in all rows: model words-2l, layer 0, head 3" in narrow
    for before, after in zip(rows(whole), rows(narrow), strict=False):
        if before[0].startswith("a-longer"):
            assert after == [
                one
                for one, name in zip(before, whole.splitlines()[1].split(), strict=True)
                if name in narrow.splitlines()[1].split()
            ]


def test_query_as_json(folder, capsys):
    found = json.loads(printed(capsys, "results", "query", folder / "b.nc", "loss", "--json").out)
    assert found == [
        {"name": "L0H0", "layer": 0, "head": 0, "value": 9.0, "effect": 8.0},
        {"name": "L0H1", "layer": 0, "head": 1, "value": None, "effect": None},
    ]


def test_query_gives_what_the_study_found(study, capsys):
    found = json.loads(
        printed(capsys, "results", "query", study, "ablation/loss", "--sort", "-effect", "--top", "3", "--json").out
    )
    ds = hw.open_result(study, load=True)["ablation"].to_dataset()
    change = hw.effect(ds, "loss").mean("example")
    order = np.argsort(-change.values, axis=None)[:3]
    assert [row["effect"] for row in found] == change.values.ravel()[order].tolist()
    for row, at in zip(found, order, strict=True):
        ablation, layer, head = np.unravel_index(at, change.shape)
        assert (row["ablation"], row["name"]) == (str(ds["ablation"].values[ablation]), f"L{layer}H{head}")
        assert row["effect_low"] == ds["loss_effect_low"].values[ablation, layer, head]


def test_the_files_of_a_study_can_be_read_with_netcdf4_alone(study):
    tree = hw.open_result(study, load=True)
    with netCDF4.Dataset(study) as file:
        assert file.model == "words-2l"
        assert json.loads(file.study)["type"] == "InductionStudy"
        for name, node in tree.children.items():
            for variable, array in node.to_dataset().data_vars.items():
                stored = file.groups[name].variables[str(variable)]
                assert stored.dimensions == array.dims
                for attribute in ("units", "long_name"):
                    assert getattr(stored, attribute, None) == array.attrs.get(attribute)
                if array.dtype.kind in "fi":
                    assert "long_name" in stored.ncattrs() or "units" in stored.ncattrs()
                    np.testing.assert_array_equal(np.ma.filled(stored[...].astype(float), np.nan), array.values)
                else:
                    assert np.asarray(stored[...]).tolist() == array.values.tolist()
                for dim in array.dims:
                    if dim in array.coords:
                        assert np.asarray(file.groups[name].variables[dim][:]).tolist() == array[dim].values.tolist()


def test_export_csv(folder, capsys, tmp_path):
    out = tmp_path / "new" / "table.csv"
    said = printed(capsys, "results", "export", folder, "loss", "--sort", "-value", "-o", out)
    assert said.out.endswith("4 rows of file, model, name, layer, head, value, effect\n")
    frame = pd.read_csv(out)
    assert frame["value"].tolist()[:3] == [9.0, 3.0, 2.0]
    assert frame["file"].tolist() == ["b.nc", "a.nc", "a.nc", "b.nc"]


def test_export_parquet(folder, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow, which writes Parquet, is not installed")
    out = tmp_path / "table.parquet"
    assert main(["results", "export", str(folder), "loss", "--top", "2", "-o", str(out)]) == 0
    assert pd.read_parquet(out)["value"].tolist() == [2.0, 3.0]


def test_export_needs_pyarrow_for_parquet(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = printed(capsys, "results", "export", folder, "loss", "-o", tmp_path / "x.parquet", status=1)
    assert said.err == "headwise: writing Parquet needs pyarrow: pip install 'headwise[parquet]', or export to .csv\n"
    said = printed(capsys, "results", "export", folder, "loss", "-o", tmp_path / "x.xlsx", status=1)
    assert said.err.endswith("x.xlsx: end it in .csv or .parquet\n")
    assert not list(tmp_path.glob("x.*"))


def test_results_without_a_command_helps(capsys):
    assert "headwise results export" in printed(capsys, "results", status=2).out
