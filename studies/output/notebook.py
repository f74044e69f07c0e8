"""The notebook that the code runs in, if it does, and a line in it. A notebook has imported IPython already."""

from __future__ import annotations

import sys
import time
from typing import Any

EVERY = 0.2
"""Seconds between two states of a line."""


def notebook() -> Any:
    """IPython's shell where it shows HTML, as in Jupyter, VS Code and Colab; None in a script and in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if shell is not None and "text/html" in shell.display_formatter.active_types else None


class Line:
    """A line of text below a cell that changes in place. All work of one run of a cell writes into one line."""

    run: Any = None
    handle: Any = None
    written = 0.0

    @classmethod
    def write(cls, text: str, *, last: bool = False) -> None:
        """Write `text` in the place of what the line says; too soon after that, the `last` text only."""
        from IPython.display import display

        now, run, shown = time.monotonic(), (notebook(), notebook().execution_count), {"text/plain": text}
        if run != cls.run:
            cls.run, cls.written, cls.handle = run, now, display(shown, raw=True, display_id=True)
        elif last or now - cls.written >= EVERY:
            cls.written = now
            cls.handle.update(shown, raw=True)
