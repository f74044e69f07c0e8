"""Reads attributes of files in a process of its own, which runs this module as a script.

There are damaged files on which HDF5 hangs, ends the process, or goes on with what it knew of another file. None of
that may reach who asks: a process that gives no answer is replaced.
"""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any, Self

if __name__ != "__main__":  # the script stands alone, so that it starts quickly
    from ..storage.netcdf import alone, why
    from .entries import NoResult

CHILD = Path(__file__)
LIMIT_SECONDS = 60.0
"""For one file, or for the start: much more than a slow disk needs."""
LONGEST = 50_000_000
"""Letters of an attribute."""
MOST = 5_000
"""Groups and variables, as in `headwise.studies.storage.netcdf`."""
SEVERAL = 20
"""Values of an attribute that are told."""
ROOM = 8 * 2**30
"""Bytes of memory that the process may take."""


class Probe:
    """Asks for the attributes of files; starts its process when it is first asked. Use it in a ``with`` block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._here = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def ask(self, path: Path) -> dict[str, Any]:
        """The root attributes of a file.

        Raises
        ------
        NoResult
            It cannot be read.
        """
        if self._process is None and not self._here:
            self._start()
        if self._here:
            with alone():
                answer = answer_to(str(path))
        else:
            began = time.monotonic()
            try:
                answer = self._answer(path)
            except (OSError, ValueError):  # its output ended
                self._stop()
                late = time.monotonic() - began >= LIMIT_SECONDS
                ended = "reading it ended the process that read it"
                reason = f"after {LIMIT_SECONDS:.0f} s it was still not read" if late else ended
                raise NoResult(f"damaged: {reason}") from None
        if "reason" in answer:
            raise NoResult(f"damaged, or not readable: {why(ValueError(answer['reason']))}")
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
            self._here = self._answer() != "ready"
        except (OSError, ValueError):
            self._here = True
        if self._here:
            self._stop()

    def _answer(self, path: Path | None = None) -> Any:
        """What the process answers to a path, or says when it has started; it is ended where it takes too long."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        end = Timer(LIMIT_SECONDS, self._process.kill)
        end.daemon = True
        end.start()
        try:
            if path is not None:
                self._process.stdin.write(f"{json.dumps(str(path))}\n")
                self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        finally:
            end.cancel()

    def _stop(self) -> None:
        """End the process: it holds nothing that could be lost."""
        if self._process is not None:
            self._process.kill()
            with suppress(OSError), self._process:  # which closes its pipes, and waits for it
                pass
        self._process = None


def answer_to(path: str) -> dict[str, Any]:
    """``{"attributes": ...}`` of a file, or ``{"reason": ...}`` where it cannot be read."""
    try:
        return {"attributes": attributes(path)}
    except Exception as error:  # HDF5 reports damage as OSError, RuntimeError, UnicodeDecodeError, ...
        strerror = error.strerror if isinstance(error, OSError) else ""
        return {"reason": strerror or str(error) or type(error).__name__}


def attributes(path: str) -> dict[str, Any]:
    """The root attributes of a NetCDF file: numbers, text, and lists of them.

    Everything that describes the variables is read too, so that damage to it shows here and not later.
    """
    import netCDF4

    with netCDF4.Dataset(path) as file:
        left, held = [file], 0
        while left:
            group = left.pop()
            held += len(group.variables) + len(group.groups)
            if held > MOST:
                raise ValueError(f"it holds more than {MOST} groups and variables")
            for variable in group.variables.values():
                variable.ncattrs()
            left += group.groups.values()
        return {name: json_value(name, file.getncattr(name)) for name in file.ncattrs()}


def json_value(name: str, value: Any) -> Any:
    """The value of an attribute as JSON has it."""
    if isinstance(value, str) and len(value) > LONGEST:
        raise ValueError(f"its attribute {name} has {len(value)} letters")
    if not getattr(value, "ndim", 0) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str | int | float):
        return value
    several = value.ravel()[:SEVERAL].tolist() if hasattr(value, "ravel") else value
    return several[:SEVERAL] if isinstance(several, list) else str(several)


def main() -> None:
    """Answer each path on standard input with a line of JSON, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with suppress(ImportError, ValueError, OSError):  # not where the system has no limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    import netCDF4  # noqa: F401  # so that the first answer is as quick as the others

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer_to(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
