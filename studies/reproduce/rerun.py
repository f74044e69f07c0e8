"""rerun: do again what a result file says was done, and say whether the numbers agree.

Of a measurement, nothing but the file is trusted; of the file, nothing: what it asks for is checked first (`asked`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...errors import HeadwiseError, ModelError, ResultError, choices
from ...interventions.declare import codec
from ...interventions.declare.codec import read_json
from ...interventions.models.identity import Identity
from ...interventions.plan.estimators import check_estimator
from ..measuring.request import conditions
from ..storage.attributes import json_in
from ..storage.provenance import SCHEMA, provenance, versions
from ..storage.registry import TASKS, metric_names
from . import consent
from .agreement import Agreement, compare

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...metrics.card import Metric
    from ..tasks.tasks import Task

Say = Callable[[str], None]
Again = Callable[["Model", Say], "xr.Dataset | xr.DataTree"]
NEEDED = ("schema_version", "model", "model_revision", "weight_hash", "tokenizer_hash", "dtype")
"""Attributes without which no result can be repeated."""
RUNS, STEPS_OF_STUDY = 3, 4
"""Runs of a task at most, as they are; steps of the integrated estimates of a study."""
ESTIMATOR = re.compile(r"(exact|gradient)|(integrated), ([0-9]{1,9}) steps")


@dataclass(frozen=True)
class Repeat:
    """What repeats a result.

    Attributes
    ----------
    again : callable
    task : Task
    forward : callable
        How many forward passes of all prompts it takes, at most, on a model.
    """

    again: Again
    task: Task
    forward: Callable[[Model], int]


def rerun(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    tolerance: float = 1e-6,
    progress: Say | None = None,
    model: Model | str | os.PathLike[str] | None = None,
    yes: consent.Agree = False,
) -> Agreement:
    """Repeat a stored study or measurement, and compare every number with the stored one.

    The model is opened by the name and revision that the file holds, in the number type that it was measured in, and
    the task, the interventions and the metrics are made again from the declarations in the file.

    A file may come from anybody, so it gets a shipped model, or one of the Hub, and as many prompts as it holds values
    of. A model in a folder, a run on a server (which gets your key), and work of many hours are done where you agree.

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
    yes : bool or callable
        True agrees to whatever the file asks for; a callable gets that in words, and says whether.

    Returns
    -------
    Agreement
        ``agrees``, ``differences`` (variable to largest absolute difference) and more; ``print`` says it in words.

    Raises
    ------
    ResultError
        The file cannot be read, was written by a newer headwise, lacks what would have to be known, or holds a task, a
        study or a metric of your own, which no file can bring back; or it asks for what was not agreed to.
    ModelError
        The model cannot be opened, or its weights or its tokenizer are not those of the file.
    """
    source = Path(path).expanduser()
    if not tolerance >= 0:
        raise ResultError(f"tolerance={tolerance}: give a number that is 0 or more, such as 1e-6")
    say = progress or (lambda text: None)
    from ..storage.reading import as_tree, open_result

    held = open_result(source)
    attrs = {str(name): value for name, value in held.attrs.items()}
    _check_readable(source, attrs)
    try:
        repeat = _how(attrs, as_tree(held))
    except HeadwiseError as error:
        raise ResultError(f"{source} cannot be repeated: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # JSON of another shape than ours
        raise ResultError(f"{source} cannot be repeated: what it declares cannot be read ({error!r})") from error
    stored = as_tree(open_result(source, load=True))
    if model is None or isinstance(model, str | os.PathLike):
        opened = _open(source, attrs, device, model, say, yes)
    else:
        opened = model
    consent.check_work(source, opened, repeat.task, repeat.forward(opened), yes)
    from ...interventions.begin import begin

    with begin(opened, check=False, anew=True) as call:
        others = _differences(attrs, call.identity)
        if others and model is None:
            raise ModelError(
                f"{source} cannot be repeated: {opened.name} is not the model of the file: {'; '.join(others)}. To "
                "compare with another model all the same, give model="
            )
        result = repeat.again(opened, say)
        notes = [f"another model: {one}" for one in others] + _notes(attrs, opened, call.identity)
    again = as_tree(result)
    if "conclusion" in attrs and attrs["conclusion"] != again.attrs.get("conclusion"):
        notes.append("the sentences of the conclusion are not all the same")
    return compare(stored, again, str(source), tolerance, notes)


def _check_readable(source: Path, attrs: Mapping[str, Any]) -> None:
    version = str(attrs.get("schema_version", ""))
    if re.fullmatch("[0-9]+", version) and (len(version) > len(SCHEMA) or int(version) > int(SCHEMA)):
        raise ResultError(
            f"{source} was written by a newer headwise (schema {version[:20]}; this one reads up to {SCHEMA}): "
            "install that one to repeat it"
        )
    if missing := [name for name in NEEDED if name not in attrs]:
        raise ResultError(f"{source} cannot be repeated: it has no attribute {choices(missing)}")


def _how(attrs: Mapping[str, Any], stored: xr.DataTree) -> Repeat:
    """What repeats a result; everything that the file declares is read before a model is opened."""
    if "study" in attrs:
        return _study(attrs["study"], stored)
    root = stored.to_dataset()
    if "sites" in attrs:
        return _captured(attrs, root)
    if "estimators" in attrs:
        return _estimates(attrs)
    needed = ("task", "interventions", "metrics", "base", "estimator")
    if missing := [name for name in needed if name not in attrs]:
        raise ResultError(f"it holds no study, and no attribute {choices(missing)} of a measurement")
    return _measurement(attrs, root)


def _study(text: str, stored: xr.DataTree) -> Repeat:
    from ..analyses.induction import STAGES, InductionStudy

    study = InductionStudy.from_json(text)
    consent.check_study(study, stored)

    def forward(model: Model) -> int:
        sweeps = (6 + 8 * STEPS_OF_STUDY) * model.shape.layers * model.shape.heads
        return sweeps + 12 * study.draws + study.untrained

    return Repeat(
        lambda model, say: study.run(model, lambda stage: say(str(STAGES.get(stage, stage)))), study.task, forward
    )


def _measurement(attrs: Mapping[str, Any], root: xr.Dataset) -> Repeat:
    from ..measuring.measure import measure

    task, what, metrics = _task(attrs), codec.from_json(attrs["interventions"], TASKS), stored_metrics(attrs)
    _, interventions = conditions(what)
    lacking = [metric.name for metric in metrics if f"baseline_{metric.name}" not in root]
    if lacking:
        raise ResultError(
            f"it has no baseline_{lacking[0]}, so it is no measurement but was made from one; repeat that, or the study"
        )
    consent.check_held(task, root)
    estimator, steps = estimator_of(attrs)
    check_estimator(estimator, steps)
    options: dict[str, Any] = {
        "base": str(attrs["base"]),
        "steps": steps,
        "per_position": is_per_position(root, metrics),
        "estimator": estimator,
    }

    def again(model: Model, say: Say) -> xr.Dataset:
        say("measuring again")
        return measure(model, task, what, metrics, **options)

    runs = len(interventions) if estimator == "exact" else 4 * steps
    return Repeat(again, task, lambda model: RUNS + runs)


def _captured(attrs: Mapping[str, Any], root: xr.Dataset) -> Repeat:
    from ..measuring.capture import capture

    task, sites, run = _task(attrs), codec.from_json(attrs["sites"], TASKS), str(attrs.get("run", "clean"))
    consent.check_held(task, root)
    return Repeat(lambda model, say: capture(model, task, sites, run=run), task, lambda model: 1)


def _estimates(attrs: Mapping[str, Any]) -> Repeat:
    from ..measuring.compare import compare_estimates

    if missing := [name for name in ("task", "interventions", "metrics", "base") if name not in attrs]:
        raise ResultError(f"it has no attribute {choices(missing)}")
    task, what, (metric,) = _task(attrs), codec.from_json(attrs["interventions"], TASKS), stored_metrics(attrs)
    options = {"estimators": read_json(attrs["estimators"]), "base": str(attrs["base"])}
    steps = int(attrs["steps"]) if "steps" in attrs else 1
    check_estimator("integrated", steps)
    options |= {"steps": steps} if "steps" in attrs else {}
    runs = len(conditions(what)[1]) + 4 * steps
    return Repeat(
        lambda model, say: compare_estimates(model, task, what, metric, **options), task, lambda model: RUNS + runs
    )


def _task(attrs: Mapping[str, Any]) -> Any:
    if "task" not in attrs:
        raise ResultError("it has no attribute 'task'")
    data = read_json(attrs["task"])
    if isinstance(data, dict) and data.keys() == {"repr"}:
        raise ResultError(f"its task is one of your own, {data['repr']}: no file can bring it back")
    task = codec.decode(data, TASKS)
    if not hasattr(task, "draw"):
        raise ResultError(f"its task is no task: {task!r}")
    return task


def stored_metrics(attrs: Mapping[str, Any]) -> list[Metric]:
    """The metrics that a measurement names; an error for those that do not ship with headwise."""
    names, known = read_json(attrs["metrics"]), metric_names()
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


def _open(
    source: Path,
    attrs: Mapping[str, Any],
    device: str,
    given: str | os.PathLike[str] | None,
    say: Say,
    yes: consent.Agree,
) -> Model:
    """The model that was given by name, or the one that the file names, where it ran; where the user agrees to that."""
    from ...interventions.load import load

    opening = partial(load, device=device, dtype=str(attrs["dtype"]))
    name, revision, asks = (os.fspath(given), None, "") if given is not None else consent.place_of(source, attrs)
    if (ran := str(attrs.get("executed", "local"))) != "local":
        opening = partial(load, remote=True)
        consent.agree(source, f"to run on the server that is set here, with your key, as it ran on {ran[:80]!r}", yes)
    if asks:
        consent.agree(source, asks, yes)
    say(f"opening {given or attrs['model']}")
    return opening(name, revision=revision)


def _differences(attrs: Mapping[str, Any], now: Identity) -> list[str]:
    """What of a model is not as the file says; nothing where all that the file knows is."""
    then = Identity.from_attrs(attrs)
    before, after = (json_in(one, "versions", dict).get("transformers") for one in (attrs, {"versions": versions()}))
    but = ("attention", "dtype", *(() if before == after else ("modules",)))  # classes change with versions
    return then.differences(now, "then", "now", but)


def _notes(attrs: Mapping[str, Any], model: Model, identity: Identity) -> list[str]:
    """What was not the same about the two runs beside their numbers, and what cannot be known."""
    now, unknown = provenance(model, identity), "not recorded"
    before, after = (json_in(one, "versions", dict) for one in (attrs, now))
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
