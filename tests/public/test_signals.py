"""Ctrl-C at any moment: no lock stays taken, no file is cut off, and every handler is back."""

import os
import signal
import threading

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.signals import undisturbed
from headwise.studies.output.progress import Progress, Stopped, Terminating
from headwise.studies.storage.files import write_beside
from tests.support.programs import run

IN_THE_LOCK = """
import signal, sys
import numpy as np, xarray as xr
from xarray.backends import locks
import headwise as hw

signal.signal(signal.SIGINT, signal.default_int_handler)
folder, what = sys.argv[1:]
ds = xr.Dataset({"a": ("x", np.arange(10.0))})
hw.write_netcdf(ds, folder + "/a.nc")
real, armed = locks.SerializableLock.__enter__, [1]

def entering(self):
    real(self)
    if armed:
        armed.clear()
        signal.raise_signal(signal.SIGINT)

locks.SerializableLock.__enter__ = entering
acquire = locks.CombinedLock.acquire

def acquiring(self, *given, **more):
    found = acquire(self, *given, **more)
    if armed:
        armed.clear()
        signal.raise_signal(signal.SIGINT)
    return found

locks.CombinedLock.acquire = acquiring
try:
    hw.write_netcdf(ds, folder + "/b.nc") if what == "write" else hw.open_result(folder + "/a.nc", load=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
seen = not armed
armed.clear()  # nothing more, also where no such lock is taken
hw.write_netcdf(ds, folder + "/c.nc")
print(seen, hw.open_result(folder + "/c.nc", load=True)["a"].values.sum())
"""


@pytest.mark.parametrize("what", ["write", "read"])
def test_ctrl_c_between_taking_the_lock_of_xarray_and_seeing_to_its_release(tmp_path, what):
    done = run(IN_THE_LOCK, tmp_path, what)
    assert done.stdout.split()[-1:] == ["45.0"], done.stderr[-2000:]
    assert ("interrupted" in done.stdout) == ("True" in done.stdout)
    if what == "write":
        assert done.stdout.split()[0] == "interrupted"
        assert float(hw.open_result(tmp_path / "b.nc", load=True)["a"].sum()) == 45.0, "the write came to its end first"


AT_ANY_MOMENT = """
import os, random, signal, sys, threading, time
import numpy as np, xarray as xr
import headwise as hw
from headwise.errors import HeadwiseError

folder = sys.argv[1]
inside, count, over = False, 0, False

def handler(number, frame):
    global inside
    if inside:
        inside = False
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, handler)
moments = random.Random(0)
hw.write_netcdf(xr.Dataset({"a": ("x", np.arange(10.0))}), folder + "/0.nc")  # which imports what it needs
hw.open_result(folder + "/0.nc", load=True)

def strike():
    while not over:
        time.sleep(moments.uniform(0.0005, 0.03))
        os.kill(os.getpid(), signal.SIGINT)

thread = threading.Thread(target=strike)
thread.start()
for number in range(400):
    try:
        inside = True
        hw.write_netcdf(xr.Dataset({"a": ("x", np.full(10, number))}), f"{folder}/{number % 5}.nc")
        hw.open_result(f"{folder}/{number % 5}.nc", load=True)
        inside = False
    except KeyboardInterrupt:
        count += 1
over = True
thread.join()
hw.write_netcdf(xr.Dataset({"a": ("x", np.arange(10.0))}), folder + "/last.nc")
print(count, hw.open_result(folder + "/last.nc", load=True)["a"].values.sum(), *sorted(os.listdir(folder)))
"""


def test_ctrl_c_at_any_moment_of_hundreds_of_writes(tmp_path):
    done = run(AT_ANY_MOMENT, tmp_path)
    count, total, *names = done.stdout.split()
    assert 20 < int(count) < 400, done.stderr[-2000:]
    assert total == "45.0"
    assert names == ["0.nc", "1.nc", "2.nc", "3.nc", "4.nc", "last.nc"], "nothing half-written is left"
    for name in names:
        assert hw.open_result(tmp_path / name, load=True)["a"].shape == (10,)


