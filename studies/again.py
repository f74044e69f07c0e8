"""rerun: do again what a result file says was done, and say whether the numbers agree. Trusts nothing but the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from ..errors import HeadwiseError, ModelError, ResultError, choices
from ..interventions import codec
from ..interventions.identity import Identity
from .agreement import Agreement, compare
from .results import SCHEMA, open_tree, provenance, versions
from .setup import conditions
from .tables import TASKS, metric_names

if TYPE_CHECKING:
    from ..interventions.models import Model
    from ..metrics.card import Metric

Say = Callable[[str], None]
Again = Callable[["Model", Say], "xr.Dataset | xr.DataTree"]
NEEDED = ("schema_version", "model", "model_revision", "weight_hash", "tokenizer_hash", "dtype")
"""Attributes without which no result can be repeated."""
ESTIMATOR = re.compile(r"(exact|gradient)|(integrated), (\d+) steps")


def rerun(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    tolerance: float = 1e-6,
    progress: Say | None = None,
    model: Model | str | os.PathLike[str] | None = None,
) -> Agreement:
    """Repeat a stored study or measurement, and compare every number with the stored one.

    The model is opened by the name and revision that the file holds, in the number type that it was measured in, and
    the task, the interventions and the metrics are made again from the declarations in the file.

    Parameters
    ----------
    path : str or path
        A file that `write_netcdf` wrote: of a study, or of `measure`, `capture` or `compare_estimates`.
    device : str
        As for `headwise.load`.
    tolerance : float
        Numbers agree up to this difference; beyond 1, up to this share of the stored number.
    progress : callable, optional
        Called with what is being done, in words.
    model : Model, str or path, optional
        Repeats it on this model, or on the one that `headwise.load` opens by this name. Needed where the file's model
        was a folder elsewhere or a module in memory; other weights than those of the file are then a note of the
        result instead of an error.

    Returns
    -------
    Agreement
        ``agrees``, ``differences`` (variable to largest absolute difference) and more; ``print`` says it in words.

    Raises
    ------
    ResultError
        The file cannot be read, was written by a newer headwise, lacks what would have to be known, or holds a task, a
        study or a metric of your own, which no file can bring back.
    ModelError
        The model cannot be opened, or its weights or its tokenizer are not those of the file.
    """
    source = Path(path).expanduser()
    if not tolerance >= 0:
        raise ResultError(f"tolerance={tolerance}: give a number that is 0 or more, such as 1e-6")
    say = progress or (lambda text: None)
    stored = open_tree(source)
    attrs = {str(name): value for name, value in stored.attrs.items()}
    _check_readable(source, attrs)
    try:
        repeat = _how(attrs, stored.to_dataset())
    except HeadwiseError as error:
        raise ResultError(f"{source} cannot be repeated: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # JSON of another shape than ours
        raise ResultError(f"{source} cannot be repeated: what it declares cannot be read ({error!r})") from error
    if model is None or isinstance(model, str | os.PathLike):
        say(f"opening {model or attrs['model']}")
        opened = _open(source, attrs, device, model)
    else:
        opened = model
    from ..interventions.begin import begin

    with begin(opened, check=False, anew=True) as call:
        others = _differences(attrs, call.identity)
        if others and model is None:
            raise ModelError(
                f"{source} cannot be repeated: {opened.name} is not the model of the file: {'; '.join(others)}. To "
                "compare with another model all the same, give model="
            )
        result = repeat(opened, say)
        notes = [f"another model: {one}" for one in others] + _notes(attrs, opened, call.identity)
    again = result if isinstance(result, xr.DataTree) else xr.DataTree(result)
    if "conclusion" in attrs and attrs["conclusion"] != again.attrs.get("conclusion"):
        notes.append("the sentences of the conclusion are not all the same")
    return compare(stored, again, str(source), tolerance, notes)


def _check_readable(source: Path, attrs: Mapping[str, Any]) -> None:
    version = str(attrs.get("schema_version", ""))
    if version.isdigit() and int(version) > int(SCHEMA):
        raise ResultError(
            f"{source} was written by a newer headwise (schema {version}; this one reads up to {SCHEMA}): "
            "install that one to repeat it"
        )
    if missing := [name for name in NEEDED if name not in attrs]:
        raise ResultError(f"{source} cannot be repeated: it has no attribute {choices(missing)}")


def _how(attrs: Mapping[str, Any], root: xr.Dataset) -> Again:
    """What repeats a result; everything that the file declares is read before a model is opened."""
    if "study" in attrs:
        return _study(str(attrs["study"]))
    if "sites" in attrs:
        return _captured(attrs)
    if "estimators" in attrs:
        return _estimates(attrs)
    needed = ("task", "interventions", "metrics", "base", "estimator")
    if missing := [name for name in needed if name not in attrs]:
        raise ResultError(f"it holds no study, and no attribute {choices(missing)} of a measurement")
    return _measurement(attrs, root)


def _study(text: str) -> Again:
    from .induction import STAGES, InductionStudy

    study = codec.from_json(text, {"InductionStudy": InductionStudy})
    return lambda model, say: study.run(model, lambda stage: say(str(STAGES.get(stage, stage))))


def _measurement(attrs: Mapping[str, Any], root: xr.Dataset) -> Again:
    from .measurement import measure

    task, what, metrics = _task(attrs), codec.from_json(attrs["interventions"], TASKS), stored_metrics(attrs)
    conditions(what)
    lacking = [metric.name for metric in metrics if f"baseline_{metric.name}" not in root]
    if lacking:
        raise ResultError(
            f"it has no baseline_{lacking[0]}, so it is no measurement but was made from one; repeat that, or the study"
        )
    estimator, steps = estimator_of(attrs)
    options: dict[str, Any] = {
        "base": str(attrs["base"]),
        "steps": steps,
        "per_position": is_per_position(root, metrics),
        "estimator": estimator,
    }

    def again(model: Model, say: Say) -> xr.Dataset:
        say("measuring again")
        return measure(model, task, what, metrics, **options)

    return again


def _captured(attrs: Mapping[str, Any]) -> Again:
    from .activations import capture

    task, sites, run = _task(attrs), codec.from_json(attrs["sites"], TASKS), str(attrs.get("run", "clean"))
    return lambda model, say: capture(model, task, sites, run=run)


def _estimates(attrs: Mapping[str, Any]) -> Again:
    from .estimates import compare_estimates

    if missing := [name for name in ("task", "interventions", "metrics", "base") if name not in attrs]:
        raise ResultError(f"it has no attribute {choices(missing)}")
    task, what, (metric,) = _task(attrs), codec.from_json(attrs["interventions"], TASKS), stored_metrics(attrs)
    options = {"estimators": json.loads(attrs["estimators"]), "base": str(attrs["base"])}
    options |= {"steps": int(attrs["steps"])} if "steps" in attrs else {}
    return lambda model, say: compare_estimates(model, task, what, metric, **options)


def _task(attrs: Mapping[str, Any]) -> Any:
    if "task" not in attrs:
        raise ResultError("it has no attribute 'task'")
    data = json.loads(attrs["task"])
    if isinstance(data, dict) and data.keys() == {"repr"}:
        raise ResultError(f"its task is one of your own, {data['repr']}: no file can bring it back")
    task = codec.decode(data, TASKS)
    if not hasattr(task, "draw"):
        raise ResultError(f"its task is no task: {task!r}")
    return task


def stored_metrics(attrs: Mapping[str, Any]) -> list[Metric]:
    """The metrics that a measurement names; an error for those that do not ship with headwise."""
    names, known = json.loads(attrs["metrics"]), metric_names()
    if unknown := [name for name in names if name not in known]:
        raise ResultError(
            f"the metric {choices(unknown)} is one of your own, and no file can bring it back; with headwise come "
            f"{choices(known)}"
        )
    return [known[name][1] for name in names]


def is_per_position(ds: xr.Dataset, metrics: list[Metric]) -> bool:
    """Whether a measurement kept the values at each scored position."""
    return any(metric.kind == "logits" and "position" in ds[f"baseline_{metric.name}"].dims for metric in metrics)


def estimator_of(attrs: Mapping[str, Any]) -> tuple[str, int]:
    """Estimator and steps of a measurement (8, which has no meaning then, where it has no steps)."""
    found = ESTIMATOR.fullmatch(str(attrs["estimator"]))
    if found is None:
        raise ResultError(f"its estimator {attrs['estimator']!r} is not known to this version")
    return (found[1], 8) if found[1] else (found[2], int(found[3]))


def _open(source: Path, attrs: Mapping[str, Any], device: str, given: str | os.PathLike[str] | None) -> Model:
    """The model that was given by name, or the one that the file names, where it ran."""
    from ..interventions.load import load

    opening = partial(load, device=device, dtype=str(attrs["dtype"]))
    if attrs.get("executed", "local") != "local":
        opening = partial(load, remote=True)
    if given is not None:
        return opening(os.fspath(given))
    name, revision = (str(attrs[key]) for key in ("model", "model_revision"))
    if revision == "memory":
        raise ResultError(f"{source} was measured on a module in memory, {name}: give it as rerun(..., model=...)")
    if revision == "local":
        folder = Path(name).name
        places = [place for place in (Path(folder), source.parent / folder) if (place / "config.json").is_file()]
        if not places:
            raise ResultError(
                f"{source} was measured on the folder {name}, and files do not keep where folders are: say where it is "
                "now, rerun(..., model=...) or --model"
            )
        return opening(places[0])
    return opening(name, revision=None if revision in ("shipped", "main") else revision)


def _differences(attrs: Mapping[str, Any], now: Identity) -> list[str]:
    """What of a model is not as the file says; nothing where all that the file knows is."""
    then = Identity.from_attrs(attrs)
    before, after = (_versions(one).get("transformers") for one in (attrs.get("versions"), versions()))
    but = ("attention", "dtype", *(() if before == after else ("modules",)))  # classes change with versions
    return then.differences(now, "then", "now", but)


def _notes(attrs: Mapping[str, Any], model: Model, identity: Identity) -> list[str]:
    """What was not the same about the two runs beside their numbers, and what cannot be known."""
    now, unknown = provenance(model, identity), "not recorded"
    before, after = (_versions(one.get("versions")) for one in (attrs, now))
    pairs = {name: (before.get(name, unknown), after.get(name, unknown)) for name in sorted({*before, *after})}
    words = {
        "device": "device",
        "dtype": "number type",
        "platform": "platform",
        "attention": "implementation of attention",
    }
    for name, text in words.items():
        if name != "attention" or name in attrs:
            pairs[text] = (attrs.get(name, unknown), now[name])
    notes = [f"{name}: {old} then, {new} now" for name, (old, new) in pairs.items() if str(old) != str(new)]
    if lacking := Identity.from_attrs(attrs).unknown(identity):
        notes.append(f"the file does not say which {choices(lacking)} its model had: unknown whether they are the same")
    return notes


def _versions(text: object) -> dict[str, Any]:
    try:
        found = json.loads(str(text))
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
