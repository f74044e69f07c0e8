"""Ctrl-C and SIGTERM at any moment: no lock stays taken, no file is cut off, and what is finished is kept and named."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.metrics import loss
from headwise.signals import undisturbed
from headwise.studies import RepeatedTokens, measure
from headwise.studies.output.progress import Progress, Stopped, Terminating
from headwise.studies.storage.files import write_beside

DEADLINE = 180
"""Seconds after which a process counts as one that hangs."""


def run(program, *arguments):
    """A process of its own that runs a program; a deadline catches one that hangs."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


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
count, end = 0, time.monotonic() + 5
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
@pytest.mark.parametrize("kind", ["turn", "handlers"])
def test_after_thousands_of_interrupts_no_turn_is_taken_and_every_handler_is_back(kind):
    done = run(STORM, kind)
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout) > 500


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


MEASURE = """
import json, os, signal, sys
import numpy as np
import headwise as hw
from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure

out, stop = sys.argv[1], int(sys.argv[2])
seen = []

def update(done, total):
    seen.append(done)
    if len(seen) == stop:
        os.kill(os.getpid(), signal.SIGTERM)

model = hw.load("words-2l")
grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))
try:
    measure(model, RepeatedTokens(n=2, length=6), grid, [loss], batch_size=2, progress=update, out=out)
finally:
    print(json.dumps(seen), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
"""


def test_sigterm_ends_at_the_end_of_a_pass_and_says_where_finished_work_is_kept(tmp_path):
    """The process ends as SIGTERM ends one; the next one goes on where it was."""
    out = tmp_path / "a.nc"
    first = run(MEASURE, out, 4)
    assert first.returncode == -signal.SIGTERM, first.stderr[-2000:]
    (line,) = [line for line in first.stderr.splitlines() if line.startswith("headwise:")]
    start, end = "headwise: stopped by SIGTERM after ", f" of 18 passes; they are kept in {out}.parts"
    assert line.startswith(start)
    assert line.endswith(end)
    done = int(line.removeprefix(start).removesuffix(end))
    assert done in (4, 5)
    assert "Traceback" not in first.stderr
    kept = list((tmp_path / "a.nc.parts").iterdir())
    assert len([path for path in kept if path.suffix == ".nc"]) >= done
    assert not [path.name for path in kept if path.suffix not in (".nc", ".json")], "no lock, nothing half-written"
    second = run(MEASURE, out, -1)
    assert second.returncode == 0, second.stderr[-2000:]
    steps, default = second.stdout.split("] ")
    assert len(json.loads(steps + "]")) < 18, "what was finished is not done again"
    assert default.strip() == "True"
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_ends_with_one_line_on_sigterm(tmp_path):
    out = tmp_path / "run.nc"
    command = [sys.executable, "-m", "headwise", "induction", "--n", "4", "--length", "8", "--out", str(out)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in running.stderr:
        if line.startswith("4/"):
            running.send_signal(signal.SIGTERM)
            break
    rest = running.communicate(timeout=DEADLINE)[1]
    assert running.returncode == -signal.SIGTERM, rest
    last = rest.strip().splitlines()[-1]
    assert last.startswith("headwise: stopped by SIGTERM")
    assert f"kept in {out}.parts" in last
    assert "Traceback" not in rest
    kept = list((tmp_path / "run.nc.parts").iterdir())
    assert len([path for path in kept if path.suffix == ".nc"]) > 3
    assert not [path.name for path in kept if path.suffix not in (".nc", ".json")]


def test_a_handler_of_sigterm_stays(small_model, tmp_path):
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        ds = measure(
            small_model,
            RepeatedTokens(n=2, length=6),
            None,
            [loss],
            out=tmp_path / "a.nc",
            progress=lambda *_: os.kill(os.getpid(), signal.SIGTERM),
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(calls) == 2
    assert ds["baseline_loss"].sizes == {"run": 2, "example": 2}


def test_a_child_that_was_forked_meanwhile_ends_at_once(tmp_path):
    """Pools end their workers with SIGTERM."""
    program = (
        "import os, signal, sys, time\n"
        "from headwise.studies.output.progress import Progress\n"
        "from headwise.studies.storage.unfinished import keeping\n"
        "with keeping(sys.argv[1], True), Progress('measuring', False):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(60)\n"
        "        os._exit(1)\n"
        "    time.sleep(0.2)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = run(program, tmp_path / "a.nc")
    assert (done.returncode, done.stdout.strip()) == (0, str(-signal.SIGTERM)), done.stderr[-2000:]


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
