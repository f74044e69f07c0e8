"""How to run a result again: the command and the Python lines, written from the declarations that it holds."""

from __future__ import annotations

import io
import keyword
import shlex
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import product
from typing import Any

import xarray as xr

from ...errors import HeadwiseError
from ...interventions.declare import codec
from ...interventions.declare.edits import Intervention
from ...interventions.declare.grid import Grid
from ...interventions.declare.steering import SHOWN, Add
from ..storage.registry import TASKS, metric_names
from .rerun import estimator_of, is_per_position, stored_metrics

KEPT_PLACES = ("main", "local", "memory", "shipped")
"""Revisions that a model has without being asked for one."""
WRITTEN = 2500
"""Characters up to which a declaration is written out; a longer one is read from the file."""


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
    try:
        if "model" not in attrs:
            return None
        if "study" in attrs:
            return _of_study(attrs, file)
        measured = {"interventions", "metrics", "base"} <= {*attrs} and ("estimator" in attrs or "estimators" in attrs)
        if "task" in attrs and (measured or "sites" in attrs):
            return _of_measurement(attrs, root, file)
    except (
        HeadwiseError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ):  # declarations of someone's own, which no line can bring back
        return None
    return None


def _of_study(attrs: Mapping[Any, Any], file: str) -> Recipe:
    from ..analyses.induction import InductionStudy

    study, model = InductionStudy.from_json(attrs["study"]), str(attrs["model"])
    revision = str(attrs.get("model_revision", "main"))
    hub = {} if revision in KEPT_PLACES else {"--revision": revision}
    options = {"--model": model, **hub, "--n": study.n, "--length": study.length, "--seed": study.seed}
    command = "headwise induction " + " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options.items())
    command += " --remote" if _server(attrs) else ""
    lines = [
        "import headwise as hw",
        "",
        _load(attrs),
        f"tree = hw.{study!r}.run(model)",
        'hw.write_netcdf(tree, "induction.nc")',
        'hw.write_report(tree, "induction.html")',
    ]
    default = InductionStudy(n=study.n, length=study.length, seed=study.seed)
    differ = [
        name for name in ("bos", "threshold", "draws", "untrained") if getattr(study, name) != getattr(default, name)
    ]
    notes = [f"The command does not set {', '.join(differ)}; the Python lines do."] if differ else []
    return Recipe(command, "\n".join(lines), (*notes, *_of_model(attrs)))


def _of_measurement(attrs: Mapping[Any, Any], root: xr.Dataset, file: str) -> Recipe:
    """Of `measure`, `compare_estimates` and `capture`: the same lines but for the call."""
    task = codec.from_json(attrs["task"], TASKS)
    what = codec.from_json(attrs["sites" if "sites" in attrs else "interventions"], TASKS)
    names, options = _metrics_and_options(attrs, root)
    function = "capture" if "sites" in attrs else "compare_estimates" if "estimators" in attrs else "measure"
    task_text: str | None = call(task)
    task_text = task_text if task_text and len(task_text) <= WRITTEN else None
    declared = None if what is None else written(what)
    lines, stored = [_load(attrs)], task_text is None or (what is not None and declared is None)
    if stored:
        lines.append(f"stored = hw.open_result({file!r}).attrs")
    lines.append(f"task = hw.{task_text}" if task_text else 'task = hw.from_json(stored["task"])')
    if what is not None:
        key = "sites" if "sites" in attrs else "interventions"
        lines.append(f"what = {_public(declared)}" if declared else f'what = hw.from_json(stored["{key}"])')
    given = ["model", "task", "what" if what is not None else "None"]
    names = [f"hw.metrics.{name}" for name in names]
    given += [names[0] if function == "compare_estimates" else f"[{', '.join(names)}]"] if names else []
    given += [f"{name}={value!r}" for name, value in options.items()]
    lines += [f"ds = hw.{function}({', '.join(given)})", 'hw.write_netcdf(ds, "again.nc")']
    python = "\n".join(["import headwise as hw", "", *lines])
    return Recipe(f"headwise rerun {shlex.quote(file)}", python, _of_model(attrs))


def _metrics_and_options(attrs: Mapping[Any, Any], root: xr.Dataset) -> tuple[list[str], dict[str, object]]:
    """Names of the metrics in `headwise.metrics`, and the options that are not the defaults."""
    if "sites" in attrs:
        return [], {} if attrs.get("run", "clean") == "clean" else {"run": str(attrs["run"])}
    metrics = stored_metrics(attrs)
    names = [metric_names()[metric.name][0] for metric in metrics]
    options: dict[str, object] = {"base": str(attrs["base"])} if attrs["base"] != "clean" else {}
    if "estimators" in attrs:
        options["estimators"] = codec.read_json(attrs["estimators"])
        return names, options | ({"steps": int(attrs["steps"])} if "steps" in attrs else {})
    estimator, steps = estimator_of(attrs)
    options |= {"per_position": True} if is_per_position(root, metrics) else {}
    options |= {"estimator": estimator} if estimator != "exact" else {}
    return names, options | ({"steps": steps} if estimator == "integrated" else {})


