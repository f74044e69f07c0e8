"""What commands share: parsers with examples, options that mean the same everywhere, completion, short output."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ...errors import DeclarationError, ResultError, printable

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from ...interventions.models.model import Model

Run = Callable[[argparse.Namespace], int]
PLAIN_WIDTH = 100
"""Characters in a line where the output is no terminal."""
UNCUT = 1000
"""Of tables there, which other programs read."""
PLAIN = str.maketrans("─━╸╺│┃…–—“”‘’×", "----||~--\"\"''x")
"""What stands for signs of ours in an output that cannot hold them; one for one, so that columns stay in line."""
OURS = "headwise plain"
"""Name of `_in_plain` as Python's codecs know it."""


class OutputError(ResultError):
    """The output cannot be written."""


class Parser(argparse.ArgumentParser):
    """A parser that quotes what was typed as it may be shown."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with status 2."""
        super().error(printable(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help as argparse does, but for a failure to write it, which argparse passes over."""
        if file is not sys.stdout:
            super()._print_message(message, file)
        elif message:
            with written():
                file.write(message)


class Help(argparse.RawDescriptionHelpFormatter):
    """Help whose second column begins a little later than usual, so that names stand beside their words."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def add_argument(self, action: argparse.Action) -> None:
        """Leave room for the names of commands, which argparse forgets to count as indented."""
        super().add_argument(action)
        names = [len(str(one.metavar or one.dest)) for one in self._iter_indented_subactions(action)]
        self._action_max_length = max(self._action_max_length, max(names, default=0) + 4)


def add_command(
    commands: Any, name: str, run: Run | None, *, help: str, description: str, examples: str = ""
) -> argparse.ArgumentParser:
    """A parser of a command, with examples below its options.

    Parameters
    ----------
    commands : argparse subparsers
    name : str
    run : callable, optional
        Gets the options and returns the status; None for a command that has commands of its own.
    help : str
        One line, for the list of commands.
    description : str
    examples : str
        Lines that can be typed.

    Returns
    -------
    argparse.ArgumentParser
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        allow_abbrev=False,
        description=description,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=Help,
    )
    parser.description = fill(description)
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def fill(text: str, indent: str = "") -> str:
    """Text in lines of a terminal, those after the first indented."""
    import textwrap

    wide = min(PLAIN_WIDTH, max(40, shutil.get_terminal_size().columns - 2))
    return textwrap.fill(text, wide, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def add_file(parser: argparse.ArgumentParser, metavar: str = "FILE", words: str = "a result, a NetCDF file") -> None:
    """The result that a command is about, completed with result files and folders."""
    argument: Any = parser.add_argument(metavar.lower(), metavar=metavar, help=words)
    argument.completer = complete_files


def add_folder(parser: argparse.ArgumentParser, words: str) -> None:
    """The folder of results that a command is about, ``results`` by default."""
    argument: Any = parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", default="results", help=f"{words} (default: %(default)s)"
    )
    argument.completer = complete_files


def add_json(parser: argparse.ArgumentParser, words: str) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help=words)


def add_model(parser: argparse.ArgumentParser) -> None:
    """``--model`` and what goes with it, of commands that run one: see `open_model`."""
    parser.add_argument("--model", default="words-2l", help="shipped name, Hub id or folder (default: %(default)s)")
    add_weights(parser)
    add_device(parser)
    parser.add_argument("--remote", action="store_true", help="leave the model on NDIF, and run there")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's folder brings")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """``--revision`` and ``--step``, which say what weights of a model."""
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--step", type=int, help="step of its training: of a shipped model, a folder with checkpoints, or Pythia"
    )


def open_model(options: argparse.Namespace) -> Model:
    """The model that the options name, here or on NDIF."""
    from ...interventions.load import load

    return load(
        options.model,
        revision=options.revision,
        step=options.step,
        device=options.device,
        remote=options.remote,
        trust_remote_code=options.trust_remote_code,
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")


def add_question(parser: argparse.ArgumentParser) -> None:
    """``--where``, ``--sort`` and ``--top``."""
    parser.add_argument("--where", metavar="CONDITION", help="only rows that meet it: 'effect > 0.5 and layer >= 4'")
    parser.add_argument(
        "--sort", metavar="COLUMN", help="sort by it, or by several with commas; -effect: from large to small"
    )
    parser.add_argument("--top", type=int, metavar="N", help="the first N rows")


def add_variable(parser: argparse.ArgumentParser) -> None:
    """The variable of a result, completed with those of the file that was named before it."""
    argument: Any = parser.add_argument(
        "variable", metavar="VARIABLE", help="such as loss, or ablation/loss of a study; `headwise results show` lists"
    )
    argument.completer = complete_variables


def complete_files(prefix: str, **given: Any) -> list[str]:
    """Result files and folders that begin with `prefix`."""
    folder, _, start = prefix.rpartition("/")
    base = Path(f"{folder}/" if prefix.startswith("/") or folder else ".")
    front = f"{folder}/" if "/" in prefix else ""
    try:
        found = sorted(base.expanduser().iterdir())
    except OSError:
        return []
    kept = [one for one in found if one.name.startswith(start) and (start or not one.name.startswith("."))]
    kept = [one for one in kept if printable(one.name) == one.name]  # a shell would take others apart
    return [f"{front}{one.name}/" for one in kept if one.is_dir() and not one.name.endswith(".parts")] + [
        f"{front}{one.name}" for one in kept if one.suffix in (".nc", ".nc4")
    ]


def complete_variables(prefix: str, parsed_args: argparse.Namespace, **given: Any) -> list[str]:
    """Variables of the file that stands before, or of the first result in the folder."""
    from ..storage.names import variable_names

    place = Path(next((getattr(parsed_args, name) for name in ("file", "place") if hasattr(parsed_args, name)), ""))
    try:
        source = place if place.is_file() else next(iter(sorted(place.rglob("*.nc"))), place)
        return [name for name in variable_names(source) if name.startswith(prefix) and printable(name) == name]
    except (OSError, RuntimeError):
        return []


def width(otherwise: int = PLAIN_WIDTH) -> int:
    """Characters in a line of the output; `otherwise` where it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else otherwise


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    """What an output's encoding lacks: a plain sign in place of a fine one, else an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def take_output() -> None:
    """Make standard output and error fit for any text, and say so where there is no output at all.

    Raises
    ------
    OutputError
        Standard output is closed.
    """
    codecs.register_error(OURS, _in_plain)
    if sys.stderr is None:  # closed: print would take standard output for it
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=OURS)
    if sys.stdout is None:
        raise OutputError("standard output is closed: there is nowhere to write to")


def put(text: object = "") -> None:
    """Print on standard output. Everything that a command prints goes through here, or through `print_table` or `say`.

    Raises
    ------
    OutputError
        It cannot be written, as where a disk is full.
    """
    with written():
        print(printable(text, lines=True))


@contextmanager
def written() -> Iterator[None]:
    """A failure to write the output is said as one."""
    try:
        yield
    except BrokenPipeError:  # the reader has gone, which is no failure
        raise
    except OSError as error:
        raise OutputError(f"the output cannot be written: {error.strerror or error}") from error


def say(text: object) -> None:
    """Say what is being done, on standard error. Long stages show a bar of their own below it (see `Progress`)."""
    try:
        print(printable(text, lines=True), file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:  # a full disk, say: the work itself is not lost for it
        return


def print_table(make: Callable[[int], Table], otherwise: int = UNCUT) -> None:
    """Print a table as wide as the terminal; `otherwise` at most where the output is no terminal.

    Its texts are those of `headwise.studies.catalogue.listing.cell`: a terminal gets them as they are.
    """
    from rich.console import Console

    wide = width(otherwise)
    if sys.stdout.isatty():
        with written():
            Console(width=wide, highlight=False).print(make(wide))
        return
    out = StringIO()
    Console(width=wide, highlight=False, file=out).print(make(wide))
    put("\n".join(line.rstrip() for line in out.getvalue().splitlines()))


def shown(path: Path) -> str:
    """A path as short as it can be said."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def quiet_libraries() -> None:
    """Keep the advice of transformers and of what it imports off the terminal; `load` draws no bar."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    getLogger("bitsandbytes").setLevel(ERROR)  # which names kernels that it could not fetch


def print_json(data: Any) -> None:
    """Data as JSON: numbers that are missing or infinite as null, signs that are not to be printed as escapes."""
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, default=str)
    text = "".join(one if one == "\n" or printable(one) == one else json.dumps(one)[1:-1] for one in text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(_finite(data), indent=2, default=str)
    put(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values, what is missing as None."""
    import pandas as pd

    return [
        {
            str(name): None if pd.isna(value) else getattr(value, "item", lambda value=value: value)()
            for name, value in row.items()
        }
        for row in frame.to_dict(orient="records")
    ]


def choice(text: str) -> tuple[str, Any]:
    """``layer=1`` as a name and a value: a whole number, a number, or text."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise DeclarationError(f"--select {text}: write a dim and its value, such as layer=1")
    for kind in (int, float):
        try:
            return name.strip(), kind(value)
        except ValueError:
            continue
    return name.strip(), value
