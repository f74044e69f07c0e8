"""Locks, full disks and folders that cannot be written: what is said, and what is kept."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import xarray as xr

from headwise.errors import DeclarationError, ResultError
from headwise.interventions import Head, ZeroAblate
from tests.support.sweeps import parts, sweep


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
