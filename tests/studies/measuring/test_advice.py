"""What the literature advises against is told: as a warning where it is claimed on, in the result and the plan else."""

import json
import warnings

import pytest

import headwise as hw
from headwise import Head, MeanAblate, Patch, Prompts, RepeatedTokens, ResampleAblate, ZeroAblate, measure
from headwise.errors import AdviceWarning, HeadwiseError
from headwise.studies.measuring.advice import advice

TASK = RepeatedTokens(n=2, length=5)
ZERO, PATCH = ZeroAblate(Head(0, 3)), Patch(Head(0, 3))
LATER = Patch(Head(0, 3), source="clean")


def told(model, *given, **options):
    """The result, and the warnings of the call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ds = measure(model, TASK, *given, **options)
    return ds, [str(one.message) for one in caught if issubclass(one.category, AdviceWarning)]


@pytest.mark.parametrize(
    ("what", "metrics", "options", "word", "warned"),
    [
        (PATCH, "prob", {}, "logit_diff", True),
        ({"one": MeanAblate(Head(0, 3)), "two": PATCH}, ["prob", "loss"], {}, "logit_diff", True),
        (LATER, "prob", {"base": "corrupted"}, "logit_diff", True),
        (MeanAblate(Head(0, 3)), "prob", {"base": "corrupted"}, "logit_diff", True),
        (ZERO, "loss", {"controls": 2}, "MeanAblate", True),
        (ZERO, "loss", {}, "MeanAblate", False),
        ([ZERO, ZeroAblate(Head(1, 2))], "loss", {}, "MeanAblate", False),
    ],
)
def test_it_is_told_once_and_kept_in_the_result(words_model, what, metrics, options, word, warned):
    ds, texts = told(words_model, what, metrics, **options)
    assert len(texts) == warned
    assert all(word in text for text in [*texts, ds.attrs["advice"]])
    assert ds.attrs["advice"].count("alone") == 1


@pytest.mark.parametrize(
    ("what", "metrics", "options"),
    [
        (PATCH, ["prob", "logit_diff"], {}),  # what is advised is there
        (PATCH, "logit_diff", {}),
        (MeanAblate(Head(0, 3)), "prob", {}),  # the corrupted run plays no part
        (None, "prob", {"base": "corrupted"}),
        (None, "prob", {"runs": "all"}),
        ({"zero": ZERO, "mean": MeanAblate(Head(0, 3))}, "loss", {"controls": 2}),
        ([ZERO, ResampleAblate(Head(0, 3))], "loss", {}),
        (hw.Scale(Head(0, 3), 0.5), "loss", {}),
    ],
)
def test_nothing_is_told_of_what_is_advised(words_model, what, metrics, options):
    ds, texts = told(words_model, what, metrics, **options)
    assert texts == []
    assert "advice" not in ds.attrs


def test_the_warning_points_at_the_line_of_the_caller_and_can_be_silenced(words_model):
    assert issubclass(AdviceWarning, UserWarning)
    assert not issubclass(AdviceWarning, HeadwiseError)
    with pytest.warns(AdviceWarning, match="prob alone") as caught:
        measure(words_model, TASK, PATCH, "prob")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", AdviceWarning)
        assert "advice" in measure(words_model, TASK, PATCH, "prob").attrs


def test_a_plan_tells_it_and_warns_of_nothing(words_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero = hw.plan(words_model, TASK, ZERO, "loss", timed=False)
        prob = hw.plan(words_model, TASK, PATCH, "prob", timed=False)
        both = hw.plan(words_model, TASK, {"a": ZERO, "b": MeanAblate(Head(0, 3))}, "loss", timed=False)
    assert "advice" in str(zero)
    assert "MeanAblate or ResampleAblate" in str(zero)
    assert "logit_diff" in str(prob)
    assert "advice" not in str(both)
    assert max(map(len, str(zero).splitlines())) <= 100


def test_it_is_read_from_what_a_result_says(words_model):
    ds = measure(words_model, TASK, ZERO, "loss")
    assert advice(ds.attrs) == [ds.attrs["advice"]]
    for damaged in ({}, {"interventions": "no JSON", "metrics": "[1]"}, {"interventions": json.dumps([[{}]])}):
        assert advice(damaged) == []


def test_runs_of_ones_own_count_as_corrupted_runs(words_model):
    task = Prompts(["apple banana"], answers=["cherry"], runs={"other": ["dog banana"]})
    with pytest.warns(AdviceWarning, match="prob alone"):
        measure(words_model, task, Patch(Head(0, 3), source="other"), "prob")


def test_advice_names_the_line_that_asked(words_model):
    task = hw.RepeatedTokens(n=2, length=4)
    for ask in (
        lambda: hw.measure(words_model, task, hw.Patch(hw.Head(0, 3)), "prob"),
        lambda: hw.edge_scores(words_model, task, "prob", edges=["m1->logits"]),
    ):
        with pytest.warns(hw.errors.AdviceWarning, match="Measure logit_diff too") as told:
            ask()
        assert [one.filename for one in told] == [__file__]
