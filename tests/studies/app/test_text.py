"""The address of the app's page, and its sentences and tables."""

from __future__ import annotations

import numpy as np
import pytest

from headwise.studies.app import head_facts
from headwise.studies.app import text as sentences
from headwise.studies.app.folder import Listed
from headwise.studies.app.selection import Selection


def test_a_selection_comes_back_from_its_address():
    one = Selection(
        "a b.nc", "ablation/loss", "change", "L1H2", "short", "apple & pear? é", "token", "3", "L0H3", {"run": "x=y"}
    )
    assert Selection.from_query(one.to_query()) == one
    assert Selection().to_query() == ""
    assert Selection.from_query("?nonsense=1&head=L1H2&head=L0H1") == Selection(head="L0H1")
    assert Selection.from_query("?" + "&".join(f"a{n}=1" for n in range(99))) == Selection()
    assert len(Selection.from_query("?prompt=" + "a" * 9999).prompt) == 2000


def test_texts_of_files_are_escaped():
    assert "<b>noise" not in sentences.files([Listed("ok.nc"), Listed("<b>noise.nc", "<i>why</i>")], "results")
    assert "<i>" not in sentences.files([Listed("<b>noise.nc", "<i>why</i>")], "<i>results")
    assert "<script>" not in sentences.heading("L0H0", "<script>")
    score = head_facts.Score("x", "<script>", 0.5, 0.4, 0.6, 0.1)
    effect = head_facts.Effect("<script>", "<script>", "<script>", 0.5, 0.4, 0.6)
    assert "<script>" not in sentences.scores_table([score]) + sentences.effects_table(
        [effect]
    ) + sentences.prompt_heading("<script>")


def test_a_prompt_without_a_token_that_comes_back_says_why():
    assert "type a word twice" in sentences.nothing_comes_back(["apple", "pear"])
    said = sentences.nothing_comes_back(["self", ".", " self"])
    assert "self with a space before it is another token than without" in said


def test_what_is_lost_without_a_head_is_said_where_nothing_else_is():
    effect = head_facts.Effect("loss", "zero", "nat", 0.5, 0.4, 0.6)
    row = "<td>Share that is lost</td><td class=n>+0.959</td>"
    assert row in sentences.effects_table([], ("share that is lost", 0.9591))
    assert "0.959" not in sentences.effects_table([effect], ("share that is lost", 0.9591))


def test_intervals_are_drawn_where_their_numbers_are():
    drawn = sentences.interval(0.5, 0.25, 0.75, 0.0, 1.0, mark=0.0)
    assert 'cx="50.00%"' in drawn
    assert 'x1="27.00%" x2="73.00%"' in drawn
    assert 'x1="4.00%" x2="4.00%"' in drawn
    assert sentences.interval(np.nan, 0, 0, 0, 1, mark=None) == ""


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.39, 0.26, 0.54), "+0.390</td><td class=n>+0.26 to +0.54"),
        ((-0.0001, -0.00301, 0.0), "-0.00010</td><td class=n>-0.0030 to 0.0000"),
        ((0.2, np.nan, np.nan), "+0.200</td><td class=n>–"),
    ],
)
def test_effects_are_written_with_as_many_digits_as_they_need(numbers, said):
    assert said in sentences.effects_table([head_facts.Effect("zero", "loss", "nat", *numbers)])


def test_an_empty_folder_says_what_makes_a_result():
    assert "headwise induction --out results/" in sentences.files([], "results")
    assert "No file in results can be shown" in sentences.files([Listed("a.nc", "torn")], "results")
