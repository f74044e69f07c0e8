"""Several results side by side in one dataset, along a new dim whose labels they say themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, ResultError, UnknownNameError, choices
from ...interventions.models.identity import Identity
from ..storage.attributes import json_or_text
from ..storage.names import groups
from ..storage.netcdf import Source
from ..storage.reading import loaded, open_group, open_variable
from .entries import Entry, in_short

DIMS = ("model", "seed", "step")
"""What results can be lined up along."""
MUST_AGREE = ("study", "task", "interventions", "metrics", "base", "estimator", "run", "sites")
"""Attributes that say what was measured: labels alone cannot tell zero from mean ablation."""


def combine(parts: Sequence[tuple[Entry, xr.Dataset]], dim: str) -> xr.Dataset:
    """One dataset with a new first dim from datasets of the same variables and coordinates.

    Parameters
    ----------
    parts : sequence of (Entry, Dataset)
        Each file's row in the catalogue and what is taken from it.
    dim : {"model", "seed", "step"}
        What they differ in. Seeds and steps are sorted, models stay in the order of the files.

    Returns
    -------
    Dataset
        Attributes are those that all files share; ``combined`` lists the files as JSON.

    Raises
    ------
    DeclarationError
        A file does not say its label, labels repeat, or the files were not measured in the same way.
    ResultError
        Variables, dims or coordinates differ.
    """
    if not parts:
        raise DeclarationError(f"there is no result to combine along {dim!r}")
    if dim not in DIMS:
        raise DeclarationError(f"dim={dim!r}: results are combined along {choices(DIMS)}")
    pairs = sorted(((_label(entry, dim), entry, ds) for entry, ds in parts), key=lambda one: _rank(one[0]))
    _check_labels(dim, [(label, entry) for label, entry, _ in pairs])
    _, first, reference = pairs[0]
    for _, entry, ds in pairs[1:]:
        _check_measured_alike(dim, (first, reference), (entry, ds))
        _check_same_model(dim, (first, reference), (entry, ds))
        _check_same_shape((first, reference), (entry, ds))
    labels = np.asarray([label for label, _, _ in pairs], dtype=object if dim == "model" else np.int64)
    attrs = {"long_name": {"model": "model", "seed": "seed of the prompts", "step": "step of training"}[dim]}
    along = xr.DataArray(labels, dims=dim, name=dim, attrs=attrs)
    joined = xr.concat(
        [ds.drop_vars(dim, errors="ignore") for _, _, ds in pairs],
        along,
        data_vars="all",
        coords="different",
        compat="equals",
        join="exact",
        combine_attrs="drop_conflicts",
    )
    joined.attrs["combined"] = json.dumps([entry.path for _, entry, _ in pairs])
    return joined


def _rank(label: str | int) -> int:
    return label if isinstance(label, int) else 0


def _label(entry: Entry, dim: str) -> str | int:
    label: str | int | None = {"model": entry.model, "seed": entry.seed, "step": entry.step}[dim]
    if label is None:
        where = {"seed": "its task has none", "step": "it has no attribute step, and its revision names none"}
        raise DeclarationError(f"{entry.path} has no {dim}: {where.get(dim, '')}")
    return label


def _check_labels(dim: str, labels: Sequence[tuple[str | int, Entry]]) -> None:
    seen: dict[str | int, str] = {}
    for label, entry in labels:
        if label in seen:
            others = choices(other for other in DIMS if other != dim)
            raise DeclarationError(
                f"{seen[label]} and {entry.path} have the same {dim}, {label}: select one of them, or combine along "
                f"{others}"
            )
        seen[label] = entry.path


def _check_measured_alike(dim: str, one: tuple[Entry, xr.Dataset], two: tuple[Entry, xr.Dataset]) -> None:
    for name in MUST_AGREE:
        texts = [str(ds.attrs.get(name, "")) for _, ds in (one, two)]
        if texts[0] != texts[1]:
            here, there = (_without_seeds(text) if dim == "seed" else json_or_text(text) for text in texts)
            if here != there:
                raise DeclarationError(
                    f"{one[0].path} and {two[0].path} cannot stand side by side along {dim!r}, since they differ in "
                    f"{name}: {_shown(here)} and {_shown(there)}"
                )


def _check_same_model(dim: str, one: tuple[Entry, xr.Dataset], two: tuple[Entry, xr.Dataset]) -> None:
    """Along seeds the model is one; along steps of training its weights differ, and what it is built of does not."""
    if dim == "model":
        return
    first, second = (Identity.from_attrs(ds.attrs) for _, ds in (one, two))
    but = ("attention",) if dim == "seed" else ("attention", "weights", "buffers", "fingerprint")
    if differ := first.differences(second, f"in {one[0].path}", f"in {two[0].path}", but):
        raise DeclarationError(
            f"{one[0].path} and {two[0].path} cannot stand side by side along {dim!r}, since they come from different "
            f"models: {'; '.join(differ)}"
        )


def _without_seeds(text: str) -> Any:
    def strip(value: Any) -> Any:
        """Leave out every seed."""
        if isinstance(value, dict):
            return {key: strip(one) for key, one in value.items() if key != "seed"}
        return [strip(one) for one in value] if isinstance(value, list) else value

    return strip(json_or_text(text))


def _shown(value: Any) -> str:
    text = in_short(value) if isinstance(value, dict) else ""
    text = text or (value if isinstance(value, str) else json.dumps(value))
    return (text if len(text) <= 160 else f"{text[:157]}...") or "nothing"


def _check_same_shape(one: tuple[Entry, xr.Dataset], two: tuple[Entry, xr.Dataset]) -> None:
    """The same variables over the same dims with the same labels; labels that run along no dim may differ."""
    (first, here), (second, there) = one, two
    both = f"{first.path} and {second.path}"
    only = set(here.data_vars) ^ set(there.data_vars)
    if only:
        where = {name: first.path if name in here.data_vars else second.path for name in sorted(map(str, only))}
        said = ", ".join(f"{name} only in {path}" for name, path in list(where.items())[:5])
        raise ResultError(f"{both} hold different variables: {said}; choose some with variable=")
    for name in here.data_vars:
        if here[name].dims != there[name].dims:
            raise ResultError(f"{both} differ in the dims of {name}: {here[name].dims} and {there[name].dims}")
    for dim in here.dims:
        mine, other = (ds[dim].values if dim in ds.coords else np.arange(ds.sizes[dim]) for ds in (here, there))
        if not np.array_equal(mine, other):
            raise ResultError(f"{both} differ in the coordinate {dim!r}: {_difference(mine, other)}")
    for name in set(here.coords) ^ set(there.coords):
        raise ResultError(f"the coordinate {name!r} is in only one of {both}")


def _difference(mine: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> str:
    """How two sets of labels differ, in words."""
    if len(mine) != len(other):
        return f"{len(mine)} values ({_span(mine)}) and {len(other)} ({_span(other)})"
    at = next(place for place, (a, b) in enumerate(zip(mine.tolist(), other.tolist(), strict=True)) if a != b)
    return f"at place {at} it is {mine.tolist()[at]!r} and {other.tolist()[at]!r}"


def _span(values: np.ndarray[Any, Any]) -> str:
    listed = values.tolist()
    return f"{listed[0]} to {listed[-1]}" if len(listed) > 1 else ", ".join(map(str, listed))


def part(path: Path, variable: str | None, group: str | None) -> xr.Dataset:
    """What is combined of a file, in memory: a variable with its run without intervention, a group, or all of it."""
    source = Source(path)
    with source.open() as root:
        if variable is not None:
            ds, name = open_variable(source, variable)
            ds = ds[[name, *(other for other in (f"baseline_{name}",) if other in ds)]]
        else:
            there = [name for name in groups(root) if name]
            wanted = "" if group is None else group.strip("/")
            if (wanted and wanted not in there) or (there and not wanted):
                said = f"there is no group {group!r} in {path.name}" if wanted else f"{path.name} has groups"
                raise UnknownNameError(f"{said}: say group= one of {choices(there) or 'none: it is a single dataset'}")
            ds = open_group(source, wanted)
        whole = {
            name: root.getncattr(name) for name in root.ncattrs()
        }  # what the file says, beside what its group does
        return loaded(source, {"": ds})[""].assign_attrs(whole | ds.attrs)
