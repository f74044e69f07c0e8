"""rerun of files that ask for more than they hold, or than any machine can: refused before any pass."""

import json
import re

import pytest

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ResultError
from headwise.interventions import Head, ZeroAblate
from headwise.interventions.declare import codec
from headwise.metrics import loss
from headwise.studies import InductionStudy, RepeatedTokens, compare_estimates, measure
from headwise.studies.analyses.ablation import sets_against_controls
from headwise.studies.analyses.composition import composition_scores
from headwise.studies.cli.main import main
from headwise.studies.report.report import write_report
from headwise.studies.reproduce.rerun import rerun
from tests.support.changed_files import TASK, changed, own

CONTRADICTIONS = [
    ({"n": 10**9}, r"n, the number of prompts, must be at most 1000000, got 1000000000"),
    ({"n": 10**6}, r"asks for 1000000 prompts and holds 3: it contradicts itself"),
    ({"n": 4}, r"asks for 4 prompts and holds 3"),
    ({"length": 10**9}, r"the half length, must be at most 1000000, got 1000000000"),
    ({"seed": 10**9 * 5}, r"a seed must be at most 4294967295"),
    ({"n": int("9" * 4000)}, r"n, the number of prompts, must be at most 1000000"),
]


@pytest.mark.parametrize(("more", "message"), CONTRADICTIONS)
@pytest.mark.parametrize("name", ["baseline", "captured"])
def test_a_file_that_asks_for_more_than_it_holds_is_refused_before_anything(
    files, tmp_path, monkeypatch, name, more, message
):
    """Before a model is opened, and before a prompt is drawn."""
    from headwise.interventions import load

    def change(tree):
        tree.attrs["task"] = json.dumps(json.loads(tree.attrs["task"]) | more)

    path = changed(files[name], tmp_path / "large.nc", change)
    for place, what in ((load, "load"), (RepeatedTokens, "draw")):
        monkeypatch.setattr(place, what, lambda *given, **more: pytest.fail("it was opened, or drawn"))
    with pytest.raises(ResultError, match=message) as told:
        rerun(path)
    assert "\n" not in str(told.value)


def test_a_study_that_asks_for_more_than_it_holds_is_refused(words_study, tmp_path):
    path = hw.write_netcdf(words_study, tmp_path / "study.nc")
    wrong = {
        "n": (32, "asks for 32 prompts and holds 4"),
        "length": (25, "asks for 50 tokens in each prompt and holds 16"),
        "untrained": (40, "asks for 40 untrained models and holds 20"),
        "draws": (10**9, "draws must be at most 100000"),
    }
    for name, (value, message) in wrong.items():

        def change(tree, name=name, value=value):
            tree.attrs["study"] = json.dumps(json.loads(tree.attrs["study"]) | {name: value})

        with pytest.raises(ResultError, match=message):
            rerun(changed(path, tmp_path / "large.nc", change))

    def long(tree):
        tree.attrs["study"] = json.dumps(json.loads(tree.attrs["study"]) | {"draws": 10**5})

    asked = []
    with pytest.raises(
        ResultError, match=r"up to \d\.\de\+\d+ floating-point operations: .*rerun\(..., yes=True\) or --yes"
    ):
        rerun(changed(path, tmp_path / "long.nc", long), yes=asked.append)
    assert re.search(r"long.nc asks for 4 prompts times 120\d\d\d\d conditions on words-2l", asked[0])


