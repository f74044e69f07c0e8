"""Pieces of a plan for any `concurrent.futures.Executor`: what travels, what a worker does with it, what comes back.

What travels is declarations and numbers: where the model is opened from, the task and the interventions as JSON, the
metrics, and which passes to run. A worker opens the model once, checks that it is the same one, and gives values.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DeclarationError, HeadwiseError, ModelError, first_line
from ...interventions.base.hashing import short_hash
from ...interventions.declare.codec import decode, encode
from ...interventions.plan.passes import ExampleChunk
from ...metrics.card import Metric
from ...metrics.outputs import ANSWERS
from ..storage.pass_store import prompts
from ..storage.registry import TASKS, known_metric, metric_of
from .request import set_up

if TYPE_CHECKING:
    from ...interventions.models.identity import Identity
    from ...interventions.models.model import Model
    from ...interventions.plan.plan import Plan
    from ...interventions.run.outcome import FinishedValues, Inputs, Outcome
    from .sweep import SweepRun

PIECES = 32
"""Into about so many pieces a plan is cut."""
LEAST = 4
"""Passes of a piece at least: each piece reads the runs it starts from again."""
LOST = {"KilledWorker", "NoWorkerError", "NoValidWorkerError", "CommClosedError", "ClosedClientError"}
"""What Dask raises where workers or the way to them are gone."""
_OPENING = Lock()
"""Where workers are threads of one process, one of them opens the model."""


@dataclass(frozen=True)
class WorkItem:
    """A piece of a plan as it travels.

    Attributes
    ----------
    model : tuple of (source, revision, step, device, dtype, trusted, attention)
        For `headwise.load`, with whether code of the model may run, and the implementation of attention.
    identity : Identity
        Of the model here, which a worker has to reproduce.
    token_hash : str
        Of the token ids of all prompts.
    declared : str
        Task and interventions as JSON.
    metrics : tuple
        Names of shipped metrics, and others themselves.
    base : str
    runs : tuple of str
        Those that are measured as they are.
    controls : tuple of int
        How many random sets, and their seed.
    budget : int
        Bytes for all tensors, by which the passes were sized.
    chunks : tuple of ExampleChunk
    """

    model: tuple[str, str | None, int | None, str, str, bool, str]
    identity: Identity
    token_hash: str
    declared: str
    metrics: tuple[str | Metric, ...]
    base: str
    runs: tuple[str, ...]
    controls: tuple[int, int]
    budget: int
    chunks: tuple[ExampleChunk, ...]

    @property
    def key(self) -> str:
        """A hash of all that its values depend on."""
        model = json.dumps([self.model, self.identity.exact], sort_keys=True)
        metrics = [metric if isinstance(metric, str) else metric.name for metric in self.metrics]
        return short_hash(
            model,
            self.token_hash,
            self.declared,
            json.dumps(metrics),
            self.base,
            *self.runs,
            repr((self.controls, self.chunks)),
        )


def run_on(
    executor: Executor,
    sweep: SweepRun,
    identity: Identity,
    outcome: Outcome,
    keep: Callable[[FinishedValues], None],
    step: Callable[[int], None],
) -> None:
    """Run what `outcome` misses on the workers of `executor`.

    Whatever befalls a piece, all others are waited for and kept; only then is it told.

    Parameters
    ----------
    executor : concurrent.futures.Executor
    sweep : SweepRun
    identity : Identity
        Of the model when the call began.
    outcome : Outcome
        Gets what comes back.
    keep : callable
        Gets each piece of it.
    step : callable
        Gets how many forward passes were done.

    Raises
    ------
    ModelError
        Some pieces were lost with their workers, or failed there.
    HeadwiseError
        What a worker refused, as it was raised there.
    """
    items = list(split(sweep, identity, outcome.missing()))
    wide = np.float64 if sweep.model.dtype == "float64" else np.float32
    for metric in sweep.setup.metrics:
        if isinstance(_travelling(metric), str):  # of a metric of one's own, the first piece says it
            outcome.dtypes.setdefault(metric.name, np.dtype(wide))
    waiting: dict[Future[list[FinishedValues]], WorkItem] = {}
    done, errors = 0, []
    try:
        not_sent = _send(executor, items, waiting)
        for future in as_completed(waiting):
            try:
                pieces = _answer(future.result(), waiting[future], outcome)
            except Exception as error:
                errors.append(error)
                continue
            for piece in pieces:
                keep(outcome.put(piece))
            done += outcome.steps(waiting[future].chunks)
            step(done)
    finally:
        for future in waiting:
            future.cancel()
    _tell(errors, not_sent, len(items))


def _answer(given: object, item: WorkItem, outcome: Outcome) -> list[FinishedValues]:
    """What a worker gave, if it is what it was asked for: each run of its chunks and all conditions, once."""
    runs = outcome.plan.runs
    due = [
        (chunk.group, chunk.examples, run, conditions)
        for chunk in item.chunks
        for run, conditions in [
            *((run, ()) for run in runs),
            (None, tuple(number for one in chunk.passes for number in one.conditions)),
        ]
        if run is not None or conditions
    ]
    pieces: list[Any] = given if isinstance(given, list) else []
    wrong = "" if isinstance(given, list) else f"a {type(given).__name__}, which is no list of pieces"
    wrong = wrong or next((told for piece in pieces if (told := outcome.wrong(piece))), "")
    if not wrong and any(one.answers != item.key for one in pieces):
        wrong = "the answer to another question"
    if not wrong and [(one.group, one.examples, one.run, one.conditions) for one in pieces] != due:
        wrong = f"{len(pieces)} pieces, which are not the {len(due)} that were due"
    if wrong:
        raise ModelError(
            f"a worker gave what it was not asked for: {wrong}. That is not taken, and with out=... what else came "
            "back is kept; does the executor give each piece its own answer?"
        )
    return pieces


def _send(
    executor: Executor, items: Sequence[WorkItem], waiting: dict[Future[list[FinishedValues]], WorkItem]
) -> list[Exception]:
    """Submit until one is not taken; what that raised, for each item that was not."""
    try:
        for item in items:
            future = executor.submit(run_item, item)
            if not isinstance(future, Future) or future in waiting:
                raise DeclarationError(
                    f"executor=...: its submit gives {type(future).__name__}, where a new Future is due for each piece"
                )
            waiting[future] = item
    except Exception as error:
        return [error] * (len(items) - len(waiting))
    return []


def _tell(errors: Sequence[Exception], not_sent: Sequence[Exception], total: int) -> None:
    """Raise what befell pieces: what headwise refused first, then what failed, then what was lost."""
    for error in (*errors, *not_sent):
        if isinstance(error, HeadwiseError):
            raise error
    failed = [error for error in errors if not _is_lost(error)]
    lost = [error for error in errors if _is_lost(error)] + list(not_sent)
    if failed:
        raise ModelError(
            f"a piece failed on a worker: {first_line(failed[0], kind=True)}; {len(failed)} of {total} pieces failed, "
            "and with out=... what came back is kept"
        ) from failed[0]
    if lost:
        raise ModelError(
            f"{len(lost)} of {total} pieces were lost with their workers ({first_line(lost[0], kind=True)}); with "
            "out=... what came back is kept: the same call again, with workers that live, computes the rest"
        ) from lost[0]


def _is_lost(error: Exception) -> bool:
    """Whether a worker went away, rather than failed at its piece; Dask's errors by name, as it may not be here."""
    dask = any(kind.__module__.startswith("distributed.") and kind.__name__ in LOST for kind in type(error).__mro__)
    return dask or isinstance(error, BrokenExecutor | CancelledError | ConnectionError)


