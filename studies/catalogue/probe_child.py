"""Run as a script by `probe`: reads paths from standard input, and answers each with the file's attributes as JSON.

Stands alone, so that it starts quickly. Everything that describes the variables is read too, so that damage to it shows
here and not later.
"""

import json
import sys
from typing import Any


def attributes(path: str) -> dict[str, Any]:
    """The root attributes of a NetCDF file, numbers and text; the rest as text."""
    import netCDF4

    with netCDF4.Dataset(path) as file:
        look_at(file)
        found = {name: file.getncattr(name) for name in file.ncattrs()}
    return {name: value if isinstance(value, str | int | float) else str(value) for name, value in found.items()}


def look_at(group: Any) -> None:
    """Read what describes the variables of a group and of those in it."""
    for variable in group.variables.values():
        variable.ncattrs()
    for inner in group.groups.values():
        look_at(inner)


def main() -> None:
    """Answer until the input ends."""
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
