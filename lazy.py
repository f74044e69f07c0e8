"""Packages whose names are loaded when they are first used (PEP 562). Imports nothing of ours."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package defines so that importing it loads nothing: ``__getattr__``, ``__dir__`` and ``__all__``.

    Parameters
    ----------
    package : str
        Its ``__name__``.
    modules : mapping of str to str
        Each module, relative to the package, to the names that it defines, with spaces between them. The module
        ``"."`` stands for modules that are names themselves.

    Returns
    -------
    tuple of (callable, callable, list of str)
    """
    where = {name: module for module, names in modules.items() for name in names.split()}

    def load(name: str) -> Any:
        """Import a name when it is first asked for."""
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if "ipykernel" in sys.modules and "tqdm.auto" not in sys.modules:
            with warnings.catch_warnings():  # of tqdm about ipywidgets, which nothing here needs
                warnings.simplefilter("ignore")
                import tqdm.auto  # noqa: F401
        if where[name] == ".":
            return import_module(f".{name}", package)
        return getattr(import_module(where[name], package), name)

    return load, lambda: sorted(where), sorted(name for name in where if not name.startswith("__"))


def front_door(name: str) -> Any:
    """A name of the outermost front door: for a method that says what a function of a higher room does.

    `headwise.Model` is called as `headwise.predict` is; `tests/public/test_architecture.py` counts who uses this.
    """
    return getattr(sys.modules[str(__package__)], name)
