"""The command line: puts the commands together, and turns errors into one line and a status.

Imports models, studies and pictures only once a command needs them.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from ...errors import AdviceWarning, HeadwiseError, ResultWarning, ServerWarning
from ...version import version
from . import app, circuit, completion, dynamics, induction, plan, plot, report, rerun, results, text, train
from .shared import Help, OutputError, Parser, fill, say, take_output, written

COMMANDS = (induction, text, circuit, dynamics, plan, train, results, plot, report, rerun, app, completion)
EXAMPLES = """examples:
  headwise induction                                 the whole analysis
  headwise induction --model openai-community/gpt2   of a model from the Hub
  headwise text --text FOLDER                        induction on your own text
  headwise circuit                                   the circuit, edge by edge
  headwise plan --what qkv --metric logit_diff       the cost, beforehand
  headwise results ls                                what is in results/
  headwise results query results ablation/loss --sort -effect --top 10
  headwise app                                       look at it in a browser

`headwise COMMAND --help` says what a command can do.
"""
OURS = (AdviceWarning, ResultWarning, ServerWarning)
"""Warnings that a user of the command line reads as a sentence, without the place in the code that gave them."""
PIPE_CLOSED = 141
"""Status when the reader of the output has gone, as in ``headwise results ls | head``: as of other commands."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its status: 0 done, 1 an error that was explained, 2 wrong usage, 130 stopped."""
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next; see `completion`
        import argcomplete

        argcomplete.autocomplete(parser)
    try:
        take_output()
        usual = warnings.formatwarning
        warnings.formatwarning = lambda message, category, *place: (
            f"headwise: {message}\n" if isinstance(message, OURS) else usual(message, category, *place)
        )
        try:
            options = parser.parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
            if options.command is None:
                parser.print_help()
                return 2
            return int(options.run(options))
        finally:
            warnings.formatwarning = usual
            with written():  # here, where it can be seen that nobody reads it, or that its disk is full
                sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    except HeadwiseError as error:
        say(f"headwise: {error}")
        if isinstance(error, OutputError) and sys.stdout is not None:
            _drop_output()
        return 1
    except KeyboardInterrupt as error:
        say(f"headwise: {str(error) or 'stopped'}; no file was left half-written")
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="headwise",
        allow_abbrev=False,
        description=fill("Declare interventions on a transformer, run them, and get labelled, stored, drawn results."),
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"headwise {version()}", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _joined(arguments: Sequence[str]) -> list[str]:
    """``--sort -effect`` as ``--sort=-effect``: argparse would take ``-effect`` for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--sort" and argument.startswith("-") and argument[1:2].isalpha() and argument[2:]:
            joined[-1] = f"--sort={argument}"
        else:
            joined.append(argument)
    return joined


def _drop_output() -> None:
    """What is still to be printed goes nowhere, so that Python does not complain about it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
