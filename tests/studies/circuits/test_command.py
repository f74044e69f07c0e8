"""``headwise circuit``, its report, its pictures and the app: what they show are the numbers of the result."""

import html
import json
import re
import sys
import warnings

import holoviews as hv
import numpy as np
import pytest

import headwise as hw
from headwise.errors import AdviceWarning, UnknownNameError
from headwise.studies.app import variables
from headwise.studies.cli.main import main
from tests.support.elements import labelled, of_type

GIVEN = ["circuit", "--n", "4", "--length", "8", "--draws", "2"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """What the command writes."""
    path = tmp_path_factory.mktemp("circuit") / "circuit.nc"
    assert main([*GIVEN, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def tree(file):
    return hw.open_result(file, load=True)


def test_the_command_prints_what_it_found(file, tree, capsys):
    assert main([*GIVEN, "--out", str(file)]) == 0
    said = capsys.readouterr()
    assert "holds the whole result already" in said.err
    assert "The circuit behind the logit difference of words-2l" in said.out
    part = tree["circuit"].to_dataset()
    best = int(np.abs(part["score"].values).argmax())
    row = next(line for line in said.out.splitlines() if line.startswith(" input->a0.h3<v>"))
    assert str(part["receiver"].values[best]) == "a0.h3<v>"
    assert row.split()[1:] == [f"{float(part['score'][best]):+.3f}", "100%"]
    flat = " ".join(said.out.split())
    for one in json.loads(tree.attrs["conclusion"]):
        assert (one["text"] in flat) == (one["group"] == "summary" or one["text"] in flat)
    assert f"keeps a share of {float(part['faithfulness']):.2f} (95%: " in flat
    score = "how much the logit difference changes (logit) where this edge alone carries the values of the corrupted"
    page = " ".join(html.unescape(file.with_suffix(".html").read_text()).split())
    for shown, again in ((flat, "Chosen again"), (page, "Again")):
        assert f"Score: {score} run; below 0, the edge matters. {again}: in how many circuits of prompts drawn" in shown


def test_the_command_gives_advice_as_a_sentence(tmp_path, capsys):
    def show(message, category, *place):
        """As Python does where no test records warnings."""
        sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))

    few = ["--edges", "5", "--estimator", "eap"]
    with warnings.catch_warnings():
        warnings.simplefilter("always", AdviceWarning)
        warnings.showwarning = show
        assert main([*GIVEN, *few, "--metric", "prob", "--out", str(tmp_path / "prob.nc")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "by prob alone" in line]
    assert len(said) == 1
    assert said[0].startswith("headwise: Patching is measured by prob alone")
    assert "AdviceWarning" not in said[0]


def test_the_command_gives_figures(file, tree, capsys):
    assert main([*GIVEN, "--out", str(file), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["cpr"] == pytest.approx(float(tree["curve"]["cpr"]))
    assert figures["cmd_low"] == pytest.approx(float(tree["curve"]["cmd_low"]))
    assert figures["circuit"]["n"] == tree["circuit"].attrs["n"]
    assert hw.Circuit(one["edge"] for one in figures["circuit"]["edges"]) == hw.from_json(tree.attrs["circuit"])
    assert figures["heads"]["greedy"]["heads"] == str(tree["nodes"]["heads"].sel(set="greedy").values).split()
    assert figures["jaccard"] == float(tree["inclusion"]["jaccard"])
    assert main([*GIVEN, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["edges"] == 310


def test_tasks_of_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = hw.Prompts(
        ["apple banana cherry apple", "dog cat house dog"],
        answers=["banana", "cat"],
        distractors=["cherry", "house"],
        corrupted=["tree river cherry apple", "tree river house dog"],
    )
    (tmp_path / "task.json").write_text(hw.to_json(task))
    (tmp_path / "prompts.txt").write_text("apple banana cherry apple\ndog cat house tree dog")
    few = ["--draws", "1", "--edges", "40", "--estimator", "eap"]
    for name in ("task.json", "prompts.txt"):
        assert main(["circuit", "--task", name, "--out", f"{name}.nc", *few]) == 0
        tree = hw.open_result(f"{name}.nc", load=True)
        assert tree["edges"].sizes["example"] == 2
        assert tree["circuit"].attrs["n"] == 40
        assert "on_others" not in tree["circuit"]
        assert "Scores are estimates (eap), not measured" in " ".join(
            one["text"] for one in json.loads(tree.attrs["conclusion"])
        )
    assert json.loads(hw.open_result("task.json.nc").attrs["task"]) == json.loads(hw.to_json(task))
    assert hw.rerun("task.json.nc").agrees
    assert main(["circuit", "--task", "task.json", "--source", "mean", *few, "--resamples", "7"]) == 0
    (found,) = (tmp_path / "results").glob("*.nc")
    assert found.name == "circuit-words-2l-task-mean-eap.nc"
    assert hw.open_result(found)["inclusion"].attrs["resamples"] == 7
    capsys.readouterr()
    for given, says in (
        (["--task", "nothing"], "--task nothing: possible are repeated, text, and a file with a task or prompts"),
        (["--task", "text"], "words-2l has no folder held_out with text that it has not read"),
        (["--text", "notes"], "--text notes: it goes with --task text"),
        (["--metric", "nothing"], "there is no metric 'nothing'"),
        (["--context", "12"], "--context 12: it goes with --task text"),
        (["--task", "task.json", "--n", "4"], "--n 4: it goes with --task repeated or text"),
        (["--task", "task.json", "--n", "25"], "--n 25: it goes with --task repeated or text"),
        (["--task", "text", "--length", "9"], "--length 9: it goes with --task repeated"),
        (
            ["--task", "text", "--text", "prompts.txt", "--context", "0"],
            "context, the tokens of a prompt, must be 4 or more, got 0",
        ),
        (["--resamples", "1"], "resamples must be 2 or more"),
        (["--out", "circuit.html"], "--out circuit.html: end it in .nc"),
    ):
        assert main(["circuit", *given]) == 1
        assert f"headwise: {says}" in capsys.readouterr().err
    (tmp_path / "wrong.json").write_text(hw.to_json(hw.ZeroAblate("L0H3")))
    assert main(["circuit", "--task", "wrong.json"]) == 1
    assert "--task wrong.json: it holds a ZeroAblate, no task" in capsys.readouterr().err


def test_the_report_holds_every_number(file, tree):
    page = file.with_suffix(".html").read_text()
    part, curve, nodes = (tree[name].to_dataset() for name in ("circuit", "curve", "nodes"))
    said = html.unescape(re.sub("<[^>]+>", "", page))
    for words in (
        "The circuit behind the logit difference of words-2l",
        "The model has 310 edges; those outside of a circuit carry the values of the corrupted run.",
        f"{float(part['faithfulness']):.3f}",
        f"{float(part['on_others']):.3f}",
        f"{float(curve['cpr']):.3f}",
        f"{float(curve['cmd_log']):.3f}",
        str(nodes["heads"].sel(set="greedy").values),
        "headwise circuit --model words-2l --n 4 --length 8 --seed 0 --draws 2",
        "study = hw.CircuitStudy.from_json(hw.open_result('circuit.nc').attrs[\"study\"])",
        "Edges outside of a circuit carry the values of another run",
        "Edges were replaced at all positions of a prompt at once",
        *(f"{sender}->{receiver}" for sender, receiver in hw.from_json(tree.attrs["circuit"])),
    ):
        assert words in said, words
    assert "Nothing was intervened on" not in said


def test_sets_of_heads_are_drawn_as_they_are(tree):
    nodes = tree["nodes"].to_dataset()
    drawn = hw.plots.kept_by_heads(nodes)
    points = of_type(drawn, hv.Points)
    random, found = (labelled(points, name) for name in ("random sets", "smallest set"))
    assert found.dimension_values("value").tolist() == nodes["faithfulness"].values.tolist()
    assert found.dimension_values("heads").tolist() == [str(one) for one in nodes["heads"].values]
    counts = np.unique(nodes["count"].values)
    assert len(random.dimension_values("at")) == len(counts) * nodes.sizes["draw"]
    curve = labelled(of_type(drawn, hv.Curve), "by score")
    assert curve.dimension_values(1).tolist() == nodes["kept_by_score"].values.tolist()
    with pytest.raises(UnknownNameError, match="kept_by_heads needs"):
        hw.plots.kept_by_heads(tree["circuit"].to_dataset())


def test_pictures_are_chosen_for_its_parts(tree):
    for name in ("edges/score", "circuit/score", "curve/faithfulness", "inclusion/inclusion", "nodes/lost"):
        hv.render(hw.plots.picture(tree, name), backend="bokeh")


def test_the_app_shows_a_circuit(tree):
    pytest.importorskip("panel")
    from headwise.studies.app.circuit import CircuitView

    usual = variables.usual(variables.variables(tree))
    assert usual.key == "nodes/lost"
    shown = variables.values(tree, usual, usual.shows[0], {})
    assert shown.values.tolist() == tree["nodes"]["lost"].values.tolist()
    view = CircuitView()
    view.open(tree)
    assert view.view.visible
    edges = [one.data_source.data["edge"] for one in view.graph.object.renderers if "edge" in one.data_source.data]
    assert {name for some in edges for name in some} == {str(edge) for edge in hw.from_json(tree.attrs["circuit"])}
    for one in json.loads(tree.attrs["conclusion"]):
        assert (html.escape(one["text"]) in view.found.object) == (one["group"] == "summary" or _twice(tree, one))
    view.open(None)
    assert not view.view.visible


def _twice(tree, finding):
    """Whether the summary says this too."""
    told = json.loads(tree.attrs["conclusion"])
    return any(one["group"] == "summary" and one["text"] == finding["text"] for one in told)
