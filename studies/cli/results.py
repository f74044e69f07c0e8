"""``headwise results``: list, show, query and export results in a folder."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, printable
from . import shared
from .shared import add_command, add_file, add_folder, add_json, add_question, add_variable, print_json, put, say

if TYPE_CHECKING:
    import pandas as pd

    from ..catalogue.results import Results

PROBLEMS = 10
"""Files that cannot be read, of which a listing says why."""
EXAMPLES = """  headwise results ls
  headwise results show results/induction-words-2l.nc
  headwise results query results ablation/loss --sort -effect --top 10
  headwise results export results heads/induction -o heads.csv
"""
LS = """  headwise results ls                                what is in results/
  headwise results ls /data/runs --model '*gpt2*'    models with gpt2 in it
  headwise results ls --where "study == 'measure' and size > 1e6"
  headwise results ls --where "date >= '2026-01-01'" --json
"""
SHOW = """  headwise results show results/induction-words-2l.nc
  headwise results show ablation.nc --all            every variable
"""
QUERY = """  headwise results query results heads/induction --sort -value --top 5
  headwise results query results/induction-words-2l.nc ablation/loss \\
      --where "effect > 0.5 and layer >= 1"
  headwise results query ablation.nc loss --sort layer,-effect --json
"""
EXPORT = """  headwise results export ablation.nc loss -o ablation.csv
  headwise results export results heads/induction --where "value > 0.4" \\
      -o heads.parquet
