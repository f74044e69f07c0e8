"""measure: a task, interventions and metrics in; a labelled dataset out. Where a sweep begins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import xarray as xr

from ...errors import DeclarationError
from ...interventions.base.hashing import short_hash
from ...interventions.plan.plan import Plan
from ...metrics.outputs import loss
from ..storage import unfinished
from ..storage.provenance import provenance
from ..tasks.prompts import rendered
from ..tasks.tasks import Task
from . import context
from .advice import warn
from .capture import Sites, request_of
from .context import check_executor, check_remote
from .executors import run_on
from .request import Metrics, Runs, What, check_estimable, set_up
from .sweep import CHECKED, SweepRun

if TYPE_CHECKING:
    from ...interventions.begin import Call
    from ...interventions.models.model import Model
    from ...interventions.run.outcome import Inputs


def measure(
    model: Model,
    task: Task,
    what: What = None,
    metrics: Metrics = (loss,),
    *,
    base: str = "clean",
    runs: Runs = None,
    per_position: bool = False,
    batch_size: int | str = "auto",
    estimator: str = "exact",
    steps: int = 8,
    controls: int = 0,
    seed: int = 0,
    check: bool = True,
    remote: bool | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    executor: Executor | None = None,
) -> xr.Dataset:
    """Measure what interventions do to a model on a task.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    task : Task
    what : Intervention, mapping of names to interventions, sequence of interventions, Grid, EdgePatches, or None
        None measures the model as it is, also as one condition of a mapping. A list gives the dim ``condition``, with
        the interventions as its labels; `EdgePatches` the dim ``edge``, with ``sender`` and ``receiver`` along it.
    metrics : Metric, str, or sequence of these
        A name such as ``"loss"`` stands for the metric of `headwise.metrics`.
    base : str
        The run that is intervened on.
    runs : str or sequence of str, optional
        Runs of the task that are measured as they are: ``"all"``, a name or several names. By default all, and without
        interventions the base run alone. The base run, and what an intervention takes from, always are.
    per_position : bool
        Keep the values of the logits metrics at each scored position (NaN elsewhere) instead of their mean.
    batch_size : int or "auto"
        Rows of one forward pass; ``"auto"`` takes as many as fit the memory, and a pass that runs out of it is done
        again in halves. No number changes by more than rounding.
    estimator : {"exact", "gradient", "integrated"}
        ``"gradient"`` and ``"integrated"`` estimate every condition from a few passes, see
        `headwise.compare_estimates`: ``base + (new - old) * slope``. The runs as they are stay exact. The integrated
        estimate moves the edits of one kind, layer and component together, as all heads of a layer.
    steps : int
        Steps of the integrated estimate.
    controls : int
        Where each condition changes whole heads (their ``z``) in one way: do that to so many random sets of as many
        other heads too, in the same layers and over all layers; all distinct sets where there are fewer.
    seed : int
        Of the random sets.
    check : bool
        Before the first sweep on a model, see on one short prompt that planned passes give what its own forward pass
        gives.
    remote : bool, optional
        A model runs where `headwise.load` opened it: here, or on NDIF with ``load(name, remote=True)``. True and False
        make sure of it. Of a server, metrics come back and no activations; jobs are sent without waiting, and with
        `out` they are written down beside the finished passes, so that the same call finds them after anything.
    progress : callable or bool, optional
        Called with passes done and in all; True and False force a bar on or off; by default a bar is shown in a
        terminal once the work has taken two seconds.
    out : path, optional
        NetCDF file to write. Until it is whole, each finished pass is kept beside it in a folder ``NAME.nc.parts``; the
        same call again, after the work was stopped or killed, computes only what is missing there, and what is whole
        already is read and not computed. A file that holds something else is replaced once the new result is whole.
    resume : bool
        False takes nothing from what is there.
    executor : concurrent.futures.Executor, optional
        Runs the passes on its workers: a pool of processes, a Dask cluster (``client.get_executor()``). Each opens the
        model itself, from where it was loaded. A worker that dies costs the piece that it was at, and so does one that
        fails: the others are done, and kept with `out`, before that is told. Not for estimates, which stay here.

    Returns
    -------
    Dataset
        One variable for each metric, with the dims of `what` (none, ``condition``, ``edge``, or the axes of the grid),
        then ``example`` (and ``position``; for attention metrics ``read_layer``, ``read_head``: the head that was
        looked at), and ``baseline_<metric>`` with ``run``, the runs without intervention. Effects are derived: see
        `headwise.effect`. Where `what` is None, a metric is that of the base run, and of attention ``(layer, head,
        example)``. With `controls`: ``<metric>_control`` of the random sets ``(..., control, draw, example)``, NaN
        beyond those that exist; their heads as text, ``control_heads``; and ``p_<metric>(..., control)``, ``(1 + sets
        that do at least as much damage) / (1 + sets)`` by means over examples.

    Raises
    ------
    DeclarationError, UnknownNameError
        Something that was asked for does not exist or cannot be; raised before any forward pass, but for a metric
        whose own kernel gives values of the wrong shape.
    ModelError
        A self-check failed, a single prompt needs more memory than there is, or pieces were lost or failed on workers.
    ResultError
        `out` cannot be written, or another process is writing it; what was finished is kept.
    ServerError
        The server of a remote model cannot be reached, or refuses; the text says what to do.

    Warns
    -----
    AdviceWarning
        Patching is measured by `prob` without `logit_diff`; or zero ablation has `controls` beside it, and neither mean
        nor resample ablation. The attribute ``advice`` of the result says it too, of zero ablation always.

    Examples
    --------
    The loss without each head, on each of four prompts:

    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> heads = hw.Grid(lambda layer, head: hw.ZeroAblate(hw.Head(layer, head)), layer=model.layers, head=model.heads)
    >>> ds = hw.measure(model, task, heads, [hw.metrics.loss])
    >>> dict(ds["loss"].sizes), ds["loss"].attrs["units"]
    ({'layer': 2, 'head': 8, 'example': 4}, 'nat')

    Interventions by name, on the run ``corrupted``:

    >>> what = {"k": hw.Patch(hw.Head(1, 2).k, source="clean"), "v": hw.Patch(hw.Head(1, 2).v, source="clean")}
    >>> ds = hw.measure(model, task, what, [hw.metrics.logit_diff], base="corrupted")
    >>> ds["condition"].values.tolist()
    ['k', 'v']
    """
    from ...interventions.begin import begin

    shown = progress is None or progress is True
    task = rendered(task, model)
    with context.using(quiet=context.current().quiet or not shown) as execution:
        setup = set_up(
            model,
            task,
            what,
            metrics,
            base=base,
            runs=runs,
            per_position=per_position,
            batch_size=batch_size,
            controls=controls,
            seed=seed,
        )
        if setup.controls and estimator != "exact":
            raise DeclarationError(f"controls={controls}: they are measured exactly: leave estimator out")
        check_remote(model, remote)
        check_estimable(setup.metrics, estimator, steps, per_position, what)
        check_executor(model, executor, estimator)
        sweep = SweepRun(model, task, what, setup, base, per_position, estimator, steps, check)
        sweep.check_request()
        warn(sweep.advice, claimed=controls > 0)
        executor, quiet = executor or execution.executor_for(model), execution.quiet

        def spread(call: Call) -> Callable[..., None] | None:
            return None if executor is None else partial(run_on, executor, sweep, call.identity)

        if out is None:
            store = execution.store  # of a study that this measurement is a part of
            with begin(model, check=False, anew=store is not None, ledger=store, quiet=quiet) as call:
                return sweep.run(progress, call, sweep.pass_store(store, call), spread(call))
        with (
            unfinished.keeping(out, resume) as kept,
            context.using(store=kept),
            begin(model, check=False, anew=True, ledger=kept, quiet=quiet) as call,
        ):
            kept.describe(provenance(model, call.identity) | sweep.attrs, call.identity)
            passes = sweep.pass_store(kept, call)
            inputs = short_hash(passes.inputs, json.dumps(sweep.attrs), str(per_position))
            if (there := kept.finished(inputs, call.identity)) is not None:
                if check and there.attrs.get(CHECKED) != "passed":
                    sweep.check_model(call)
                return there.to_dataset()
            dataset = sweep.run(progress, call, passes, spread(call)).assign_attrs(inputs=inputs)
            kept.finish(dataset)
            return dataset


def plan(
    model: Model,
    task: Task,
    what: What = None,
    metrics: Metrics = (loss,),
    *,
    base: str = "clean",
    runs: Runs = None,
    batch_size: int | str = "auto",
    controls: int = 0,
    seed: int = 0,
    timed: bool = True,
    capture: Sites | None = None,
) -> Plan:
    """What `measure`, or `capture`, would do, without doing it: ``print(plan(...))`` explains the cost.

    Parameters
    ----------
    model, task, what, metrics, base, runs, batch_size, controls, seed
        As for `measure`.
    timed : bool
        Run a few plain forward passes to estimate the time; not where the model is on a server.
    capture : Site, Logits, str, or sequence of these, optional
        The sites that `capture` would read in the run `base`; then no metrics are measured.

    Returns
    -------
    Plan
        ``print`` explains it; ``plan.cost()`` gives the figures.

    Raises
    ------
    DeclarationError, UnknownNameError
        Something that was asked for does not exist or cannot be.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> heads = hw.Grid(lambda layer, head: hw.ZeroAblate(hw.Head(layer, head)), layer=model.layers, head=model.heads)
    >>> print(hw.plan(model, task, heads, timed=False))  # doctest: +ELLIPSIS
    words-2l: 16 conditions on 4 prompts of the clean run
    runs            2  as they are: clean and corrupted
    passes          1  at most 64 rows of 15 positions together
    ...

    How large what is captured is:

    >>> hw.plan(model, task, heads, timed=False, capture=["L1H2.pattern", "logits at -1"]).cost().result
    284928
    """
    inputs: Callable[[], Inputs]
    if capture is not None:
        if metrics != (loss,) or runs is not None or controls:
            raise DeclarationError("capture=...: it reads sites, of one run: leave metrics, runs and controls out")
        asked = request_of(model, task, capture, what, base, batch_size)
        planned, inputs = asked.plan, asked.inputs
    else:
        setup = set_up(
            model,
            task,
            what,
            metrics,
            base=base,
            runs=runs,
            per_position=False,
            batch_size=batch_size,
            controls=controls,
            seed=seed,
        )
        setup.readers()  # refuses metrics that the task cannot have, as `measure` does
        sweep = SweepRun(model, task, what, setup, base, per_position=False, estimator="exact", steps=0, check=False)
        planned, inputs = replace(setup.plan, advice=tuple(sweep.advice)), partial(setup.inputs, task, model)
    if not timed or model.backend.module is None:  # the speed of a server is not known
        return planned
    from ...interventions.begin import turn

    with turn(model):
        return replace(planned, speed=model.backend.speed(planned, inputs()))
