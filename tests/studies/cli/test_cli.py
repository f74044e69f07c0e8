"""The command line as a user runs it: one command, short output, errors in one line."""

import json
import textwrap

import pytest

import headwise as hw
from headwise.studies.cli.main import main

SMALL = ["induction", "--n", "4", "--length", "8"]


def test_induction_says_what_it_would_take(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--plan"]) == 0
    said = capsys.readouterr().out
    stages = [line.split()[0] for line in said.splitlines() if line[:1].isalpha()]
    assert stages[3:10] == ["behaviour", "heads", "patterns", "ablation", "sets", "patching", "composition"]
    assert stages[10:13] == ["attribution", "words", "estimates"]
    assert "not run: integrated estimates of ablation (costs " in said
    assert list(tmp_path.iterdir()) == []


def test_induction_writes_result_and_report(tmp_path, capsys):
    out = tmp_path / "new" / "run.nc"
    assert main([*SMALL, "--seed", "3", "--out", str(out)]) == 0
    tree = hw.open_result(out, load=True)
    assert tree.attrs["model"] == "words-2l"
    assert {"n": 4, "length": 8, "seed": 3}.items() <= json.loads(tree.attrs["study"]).items()
    report = out.with_suffix(".html").read_text()
    printed = capsys.readouterr()
    for finding in json.loads(tree.attrs["conclusion"]):
        if finding["group"] == "summary":
            assert " ".join(finding["text"].split()) in " ".join(printed.out.replace("\n", " ").split())
    assert "induction" in printed.out
    assert printed.err.index("if heads with a role are found") < printed.err.index("1/10 loss and accuracy by position")
    assert "Traceback" not in printed.out + printed.err
    assert report.startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["induction", "--model", "no such"],
            "headwise: no model is called 'no such': shipped are code-4l and words-2l",
        ),
        (["induction", "--n", "0"], "headwise: n, the number of prompts, must be 2 or more, got 0"),
        (
            ["induction", "--length", "999"],
            "headwise: length=999 makes prompts of 1998 tokens: words-2l reads at most 128",
        ),
        (["induction", "--n", "1"], "headwise: n, the number of prompts, must be 2 or more, got 1"),
        (["induction", "--seed", "8589934592"], "headwise: a seed must be at most 4294967295, got 8589934592"),
        (["induction", "--out", "x.html"], "headwise: --out x.html: end it in .nc; the report beside it gets"),
        (["plan", "--what", "all"], "headwise: --what all: possible are heads, qkv and resid, and a JSON file with"),
        (["plan", "--metric", "los"], "headwise: there is no metric 'los': possible are accuracy, attention_entropy"),
        (["plan", "--batch-size", "big"], "headwise: batch_size='big': possible are"),
        (["induction", "--device", "tpu"], "headwise: device 'tpu' cannot be used here"),
        (
            ["induction", "--out", "/proc/none/x.nc"],
            "headwise: cannot write /proc/none/x.nc: No such file or directory",
        ),
    ],
)
def test_errors_are_one_line_and_status_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(message)
    assert not list(tmp_path.rglob("*.nc"))


def test_plan_explains_without_measuring(capsys, tmp_path):
    from headwise.interventions import Head, Knockout
    from headwise.interventions.declare.codec import to_json

    assert main(["plan", "--what", "qkv", "--metric", "logit_diff", "--n", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "words-2l: 48 conditions on 2 prompts of the clean run"
    assert any(line.startswith("work        0.2") for line in lines)
    assert any(line.startswith("time ") for line in lines)
    assert main(["plan", "--what", "resid", "--metric", "loss", "--metric", "kl", "--n", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["conditions"] == 100
    assert found["share"] == (found["base"] + found["passes"]) / found["naive"]
    mine = tmp_path / "mine.json"
    mine.write_text(to_json({"out": Knockout(Head(1, 0), 30, 6)}))
    assert main(["plan", "--what", str(mine), "--n", "2"]) == 0
    assert "1 condition on 2 prompts" in capsys.readouterr().out


def _help_of_plan(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    return capsys.readouterr().out


def test_the_keys_of_plan_as_json_are_those_that_help_lists(capsys, words_model):
    listed = _help_of_plan(capsys).split("keys of --json:\n")[1]
    keys = [line.split()[0] for line in listed.splitlines() if line[2:3].strip()]
    assert main(["plan", "--what", "heads", "--n", "2", "--length", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == keys
    grid = hw.Grid(lambda layer, head: hw.ZeroAblate(hw.Head(layer, head)), layer=range(2), head=range(8))
    plan = hw.plan(words_model, hw.RepeatedTokens(n=2, length=10), grid, [hw.metrics.loss])
    cost = plan.cost()
    assert (found["conditions"], found["passes_run"]) == (16, plan.passes)
    assert (found["base"], found["passes"], found["naive"]) == (cost.base, cost.passes, cost.naive)
    assert found["total"] == cost.base + cost.passes
    assert found["share"] == found["total"] / found["naive"]
    assert found["forward"] == cost.naive / (16 * 2)
    assert (found["rows"], found["positions"], found["memory"]) == (cost.rows, cost.positions, cost.memory)
    assert found["seconds"] > 0


def test_the_file_of_interventions_that_help_shows(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, text = _help_of_plan(capsys).split("or a Grid:\n")[1].split("\nkeys of")[0].partition("which is\n")
    exec(textwrap.dedent(code), {})
    assert json.loads((tmp_path / "mine.json").read_text()) == json.loads(text)
    assert main(["plan", "--what", "mine.json", "--n", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conditions"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', 'headwise: --what mine.json: this JSON has no "type": possible are Head, Neuron, Layer'),
        ("no JSON", "headwise: --what mine.json: this is not JSON"),
        ('"x"', "headwise: cannot measure 'x': give an intervention"),
        ('{"type": "ZeroAblate"}', "headwise: --what mine.json: JSON of a ZeroAblate has missing or unknown fields"),
    ],
)
def test_files_that_hold_no_interventions(text, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(text)
    assert main(["plan", "--what", "mine.json", "--n", "2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_out_may_not_be_a_folder(tmp_path, capsys):
    (tmp_path / "results.nc").mkdir()
    assert main(["induction", "--out", str(tmp_path / "results.nc")]) == 1
    assert "is a folder: give the name of a file in it" in capsys.readouterr().err


def test_without_a_command_it_helps(capsys):
    assert main([]) == 2
    assert "usage: headwise" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"headwise {hw.__version__}"


def test_ctrl_c_is_said_in_words(monkeypatch, capsys, tmp_path):
    from headwise.studies.analyses.induction import InductionStudy

    def stopped(self, model, progress=None, *, out=None, resume=True):
        raise KeyboardInterrupt

    monkeypatch.setattr(InductionStudy, "run", stopped)
    assert main([*SMALL, "--out", str(tmp_path / "x.nc")]) == 130
    assert capsys.readouterr().err.strip().endswith("headwise: stopped; no file was left half-written")
    assert not list(tmp_path.iterdir())
