"""``headwise report``: the report of a result, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...errors import DeclarationError
from .shared import add_command, add_file, put, shown

EXAMPLES = """  headwise report results/induction-words-2l.nc      beside it, in .html
  headwise report ablation.nc -o ablation-report.html
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "report",
        run,
        help="the report of a result, one HTML file",
        description=(
            "Write the report of a study or a measurement: the question, the answer, figures, tables, what was run and "
            "how to run it again. It is one file that opens without a network."
        ),
        examples=EXAMPLES,
    )
    add_file(parser)
    parser.add_argument("-o", "--out", metavar="OUT", help="file to write (default: the result's name in .html)")


def run(options: argparse.Namespace) -> int:
    """Write the report."""
    import xarray as xr

    from ..storage.files import check_writable
    from ..storage.netcdf import DRAWN, check_room, existing
    from ..storage.reading import open_result

    source = existing(options.file)
    out = Path(options.out) if options.out else source.with_suffix(".html")
    if out.suffix.lower() not in (".html", ".htm"):
        raise DeclarationError(f"--out {out}: end it in .html")
    check_writable(out)
    nodes = [open_result(source)]
    if isinstance(nodes[0], xr.DataTree):
        nodes = [one.to_dataset(inherit=False) for one in nodes[0].subtree]
    check_room(DRAWN * sum(one.nbytes for one in nodes), f"{source}: a report of all its values")
    result = open_result(source, load=True)
    from ..report.report import write_report

    report = write_report(result, out)
    put(f"{shown(report)}  {report.stat().st_size / 1e6:.1f} MB")
    return 0
