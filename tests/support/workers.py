"""An executor that runs work at once and fails where it is told to, and a sweep for it."""

import pickle
from concurrent.futures import BrokenExecutor, Executor, Future

from headwise.interventions import Grid, Head, MeanAblate, Patch, ResampleAblate
from headwise.metrics import logit_diff, loss
from headwise.studies import RepeatedTokens, measure

TASK = RepeatedTokens(n=4, length=6)
KINDS = {"patch": Patch, "mean": MeanAblate, "resample": ResampleAblate}
GRID = Grid(lambda kind, layer, head: KINDS[kind](Head(layer, head)), kind=list(KINDS), layer=range(2), head=range(4))


class Here(Executor):
    """Runs each piece at once, as a worker would that has everything: arguments and values travel as bytes."""

    def __init__(self, fails=(), error=None, stops=None):
        """`error` comes of the pieces of these numbers; from the piece `stops` on, none is taken."""
        self.fails, self.stops, self.items = set(fails), stops, []
        self.error = error or BrokenExecutor("the worker went away")

    def submit(self, function, item):
        future = Future()
        if len(self.items) + 1 == self.stops:
            raise self.error
        self.items.append(item)
        if len(self.items) in self.fails:
            future.set_exception(self.error)
            return future
        try:
            future.set_result(pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(item))))))
        except Exception as error:
            future.set_exception(error)
        return future


def sweep(model, executor, task=TASK, what=GRID, metrics=(loss, logit_diff), **options):
    options = {"batch_size": 4, "per_position": True} | options
    return measure(model, task, what, metrics, executor=executor, **options)
