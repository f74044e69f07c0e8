"""Sweeps and studies that are stopped or killed go on where they were: nothing is lost, mixed or done twice."""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import ResultWarning
from headwise.interventions import Head, Patch, ResampleAblate, ZeroAblate
from headwise.metrics import induction, logit_diff, loss
from headwise.metrics.card import Card, Metric
from headwise.studies import RepeatedTokens, measure
from headwise.studies.analyses import ablation
from tests.support.sweeps import STUDY, TASK, Halt, parts, stop_after, sweep

WANDERING = ("created", "seconds", "seconds_by_stage", "host", "inputs")


def same(one, other):
    """Equal to the last bit, and in the same words, but for time and place."""
    one, other = (each if isinstance(each, xr.DataTree) else xr.DataTree(each) for each in (one, other))
    assert list(one.groups) == list(other.groups)
    for name in one.groups:
        left, right = (each[name].to_dataset().drop_attrs(deep=False) for each in (one, other))
        xr.testing.assert_identical(left, right)
        attrs = [
            {key: value for key, value in each[name].attrs.items() if key not in WANDERING} for each in (one, other)
        ]
        assert attrs[0] == attrs[1]


def test_writing_changes_no_number_and_leaves_one_file(model, out):
    plain = sweep(model, None)
    written = sweep(model, out)
    xr.testing.assert_equal(plain, written)
    same(xr.load_dataset(out), written)
    assert [path.name for path in out.parent.iterdir()] == ["sweep.nc"]


def test_what_was_stopped_anywhere_goes_on_where_it_was(model, out, computed):
    wanted = sweep(model, None)
    passes = len(computed)
    assert passes > 10
    for count in range(1, 12):
        with pytest.raises(Halt):
            sweep(model, out, progress=stop_after(count if count < 3 else 2))
        assert not out.exists()
    del computed[:]
    steps = []
    found = sweep(model, out, progress=lambda *at: steps.append(at))
    xr.testing.assert_equal(found, wanted)
    assert 0 < len(computed) < passes / 2
    assert steps[0][0] > steps[0][1] / 2, "the bar begins where the work was"
    assert steps[-1][0] == steps[-1][1]


def test_each_pass_that_was_finished_is_done_once(model, out, computed):
    measure(model, TASK, None, loss)  # the self-check is no part of the sweep
    del computed[:]
    for _ in range(50):
        try:
            sweep(model, out, progress=stop_after(3))
            break
        except Halt:
            continue
    assert out.exists()
    assert set(Counter(computed).values()) == {1}


def test_other_batch_sizes_take_what_is_there(model, out, computed):
    wanted = sweep(model, None)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(6))
    del computed[:]
    found = sweep(model, out, batch_size=100)
    for name in wanted.data_vars:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-6)
    done = [condition for _, conditions, _ in computed for condition in conditions]
    assert 0 < len(done) < 12


def test_what_is_whole_is_read_and_not_done_again(model, out, computed):
    wanted = sweep(model, out)
    before = out.stat().st_mtime_ns
    del computed[:]
    again = sweep(model, out)
    xr.testing.assert_equal(again, wanted)
    assert (computed, out.stat().st_mtime_ns) == ([], before)
    sweep(model, out, resume=False)
    assert computed
    assert out.stat().st_mtime_ns > before


def other_kernel(logits, targets):
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1) * 2


def changes(model):
    def weights():
        with torch.no_grad():
            model.module.transformer.h[1].mlp.c_fc.weight[0, 0] += 0.5

    doubled = Metric(Card("loss", "", "nats", (0, None)), "logits", other_kernel, loss.prepare)
    return {
        "weights": (weights, {}),
        "task": (None, {"task": RepeatedTokens(n=4, length=6, seed=1)}),
        "base": (None, {"base": "corrupted", "what": Patch(Head(0, 1), source="clean")}),
        "kernel": (None, {"metrics": [doubled, logit_diff]}),
        "metrics": (None, {"metrics": [loss]}),
        "edits": (None, {"what": {"one": ResampleAblate(Head(0, 1), seed=1), "other": ZeroAblate(Head(1, 1))}}),
    }


