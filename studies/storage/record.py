"""What a result says about itself: what kind of result it is, of which model, task and metrics; read in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...errors import ResultError, choices
from ...interventions.declare import codec
from ...interventions.declare.codec import read_json
from ...interventions.plan.estimators import read_said
from .attributes import json_in, number_in

if TYPE_CHECKING:
    from ...metrics.card import Metric
    from ..tasks.tasks import Task

KINDS = {
    "study": "study",
    "capture": "captured activations",
    "estimates": "measurement",
    "measurement": "measurement",
    "predict": "predictions",
    "logit_lens": "logit lens",
    "direct_logit_attribution": "direct logit attribution",
    "text_heads": "heads on text",
    "edge_scores": "scores of edges",
    "weighted_value_norms": "norms of weighted values",
    "data": "data",
}
"""Kinds of results, and what each is called."""
LOOKS = {
    "predict": ("top", "positions"),
    "logit_lens": ("top", "of", "positions", "metrics"),
    "direct_logit_attribution": ("of", "parts", "per_position"),
    "weighted_value_norms": ("layers",),
}
"""Kinds of what looks inside a model, and the options that its attribute, called like the kind, holds as JSON."""
MARKS = {
    "study": "study",
    **{kind: kind for kind in LOOKS},
    "text_heads": "text_heads",
    "edge_scores": "edge_scores",
    "sites": "capture",
    "estimators": "estimates",
    "metrics": "measurement",
}
"""Attributes that only results of a kind have, the first one first."""
NEEDED = {
    "study": ("study",),
    "capture": ("task", "sites"),
    "estimates": ("task", "interventions", "metrics", "base"),
    "measurement": ("task", "interventions", "metrics", "base", "estimator"),
    "edge_scores": ("task", "interventions", "metrics", "base", "edge_scores"),
    "predict": ("task", "interventions", "run"),
    "logit_lens": ("task", "run"),
    "direct_logit_attribution": ("task", "run"),
    "text_heads": ("text", "text_sha256"),
    "weighted_value_norms": ("task", "run"),
}
"""Attributes without which a result of a kind does not say how it was made."""
SERIES = "series"
"""Attribute of a result with a dim ``step``: the key of a study over one training, see `headwise.over_checkpoints`."""
NO_STEPS = 8
"""Steps of an estimator that has none: the default, without a meaning."""


@dataclass(frozen=True)
class Record:
    """What a result says about itself. The attributes of a file may be anything: what cannot be read is empty.

    Attributes
    ----------
    attrs : mapping
        All attributes, as they are.
    kind : str
        One of `KINDS`.
    model, revision : str
    step : int or None
        Of training.
    server : str
        The server that ran it; empty where it ran on the machine itself.
    study, task, shape, versions : dict
        The JSON objects of these attributes; `shape` is that of the model.
    metrics : list
        Names of the metrics.
    seconds : float or None
    """

    attrs: Mapping[Any, Any]
    kind: str
    model: str
    revision: str
    step: int | None
    server: str
    study: dict[str, Any]
    task: dict[str, Any]
    shape: dict[str, Any]
    versions: dict[str, Any]
    metrics: list[Any]
    seconds: float | None

    @classmethod
    def from_attrs(cls, attrs: Mapping[Any, Any]) -> Record:
        """The record of a result with these attributes."""
        where, step = str(attrs.get("executed", "local")), number_in(attrs, "step")
        objects = {name: json_in(attrs, name, dict) for name in ("study", "task", "versions")}
        return cls(
            attrs=attrs,
            kind=kind_of(attrs),
            model=str(attrs.get("model", "")),
            revision=str(attrs.get("model_revision", "")),
            step=None if step is None else int(step),
            server="" if where == "local" else where,
            shape=json_in(attrs, "model_shape", dict),
            metrics=json_in(attrs, "metrics", list),
            seconds=number_in(attrs, "seconds"),
            **objects,
        )

    @property
    def series(self) -> bool:
        """Whether it is a study over steps of training."""
        return SERIES in self.attrs

    @property
    def opening(self) -> dict[str, str | int]:
        """What `load` takes beside the model's name to open what was measured: a revision, a step, or nothing."""
        if self.revision in ("local", "shipped"):
            return {} if self.step is None else {"step": self.step}
        return {} if self.revision in ("", "main", "memory") else {"revision": self.revision}

    def missing(self) -> list[str]:
        """Attributes that the result needs, and does not have, to say how it was made."""
        return [name for name in NEEDED.get(self.kind, NEEDED["measurement"]) if name not in self.attrs]

    def declared_task(self) -> Task:
        """The task that was declared.

        Raises
        ------
        HeadwiseError
            It is one of the user's own, or no task.
        """
        from .registry import TASKS  # which imports torch

        data = read_json(self.attrs["task"])
        if isinstance(data, dict) and data.keys() == {"repr"}:
            raise ResultError(f"its task is one of your own, {data['repr']}: no file can bring it back")
        task: Task = codec.decode(data, TASKS)
        if not hasattr(task, "draw"):
            raise ResultError(f"its task is no task: {task!r}")
        return task

    @property
    def what(self) -> str:
        """The attribute that declares what was captured or intervened on."""
        return "sites" if self.kind == "capture" else "interventions"

    def declared_what(self) -> Any:
        """The sites or interventions that were declared."""
        from .registry import TASKS  # which imports torch

        if self.kind in LOOKS and self.what not in self.attrs:
            return None
        return codec.from_json(self.attrs[self.what], TASKS)

    def declared_metrics(self) -> list[Metric]:
        """The metrics of a measurement; none of what looks inside a model, whose options name them.

        Raises
        ------
        ResultError
            One does not ship with headwise.
        """
        from .registry import known_metric, metric_names  # which import torch

        if self.kind == "capture":
            return []
        look = self.kind in LOOKS
        names = self.options(xr.Dataset()).get("metrics") or [] if look else read_json(self.attrs["metrics"])
        found = {name: known_metric(str(name)) for name in names}
        if unknown := [name for name, one in found.items() if one is None]:
            raise ResultError(
                f"the metric {choices(unknown)} is one of your own, and no file can bring it back; with headwise come "
                f"{choices(metric_names())}"
            )
        return [] if look else [one[1] for one in found.values() if one is not None]

    def options(self, ds: xr.Dataset) -> dict[str, Any]:
        """The options with which what made the result was called.

        Parameters
        ----------
        ds : Dataset
            The variables of the result.

        Raises
        ------
        ResultError
            Its estimator is not known.
        """
        attrs = self.attrs
        if self.kind == "capture":
            from .registry import TASKS  # which imports torch

            what = {"what": codec.from_json(attrs["interventions"], TASKS)} if "interventions" in attrs else {}
            return {"run": str(attrs.get("run", "clean"))} | what
        if self.kind in LOOKS:
            asked = json_in(attrs, self.kind, dict)
            return {name: asked[name] for name in LOOKS[self.kind] if name in asked} | {"run": str(attrs["run"])}
        options: dict[str, Any] = {"base": str(attrs["base"])}
        if self.kind == "edge_scores":
            what = self.declared_what()
            options |= {"source": what.source, "edges": what.edges}
            options |= json_in(attrs, self.kind, dict)
            return options
        if self.kind == "estimates":
            options["estimators"] = read_json(attrs["estimators"])
            return options | ({"steps": int(attrs["steps"])} if "steps" in attrs else {})
        found = read_said(str(attrs["estimator"]))
        if found is None:
            raise ResultError(f"its estimator {attrs['estimator']!r} is not known to this version")
        if self.attrs["interventions"] == "null" and not any(name in ds for name in self.metrics):
            options["runs"] = "all"  # of a file from before the runs could be asked for
        if "runs" in self.attrs:
            options["runs"] = read_json(self.attrs["runs"])
        if "controls" in self.attrs:
            controls = read_json(self.attrs["controls"])
            options |= {"controls": controls["draws"], "seed": controls["seed"]}
        kept = [f"baseline_{metric.name}" for metric in self.declared_metrics() if metric.kind == "logits"]
        return options | {
            "per_position": any("position" in ds[name].dims for name in kept),
            "estimator": found[0],
            "steps": NO_STEPS if found[1] is None else found[1],
        }


def edits_in(declared: Any) -> Iterator[dict[str, Any]]:
    """The interventions at single sites in a declaration that was read from JSON, one after the other."""
    if isinstance(declared, dict):
        if declared.get("type") == "EdgePatches":
            yield {"type": "PathPatch", "source": declared.get("source")}
            return
        if (kind := declared.get("type")) != "Compose" and isinstance(kind, str) and kind in codec.edit_names():
            yield declared
            return
        declared = [*declared.values()]
    if isinstance(declared, list):
        for part in declared:
            yield from edits_in(part)


def kind_of(attrs: Mapping[Any, Any]) -> str:
    """Which of `KINDS` a result with these attributes is."""
    return next((kind for name, kind in MARKS.items() if name in attrs), "data")
