"""What a result says about itself, by kind: in the attributes of a file that somebody else made may be anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError
from ...interventions.declare.codec import read_json

LONGEST = 1000
"""Letters of a text beside a variable, and of one of several values."""


def with_plain_attrs(result: xr.Dataset | xr.DataTree) -> Any:
    """The same result, values shared, with attributes that are text and numbers only.

    Several values become one text, what is no character a question mark.
    """
    if isinstance(result, xr.DataTree):
        return xr.DataTree.from_dict(
            {node.path: with_plain_attrs(node.to_dataset(inherit=False)) for node in result.subtree}
        )
    ds = result.copy()
    ds.attrs = plain_attrs(ds.attrs)
    for name in ds.variables:
        ds[name].attrs = {
            key: value[:LONGEST] if isinstance(value, str) else value
            for key, value in plain_attrs(ds[name].attrs).items()
        }
    return ds


def plain_attrs(attrs: Mapping[Any, Any]) -> dict[str, str | int | float]:
    """Attributes as text and numbers; see `with_plain_attrs`."""
    return {_characters(str(name)): _plain_value(value) for name, value in attrs.items()}


def _plain_value(value: Any) -> str | int | float:
    if isinstance(value, np.ndarray | list | tuple):
        values = np.asarray(value, dtype=object).ravel()
        text = ", ".join(_words(one)[:LONGEST] for one in values[:LONGEST])
        return text if values.size <= LONGEST else f"{text}, ..."
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, int | float) else _words(value)


def _words(value: Any) -> str:
    try:
        return _characters(value.decode(errors="replace") if isinstance(value, bytes) else str(value))
    except (RecursionError, ValueError):  # lists in lists in lists, a number of very many digits
        return "?"


def _characters(text: str) -> str:
    """Text that UTF-8 can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def json_in(attrs: Mapping[Any, Any], name: str, kind: type) -> Any:
    """An attribute that holds JSON of that kind; empty where there is none."""
    try:
        read = read_json(str(attrs.get(name, "")))
    except DeclarationError:
        return kind()
    return read if isinstance(read, kind) else kind()


def json_or_text(text: object) -> Any:
    """What JSON text holds; other text as it is."""
    try:
        return read_json(str(text))
    except DeclarationError:
        return text


def number_in(attrs: Mapping[Any, Any], name: str) -> float | None:
    """An attribute that holds a finite number, or text that is one; None where there is none."""
    try:
        found = float(attrs[name])
    except (LookupError, ValueError, TypeError, OverflowError):
        return None
    return found if math.isfinite(found) else None
