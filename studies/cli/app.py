"""``headwise app``: a folder of results in the browser."""

from __future__ import annotations

import argparse
from typing import Any

from .shared import add_command, add_folder, add_weights, quiet_libraries

EXAMPLES = """  headwise app                                       what is in results/
  headwise app /data/runs --port 8080 --no-show      the address is printed
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "app",
        run,
        help="look at results in a browser",
        description=(
            "Serve a page on which the results in a folder can be looked at: click a head and see its pattern, its "
            "ablation and its partners; type a prompt and see the heads fire. Only files in the folder are opened."
        ),
        examples=EXAMPLES,
    )
    add_folder(parser, "where the results are")
    parser.add_argument("--port", type=int, default=5006, help="0 picks a free one (default: %(default)s)")
    parser.add_argument(
        "--address", default="127.0.0.1", help="where to listen; the default is this machine alone (%(default)s)"
    )
    parser.add_argument(
        "--allow",
        metavar="HOST",
        action="append",
        default=[],
        help="another name by which browsers reach it, such as lab.example or localhost:8000; may be repeated",
    )
    parser.add_argument(
        "--model", help="shipped name, Hub id or folder of the model for prompts (default: the one that a file names)"
    )
    add_weights(parser)
    parser.add_argument("--no-show", action="store_true", help="do not open a browser")


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from ..app import serve

    quiet_libraries()
    serve(
        options.folder,
        address=options.address,
        port=options.port,
        show=not options.no_show,
        model=options.model,
        revision=options.revision,
        step=options.step,
        allow=options.allow,
    )
    return 0
