"""Declarations to JSON and back, by an explicit table: nothing is looked up by name outside it, nothing pickled."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import DeclarationError, UnknownNameError, choices
from .circuits import Circuit
from .edges import EdgePatches
from .edits import Compose, MeanAblate, Patch, ResampleAblate, ZeroAblate
from .grid import Grid
from .paths import PathPatch
from .sites import Head, Layer, Logits, Neuron, Site
from .steering import Add, Knockout, ProjectOut, Scale

Table = Mapping[str, Callable[..., Any]]

TABLE: dict[str, Callable[..., Any]] = {
    "Head": Head,
    "Neuron": Neuron,
    "Layer": Layer,
    "Site": Site,
    "Logits": Logits,
    "ZeroAblate": ZeroAblate,
    "MeanAblate": MeanAblate,
    "ResampleAblate": ResampleAblate,
    "Patch": Patch,
    "Add": Add,
    "Scale": Scale,
    "ProjectOut": ProjectOut,
    "Knockout": lambda site, key: Knockout(site, site.positions, key),
    "PathPatch": PathPatch,
    "Compose": lambda parts: Compose(*parts),
    "Grid": Grid.of,
    "Circuit": Circuit,
    "EdgePatches": EdgePatches,
}
"""Type name to maker, of declarations. Tasks are beside them in `studies.storage.registry`."""
NO_EDITS = ("Head", "Neuron", "Layer", "Site", "Logits", "Compose", "Grid", "EdgePatches")
"""Names in `TABLE` of what is no single edit."""
LONGEST = 64 * 2**20
"""Characters of JSON that is read."""
DEEPEST = 100
"""Lists and objects within each other in it; declarations have about ten."""
HALVES = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def encode(value: object, table: Table = TABLE) -> Any:
    """`value` as JSON-ready data: dataclasses of the table become objects with a ``type``; tuples become lists."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, tuple | list):
        return [encode(item, table) for item in value]
    if isinstance(value, Mapping):
        return {"type": "mapping", "items": [[str(key), encode(item, table)] for key, item in value.items()]}
    name = type(value).__name__
    if name not in table or not dataclasses.is_dataclass(value):
        raise DeclarationError(f"cannot store {value!r} as JSON: possible are {choices(table)}")
    return {"type": name} | {field: encode(item, table) for field, item in written(value).items()}


def written(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that its JSON and its repr show: all but those marked `LEFT_OUT` with their default."""
    fields = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
    shown = {field: item for field, item in fields.items() if "left_out" not in field.metadata or item != field.default}
    return {field.name: item for field, item in shown.items()}


def written_repr(value: Any) -> str:
    """The call that makes a dataclass, for its ``__repr__``."""
    return f"{type(value).__name__}({', '.join(f'{name}={item!r}' for name, item in written(value).items())})"


def decode(data: Any, table: Table = TABLE) -> Any:
    """The value that `encode` turned into `data`."""
    if isinstance(data, list):
        return tuple(decode(item, table) for item in data)
    if not isinstance(data, dict):
        return data
    fields = dict(data)
    name = fields.pop("type", None)
    if name == "mapping":
        return {key: decode(item, table) for key, item in fields["items"]}
    if name is None:
        raise DeclarationError(f'this JSON has no "type": possible are {choices(table)}')
    if name not in table:
        raise UnknownNameError(f"unknown type {name!r} in JSON: possible are {choices(table)}")
    given = {key: decode(item, table) for key, item in fields.items()}
    try:
        return table[name](**given)
    except TypeError as error:
        raise DeclarationError(
            f"JSON of a {name} has missing or unknown fields ({', '.join(given)}): {error}"
        ) from None


def edit_names() -> list[str]:
    """Names of the kinds of edit."""
    return [name for name in TABLE if name not in NO_EDITS]


def to_json(value: object, table: Table = TABLE) -> str:
    """`value` as JSON text, keys in the order of the fields."""
    return json.dumps(encode(value, table))


def from_json(text: str, table: Table = TABLE) -> Any:
    """The value that `to_json` wrote."""
    return decode(read_json(text), table)


def read_json(text: object) -> Any:
    """Data of JSON text that somebody else may have written.

    Parameters
    ----------
    text : object
        Such as an attribute of a file.

    Raises
    ------
    DeclarationError
        It is no JSON, too long or too deep to be read, or has half of a character, which no file could hold.
    """
    if not isinstance(text, str):
        raise DeclarationError(f"this is not JSON but {type(text).__name__}")
    if len(text) > LONGEST:
        raise DeclarationError(f"this JSON has {len(text)} characters: {LONGEST} are read")
    deep = DeclarationError(f"this JSON has more than {DEEPEST} lists and objects within each other")
    try:
        data = json.loads(text)
    except RecursionError:
        raise deep from None
    except ValueError as error:  # also whole numbers of thousands of digits
        raise DeclarationError(f"this is not JSON: {error}") from None
    level = [data]
    for _ in range(DEEPEST):
        level = [
            item
            for one in level
            if isinstance(one, list | dict)
            for item in (one if isinstance(one, list) else one.values())
            if isinstance(item, list | dict)
        ]
        if not level:
            break
    else:
        raise deep
    if HALVES.search(text):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DeclarationError(
                "this JSON has half of a character: possible is any text that UTF-8 can hold"
            ) from None
    return data
