"""What a result says about itself, in words: what was done, on which model and task, and when."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import xarray as xr

from ..output.phrases import count, listed
from ..storage.attributes import LONGEST, json_in, number_in
from ..storage.reading import Result
from .entries import in_short
from .listing import human_date

EDITS = ("ZeroAblate", "MeanAblate", "ResampleAblate", "Patch", "Add", "Scale", "Knockout", "PathPatch")


def kind_of(result: Result) -> str:
    """Study, measurement, captured activations or data."""
    if "study" in result.attrs:
        return "study"
    return "captured activations" if "sites" in result.attrs else "measurement" if "metrics" in result.attrs else "data"


def what_of(result: Result) -> str:
    """What was done: the study as its call, or conditions, run and metrics of a measurement."""
    attrs = result.attrs
    study = json_in(attrs, "study", dict)
    if study:
        return f"{in_short(study)}, {count(sum(1 for _ in nodes(result)), 'part')}"
    if "sites" in attrs:
        return f"activations of the {attrs.get('run', '')} run, without intervention"
    if "metrics" not in attrs or not isinstance(result, xr.Dataset):
        return ""
    metrics = [str(name) for name in json_in(attrs, "metrics", list)]
    measured = [result[name] for name in metrics if name in result]
    if not measured:
        return f"{listed(metrics)} without intervention" if metrics else ""
    axes = [dim for dim in measured[0].dims if dim not in ("example", "position", "read_layer", "read_head")]
    sizes = " x ".join(f"{dim} {result.sizes[dim]}" for dim in axes)
    edits = [name for name in EDITS if f'"{name}"' in str(attrs.get("interventions", ""))]
    words = count(math.prod(result.sizes[dim] for dim in axes), "condition") + (f" ({sizes})" if sizes else "")
    run = attrs.get("base", "")
    how = "" if attrs.get("estimator", "exact") == "exact" else f", estimated: {attrs['estimator']}"
    return f"{words} of {listed(edits) if edits else 'an intervention'} on the {run} run, by {listed(metrics)}{how}"


def model_of(attrs: Mapping[Any, Any]) -> str:
    """Name, revision and size of the model."""
    shape = json_in(attrs, "model_shape", dict)
    sizes = f": {shape.get('layers')} layers of {shape.get('heads')} heads" if shape else ""
    revision = f" ({attrs['model_revision']})" if attrs.get("model_revision") else ""
    return f"{attrs['model']}{revision}{sizes}" if attrs.get("model") else ""


def when_of(attrs: Mapping[Any, Any]) -> str:
    """When it was made, in how many seconds, where, and by which version."""
    parts = [f"{human_date(str(attrs['created']))} UTC"] if attrs.get("created") else []
    if seconds := number_in(attrs, "seconds"):
        parts.append(f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s")
    version = json_in(attrs, "versions", dict).get("headwise")
    server = f" at {attrs['executed']}" if attrs.get("executed", "local") != "local" else ""
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
        first = textwrap.shorten(str(prompts[0])[:LONGEST], 60, placeholder="...")
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
