"""pyvene: an ``IntervenableModel`` for each layer and component, pointed at one head or position after the other.

Values of the source run are collected once and handed in, which spares it a pass of the source for each condition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyvene
import torch
from transformers import PreTrainedModel

from benchmarks.cases import Job, Place

COMPONENTS = {
    "z": "head_attention_value_output",
    "q": "head_query_output",
    "k": "head_key_output",
    "v": "head_value_output",
    "resid_pre": "block_input",
}
LEFT_OUT = {
    "edges": "one part of what a receiver reads is no representation that it writes",
    "neurons": "a neuron is a subspace of its mlp_activation, which is not written here",
    "scores": "it reads attention weights as the input of the dropout module, which transformers 5 does not call",
}


def prepare(job: Job) -> Callable[[Sequence[Place]], np.ndarray]:
    """Ablations with ``ZeroIntervention``, patches with ``VanillaIntervention``, reads with ``CollectIntervention``."""
    return torch.no_grad()(functools.partial(_run, job.twin(), job))


def _run(module: PreTrainedModel, job: Job, places: Sequence[Place]) -> np.ndarray:
    points = list(dict.fromkeys((place.what, place.layer) for place in job.places))
    source = {} if job.source is None else dict(zip(points, _collect(module, job, job.source, points), strict=True))
    kind = pyvene.ZeroIntervention if job.source is None else pyvene.VanillaIntervention
    models: dict[tuple[str, int], Any] = {}
    rows = []
    for place in places:
        at = (place.what, place.layer)
        if at not in models:
            models[at] = pyvene.IntervenableModel([_representation(*at, kind, 1)], model=module)
        model = models[at]
        index = place.position if place.head is None else place.head
        (key,) = model.sorted_keys
        # a new mapping every time: pyvene empties the one it is given
        given = None if job.source is None else {key: source[at][:, [index]]}
        _, output = model({"input_ids": job.clean}, unit_locations={"base": index}, source_representations=given)
        rows.append(job.value(output.logits))
    return job.table(rows)


def _collect(
    module: PreTrainedModel, job: Job, tokens: torch.Tensor, points: Sequence[tuple[str, int]]
) -> list[torch.Tensor]:
    """All heads (or positions) of some components in a run without intervention, ``(example, head, position, ...)``."""
    units = tokens.shape[1] if points[0][0] == "resid_pre" else len(job.heads)
    model = pyvene.IntervenableModel(
        [_representation(what, layer, pyvene.CollectIntervention, units) for what, layer in points], model=module
    )
    everywhere = [[list(range(units))] * len(tokens)] * len(points)
    (_, collected), _ = model({"input_ids": tokens}, unit_locations={"sources->base": (None, everywhere)})
    return list(collected)


def _representation(what: str, layer: int, kind: type, units: int) -> dict[str, Any]:
    """`units` sets how many columns an intervention covers, so it must be the number that is collected together."""
    return {
        "layer": layer,
        "component": COMPONENTS[what],
        "unit": "pos" if what == "resid_pre" else "h",
        "intervention_type": kind,
        "max_number_of_units": units,
    }
