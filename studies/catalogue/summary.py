"""What a result is and says, short enough to read: for a terminal and for a notebook."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Any

import xarray as xr

from ...errors import ResultError, printable
from ..inspection.findings import findings as sentences
from ..measuring.effects import effect
from ..output.phrases import count, listed
from ..storage.attributes import LONGEST, json_in, with_plain_attrs
from ..storage.netcdf import reading, why
from ..storage.reading import Result, open_result
from ..storage.record import KINDS, LOOKS, Record
from .description import model_of, nodes, task_in_words, what_of, when_of
from .listing import html_table
from .table import PREFIXES, SUFFIXES, has_effect, mean_of, rows_of

STRONGEST = 5
"""Effects named for each metric."""
WIDEST = 44
"""Characters to which columns are aligned."""
MOST_OVER_TRAINING = 12
"""Metrics of a study over steps of training that are named."""
MOST = 50
"""Findings that are shown."""


@dataclass(frozen=True)
class Variable:
    """A variable of a result.

    Attributes
    ----------
    name : str
    shape : str
        ``dim size`` of each dim.
    units : str
    long_name : str
        What it is.
    """

    name: str
    shape: str
    units: str
    long_name: str


@dataclass(frozen=True)
class Part:
    """A group of a result (or all of a Dataset, under the name ``""``) with its variables."""

    name: str
    long_name: str
    variables: tuple[Variable, ...]


@dataclass(frozen=True)
class Summary:
    """What a result is and says. Shown as text, and in a notebook as a table.

    Attributes
    ----------
    title : str
    facts : tuple of (str, str)
        What it is, of which model, on which task, when and how long.
    heading : str
        What the points are: findings of a study, or the strongest effects of a measurement.
    points : tuple of str
    parts : tuple of Part
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    heading: str
    points: tuple[str, ...]
    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        return self.text()

    def text(self, width: int = 100, *, full: bool = False) -> str:
        """The summary as text.

        Parameters
        ----------
        width : int
            Characters in a line.
        full : bool
            Every variable with shape and unit, also where there are several groups.
        """
        self = _shown(self)
        lines = [self.title]
        wide = max((len(name) for name, _ in self.facts), default=0)
        for name, value in self.facts:
            lines += _hanging(f"  {name:<{wide}}  ", value, width)
        if self.points:
            lines += ["", self.heading]
            for point in self.points:
                lines += _hanging("  - ", point, width)
        lines += ["", "variables"]
        for part in self.parts:
            if len(self.parts) == 1 or full:
                lines += [f"  {part.name}: {part.long_name}".rstrip(": ")] if part.name else []
                lines += _columns([_cells(one) for one in part.variables], "    " if part.name else "  ", width)
            else:
                lines += _hanging(f"  {part.name}: ", _in_brief(part), width, "      ")
        return "\n".join(line.rstrip() for line in lines)

    def as_dict(self) -> dict[str, Any]:
        """The summary as data that JSON can hold."""
        return asdict(self) | {"facts": dict(self.facts)}

    def _repr_html_(self) -> str:
        self = _shown(self)
        facts = "".join(
            f'<tr style="background: transparent"><th scope="row" style="text-align: left; padding: 0 1em 0 0; '
            f'vertical-align: top; border: 0">{escape(name)}</th><td style="text-align: left; border: 0; padding: 0">'
            f"{escape(value)}</td></tr>"
            for name, value in self.facts
        )
        blocks = [
            f'<div style="font-size: 1.15em; font-weight: 600; margin: .2em 0">{escape(self.title)}</div>',
            f'<table style="border: 0; color: inherit; margin: 0"><tbody>{facts}</tbody></table>',
        ]
        if self.points:
            items = "".join(f"<li>{escape(point)}</li>" for point in self.points)
            blocks.append(f'<div style="font-weight: 600; margin-top: .6em">{escape(self.heading)}</div>')
            blocks.append(f'<ul style="margin: .2em 0; max-width: 60em">{items}</ul>')
        for part in self.parts:
            table = html_table(("variable", "shape", "unit", "what it is"), [_cells(one) for one in part.variables])
            words = f"{part.name}: {part.long_name}".rstrip(": ") if part.name else "variables"
            opened = " open" if len(self.parts) == 1 else ""
            said = f"{escape(words)} ({count(len(part.variables), 'variable')})"
            blocks.append(f"<details{opened}><summary>{said}</summary>{table}</details>")
        return f'<div style="color: inherit">{"".join(blocks)}</div>'


