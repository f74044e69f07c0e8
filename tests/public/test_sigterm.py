"""SIGTERM ends a call at the end of a pass; what is finished is kept and named."""

import os
import signal
import subprocess
import sys

import pytest

from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure
from tests.support.programs import DEADLINE, run

MEASURE = """
import os, signal, sys
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
measure(model, RepeatedTokens(n=2, length=6), grid, [loss], batch_size=2, progress=update, out=out)
"""


def test_sigterm_ends_at_the_end_of_a_pass_and_says_where_finished_work_is_kept(tmp_path, words_model):
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
    grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))
    steps = []
    measure(
        words_model,
        RepeatedTokens(n=2, length=6),
        grid,
        [loss],
        batch_size=2,
        progress=lambda *at: steps.append(at),
        out=out,
    )
    assert 0 < len(steps) < 18, "what was finished is not done again"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.heavy  # of the command that Ctrl-C stops, and of a call that SIGTERM ends, see above and test_progress
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
            runs="all",
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
