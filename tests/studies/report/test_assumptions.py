"""The end of a report: what the result assumes and what was not tested follow from what was run."""

import json

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise import Head, Knockout, Layer, MeanAblate, Neuron, Patch, PathPatch, ResampleAblate, Scale, ZeroAblate
from headwise.interventions.declare.codec import edit_names
from headwise.studies.report.assumptions import KINDS, METRICS, PLACES, Ran, assumed, untested
from headwise.studies.report.report import render
from tests.support.pages import EVIL, Outline, shown

NOISING = {"direction": "noising"}
DENOISING = {"direction": "denoising", "base": "corrupted"}


def result(what, metrics=("loss",), **attrs):
    """A measurement that says what it is of, without values."""
    said = {"model": "small", "model_shape": json.dumps({"layers": 2, "heads": 4}), "dtype": "float32"}
    said |= {"interventions": "null" if what is None else hw.to_json(what), "metrics": json.dumps(list(metrics))}
    said |= {"base": "clean", "direction": "none", "estimator": "exact"}
    said |= {"task": hw.to_json(hw.RepeatedTokens(n=7, length=5, seed=3))}
    return xr.Dataset({"x": 1.0}, attrs=said | attrs)


def told(found):
    """Both lists of a result, each as one text."""
    ran = Ran.of(found if isinstance(found, xr.DataTree) else xr.DataTree(found))
    return " ".join(assumed(ran)), " ".join(untested(ran))


def test_the_model_and_the_prompts_are_named():
    text, _ = told(result(None))
    assert "one checkpoint of one model, small, in float32" in text
    assert "7 draws of 5 random tokens, repeated once (seed 3). Natural text was not run." in text
    text, _ = told(result(None, step=512, model_revision="step512"))
    assert "small at step 512, revision step512" in text
    text, _ = told(result(None, task=hw.to_json(hw.Prompts(["a b a"], answers=["b"]))))
    assert "It is about 1 given prompt: no others were run." in text
    assert "synthetic" not in text
    assert "The prompts are those that Mine(3) draws" in told(result(None, task='{"repr": "Mine(3)"}'))[0]


@pytest.mark.parametrize("kind", [ZeroAblate, MeanAblate, ResampleAblate, Patch])
def test_only_the_kinds_that_ran_are_assumed(kind):
    beside = {"a": kind(Head(0, 1)), "b": MeanAblate(Head(0, 1)), "c": Scale(Head(0, 1), 2)}
    text, _ = told(result(beside, ["loss", "kl"]))
    for name, words in KINDS.items():
        assert (words in text) == (name in {kind.__name__, "MeanAblate", "Scale"}), name
    for name, words in METRICS.items():
        assert (words in text) == (name in ("loss", "kl")), name


@pytest.mark.parametrize(
    ("what", "there", "absent"),
    [
        (ZeroAblate(Head(0, 1)), ["Zero ablation alone", "what is sufficient was not tested"], ["were not run"]),
        (MeanAblate(Head(0, 1)), ["Zero and resample ablation were not run."], ["Zero ablation alone"]),
        (
            [ZeroAblate(Head(0, 1)), MeanAblate(Head(0, 1))],
            ["Resample ablation was not run.", "One part was changed at a time"],
            ["Zero ablation alone"],
        ),
        ([one(Head(0, 1)) for one in (ZeroAblate, MeanAblate, ResampleAblate)], [], ["not run", "alone"]),
        (ZeroAblate(Head(0, 1)) + ZeroAblate(Head(1, 1)), [], ["One part was changed at a time"]),
        (Knockout(Head(0, 1), 3, 1), ["Nothing was done to MLPs, neurons or the residual stream."], ["ablation"]),
        (Scale(Layer(0).mlp_out, 0.5), ["Nothing was done to heads, neurons or the residual stream."], ["random"]),
        (Scale(Neuron(0, 17), 0.5), ["Nothing was done to heads, MLPs or the residual stream."], []),
        (ZeroAblate(Layer(0).resid_pre), ["Nothing was done to heads, MLPs or neurons."], ["random heads"]),
        (None, ["Nothing was intervened on: this describes the model"], ["Nothing was done", "position"]),
    ],
)
def test_what_was_not_run_is_not_tested(what, there, absent):
    _, text = told(result(what))
    assert [words for words in there if words not in text] == []
    assert [words for words in absent if words in text] == []


def test_the_direction_says_what_is_necessary_and_what_sufficient():
    _, noised = told(result(Patch(Head(0, 1)), ["logit_diff"], **NOISING))
    assert "Noising alone was run, which shows what is necessary; what is sufficient" in noised
    _, denoised = told(result(Patch(Head(0, 1), "clean"), ["logit_diff"], **DENOISING))
    assert "Denoising alone was run, which shows what is sufficient; what is necessary" in denoised
    both = {"/one": result(Patch(Head(0, 1)), **NOISING), "/two": result(Patch(Head(0, 1), "clean"), **DENOISING)}
    assert "sufficient" not in told(xr.DataTree.from_dict(both))[1]


