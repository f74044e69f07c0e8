"""Hand-written nnsight: one trace for each condition, as a user would write it without headwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import nnsight
import numpy as np
import torch
from nnsight.modeling.transformers import TransformersModel

from benchmarks.cases import Job, Place

LEFT_OUT = {"edges": "it would be the hooks again: two passes for each edge"}


def prepare(job: Job) -> Callable[[Sequence[Place]], np.ndarray]:
    """One trace for each condition, and before them one of the run that values are taken from."""
    scores = job.case.name == "scores"
    model = TransformersModel(job.twin("eager" if scores else "sdpa"), task="text-generation", tokenizer=job.tokenizer)

    @torch.no_grad()
    def read_patterns(places: Sequence[Place]) -> np.ndarray:
        with model.trace(job.clean, use_cache=False):
            patterns = nnsight.save([model.transformer.h[layer].attn.output[1] for layer in job.layers])
        return job.scores(patterns, places)

    @torch.no_grad()
    def run(places: Sequence[Place]) -> np.ndarray:
        source = None if job.source is None else _source(model, job)
        return job.table([job.value(_trace(model, job, place, source)) for place in places])

    return read_patterns if scores else run


def _source(model: TransformersModel, job: Job) -> list[torch.Tensor]:
    """What stands in the source run, layer by layer, at the tensors that the case patches."""
    qkv = job.case.name == "qkv"
    with model.trace(job.source, use_cache=False):
        held = nnsight.save(
            [
                model.transformer.h[layer].attn.c_attn.output if qkv else model.transformer.h[layer].input
                for layer in job.layers
            ]
        )
    return held


def _trace(model: TransformersModel, job: Job, place: Place, source: list[torch.Tensor] | None) -> torch.Tensor:
    """Logits of a run with one condition."""
    where, block = job.where(place), model.transformer.h[place.layer]
    with model.trace(job.clean, use_cache=False):
        if place.what in ("z", "mlp_post"):
            reader = block.attn.c_proj if place.what == "z" else block.mlp.c_proj
            read = reader.input.clone()
            read[where] = 0
            reader.input = read
        elif place.what == "resid_pre":
            entering = block.input.clone()
            entering[where] = source[place.layer][where]
            block.input = entering
        else:
            qkv = block.attn.c_attn.output.clone()
            qkv[where] = source[place.layer][where]
            block.attn.c_attn.output = qkv
        logits = nnsight.save(model.output.logits)
    return logits