"""


def add(commands: Any) -> None:
    """Say how the commands are called."""
    words = "list, show, query and export results"
    parser = add_command(commands, "results", None, help=words, description=f"{words.capitalize()}.", examples=EXAMPLES)
    parser.set_defaults(run=lambda options: _help(parser))
    inner = parser.add_subparsers(title="commands", metavar="COMMAND")
    ls = add_command(
        inner,
        "ls",
        list_results,
        help="the results in a folder",
        description=(
            "List the results in a folder and the folders below it, one line each, and name the files that cannot be "
            "read. NetCDF files of other programs are passed over. In Python: hw.Results(folder)."
        ),
        examples=LS,
    )
    add_folder(ls, "where to look")
    ls.add_argument("--model", metavar="NAME", help="only of this model; * stands for anything")
    ls.add_argument("--study", metavar="NAME", help="only of this study, such as InductionStudy, measure or capture")
    ls.add_argument("--where", metavar="CONDITION", help=f"only results that meet it; columns are {', '.join(COLUMNS)}")
    ls.add_argument("--all", action="store_true", help="name NetCDF files that headwise did not write, too")
    add_json(ls, "print results and problems as JSON")
    show = add_command(
        inner,
        "show",
        show_result,
        help="what a result is and says",
        description="Say what a result is, of which model and task, what it found, and which variables it holds.",
        examples=SHOW,
    )
    add_file(show)
    show.add_argument("--all", action="store_true", help="every variable with shape and unit")
    add_json(show, "print the same as JSON")
    query = add_command(
        inner,
        "query",
        query_results,
        help="a variable as a table",
        description=(
            "Print a variable of one result, or of all results in a folder, as a table: a row for each cell, the mean "
            "over examples, with the effect against the run without intervention where that was measured."
        ),
        examples=QUERY,
    )
    add_file(query, "PLACE", "a result, or a folder of results")
    add_variable(query)
    add_question(query)
    add_json(query, "print the rows as JSON")
    export = add_command(
        inner,
        "export",
        export_table,
        help="a variable as a CSV or Parquet file",
        description="Write the table that `headwise results query` prints to a CSV or Parquet file.",
        examples=EXPORT,
    )
    add_file(export, "PLACE", "a result, or a folder of results")
    add_variable(export)
    add_question(export)
    export.add_argument("-o", "--out", required=True, metavar="OUT", help="file to write, in .csv or .parquet")


COLUMNS = ("path", "model", "study", "task", "size", "date", "version", "state", "seed", "step", "revision")


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2


def list_results(options: argparse.Namespace) -> int:
    """Print the catalogue of a folder."""
    from ..catalogue.results import Results

    everything = Results(options.folder, all=options.all)
    found = everything.select(model=options.model, study=options.study, where=options.where)
    if options.json:
        rows = [asdict(entry) for entry in found]
        print_json({"results": rows, "problems": [asdict(problem) for problem in found.problems]})
        return 0
    _print_listing(found, everything)
    for problem in found.problems[:PROBLEMS]:
        say(f"cannot be read: {problem}")
    if len(found.problems) > PROBLEMS:
        say(f"... and {len(found.problems) - PROBLEMS} more: --json lists them all")
    return 0


def _print_listing(found: Results, everything: Results) -> None:
    from ..catalogue.listing import rich_table

    put(found.title)
    if len(found):
        shared.print_table(lambda wide: rich_table(found.entries, wide))
    elif len(everything):
        models, studies = ({printable(getattr(entry, name)) for entry in everything} for name in ("model", "study"))
        say(f"none matches: models are {', '.join(sorted(models))}; studies are {', '.join(sorted(studies))}")


def show_result(options: argparse.Namespace) -> int:
    """Print the summary of a result."""
    from ..catalogue.summary import summary

    said = summary(options.file)
    if options.json:
        print_json({"file": options.file} | said.as_dict())
    else:
        put(said.text(shared.width(), full=options.all))
    return 0


def query_results(options: argparse.Namespace) -> int:
    """Print a variable as a table."""
    frame = _table(options)
    if options.json:
        print_json(shared.records(frame))
        return 0
    _print_frame(frame)
    return 0


def _table(options: argparse.Namespace) -> pd.DataFrame:
    from ..catalogue.results import Results
    from ..catalogue.table import table
    from ..storage.netcdf import reading
    from ..storage.reading import open_result

    question = {"where": options.where, "sort": options.sort, "top": options.top}
    place = Path(options.place).expanduser()
    if place.is_dir():
        return Results(place).table(options.variable, **question)
    result = open_result(place)
    with reading(place):
        return table(result, options.variable, **question)


def _print_frame(frame: pd.DataFrame) -> None:
    from ..catalogue.listing import cell, lined_table

    texts = {str(name): [_shown(value) for value in frame[name]] for name in frame.columns}
    names, shared_by_all = _columns_that_fit(texts, shared.width(shared.UNCUT))
    table = lined_table()
    for name in names:
        number = frame[name].dtype.kind in "iuf"
        whole = number or name == "name"
        table.add_column(cell(name), justify="right" if number else "left", overflow="fold", no_wrap=whole)
    for row in zip(*(texts[name] for name in names), strict=True):
        table.add_row(*map(cell, row))
    words = [str(frame.attrs[name]) for name in ("long_name", "units") if frame.attrs.get(name)]
    if words:
        put(f"{frame.attrs['variable']}: {', '.join(word if word != '1' else 'no unit' for word in words)}")
    shared.print_table(lambda wide: table)
    if shared_by_all:
        put(shared.fill(f"in all rows: {', '.join(shared_by_all)}"))
    if frame.attrs.get("comment"):
        put(shared.fill(frame.attrs["comment"]))
    if frame.empty:
        say("no row meets the condition")


def _columns_that_fit(texts: dict[str, list[str]], wide: int) -> tuple[list[str], list[str]]:
    """The columns of a table in a window, and those with one value in all rows that are told beneath it instead.

    Where that is not enough, ``layer`` and ``head`` go too, which ``name`` holds.
    """

    def is_wide() -> bool:
        return sum(2 + max(map(len, [name, *texts[name]])) for name in names) - 2 > wide

    names, told = list(texts), []
    if is_wide():
        for name, values in texts.items():
            if len(values) > 1 and len(set(values)) == 1 and name not in ("name", "value", "effect"):
                names.remove(name)
                told.append(f"{name} {values[0]}")
    if is_wide() and "name" in names:
        names = [name for name in names if name not in ("layer", "head")]
    return names, told


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def export_table(options: argparse.Namespace) -> int:
    """Write a variable as a file."""
    from ..storage.files import check_writable, write_beside

    kind = Path(options.out).suffix.lower()
    if kind not in (".csv", ".parquet"):
        raise DeclarationError(f"--out {options.out}: end it in .csv or .parquet")
    if kind == ".parquet":
        try:
            import_module("pyarrow")  # what pandas writes Parquet with
        except ImportError:
            raise DeclarationError(
                "writing Parquet needs pyarrow: pip install 'headwise[parquet]', or export to .csv"
            ) from None
    target = check_writable(options.out)
    frame = _table(options)
    if kind == ".csv":
        write_beside(target, lambda beside: frame.to_csv(beside, index=False))
    else:
        write_beside(target, lambda beside: frame.to_parquet(beside, index=False))
    put(f"{shared.shown(target)}  {len(frame)} rows of {', '.join(map(str, frame.columns))}")
    return 0
