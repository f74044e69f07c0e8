"""What a call gives shows its text, in a notebook and at a prompt; a declaration shows the call that makes it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import headwise as hw


@pytest.fixture(scope="module")
def task():
    return hw.RepeatedTokens(n=3, length=6)


def test_a_plan_shows_what_print_shows(words_model, task):
    shown = repr(hw.plan(words_model, task, hw.ZeroAblate(hw.Head(0, 3)), timed=False))
    assert shown.startswith("words-2l: 1 condition on 3 prompts of the clean run\nruns ")
    assert "Plan(" not in shown


def test_what_rerun_and_summary_found_is_shown(words_model, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ds = hw.measure(words_model, task, hw.ZeroAblate(hw.Head(0, 3)), out="loss.nc")
    assert repr(hw.rerun("loss.nc")).startswith("loss.nc agrees: all ")
    assert repr(hw.summary(ds)).startswith("Measurement of words-2l\n")


def test_a_batch_shows_its_first_prompt(words_model, task):
    batch = task.draw(words_model)
    lines = [line.split("  ") for line in repr(batch).splitlines()]
    rows = {line[0]: line[-1].strip() for line in lines[1:]}
    assert lines[0] == ["3 prompts of 12 tokens"]
    assert rows["scored"] == "5 positions of each prompt: 6 to 10"
    assert rows["clean"] == " ".join(map(str, batch.runs["clean"][0]))
    assert rows["corrupted"] == " ".join(map(str, batch.runs["corrupted"][0]))
    assert rows["targets"] == " ".join(map(str, batch.targets[0, 6:11]))
    assert rows["distractors"] == " ".join(map(str, batch.distractors[0, 6:11]))
    assert len(lines) == 7


def test_a_batch_of_unequal_prompts_says_so(words_model):
    batch = hw.Prompts(["apple banana apple", "dog sun"]).draw(words_model)
    assert repr(batch).startswith("2 prompts of 2 and 3 tokens\nscored   1 and 2 positions of a prompt\n")
    one = hw.Prompts(["apple banana apple"], answers=["banana"]).draw(words_model)
    assert "\nscored   1 position of each prompt: 2\n" in repr(one)
    long = hw.RepeatedTokens(n=1, length=20).draw(words_model)
    first = " ".join(map(str, long.runs["clean"][0, :16]))
    assert f"\nclean        {first} and 24 more\n" in repr(long)
    bare = hw.Batch({"clean": np.ones((1, 2), int)}, np.array([2]), np.zeros((1, 2), bool), np.ones((1, 2), int))
    assert repr(bare).splitlines() == [
        "1 prompt of 2 tokens",
        "scored  0 positions of a prompt",
        "        token ids of the first prompt; model.token_text(...) gives words",
        "clean   1 1",
    ]


def test_declarations_show_the_call_that_makes_them(task):
    for one in (task, hw.Patch(hw.Head(1, 2).k), hw.Head(1, 2).pattern.at(3), hw.InductionStudy(n=4)):
        names = {name: getattr(hw, name) for name in hw.__all__}
        assert eval(repr(one), names) == one


def test_a_folder_of_results_is_shown_once(words_model, task, tmp_path, monkeypatch):
    """Rich, in a notebook, shows whatever is printed, also what is printed into a text."""
    hw.measure(words_model, task, out=tmp_path / "loss.nc")
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=shown.append))
    text = repr(hw.Results(tmp_path))
    assert shown == []
    assert "loss.nc" in text
