"""Calls in threads, and small models for them."""

import threading
from concurrent.futures import Future

import xarray as xr

from headwise.interventions import Grid, Head, MeanAblate, Patch, ZeroAblate
from headwise.metrics import induction, loss
from headwise.studies import (
    RepeatedTokens,
    capture,
    compare_estimates,
    composition_scores,
    measure,
)
from tests.oracles import raw_hooks

TASK = RepeatedTokens(n=2, length=5)
LONG = 120.0
"""Seconds after which what still waits is taken to wait for ever."""
CALLS = {
    "measure": lambda model: measure(model, TASK, ZeroAblate(Head(1, 1)), [loss, induction]),
    "sweep": lambda model: measure(model, TASK, Grid(lambda head: Patch(Head(0, head)), head=range(2)), batch_size=1),
    "capture": lambda model: capture(model, TASK, [Head(1, 0).pattern, Head(0, 1).head_out]),
    "gradient": lambda model: measure(model, TASK, {"one": MeanAblate(Head(0, 1))}, estimator="gradient"),
    "estimates": lambda model: compare_estimates(model, TASK, {"one": Patch(Head(0, 1))}, loss),
    "composition": lambda model: composition_scores(model, draws=3),
    "weights": lambda model: xr.Dataset({"W_Q": (("a", "b", "c"), model.head_weights(1).W_Q.detach().numpy())}),
}


def small(seed=3):
    return raw_hooks.random_gpt2(2, 4, 8, 60, 40, seed=seed)


def at_once(*jobs):
    """What jobs give that begin at the same moment, each in a thread of its own; an error of one is raised."""
    start, futures = threading.Barrier(len(jobs)), [Future() for _ in jobs]

    def run(job, future):
        start.wait(LONG)
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    for job, future in zip(jobs, futures, strict=True):
        threading.Thread(target=run, args=(job, future), daemon=True).start()
    return [future.result(LONG) for future in futures]
