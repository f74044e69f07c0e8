"""One job, all contenders: same numbers first, then rounds that take turns; and operations and memory, each alone."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import ours
from benchmarks.cases import Job, Place, sample
from benchmarks.contenders import CONTENDERS, OURS, REFERENCE, YARDSTICK

TOLERANCE = 1e-4
Run = Callable[[Sequence[Place]], Any]


def race(job: Job, names: Sequence[str], rounds: int, size: int | None) -> dict[str, Any]:
    """Seconds, ratios and differences of the contenders `names` on a job.

    With a `size`, contenders that do one condition after the other do a seeded sample of so many, and their time is
    scaled: what they do once for all conditions is timed by itself and not multiplied.

    Parameters
    ----------
    job : Job
    names : sequence of str
        Of `CONTENDERS`.
    rounds : int
        In each, every contender runs once.
    size : int, optional
        Conditions of the sample.

    Returns
    -------
    dict
        What the table of results shows, JSON-ready.

    Raises
    ------
    SystemExit
        A contender gives other numbers than the hooks of torch.
    """
    few = job.places if size is None or job.case.name == "scores" else sample(job.places, size)
    left_out = {name: why for name in names if (why := CONTENDERS[name].left_out(job.case.name))}
    runs: dict[str, Run] = {name: CONTENDERS[name].ready(job) for name in names if name not in left_out}
    places = {name: job.places if CONTENDERS[name].whole else few for name in runs}
    reference = CONTENDERS[REFERENCE].ready(job)(few)
    differences = {name: 0.0 for name in runs if name != YARDSTICK}
    for name, run in runs.items():  # also the first run of each, which nobody times
        differences |= _compared(name, run(few), few, few, reference, differences)
    # what each call of headwise does to tell which model it is takes its turn too
    tell = ours.identity(job) if {OURS, YARDSTICK} <= {*runs} else None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    telling: list[float] = []
    for _ in range(rounds):
        gc.collect()
        for name, run in runs.items():
            taken, values = _timed(run, job, places[name])
            seconds[name].append(taken)
            differences |= _compared(name, values, places[name], few, reference, differences)
        if tell is not None:
            begun = time.perf_counter()
            tell()
            telling.append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": job.model,
        "case": job.case.name,
        "what": job.case.words,
        "prompts": len(job.clean),
        "tokens of a prompt": job.clean.shape[1],
        "rows of the answer": len(job.places),
        "forward passes": job.passes(job.places),
        "rounds": rounds,
        "spread of the values": float(np.ptp(reference)),
        "contenders": {
            name: {
                "median seconds": medians[name],
                "ratio": medians[name] / medians[YARDSTICK] if YARDSTICK in medians else None,
                "seconds": seconds[name],
                "measured on": f"{len(places[name])} of {len(job.places)}",
                "largest difference": differences.get(name),
            }
            for name in runs
        },
        "identity": {"median seconds": statistics.median(telling), "seconds": telling} if telling else None,
        "left out": left_out,
    }


def _compared(
    name: str,
    values: np.ndarray | None,
    places: Sequence[Place],
    few: Sequence[Place],
    reference: np.ndarray,
    before: dict[str, float],
) -> dict[str, float]:
    """The largest difference so far from the torch hooks; ends the program where it is no rounding."""
    if values is None:
        return {}
    rows = values if len(places) == len(few) else values[[places.index(place) for place in few]]
    if rows.shape != reference.shape:
        raise SystemExit(f"{name} gives numbers of shape {rows.shape}, torch hooks of shape {reference.shape}")
    difference = float(np.abs(rows - reference).max())
    if not difference <= TOLERANCE:  # not: a NaN is no number either
        raise SystemExit(f"{name} does not give the same numbers as torch hooks: they differ by {difference:.3g}")
    return {name: max(before[name], difference)}


def _timed(run: Run, job: Job, places: Sequence[Place]) -> tuple[float, Any]:
    """Seconds for all conditions of a job, and what came out, from a run of some or all of them."""
    begun = time.perf_counter()
    values = run(places)
    taken = time.perf_counter() - begun
    if len(places) < len(job.places):
        begun = time.perf_counter()
        run(())  # what is done once for all conditions, such as the run that values are taken from
        once = time.perf_counter() - begun
        taken = once + (taken - once) * job.passes(job.places) / job.passes(places)
    return taken, values


def operations(job: Job, name: str) -> int:
    """Floating-point operations of all conditions (matrix products and attention), as torch counts them."""
    # the fused attention of the CPU is not in torch's own table
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}
    run = CONTENDERS[name].ready(job)
    run(job.places[:1])  # what happens once for each model, such as a self-check, is not counted
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run(job.places)
    return int(counter.get_total_flops())


def _fused_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def peak_memory(job: Job, name: str, size: int | None) -> int:
    """Bytes that a contender takes at its peak beyond what is loaded and prepared. For a process of its own."""
    run = CONTENDERS[name].ready(job)
    few = job.places if size is None or job.case.name == "scores" else sample(job.places, size)
    with torch.no_grad():
        job.twin()(job.clean[:1, :2])  # what the libraries set up for themselves
    gc.collect()
    before = _resident() if _forget_peak() else _peak()
    run(job.places if CONTENDERS[name].whole else few)
    return max(0, _peak() - before)


def _forget_peak() -> bool:
    """Start a new peak (Linux); False where that is not permitted."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024
