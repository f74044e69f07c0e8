"""Sweeps that are stopped, killed, damaged, locked or out of disk: nothing is lost, mixed or done twice."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import raw_hooks
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ResultError, ResultWarning
from headwise.interventions import Grid, Head, MeanAblate, Patch, ResampleAblate, ZeroAblate, engine
from headwise.metrics import induction, logit_diff, loss
from headwise.metrics.card import Card, Metric
from headwise.studies import InductionStudy, RepeatedTokens, ablation, measure

TASK = RepeatedTokens(n=4, length=6)
WANDERING = ("created", "seconds", "seconds_by_stage", "host", "inputs")


def grid():
    kinds = {"patch": Patch, "mean": MeanAblate, "resample": ResampleAblate}
    return Grid(
        lambda kind, layer, head: kinds[kind](Head(layer, head)), kind=list(kinds), layer=range(2), head=range(2)
    )


def sweep(model, out, task=TASK, what=None, metrics=(loss, logit_diff), **options):
    options = {"batch_size": 4, "per_position": True} | options
    return measure(model, task, grid() if what is None else what, metrics, out=out, **options)


@pytest.fixture
def model():
    return hw.load(raw_hooks.random_gpt2(2, 2, 6, 40, 20, seed=3))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "sweep.nc"


@pytest.fixture
def computed(monkeypatch):
    """The conditions of every pass that comes to its end."""
    real, seen = engine.run_part, []

    def counted(model, plan, chunk, part, known):
        found = real(model, plan, chunk, part, known)
        seen.append((chunk.group, part.one.conditions, part.examples))
        return found

    monkeypatch.setattr(engine, "run_part", counted)
    return seen


class Halt(Exception):
    """Stands for whatever ends a process."""


def stop_after(count):
    """A progress callback that ends the work once so many steps are done in this call."""
    calls = []

    def update(done, total):
        calls.append(done)
        if len(calls) > count:
            raise Halt

    return update


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


def parts(out):
    return sorted(out.with_name(f"{out.name}.parts").glob("*.nc"))


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


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "swapped"])
def test_a_damaged_part_is_set_aside_and_done_again(model, out, computed, damage):
    wanted = sweep(model, None)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(7))
    there = parts(out)
    for number, path in enumerate(there[:2]):
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(
            {
                "truncated": whole[:middle],
                "empty": b"",
                "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
                "swapped": there[2 + number].read_bytes(),
            }[damage]
        )
    with pytest.warns(ResultWarning, match="is damaged .*set aside as .*damaged, and computed again") as caught:
        found = sweep(model, out)
    assert len(caught) == 2
    xr.testing.assert_equal(found, wanted)


def test_a_damaged_part_stays_until_the_result_is_whole(model, out):
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(7))
    parts(out)[0].write_bytes(b"")
    with pytest.warns(ResultWarning), pytest.raises(Halt):
        sweep(model, out, progress=stop_after(0))
    assert len(list(parts(out)[0].parent.glob("*.damaged"))) == 1


def test_a_lock_names_its_owner(model, out):
    program = (
        "import sys; from headwise.studies.shards import keeping\n"
        "with keeping(sys.argv[1], True): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ResultError, match=rf"is being made by process {holder.pid} on {os.uname().nodename}"):
            sweep(model, out)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    sweep(model, out)  # the lock of a process that is gone counts for nothing
    assert out.exists()


def test_a_lock_of_another_machine_is_kept(model, out):
    folder = out.with_name("sweep.nc.parts")
    folder.mkdir()
    (folder / "lock").write_text("1\nelsewhere\n")
    with pytest.raises(ResultError, match=r"process 1 on elsewhere: wait for it.*remove .*sweep.nc.parts/lock"):
        sweep(model, out)
    assert (folder / "lock").exists()


def test_a_result_inside_its_own_making_is_refused(model, out):
    from headwise.studies.shards import keeping

    with keeping(out, True), pytest.raises(ResultError, match="this one"):
        sweep(model, out)


def test_a_full_disk_is_said_and_nothing_is_lost(model, out, computed, monkeypatch):
    wanted = sweep(model, None)
    real, calls = xr.Dataset.to_netcdf, []

    def full(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *arguments, **options)

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    with pytest.raises(ResultError, match=r"sweep.nc.parts: No space left on device; what was finished before is kept"):
        sweep(model, out)
    assert len(parts(out)) == 5
    assert not list(out.parent.rglob("*.part"))
    del computed[:]
    xr.testing.assert_equal(sweep(model, out), wanted)
    assert set(Counter(computed).values()) == {1}


def test_no_space_for_the_whole_keeps_the_old_file_and_the_parts(model, out):
    old = sweep(model, out, what=ZeroAblate(Head(0, 0)))
    whole = out.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # enough for a part, not for the whole
        with pytest.raises(ResultError, match=r"cannot write .*sweep.nc"):
            sweep(model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert out.read_bytes() == whole
    assert old.attrs["interventions"] in xr.load_dataset(out).attrs["interventions"]
    assert parts(out)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("sweep.csv", DeclarationError, "end the name in .nc"),
        ("file/sweep.nc", ResultError, "cannot write"),
        ("folder.nc", ResultError, "is a folder"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_run(model, tmp_path, computed, name, error, message):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.nc").mkdir()
    with pytest.raises(error, match=message):
        sweep(model, tmp_path / name)
    assert computed == []
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_is_read_only(model, out, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResultError, match=r"cannot write .*Permission denied"):
        sweep(model, out)


def test_bad_input_leaves_no_folder(model, out):
    with pytest.raises(DeclarationError):
        sweep(model, out, what=ZeroAblate(Head(9, 0)))
    assert list(out.parent.iterdir()) == []


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


STUDY = InductionStudy(n=4, length=6, draws=3)


def test_a_study_goes_on_where_it_was(words_model, out, monkeypatch):
    wanted = STUDY.run(words_model)
    real, calls = ablation.every_head, []

    def once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise Halt
        return real(*arguments)

    monkeypatch.setattr(ablation, "every_head", once)
    seen = []
    with pytest.raises(Halt):
        STUDY.run(words_model, out=out)
    finished = len(parts(out))
    scores = []
    from headwise.studies import heads

    described = heads.describe_heads
    monkeypatch.setattr(heads, "describe_heads", lambda *a, **k: scores.append(1) or described(*a, **k))
    found = STUDY.run(words_model, seen.append, out=out)
    assert finished > 3
    assert scores == [], "the stage of scores was finished before"
    same(hw.open_tree(out), wanted)
    same(found, wanted)
    assert [path.name for path in out.parent.iterdir()] == ["sweep.nc"]
    assert STUDY.run(words_model, seen.append, out=out).attrs["created"] == found.attrs["created"]


@pytest.mark.parametrize(("kind", "kills"), [("sweep", 20), ("study", 6)])
def test_killed_at_random_moments_it_ends_with_the_same_file(tmp_path, kind, kills):
    """SIGKILL, then started again, until it comes to its end."""
    program = Path(__file__).with_name("killed.py")
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
    same(hw.open_tree(tmp_path / seen["out"]), hw.open_tree(tmp_path / "whole.nc"))
    for log in tmp_path.glob("killed*.log"):
        kept = [line for line in log.read_text().splitlines() if line.startswith("kept")]
        assert kept
        assert set(Counter(kept).values()) == {1}, "a pass that was finished was done again"
