"""controls=N: random sets of other heads beside what was asked for, and how often they do as much damage."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import Grid, Head, Layer, MeanAblate, Patch, ZeroAblate
from headwise.metrics import accuracy, induction, logit_diff, loss
from headwise.studies import RepeatedTokens, measure
from headwise.studies.analyses.ablation import sets_against_controls

TASK = RepeatedTokens(n=4, length=7, seed=2)
PAIR = ZeroAblate(Head(0, 1)) + ZeroAblate(Head(1, 2))


def heads_of(text):
    return tuple(map(Head.parse, text.split()))


def p_by_hand(ds, name, sign, **at):
    """(1 + random sets that do at least as much damage) / (1 + sets), by loops; `sign` turns a change into damage."""
    base = float(ds[f"baseline_{name}"].sel(run="clean").mean())
    own = sign * (float(ds[name].sel(at).mean()) - base)
    found = {}
    for control in ds["control"].values:
        null = [
            sign * (float(one.mean()) - base)
            for one in ds[f"{name}_control"].sel({**at, "control": control}).transpose("draw", "example")
            if not np.isnan(one).any()
        ]
        found[control] = (1 + sum(one >= own for one in null)) / (1 + len(null))
    return [found[control] for control in ds["control"].values]


def test_every_other_set_where_there_are_few(small_model):
    """Two layers of four heads: 3 * 3 pairs in the same layers, and 6 * 5 / 2 over all, each measured alone here."""
    ds = measure(small_model, TASK, PAIR, [loss, logit_diff], controls=100)
    plain = measure(small_model, TASK, PAIR, [loss, logit_diff])
    xr.testing.assert_allclose(ds["loss"], plain["loss"], atol=2e-5)
    assert ds["loss_control"].dims == ("control", "draw", "example")
    assert ds["control"].values.tolist() == ["same layers", "all layers"]
    others = [Head(layer, head) for layer in (0, 1) for head in range(4) if (layer, head) not in ((0, 1), (1, 2))]
    every = {frozenset(pair) for pair in itertools.combinations(others, 2)}
    same = {pair for pair in every if {head.layer for head in pair} == {0, 1}}
    for control, wanted in {"same layers": same, "all layers": every}.items():
        texts = ds["control_heads"].sel(control=control).values
        drawn = [frozenset(heads_of(text)) for text in texts if text]
        assert set(drawn) == wanted
        assert len(drawn) == len(wanted)
        for text, values in zip(texts, ds["loss_control"].sel(control=control).values, strict=True):
            if not text:
                assert np.isnan(values).all()
                continue
            one, two = heads_of(text)
            alone = measure(small_model, TASK, ZeroAblate(one) + ZeroAblate(two), [loss])["loss"]
            np.testing.assert_allclose(values, alone, atol=2e-5)
    assert ds["p_loss"].dims == ("control",)
    np.testing.assert_allclose(ds["p_loss"], p_by_hand(ds, "loss", 1))
    np.testing.assert_allclose(ds["p_logit_diff"], p_by_hand(ds, "logit_diff", -1))
    assert ds["p_loss"].attrs["units"] == "1"
    assert json.loads(ds.attrs["controls"]) == {"draws": 100, "seed": 0}


def test_conditions_of_several_kinds(words_model):
    what = {
        "prev": ZeroAblate(Head(0, 3)),
        "pair": MeanAblate(Head(1, 0)) + MeanAblate(Head(1, 1)),
        "patch": Patch(Head(0, 3)) + Patch(Head(1, 2)),
    }
    ds = measure(words_model, TASK, what, ["loss", "accuracy"], controls=3, seed=5)
    assert ds["loss_control"].dims == ("condition", "control", "draw", "example")
    assert ds["loss_control"].sizes["draw"] == 3
    assert ds["p_accuracy"].dims == ("condition", "control")
    kinds = {"prev": ZeroAblate, "pair": MeanAblate, "patch": Patch}
    own = {"prev": {(0, 3)}, "pair": {(1, 0), (1, 1)}, "patch": {(0, 3), (1, 2)}}
    for name, kind in kinds.items():
        for control in ("same layers", "all layers"):
            at = {"condition": name, "control": control}
            for text, values in zip(ds["control_heads"].sel(at).values, ds["loss_control"].sel(at), strict=True):
                heads = heads_of(text)
                assert not {(head.layer, head.head) for head in heads} & own[name]
                if control == "same layers":
                    assert sorted(head.layer for head in heads) == sorted(layer for layer, _ in own[name])
                alone = measure(words_model, TASK, sum(map(kind, heads)), ["loss"])["loss"]
                np.testing.assert_allclose(values, alone, atol=5e-5)
        np.testing.assert_allclose(ds["p_loss"].sel(condition=name), p_by_hand(ds, "loss", 1, condition=name))
        np.testing.assert_allclose(ds["p_accuracy"].sel(condition=name), p_by_hand(ds, "accuracy", -1, condition=name))
    other = measure(words_model, TASK, what, ["loss"], controls=3, seed=6)
    assert (other["control_heads"] != ds["control_heads"]).any()


def test_the_study_draws_the_same_sets_and_p(words_model):
    """Its sets against random sets are those of measure, one ablation after the other."""
    sets = {"one": [Head(0, 3)], "two": [Head(1, 0), Head(1, 2)]}
    study = sets_against_controls(words_model, TASK, sets, metrics=(loss, accuracy), draws=4, seed=3)
    what = {name: sum(map(ZeroAblate, heads)) for name, heads in sets.items()}
    ds = measure(words_model, TASK, what, [loss, accuracy], controls=4, seed=3)
    zero = study.sel(ablation="zero")
    assert (ds["control_heads"].values == zero["control_heads"].values).all()
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(ds[f"{name}_control"], zero[f"control_{name}"], atol=5e-5)
        np.testing.assert_array_equal(ds[f"p_{name}"], zero[f"p_{name}"])


def test_a_file_with_controls_is_measured_again(words_model, tmp_path):
    heads = Grid(lambda head: ZeroAblate(Head(1, head)), head=range(3))
    path = tmp_path / "controls.nc"
    ds = measure(words_model, TASK, heads, "loss", controls=2, seed=1, out=path)
    assert ds["loss_control"].dims == ("head", "control", "draw", "example")
    found = hw.rerun(path)
    assert found.agrees, str(found)
    assert found.largest == 0.0
    assert measure(words_model, TASK, heads, "loss", out=path).sizes.get("control") is None
    made = hw.plan(words_model, TASK, heads, "loss", controls=2, seed=1, timed=False)
    assert len(made.conditions) == len({*made.conditions})  # what several conditions draw is measured once
    assert made.conditions[:3] == hw.plan(words_model, TASK, heads, timed=False).conditions
    assert len(made.conditions) > 3


def test_workers_get_the_same_sets_and_runs(words_model):
    """What travels says which runs and random sets there are."""
    heads = Grid(lambda head: ZeroAblate(Head(1, head)), head=range(2))
    asked = {"metrics": "loss", "controls": 2, "seed": 4, "runs": "clean"}
    with ThreadPoolExecutor(1) as pool:
        there = measure(words_model, TASK, heads, executor=pool, **asked)
    here = measure(words_model, TASK, heads, **asked)
    assert there["run"].values.tolist() == ["clean"]
    xr.testing.assert_allclose(there, here, atol=2e-5)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        (None, {}, "controls=2: they are random sets of heads, and nothing is intervened on"),
        (ZeroAblate(Head(0, 0).k), {}, "controls=2: they replace whole heads, and L0H0 k is none"),
        (ZeroAblate(Head(0, 0).z.at(3)), {}, "controls=2: they replace whole heads, and L0H0 z at 3 is none"),
        (ZeroAblate(Layer(0).mlp_out), {}, "controls=2: they replace whole heads, and L0 mlp_out is none"),
        (hw.PathPatch(Head(0, 0), Head(1, 0).k), {}, "controls=2: they replace whole heads, and"),
        (
            ZeroAblate(Head(0, 0)) + MeanAblate(Head(0, 1)),
            {},
            "controls=2: what is done to the heads of one condition must be of one kind",
        ),
        (PAIR, {"metrics": [induction]}, "controls=2: induction does not say which way a model does better"),
        (PAIR, {"per_position": True}, "controls=2: they are compared by the mean over positions: leave per_position"),
        (PAIR, {"estimator": "gradient"}, "controls=2: they are measured exactly: leave estimator"),
        (
            sum(ZeroAblate(Head(0, head)) for head in range(4)) + sum(ZeroAblate(Head(1, head)) for head in range(3)),
            {},
            "controls=2: GPT2LMHeadModel has not enough other heads",
        ),
        (PAIR, {"controls": -1}, "controls must be 0 or more, got -1"),
        (PAIR, {"controls": "many"}, "controls must be a whole number, got 'many'"),
        (Grid(lambda draw: ZeroAblate(Head(0, draw)), draw=[0, 1]), {}, "a grid axis cannot be called 'draw' here"),
    ],
)
def test_controls_without_a_meaning_are_refused(small_model, what, options, message):
    passes = []
    handle = small_model.module.register_forward_pre_hook(lambda *_: passes.append(1))
    given = {"metrics": [loss], "controls": 2} | options
    try:
        with pytest.raises(DeclarationError) as caught:
            measure(small_model, TASK, what, **given)
    finally:
        handle.remove()
    assert message in str(caught.value)
    assert passes == []