def _load(attrs: Mapping[Any, Any]) -> str:
    """The line that opens the model."""
    revision, dtype = str(attrs.get("model_revision", "main")), str(attrs.get("dtype", "float32"))
    options: dict[str, object] = {} if revision in KEPT_PLACES else {"revision": revision}
    if _server(attrs):
        options["remote"] = True
    elif dtype != "float32":
        options["dtype"] = dtype
    return f"model = hw.load({', '.join([repr(str(attrs['model'])), *(f'{k}={v!r}' for k, v in options.items())])})"


def _server(attrs: Mapping[Any, Any]) -> str:
    """The server that ran it; nothing where it ran on the machine itself."""
    where = str(attrs.get("executed", "local"))
    return "" if where == "local" else where


def _of_model(attrs: Mapping[Any, Any]) -> tuple[str, ...]:
    """What has to be known of the model to run it again."""
    revision, server = str(attrs.get("model_revision", "main")), _server(attrs)
    notes = [f"It ran on {server}: NDIF_HOST in the environment names the server."] if server else []
    if revision in ("memory", "local"):
        was = "an object in memory" if revision == "memory" else "a local folder"
        notes.append(f"The model was {was}: put the path of a folder with the same weights in the place of its name.")
    return tuple(notes)


def call(value: Any) -> str:
    """A frozen dataclass as the call that makes it, defaults left out unless they are numbers."""
    given = []
    for field in fields(value):
        own, default = getattr(value, field.name), field.default
        counts = isinstance(default, int) and not isinstance(default, bool)  # numbers are worth reading
        if default is MISSING or own != default or counts:
            given.append(f"{field.name}={own!r}")
    return f"{type(value).__name__}({', '.join(given)})"


def written(what: Intervention | Mapping[str, Intervention] | Grid | tuple[Any, ...]) -> str | None:
    """Interventions (or sites) as Python that makes them, a grid by a rule where there is one; None where too long."""
    if isinstance(what, tuple):
        text = f"[{', '.join(map(repr, what))}]"
        return text if len(text) <= WRITTEN else None
    every = _each(what)
    if any(isinstance(edit, Add) and len(edit.vector) > SHOWN for one in every for edit in one.edits()):
        return None  # its repr does not say its numbers
    if isinstance(what, Intervention):
        text = repr(what)
    elif isinstance(what, Grid):
        text = by_rule(what) or _in_full(what)
    else:
        text = "{\n" + "".join(f"    {name!r}: {one!r},\n" for name, one in what.items()) + "}"
    return text if len(text) <= WRITTEN else None


def _each(what: Intervention | Mapping[str, Intervention] | Grid) -> list[Intervention]:
    if isinstance(what, Intervention):
        return [what]
    return list(what.interventions if isinstance(what, Grid) else what.values())


def _in_full(grid: Grid) -> str:
    lines = "".join(f"    {one!r},\n" for one in grid.interventions)
    return f"Grid.of({list(grid.axes)!r}, [\n{lines}])"


def by_rule(grid: Grid) -> str | None:
    """``Grid(lambda layer, head: ..., layer=range(2), head=range(8))`` where one rule in the axes makes them all.

    The interventions' reprs are read word by word: what is the same in all is kept, and what is everywhere the value
    of an axis is written as that axis.
    """
    names = [name for name, _ in grid.axes]
    taken = {*codec.TABLE, "make", "self", "range"}
    if any(not name.isidentifier() or keyword.iskeyword(name) or name in taken for name in names):
        return None
    texts = [_words(repr(one)) for one in grid.interventions]
    if len({len(text) for text in texts}) > 1:
        return None
    places = list(product(*(values for _, values in grid.axes)))
    rule: list[str] = []
    for number in range(len(texts[0])):
        column = [text[number] for text in texts]
        if len({*column}) == 1:
            rule.append(column[0])
            continue
        for axis, name in enumerate(names):
            values = [place[axis] for place in places]
            if column == [repr(value) for value in values]:
                rule.append(name)
                break
            if column == [str(value) for value in values] and rule and rule[-1] == ".":
                rule[-1] = ".site(" + name + ")"  # a component that an axis names
                break
        else:
            return None
    axes = ", ".join(f"{name}={_values(values)}" for name, values in grid.axes)
    made = f"lambda {', '.join(names)}: {_joined(rule)}"
    line = f"Grid({made}, {axes})"
    return line if len(line) <= 100 else f"Grid(\n    {made},\n    {axes},\n)"


def _values(values: Sequence[int | str]) -> str:
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values) and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"range({numbers[-1] + 1})" if numbers[0] == 0 else f"range({numbers[0]}, {numbers[-1] + 1})"
    return repr(list(values))


def _words(text: str) -> list[str]:
    """The tokens of a Python expression; a minus and its number are one."""
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    words: list[str] = []
    for token in found:
        if token.string.strip() and words and words[-1] == "-" and token.type == tokenize.NUMBER:
            words[-1] += token.string
        elif token.string.strip():
            words.append(token.string)
    return words


def _joined(words: Iterable[str]) -> str:
    """Tokens as text, with a space after a comma."""
    return "".join(f"{word} " if word == "," else word for word in words)


def _public(text: str) -> str:
    """Declarations as they are written with ``import headwise as hw``; what stands in quotes stays."""
    lines = text.splitlines(keepends=True)
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(text).readline))):
        if token.type == tokenize.NAME and token.string in codec.TABLE:
            row, column = token.start
            lines[row - 1] = f"{lines[row - 1][:column]}hw.{lines[row - 1][column:]}"
    return "".join(lines)
