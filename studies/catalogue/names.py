"""Names in a NetCDF file, and how one is looked up. Needs no xarray, so that a shell can complete names quickly."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...errors import UnknownNameError, choices

SHOWN = 40
"""Variables that an error lists."""


def variable_names(source: Path) -> list[str]:
    """Names of all data variables of a file: ``loss``, or ``ablation/loss`` where it has groups."""
    import netCDF4

    with netCDF4.Dataset(source) as file:
        return [f"{group}/{name}".lstrip("/") for group, names in _walk(file) for name in names]


def group_names(source: Path) -> list[str]:
    """Groups of a file, outermost first, such as ``estimates/ablation``."""
    import netCDF4

    with netCDF4.Dataset(source) as file:
        return [path for path, _ in _walk(file) if path]


def _walk(group: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Each group below `group` with the names of its data variables."""
    said = [group, *group.variables.values()]
    labels = {name for one in said for name in str(getattr(one, "coordinates", "")).split()}
    yield path, [name for name in group.variables if name not in group.dimensions and name not in labels]
    for name, inner in group.groups.items():
        yield from _walk(inner, f"{path}/{name}".lstrip("/"))


def find(variable: str, known: list[str], *, where: str = "", exact: bool = False) -> str:
    """The full name of `variable` among `known`, or an error that lists what is near.

    Unless it must be `exact`, a name without its group will do where only one group has it.
    """
    wanted = variable.strip("/")
    if wanted in known:
        return wanted
    same = [] if exact else [name for name in known if _last(name) == wanted]
    if len(same) == 1:
        return same[0]
    if same:
        raise UnknownNameError(f"{variable!r} is in several groups{where}: say {' or '.join(same)}")
    near = [name for name in known if _last(name) in get_close_matches(_last(wanted), map(_last, known), n=5)]
    if near:
        shown = f"did you mean {' or '.join(near[:8])}? There are {len(known)} variables"
    else:
        rest = f", and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        shown = f"there are {choices(known[:SHOWN]) or 'none'}{rest}"
    raise UnknownNameError(f"there is no variable {variable!r}{where}: {shown}")


def _last(name: str) -> str:
    return name.rpartition("/")[2]
