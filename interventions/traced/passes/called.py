"""A planned pass through blocks that are called: the model's own blocks run, read and written at module boundaries.

Runs in a trace of the model's own forward pass on the rows of the pass, so that the model itself makes masks, rotary
angles and whatever else its blocks take. Every row joins at the stream of the first layer that is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..activations import put_at_side, read_side, value_at_side
from ..attention import score_patterns
from ..logits import logits_kernels
from ..projections import split_sides
from ..rows import apply_writes

if TYPE_CHECKING:
    from ..specs import ModelParts, Points, ResolvedPass, WriteSite

WRITTEN_AT = {"qkv": ("q", "k", "v"), "attn_out": ("attn_out", "mid")}
"""Points of a planned pass that are written at a point of a block, where they are not the point itself."""


def run(model: ModelParts, base: Points, spec: ResolvedPass, keep: dict[WriteSite, Any]) -> dict[str, torch.Tensor]:
    """Run a planned pass through blocks that are called.

    Parameters
    ----------
    model : ModelParts
    base : Points
        What the base run has: the stream at which the rows join.
    spec : ResolvedPass
    keep : dict
        Comes with keys ``(layer, point)``, and gets what was there.

    Returns
    -------
    dict
        Kernel name to values, ``(row, scored)`` of logits or ``(row, layer, head)`` of patterns.
    """
    first, end, layers = spec["first"], spec["blocks"], spec["layers"]
    at = spec["out"] if first == layers else slice(0, spec["stop"])
    hidden = base[(first, "stream")][:, at].repeat(spec["conditions"], 1, 1)
    hidden = apply_writes(hidden, (first, "stream"), spec, keep)
    values = {name: value.clone() for name, value in spec["base_attended"].items()}
    for layer in range(end if first < layers else 0):
        block = model["blocks"][layer]
        if layer < first:
            block.skip((hidden, *[None] * (model["gives"] - 1)) if model["gives"] else hidden)
            continue
        site = (layer, "stream")
        if layer > first and (site in keep or spec["writes"].get(site)):
            hidden = apply_writes(hidden.clone(), site, spec, keep)
            block.input = hidden
        elif layer == first == 0:
            block.input = hidden
        through_block(model, spec, layer, hidden, keep, values)
        hidden = block.output[0] if model["gives"] else block.output
    if first < end and ((end, "stream") in keep or end == layers):
        hidden = hidden[:, spec["out"]] if end == layers else hidden
        hidden = apply_writes(hidden.clone(), (end, "stream"), spec, keep)
    if spec["logits"]["kernels"]:
        values.update(logits_kernels(model["norm"](hidden), model["unembed"], spec["logits"], spec["examples"]))
    return values


def through_block(
    model: ModelParts,
    spec: ResolvedPass,
    layer: int,
    hidden: torch.Tensor,
    keep: dict[WriteSite, Any],
    attended: dict[str, torch.Tensor],
) -> None:
    """Read and write in a block on its way, in forward order.

    Parameters
    ----------
    model : ModelParts
    spec : ResolvedPass
    layer : int
    hidden : tensor (row, position, d_model)
        The stream that enters the block.
    keep : dict
        Gets what is at the sites that are its keys.
    attended : dict
        Kernel name to values ``(row, layer, head)``, which are put in.
    """
    block = model["blocks"][layer]
    for point, places in model["points"]:
        if point == "rotated" and (spec["pattern_kernels"] or (layer, "pattern") in keep):
            pattern = read_side(block, *places[0])
            if (layer, "pattern") in keep:
                keep[(layer, "pattern")] = pattern
            score_patterns(spec, layer, pattern, attended)
            continue
        sites = [(layer, name) for name in WRITTEN_AT.get(point, (point,))]
        if not any([site in keep or spec["writes"].get(site) for site in sites]):
            continue
        for path, side in places:
            value = value_at_side(model, block, point, path, side, len(hidden)).clone()
            if point == "qkv":
                value = written_qkv(model, spec, layer, value, path, keep)
            else:
                value = apply_writes(value, sites[0], spec, keep)
            if point == "attn_out" and (sites[1] in keep or spec["writes"].get(sites[1])):
                value = apply_writes(hidden + value, sites[1], spec, keep) - hidden
            put_at_side(model, block, point, path, side, value.clone())  # some blocks add to it in place


def written_qkv(
    model: ModelParts, spec: ResolvedPass, layer: int, value: torch.Tensor, path: str, keep: dict[WriteSite, Any]
) -> torch.Tensor:
    """What a module gives of q, k and v, side by side where it gives all three, after what is written to them.

    Parameters
    ----------
    model : ModelParts
    spec : ResolvedPass
    layer : int
    value : tensor (row, position, width)
    path : str
        Of the module.
    keep : dict
        Gets what is at the sites that are its keys.

    Returns
    -------
    tensor (row, position, width)
    """
    names = [name for name in ("q", "k", "v") if model["paths"].get(name) == path]
    parts = [value] if names else [part.clone() for part in split_sides(model, value)]
    made = [
        apply_writes(part, (layer, name), spec, keep)
        for name, part in zip(names or ("q", "k", "v"), parts, strict=True)
    ]
    return made[0] if names else torch.cat(made, -1)