def test_however_often_it_is_asked_a_block_comes_to_its_end():
    done = []

    @undisturbed()
    def work():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_user_gets_it_afterwards():
    seen, order = [], []
    before = signal.signal(signal.SIGINT, lambda *given: (seen.append(given[0]), order.append("handled")))
    try:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            order.append("done")
        assert (seen, order) == ([signal.SIGINT], ["done", "handled"])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


STORM = """
import itertools, os, signal, sys, threading, time
import headwise as hw
from headwise.interventions.begin import turn
from headwise.signals import undisturbed

kind = sys.argv[1]
signal.signal(signal.SIGINT, signal.default_int_handler)
model = hw.load("words-2l")
count, end = 0, time.monotonic() + 2
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3 + count % 50 * 1e-5)
        while True:
            with turn(model) if kind == "turn" else undisturbed():
                pass
    except KeyboardInterrupt:
        count += 1
signal.setitimer(signal.ITIMER_REAL, 0)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGINT)
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.getsignal(signal.SIGTERM)
taken = []

def other():
    with turn(model):
        taken.append(1)

thread = threading.Thread(target=other, daemon=True)
thread.start()
thread.join(30)
assert taken, "the turn is still taken"
print(count)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that signals here")
@pytest.mark.parametrize("kind", ["turn", pytest.param("handlers", marks=pytest.mark.heavy)])
def test_after_hundreds_of_interrupts_no_turn_is_taken_and_every_handler_is_back(kind):
    done = run(STORM, kind)
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout) > 200


def test_an_error_is_told_and_ctrl_c_is_not_lost():
    @undisturbed()
    def work():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("first")

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)


def test_elsewhere_than_in_the_main_thread_nothing_is_installed():
    seen = []

    def work():
        with undisturbed(), Terminating(), Progress("reading", False):
            seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(signal.default_int_handler, signal.SIG_DFL)]


def test_a_second_ctrl_c_waits_for_a_write_within_passes(tmp_path):
    """A first one waits for the pass, a second one interrupts at once, and a write comes to its end all the same."""
    ds = xr.Dataset({"a": ("x", np.arange(10.0))})

    def write(path):
        os.kill(os.getpid(), signal.SIGINT)
        ds.to_netcdf(path, engine="netcdf4")

    def work():
        with Progress("measuring", False) as bar:
            os.kill(os.getpid(), signal.SIGINT)
            write_beside(tmp_path / "a.nc", write)
            bar.update(1, 2)

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert not isinstance(caught.value, Stopped)
    assert float(hw.open_result(tmp_path / "a.nc", load=True)["a"].sum()) == 45.0


ASYNCIO = """
import asyncio, os, signal, sys
import numpy as np, xarray as xr
import headwise as hw
from headwise.studies.storage.files import write_beside

signal.signal(signal.SIGINT, signal.default_int_handler)
folder = sys.argv[1]
ds = xr.Dataset({"a": ("x", np.arange(10.0))})

def write(path):
    os.kill(os.getpid(), signal.SIGINT)
    ds.to_netcdf(path, engine="netcdf4")

async def main():
    from pathlib import Path
    write_beside(Path(folder) / "a.nc", write)
    print("written", flush=True)
    await asyncio.sleep(60)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print(hw.open_result(folder + "/a.nc", load=True)["a"].values.sum())
"""


def test_ctrl_c_under_asyncio(tmp_path):
    done = run(ASYNCIO, tmp_path)
    assert done.stdout.split() == ["written", "45.0"], done.stderr[-2000:]


def test_ctrl_c_while_the_lock_of_a_result_is_taken_lets_go_of_it(tmp_path, monkeypatch):
    """Else this process would think for ever that it is at work on that result."""
    from headwise.studies.storage import unfinished

    real = unfinished.UnfinishedResult.acquire

    def acquire(self):
        real(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(unfinished.UnfinishedResult, "acquire", acquire)
    with pytest.raises(KeyboardInterrupt), unfinished.keeping(tmp_path / "a.nc", True):
        pass
    monkeypatch.undo()
    with unfinished.keeping(tmp_path / "a.nc", True):
        pass
    assert list(tmp_path.iterdir()) == []
