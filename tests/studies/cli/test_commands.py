"""The commands about results, as a user runs them: what they print, write and return."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace

import netCDF4
import numpy as np
import pandas as pd
import pytest

import headwise as hw
from headwise.studies.cli import shared
from headwise.studies.cli.main import main, make_parser
from tests.support import browser as driver


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small study, written by the command."""
    out = tmp_path_factory.mktemp("study") / "results" / "study.nc"
    assert main(["induction", "--n", "4", "--length", "8", "--out", str(out)]) == 0
    return out


@pytest.fixture
def folder(tmp_path, study):
    """Two measurements by hand, a damaged file and an unfinished run."""
    from tests.studies.catalogue import test_catalogue as hand

    hw.write_netcdf(hand.measured([[2.0, 3.0]]), tmp_path / "a.nc")
    hw.write_netcdf(hand.measured([[9.0, np.nan]], model="large"), tmp_path / "b.nc")
    hand.unfinished(tmp_path, "later.nc")
    (tmp_path / "bad.nc").write_bytes(b"nothing")
    return tmp_path


def printed(capsys, *arguments, status=0):
    assert main([str(argument) for argument in arguments]) == status
    return capsys.readouterr()


def rows(text):
    """The words of each line below the rule of a table."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("─"))
    return [line.split() for line in lines[start + 1 :]]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["results", "ls", "nowhere"], "headwise: the folder nowhere does not exist"),
        (["results", "show", "nowhere.nc"], "headwise: there is no file nowhere.nc"),
        (["results", "show", "."], "headwise: . is a folder: open it with Results, or name a file in it"),
        (["results", "show", "later.nc.parts"], "headwise: later.nc.parts is an unfinished run: the same call or"),
        (["results", "show", "bad.nc"], "headwise: {folder}/bad.nc cannot be read: it is no NetCDF file"),
        (["results", "query", "a.nc", "lost"], "headwise: there is no variable 'lost': did you mean loss"),
        (["results", "query", ".", "lost"], "headwise: there is no variable 'lost' in a.nc: did you mean loss"),
        (["results", "query", "a.nc", "loss", "--where", "f(1)"], "headwise: where='f(1)', character 1: a call is"),
        (["results", "query", "a.nc", "loss", "--sort", "x"], "headwise: sort='x': there are the columns name"),
        (["results", "query", "a.nc", "loss", "--top", "0"], "headwise: top, the number of rows, must be 1 or more"),
        (["results", "export", "a.nc", "loss", "-o", "/proc/x.csv"], "headwise: cannot write /proc/x.csv"),
        (["plot", "a.nc", "loss", "-o", "x.html", "--select", "layer"], "headwise: --select layer: write a dim and"),
        (["plot", "a.nc", "lost", "-o", "x.html"], "headwise: there is no variable 'lost'"),
        (["plot", "bad.nc", "loss", "-o", "x.html"], "headwise: {folder}/bad.nc cannot be read"),
        (["report", "bad.nc"], "headwise: {folder}/bad.nc cannot be read"),
        (["report", "a.nc", "-o", "x.pdf"], "headwise: --out x.pdf: end it in .html"),
        (["rerun", "nowhere.nc"], "headwise: there is no file nowhere.nc"),
        (["app", "nowhere"], "headwise: "),
    ],
)
def test_errors_are_one_line_and_status_1(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    said = printed(capsys, *arguments, status=1)
    assert said.err.splitlines()[-1].startswith(message.format(folder=folder))
    assert said.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["results", "nothing"],
        ["results", "show"],
        ["results", "export", "a.nc", "loss"],
        ["plot", "a.nc", "loss"],
        ["results", "query", "a.nc", "loss", "--top", "few"],
        ["completion", "tcsh"],
        ["nothing"],
    ],
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: headwise" in capsys.readouterr().err


def test_results_without_a_command_helps(capsys):
    assert "headwise results export" in printed(capsys, "results", status=2).out


def parsers(parser=None):
    """Every parser of the command line."""
    parser = parser or make_parser()
    yield parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_every_command_has_examples_that_parse(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = list(parsers())
    assert {parser.prog for parser in found} >= {
        f"headwise {name}"
        for name in ("induction", "plan", "results ls", "results show", "results query", "results export", "plot",
                     "report", "rerun", "app", "completion")
    }  # fmt: skip
    for parser in found:
        text = parser.format_help()
        assert max(map(len, text.splitlines())) <= 80, parser.prog
        assert "examples:" in text, parser.prog
        examples = text.split("examples:\n")[1]
        examples = re.sub(r"\\\n\s+", "", examples).splitlines()
        for line in examples:
            if line.startswith("  headwise "):
                command = re.split(r"\s{3,}", line.strip())[0]
                words = shlex.split(command.split(" > ~")[0])[1:]
                assert parser.prog.startswith(f"headwise {words[0]}") or parser.prog == "headwise"
                assert parse(words).run is not None


def parse(words):
    from headwise.studies.cli.main import _joined

    return make_parser().parse_args(_joined(words))


def test_one_option_means_one_thing():
    """The same option has the same default and kind wherever it is."""
    meaning = {}
    for parser in parsers():
        for action in parser._actions:
            for name in action.option_strings:
                if name not in ("--help", "-h", "--out", "-o", "--model", "--where"):
                    meaning.setdefault(name, set()).add((action.dest, str(action.default), str(action.type)))
    assert {name for name, kinds in meaning.items() if len(kinds) > 1} == set()


def test_sorting_downwards_needs_no_equals_sign():
    for words in (["--sort", "-effect"], ["--sort=-effect"]):
        assert parse(["results", "query", "a.nc", "loss", *words]).sort == "-effect"
    assert parse(["results", "query", "a.nc", "loss", "--sort", "effect"]).sort == "effect"


# ---------------------------------------------------------------------------------------------------------------------
# the study, once and again


def test_a_finished_study_is_not_run_again_but_when_asked_to(study, capsys, monkeypatch):
    from headwise.studies.report import report

    monkeypatch.setattr(report, "write_report", lambda tree, path: path)
    before = study.stat()
    said = printed(capsys, "induction", "--n", "4", "--length", "8", "--out", study)
    assert "holds the whole result already; --fresh runs everything again" in said.err
    assert "1/9" not in said.err
    assert study.stat().st_mtime_ns == before.st_mtime_ns


def test_fresh_is_passed_on(monkeypatch, tmp_path):
    from headwise.studies.analyses.induction import InductionStudy

    asked = []

    def stopped(self, model, progress=None, *, out=None, resume=True):
        asked.append((out, resume))
        raise KeyboardInterrupt

    monkeypatch.setattr(InductionStudy, "run", stopped)
    for more in ([], ["--fresh"]):
        assert main(["induction", "--out", str(tmp_path / "x.nc"), *more]) == 130
    assert asked == [(tmp_path / "x.nc", True), (tmp_path / "x.nc", False)]


def test_report_of_a_measurement(folder, capsys):
    assert printed(capsys, "report", folder / "a.nc").out.startswith(str(folder / "a.html"))
    assert (folder / "a.html").read_text().startswith("<!DOCTYPE html>")
    printed(capsys, "report", folder / "a.nc", "-o", folder / "new" / "again.html")
    assert (folder / "new" / "again.html").is_file()


NO_BROWSER = pytest.mark.skipif(driver.found() is None, reason="Chromium is not installed: SVG is not drawn")


@pytest.mark.parametrize("name", ["grid.html", pytest.param("grid.svg", marks=NO_BROWSER)])
def test_plot_of_a_variable(folder, capsys, name):
    out = printed(capsys, "plot", folder / "a.nc", "loss", "-o", folder / name).out
    assert out.startswith(str(folder / name))
    assert (folder / name).read_text().lstrip().startswith(("<!DOCTYPE html>", "<svg", "<?xml"))


def test_rerun_says_whether_it_agrees(monkeypatch, folder, capsys):
    from headwise.studies.reproduce import rerun as again
    from headwise.studies.reproduce.agreement import Agreement

    asked = []

    def rerun(path, **given):
        asked.append((path, given["device"], given["tolerance"]))
        return Agreement(str(path), 1e-6, {"loss": 2.0}, {} if "a.nc" in str(path) else {"loss": "off by 2"}, {})

    monkeypatch.setattr(again, "rerun", rerun)
    assert "agree" in printed(capsys, "rerun", folder / "a.nc", "--device", "cpu").out
    found = json.loads(printed(capsys, "rerun", folder / "b.nc", "--tolerance", "0.5", "--json", status=1).out)
    assert (found["agrees"], found["differences"]) == (False, {"loss": 2.0})
    assert asked == [(str(folder / "a.nc"), "cpu", 1e-6), (str(folder / "b.nc"), "auto", 0.5)]


def test_app_is_served_as_asked(monkeypatch, folder):
    from headwise.studies import app

    asked = []
    monkeypatch.setattr(app, "serve", lambda folder, **given: asked.append((folder, given)))
    assert (
        main(["app", str(folder), "--port", "8080", "--no-show", "--model", "words-2l", "--allow", "lab.example"]) == 0
    )
    assert asked == [
        (
            str(folder),
            {"address": "127.0.0.1", "port": 8080, "show": False, "model": "words-2l", "allow": ["lab.example"]},
        )
    ]


# ---------------------------------------------------------------------------------------------------------------------
# shells


def run(*arguments, **given):
    return subprocess.run(
        [sys.executable, "-m", "headwise", *map(str, arguments)], capture_output=True, text=True, **given
    )


def test_a_reader_that_goes_away_is_no_error(folder):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "headwise", "results", "ls", folder, "--json"],
            stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_commands_about_results_import_no_models(folder):
    code = (
        "import sys\nfrom headwise.studies.cli.main import main\n"
        f"main(['results', 'ls', {str(folder)!r}])\nmain(['results', 'query', {str(folder)!r}, 'loss'])\n"
        f"main(['results', 'show', {str(folder / 'a.nc')!r}])\n"
        "print([name for name in ('torch', 'transformers', 'nnsight', 'holoviews') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(shell, capsys):
    out = printed(capsys, "completion", shell).out
    assert "headwise" in out
    assert "_ARGCOMPLETE" in out


def completed(folder, line):
    """What the shell would be given for `line`, asked as argcomplete's script asks it."""
    code = "from headwise.studies.cli.main import main; main()"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n",
             "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "words.txt")}  # fmt: skip
    subprocess.run([sys.executable, "-c", code], env=os.environ | asked, cwd=folder, check=True, capture_output=True)
    return (folder / "words.txt").read_text().split("\n")


