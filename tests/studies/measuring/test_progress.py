"""Progress: silent for quick work, a bar with rate and time left for the rest; Ctrl-C ends a measurement cleanly."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure
from headwise.studies.output import progress
from headwise.studies.output.progress import Progress, Stopped


@pytest.fixture(autouse=True)
def _ctrl_c():
    """Python's own handler, which is not there where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_nothing_is_shown_for_quick_work(capsys):
    with Progress("measuring", None) as bar:
        bar.update(1, 2)
        assert bar.bar is None
    assert capsys.readouterr().err == ""


def test_the_bar_says_rate_and_time_left(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with Progress("measuring", True) as bar:
        clock[0] += 2.0
        bar.update(4, 10)
        time.sleep(0.01)
        bar.update(5, 10)
        (task,) = bar.bar.tasks
        assert task.completed == 5
        page = Console(file=io.StringIO(), width=100)
        page.print(bar.bar.get_renderable())
    assert re.search(r"measuring .* 5/10 2\.5 passes/s .*left", page.file.getvalue())


def test_ctrl_c_is_taken_at_the_end_of_a_pass(small_model):
    """The handler is ours while it lasts, the pass that runs is finished, and the next measurement is as ever."""
    task = RepeatedTokens(n=2, length=6)
    grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(4))
    wanted = measure(small_model, task, grid, [loss], batch_size=2)["loss"]
    seen = []

    def interrupt(done, total):
        seen.append(done)
        if done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped) as caught:
        measure(small_model, task, grid, [loss], batch_size=2, progress=interrupt)
    assert str(caught.value).startswith(f"stopped after {seen[-1]} of 10 passes")
    assert seen[-1] in (4, 5)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    np.testing.assert_array_equal(measure(small_model, task, grid, [loss], batch_size=2)["loss"], wanted)


def test_a_wish_to_stop_in_the_last_pass_is_not_lost():
    bar = Progress("measuring", False)
    bar.__enter__()
    bar.update(1, 1)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped, match="after the last"):
        bar.__exit__(None, None, None)


def test_a_second_ctrl_c_interrupts_at_once():
    with Progress("measuring", False) as bar:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert not isinstance(caught.value, Stopped)
        bar.asked = False


def test_another_handler_is_left_alone():
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        with Progress("measuring", False):
            os.kill(os.getpid(), signal.SIGINT)
        assert calls == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_said_of_jobs_stands_beside_how_many_passes_there_will_be():
    with Progress("measuring", True, total=12) as bar:
        bar.say("1 running, 2 queued")
        page = Console(file=io.StringIO(), width=100)
        page.print(bar.bar.get_renderable())
    assert re.search(r"measuring \(1 running, 2 queued\) .* 0/12 .*-:--:-- left", page.file.getvalue())


def test_the_command_stops_with_one_line(tmp_path):
    """A real process, a real signal: status 130, a sentence, no traceback; what was finished is kept, and named."""
    out = tmp_path / "run.nc"
    command = [sys.executable, "-m", "headwise", "induction", "--n", "4", "--length", "8", "--out", str(out)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in running.stderr:
        lines.append(line)
        if line.startswith("4/"):
            running.send_signal(signal.SIGINT)
            break
    rest = running.communicate(timeout=120)[1]
    assert running.returncode == 130, [*lines, rest]
    last = rest.strip().splitlines()[-1]
    assert last.startswith("headwise: stopped")
    assert last.endswith("no file was left half-written")
    assert "Traceback" not in rest
    kept = tmp_path / "run.nc.parts"
    assert list(tmp_path.iterdir()) == [kept]
    assert str(kept) in last
    assert len(list(kept.glob("*.nc"))) > 3
    assert not [path.name for path in kept.iterdir() if path.suffix not in (".nc", ".json")]
