"""``headwise completion``: what a shell needs to complete commands, options, files and variables."""

from __future__ import annotations

import argparse
from typing import Any

from ...errors import DeclarationError
from .shared import add_command, put

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = """  source <(headwise completion bash)                 in ~/.bashrc
  source <(headwise completion zsh)                  in ~/.zshrc
  headwise completion fish > ~/.config/fish/completions/headwise.fish
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "completion",
        run,
        help="completion for bash, zsh or fish",
        description="Print the script that makes a shell complete commands, options, result files and their variables.",
        examples=EXAMPLES,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError:
        raise DeclarationError("completion needs argcomplete: pip install argcomplete") from None
    put(shellcode(["headwise"], shell=options.shell))
    return 0
