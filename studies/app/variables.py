"""What a result holds that can be drawn: a number for each head, by other dims. Knows no Panel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from ...errors import DeclarationError, UnknownNameError, choices, printable
from ..catalogue.table import has_effect
from ..measuring.effects import effect, intervened, normalized

HEAD = ("layer", "head")
READ = ("read_layer", "read_head")
MEAN = "mean of all"
AVERAGED = ("example", "seed", "draw", "control_draw", "position")
"""Dims over which the mean is shown first; of any other the first label."""
ENDS = ("_low", "_high")
SHOWS = {"change": "change from no intervention", "value": "value", "share": "share of clean minus corrupted"}
MOST_HEADS, MOST_LABELS, MOST_VARIABLES = 20_000, 1000, 1000
"""Cells of a grid, labels of a dim and variables of a file that a page can bear; further ones are not offered."""
LONGEST = 200
"""Characters of a label."""
FIRST = ("heads/induction", "ablation/loss", "loss")
"""What is shown when a result is opened, where it has it."""


@dataclass(frozen=True)
class HeadVariable:
    """A variable that has one number for each head, once a label is chosen of each other dim.

    Attributes
    ----------
    key : str
        ``group/name``; ``name`` alone at the root.
    group, name : str
    label : str
        What it is, for people.
    shows : tuple of str
        How it can be shown, of ``change value share``; the first is the usual one.
    others : mapping of dim to labels
        Dims besides layer and head, with ``mean of all`` as a label where it makes sense; the first is the usual one.
    """

    key: str
    group: str
    name: str
    label: str
    shows: tuple[str, ...]
    others: Mapping[str, tuple[str, ...]]


def datasets(tree: xr.DataTree) -> Iterator[tuple[str, xr.Dataset]]:
    """Each group that holds variables, with its path; the root's is empty."""
    for node in tree.subtree:
        ds = node.to_dataset()
        if len(ds.data_vars):
            yield node.path.strip("/"), ds


def variables(tree: xr.DataTree) -> list[HeadVariable]:
    """What can be drawn as a head grid, in the order of the file; ends of intervals are left to their variable."""
    found = []
    for group, ds in datasets(tree):
        for name, array in ds.data_vars.items():
            if _per_head(array) and not str(name).endswith(ENDS):
                found.append(_variable(group, ds, str(name)))
                if len(found) == MOST_VARIABLES:
                    return found
    return found


def usual(found: list[HeadVariable]) -> HeadVariable | None:
    """The variable that is shown first."""
    by_key = {one.key: one for one in found}
    return next((by_key[key] for key in FIRST if key in by_key), found[0] if found else None)


def heads(tree: xr.DataTree, variable: HeadVariable | None) -> list[tuple[int, int]]:
    """Layer and number of every head that a variable has, or else any variable of the file."""
    for one in [variable] if variable else variables(tree):
        array = _by_head(dataset(tree, one.group)[one.name])
        layer, head = (_labels(array, dim) for dim in HEAD)
        if len(layer) * len(head) > MOST_HEADS:
            raise DeclarationError(f"{one.key} has {len(layer) * len(head)} heads: at most {MOST_HEADS} can be drawn")
        return [(int(a), int(b)) for a in layer for b in head]
    return []


def dataset(tree: xr.DataTree, group: str) -> xr.Dataset:
    """A group of the file as a dataset."""
    for path, ds in datasets(tree):
        if path == group:
            return ds
    raise UnknownNameError(f"this result has no group {group!r}: it has {choices(path for path, _ in datasets(tree))}")


def values(tree: xr.DataTree, variable: HeadVariable, show: str, at: Mapping[str, str]) -> xr.DataArray:
    """The numbers of a head grid.

    Parameters
    ----------
    tree : DataTree
    variable : Variable
    show : {"change", "value", "share"}
    at : mapping of dim to label
        The usual label of a dim that is left out.

    Returns
    -------
    DataArray (layer, head)

    Raises
    ------
    UnknownNameError
        It cannot be shown that way, or a dim has no such label.
    """
    ds = dataset(tree, variable.group)
    if show not in variable.shows:
        raise UnknownNameError(f"{variable.key} cannot be shown as {show!r}: possible are {choices(variable.shows)}")
    make = {"change": effect, "share": normalized}.get(show)
    array = _by_head(make(ds, variable.name) if make else ds[variable.name])
    for dim, labels in variable.others.items():
        if dim not in array.dims:
            continue  # a share is a ratio of means over examples
        label = at.get(dim, labels[0])
        if label not in labels:
            raise UnknownNameError(f"{dim} has no {label!r}: it has {choices(labels)}")
        if label == MEAN:
            array = array.mean(dim, keep_attrs=True)
        else:
            array = array.isel({dim: [one for one in labels if one != MEAN].index(label)}, drop=True)
    return array.transpose(*HEAD)


def _variable(group: str, ds: xr.Dataset, name: str) -> HeadVariable:
    array = _by_head(ds[name])
    others = {str(dim): _options(array, str(dim)) for dim in array.dims if dim not in HEAD}
    long = short(array.attrs.get("long_name", name.replace("_", " ")))
    key = f"{group}/{name}" if group else name
    label = long if long != short(ds.attrs.get("long_name", "")) else short(name)
    return HeadVariable(key, group, name, label, _shows(ds, name), others)


def _shows(ds: xr.Dataset, name: str) -> tuple[str, ...]:
    if f"baseline_{name}" not in ds or not intervened(ds):
        return ("value",)
    runs = [str(run) for run in ds[f"baseline_{name}"]["run"].values] if "run" in ds[f"baseline_{name}"].coords else []
    shows = ["change"] if has_effect(ds, name) else []
    shares = ["share"] if {"clean", "corrupted"} <= set(runs) and "example" in ds[name].dims else []
    return (*shows, "value", *shares)


def _per_head(array: xr.DataArray) -> bool:
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        return False
    return {*HEAD} <= {*array.dims} or {*READ} <= {*array.dims}


def _by_head(array: xr.DataArray) -> xr.DataArray:
    """`array` with ``layer`` and ``head``: those that were looked at, where none were intervened on."""
    if {*HEAD} <= {*array.dims}:
        return array
    return array.rename(dict(zip(READ, HEAD, strict=True)))


def _labels(array: xr.DataArray, dim: str) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    return np.asarray(array[dim].values if dim in array.coords else np.arange(array.sizes[dim]))


def short(text: object) -> str:
    """Text of a file as a page shows it: fit to be shown, and cut where it is longer than anybody reads."""
    said = str(text)
    return printable(said if len(said) <= LONGEST else f"{said[: LONGEST - 1]}\u2026")


def _options(array: xr.DataArray, dim: str) -> tuple[str, ...]:
    labels = tuple(short(label) for label in _labels(array, dim)[:MOST_LABELS])
    return (MEAN, *labels) if dim in AVERAGED else labels
