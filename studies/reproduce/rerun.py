"""rerun: do again what a result file says was done, and say whether the numbers agree.

Of a measurement, nothing but the file is trusted; of the file, nothing: what it asks for is checked first (`consent`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, HeadwiseError, ModelError, ResultError, choices, whole
from ...interventions.declare.edges import EdgePatches
from ...interventions.models.identity import Identity
from ...interventions.plan.estimators import check_estimator
from ..measuring.controls import CONTROLS
from ..measuring.request import check_what, conditions
from ..storage.attributes import json_in
from ..storage.provenance import SCHEMA, provenance, versions
from ..storage.record import KINDS, LOOKS, SERIES, Record
from ..tasks.chat import Chat, template_hash
from ..tasks.prompts import Prompts
from ..text.windows import HELD_OUT
from . import consent
from .agreement import Agreement, compare

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...metrics.card import Metric
    from ..tasks.tasks import Task

Say = Callable[[str], None]
Result = xr.Dataset | xr.DataTree
Again = Callable[["Model", Say], Result]
NEEDED = ("schema_version", "model", "model_revision", "weight_hash", "tokenizer_hash", "dtype")
"""Attributes without which no result can be repeated."""
RUNS, STEPS_OF_STUDY = 3, 4
"""Runs of a task at most, as they are; steps of the integrated estimates of a study."""
OTHER_TEMPLATE = "another chat template than that of the file: the prompts are as the file holds them"
TRAINS = "FormationStudy"
"""The study that trains its models itself."""


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
    revision: str | None = None,
    step: int | None = None,
    yes: consent.Agree = False,
) -> Agreement:
    """Repeat a stored study or measurement, and compare every number with the stored one.

    The model is opened by the name, revision and step that the file holds, in the number type that it was measured in,
    and the task, the interventions and the metrics are made again from the declarations in the file.

    A file may come from anybody, so it gets a shipped model, or one of the Hub, and as many prompts as it holds values
    of. A model in a folder, a run on a server (which gets your key), and work of many hours are done where you agree.

    Parameters
    ----------
    path : str or path
        A file that `write_netcdf` wrote: of a study, or of `measure`, `capture`, `compare_estimates`, `predict`,
        `logit_lens` or `direct_logit_attribution`.
    device : str
        As for `headwise.load`.
    tolerance : float
        Numbers agree up to this difference; beyond 1, up to this share of the stored number.
    progress : callable, optional
        Called with what is being done, in words.
    model : Model, str or path, optional
        Repeats it on this model, or on the one that `headwise.load` opens by this name; a study over steps of training
        on the checkpoints of this name or folder. Needed where the file's model was a folder elsewhere or a module in
        memory; other weights than those of the file are then a note of the result instead of an error.
    revision, step : optional
        Of a `model` that is given by its name, as for `headwise.load`.
    yes : bool or callable
        True agrees to whatever the file asks for; a callable gets that in words, and says whether.

    Returns
    -------
    Agreement
        ``agrees``, ``differences`` (variable to largest absolute difference) and more; ``print`` says it in words.

    Raises
    ------
    DeclarationError
        `revision` or `step` without the name of a `model`.
    ResultError
        The file cannot be read, was written by a newer headwise, lacks what would have to be known, or holds a task, a
        study or a metric of your own, which no file can bring back; or it asks for what was not agreed to.
    ModelError
        The model cannot be opened, or its weights or its tokenizer are not those of the file.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, hw.ZeroAblate(hw.Head(0, 3)), out="loss.nc")
    >>> found = hw.rerun("loss.nc")
    >>> found.agrees, found.largest
    (True, 0.0)
    """
    if not isinstance(path, str | os.PathLike):
        raise ResultError(
            f"rerun takes the path of a file, and was given a {type(path).__name__}: write_netcdf makes one"
        )
    source = Path(path).expanduser()
    if not tolerance >= 0:
        raise ResultError(f"tolerance={tolerance}: give a number that is 0 or more, such as 1e-6")
    options = {name: value for name, value in (("revision", revision), ("step", step)) if value is not None}
    if options and not isinstance(model, str | os.PathLike):
        raise DeclarationError(f"{' and '.join(options)} of a model that is given by its name: the file says its own")
    say = progress or (lambda text: None)
    from ..storage.reading import as_tree, open_result

    held = open_result(source)
    attrs = {str(name): value for name, value in held.attrs.items()}
    if SERIES in attrs:
        return _each_step(source, device, tolerance, say, model, options, yes)
    if json_in(attrs, "study", dict).get("type") == TRAINS:
        return _trained(source, attrs, tolerance, say, model, yes)
    _check_readable(source, attrs)
    repeat = _declared(source, attrs, as_tree(held))
    stored = as_tree(open_result(source, load=True))
    named = model is None or isinstance(model, str | os.PathLike)
    opened = _open(source, attrs, device, model, options, say, yes) if named else model  # type: ignore[arg-type]
    result, notes = _once(source, repeat, attrs, opened, say=say, yes=yes, given=model is not None)  # type: ignore[arg-type]
    again = as_tree(result)
    if "conclusion" in attrs and attrs["conclusion"] != again.attrs.get("conclusion"):
        notes.append("the conclusion is not worded the same")
    return compare(stored, again, str(source), tolerance, notes)


def _declared(source: Path, attrs: Mapping[str, Any], held: xr.DataTree) -> Repeat:
    """What repeats a result, or an error that names the file."""
    try:
        return _how(Record.from_attrs(attrs), held)
    except HeadwiseError as error:
        raise ResultError(f"{source} cannot be repeated: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # JSON of another shape than ours
        raise ResultError(f"{source} cannot be repeated: what it declares cannot be read ({error!r})") from error


def _once(
    source: Path,
    repeat: Repeat,
    attrs: Mapping[str, Any],
    opened: Model,
    *,
    say: Say,
    yes: consent.Agree,
    given: bool,
    times: int = 1,
) -> tuple[Result, list[str]]:
    """Repeat what was measured on one model, of `times` in all; the result, and what was not the same."""
    from ...interventions.begin import begin

    consent.check_work(source, opened, repeat.task, times * repeat.forward(opened), yes)
    with begin(opened, check=False, anew=True) as call:
        others = _differences(attrs, call.identity)
        if others and not given:
            raise ModelError(
                f"{source} cannot be repeated: {opened.name} is not the model of the file: {'; '.join(others)}. To "
                "compare with another model all the same, give model="
            )
        result = repeat.again(opened, say)
        same = _same_template(repeat.task, opened)
        notes = [f"another model: {one}" for one in others] + _notes(attrs, opened, call.identity)
        return result, notes + ([] if same else [OTHER_TEMPLATE])


def _same_template(task: Task, model: Model) -> bool:
    """Whether the model's chat template is the one that made the conversations of a task, where it has any."""
    made = {one.template for one in getattr(task, "prompts", ()) if isinstance(one, Chat)}
    return made <= {template_hash(model)}