def split(sweep: SweepRun, identity: Identity, chunks: Sequence[ExampleChunk]) -> Iterator[WorkItem]:
    """What is left of a plan, in pieces for workers."""
    model, setup = sweep.model, sweep.setup
    assert model.source is not None
    known = model.revision not in ("local", "shipped")
    item = WorkItem(
        (
            model.source,
            model.revision if known else None,
            None if known else model.step,
            "cuda" if model.device.type == "cuda" else str(model.device),  # that of the worker
            model.dtype,
            model.trusted,
            _attention(model),
        ),
        identity,
        _token_hash(setup.plan, sweep.inputs),
        json.dumps(encode({"task": sweep.task, "what": sweep.what}, TASKS)),
        tuple(_travelling(metric) for metric in setup.metrics),
        sweep.base,
        setup.plan.runs,
        (0, 0) if setup.controls is None else (setup.controls.draws, setup.controls.seed),
        setup.plan.budget,
        (),
    )
    size = max(LEAST, math.ceil(sum(len(chunk.passes) for chunk in chunks) / PIECES))
    for chunk in chunks:
        for start in range(0, max(1, len(chunk.passes)), size):
            yield replace(item, chunks=(replace(chunk, passes=chunk.passes[start : start + size]),))


def run_item(item: WorkItem) -> list[FinishedValues]:
    """What a worker does: run a piece of a plan.

    Raises
    ------
    ModelError
        The model cannot be opened, or is another one here, or its tokenizer gives other tokens.
    """
    from ...interventions.begin import check_reproduced, turn
    from ...interventions.run.engine import run_chunks
    from ...interventions.run.outcome import Outcome

    with _OPENING:
        model = _opened(*item.model)
    declared = decode(json.loads(item.declared), TASKS)
    metrics = [metric_of(one) if isinstance(one, str) else one for one in item.metrics]
    with turn(model):
        check_reproduced(model, item.identity)
        task, what = declared["task"], declared["what"]
        setup = set_up(
            model,
            task,
            what,
            metrics,
            base=item.base,
            runs=item.runs,
            per_position=False,
            batch_size="auto",
            controls=item.controls[0],
            seed=item.controls[1],
        )
        inputs = setup.inputs(task, model)
        if _token_hash(setup.plan, inputs) != item.token_hash:
            raise ModelError(
                f"{model.name} has other tokens for these prompts on a worker than here: workers read the "
                "tokenizer that lies beside the weights"
            )
        plan = replace(setup.plan, chunks=item.chunks, budget=item.budget)
        readers = setup.readers()
        outcome = Outcome(plan, readers)
        run_chunks(model, plan.chunks, readers, inputs, outcome, _quiet, _quiet)
    return [replace(piece, answers=item.key) for chunk in plan.chunks for piece in outcome.finished(chunk)]


@lru_cache(maxsize=1)
def _opened(
    source: str, revision: str | None, step: int | None, device: str, dtype: str, trusted: bool, attention: str
) -> Model:
    from ...interventions.load import load

    model = load(source, revision=revision, step=step, device=device, dtype=dtype, trust_remote_code=trusted)
    if _attention(model) != attention:
        model.module.set_attn_implementation(attention)
    return model


def _attention(model: Model) -> str:
    return str(model.module.config._attn_implementation)


def _token_hash(plan: Plan, inputs: Inputs) -> str:
    return short_hash(*(part for group in range(len(plan.groups)) for part in prompts(plan, inputs, group)))


def _travelling(metric: Metric) -> str | Metric:
    """A metric as it travels: shipped ones by name, others whole if they can be pickled."""
    known = known_metric(metric.name)
    if known is not None and (known[1] is metric or ANSWERS.get(metric.name) is metric):  # workers see the answers too
        return metric.name
    try:
        pickle.dumps(metric)
    except Exception as error:
        raise DeclarationError(
            f"the metric {metric.name} cannot travel to workers ({error}): its kernel and prepare must be functions of "
            "a module that workers can import, not lambdas"
        ) from None
    return metric


def _quiet(done: object) -> None:
    """Workers say nothing."""
