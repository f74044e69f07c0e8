"""What is run while a model is trained: a study, on a copy of the model; and the few numbers of it that are logged."""

from __future__ import annotations

import copy
import pydoc
from collections.abc import Mapping
from typing import Any, Protocol

import xarray as xr
from transformers import PreTrainedModel

from ...errors import DeclarationError
from ...interventions.base.hashing import data_hash, short_hash
from ...interventions.declare.codec import read_json
from ..analyses.induction import InductionStudy
from ..measuring.declared import Sweep
from ..storage.reading import Result
from ..training.during import released

PREFIX = "headwise/"
"""Of what is logged."""
MOST_CONDITIONS = 16
"""Conditions of a sweep that are logged one by one."""


class Study(Protocol):
    """What can be run at each step: `headwise.Sweep`, `headwise.InductionStudy`, or your own."""

    def run(self, model: Any, progress: Any = None) -> Result:
        """The result for a model."""

    def to_json(self) -> str:
        """The study as text."""


def series_key(study: Study, *more: str) -> str:
    """What tells the series of a study apart: its text, what its metrics do, and `more`."""
    metrics = [getattr(study, name, None) for name in ("metrics", "metric")]
    return short_hash(study.to_json(), data_hash(metrics), *more)


def as_study(given: Any) -> Study:
    """The study that is given, or that a configuration of ``LightningCLI`` describes (``class_path``, ``init_args``).

    Raises
    ------
    DeclarationError
        It is no study.
    """
    found = _built(given)
    if not (hasattr(found, "run") and hasattr(found, "to_json")):
        raise DeclarationError(
            f"{given!r} is no study: give Sweep(...), InductionStudy(...), or a value with run(model) and to_json()"
        )
    made: Study = found
    return made


def _built(given: Any) -> Any:
    """Values in which what has a ``class_path`` is made."""
    if isinstance(given, list):
        return [_built(one) for one in given]
    if not isinstance(given, Mapping):
        return given
    made = {str(name): _built(value) for name, value in given.items()}
    if "class_path" not in made:
        return made
    kind = pydoc.locate(made["class_path"])
    if not callable(kind):
        raise DeclarationError(f"class_path: {made['class_path']}: there is no such class, such as headwise.Sweep")
    return kind(**made.get("init_args", {}))


def study_from_json(text: str) -> Sweep | InductionStudy:
    """The `Sweep` or `InductionStudy` that its ``to_json()`` wrote.

    Raises
    ------
    DeclarationError, UnknownNameError
        The text holds something else.
    """
    data: Any = read_json(text)
    kinds: dict[Any, Any] = {"Sweep": Sweep, "InductionStudy": InductionStudy}
    kind = data.get("type") if isinstance(data, dict) else None
    if kind not in kinds:
        raise DeclarationError("this JSON holds no Sweep and no InductionStudy")
    made: Sweep | InductionStudy = kinds[kind].from_json(text)
    return made


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy to measure, in evaluation mode: not compiled, without gradients and without what is held on it."""
    with released(model):
        twin = copy.deepcopy(model)
    return measurable(twin)


def measurable(twin: PreTrainedModel) -> PreTrainedModel:
    """A copy that nobody else uses, made ready to be measured."""
    twin._compiled_call_impl = None
    for parameter in twin.parameters():
        parameter.grad = None
    return twin.eval()


def head_scores(result: Result) -> dict[str, xr.DataArray]:
    """Scores of heads in a result, by name: the mean over examples, dims (layer, head)."""
    parts = result.subtree if isinstance(result, xr.DataTree) else [result]
    found: dict[str, xr.DataArray] = {}
    for part in parts:
        for name, values in part.data_vars.items():
            if set(values.dims) == {"layer", "head", "example"} and "metric" in values.attrs:
                found.setdefault(str(name), values.mean("example").transpose("layer", "head"))
    return found


def scalars(result: Result) -> dict[str, float]:
    """What is logged of a result: the largest score of a head, and the mean of other metrics, by condition.

    Parameters
    ----------
    result : Dataset or DataTree

    Returns
    -------
    dict of str to float
        Names begin with ``headwise/``.
    """
    found = {f"{PREFIX}{name}": float(values.max()) for name, values in head_scores(result).items()}
    for part in result.subtree if isinstance(result, xr.DataTree) else [result]:
        for name, values in part.data_vars.items():
            if "metric" not in values.attrs or str(name).startswith("baseline_"):
                continue
            if values.dims == ("example",):
                found.setdefault(f"{PREFIX}{name}", float(values.mean()))
            elif values.dims == ("condition", "example") and values.sizes["condition"] <= MOST_CONDITIONS:
                for condition in values["condition"].values:
                    found[f"{PREFIX}{name}/{condition}"] = float(values.sel(condition=condition).mean())
    return found
