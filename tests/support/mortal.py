"""Workers that are killed, and kernels that fail: in a module of their own, which workers can import."""

import os
import signal
from pathlib import Path

from headwise.metrics import Card, Metric
from headwise.studies.measuring.executors import run_item

FOLDER = "HEADWISE_TEST_FOLDER"
"""Where workers write down which passes they begin, a file for each worker, and which of them was killed."""


def passes_of(item):
    """A line that tells a piece from all others of its plan."""
    return repr([(chunk.group, chunk.examples, [one.conditions for one in chunk.passes]) for chunk in item.chunks])


def die_at_the_third(item):
    """A piece; the first worker that begins its third one is killed with that in hand."""
    begun = Path(os.environ[FOLDER]) / f"{os.getpid()}.begun"
    with begun.open("a") as file:
        file.write(passes_of(item) + "\n")
    if len(begun.read_text().splitlines()) == 3:
        try:
            with (begun.parent / "killed").open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return run_item(item)
        os.kill(os.getpid(), signal.SIGKILL)
    return run_item(item)


def wrong_shapes(logits, targets):
    return logits @ targets.float()


def wrong_key(logits, targets):
    return {}["answer"]


def prepare(facts):
    return {"targets": facts.targets}


def metric(kernel):
    """A metric whose kernel is one of these."""
    return Metric(Card("mine", "", "1", (0, 1)), "logits", kernel, prepare)
