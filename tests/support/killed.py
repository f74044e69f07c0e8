"""A process that is killed: forks children that measure, kills each at a random moment, then lets one come to its end.

Run as ``python killed.py FOLDER KIND KILLS``; prints what was seen as JSON. A process of its own, since it forks before
torch has done any work.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import headwise as hw
from headwise.interventions import Grid, Head, MeanAblate, Patch
from headwise.interventions.run import engine
from headwise.metrics import loss
from headwise.studies import InductionStudy, RepeatedTokens, measure
from headwise.studies.storage import pass_store
from tests.oracles import raw_hooks

TASK = RepeatedTokens(n=4, length=6)


def sweep(out):
    """A sweep of 32 passes and more."""
    torch.set_num_threads(1)
    model = hw.load(raw_hooks.random_gpt2(2, 4, 8, 60, 40, seed=3))
    kinds = {"patch": Patch, "mean": MeanAblate}
    grid = Grid(
        lambda kind, layer, head: kinds[kind](Head(layer, head)), kind=list(kinds), layer=range(2), head=range(4)
    )
    measure(model, TASK, grid, [loss], per_position=True, batch_size=2, out=out)


def study(out):
    """The whole analysis, small."""
    torch.set_num_threads(1)
    InductionStudy(n=4, length=6, draws=4).run(hw.load("words-2l"), out=out)


def logged(out, work):
    """Do the work in a child; each pass that is kept, and each that is computed, is a line of a log."""
    log = os.open(out.with_suffix(".log"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    keep, run_part = pass_store.PassStore.keep, engine.run_part

    def kept(self, piece):
        before = set(self.parts.folder.glob("*.nc"))
        keep(self, piece)
        for path in set(self.parts.folder.glob("*.nc")) - before:
            os.write(log, f"kept {path.name}\n".encode())

    def computed(model, plan, chunk, part, known):
        os.write(log, b"computed\n")
        return run_part(model, plan, chunk, part, known)

    pass_store.PassStore.keep, engine.run_part = kept, computed
    work(out)


def child(out, work):
    """A process that does the work; its number."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            logged(out, work)
            status = 0
        finally:
            os._exit(status)
    return number


def main(folder, kind, kills):
    work = {"sweep": sweep, "study": study}[kind]
    started = time.monotonic()
    whole = folder / "whole.nc"
    _, status = os.waitpid(child(whole, work), 0)
    seconds = time.monotonic() - started
    moments = random.Random(0)
    out, killed, finished = folder / "killed.nc", 0, 0
    while killed < kills:
        number = child(out, work)
        time.sleep(moments.uniform(0.05, 0.9) * seconds)
        os.kill(number, signal.SIGKILL)
        _, ended = os.waitpid(number, 0)
        killed += os.WIFSIGNALED(ended)
        if out.is_file() and not os.WIFSIGNALED(ended):  # it was faster than the kill: begin anew
            finished += 1
            out = folder / f"killed-{finished}.nc"
    _, last = os.waitpid(child(out, work), 0)
    names = [path.name for path in folder.glob("killed*.nc*")]
    print(json.dumps({"status": [status, last], "out": out.name, "killed": killed, "names": names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
