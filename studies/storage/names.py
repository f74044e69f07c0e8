"""Names in a NetCDF file, and how one is looked up. Needs no xarray, so that a shell can complete names quickly."""

from __future__ import annotations

import os
from difflib import get_close_matches
from typing import Any

from ...errors import UnknownNameError, choices
from .netcdf import MOST, Damaged, Source

SHOWN = 40
"""Variables that an error lists."""
DEEPEST = 50
"""Groups in one another."""


def variable_names(path: str | os.PathLike[str]) -> list[str]:
    """Names of all data variables of a file: ``loss``, or ``ablation/loss`` where it has groups."""
    with Source(path).open() as root:
        return names_in(root)


def names_in(root: Any) -> list[str]:
    """As `variable_names`, of a file that is open."""
    return [f"{path}/{name}".lstrip("/") for path, group in groups(root).items() for name in _data(group)]


def groups(root: Any) -> dict[str, Any]:
    """The groups of an open file by path, the file itself as ``""`` first.

    Raises
    ------
    Damaged
        It holds more than any result does; `Source.open` says of which file.
    """
    found: dict[str, Any] = {}
    left, held = [("", root)], 0
    while left:
        path, group = left.pop()
        found[path] = group
        held += len(group.variables) + len(group.groups)
        if held > MOST or path.count("/") >= DEEPEST:
            raise Damaged(
                f"it holds more than {MOST} groups and variables, or groups in more than {DEEPEST} groups: no "
                "result does"
            )
        left += [(f"{path}/{name}".lstrip("/"), inner) for name, inner in reversed(group.groups.items())]
    return found


def _data(group: Any) -> list[str]:
    """The variables of a group that are no coordinates."""
    said = [group, *group.variables.values()]
    labels = {name for one in said for name in str(getattr(one, "coordinates", "")).split()}
    return [name for name in group.variables if name not in group.dimensions and name not in labels]


def find(variable: str, known: list[str], *, where: str = "", exact: bool = False) -> str:
    """Find the full name of a variable. A name without its group is enough where only one group has it.

    Parameters
    ----------
    variable : str
        Name, or ``group/name``.
    known : list of str
        Full names.
    where : str
        Where they were looked for, for the text, with a space before it.
    exact : bool
        Whether only the full name is accepted.

    Returns
    -------
    str
        A name in `known`.

    Raises
    ------
    UnknownNameError
        No group, or more than one, has the variable; the text lists names that are near.
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
