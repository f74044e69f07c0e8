"""The traces themselves: what is read of a run as it is, and a planned pass. Owns every trace of a sweep.

Plain functions of an nnsight handle of the model, tensors, numbers, slices and dicts of them: they run here, and inside
a session on a server that has torch and nnsight but not this package. ``parts`` is what `jobs.described` makes of a
model, with the handles that `opened` adds.
"""

from __future__ import annotations

import operator
from typing import Any

import nnsight
import torch

from . import forward, ops
from .rows import called
from .score import comparing, score

Points = dict[tuple[int, str], torch.Tensor]


def opened(root: Any, described: dict[str, Any]) -> dict[str, Any]:
    """What `forward.run` has to know of a model, from its description."""
    return {
        **described,
        "blocks": operator.attrgetter(described["blocks"])(root),
        "norm": operator.attrgetter(described["norm"])(root),
        "unembed": operator.attrgetter(described["unembed"])(root),
    }


def nothing(device: Any) -> torch.Tensor:
    """Tokens for a trace that never goes through the model itself."""
    return torch.zeros((1, 1), dtype=torch.long, device=device)


def read(root: Any, parts: dict[str, Any], tokens: torch.Tensor, wanted: set[tuple[int, str]]) -> Points:
    """The tensors at wanted points of a pass without intervention."""
    layers = 1 + max(layer for layer, _ in wanted)
    with torch.no_grad(), root.trace(tokens, use_cache=False) as tracer:
        taken, _ = ops.walk(root, parts["blocks"], parts["embeddings"], parts["points"], layers, wanted, [], 0, [], {})
        nnsight.save(taken)
        tracer.stop()
    return {at: value.expand(len(tokens), *value.shape[1:]) for at, value in taken.items()}


def as_it_is(
    root: Any,
    parts: dict[str, Any],
    tokens: torch.Tensor,
    scored: list[int],
    wanted: set[tuple[int, str]],
    watch: list[Any],
    scoring: dict[str, Any],
    keep_logits: bool,
) -> tuple[Points, dict[str, torch.Tensor], torch.Tensor | None]:
    """One pass of the model's own: what is at the wanted points, the readers' values, and the scored logits if kept.

    `watch` and `scoring` are as in `forward`; kernels in ``scoring["compare"]`` also take ``base_logits``, which are
    those of this very pass where `keep_logits` is set.
    """
    at = torch.tensor(scored, device=tokens.device)
    layers, heads, scalings = parts["layers"], parts["heads"], parts["scalings"]
    with torch.no_grad(), root.trace(tokens, use_cache=False) as tracer:
        found: dict[str, Any] = {}
        taken, values = ops.walk(
            root, parts["blocks"], parts["embeddings"], parts["points"], layers, wanted, watch, heads, scalings, {}
        )
        if scoring["kernels"]:
            normed = parts["norm"].output[:, at]
            if keep_logits:
                found["logits"] = parts["unembed"](normed)
            values.update(score(normed, parts["unembed"], comparing(scoring, found), len(tokens)))
        nnsight.save(taken)
        nnsight.save(values)
        nnsight.save(found)
        tracer.stop()
    points = {point: value.expand(len(tokens), *value.shape[1:]) for point, value in taken.items()}
    return points, dict(values), found.get("logits")


def planned(root: Any, parts: dict[str, Any], base: Points, job: dict[str, Any], device: Any) -> dict[str, Any]:
    """The values of a job of `forward.run`, in a trace that never goes through the model itself."""
    with root.trace(nothing(device), use_cache=False) as tracer:
        values = forward.measured(parts, base, job)
        nnsight.save(values)
        tracer.stop()
    return dict(values)


def slopes(
    root: Any,
    parts: dict[str, Any],
    base: Points,
    job: dict[str, Any],
    places: list[Any],
    names: list[str],
    device: Any,
) -> tuple[dict[Any, torch.Tensor], dict[str, dict[Any, torch.Tensor]]]:
    """What is at places in such a pass, and the derivative by it of each kernel's mean over scored positions."""
    with torch.enable_grad(), root.trace(nothing(device), use_cache=False) as tracer:
        found = forward.slopes(parts, base, job, places, names)
        nnsight.save(found)
        tracer.stop()
    values, by_name = found
    return dict(values), {name: dict(slope) for name, slope in by_name.items()}


def changed(
    root: Any, parts: dict[str, Any], tokens: torch.Tensor, writes: dict[Any, list[Any]], scored: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the model's own pass with changes added, at scored positions; and their deviation in the first row."""
    layers, heads = parts["layers"], parts["heads"]
    with torch.no_grad(), root.trace(tokens, use_cache=False):
        ops.walk(root, parts["blocks"], parts["embeddings"], parts["points"], layers, set(), [], heads, [], writes)
        made = root.output.logits
        found = nnsight.save([made[:, scored], made[0].float().std()])
    return found[0], found[1]


def by_itself(
    root: Any, parts: dict[str, Any], points: Points, layers: list[int], device: Any
) -> list[list[torch.Tensor]]:
    """For each layer: q, k and v as ``project`` makes them; what ``combine`` makes of z; and what the module does."""
    width, paths = parts["heads"] * parts["d_head"], parts["paths"]
    every = []
    for layer in layers:
        block, z = parts["blocks"][layer], points[(layer, "z")]
        with torch.no_grad(), root.trace(nothing(device), use_cache=False) as tracer:
            normed = called(block, paths["norm_1"], points[(layer, "resid_pre")])
            sides = [parts["project"](block, normed, slice(start, start + width)) for start in (0, width, 2 * width)]
            written = parts["combine"](block, z, slice(0, width))
            given = called(block, paths["out"], z) - called(block, paths["out"], torch.zeros_like(z))
            found = nnsight.save([torch.cat(sides, -1), written, given])
            tracer.stop()
        every.append(list(found))
    return every


def distances(made: list[list[torch.Tensor]], points: Points, layers: list[int]) -> list[list[list[float]]]:
    """For each layer, how far ``project`` and ``combine`` are from the modules; the deviation of these."""
    found = []
    for layer, (sides, written, given) in zip(layers, made, strict=True):
        pairs = ((sides, points[(layer, "qkv")]), (written, given))
        found.append([[float((a.float() - b.float()).abs().max()), float(b.float().std())] for a, b in pairs])
    return found