@pytest.mark.parametrize("kind", ["weights", "task", "base", "kernel", "metrics", "edits"])
def test_nothing_is_taken_from_work_that_asked_otherwise(model, out, computed, kind):
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(8))
    assert len(parts(out)) > 5
    change, options = changes(model)[kind]
    if change:
        change()
        measure(model, TASK, None, loss)  # the self-check of the changed model is no part of the sweep
    del computed[:]
    wanted = sweep(model, None, **options)
    fresh = list(computed)
    del computed[:]
    told = pytest.warns(ResultWarning, match="begun with another model") if change else nullcontext()
    with told:
        found = sweep(model, out, **options)
    xr.testing.assert_equal(found, wanted)
    assert computed == fresh
    assert not parts(out)


def test_interventions_in_another_order_are_found(model, out, computed):
    what = {"a": ZeroAblate(Head(0, 0)), "b": ZeroAblate(Head(0, 1)), "c": ZeroAblate(Head(1, 0))}
    with pytest.raises(Halt):
        sweep(model, out, what=what, progress=stop_after(3))
    done = len(computed)
    del computed[:]
    turned = dict(reversed(what.items())) | {"again": what["a"]}
    found = sweep(model, out, what=turned)
    assert sum(len(conditions) for _, conditions, _ in computed) < 4
    assert done
    same(found.drop_attrs(deep=False), sweep(model, None, what=turned).drop_attrs(deep=False))


def test_patterns_and_means_and_estimates_go_on_too(model, out, computed):
    options = {"metrics": [loss, induction], "per_position": False}
    wanted = sweep(model, None, **options)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(9), **options)
    xr.testing.assert_equal(sweep(model, out, **options), wanted)
    estimate = {"metrics": [loss], "per_position": False, "estimator": "gradient"}
    wanted = sweep(model, None, **estimate)
    xr.testing.assert_equal(sweep(model, out, **estimate), wanted)
    assert xr.load_dataset(out).attrs["estimator"] == "gradient"


def test_about_says_what_it_will_be(model, out):
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(3))
    about = json.loads((out.with_name("sweep.nc.parts") / "about.json").read_text())
    assert about["model"] == model.name
    assert json.loads(about["task"])["type"] == "RepeatedTokens"


def test_a_study_goes_on_where_it_was(words_model, out, monkeypatch):
    wanted = STUDY.run(words_model)
    real, calls = ablation.every_head, []

    def once(*arguments, **named):
        calls.append(1)
        if len(calls) == 1:
            raise Halt
        return real(*arguments, **named)

    monkeypatch.setattr(ablation, "every_head", once)
    seen = []
    with pytest.raises(Halt):
        STUDY.run(words_model, out=out)
    finished = len(parts(out))
    scores = []
    from headwise.studies.analyses import heads

    described = heads.describe_heads
    monkeypatch.setattr(heads, "describe_heads", lambda *a, **k: scores.append(1) or described(*a, **k))
    found = STUDY.run(words_model, seen.append, out=out)
    assert finished > 3
    assert scores == [], "the stage of scores was finished before"
    same(hw.open_result(out, load=True), wanted)
    same(found, wanted)
    assert [path.name for path in out.parent.iterdir()] == ["sweep.nc"]
    assert STUDY.run(words_model, seen.append, out=out).attrs["created"] == found.attrs["created"]


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("sweep", 3), *(pytest.param(*given, marks=pytest.mark.heavy) for given in (("sweep", 20), ("study", 6)))],
)
def test_killed_at_random_moments_it_ends_with_the_same_file(tmp_path, kind, kills):
    """SIGKILL, then started again, until it comes to its end."""
    program = Path(__file__).parents[2] / "support" / "killed.py"
    run = subprocess.run(
        [sys.executable, program, tmp_path, kind, str(kills)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["status"] == [0, 0], run.stderr[-2000:]
    assert seen["killed"] == kills
    assert not [name for name in seen["names"] if name.endswith(".parts")]
    same(hw.open_result(tmp_path / seen["out"], load=True), hw.open_result(tmp_path / "whole.nc", load=True))
    for log in tmp_path.glob("killed*.log"):
        kept = [line for line in log.read_text().splitlines() if line.startswith("kept")]
        assert kept
        assert set(Counter(kept).values()) == {1}, "a pass that was finished was done again"
