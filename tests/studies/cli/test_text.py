"""Text from outside, such as names, titles and cells, never steers a terminal; and every output can hold ours."""

import ast
import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import unicodedata
import warnings
from itertools import product
from pathlib import Path

import pytest
import xarray as xr

import headwise as hw
from headwise.errors import HeadwiseError, ResultError, ResultWarning, ServerError, ServerWarning, printable
from headwise.interventions.remote import status_line
from headwise.studies import Results
from headwise.studies.catalogue.summary import summary
from headwise.studies.cli import shared
from headwise.studies.cli.main import main
from headwise.studies.output import progress
from headwise.studies.reproduce import agreement
from tests.support import results_by_hand as hand

ROOT = Path(hw.__file__).parent
EVIL = "x\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202egpj\u2066.\u200b\u2028[bold red]loud[/bold red]"
"""Steers a terminal by C0 and C1 controls, turns words around, hides signs, breaks lines, and is marked up for Rich."""
STYLES = re.compile(r"\x1b\[[0-9;]*m")


def bad(text):
    """The signs of a text that must not reach a terminal."""
    return [
        one for one in text if one not in "\n\t" and unicodedata.category(one) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
    ]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A measurement, a study and a file that is none, hostile in names and in every text they hold."""
    place = tmp_path_factory.mktemp("hostile\x1b[31m") / "results"
    ds = hand.measured([[2.0, 3.0]], model=EVIL)
    ds["loss"].attrs |= {"long_name": EVIL, "units": EVIL, "comment": EVIL}
    ds = ds.assign_coords(word=("head", [EVIL, "tame"])).swap_dims(head="word").rename(word="word")
    ds.attrs["title"] = EVIL
    hw.write_netcdf(ds, place / "a\x1b[31m\u202e\n.nc")
    tree = hand.studied(model=EVIL)
    tree.attrs |= {"title": EVIL, "conclusion": json.dumps([{"group": "summary", "text": EVIL}])}
    hw.write_netcdf(tree, place / "study.nc")
    (place / "torn\x1b[31m\u202e.nc").write_bytes(b"nothing")
    return place


def test_what_steers_is_written_out_and_letters_stay():
    assert printable("a\x1b[31mb") == r"a\x1b[31mb"
    assert printable("\u202eabc\u2066\u061c\u200f") == r"\u202eabc\u2066\u061c\u200f"
    assert printable("\x9b\x7f\x00\u2028\ud800\U000e0041") == r"\x9b\x7f\x00\u2028\ud800\U000e0041"
    assert printable("one\ntwo\tthree") == r"one\ntwo\tthree"
    assert printable("one\ntwo\tthree\r", lines=True) == "one\ntwo\tthree\\r"
    for text in ("naïve Ĝ 漢字 Ġthe é  😀 \u00a0", "עברית", "a\\x1b"):
        assert printable(text) == text
    assert printable(12) == "12"
    for joined in ("می\u200cخواهم", "क्\u200dष", "👩\u200d🔬"):
        assert printable(joined) == joined
    assert printable("a\u200db\u200c") == r"a\u200db\u200c"


@pytest.mark.parametrize("step", [101, pytest.param(1, marks=pytest.mark.heavy)])
def test_no_sign_at_all_steers(step):
    """Each that Unicode names; of the others, which lie behind them and in two planes for everybody's own, some."""
    named = [*range(0x33480), *range(0xE0000, 0xE01F0)]
    rest = sorted({*range(0x110000)}.difference(named))
    assert bad("".join(f"a{printable(chr(one))}" for one in [*named, *rest[::step]])) == []


@pytest.mark.parametrize("kind", [HeadwiseError, ResultError, ServerError, ServerWarning, ResultWarning])
def test_errors_and_warnings_quote_what_cannot_steer(kind):
    error = kind(f"no file is called {EVIL}")
    assert bad(str(error)) == []
    assert r"\x1b]0;owned\x07" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    if issubclass(kind, Warning):
        with pytest.warns(kind) as seen:
            warnings.warn(EVIL, kind, stacklevel=1)
        assert bad(str(seen[0].message)) == []


