"""How to run a result again: the command and the Python lines, written from the declarations that it holds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import xarray as xr

from ...errors import HeadwiseError
from ...interventions.plan.estimators import STEPPED
from ..storage.attributes import json_in
from ..storage.record import LOOKS, Record
from ..storage.registry import known_metric

WRITTEN = 300
"""Characters up to which a declaration is written out; a longer one is read from the file."""
DEFAULTS = {
    **dict.fromkeys(("run", "base"), "clean"),
    "source": "corrupted",
    "per_position": False,
    "estimator": "exact",
    "seed": 0,
}
"""Options that are not written out."""


@dataclass(frozen=True)
class Recipe:
    """How to run a result again.

    Attributes
    ----------
    command : str
        For a shell.
    python : str
        Lines that can be run as they are.
    notes : tuple of str
        What must be put in by hand.
    """

    command: str
    python: str
    notes: tuple[str, ...] = ()


def recipe(attrs: Mapping[Any, Any], root: xr.Dataset, file: str) -> Recipe | None:
    """How to run a result again; None where it does not say what was run.

    Parameters
    ----------
    attrs : mapping
        Of the result.
    root : Dataset
        Its variables, where it is a measurement.
    file : str
        Name of the file that holds it.
    """
    record = Record.from_attrs(attrs)
    if not record.model or record.missing():
        return None
    try:
        if record.series:
            return _of_series(record, root, file)
        if record.study.get("type") == "FormationStudy":
            return _of_trainings(record, file)
        if record.study.get("type") == "TextInduction":
            return _of_text(record)
        if record.study.get("type") == "CircuitStudy":
            return _of_circuit(record, file)
        if record.kind == "text_heads":
            return _of_text_heads(record, file)
        return _of_study(record) if record.kind == "study" else _of_measurement(record, root, file)
    except (HeadwiseError, LookupError, ValueError, TypeError, AttributeError):
        return None  # declarations of someone's own, which no line can bring back


def _of_study(record: Record) -> Recipe:
    from ..analyses.induction import InductionStudy

    study = InductionStudy.from_json(record.attrs["study"])
    opening = {f"--{name}": value for name, value in record.opening.items()}
    sizes = {"--n": study.n, "--length": study.length, "--seed": study.seed}
    options = {"--model": record.model, **opening, **sizes}
    command = "headwise induction " + " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options.items())
    command += " --remote" if record.server else ""
    lines = [
        "import headwise as hw",
        "",
        _load(record),
        f"tree = hw.{study!r}.run(model)",
        'hw.write_netcdf(tree, "induction.nc")',
        'hw.write_report(tree, "induction.html")',
    ]
    default = InductionStudy(n=study.n, length=study.length, seed=study.seed)
    differ = [
        name for name in ("bos", "threshold", "draws", "untrained") if getattr(study, name) != getattr(default, name)
    ]
    notes = [f"The command does not set {', '.join(differ)}; the Python lines do."] if differ else []
    return Recipe(command, "\n".join(lines), (*notes, *_notes(record)))


def _of_trainings(record: Record, file: str) -> Recipe:
    """Of a study that trains its models itself."""
    from ..dynamics.formation import FormationStudy

    study = FormationStudy.from_json(record.attrs["study"])
    lines = ["import headwise as hw", "", f'tree = hw.{call(study)}.run(out="again.nc")', "hw.write_report(tree)"]
    note = "It trains every model again. Another machine or another version of torch rounds differently, which adds up."
    return Recipe(f"headwise rerun {shlex.quote(file)}", "\n".join(lines), (note,))


def _of_text(record: Record) -> Recipe:
    from ..text.study import TextInduction

    study = TextInduction.from_json(record.attrs["study"])
    default, names = TextInduction(), ("text", "prompts", "n", "context", "pairs", "controls", "ablation", "seed")
    given = {f"--{name}": getattr(study, name) for name in names if getattr(study, name) != getattr(default, name)}
    opening = {f"--{name}": value for name, value in record.opening.items()}
    options = {"--model": record.model, **opening, **given}
    command = "headwise text " + " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options.items())
    command += " --remote" if record.server else ""
    lines = [
        "import headwise as hw",
        "",
        _load(record),
        f"tree = hw.{call(study)}.run(model)",
        'hw.write_netcdf(tree, "text.nc")',
        'hw.write_report(tree, "text.html")',
    ]
    differ = [name for name in ("threshold", "untrained") if getattr(study, name) != getattr(default, name)]
    notes = [f"The command does not set {', '.join(differ)}; the Python lines do."] if differ else []
    return Recipe(command, "\n".join(lines), (*notes, *_notes(record)))


def _of_circuit(record: Record, file: str) -> Recipe:
    """Of the study of a circuit; on the command line where it has a task of that."""
    from ..circuits.study import CircuitStudy
    from ..tasks.tasks import RepeatedTokens

    study = CircuitStudy.from_json(record.attrs["study"])
    task, default = study.task, CircuitStudy(study.task)
    lines = ["import headwise as hw", "", _load(record)]
    text = f'hw.CircuitStudy.from_json(hw.open_result({file!r}).attrs["study"])'
    lines += [f"study = {text}", 'tree = study.run(model, out="again.nc")', "hw.write_report(tree)"]
    names = {"n": "edges", "then_exact": "then-exact", "steps": "ig-steps"}
    fields = ("metric", "estimator", "steps", "source", "share", "n", "draws", "then_exact")
    given = {
        f"--{names.get(name, name)}": getattr(study, name)
        for name in fields
        if getattr(study, name) != getattr(default, name)
    }
    if "--metric" in given:
        given["--metric"] = json_in(record.attrs, "study", dict)["metric"]
    if not isinstance(task, RepeatedTokens) or task != RepeatedTokens(task.n, task.length, study.seed):
        return Recipe(f"headwise rerun {shlex.quote(file)}", "\n".join(lines), _notes(record))
    opening = {f"--{name}": value for name, value in record.opening.items()}
    sizes = {"--n": task.n, "--length": task.length, "--seed": study.seed}
    options = {"--model": record.model, **opening, **sizes, **given}
    command = "headwise circuit " + " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options.items())
    return Recipe(command + (" --remote" if record.server else ""), "\n".join(lines), _notes(record))


def _of_text_heads(record: Record, file: str) -> Recipe:
    given = "" if record.attrs["text"] == "held_out" else f"{record.attrs['text']!r}, "
    asked = json_in(record.attrs, "text_heads", dict)
    options = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    python = f"import headwise as hw\n\n{_load(record)}\nds = hw.text_heads(model, {given}{options})\n"
    notes = () if not given else ("The text is not in the file, which holds its hash.",)
    command = "" if given else f"headwise rerun {shlex.quote(file)}"
    return Recipe(command, f'{python}hw.write_netcdf(ds, "again.nc")', (*notes, *_notes(record)))


def _of_series(record: Record, root: xr.Dataset, file: str) -> Recipe:
    """Of a study over checkpoints, or over a training that would have to be done again."""
    steps = [int(step) for step in root["step"].values]
    kind = str(record.study["type"])
    lines = ["import headwise as hw", "", f'study = hw.{kind}.from_json(hw.open_result({file!r}).attrs["study"])']
    if "training" not in record.attrs:
        lines.append(f'again = hw.over_checkpoints({record.model!r}, study, steps={steps}, out="again.nc")')
        return Recipe(f"headwise rerun {shlex.quote(file)}", "\n".join(lines), _notes(record))
    lines.append(f'watch = hw.StudyCallback(study, steps={steps}, out="again.nc")')
    note = "It was measured while a model was trained: train again with this callback, or name a folder of checkpoints."
    return Recipe(f"headwise rerun {shlex.quote(file)} --model CHECKPOINTS", "\n".join(lines), (note,))


def _of_measurement(record: Record, root: xr.Dataset, file: str) -> Recipe:
    """Of what is one call of a function: the same lines but for the call."""
    task, metrics, options = record.declared_task(), record.declared_metrics(), record.options(root)
    task_text, declared, lines = call(task), str(record.attrs.get(record.what, "null")), [_load(record)]
    if max(len(task_text), len(declared)) > WRITTEN:
        lines.append(f"stored = hw.open_result({file!r}).attrs")
    lines.append(f"task = hw.{task_text}" if len(task_text) <= WRITTEN else 'task = hw.from_json(stored["task"])')
    given = ["model", "task"]
    text = repr(declared) if len(declared) <= WRITTEN else f'stored["{record.what}"]'
    names = [f"hw.metrics.{(known_metric(metric.name) or (metric.name,))[0]}" for metric in metrics]
    if record.kind == "edge_scores":
        given += names
        if options.pop("edges") is not None:
            lines.append(f"edges = hw.from_json({text}).edges")
            given.append("edges=edges")
    elif record.declared_what() is not None:
        name = "sites" if record.kind == "capture" else "what"
        given.append(f"{name}={name}" if record.kind in LOOKS else name)
        lines.append(f"{name} = hw.from_json({text})")
    elif record.kind not in LOOKS:
        given.append("None")
    function = {"estimates": "compare_estimates", "measurement": "measure"}.get(record.kind, record.kind)
    if record.kind != "edge_scores":
        given += names if function == "compare_estimates" else [f"[{', '.join(names)}]"] if names else []
    if options.get("estimator") not in STEPPED and record.kind == "measurement":
        del options["steps"]
    if record.kind in LOOKS and len(str(options)) > WRITTEN:  # such as a direction
        lines += ["import json", f'options = json.loads(hw.open_result({file!r}).attrs["{record.kind}"])']
        given, options = [*given, "**options"], {"run": options["run"]}
    if options.pop("what", None) is not None:
        text = str(record.attrs["interventions"])
        if len(text) > WRITTEN and lines[1:2] != [f"stored = hw.open_result({file!r}).attrs"]:
            lines.insert(1, f"stored = hw.open_result({file!r}).attrs")
        given_text = repr(text) if len(text) <= WRITTEN else 'stored["interventions"]'
        lines.append(f"what = hw.from_json({given_text})")
        given.append("what=what")
    given += [f"{name}={value!r}" for name, value in options.items() if DEFAULTS.get(name) != value]
    lines += [f"ds = hw.{function}({', '.join(given)})", 'hw.write_netcdf(ds, "again.nc")']
    python = "\n".join(["import headwise as hw", "", *lines])
    return Recipe(f"headwise rerun {shlex.quote(file)}", python, _notes(record))


def _load(record: Record) -> str:
    """The line that opens the model."""
    dtype = str(record.attrs.get("dtype", "float32"))
    options: dict[str, object] = dict(record.opening)
    if record.server:
        options["remote"] = True
    elif dtype != "float32":
        options["dtype"] = dtype
    return f"model = hw.load({', '.join([repr(record.model), *(f'{k}={v!r}' for k, v in options.items())])})"


def _notes(record: Record) -> tuple[str, ...]:
    """What has to be known of the model to run it again."""
    server = f"It ran on {record.server}: NDIF_HOST in the environment names the server."
    notes = [server] if record.server else []
    if record.revision in ("memory", "local"):
        was = "an object in memory" if record.revision == "memory" else "a local folder"
        notes.append(f"The model was {was}: put the path of a folder with the same weights in the place of its name.")
    return tuple(notes)


def call(value: Any) -> str:
    """A frozen dataclass as the call that makes it, defaults left out unless they are numbers."""
    given = []
    for field in fields(value):
        own, default = getattr(value, field.name), field.default
        counts = isinstance(default, int) and not isinstance(default, bool)  # numbers are worth reading
        if default is MISSING or own != default or counts:
            chats = isinstance(own, tuple) and any(map(is_dataclass, own))
            text = f"({', '.join(f'hw.{call(one)}' for one in own)},)" if chats else repr(own)
            given.append(f"{field.name}={text}")
    return f"{type(value).__name__}({', '.join(given)})"