def test_commands_files_and_variables_are_completed(folder):
    assert completed(folder, "headwise re") == ["results", "report", "rerun"]
    assert completed(folder, "headwise results show a") == ["a.nc"]
    assert completed(folder, "headwise results query a.nc l") == ["loss"]
    assert completed(folder, "headwise results query a.nc loss --to") == ["--top"]


def test_completers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "deep").mkdir()
    (folder / "deep" / "c.nc").write_bytes(b"")
    assert shared.complete_files("") == ["deep/", "a.nc", "b.nc", "bad.nc"]
    assert shared.complete_files("deep/") == ["deep/c.nc"]
    assert shared.complete_files(f"{folder}/a") == [f"{folder}/a.nc"]
    assert shared.complete_files("none/x") == []
    assert shared.complete_variables("", Namespace(file="a.nc")) == ["loss", "baseline_loss"]
    assert shared.complete_variables("b", Namespace(place=".")) == ["baseline_loss"]
    for place in ("bad.nc", "none.nc", ""):
        assert shared.complete_variables("", Namespace(file=place)) in ([], ["loss", "baseline_loss"])


def test_missing_numbers_are_null(capsys):
    shared.print_json({"a": [float("nan"), float("inf"), 1.5], "b": ({"c": -float("inf")},)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": [{"c": None}]}


def test_values_of_dims_are_numbers_where_they_are():
    assert [shared.choice(text) for text in ("layer=1", "x=0.5", "ablation=zero", "name=a=b")] == [
        ("layer", 1), ("x", 0.5), ("ablation", "zero"), ("name", "a=b"),
    ]  # fmt: skip


def test_output_elsewhere_than_a_file_is_flushed(monkeypatch, folder):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["results", "ls", str(folder)]) == 0
    assert "a.nc" in out.getvalue()