COMMANDS = {
    "ls": ["results", "ls", "{folder}"],
    "ls --json": ["results", "ls", "{folder}", "--json"],
    "ls of nothing": ["results", "ls", "{folder}", "--model", EVIL],
    "show": ["results", "show", "{file}"],
    "show --all": ["results", "show", "{file}", "--all"],
    "show --json": ["results", "show", "{file}", "--json"],
    "show a study": ["results", "show", "{study}"],
    "query": ["results", "query", "{file}", "loss"],
    "query --json": ["results", "query", "{file}", "loss", "--json"],
    "query a folder": ["results", "query", "{folder}", "loss"],
    "export": ["results", "export", "{file}", "loss", "-o", "{out}\x1b.csv"],
    "plot": ["plot", "{file}", "loss", "-o", "{out}\x1b.html"],
    "report": ["report", "{file}", "-o", "{out}\x1b.html"],
    "rerun": ["rerun", "{file}"],
    "an unknown variable": ["results", "query", "{file}", EVIL],
    "an unknown file": ["results", "show", EVIL],
    "an unknown model": ["plan", "--model", EVIL],
    "a condition": ["results", "query", "{file}", "loss", "--where", EVIL],
    "a selection": ["plot", "{file}", "loss", "--select", f"{EVIL}=1", "-o", "{out}.html"],
    "a command": [EVIL],
    "an option": ["results", "ls", f"--{EVIL}"],
    "a port": ["app", "{folder}", "--port", EVIL],
    "an app": ["app", EVIL],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_that_steers_is_printed(name, hostile, tmp_path, capsys):
    """Names, titles, units, cells and what was typed, in every command and its errors."""
    places = {"folder": hostile, "file": next(hostile.glob("a*")), "study": hostile / "study.nc", "out": tmp_path / "o"}
    arguments = [
        str(places[one[1 : one.index("}")]]) + one[one.index("}") + 1 :] if one.startswith("{") else one
        for one in COMMANDS[name]
    ]
    with contextlib.suppress(SystemExit):
        main(arguments)
    said = capsys.readouterr()
    assert bad(said.out + said.err) == []
    assert (said.out + said.err).strip()
    assert "Traceback" not in said.err


def test_json_means_the_same_though_its_signs_are_escaped(hostile, capsys):
    assert main(["results", "ls", str(hostile), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {one["path"] for one in listed["results"]} == {"a\x1b[31m\u202e\n.nc", "study.nc"}
    assert main(["results", "query", str(next(hostile.glob("a*"))), "loss", "--json"]) == 0
    assert EVIL in [row["word"] for row in json.loads(capsys.readouterr().out)]


def test_a_csv_file_keeps_its_data(hostile, tmp_path, capsys):
    import pandas as pd

    out = tmp_path / "loss.csv"
    assert main(["results", "export", str(next(hostile.glob("a*"))), "loss", "-o", str(out)]) == 0
    assert EVIL in list(pd.read_csv(out)["word"])
    capsys.readouterr()


def test_rows_with_escapes_stay_in_line(hostile, capsys):
    """Columns are as wide as what is shown, not as what is meant."""
    assert main(["results", "query", str(next(hostile.glob("a*"))), "loss"]) == 0
    heads, _, evil, tame = capsys.readouterr().out.splitlines()[1:5]
    at, shown = heads.index("word"), printable(EVIL)
    assert evil[at : at + len(shown)] == shown
    assert tame[at : at + 4] == "tame"
    assert len(heads) == len(evil) == len(tame)
    assert (evil.split()[-2:], tame.split()[-2:]) == (["2", "1"], ["3", "2"])


def test_results_show_themselves_without_what_steers(hostile):
    found, said = Results(hostile), summary(next(hostile.glob("a*")))
    for text in (repr(found), str(said), said.text(40, full=True), found._repr_html_(), said._repr_html_()):
        assert bad(text) == []
        assert r"\x1b" in text
    compared = agreement.compare(
        xr.DataTree(xr.Dataset({EVIL.replace("/", ""): 1.0})),
        xr.DataTree(xr.Dataset({"other": 2.0})),
        EVIL,
        notes=[EVIL],
    )
    assert bad(str(compared)) == []


def test_lines_and_bars_of_long_work_do_not_steer(capsys, monkeypatch):
    monkeypatch.setattr(status_line, "QUIET_SECONDS", 0.0)
    with status_line.telling(EVIL) as tell:
        tell(EVIL)
    assert bad(capsys.readouterr().err) == []
    with progress.Progress(EVIL, True) as bar:
        bar.update(1, 2)
        bar.say(EVIL)
        from rich.console import Console

        page = Console(file=io.StringIO(), width=400)
        page.print(bar.bar.get_renderable())
    assert bad(page.file.getvalue()) == []
    assert "[bold red]loud[/bold red]" in page.file.getvalue()


def test_names_that_a_shell_would_take_apart_are_not_completed(hostile, monkeypatch):
    monkeypatch.chdir(hostile)
    assert shared.complete_files("") == ["study.nc"]


# What is written where

PRINTING = {
    "studies/cli/shared.py",  # the one place
    "studies/training/code_4l.py",  # numbers of ours
    "studies/training/words_2l.py",  # numbers of ours
}


def calls(path):
    """Each call in a module, as ``name`` or ``module.name``, with its first argument."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else "", node.lineno


def test_everything_is_printed_through_one_place():
    """Elsewhere, a print says itself that its text is fit; or is JSON for another process of ours."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.split("/")[0] not in ("interventions", "metrics", "studies") or name in PRINTING:
            continue
        for called, first, line in calls(path):
            fit = first.startswith(("printable(", "json.dumps("))
            if called == "print" and not fit:
                found.append(f"{name}:{line} prints {first}")
            if called.endswith(("stdout.write", "console.print")):
                found.append(f"{name}:{line} writes {first}")
    assert found == []


# Outputs


def run(*arguments, encoding="utf-8", shell="", **options):
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    command = [sys.executable, "-m", "headwise", *map(str, arguments)]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300, **options)


OFTEN = [("ls", "ascii"), ("show", "cp1252"), ("query", "latin-1"), ("json", "ascii")]


@pytest.mark.parametrize(
    ("command", "encoding"),
    [
        pytest.param(*given, marks=() if given in OFTEN else pytest.mark.heavy)
        for given in product(("ls", "show", "query", "json"), ("ascii", "cp1252", "latin-1"))
    ],
)
def test_an_output_of_few_signs_gets_plain_ones(encoding, command, tmp_path):
    """No line of boxes, and escapes for the letters that it lacks."""
    ds = hand.measured([[2.0, 3.0]], model="Ωmodel – “é”…")
    ds["loss"].attrs["long_name"] = "漢字 … " + "long " * 40
    path = hw.write_netcdf(ds, tmp_path / "漢.nc")
    wanted = {
        "ls": ["results", "ls", tmp_path],
        "show": ["results", "show", path],
        "query": ["results", "query", path, "loss"],
        "json": ["results", "ls", tmp_path, "--json"],
    }[command]
    done = run(*wanted, encoding=encoding)
    out = done.stdout.decode(encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert r"\u6f22" in out
    if command == "json":
        assert json.loads(out)["results"][0]["model"] == "Ωmodel – “é”…"
    if command in ("ls", "query"):
        assert [line for line in out.splitlines() if line and set(line) == {"-"}]


@pytest.mark.heavy
def test_the_study_is_said_in_an_output_of_few_signs(tmp_path):
    done = run("induction", "--n", "4", "--length", "8", "--out", tmp_path / "é.nc", encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert rb"\xe9.nc  results" in done.stdout
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("command", [["results", "ls", "."], ["--version"], ["--help"], ["completion", "bash"], []])
def test_a_full_disk_is_said_in_a_line(command, tmp_path):
    done = run(*command, shell="> /dev/full", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == b"headwise: the output cannot be written: No space left on device\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_closed_output_is_said_in_a_line_and_a_closed_error_output_is_no_trouble(tmp_path):
    hw.write_netcdf(hand.measured([[2.0, 3.0]]), tmp_path / "a.nc")
    done = run("results", "ls", tmp_path, shell=">&-")
    assert (done.returncode, done.stderr) == (1, b"headwise: standard output is closed: there is nowhere to write to\n")
    (tmp_path / "bad.nc").write_bytes(b"nothing")
    done = run("results", "ls", tmp_path, "--json", shell="2>&-")
    assert done.returncode == 0
    assert [one["path"] for one in json.loads(done.stdout)["results"]] == ["a.nc"]
    done = run("results", "ls", tmp_path, shell="2>&-")
    assert b"cannot be read: bad.nc" not in done.stdout  # what is said on standard error does not go elsewhere
    assert run("results", "ls", tmp_path / "nowhere", shell="2>&-").returncode == 1
    assert run("results", "ls", tmp_path, shell="2> /dev/null").stdout == done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_terminal_gets_styles_of_ours_alone(hostile):
    """Where tables are drawn with styles, nothing from a file is one, nor an escape."""
    import pty

    for command in (["ls", hostile], ["query", next(hostile.glob("a*")), "loss"], ["show", hostile / "study.nc"]):
        ours, theirs = pty.openpty()
        done = subprocess.Popen(
            [sys.executable, "-m", "headwise", "results", *map(str, command)],
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "400"},
        )
        os.close(theirs)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            written += piece
        assert done.wait(60) == 0
        os.close(ours)
        text = STYLES.sub("", written.decode()).replace("\r\n", "\n")
        assert bad(text) == []
        assert "[bold red]loud[/bold red]" in text
