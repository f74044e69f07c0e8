"""A sweep that can be stopped, and what it leaves."""

from headwise.interventions import Grid, Head, MeanAblate, Patch, ResampleAblate
from headwise.metrics import logit_diff, loss
from headwise.studies import InductionStudy, RepeatedTokens, measure

TASK = RepeatedTokens(n=4, length=6)


def grid():
    kinds = {"patch": Patch, "mean": MeanAblate, "resample": ResampleAblate}
    return Grid(
        lambda kind, layer, head: kinds[kind](Head(layer, head)), kind=list(kinds), layer=range(2), head=range(2)
    )


def sweep(model, out, task=TASK, what=None, metrics=(loss, logit_diff), **options):
    options = {"batch_size": 4, "per_position": True} | options
    return measure(model, task, grid() if what is None else what, metrics, out=out, **options)


class Halt(Exception):
    """Stands for whatever ends a process."""


def stop_after(count):
    """A progress callback that ends the work once so many steps are done in this call."""
    calls = []

    def update(done, total):
        calls.append(done)
        if len(calls) > count:
            raise Halt

    return update


def parts(out):
    return sorted(out.with_name(f"{out.name}.parts").glob("*.nc"))


STUDY = InductionStudy(n=4, length=6, draws=3)
