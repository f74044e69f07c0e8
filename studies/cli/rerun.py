"""``headwise rerun``: repeat what a file holds, and say whether the numbers agree."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ...errors import printable
from .shared import (
    add_command,
    add_device,
    add_file,
    add_json,
    add_weights,
    fill,
    print_json,
    put,
    quiet_libraries,
    say,
)

EXAMPLES = """  headwise rerun results/induction-words-2l.nc       the same numbers here?
  headwise rerun ablation.nc --tolerance 1e-4 --json
  headwise rerun ablation.nc --model ./my-gpt2       where the folder is now
  headwise rerun remote.nc --yes                     on a server, with your key
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "rerun",
        run,
        help="repeat a stored result and compare the numbers",
        description=(
            "Repeat the study or measurement that a file holds, with the model, task and seeds that it names, and say "
            "whether the numbers agree. The status is 0 where they do, else 1. What only the file or only this version "
            "of headwise computes is named, and is no disagreement. The file is left as it is."
        ),
        examples=EXAMPLES,
    )
    add_file(parser)
    parser.add_argument(
        "--tolerance", type=float, default=1e-6, help="largest difference of numbers that agree (default: %(default)s)"
    )
    parser.add_argument(
        "--model", help="repeat it on this one: a shipped name, Hub id or folder (default: the one that the file names)"
    )
    add_weights(parser)
    parser.add_argument(
        "--yes",
        action="store_true",
        help="agree to what the file asks for beyond a shipped model or one of the Hub: a folder, a server, long work",
    )
    add_device(parser)
    add_json(parser, "print the verdict and the differences as JSON")


def run(options: argparse.Namespace) -> int:
    """Repeat it and print how it agrees."""
    from ..reproduce.rerun import rerun

    quiet_libraries()
    agreement = rerun(
        options.file,
        device=options.device,
        tolerance=options.tolerance,
        progress=say,
        model=options.model,
        revision=options.revision,
        step=options.step,
        yes=options.yes or (sys.stdin.isatty() and sys.stderr.isatty() and agrees),
    )
    if options.json:
        print_json(agreement.to_dict())
    else:
        put("\n".join(fill(line, "  ") for line in str(agreement).splitlines()))
    return 0 if agreement.agrees else 1


def agrees(text: str) -> bool:
    """Ask the user at a terminal."""
    say(f"{printable(text)}.\nDo it? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
