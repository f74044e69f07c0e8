"""What a result says about itself, in words: what was done, on which model and task, and when."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from ...interventions.declare.codec import edit_names
from ...interventions.models.checkpoints import revision_and_step
from ..measuring.effects import intervened
from ..output.phrases import count, listed
from ..storage.attributes import LONGEST, json_in
from ..storage.reading import Result
from ..storage.record import LOOKS, Record
from ..tasks.chat import prompt_in_words
from .entries import in_short
from .listing import human_date


def what_of(result: Result, record: Record) -> str:
    """What was done: the study as its call, or conditions, run and metrics of a measurement."""
    attrs, over = result.attrs, ""
    if record.series and "step" in result.sizes:
        steps = np.asarray(result["step"])
        over = f", at {count(len(steps), 'step')} of training, {steps.min()} to {steps.max()}"
    if record.study and record.study.get("type") != "Sweep":
        return f"{in_short(record.study)}, {count(sum(1 for _ in nodes(result)), 'part')}{over}"
    if record.kind == "capture":
        under = f"under {listed(edits)}" if (edits := _edits(attrs)) else "without intervention"
        return f"activations of the {attrs.get('run', '')} run, {under}"
    if record.kind in LOOKS and isinstance(result, xr.Dataset):
        return looked_for(result, record)
    if "metrics" not in attrs or not isinstance(result, xr.Dataset):
        return ""
    metrics = [str(name) for name in record.metrics]
    if record.kind == "edge_scores":
        edges, source = count(result.sizes.get("edge", 0), "edge"), json_in(attrs, "interventions", dict).get("source")
        way = "exact" if attrs.get("estimator") == "exact" else f"estimated by {attrs.get('estimator')}"
        run = attrs.get("base", "")
        return f"change of {listed(metrics)} of the {run} run by each of {edges} that carries the {source} run, {way}"
    measured = [result[name] for name in metrics if name in result and intervened(result)]
    if not measured:
        return f"{listed(metrics)} without intervention{over}" if metrics else ""
    inner = ("example", "position", "read_layer", "read_head", *(["step"] if over else []))
    axes = [dim for dim in measured[0].dims if dim not in inner]
    sizes = " x ".join(f"{dim} {result.sizes[dim]}" for dim in axes)
    edits = _edits(attrs)
    words = count(math.prod(result.sizes[dim] for dim in axes), "condition") + (f" ({sizes})" if sizes else "")
    run = attrs.get("base", "")
    how = "" if attrs.get("estimator", "exact") == "exact" else f", estimated: {attrs['estimator']}"
    return (
        f"{words} of {listed(edits) if edits else 'an intervention'} on the {run} run, by {listed(metrics)}{how}{over}"
    )


def looked_for(ds: xr.Dataset, record: Record) -> str:
    """What was looked for inside a model, on which run, and under what."""
    run = f"in the {record.attrs.get('run', '')} run"
    own = [f"read_{dim}" if f"read_{dim}" in ds.sizes else dim for dim in ("layer", "head")]
    if record.kind == "direct_logit_attribution":
        whole = str(ds["whole"].attrs.get("long_name", "")) if "whole" in ds else ""
        words = f"what each of {count(ds.sizes.get('source', 0), 'part')} adds to the {whole} {run}"
    elif record.kind == "weighted_value_norms":
        number = math.prod(ds.sizes.get(dim, 0) for dim in own)
        words = f"how much each of {count(number, 'head')} moves {run}"
    else:
        heads = ("read_head" if "read_layer" in ds.sizes else "head") in ds.sizes
        top, by = ds.sizes.get("rank", 0), f", by {'what each head writes' if heads else 'the stream of each layer'}"
        which = "the likeliest token" if top == 1 else f"the {top} likeliest tokens"
        words = f"{which} {run}{by if record.kind == 'logit_lens' else ''}"
    by_head = record.kind in ("logit_lens", "weighted_value_norms")
    inner = ("example", "position", "rank", *(own if by_head else ()), "source", "query", "key", "run")
    axes = [ds.sizes[dim] for dim in ds.dims if dim not in inner]
    return f"{words}, under {count(math.prod(axes), 'condition')}" if axes else words


def _edits(attrs: Mapping[Any, Any]) -> list[str]:
    """The kinds of interventions of a result."""
    text = str(attrs.get("interventions", ""))
    return ["EdgePatches"] if '"EdgePatches"' in text else [name for name in edit_names() if f'"{name}"' in text]


def model_of(record: Record) -> str:
    """Name, revision and size of the model."""
    shape = record.shape
    sizes = f": {shape.get('layers')} layers of {shape.get('heads')} heads" if shape else ""
    revision = f" ({revision_and_step(record.revision, record.step)})" if record.revision else ""
    return f"{record.model}{revision}{sizes}" if record.model else ""


def when_of(record: Record) -> str:
    """When it was made, in how many seconds, where, and by which version."""
    attrs, seconds = record.attrs, record.seconds
    parts = [f"{human_date(str(attrs['created']))} UTC"] if attrs.get("created") else []
    if seconds:
        parts.append(f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s")
    version = record.versions.get("headwise")
    server = f" at {record.server}" if record.server else ""
    parts += [f"on {attrs['device']}{server}"] if attrs.get("device") else []
    parts += [f"headwise {version}"] if version else []
    return ", ".join(parts)


def task_in_words(task: Mapping[str, Any]) -> str:
    """A task, from its JSON, as a phrase."""
    kind = task.get("type")
    if kind == "RepeatedTokens":
        front = ", BOS in front" if task.get("bos") else ""
        words = f"{task.get('n')} prompts in which {task.get('length')} random tokens are repeated once"
        return f"{words}, seed {task.get('seed')}{front}"
    prompts = task.get("prompts")
    if kind == "Prompts" and prompts and isinstance(prompts, list):
        said = prompt_in_words(prompts[0])[1] if isinstance(prompts[0], dict) else str(prompts[0])
        first = textwrap.shorten(said[:LONGEST], 60, placeholder="...")
        return f"{count(len(prompts), 'prompt')}, such as {first!r}"
    return in_short(task)


def nodes(result: Result) -> Iterator[tuple[str, xr.Dataset]]:
    """Groups that hold variables, by path; a Dataset is one called ``""``."""
    if isinstance(result, xr.Dataset):
        yield "", result
        return
    for node in result.subtree:
        ds = node.to_dataset()
        if ds.data_vars:
            yield node.path.strip("/"), ds
