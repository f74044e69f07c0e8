"""Sweeps on some of a task's prompts, and on more of them until what is asked is settled."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...metrics.card import Metric
from ..tasks.tasks import RepeatedTokens
from . import context
from .executors import run_on
from .request import Request, What, set_up
from .sweep import SweepRun

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Span = tuple[int, int]
"""First prompt, and the one after the last."""


def request_some(
    model: Model, task: RepeatedTokens, what: What, metrics: Sequence[Metric], span: Span, base: str = "clean"
) -> Request:
    """Plan a sweep on the prompts `span` of a task.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    what : Intervention, mapping of str to Intervention, Grid, or None
    metrics : sequence of Metric
    span : (start, stop)
    base : str
        The run that is intervened on.

    Returns
    -------
    Request
        Of all prompts of the task, with passes for those of `span`. Each prompt keeps its number, by which resampling
        finds its partner.

    Raises
    ------
    DeclarationError, UnknownNameError
        As `measure`.
    """
    plan = partial(set_up, model, what=what, metrics=metrics, base=base, per_position=False, batch_size="auto")
    whole = plan(task=task)
    start, stop = span
    if (start, stop) == (0, task.n):
        return whole
    chunks = plan(task=replace(task, n=stop - start)).plan.chunks
    moved = tuple(replace(one, examples=(one.examples[0] + start, one.examples[1] + start)) for one in chunks)
    return replace(whole, plan=replace(whole.plan, chunks=moved))


def measure_some(
    model: Model,
    task: RepeatedTokens,
    what: What,
    metrics: Sequence[Metric],
    span: Span,
    *,
    base: str = "clean",
    estimator: str = "exact",
    steps: int = 8,
) -> xr.Dataset:
    """Measure the prompts `span` of a task, as `measure` measures them all.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    what : Intervention, mapping of str to Intervention, Grid, or None
    metrics : sequence of Metric
    span : (start, stop)
    base, estimator, steps
        As for `measure`.

    Returns
    -------
    Dataset
        As of `measure`, with these prompts along ``example``; the attribute ``task`` is that of all.

    Raises
    ------
    DeclarationError, UnknownNameError, ModelError, ServerError
        As `measure`.
    """
    from ...interventions.begin import begin

    execution = context.current()
    request = request_some(model, task, what, metrics, span, base)
    sweep = SweepRun(model, task, what, request, base, False, estimator, steps, True)
    sweep.check_request()
    store, executor = execution.store, execution.executor_for(model) if estimator == "exact" else None
    with begin(model, check=False, anew=store is not None, ledger=store, quiet=execution.quiet) as call:
        spread = None if executor is None else partial(run_on, executor, sweep, call.identity)
        measured = sweep.run(None, call, sweep.pass_store(store, call), spread)
    return measured.isel(example=slice(*span))


def until_settled(
    counts: Sequence[int],
    measure: Callable[[Span], dict[str, xr.Dataset]],
    is_settled: Callable[[dict[str, xr.Dataset]], bool],
) -> dict[str, xr.Dataset]:
    """Measure ``counts[0]`` prompts, then the further ones up to each next count, until the answer is settled.

    Parameters
    ----------
    counts : sequence of int
        Of `intervals.looks`.
    measure : callable
        Gets (start, stop) of prompts that were not measured yet; gives datasets by name.
    is_settled : callable
        Gets these of all prompts so far; not asked where there is one count.

    Returns
    -------
    dict of str to Dataset
        Of all prompts that were measured. Where there are several counts, the attributes ``looks`` (the counts, as
        JSON) and ``settled`` (1 where the last look settled it, else 0) say so.
    """
    parts: dict[str, list[xr.Dataset]] = {}
    for span in pairwise((0, *counts)):
        for name, part in measure(span).items():
            parts.setdefault(name, []).append(part)
        found = {name: joined(some) for name, some in parts.items()}
        if len(counts) == 1:
            return found
        if (done := is_settled(found)) or span[1] == counts[-1]:
            break
    told = {"looks": json.dumps(list(counts)), "settled": int(done)}
    return {name: one.assign_attrs(told) for name, one in found.items()}


def looks_of(ds: xr.Dataset) -> list[int]:
    """The numbers of prompts at which a result was to be looked at; empty where all were measured at once."""
    found: list[int] = json.loads(ds.attrs.get("looks", "[]"))
    return found


def joined(parts: list[xr.Dataset], along: str = "example") -> xr.Dataset:
    """Parts as one, and the seconds that they took together."""
    if len(parts) == 1:
        return parts[0]
    how: dict[str, Any] = {"data_vars": "minimal", "coords": "minimal", "compat": "override", "join": "exact"}
    whole = xr.concat(parts, along, combine_attrs="override", **how)
    return whole.assign_attrs(seconds=f"{sum(float(one.attrs['seconds']) for one in parts):.3f}")