def test_steps_are_bounded(files, tmp_path):
    path = changed(files["integrated"], tmp_path / "a.nc", own({"estimator": "integrated, 1000000000 steps"}))
    with pytest.raises(ResultError, match=r"its estimator 'integrated, 1000000000 steps' is not known"):
        rerun(path)
    path = changed(files["integrated"], tmp_path / "b.nc", own({"estimator": "integrated, 100000000 steps"}))
    with pytest.raises(ResultError, match=r"steps, of the integrated estimate, must be at most 10000"):
        rerun(path)
    path = changed(files["estimates"], tmp_path / "c.nc", own({"steps": 10**9}))
    with pytest.raises(ResultError, match=r"steps, of the integrated estimate, must be at most 10000"):
        rerun(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: RepeatedTokens(n=10**9),
        lambda model: RepeatedTokens(length=10**9).draw(model),
        lambda model: RepeatedTokens(seed=10**10),
        lambda model: RepeatedTokens(tokens=(0, 10**9)).draw(model),
        lambda model: InductionStudy(n=10**9),
        lambda model: InductionStudy(length=10**9).run(model),
        lambda model: InductionStudy(draws=10**9),
        lambda model: InductionStudy(untrained=10**9),
        lambda model: measure(model, TASK, ZeroAblate(Head(0, 0)), loss, estimator="integrated", steps=10**9),
        lambda model: compare_estimates(model, TASK, ZeroAblate(Head(0, 0)), loss, steps=10**9),
        lambda model: composition_scores(model, draws=10**9),
        lambda model: sets_against_controls(model, TASK, {"one": [Head(0, 0)]}, draws=10**9),
    ],
)
def test_what_nobody_can_compute_is_refused_at_once(words_model, make):
    with pytest.raises(HeadwiseError, match=r"must be at most|length can be 2 to|has the token ids|10000000"):
        make(words_model)


def test_prompts_that_do_not_fit_in_memory_are_refused(words_model, monkeypatch):
    from headwise.interventions.base import memory

    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    told = r"n=1000000 prompts of 50 tokens takes 4\.7 GiB, and there is room for 0\.9 GiB at once: take fewer"
    with pytest.raises(DeclarationError, match=told):
        RepeatedTokens(n=10**6).draw(words_model)


DEEP = "[" * 100_000 + "]" * 100_000
HALF = '"\\ud800"'
TEXTS = {"deep": DEEP, "half": HALF}
ATTRIBUTES = (
    "task",
    "interventions",
    "metrics",
    "versions",
    "configuration",
    "fingerprint",
    "conclusion",
    "model_shape",
)
ATTRIBUTES += ("float32_deviation", "seconds_by_stage", "study", "heads", "estimators", "sites")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_whatever_json_a_file_holds_rerun_and_report_come_to_an_end(files, tmp_path, capsys, name, text):
    path = changed(files["baseline"], tmp_path / "a.nc", own({name: TEXTS[text]}))
    told = ""
    try:
        assert rerun(path).agrees
    except HeadwiseError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 1000
    assert main(["report", str(path), "--out", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "words-2l" in page
    assert "Traceback" not in capsys.readouterr().err


def test_half_of_a_character_in_a_report(files, tmp_path):
    """Of a result in memory: what a file holds is decoded when it is read."""
    tree = hw.open_result(files["baseline"], load=True)
    tree.attrs |= {"title": "half \ud800 of one", "model": "words\udc80"}
    page = write_report(tree, tmp_path / "a.html").read_text(encoding="utf-8")
    assert "half " in page


def test_json_of_a_file_is_read_with_bounds():
    assert codec.read_json(json.dumps({"a": [1, "\U0001f600", "\\ud800"]})) == {"a": [1, "\U0001f600", "\\ud800"]}
    assert codec.read_json("[" * 100 + "]" * 100) is not None
    for text, message in (
        ("[" * 101 + "]" * 101, "more than 100 lists and objects within each other"),
        (DEEP, "more than 100 lists and objects within each other"),
        (HALF, "half of a character"),
        ('{"\\udc00": 1}', "half of a character"),
        ('["\ud800"]', "half of a character"),
        ("9" * 5000, "this is not JSON"),
        ("{", "this is not JSON"),
        (None, "this is not JSON but NoneType"),
        (b"[]", "this is not JSON but bytes"),
    ):
        with pytest.raises(DeclarationError, match=message):
            codec.read_json(text)


@pytest.mark.parametrize("revision", ["main", "local", "memory"])
def test_a_long_name_of_a_model_is_no_name(files, tmp_path, revision):
    def change(tree):
        tree.attrs |= {"model": "m" * 5000, "model_revision": revision}

    path = changed(files["captured"], tmp_path / "long.nc", change)
    with pytest.raises(ResultError) as caught:
        rerun(path, yes=True)
    assert len(str(caught.value)) < 600
