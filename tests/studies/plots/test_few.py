"""Intervals over fewer than 5 prompts say so wherever they are stored, drawn or told; over more, nothing is added."""

import holoviews as hv
import numpy as np
import pytest

import headwise as hw
from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import bootstrap_interval, loss
from headwise.studies import RepeatedTokens, measure, plots
from headwise.studies.analyses import ablation
from headwise.studies.analyses.behaviour import by_position
from headwise.studies.analyses.patching import qkv_of_every_head
from headwise.studies.app import head_facts, text
from headwise.studies.cli.main import main
from headwise.studies.measuring.effects import effect_interval
from headwise.studies.report.report import write_report
from tests.support.pages import shown

WORDS = "95% intervals over 3 prompts only: with fewer than 5, they say little; take more prompts"
MARK = "95% intervals over 3 prompts say little"


@pytest.fixture(scope="module")
def swept(words_model):
    """A sweep over 3 prompts, and over 5, with the intervals of its effects."""

    def one(examples):
        grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(3))
        found = measure(words_model, RepeatedTokens(n=examples, length=6, seed=1), grid, [loss])
        return found.assign(effect_interval(found, "loss"))

    return {examples: one(examples) for examples in (3, 5)}


def test_the_ends_of_intervals_carry_the_mark(swept, words_model):
    for end in ("low", "high"):
        assert swept[3][f"loss_effect_{end}"].attrs["comment"] == WORDS
        assert "comment" not in swept[5][f"loss_effect_{end}"].attrs
    task = RepeatedTokens(n=3, length=6, seed=1)
    behaviour = by_position(words_model, task)
    assert {
        behaviour[f"{name}_{end}"].attrs["comment"] for name in ("loss", "accuracy") for end in ("low", "high")
    } == {WORDS}
    patched = qkv_of_every_head(words_model, task)
    assert patched["noising_effect_low"].attrs["comment"] == WORDS
    sets = ablation.sets_against_controls(words_model, task, {"one": [Head(0, 1)]}, draws=2)
    assert sets["loss_effect_high"].attrs["comment"] == WORDS


def title_of(figure):
    return hv.Store.lookup_options("bokeh", figure, "plot").kwargs.get("title", "")


def test_pictures_of_intervals_carry_the_mark(swept, words_model):
    for examples, mark in ((3, MARK), (5, "")):
        ds = swept[examples].stack(condition=["layer", "head"]).reset_index("condition", drop=True)
        assert title_of(plots.ranked_conditions(ds, "loss")) == mark
        assert title_of(plots.ranked_conditions(ds, "loss", title="one")) == f"one\n{mark}".strip()
        behaviour = by_position(words_model, RepeatedTokens(n=examples, length=6, seed=1))
        assert (title_of(plots.by_position(behaviour, "loss", title="one")) == "one\n" + MARK) == (examples == 3)
        sets = ablation.sets_against_controls(
            words_model, RepeatedTokens(n=examples, length=6, seed=1), {"one": [Head(0, 1)], "two": [Head(1, 1)]}
        )
        titles = [title_of(panel) for panel in plots.sets_against_null(sets, "loss")]
        assert titles == ([f"one\n{MARK}", f"two\n{MARK}"] if examples == 3 else ["one", "two"])


def test_pictures_without_intervals_carry_no_mark(swept):
    ds = swept[3].drop_vars(["loss_effect_low", "loss_effect_high"])
    assert title_of(plots.ranked_heads(hw.effect(ds, "loss"), title="heads")) == "heads"
    assert MARK not in title_of(plots.picture(ds, "loss"))


def test_reports_say_it_once(swept, tmp_path):
    said = {
        examples: shown(write_report(swept[examples], tmp_path / f"{examples}.html").read_text()) for examples in (3, 5)
    }
    assert said[3].count(f"{WORDS}.") == 1
    assert "say little" not in said[5]


def test_the_terminal_says_it_below_the_table(swept, tmp_path, capsys):
    for examples in (3, 5):
        hw.write_netcdf(swept[examples], tmp_path / f"{examples}.nc")
        assert main(["results", "query", str(tmp_path / f"{examples}.nc"), "loss"]) == 0
        assert (WORDS in " ".join(capsys.readouterr().out.split())) == (examples == 3)


def test_the_app_says_it_below_its_tables(swept):
    import xarray as xr

    for examples in (3, 5):
        (one,) = head_facts.effects(xr.DataTree(swept[examples]), Head(1, 2))
        change = hw.effect(swept[examples], "loss").sel(layer=1, head=2).values
        assert one.examples == examples
        np.testing.assert_allclose([one.low, one.high], bootstrap_interval(change), rtol=1e-6)
        assert (WORDS in text.effects_table([one])) == (examples == 3)
