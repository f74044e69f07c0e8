"""The commands, as a user runs them: usage, status, what they print and write."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace

import pytest

from headwise.studies.cli import shared
from headwise.studies.cli.main import main, make_parser
from tests.support import browser as driver
from tests.support.commands import printed


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


def test_a_finished_study_is_not_run_again_but_when_asked_to(study, capsys, monkeypatch):
    from headwise.studies.report import report

    monkeypatch.setattr(report, "write_report", lambda tree, path: path.touch() or path)
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
        return Agreement(
            str(path), 1e-6, {"loss": 2.0}, {"loss": 1.0}, {} if "a.nc" in str(path) else {"loss": "off by 2"}, {}
        )

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
            {
                "address": "127.0.0.1",
                "port": 8080,
                "show": False,
                "model": "words-2l",
                "revision": None,
                "step": None,
                "allow": ["lab.example"],
            },
        )
    ]


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
