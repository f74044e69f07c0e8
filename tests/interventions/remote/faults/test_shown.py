"""How jobs are doing is told: to a log, in a line now and then, or in place at a terminal."""

import io
import sys

import pytest

import headwise as hw
from headwise.interventions.remote import status_line
from headwise.metrics import loss
from headwise.studies import measure
from headwise.studies.output.progress import Progress
from tests.support.remote_sweeps import JOBS, TASK, lines_said, swept


@pytest.mark.parametrize(("progress", "said"), [(None, True), (True, True), (False, False), (print, False)])
def test_where_there_is_no_terminal_a_line_is_said_now_and_then(server, monkeypatch, capfd, progress, said):
    monkeypatch.setattr(status_line, "QUIET_SECONDS", 0.2)
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    capfd.readouterr()
    server.fault("execute", "delay", seconds=1.5)
    measure(there, TASK, None, [loss], progress=progress, check=False)
    lines = [line for line in lines_said(capfd) if line.startswith(f"{server.host}: 1 running, after ")]
    assert bool(lines) == said
    assert len(lines) < 4


def test_how_jobs_are_doing_is_told(server, small_jobs, caplog, capfd):
    caplog.set_level("INFO", "headwise")
    server.fault("execute", "delay", times=1 + JOBS, seconds=0.4)
    swept()
    told = [record.getMessage() for record in caplog.records if record.name == "headwise.remote"]
    assert any("1 running" in line for line in told)
    assert any("queued" in line for line in told)
    with Progress("measuring", True) as bar:
        bar.say("2 queued, 1 running")
        assert bar.bar.tasks[0].description == "measuring (2 queued, 1 running)"
        bar.update(1, 4)
        bar.say("1 running")
        assert bar.bar.tasks[0].description == "measuring (1 running)"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_while(monkeypatch, act):
    """What a terminal shows meanwhile."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(status_line, "QUIET_SECONDS", 0.0)
        act()
    return terminal.getvalue()


def test_how_jobs_are_doing_is_shown_where_there_is_no_bar(server, monkeypatch):
    server.fault("execute", "delay", seconds=0.5)
    shown = shown_while(monkeypatch, lambda: hw.load("words-2l", remote=True).identity)
    assert f"\r{server.host}: 1 running" in shown
    assert shown.endswith(" \r"), "it is taken away"


@pytest.mark.parametrize("progress", [False, lambda done, total: None])
def test_nothing_is_shown_where_no_bar_is_wanted(server, monkeypatch, progress):
    there = hw.load("words-2l", remote=True)
    assert shown_while(monkeypatch, lambda: measure(there, TASK, None, [loss], progress=progress)) == ""
