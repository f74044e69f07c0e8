"""Python programs in processes of their own."""

import os
import subprocess
import sys

DEADLINE = 180
"""Seconds after which a process counts as one that hangs."""


def run(program, *arguments):
    """A process of its own that runs a program; a deadline catches one that hangs."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
