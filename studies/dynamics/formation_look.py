"""What is measured of a model at each step of the formation study."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from ...metrics.card import Card, Metric, PromptFacts
from ..analyses.composition import composition_scores
from ..measuring.measure import measure
from ..tasks.prompts import Prompts

if TYPE_CHECKING:
    from ...interventions.models.model import Model

SCORES = ("induction", "previous_token", "duplicate_token", "prefix_matching")
DISTANCES = (1, 2, 3, 4)
PLACES = {"behind": "behind the earlier copy of the query", "back": "before the query"}
"""Where the keys are to which attention is measured, at each of `DISTANCES`: ``behind`` at distance 1 is the induction
score, ``back`` at distance 1 the previous-token score."""
PARTS = ("repeats", "new")
"""Sequences that are held out: those in which a part repeats, and those in which nothing does."""


def _attention(place: str, distance: int) -> Metric:
    """The metric of mean attention to the key at a distance, over the queries that have it."""

    def prepare(facts: PromptFacts) -> dict[str, np.ndarray[Any, Any]]:
        half, (examples, size) = facts.period or 0, facts.tokens.shape
        queries = np.arange(facts.start + half, facts.start + 2 * half) if place == "behind" else np.arange(size)
        keys = queries - half + distance if place == "behind" else queries - distance
        there = (keys >= 0) & (keys <= queries)
        weights = np.full((examples, size, size), 0.0 if there.any() else np.nan, dtype=np.float32)
        weights[:, queries[there], keys[there]] = 1 / max(int(there.sum()), 1)
        return {"weights": weights}

    words = f"attention to the token {distance} {PLACES[place]}"
    return Metric(Card(f"{place}_{distance}", words, "1", (0.0, 1.0)), "pattern", _summed, prepare)


def _summed(pattern: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("rhqk,rqk->rh", pattern, weights.to(pattern.dtype))


ATTENTION = {place: [_attention(place, distance) for distance in DISTANCES] for place in PLACES}


class Look(NamedTuple):
    """Measures a model of a training as it is trained: with what is held on it.

    Attributes
    ----------
    study : FormationStudy
    training : str
    tell : callable
        Gets how many steps were measured.
    """

    study: Any
    training: str
    tell: Callable[[int], None]

    def run(self, model: Model, progress: Any = None) -> xr.Dataset:
        """Scores of heads, loss and accuracy by position, the loss on sequences held out, composition."""
        study = self.study
        held, task = study.held(self.training, 2 * study.length), study.task
        metrics: list[Metric | str] = [
            *SCORES,
            *(metric for place in ATTENTION.values() for metric in place),
            "loss",
            "accuracy",
        ]
        found = _as_held(measure(model, task, held, metrics, runs="clean", per_position=True, progress=progress))
        for place, each in ATTENTION.items():
            distance = xr.DataArray(list(DISTANCES), dims="distance", name="distance")
            joined = xr.concat([found[metric.name] for metric in each], distance)
            found = found.drop_vars([metric.name for metric in each]).assign({place: joined})
        whole = [self._held_out(model, number) for number in range(len(PARTS))]
        found = found.assign(
            held_out_loss=xr.concat(whole, xr.DataArray(np.asarray(PARTS, dtype=object), dims="part", name="part"))
        )
        if model.shape.layers > 1:
            table = composition_scores(model, draws=2, check=False)["composition"]
            table = table.sel(variant="folded", sender_layer=0, receiver_layer=1, drop=True)
            found = found.assign(composition=table)
        return found.drop_attrs(deep=False)

    def _held_out(self, model: Model, number: int) -> xr.DataArray:
        """The loss at each position of one kind of sequences that no training sees, ``(example, position)``."""
        study = self.study
        part = study.data(0).parts[number]
        tokens = [tuple(part.labelled(at, validates=True)[0].tolist()) for at in range(study.n)]
        held = study.held(self.training, study.context)
        values = _as_held(
            measure(model, Prompts(tuple(tokens)), held, "loss", runs="clean", per_position=True, progress=False)
        )
        return values["loss"].rename({"position": "context_position"})

    def to_json(self) -> str:
        """Which look it is, as JSON text."""
        return json.dumps({"type": "Look", "study": self.study.to_json(), "training": self.training})


def _as_held(ds: xr.Dataset) -> xr.Dataset:
    """The values with what is held on the model, without what stands beside them."""
    kept = [name for name in ds.data_vars if not str(name).startswith(("baseline_", "chance_"))]
    found = ds[kept].rename({f"read_{dim}": dim for dim in ("layer", "head") if f"read_{dim}" in ds.dims})
    return found.drop_vars([name for name in found.coords if name not in found.dims])
