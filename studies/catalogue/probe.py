"""Reads attributes of files in a process of its own.

There are damaged files on which HDF5 hangs, ends the process, or goes on with what it knew of another file. None of
that may reach who asks: a process that gives no answer is replaced.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from ..storage.netcdf import alone
from .entries import NoResult
from .probe_child import attributes

CHILD = Path(__file__).with_name("probe_child.py")
LIMIT_SECONDS = 60.0
"""For one file, or for the start: much more than a slow disk needs."""


class Probe:
    """Asks for the attributes of files; starts its process when it is first asked. Use it in a ``with`` block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._here = False

    def __enter__(self) -> Probe:
        return self

    def ask(self, path: Path) -> dict[str, Any]:
        """The root attributes of a file; `NoResult` where it cannot be read."""
        if self._process is None and not self._here:
            self._start()
        if self._here or self._process is None or self._process.stdin is None:
            return _read_here(path)
        try:
            self._process.stdin.write(f"{json.dumps(str(path))}\n")
            self._process.stdin.flush()
            answer = json.loads(self._next())
        except queue.Empty:
            self._stop()
            raise NoResult(f"damaged: after {LIMIT_SECONDS:.0f} s it was still not read") from None
        except (OSError, ValueError):  # its output ended
            self._stop()
            raise NoResult("damaged: reading it ended the process that read it") from None
        if "reason" in answer:
            raise _damaged(answer["reason"])
        found: dict[str, Any] = answer["attributes"]
        return found

    def _start(self) -> None:
        """Start the process; where that cannot be, files are read in this one."""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            self._answers = queue.Queue()
            threading.Thread(target=self._listen, args=(self._process, self._answers), daemon=True).start()
            self._here = self._next() != '"ready"\n'
        except (OSError, ValueError, queue.Empty):
            self._here = True
        if self._here:
            self._stop()

    @staticmethod
    def _listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        """Pass on what the process says, and an empty line when it has ended."""
        try:
            for line in process.stdout or ():
                answers.put(line)
        except (OSError, ValueError):
            pass
        answers.put("")

    def _next(self) -> str:
        return self._answers.get(timeout=LIMIT_SECONDS)

    def _stop(self) -> None:
        """End the process: it holds nothing that could be lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except OSError:  # what was to be said to a process that has ended
                    pass
        self._process = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()


def _read_here(path: Path) -> dict[str, Any]:
    try:
        with alone():
            return attributes(str(path))
    except Exception as error:  # see `probe_child`
        raise _damaged(str(error)) from None


def _damaged(reason: str) -> NoResult:
    return NoResult(f"damaged, or not readable: {' '.join(reason.split())[:200]}")
