"""Run as a script by `probe`: reads paths from standard input, and answers each with the file's attributes as JSON.

Stands alone, so that it starts quickly. Everything that describes the variables is read too, so that damage to it shows
here and not later.
"""

import json
import signal
import sys
from contextlib import suppress
from typing import Any

LONGEST = 50_000_000
"""Letters of an attribute."""
MOST = 5_000
"""Groups and variables, as in `headwise.studies.storage.netcdf`."""
SEVERAL = 20
"""Values of an attribute that are told."""
ROOM = 8 * 2**30
"""Bytes of memory that this process may take."""


def attributes(path: str) -> dict[str, Any]:
    """The root attributes of a NetCDF file: numbers, text, and lists of them."""
    import netCDF4

    with netCDF4.Dataset(path) as file:
        look_at(file)
        return {name: plain(name, file.getncattr(name)) for name in file.ncattrs()}


def plain(name: str, value: Any) -> Any:
    """The value of an attribute as JSON has it."""
    if isinstance(value, str) and len(value) > LONGEST:
        raise ValueError(f"its attribute {name} has {len(value)} letters")
    if not getattr(value, "ndim", 0) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str | int | float):
        return value
    several = value.ravel()[:SEVERAL].tolist() if hasattr(value, "ravel") else value
    return several[:SEVERAL] if isinstance(several, list) else str(several)


def look_at(file: Any) -> None:
    """Read what describes the variables of a file and of the groups in it."""
    left, held = [file], 0
    while left:
        group = left.pop()
        held += len(group.variables) + len(group.groups)
        if held > MOST:
            raise ValueError(f"it holds more than {MOST} groups and variables")
        for variable in group.variables.values():
            variable.ncattrs()
        left += group.groups.values()


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with suppress(ImportError, ValueError, OSError):  # not where the system has no limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    import netCDF4  # noqa: F401  # so that the first answer is as quick as the others

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"attributes": attributes(json.loads(line))}
        except Exception as error:  # HDF5 reports damage as OSError, RuntimeError, UnicodeDecodeError, ...
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            answer = {"reason": said or type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
