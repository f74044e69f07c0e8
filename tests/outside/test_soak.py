"""`make soak` passes where all is well, and finds what is put in to be found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="soak kills and interrupts processes as Unix does")


@pytest.fixture
def soak(tmp_path, monkeypatch):
    """Its status, what it says, and the last line of its table."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def run(*options):
        program = [
            sys.executable,
            Path(__file__).parents[1] / "soak" / "run.py",
            "--minutes",
            "4",
            *options,
            "--requests",
            "heads",
            "several",
        ]
        ended = subprocess.run([str(one) for one in program], capture_output=True, text=True, timeout=480)
        assert ended.stderr == ""
        head, *rows = ended.stdout[ended.stdout.index("\nseed ") :].splitlines()[2:]
        every = next(row for row in rows if row.startswith("all "))
        return ended.returncode, ended.stdout, dict(zip(head.split(), map(int, every.split()[1:]), strict=True))

    return run


@pytest.mark.heavy
def test_it_passes_where_all_is_well(soak, tmp_path):
    status, told, total = soak("--seed", 5, "--kinds", "kills", "full_disk", "--rounds", 3)
    assert (status, total["mismatches"], total["leaks"]) == (0, 0, 0), told
    assert total["rounds"] == 3 <= total["calls"]
    assert total["kills"] > 0 < total["faults"]
    assert told.endswith("nothing was wrong, lost or left\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
def test_what_is_wrong_lost_or_left_is_found(soak):
    plants = ["wrong", "part", "descriptor", "thread", "process"]
    status, told, total = soak("--seed", 3, "--kinds", "kills", "--rounds", 3, "--plant", *plants)
    assert status == 1
    for line in (
        "after kills: loss is off by",
        "what was finished is computed again, all",
        "kills: leak: descriptor /dev/null: 3, there were 2",
        "kills: leak: thread Thread-# (sleep): 2, there were 1",
        "kills: leak: process sleep: 2, there were 1",
        "the end: leak: threads at the end: ['Thread-",
        "the end: leak: processes that do not end: ['sleep', ",
        "run.py --seed 3 --rounds 1 --first 0 --kinds kills --requests heads several\n",
    ):
        assert line in told, f"{line!r} is not in:\n{told}"
    assert total["leaks"] >= 8
    assert total["mismatches"] >= 3


@pytest.mark.heavy
def test_a_process_that_breaks_down_or_hangs_is_told_of_and_the_rest_is_done(soak):
    status, told, total = soak("--kinds", "kills", "--rounds", 2, "--plant", "crash", "hang", "--limit", 5)
    assert (status, total["mismatches"], total["rounds"]) == (1, 2, 2), told
    assert "round 0, kills: crash: the process ended with -11\nFatal Python error: Segmentation fault" in told
    assert "round 1, kills: hang: the process ended with 1\nTimeout (0:00:05)!" in told
    assert "in planted" in told
