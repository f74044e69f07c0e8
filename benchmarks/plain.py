"""The yardstick, plain forward passes of the Hugging Face module; and the same jobs by hand with plain torch hooks.

The hooks are what a careful user writes without any library. Their numbers are those that all others must give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from benchmarks import edges
from benchmarks.cases import Job, Place

Change = Callable[[torch.Tensor], torch.Tensor]


def prepare_forwards(job: Job) -> Callable[[Sequence[Place]], None]:
    """One plain forward pass for each condition, all logits, nothing read and nothing changed. Gives no numbers."""
    module = job.twin()

    @torch.no_grad()
    def run(places: Sequence[Place]) -> None:
        for _ in range(job.passes(places)):
            module(job.clean, use_cache=False)

    return run


def prepare(job: Job) -> Callable[[Sequence[Place]], np.ndarray]:
    """One forward pass for each condition, with one hook; for an edge two."""
    module = job.twin("eager" if job.case.name == "scores" else "sdpa")

    @torch.no_grad()
    def scores(places: Sequence[Place]) -> np.ndarray:
        patterns = module(job.clean, use_cache=False, output_attentions=True).attentions
        return job.scores(patterns, places)

    @torch.no_grad()
    def run(places: Sequence[Place]) -> np.ndarray:
        source = {} if job.source is None else _read(module, job.source, {_point(place) for place in job.places})

        def value(place: Place) -> np.ndarray:
            where = job.where(place)

            def change(held: torch.Tensor) -> torch.Tensor:
                changed = held.clone()
                changed[where] = 0 if job.source is None else source[_point(place)][where]
                return changed

            handle = _hook(module, place, change)
            try:
                return job.value(module(job.clean, use_cache=False).logits)
            finally:
                handle.remove()

        return job.table([value(place) for place in places])

    if job.case.name == "edges":
        return edges.prepare(job, module)
    return scores if job.case.name == "scores" else run


def _point(place: Place) -> Place:
    """The tensor that holds a place: q, k and v of all heads lie in one."""
    return Place("q" if place.what in ("q", "k", "v") else place.what, place.layer)


def _hook(module: PreTrainedModel, place: Place, change: Change) -> RemovableHandle:
    block = module.transformer.h[place.layer]
    if place.what in ("q", "k", "v"):
        return block.attn.c_attn.register_forward_hook(lambda _module, _inputs, output: change(output))
    holder = {"z": block.attn.c_proj, "mlp_post": block.mlp.c_proj}.get(place.what, block)
    return holder.register_forward_pre_hook(lambda _module, inputs: (change(inputs[0]), *inputs[1:]))


def _read(module: PreTrainedModel, tokens: torch.Tensor, points: set[Place]) -> dict[Place, torch.Tensor]:
    """The tensors at some points of a run without intervention."""
    seen: dict[Place, torch.Tensor] = {}

    def keep(point: Place) -> Change:
        return lambda held: seen.setdefault(point, held)

    handles = [_hook(module, point, keep(point)) for point in points]
    try:
        module(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen
