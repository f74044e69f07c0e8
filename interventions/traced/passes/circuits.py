"""A planned pass of circuits: each receiver reads the sum of what its senders write. Runs inside a trace.

What a receiver reads is the stream of the run that other edges carry, and for each kept edge what its sender writes now
less what it wrote there. So the empty circuit is that run to the last bit, and position embeddings and biases stay.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from ..attention import asks_in_part, ends_in_attention, z_of_sides
from ..logits import logits_kernels
from ..projections import combine, project, rotary_angles
from ..rows import apply_writes, mlp_with_writes, normed

if TYPE_CHECKING:
    from ..specs import CircuitRows, ModelParts, Points, ReadSite, ResolvedPass, WriteSite


def run_circuits(
    model: ModelParts, base: Points, spec: ResolvedPass, keep: dict[WriteSite, Any]
) -> dict[str, torch.Tensor]:
    """Run a planned pass whose conditions are circuits, from the first position on.

    Parameters
    ----------
    model : ModelParts
    base : Points
        What the base run has, by the points of a planned pass.
    spec : ResolvedPass
    keep : dict
        Comes with keys ``(layer, point)``, and gets what was there.

    Returns
    -------
    dict
        Kernel name to values, ``(row, scored)`` of logits or ``(row, layer, head)`` of patterns.
    """
    spec = {**spec, "angles": rotary_angles(model, base[(0, "stream")], spec["stop"])}
    values = {name: value.clone() for name, value in spec["base_attended"].items()}
    reading, layers = model["heads"] + 2 * model["kv_heads"], spec["layers"]
    at: Any = slice(0, spec["stop"])
    fed = carried(spec, (0, "input"), at)
    sent = fed.new_empty(1 + layers * (model["heads"] + 1), *fed.shape)
    sent[0] = fed
    for layer in range(spec["blocks"]):
        first, before = layer * (reading + 1), 1 + layer * (model["heads"] + 1)
        own = before + model["heads"]
        stream = carried(spec, (layer, "resid_pre"), at)
        streams = read_streams(spec, slice(first, first + reading), sent[:before], stream, at)
        z = z_of_sides(model, base, spec, layer, sides_of(model, spec, layer, streams), keep, values)
        if ends_in_attention(spec, layer, keep):
            return values
        if layer == layers - 1:
            at = spec["out"]
            sent = sent[:, :, at]
        z = apply_writes(z, (layer, "z"), spec, keep)
        send_by_heads(model, layer, z - carried(spec, (layer, "z"), at), sent[before:own])
        entered = carried(spec, (layer, "resid_pre" if model["parallel"] else "resid_mid"), at)
        last = slice(first + reading, first + reading + 1)
        mid = read_streams(spec, last, sent[: before if model["parallel"] else own], entered, at)[0]
        mlp_out = mlp_with_writes(model, base, spec, layer, mid, keep)
        mlp_out = apply_writes(mlp_out, (layer, "mlp_out"), spec, keep)
        torch.sub(mlp_out, carried(spec, (layer, "mlp_out"), at), out=sent[own])
    if spec["logits"]["kernels"] or (layers, "stream") in keep:
        stream = carried(spec, (layers - 1, "resid_post"), at)
        hidden = read_streams(spec, slice(layers * (reading + 1), None), sent, stream, at)[0]
        hidden = apply_writes(hidden, (layers, "stream"), spec, keep)
    if spec["logits"]["kernels"]:
        values.update(logits_kernels(model["norm"](hidden), model["unembed"], spec["logits"], spec["examples"]))
    return values


def sides_of(
    model: ModelParts, spec: ResolvedPass, layer: int, streams: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, each head of them from a stream of its own.

    Parameters
    ----------
    model : ModelParts
    spec : ResolvedPass
    layer : int
    streams : tensor (receiver, row, position, d_model)
        Of q of each head, then of k and of v of each key-value head.

    Returns
    -------
    tuple of tensors (row, position, width)
        q at scored positions only where `asks_in_part`.
    """
    module, size, heads = model["blocks"][layer], model["d_head"], model["heads"]
    read = normed(module, model["paths"].get("norm_1"), streams)
    made = [project(model, module, one, slice(number * size, (number + 1) * size)) for number, one in enumerate(read)]
    q = torch.cat(made[:heads], -1)
    k, v = (torch.cat(some, -1) for some in (made[heads : heads + model["kv_heads"]], made[-model["kv_heads"] :]))
    return q[:, spec["out"]] if asks_in_part(spec, layer) else q, k, v


