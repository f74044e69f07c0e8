"""Sweeps that are stopped, killed, damaged, locked or out of disk: nothing is lost, mixed or done twice."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ResultError, ResultWarning
from headwise.interventions import Grid, Head, MeanAblate, Patch, ResampleAblate, ZeroAblate
from headwise.interventions.base import memory
from headwise.interventions.base.hashing import short_hash
from headwise.interventions.run import engine
from headwise.metrics import induction, logit_diff, loss
from headwise.metrics.card import Card, Metric
from headwise.studies import InductionStudy, RepeatedTokens, Results, measure
from headwise.studies.analyses import ablation
from headwise.studies.storage import netcdf
from tests.oracles import raw_hooks

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
        "import sys; from headwise.studies.storage.unfinished import keeping\n"
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
    from headwise.studies.storage.unfinished import keeping

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


@pytest.mark.parametrize(("kind", "kills"), [("sweep", 20), ("study", 6)])
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


def refill(folder):
    """A foreign folder: what is in it, to see that it stays."""
    (folder / "deep").mkdir(parents=True)
    kept = {"mine.txt": "mine", "thesis.nc": "no result", "deep/more.txt": "more", "0123456789abcdef.txt": "x"}
    for name, text in kept.items():
        (folder / name).write_text(text)
    return kept


def holds(folder, kept):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_in_the_place_of_the_parts_is_refused(model, out, computed, tmp_path, resume):
    precious = tmp_path / "precious"
    kept = refill(precious)
    parts_folder = out.with_name("sweep.nc.parts")
    parts_folder.symlink_to(precious)
    with pytest.raises(ResultError, match=r"sweep.nc.parts is a link, .*: remove the link, or write elsewhere"):
        sweep(model, out, resume=resume)
    parts_folder.unlink()
    parts_folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ResultError, match=r"sweep.nc.parts is a link"):
        sweep(model, out, resume=resume)
    assert computed == []
    assert holds(precious, kept)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["lock", "about.json", "0123456789abcdef-0123456789abcdef.0123456789abcdef.nc", "a"])
@pytest.mark.parametrize("dangling", [False, True])
def test_links_among_the_parts_are_refused(model, out, computed, tmp_path, name, dangling):
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_text("kept")
    folder = out.with_name("sweep.nc.parts")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    with pytest.raises(ResultError, match=rf"sweep.nc.parts holds the link {name}: remove it, or write elsewhere"):
        sweep(model, out)
    assert computed == []
    assert (folder / name).is_symlink()
    assert victim.exists() != dangling
    assert dangling or victim.read_text() == "kept"


@pytest.mark.parametrize("resume", [True, False])
def test_foreign_files_among_the_parts_stay(model, out, resume):
    folder = out.with_name("sweep.nc.parts")
    kept = refill(folder)
    wanted = sweep(model, None)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(5))
    assert len(parts(out)) > 4
    xr.testing.assert_equal(sweep(model, out, resume=resume), wanted)
    assert holds(folder, kept), "only what headwise wrote is gone"
    xr.testing.assert_equal(xr.load_dataset(out).drop_attrs(), wanted.drop_attrs())


def test_a_foreign_file_called_lock_stays(model, out, computed):
    folder = out.with_name("sweep.nc.parts")
    folder.mkdir()
    (folder / "lock").write_text("the combination is 12-34-56\n")
    os.utime(folder / "lock", (0, 0))
    with pytest.raises(ResultError, match="holds a file lock that headwise did not write: move it away"):
        sweep(model, out)
    assert (folder / "lock").read_text() == "the combination is 12-34-56\n"
    assert computed == []


@pytest.mark.parametrize("name", ["lock", "about.json", "0123456789abcdef-0123456789abcdef.0123456789abcdef.nc"])
def test_what_is_no_file_among_the_parts_is_refused(model, out, computed, name):
    """A FIFO would be waited for, for ever."""
    folder = out.with_name("sweep.nc.parts")
    folder.mkdir()
    os.mkfifo(folder / name)
    with pytest.raises(ResultError, match=rf"holds {name}, which is no file"):
        sweep(model, out)
    (folder / name).unlink()
    (folder / name).mkdir()
    (folder / name / "mine").write_text("mine")
    with pytest.raises(ResultError, match=rf"holds {name}, which is no file"):
        sweep(model, out)
    assert (folder / name / "mine").read_text() == "mine"
    assert computed == []


@pytest.mark.parametrize("kind", ["removed", "link", "folder"])
def test_the_parts_are_taken_away_in_mid_run(model, out, tmp_path, kind):
    wanted = sweep(model, None)
    folder, precious, calls = out.with_name("sweep.nc.parts"), tmp_path / "precious", []
    kept = refill(precious)
    moved = "0123456789abcdef-0123456789abcdef.0123456789abcdef.nc"
    (precious / moved).write_text("like a part")

    def update(done, total):
        calls.append(done)
        if len(calls) == 5:
            shutil.rmtree(folder)
            if kind == "link":
                folder.symlink_to(precious)
            elif kind == "folder":
                precious.rename(folder)

    if kind == "removed":
        with pytest.warns(ResultWarning, match=r"sweep.nc.parts was removed meanwhile: of sweep.nc, only"):
            found = sweep(model, out, progress=update)
        xr.testing.assert_equal(found, wanted)
        xr.testing.assert_equal(xr.load_dataset(out).drop_attrs(), wanted.drop_attrs())
        assert not folder.exists()
    else:
        with pytest.raises(ResultError, match="somebody put another folder, or a link, in the place of"):
            sweep(model, out, progress=update)
        assert holds(folder, kept | {moved: "like a part"})
        assert not out.exists()


def forged(path, change):
    """A part that somebody changed, with the hash that it then has, and the name of the hash of what it says."""
    part = xr.load_dataset(path)
    part = change(part)
    path.unlink()
    beside = path.with_name("forged")
    part.to_netcdf(beside)
    what = {
        "examples": [int(end) for end in np.atleast_1d(part.attrs["examples"])[:2]],
        "run": part.attrs["run"],
        "conditions": part.attrs["conditions"],
    }
    key = f"{path.name.split('-')[0]}-{short_hash(json.dumps(what))}"
    beside.rename(path.with_name(f"{key}.{short_hash(beside.read_bytes())}.nc"))


def other_examples(*ends):
    return lambda part: part.assign_attrs(examples=list(ends))


def twice(part):
    names = json.loads(part.attrs["conditions"])
    return part.assign_attrs(conditions=json.dumps(names[:1] * len(names)))


FORGERIES = {
    "one position for all": lambda part: part.map(lambda one: one.isel({one.dims[-1]: slice(0, 1)})),
    "one example for all": lambda part: part.isel(example=slice(0, 1)),
    "transposed": lambda part: part.transpose("example", ...),
    "an extra variable": lambda part: part.assign(more=("example", np.zeros(part.sizes["example"]))),
    "a coordinate": lambda part: part.assign_coords(example=np.arange(part.sizes["example"])),
    "another name": lambda part: part.rename_vars(loss="other"),
    "one metric": lambda part: part.drop_vars("loss"),
    "whole numbers": lambda part: part.astype("int32"),
    "text": lambda part: part.astype(str),
    "half precision": lambda part: part.map(lambda one: one.astype("float64").astype("complex64").real.astype("int8")),
    "examples that are not there": other_examples(2, 6),
    "no examples": other_examples(2, 2),
    "negative examples": other_examples(-4, 4),
    "examples that are a number": lambda part: part.assign_attrs(examples=3),
    "conditions twice": twice,
    "no conditions": lambda part: part.assign_attrs(conditions="[]"),
    "conditions that are no JSON": lambda part: part.assign_attrs(conditions="["),
    "conditions that are a number": lambda part: part.assign_attrs(conditions="3"),
    "conditions within each other": lambda part: part.assign_attrs(conditions="[" * 100_000 + "]" * 100_000),
    "a run that is not there": lambda part: part.assign_attrs(run="dirty"),
    "a number for a run": lambda part: part.assign_attrs(run=7),
    "nothing": lambda part: xr.Dataset(attrs=part.attrs),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_part_is_set_aside_and_done_again(model, out, kind):
    """Its hash is right, but it is not what the plan asks for."""
    wanted = sweep(model, None, batch_size=8)
    with pytest.raises(Halt):
        sweep(model, out, batch_size=8, progress=stop_after(5))
    there = [path for path in parts(out) if xr.load_dataset(path).attrs["run"] == ""]
    forged(there[0], FORGERIES[kind])
    with pytest.warns(ResultWarning, match=r"is damaged \(.*\): set aside as .*, and computed again"):
        found = sweep(model, out, batch_size=8)
    xr.testing.assert_identical(found.drop_attrs(), wanted.drop_attrs())


def test_a_forged_part_that_declares_more_than_there_is_memory(model, out):
    wanted = sweep(model, None)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(7))
    path = parts(out)[0]
    whole = path.with_name("forged")
    with netCDF4.Dataset(whole, "w") as file, xr.open_dataset(path) as part:
        file.setncatts({name: value for name, value in part.attrs.items()})
        file.createDimension("x", 10**6)
        file.createDimension("y", 10**6)
        file.createVariable("loss", "f4", ("x", "y"), chunksizes=(1000, 1000))
    path.unlink()
    whole.rename(path.with_name(f"{path.name.split('.')[0]}.{short_hash(whole.read_bytes())}.nc"))
    with pytest.warns(ResultWarning, match=r"it holds .*1000000, 1000000.* is asked for"):
        xr.testing.assert_equal(sweep(model, out), wanted)


def with_free(count):
    """The check of memory, as where so many bytes are free."""

    def shortage(*needed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "free_memory", lambda: count)
            return memory.shortage(*needed)

    return shortage


def test_want_of_memory_is_no_damage(model, out, monkeypatch):
    """What is finished is neither set aside nor computed again: the call says how much it needs."""
    wanted = sweep(model, None)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(7))
    before = [path.name for path in parts(out)]
    with monkeypatch.context() as short:
        short.setattr(netcdf, "shortage", with_free(20))
        short.setattr(netcdf, "UNASKED", 0)
        with pytest.raises(ResultError, match="and there is room for"):
            sweep(model, out)
    assert [path.name for path in parts(out)] == before
    xr.testing.assert_equal(sweep(model, out), wanted)


def test_a_finished_study_that_memory_does_not_hold_is_not_computed_again(words_model, out, monkeypatch):
    STUDY.run(words_model, out=out)
    before = out.read_bytes()
    monkeypatch.setattr(netcdf, "shortage", with_free(20_000))
    monkeypatch.setattr(netcdf, "UNASKED", 0)
    with pytest.raises(ResultError, match="and there is room for"):
        STUDY.run(words_model, out=out)
    assert out.read_bytes() == before


def test_a_file_needs_as_much_memory_as_its_numbers(tmp_path, monkeypatch):
    size = 4 * 10**6
    hw.write_netcdf(xr.Dataset({"a": ("x", np.arange(size // 4, dtype=np.float32))}), tmp_path / "a.nc")
    monkeypatch.setattr(netcdf, "UNASKED", 0)
    monkeypatch.setattr(netcdf, "shortage", with_free(size * 4 // 3 + 4))
    assert hw.open_result(tmp_path / "a.nc", load=True)["a"].sum() > 0
    monkeypatch.setattr(netcdf, "shortage", with_free(size))
    with pytest.raises(ResultError, match="the variable a"):
        hw.open_result(tmp_path / "a.nc", load=True)


def test_a_forged_stage_of_a_study(words_model, out, monkeypatch):
    """Of other sizes, it is made again; without what the study needs, the error says what to do."""

    def stopped():
        monkeypatch.setattr(ablation, "every_head", stop)
        with pytest.raises(Halt):
            STUDY.run(words_model, out=out)
        monkeypatch.undo()
        return next(path for path in parts(out) if path.name.split(".")[0].endswith("-heads"))

    def stop(*arguments):
        raise Halt

    def forge(path, change):
        part = change(xr.load_dataset(path))
        key = path.name.split(".")[0]
        path.unlink()
        part.to_netcdf(out.with_name("forged"))
        os.replace(out.with_name("forged"), path.with_name("forged"))
        path.with_name("forged").rename(path.with_name(f"{key}.{short_hash(path.with_name('forged').read_bytes())}.nc"))

    forge(stopped(), lambda part: part.isel(head=slice(0, 3)))
    with pytest.warns(ResultWarning, match="it has 3 along head, where 8 are asked for"):
        path = stopped()
    forge(path, lambda part: part.drop_vars("induction"))
    with pytest.raises(ResultError, match=r"sweep.nc.parts may hold stages that are not what this study makes") as told:
        STUDY.run(words_model, out=out)
    assert "\n" not in str(told.value)


def test_out_is_where_it_was_when_the_call_began(model, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    calls = []

    def update(done, total):
        calls.append(done)
        if len(calls) == 4:
            os.chdir(tmp_path / "other")

    sweep(model, "sweep.nc", progress=update)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["sweep.nc"]
    assert list((tmp_path / "other").iterdir()) == []


def test_a_folder_of_results_is_where_it_was(model, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    sweep(model, tmp_path / "one" / "sweep.nc")
    monkeypatch.chdir(tmp_path)
    results = Results("one")
    monkeypatch.chdir(tmp_path / "one")
    assert len(results.select(model="*")) == len(results.refresh()) == 1
    assert str(results.folder) == "one"


NAMES = {
    "a\0b.nc": r"the file name .* has a NUL",
    "a\ud800.nc": r"the file name .* has half of a character",
    f"a{chr(0xDC80)}.nc": r"the file name .* has half of a character",
    "x" * 253 + ".nc": r"File name too long",
    "~nobody-is-called-so/a.nc": r"cannot write ~nobody-is-called-so/a.nc: Could not determine home directory",
    "dangling/a.nc": r"dangling is a link to nothing",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["measure", "write_netcdf"])
def test_names_that_no_file_can_have_are_refused_before_any_pass(model, tmp_path, computed, monkeypatch, name, way):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    write = partial(sweep, model) if way == "measure" else partial(hw.write_netcdf, xr.Dataset({"a": 1}))
    with pytest.raises(HeadwiseError, match=NAMES[name]) as told:
        write(name)
    assert "\n" not in str(told.value)
    assert computed == []


@pytest.mark.parametrize("size", [247, 249, 250, 255])
def test_long_names(model, tmp_path, computed, size):
    """Every name that a file can have; unfinished work needs room for the name of its folder."""
    name = "é" + "x" * (size - 5) + ".nc"
    assert len(os.fsencode(name)) == size
    found = hw.write_netcdf(xr.Dataset({"a": 1}), tmp_path / name)
    assert xr.load_dataset(found)["a"] == 1
    found.unlink()
    if size < 250:
        sweep(model, tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == [name]
    else:
        with pytest.raises(DeclarationError, match=rf"the name has {size} bytes, possible are 249"):
            sweep(model, tmp_path / name)
        assert computed == []


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_the_result_is_replaced(model, out, tmp_path, dangling):
    """What it leads to stays as it is: somebody else may have put the link there."""
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_text("kept")
    out.symlink_to(victim)
    wanted = sweep(model, out)
    assert not out.is_symlink()
    xr.testing.assert_equal(xr.load_dataset(out).drop_attrs(), wanted.drop_attrs())
    assert dangling != victim.exists()
    assert dangling or victim.read_text() == "kept"


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    """The NetCDF library says "Permission denied" of a file that it cannot begin."""

    def denied(self, path, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    ds = xr.Dataset({"a": 1})
    monkeypatch.setattr(xr.Dataset, "to_netcdf", denied)
    with pytest.raises(ResultError, match=r"cannot write .*a.nc: Permission denied"):
        hw.write_netcdf(ds, tmp_path / "a.nc")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ResultError, match=r"cannot write .*a.nc: No space left on device"):
        hw.write_netcdf(ds, tmp_path / "a.nc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_or_a_device_keeps_its_place(tmp_path):
    os.mkfifo(tmp_path / "pipe.nc")
    with pytest.raises(ResultError, match=r"pipe\.nc is a device, a pipe or a socket: give the name of a file"):
        hw.write_netcdf(xr.Dataset({"a": ("x", [1.0])}), tmp_path / "pipe.nc")
    assert (tmp_path / "pipe.nc").is_fifo()
