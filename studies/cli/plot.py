"""``headwise plot``: a picture of a variable, as a file."""

from __future__ import annotations

import argparse
from typing import Any

from .shared import add_command, add_file, add_variable, choice, put, shown

EXAMPLES = """  headwise plot results/induction-words-2l.nc heads/induction -o heads.html
  headwise plot results/induction-words-2l.nc ablation/loss \\
      --select ablation=zero -o loss.svg
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "plot",
        run,
        help="a picture of a variable",
        description=(
            "Draw a variable of a result as its dims ask for: a head grid, an attention pattern, a curve. HTML opens "
            "without a network; PNG and SVG are for papers."
        ),
        examples=EXAMPLES,
    )
    add_file(parser)
    add_variable(parser)
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="file to write, in .html, .png or .svg")
    parser.add_argument(
        "--select", metavar="DIM=VALUE", action="append", default=[], help="only this layer, run, ...; may be repeated"
    )


def run(options: argparse.Namespace) -> int:
    """Draw it and write the file."""
    from ..storage.files import check_writable
    from ..storage.netcdf import DRAWN, check_room, existing, reading
    from ..storage.reading import open_result, pick

    selected = dict(choice(text) for text in options.select)
    check_writable(options.out)
    source = existing(options.file)
    ds, name = pick(open_result(source), options.variable)
    check_room(DRAWN * ds[name].nbytes, f"{source}: a picture of {name}, with {ds[name].size} values,")
    from .. import plots

    with reading(source):
        target = plots.save(plots.picture(ds, name, **selected), options.out)
    put(f"{shown(target)}  {target.stat().st_size / 1e3:.0f} kB")
    return 0