def test_heads_positions_controls_and_estimates():
    every = [ZeroAblate(Head(layer, head)) for layer in range(2) for head in range(4)]
    assert "Of 8 heads, 3 were intervened on." in told(result(every[:3]))[1]
    assert "intervened on" not in told(result(every))[1]
    assert "at all positions of a prompt at once" in told(result(every))[1]
    assert "at all positions" not in told(result(ZeroAblate(Head(0, 1).z.at(-1))))[1]
    assert "No random heads were ablated beside these" in told(result(every))[1]
    assert "No random heads" not in told(result(every, controls='{"draws": 3, "seed": 0}'))[1]
    assert "No estimate (integrated, 8 steps) was verified" in told(result(every, estimator="integrated, 8 steps"))[1]
    assert "verified" not in told(result(every))[1]
    assert "prob alone" in told(result(Patch(Head(0, 1)), ["prob"], **NOISING))[1]
    path = PathPatch(Head(0, 1), [Head(1, 2).k])
    text, _ = told(result(path, ["logit_diff"], **NOISING))
    assert KINDS["PathPatch"] in text
    assert KINDS["Patch"] not in text


def test_a_study_says_what_its_parts_ran():
    heads = xr.Dataset({"untrained_induction": (("seed", "layer"), np.zeros((4, 2)))})
    grid = [ZeroAblate(Head(0, 1)), MeanAblate(Head(0, 1)), ResampleAblate(Head(0, 1))]
    study = {"model": "small", "study": json.dumps({"type": "InductionStudy", "n": 7, "untrained": 4})}
    parts = {"/heads": heads, "/ablation": result(grid, ["loss", "accuracy"])}
    tree = xr.DataTree.from_dict(parts)
    tree.attrs |= study
    text, left = told(tree)
    assert "Scores were compared with 4 untrained models" in left
    assert "No random heads" not in left  # the study has sets of its own
    assert KINDS["Patch"] not in text
    assert "no run was denoised" in left
    parts["/patching"] = xr.Dataset({"noising": 1.0}, attrs={"direction": "noising and denoising"})
    parts["/composition"] = xr.Dataset({"composition": 1.0, "path_logit_diff": 1.0})
    parts["/words"] = xr.Dataset({"accuracy": ("example", np.ones(3))})
    tree = xr.DataTree.from_dict(parts)
    tree.attrs |= study | {"task": hw.to_json(hw.RepeatedTokens(n=7, length=5))}
    tree.attrs["model_shape"] = json.dumps({"layers": 2, "heads": 4, "rotary": True})
    text, left = told(tree)
    assert KINDS["Patch"] in text
    assert KINDS["PathPatch"] in text
    assert "Natural text was not run, but for 3 lists of words." in text
    assert "Composition leaves the rotary embedding out" in text
    assert "no run was denoised" not in left
    assert "Nothing was done to MLPs, neurons or the residual stream." in left


def test_every_component_belongs_to_a_part_and_every_kind_of_intervention_assumes_something():
    assert sorted(name for own in PLACES.values() for name in own) == sorted(map(str, hw.Component))
    assert {*KINDS} == {*edit_names()}


def test_what_looks_inside_says_what_it_assumes():
    direct = xr.Dataset({"attribution": 1.0}, attrs={"model": "small", "direct_logit_attribution": "{}"})
    lens = xr.Dataset({"prob": 1.0}, attrs={"model": "small", "logit_lens": "{}"})
    assert "freezes the final norm" in told(direct)[0]
    assert "freezes the final norm" not in told(lens)[0]
    assert "made for the last stream" in told(lens)[0]
    assert "made for the last stream" not in told(direct)[0]


def test_a_series_is_of_one_training():
    found = result(None).expand_dims(step=[1, 5, 9]).assign_attrs(series="abc")
    text, _ = told(found)
    assert "one training of small, at 3 steps" in text
    assert "checkpoint" not in text


def test_every_report_closes_with_it():
    for found in (result(None), result(Patch(Head(0, 1)), **NOISING), xr.Dataset({"a": 1.0}), xr.Dataset()):
        page = render(found)
        assert Outline(page).headings[-3:].count("Assumptions, and what was not tested") == 1
        assert '<a href="#assumptions">' in page
    assert "The result does not say what was run, so nothing can be said" in shown(render(xr.Dataset({"a": 1.0})))
    evil = render(
        result(None, model=EVIL, task=json.dumps({"repr": EVIL}), interventions=json.dumps([EVIL, {"a": [1]}]))
    )
    assert "<script>window.pwned" not in evil
