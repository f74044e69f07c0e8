"""A process that measures on a server, to be killed: ``python remote_client.py OUT KIND``; OUT may be empty.

Where the server is, and the key, are in the environment, as nnsight wants them.
"""

import sys

import headwise as hw
from headwise.interventions import Grid, Head, Patch, ZeroAblate
from headwise.interventions.remote import patience, run
from headwise.metrics import loss
from headwise.studies import InductionStudy, RepeatedTokens, measure

TASK = RepeatedTokens(n=4, length=6)


def sweep(model, out):
    """A sweep in five jobs, and one for what the model is."""
    kinds = {"zero": ZeroAblate, "patch": Patch}
    grid = Grid(
        lambda kind, layer, head: kinds[kind](Head(layer, head)), kind=list(kinds), layer=range(2), head=range(8)
    )
    return measure(model, TASK, grid, [loss], batch_size=8, check=False, out=out)


def in_small_jobs():
    """Few rows in a job, so that there are several; short pauses."""
    run.ROWS, patience.PAUSES, patience.LOST = 32, (0.02, 0.1), 5.0


def study(model, out):
    """The whole analysis, small."""
    return InductionStudy(n=4, length=6, draws=2).run(model, out=out)


if __name__ == "__main__":
    in_small_jobs()
    {"sweep": sweep, "study": study}[sys.argv[2]](hw.load("words-2l", remote=True), sys.argv[1] or None)
