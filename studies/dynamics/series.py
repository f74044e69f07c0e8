"""The results of one study at several steps of training: kept one by one, then joined into one file.

Beside ``NAME.nc`` lies ``NAME.nc.parts/`` until the file is whole, with the result of each step that is done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ...errors import ResultError
from ...interventions.models.identity import Identity
from ..storage.reading import Result, as_tree, open_result
from ..storage.record import SERIES
from ..storage.unfinished import UnfinishedResult, keeping

OF_A_STEP = {
    "weight_hash": "hash of the weights",
    "seconds": "duration of the study in seconds",
    "created": "when the study was run",
    "heads": "heads that were found, as JSON",
    "conclusion": "what was found, as JSON",
}
"""Attributes of a single result that become variables of the series."""
WHOLE: dict[str, Callable[[list[Any]], str]] = {
    "seconds": lambda each: f"{np.nansum(each):.3f}",
    "created": max,
}
"""What the series says of all steps together."""
LEFT_OUT = ("fingerprint", "buffer_hash", "inputs", "step")
NOBODY = Identity.from_attrs({})
"""Stands for the models of all steps: each part was made by another one."""


class Series:
    """What is done of a study over steps of training.

    Parameters
    ----------
    out : path
        The NetCDF file that it will be.
    key : str
        16 to 64 hexadecimal digits: which study of which training it is.
    about : mapping
        What stands in the file, and beside its parts, of the training.
    """

    def __init__(self, out: str | os.PathLike[str], key: str, about: Mapping[str, str]) -> None:
        self.out, self.key, self.about = out, key, dict(about)

    def begin(self, last: int | None) -> list[int]:
        """Take up what is there of this very series up to a step, and clear what is there of any other.

        Parameters
        ----------
        last : int, optional
            The step from which training goes on; steps after it are measured again. None begins anew.

        Returns
        -------
        list of int
            The steps that are done, ascending.
        """
        with keeping(self.out, resume=True) as kept:
            known = {} if last is None else self._whole(kept)
            there = self._steps(kept)
            for step, result in known.items():
                if last is not None and step <= last and step not in there:
                    self._save(kept, step, result)
            for path in kept.files("", ".nc"):
                name = path.name.split(".")[0].split("-")
                if name[0] != self.key or last is None or int(name[1]) > last:
                    path.unlink()
            return self._steps(kept)

    def _whole(self, kept: UnfinishedResult) -> dict[int, Result]:
        """The results of the file, by step, where it is one of this series."""
        if not kept.target.is_file():
            return {}
        try:
            tree = as_tree(open_result(kept.target, load=True))
        except ResultError:
            return {}
        if tree.attrs.get(SERIES) != self.key:
            return {}
        return {int(step): at_step(tree, int(step)) for step in np.asarray(tree["step"])}

    def add(self, step: int, result: Result) -> None:
        """Keep the result of a step, on the disk before anything else is done."""
        with keeping(self.out, resume=True) as kept:
            note = self.about | {SERIES: self.key}
            kept.describe(note, NOBODY)
            self._save(kept, step, result)

    def _save(self, kept: UnfinishedResult, step: int, result: Result) -> None:
        tree = as_tree(result)
        nodes = [(node.path, node.to_dataset(inherit=False)) for node in tree.subtree]
        for old in kept.files(f"{self.key}-{step}-", ".nc"):
            old.unlink()
        for number, (path, ds) in reversed([*enumerate(nodes)]):  # the root comes last: with it the step is done
            last = {} if number else {"__nodes": json.dumps([path for path, _ in nodes])}
            kept.save(f"{self.key}-{step}-{number}", ds.assign_attrs({"__path": path} | last), NOBODY)

    def _steps(self, kept: UnfinishedResult) -> list[int]:
        names = [path.name.split(".")[0].split("-") for path in kept.files(f"{self.key}-", ".nc")]
        return sorted(int(step) for _, step, number in names if number == "0")

    def weights(self, step: int) -> str:
        """The hash of the weights that gave the result of a step; empty where that is not known."""
        with keeping(self.out, resume=True) as kept:
            root = kept.load(f"{self.key}-{step}-0", NOBODY)
            return "" if root is None else str(root.attrs.get("weight_hash", ""))

    def _joined(self, kept: UnfinishedResult, steps: Iterable[int] | None) -> Result:
        found: dict[int, Result] = {}
        for step in self._steps(kept) if steps is None else steps:
            nodes: dict[str, xr.Dataset] = {}
            root = kept.load(f"{self.key}-{step}-0", NOBODY)
            if root is None:
                continue
            for number, path in enumerate(json.loads(root.attrs.pop("__nodes"))):
                part = root if number == 0 else kept.load(f"{self.key}-{step}-{number}", NOBODY)
                if part is not None:
                    nodes[path] = part.drop_attrs(deep=False).assign_attrs(
                        {name: value for name, value in part.attrs.items() if name != "__path"}
                    )
            found[step] = xr.DataTree.from_dict(nodes) if len(nodes) > 1 else nodes["/"]
        if not found:
            raise ResultError(f"{kept.target}: no step was measured")
        result = joined(found)
        result.attrs |= self.about | {SERIES: self.key}
        return result

    def finish(self, steps: Iterable[int] | None = None) -> Result:
        """Write the file whole, of these steps or all that are done, and take the parts away."""
        with keeping(self.out, resume=True) as kept:
            result = self._joined(kept, steps)
            kept.finish(result)
            return result


def joined(results: Mapping[int, Result]) -> Result:
    """One result with a first dim ``step`` from the results of several steps.

    Parameters
    ----------
    results : mapping of step to Dataset or DataTree

    Returns
    -------
    Dataset or DataTree
        As the results are. Where a label, a variable or a group is missing at a step, its values there are NaN, and
        empty text. What tells one step from another (see `OF_A_STEP`) becomes variables with dim ``step``.
    """
    steps = sorted(results)
    trees = [as_tree(results[step]) for step in steps]
    along = xr.DataArray(np.asarray(steps), dims="step", name="step", attrs={"long_name": "step of training"})
    parts = [{node.path: node.to_dataset(inherit=False) for node in tree.subtree} for tree in trees]
    paths = list(dict.fromkeys(path for nodes in parts for path in nodes))
    made = {path: _joined([nodes.get(path, xr.Dataset()) for nodes in parts], along) for path in paths}
    for name, words in OF_A_STEP.items():
        values = [tree.attrs.get(name) for tree in trees]
        if any(value is not None for value in values):
            numbers = name == "seconds"
            array = [float(value or "nan") if numbers else str(value or "") for value in values]
            attrs = {"long_name": words} | ({"units": "s"} if numbers else {})
            variable = xr.Variable("step", np.asarray(array, dtype=float if numbers else object), attrs)
            made["/"] = made["/"].assign({f"step_{name}": variable}).assign_coords(step=along)
            if name in WHOLE:
                made["/"].attrs[name] = WHOLE[name](array)
    if len(made) == 1:
        return made["/"]
    return xr.DataTree.from_dict(made)


def _joined(parts: Sequence[xr.Dataset], along: xr.DataArray) -> xr.Dataset:
    attrs = _shared([part.attrs for part in parts if part.attrs])
    if not any(part.data_vars for part in parts):
        return xr.Dataset(attrs=attrs)
    whole = xr.concat(
        [part.drop_attrs(deep=False).drop_encoding() for part in parts],
        along,
        data_vars="all",
        coords="different",
        compat="equals",
        join="outer",
    )
    for name, values in whole.variables.items():
        if values.dtype == object:
            text = [one if isinstance(one, str) else "" for one in values.values.ravel()]
            whole[name] = values.copy(data=np.asarray(text, dtype=object).reshape(values.shape))
    return whole.assign_attrs(attrs)


def _shared(attrs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Attributes that all have alike, without those that belong to one step."""
    if not attrs:
        return {}
    first, *others = attrs
    own = {*OF_A_STEP, *LEFT_OUT}
    return {
        name: value
        for name, value in first.items()
        if name not in own and all(str(one.get(name)) == str(value) for one in others)
    }


def at_step(result: Result, step: int) -> Result:
    """The result of one step, as it was before it was joined."""
    nodes, tree = {}, as_tree(result)
    for node in tree.subtree:
        ds = node.to_dataset()  # with step, which a group of a file has from the root
        if "step" in ds.coords:
            ds = ds.sel(step=step, drop=True)
        nodes[node.path] = ds
    own = {f"step_{name}": name for name in OF_A_STEP}
    root = nodes["/"]
    said = {own[name]: root[name].item() for name in root.data_vars if name in own}
    nodes["/"] = root.drop_vars([name for name in root.data_vars if name in own]).assign_attrs(said)
    return xr.DataTree.from_dict(nodes) if len(nodes) > 1 else nodes["/"]
