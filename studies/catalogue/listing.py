"""How a catalogue shows itself: a table for a terminal, and one for a notebook."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

from ...errors import printable
from ..output.phrases import count

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from .entries import Entry, Problem

SHOWN = 30
"""Rows and problems that a catalogue shows of itself."""
FEW = 5
HEADS = ("path", "model", "step", "study", "task", "size", "date", "state")
GAP = 2
"""Characters between columns."""
NARROW = (("task", 14), ("date", 10), ("model", 16), ("task", 0), ("study", 8), ("path", 20))
"""Columns that give way on a narrow terminal, in this order, and to what width; to 0 is to be left out."""
MEGA, KILO = 1e6, 1e3
STYLE = "text-align: left; padding: .15em .8em .15em 0; border: 0; background: transparent; color: inherit"
"""Colours are those of the page, so that it reads on a light one and on a dark one."""


def human_size(size: float) -> str:
    """Bytes as ``1.2 MB``."""
    return f"{size / MEGA:.1f} MB" if size >= MEGA else f"{size / KILO:.1f} kB" if size >= KILO else f"{size:.0f} B"


def human_date(date: str) -> str:
    """ISO 8601 to the minute."""
    try:
        return datetime.fromisoformat(date).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return date


def cells_of(entry: Entry) -> list[str]:
    """The texts of a row, in the order of `HEADS`, fit to be shown."""
    size, date = human_size(entry.size), human_date(entry.date)
    step = "" if entry.step is None else str(entry.step)
    return [printable(one) for one in (entry.path, entry.model, step, entry.study, entry.task, size, date, entry.state)]


def heads_of(entries: Sequence[Entry]) -> list[str]:
    """The columns that say something: steps where a model has one, states where a result is not finished."""
    steps = any(entry.step is not None for entry in entries)
    states = any(entry.state != "complete" for entry in entries)
    return [name for name in HEADS if {"step": steps, "state": states}.get(name, True)]


def headline(entries: Sequence[Entry], problems: Sequence[Problem], where: object, selected: bool) -> str:
    """Say how many results a folder has, how many are not finished, and how many files cannot be read.

    Parameters
    ----------
    entries : sequence of Entry
    problems : sequence of Problem
    where : object
        The folder; its text is shown.
    selected : bool
        Whether `entries` are a selection from the folder.

    Returns
    -------
    str
        One line, fit to be shown.
    """
    partial = sum(entry.state == "partial" for entry in entries)
    parts = [count(len(entries), "selected result" if selected else "result")]
    parts += [f"{partial} not finished"] if partial else []
    parts += [f"{count(len(problems), 'file')} that cannot be read"] if problems else []
    return printable(f"{where}: {', '.join(parts)}")


def cell(text: object) -> Text:
    """Text as a cell or a heading of a table: nothing in it steers the terminal, and nothing is a style."""
    from rich.text import Text

    return Text(printable(text))


def lined_table() -> Table:
    """An empty table with a line under its headings, a plain one where the output has no finer sign."""
    from rich.box import SIMPLE_HEAD, Box
    from rich.table import Table

    line = SIMPLE_HEAD
    try:
        str(line).encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        line = Box(str(line).replace("\u2500", "-"), ascii=True)
    return Table(box=line, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0), collapse_padding=True)


def rich_table(entries: Sequence[Entry], width: int) -> Table:
    """Rows as a table of at most `width` characters; where that is narrow, task, date and model give way first."""
    rows = [cells_of(entry) for entry in entries]
    heads = heads_of(entries)
    wide = {name: max(len(name), *(len(row[at]) for row in rows)) for at, name in enumerate(HEADS) if name in heads}
    for name, least in NARROW:
        over = sum(wide.values()) + GAP * (len(wide) - 1) - width
        if over > 0 and name in wide:
            least = min(least, wide[name])
            wide[name] = least if name == "date" else max(least, wide[name] - over)  # no half an hour
            if wide[name] == 0:
                del wide[name]
    table = lined_table()
    for name in wide:
        right, whole = name in ("size", "step"), name == "path"
        table.add_column(
            name,
            justify="right" if right else "left",
            width=wide[name],
            no_wrap=not whole,
            overflow="fold" if whole else "crop" if name == "date" else "ellipsis",
        )
    for row in rows:
        table.add_row(*(cell(text) for name, text in zip(HEADS, row, strict=True) if name in wide))
    return table


def as_text(entries: Sequence[Entry], problems: Sequence[Problem], title: str, width: int = 110) -> str:
    """Write entries as text: the title, a table of the first entries, the first problems.

    Parameters
    ----------
    entries : sequence of Entry
        At most `SHOWN` are written, the rest is counted.
    problems : sequence of Problem
        At most `FEW` are written, the rest is counted.
    title : str
        The first line.
    width : int
        Characters of a line of the table.

    Returns
    -------
    str
        Several lines.
    """
    from rich.console import Console

    lines = [title]
    if entries:
        out = StringIO()
        # In a notebook, rich would show the table as well.
        table = rich_table(entries[:SHOWN], width)
        Console(file=out, width=width, highlight=False, color_system=None, force_jupyter=False).print(table)
        lines += (line.rstrip() for line in out.getvalue().splitlines())
    if len(entries) > SHOWN:
        lines.append(f"... and {len(entries) - SHOWN} more")
    lines += (f"cannot be read: {problem}" for problem in problems[:FEW])
    if len(problems) > FEW:
        lines.append(f"... and {len(problems) - FEW} more, in .problems")
    return "\n".join(lines)


def as_html(entries: Sequence[Entry], problems: Sequence[Problem], title: str) -> str:
    """Entries for a notebook; the table takes its colours from the page."""
    parts = [f"<div><strong>{escape(title)}</strong></div>"]
    if entries:
        heads = heads_of(entries)
        rows = [dict(zip(HEADS, cells_of(entry), strict=True)) for entry in entries[:SHOWN]]
        parts.append(html_table(heads, [[row[name] for name in heads] for row in rows]))
    if len(entries) > SHOWN:
        parts.append(f"<div>and {len(entries) - SHOWN} more</div>")
    if problems:
        items = "".join(f"<li>{escape(str(problem))}</li>" for problem in problems[:SHOWN])
        more = f"<li>and {len(problems) - SHOWN} more</li>" if len(problems) > SHOWN else ""
        words = f"{count(len(problems), 'file')} that cannot be read"
        parts.append(f"<details><summary>{words}</summary><ul>{items}{more}</ul></details>")
    return "".join(parts)


def html_table(heads: Sequence[str], rows: list[list[str]]) -> str:
    """A plain table whose colours are those of the page around it."""
    line = "border-bottom: 1px solid currentColor"
    head = "".join(f'<th scope="col" style="{STYLE}; {line}">{escape(name)}</th>' for name in heads)
    body = "".join(
        "<tr style='background: transparent'>"
        + "".join(f'<td style="{STYLE}; vertical-align: top">{escape(text)}</td>' for text in row)
        + "</tr>"
        for row in rows
    )
    return (
        '<div style="overflow-x: auto"><table style="border-collapse: collapse; color: inherit">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
