"""What code names, and which names are those of Python or of installed packages. A leaf."""

from __future__ import annotations

import dis
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

LIBRARIES = ("torch", "numpy", "nnsight", "transformers")
"""Packages whose versions are part of what a result depends on; others count with their version."""


def names_of(code: CodeType) -> set[str]:
    """What a function and the functions inside it name, also as text that could be a name."""
    found = {*code.co_names}
    for one in code.co_consts:
        if isinstance(one, CodeType):
            found |= names_of(one)
        elif isinstance(one, str) and one.isidentifier():
            found.add(one)
    return found


@cache
def globals_of(code: CodeType) -> frozenset[str]:
    """Globals that a function and the functions inside it read; code does not change."""
    found = {str(one.argval) for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(found).union(*(globals_of(one) for one in code.co_consts if isinstance(one, CodeType)))


@cache
def imported(code: CodeType, package: str) -> frozenset[str]:
    """Modules that a function and the functions inside it import, by their whole names."""
    found: set[str] = set()
    before: list[Any] = [0, 0]  # the level of a relative import, and what is taken from it
    for one in dis.get_instructions(code):
        if one.opname == "IMPORT_NAME":
            level = before[0] if isinstance(before[0], int) else 0
            parents = package.rsplit(".", level - 1)[0] if level else ""
            found.add(f"{parents}.{one.argval}".strip("."))
        before = [before[1], one.argval]
    return frozenset(found).union(*(imported(one, package) for one in code.co_consts if isinstance(one, CodeType)))


def is_found(function: FunctionType) -> bool:
    """Whether a function of a library is what its module has under its name, and nothing that was made there."""
    at: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        at = getattr(at, name, None)
    return at is function


def replaced(value: Any) -> bool:
    """Whether what a library's module has is a function or class of somebody else."""
    return isinstance(value, FunctionType | type) and not of_library(value.__module__)


def named(module: str | None, name: str) -> str:
    """The name of something of a module, with the version of its library where nothing else tells it."""
    package = (module or "").partition(".")[0]
    counted = package in LIBRARIES or package in sys.stdlib_module_names or not of_library(module)
    return f"{module}.{name}" + ("" if counted else f" {getattr(sys.modules.get(package), '__version__', '')}")


def of_library(module: str | None) -> bool:
    """Whether it is part of Python or of an installed package, and not of whoever wrote the function."""
    return _installed((module or "").partition(".")[0])


@cache
def _installed(package: str) -> bool:
    if package == __name__.partition(".")[0] or package not in sys.modules:
        return package in LIBRARIES
    place = getattr(sys.modules[package], "__file__", None)
    if place is None:
        return package in sys.stdlib_module_names
    stdlib = package in sys.stdlib_module_names and Path(place).is_relative_to(sysconfig.get_path("stdlib"))
    return stdlib or package in LIBRARIES or not {"site-packages", "dist-packages"}.isdisjoint(Path(place).parts)
