"""Progress: silent for quick work, a bar with rate and time left for the rest; Ctrl-C ends a measurement cleanly."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure
from headwise.studies.measuring import context
from headwise.studies.measuring.context import stages
from headwise.studies.output import notebook, progress
from headwise.studies.output.progress import Progress, Stopped


class Cell:
    """What IPython gives in a notebook; keeps what lines below the cell said."""

    def __init__(self, monkeypatch):
        self.lines, self.execution_count = [], 1
        self.display_formatter = SimpleNamespace(active_types=["text/plain", "text/html"])
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: self))
        monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=self.display))

    def display(self, data, raw, display_id):
        assert raw
        assert display_id
        said = [data["text/plain"]]
        self.lines.append(said)
        return SimpleNamespace(update=lambda data, raw: said.append(data["text/plain"]))


@pytest.fixture
def cell(monkeypatch):
    return Cell(monkeypatch)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    for module in (progress, notebook, context):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_cell_has_one_line_that_changes(cell, clock, capsys):
    with Progress("measuring", None) as bar:
        bar.update(1, 40)
        assert cell.lines == []
        clock[0] += 10
        bar.update(10, 40)
        clock[0] += 0.1
        bar.update(11, 40)  # too soon to be shown
        clock[0] += 9.9
        bar.update(20, 40)
    with Progress("reading", True, unit="files") as bar:
        clock[0] += 70
        bar.update(1, 2)
    cell.execution_count = 2
    with Progress("measuring", True) as bar:
        bar.update(0, 2)
    done, left = "█", "░"
    assert cell.lines == [
        [
            f"measuring  {done * 6}{left * 18}  10/40  1 passes/s  30 s left",
            f"measuring  {done * 12}{left * 12}  20/40  1 passes/s  20 s left",
            "measuring: 40 passes in 20 s",
            f"reading  {done * 12}{left * 12}  1/2  0.0143 files/s  1.2 min left",
            "reading: 2 files in 1.2 min",
        ],
        [f"measuring  {left * 24}  0/2", "measuring: 2 passes in 0.0 s"],
    ]
    assert capsys.readouterr() == ("", "")


def test_a_cell_that_is_stopped_says_how_far_it_came(cell):
    with suppress(ValueError), Progress("measuring", True) as bar:
        bar.update(3, 8)
        raise ValueError
    assert cell.lines[0][-1].startswith("measuring: stopped after 3 of 8 passes in ")


def test_in_a_cell_false_shows_nothing_and_jobs_elsewhere_are_told_of(cell):
    with Progress("measuring", False) as bar:
        bar.update(1, 2)
    assert cell.lines == []
    with Progress("measuring", True, total=12) as bar:
        bar.say("1 running, 2 queued")
    assert cell.lines[0][0] == f"measuring (1 running, 2 queued)  {'░' * 24}  0/12"


STAGES = {"one": "the first", "two": "the second"}


def test_a_cell_says_which_stage_of_long_work_runs(cell, clock):
    with stages(STAGES, None) as begin:
        begin("one")
        clock[0] += 3
        begin("two")
        with Progress("measuring", None, stage=context.current().stage) as bar:
            clock[0] += 3
            bar.update(1, 4)
    assert cell.lines == [
        [
            "1/2 the first",
            "2/2 the second",
            f"2/2 the second  measuring  {'█' * 6}{'░' * 18}  1/4  0.333 passes/s  9.0 s left",
            "2/2 the second  measuring: 4 passes in 3.0 s",
            "2 stages in 6.0 s",
        ]
    ]


def test_stages_of_a_script_are_told_where_they_are_asked_for(capsys, monkeypatch):
    told = []
    for show in (None, False, True, told.append):
        with stages(STAGES, show) as begin:
            begin("two")
    assert capsys.readouterr() == ("", "2/2 the second\n")
    assert told == ["two"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with stages(STAGES, False):
        assert not Progress("measuring", stage=context.current().stage).wanted
    assert Progress("measuring", stage=context.current().stage).wanted


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


def test_where_there_is_no_terminal_a_line_tells_now_and_then(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with Progress("every head ablated", None) as bar:
        for done in range(5):
            bar.update(done, 8)
            clock[0] += 20.0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "every head ablated: 25% (2 of 8 passes), about 2.0 min left",
        "every head ablated: 50% (4 of 8 passes), about 1.3 min left",
    ]


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


@pytest.mark.heavy
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