def _each_step(
    source: Path,
    device: str,
    tolerance: float,
    say: Say,
    model: Any,
    options: dict[str, Any],
    yes: consent.Agree,
) -> Agreement:
    """Repeat a study over steps of training, each on the model of its step, which a file or a folder must still hold.

    `model` is a folder or a name with checkpoints, or what `over_checkpoints` takes.
    """
    from ..dynamics.checkpoints import checkpoints_of
    from ..dynamics.series import OF_A_STEP, at_step, joined
    from ..storage.reading import as_tree, open_result

    if options:
        raise DeclarationError(f"{source} holds several steps: {' and '.join(options)} cannot be said of all of them")
    whole = as_tree(open_result(source, load=True))
    steps = [int(step) for step in np.asarray(whole["step"])]
    found = {} if model is None else checkpoints_of(model, steps)
    each: dict[int, Result] = {}
    notes: dict[str, None] = {}
    for step in steps:
        held = as_tree(at_step(whole, step))
        attrs = {"model_revision": f"step{step}"} | {str(name): value for name, value in held.attrs.items()}
        if json_in(attrs, "study", dict).get("type") == "Sweep":
            del attrs["study"]  # a measurement, as its other attributes say
        if attrs["model_revision"] == "shipped":
            attrs["step"] = step
        _check_readable(source, attrs)
        say(f"step {step}")
        repeat = _declared(source, attrs, held)
        opened = found[step]() if found else _open(source, attrs, device, None, {}, lambda text: None, yes)
        times, given = len(steps), model is not None
        each[step], others = _once(source, repeat, attrs, opened, say=say, yes=yes, given=given, times=times)
        notes |= dict.fromkeys(others)
    own = [f"step_{name}" for name in OF_A_STEP if name not in ("weight_hash", "heads")]
    before, after = whole.copy(), as_tree(joined(each))
    for tree in (before, after):
        tree.dataset = tree.to_dataset().drop_vars(own, errors="ignore")
    return compare(before, after, str(source), tolerance, tuple(notes))