def send_by_heads(model: ModelParts, layer: int, change: torch.Tensor, sent: torch.Tensor) -> None:
    """Put what a change of ``z`` changes of what each head writes where the senders lie.

    Parameters
    ----------
    model : ModelParts
    layer : int
    change : tensor (row, position, head * d_head)
    sent : tensor (head, row, position, d_model)
    """
    size = model["d_head"]
    for head in range(model["heads"]):
        own = slice(head * size, (head + 1) * size)
        sent[head] = combine(model, model["blocks"][layer], change[..., own], own)


def read_streams(
    spec: ResolvedPass, receivers: slice, sent: torch.Tensor, stream: torch.Tensor, at: Any
) -> torch.Tensor:
    """What some receivers read.

    Parameters
    ----------
    spec : ResolvedPass
    receivers : slice
        Among those of the graph.
    sent : tensor (sender, row, position, d_model)
        What the senders before them write, less what they wrote in the run that other edges carry.
    stream : tensor (row, position, d_model)
        Of that run.
    at : slice or tensor
        The positions.

    Returns
    -------
    tensor (receiver, row, position, d_model)
    """
    number = len(spec["circuits"][0]["kept"][receivers])
    streams = stream.repeat(number, 1, 1, 1)  # always a copy: what other edges carry is read by the next pass too
    for rows, circuits in by_condition(spec):
        kept = [circuit["kept"][receivers, : len(sent)].to(stream.dtype) for circuit in circuits]
        value, read = sent[:, rows], streams[:, rows]
        if len(circuits) == 1 and circuits[0]["positions"] is None:
            read.view(number, -1).addmm_(kept[0], value.view(len(sent), -1))
        else:
            read += torch.einsum("prs,snpd->rnpd", weights_by_position(circuits, kept, spec["stop"])[at], value)
    return streams


def weights_by_position(circuits: list[CircuitRows], kept: list[torch.Tensor], length: int) -> torch.Tensor:
    """Which edges are kept at each position ``(position, receiver, sender)``: all of them where no circuit is."""
    weights = torch.ones(length, *kept[0].shape, dtype=kept[0].dtype, device=kept[0].device)
    for circuit, own in zip(circuits, kept, strict=True):
        weights[slice(None) if circuit["positions"] is None else circuit["positions"]] = own
    return weights


def carried(spec: ResolvedPass, site: ReadSite, at: Any) -> torch.Tensor:
    """What the run that other edges carry has at a site, for each row ``(row, position, width)``."""
    made = []
    for _, circuits in by_condition(spec):
        value = circuits[0]["carried"][site][:, : spec["stop"]].expand(spec["examples"], -1, -1)
        for circuit in circuits[1:]:
            value = value.clone()
            positions: Any = circuit["positions"]
            value[:, positions] = circuit["carried"][site][:, positions]
        made.append(value[:, at])
    return made[0] if len(made) == 1 else torch.cat(made)


def by_condition(spec: ResolvedPass) -> list[tuple[slice, list[CircuitRows]]]:
    """The rows of each condition of a pass, and its circuits, one for each set of positions."""
    ordered = sorted(spec["circuits"], key=lambda circuit: int(circuit["rows"].start))
    found = groupby(ordered, lambda circuit: int(circuit["rows"].start))
    return [(some[0]["rows"], some) for some in (list(group) for _, group in found)]