def _shown(value: Any) -> Any:
    """A summary, or a part of one, whose texts are fit to be shown, each in one line."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, tuple):
        return tuple(_shown(one) for one in value)
    return replace(value, **{one.name: _shown(getattr(value, one.name)) for one in fields(value)})


def summary(result: Result | str | os.PathLike[str]) -> Summary:
    """What a result is and says, in short.

    Parameters
    ----------
    result : Dataset, DataTree, str or path
        From `measure`, `capture` or a study; a dataset built by hand; or a file with one of these.

    Returns
    -------
    Summary
        Text when it is printed, a block in a notebook.

    Raises
    ------
    ResultError
        The file cannot be read.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, hw.ZeroAblate(hw.Head(0, 3)))
    >>> print(hw.summary(ds))  # doctest: +ELLIPSIS
    Measurement of words-2l
      what   1 condition of ZeroAblate on the clean run, by loss
      model  words-2l (shipped): 2 layers of 8 heads
      task   4 prompts in which 8 random tokens are repeated once, seed 0
    ...
    """
    if isinstance(result, xr.Dataset | xr.DataTree):
        return _summary(result)
    opened = open_result(result)
    with reading(Path(result)):
        return _summary(opened)


def _summary(given: Result) -> Summary:
    result: Result = with_plain_attrs(given)
    attrs = result.attrs
    findings = [one for one in json_in(attrs, "conclusion", list) if isinstance(one, dict)]
    points = [str(one.get("text", ""))[:LONGEST] for one in findings if one.get("group") == "summary"][:MOST]
    limits = sum(one.get("group") == "limits" for one in findings)
    if points and limits:
        points.append(f"What was not shown: {count(limits, 'limit')}, in the report.")
    heading = "findings"
    record = Record.from_attrs(attrs)
    if record.series:
        points, heading = over_training(result), "over training"
    elif record.kind in LOOKS and isinstance(result, xr.Dataset):
        points = sentences(result)
    elif not points and isinstance(result, xr.Dataset):
        points, heading = list(_strongest(result)), "strongest effects"
    of = f" of {record.model}" if record.model else ""
    title = str(attrs.get("title") or f"{KINDS[record.kind].capitalize()}{of}")
    facts = {"what": what_of(result, record), "model": model_of(record), "task": task_in_words(record.task)}
    facts["when"] = when_of(record)
    shown = tuple((name, value[:LONGEST]) for name, value in facts.items() if value)
    return Summary(title[:LONGEST], shown, heading, tuple(points), tuple(_parts(result)))


def over_training(result: Result) -> list[str]:
    """Of a study over steps of training, what each metric was at the first and at the last step, in sentences."""
    said = []
    for _, ds in nodes(result):
        for name, values in ds.data_vars.items():
            dims = {*map(str, values.dims)} - {"example"}
            aside = str(name).startswith(("baseline_", "chance_", "control_"))
            if aside or "metric" not in values.attrs or dims not in ({"step"}, {"step", "layer", "head"}):
                continue
            mean, unit = mean_of(values), str(values.attrs.get("units", "1"))
            what = str(values.attrs.get("long_name", name)).removesuffix(", no intervention")
            ends = []
            for at in (0, -1):
                here, best = mean.isel(step=at), ""
                if "layer" in dims and bool(here.notnull().any()):
                    top = here.stack(one=("layer", "head")).idxmax("one").item()
                    here, best = here.max(), f" (L{top[0]}H{top[1]})"
                unit_said = "" if unit == "1" else f" {unit}"
                ends.append(f"{float(here):.3g}{unit_said}{best} at step {mean['step'].values[at]}")
            which = f"the largest {what} of a head" if "layer" in dims else f"the {what}"
            if not any(end.startswith("nan") for end in ends):
                said.append(f"{which} is {ends[0]} and {ends[1]}")
    return said[:MOST_OVER_TRAINING]


def _strongest(ds: xr.Dataset) -> Iterator[str]:
    """For each measured metric, the conditions that change it most."""
    for name in map(str, ds.data_vars):
        if not has_effect(ds, name):
            continue
        try:
            change = mean_of(effect(ds, name)).load()
        except ResultError as error:
            yield f"{name} cannot be read: {why(error)}"
            continue
        change = change.mean([dim for dim in ("position", "read_layer", "read_head") if dim in change.dims])
        frame = rows_of(change.to_dataset(name="change"), "change").dropna(subset=["value"])
        frame = frame.sort_values("value", key=abs, ascending=False, kind="stable").head(STRONGEST)
        unit = str(ds[name].attrs.get("units", "1"))
        before = float(mean_of(ds[f"baseline_{name}"].sel(run=ds.attrs["base"])).mean())
        changes = [f"{_condition(row, change.dims)} {row['value']:+.3g}" for row in frame.to_dict("records")]
        said = f"changed most by {listed(changes)}" if changes else "no change was measured"
        yield f"{name} is {before:.3g}{'' if unit == '1' else f' {unit}'} without intervention; {said}"


def _condition(row: Mapping[str, Any], dims: tuple[Any, ...]) -> str:
    """``L1H2 k``, ``L0N17``, ``layer 1 position 5``; without dims, ``the intervention``."""
    part = next((one for one in ("head", "neuron") if {"layer", one} <= set(dims)), "")
    words = [str(row["name"])] if part else []
    rest = [dim for dim in dims if not part or dim not in ("layer", part)]
    words += [str(row[dim]) if isinstance(row[dim], str) else f"{dim} {row[dim]}" for dim in rest]
    return " ".join(words) or "the intervention"


def _parts(result: Result) -> Iterator[Part]:
    for path, ds in nodes(result):
        found = [
            Variable(
                str(name),
                " x ".join(f"{dim} {size}" for dim, size in array.sizes.items()) or "one value",
                str(array.attrs.get("units", "text" if array.dtype.kind in "OUT" else "")),
                str(array.attrs.get("long_name", "")),
            )
            for name, array in ds.data_vars.items()
        ]
        yield Part(path, str(ds.attrs.get("long_name", "")), tuple(found))


def _in_brief(part: Part) -> str:
    """A group on a line or two: what it is, and its variables but for what stands beside them."""
    names = {one.name for one in part.variables}
    beside = {f"{name}_{end}" for name in names for end in SUFFIXES} | {
        f"{start}_{name}" for name in names for start in (*PREFIXES, "baseline", "untrained")
    }
    main = [one.name for one in part.variables if one.name not in beside]
    rest = len(names) - len(main)
    more = f"; and {rest} with intervals, q and the like" if rest else ""
    return f"{part.long_name}{': ' if part.long_name else ''}{', '.join(main)}{more}"


def _cells(one: Variable) -> list[str]:
    return [one.name, one.shape, one.units, one.long_name]


def _columns(rows: list[list[str]], indent: str, width: int) -> list[str]:
    """Rows as columns, aligned as far as lines are not too long; the last one is cut where the line ends."""
    wide = [min(max((len(row[at]) for row in rows), default=0), WIDEST) for at in range(3)]
    lines = []
    for row in rows:
        line = indent + "  ".join(row[at].ljust(wide[at]) for at in range(3)) + "  "
        room = width - len(line)
        words = row[3] if len(row[3]) <= room else f"{row[3][: room - 1]}…" if room > len(indent) else ""
        lines.append(line + words)
    return lines


def _hanging(first: str, text: str, width: int, rest: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first) if rest is None else rest,
        break_on_hyphens=False,
    ) or [first]