def _trained(
    source: Path, attrs: Mapping[str, Any], tolerance: float, say: Say, model: Any, yes: consent.Agree
) -> Agreement:
    """Repeat a study that trains its models itself."""
    from ..dynamics.formation import FormationStudy
    from ..storage.reading import as_tree, open_result

    if model is not None:
        raise DeclarationError(f"{source} holds a study that trains its own models: it takes no model")
    _check_readable(source, attrs, ())
    try:
        study = FormationStudy.from_json(attrs["study"])
    except (HeadwiseError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ResultError(f"{source} cannot be repeated: {error}") from error
    consent.check_training(source, study, yes)
    stored = as_tree(open_result(source, load=True))
    say(f"training {len(study.trainings) * study.seeds} models, {study.steps} steps each")
    again = study.run()
    before, after = (json_in(one.attrs, "versions", dict) for one in (stored, again))
    notes = [f"{name}: {old} then, {after.get(name)} now" for name, old in before.items() if old != after.get(name)]
    if stored.attrs.get("platform") != again.attrs["platform"]:
        notes.append("another machine: a training adds up its rounding, so that later steps differ")
    return compare(stored, again, str(source), tolerance, notes)


def _check_readable(source: Path, attrs: Mapping[str, Any], needed: Sequence[str] = NEEDED) -> None:
    version = str(attrs.get("schema_version", ""))
    if re.fullmatch("[0-9]+", version) and (len(version) > len(SCHEMA) or int(version) > int(SCHEMA)):
        raise ResultError(
            f"{source} was written by a newer headwise (schema {version[:20]}; this one reads up to {SCHEMA}): "
            "install that one to repeat it"
        )
    if missing := [name for name in needed if name not in attrs]:
        raise ResultError(f"{source} cannot be repeated: it has no attribute {choices(missing)}")


def _how(record: Record, stored: xr.DataTree) -> Repeat:
    """What repeats a result; everything that the file declares is read before a model is opened."""
    if record.study.get("type") == "TextInduction":
        return _text(record.attrs["study"], stored)
    if record.study.get("type") == "CircuitStudy":
        return _circuit(record, stored)
    if record.kind == "study":
        return _study(record.attrs["study"], stored)
    if missing := record.missing():
        of = "a measurement" if record.kind not in ("capture", *LOOKS) else KINDS[record.kind]
        raise ResultError(f"it holds no study, and no attribute {choices(missing)} of {of}")
    if record.kind == "text_heads":
        return _text_heads(record)
    root = stored.to_dataset()
    task, what, metrics = record.declared_task(), record.declared_what(), record.declared_metrics()
    lacking = [f"baseline_{metric.name}" for metric in metrics if f"baseline_{metric.name}" not in root]
    if lacking and record.kind != "estimates":
        raise ResultError(
            f"it has no {lacking[0]}, so it is no measurement but was made from one; repeat that, or the study"
        )
    options = record.options(root)
    steps = options.get("steps") or 1
    again: Callable[..., xr.Dataset]
    each, more, changed = 1, RUNS, what
    if record.kind == "capture":
        from ..measuring.capture import capture as again

        given: tuple[Any, ...] = (what,)
        changed, more = options.get("what"), RUNS if "what" in options else 1
    elif record.kind == "edge_scores":
        from ..circuits.edge_scores import edge_scores as again

        given, more = tuple(metrics), RUNS + 4 * steps
    elif record.kind in LOOKS:
        again, given = _look(record.kind), ()
        options |= {} if what is None else {"what": what}
    elif record.kind == "estimates":
        from ..measuring.compare import compare_estimates as again

        (metric,) = metrics
        given, more = (what, metric), RUNS + 4 * steps
    else:
        from ..measuring.measure import measure as again

        given = (what, metrics)
        exact = options["estimator"] == "exact"
        each, more = (1 + len(CONTROLS) * options.get("controls", 0), RUNS) if exact else (0, RUNS + 4 * steps)
    check_what(changed)
    if record.kind not in ("capture", "edge_scores", *LOOKS):
        of_edges = isinstance(what, EdgePatches)
        check_estimator(options.get("estimator", "eap-ig" if of_edges else "integrated"), steps, of_edges)
    if record.kind != "estimates":
        consent.check_held(task, root)

    def repeated(model: Model, say: Say) -> xr.Dataset:
        say("measuring again")
        result = again(model, task, *given, **options)
        old = record.kind == "measurement" and metrics[0].name not in root
        return _as_before(result, metrics) if old else result

    return Repeat(repeated, task, lambda model: more + each * len(conditions(changed, model)[1]))


def _look(kind: str) -> Callable[..., xr.Dataset]:
    """The function that looks inside a model, of the name that is the kind of its result."""
    from ..inspection.attribution import direct_logit_attribution
    from ..inspection.lens import logit_lens
    from ..inspection.norms import weighted_value_norms
    from ..inspection.predict import predict

    functions: tuple[Callable[..., xr.Dataset], ...] = (
        direct_logit_attribution,
        logit_lens,
        predict,
        weighted_value_norms,
    )
    return next(one for one in functions if one.__name__ == kind)


def _as_before(result: xr.Dataset, metrics: Sequence[Metric]) -> xr.Dataset:
    """A measurement without interventions as older files hold it: baselines alone, heads as those that were read."""
    dims = {dim: f"read_{dim}" for dim in ("layer", "head") if dim in result.dims}
    return result.drop_vars([metric.name for metric in metrics]).rename(dims)


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


def _circuit(record: Record, stored: xr.DataTree) -> Repeat:
    """Of a study of a circuit."""
    from ..circuits.study import STAGES, CircuitStudy

    record.declared_task()  # refuses one of someone's own, in words
    study = CircuitStudy.from_json(record.attrs["study"])
    edges = consent.check_circuit(study, stored)

    def forward(model: Model) -> int:
        heads = model.shape.layers * model.shape.heads
        return edges + 50 * study.draws + 100 + 4 * heads + heads**2 // 2

    return Repeat(lambda model, say: study.run(model, lambda stage: say(STAGES[stage])), study.task, forward)


def _text(text: str, stored: xr.DataTree) -> Repeat:
    """Of a study of text, on the windows that the file holds."""
    from ..text.study import STAGES, TextInduction

    study = TextInduction.from_json(text)
    tokens = stored["windows"].to_dataset()["tokens"].values
    if tokens.shape[0] > study.n:
        raise ResultError(f"it asks for {study.n} windows and holds {tokens.shape[0]}: it contradicts itself")

    def forward(model: Model) -> int:
        changed = -(-4 * min(study.pairs, tokens.size) // len(tokens))
        return RUNS + changed + model.shape.layers * model.shape.heads + 2 * study.controls + study.untrained

    task = Prompts(tuple(tuple(map(int, row)) for row in tokens))
    return Repeat(lambda model, say: study.again(model, stored, lambda stage: say(STAGES[stage])), task, forward)


def _text_heads(record: Record) -> Repeat:
    """Of what heads do on text, on the text that a model holds itself: no file of someone's says what is read here."""
    from ..text.heads import OPTIONS, text_heads

    if record.attrs["text"] != HELD_OUT:
        raise ResultError(
            "its text lies outside the model, and no file says here what is read: run "
            f"hw.text_heads(model, text=...) with the text whose hash is {record.attrs['text_sha256']}"
        )
    asked = json_in(record.attrs, "text_heads", dict)
    if not {"n", "context"} <= {*asked} <= {*OPTIONS}:
        raise ResultError(f"its attribute text_heads is {asked}: it has other options than text_heads")
    windows, size = whole(asked["n"], "n"), whole(asked["context"], "context", low=1, high=2**20)

    def repeated(model: Model, say: Say) -> xr.Dataset:
        say("measuring again")
        again = text_heads(model, **asked)
        if again.attrs["text_sha256"] != record.attrs["text_sha256"]:
            raise ResultError(f"the text of {model.name} is not the one that the result was made on")
        return again

    def forward(model: Model) -> int:
        sets = 1 + 2 * whole(asked.get("controls", 0), "controls")
        return windows * (1 + model.shape.layers * model.shape.heads * (sets if sets > 1 else 0))

    return Repeat(repeated, Prompts(((0,) * size,)), forward)


def _open(
    source: Path,
    attrs: Mapping[str, Any],
    device: str,
    given: str | os.PathLike[str] | None,
    options: dict[str, Any],
    say: Say,
    yes: consent.Agree,
) -> Model:
    """The model that was given by name, or the one that the file names, where it ran; where the user agrees to that."""
    from ...interventions.load import load

    opening = partial(load, device=device, dtype=str(attrs["dtype"]))
    name, options, asks = (os.fspath(given), options, "") if given is not None else consent.place_of(source, attrs)
    if (ran := str(attrs.get("executed", "local"))) != "local":
        opening = partial(load, remote=True)
        consent.agree(source, f"to run on the server that is set here, with your key, as it ran on {ran[:80]!r}", yes)
    if asks:
        consent.agree(source, asks, yes)
    say(f"opening {given or attrs['model']}")
    return opening(name, **options)


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
