"""Pieces of a plan for any `concurrent.futures.Executor`: what travels, what a worker does with it, what comes back.

What travels is declarations and numbers: where the model is opened from, the task and the interventions as JSON, the
metrics, and which passes to run. A worker opens the model once, checks that it has the same weights, and gives values.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import DeclarationError, HeadwiseError, ModelError
from ..interventions.codec import decode, encode
from ..interventions.packing import Chunk
from ..metrics.card import Metric
from .setup import set_up
from .tables import TASKS, metric_names

if TYPE_CHECKING:
    from ..interventions.models import Model
    from ..interventions.outcome import Outcome, Piece
    from .work import Work

PIECES = 32
"""Into about so many pieces a plan is cut."""
LEAST = 4
"""Passes of a piece at least: each piece reads the runs it starts from again."""
_CURRENT: ContextVar[Executor | None] = ContextVar("executor", default=None)
_ONE_AT_A_TIME = Lock()
"""Tracing is not made for threads; an executor of threads gets right numbers, one piece after the other."""


@contextmanager
def using(executor: Executor | None) -> Iterator[None]:
    """Meanwhile, measurements run on the workers of `executor`, where their model can be opened there."""
    token = _CURRENT.set(executor)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current(model: Model) -> Executor | None:
    """The executor that is being used, for a model that its workers can open."""
    return None if model.source is None else _CURRENT.get()


def check_executor(model: Model, executor: Executor | None) -> None:
    """Refuse an executor for a model that its workers cannot open, or that is elsewhere already."""
    if executor is None:
        return
    if model.remote:
        raise DeclarationError(f"executor=...: {model.name} runs on a server, which shares out its passes itself")
    if model.source is None:
        raise DeclarationError(
            f"{model.name} is a module in memory, which workers cannot open: save it in a folder, with its tokenizer, "
            "and load that"
        )


@dataclass(frozen=True)
class Errand:
    """A piece of a plan as it travels.

    Attributes
    ----------
    model : tuple of (source, revision, device, dtype)
        For `headwise.load`.
    weight_hash : str
    declared : str
        Task and interventions as JSON.
    metrics : tuple
        Names of shipped metrics, and others themselves.
    base : str
    budget : int
        Bytes for all tensors, by which the passes were sized.
    chunks : tuple of Chunk
    """

    model: tuple[str, str | None, str, str]
    weight_hash: str
    declared: str
    metrics: tuple[str | Metric, ...]
    base: str
    budget: int
    chunks: tuple[Chunk, ...]


def run_on(
    executor: Executor, work: Work, outcome: Outcome, keep: Callable[[Piece], None], step: Callable[[int], None]
) -> None:
    """Run what `outcome` misses on the workers of `executor`.

    Parameters
    ----------
    executor : concurrent.futures.Executor
    work : Work
    outcome : Outcome
        Gets what comes back.
    keep : callable
        Gets each piece of it.
    step : callable
        Gets how many forward passes were done.

    Raises
    ------
    ModelError
        Some pieces were lost with their workers; the others came back and were kept.
    """
    errands = list(cut(work, outcome.missing()))
    waiting = {executor.submit(run_errand, errand): errand for errand in errands}
    done, lost = 0, []
    try:
        for future in as_completed(waiting):
            try:
                pieces = future.result()
            except (BrokenExecutor, CancelledError, OSError, RuntimeError) as error:
                if isinstance(error, HeadwiseError):
                    raise
                lost.append(error)
                continue
            for piece in pieces:
                keep(outcome.put(piece))
            done += outcome.steps(waiting[future].chunks)
            step(done)
    finally:
        _cancel(waiting)
    if lost:
        reason = str(lost[0]).strip().splitlines()[0] if str(lost[0]).strip() else type(lost[0]).__name__
        raise ModelError(
            f"{len(lost)} of {len(errands)} pieces were lost with their workers ({reason}); the others are done, and "
            "with out=... they are kept: the same call again, with workers that live, computes the rest"
        )


def cut(work: Work, chunks: Sequence[Chunk]) -> Iterator[Errand]:
    """What is left of a plan, in pieces for workers."""
    model, setup = work.model, work.setup
    assert model.source is not None
    known = model.revision not in ("local", "shipped")
    errand = Errand(
        (model.source, model.revision if known else None, str(model.device), model.dtype),
        model.weight_hash,
        json.dumps(encode({"task": work.task, "what": work.what}, TASKS)),
        tuple(_travelling(metric) for metric in setup.metrics),
        work.base,
        setup.plan.budget,
        (),
    )
    size = max(LEAST, math.ceil(sum(len(chunk.passes) for chunk in chunks) / PIECES))
    for chunk in chunks:
        for start in range(0, max(1, len(chunk.passes)), size):
            yield replace(errand, chunks=(replace(chunk, passes=chunk.passes[start : start + size]),))


def run_errand(errand: Errand) -> list[Piece]:
    """What a worker does: run a piece of a plan.

    Raises
    ------
    ModelError
        The model cannot be opened, or has other weights here.
    """
    from ..interventions.engine import run_chunks
    from ..interventions.outcome import Outcome

    with _ONE_AT_A_TIME:
        model = _opened(*errand.model)
        if model.weight_hash != errand.weight_hash:
            raise ModelError(f"{model.name} has other weights on a worker ({model.weight_hash}) than here")
        shipped = metric_names()
        declared = decode(json.loads(errand.declared), TASKS)
        metrics = [shipped[one][1] if isinstance(one, str) else one for one in errand.metrics]
        setup = set_up(
            model, declared["task"], declared["what"], metrics, base=errand.base, per_position=False, batch_size="auto"
        )
        plan = replace(setup.plan, chunks=errand.chunks, budget=errand.budget)
        pieces: list[Piece] = []
        run_chunks(
            model,
            plan.chunks,
            setup.readers(),
            setup.inputs(declared["task"], model),
            Outcome(plan),
            pieces.append,
            _quiet,
        )
    return pieces


@lru_cache(maxsize=1)
def _opened(source: str, revision: str | None, device: str, dtype: str) -> Model:
    from ..interventions.models import load

    return load(source, revision=revision, device=device, dtype=dtype)


def _travelling(metric: Metric) -> str | Metric:
    """A metric as it travels: shipped ones by name, others whole if they can be pickled."""
    if metric_names().get(metric.name, ("", None))[1] is metric:
        return metric.name
    try:
        pickle.dumps(metric)
    except Exception as error:
        raise DeclarationError(
            f"the metric {metric.name} cannot travel to workers ({error}): its kernel and prepare must be functions of "
            "a module that workers can import, not lambdas"
        ) from None
    return metric


def _cancel(waiting: dict[Future[Any], Errand]) -> None:
    for future in waiting:
        future.cancel()


def _quiet(count: int) -> None:
    """Workers say nothing."""
