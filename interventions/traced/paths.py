"""What direct paths bring from a sender to its receivers in a planned pass. Runs inside a trace.

A path changes the stream by what its sender writes otherwise; attention on the way stays as in the base run, and so do
MLPs unless the path goes through them. A receiver puts its own norm over the stream that it reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .projections import combine, project
from .rows import after, call_module, normed

if TYPE_CHECKING:
    from .specs import (
        ModelParts,
        PathReceiver,
        PathSender,
        Points,
        ReceiverKey,
        ResolvedPass,
        RunCache,
        TensorWrite,
    )


def path_values(model: ModelParts, base: Points, spec: ResolvedPass) -> dict[ReceiverKey, torch.Tensor]:
    """What direct paths bring to their receivers. Every attention layer on the way stays as in the base run."""
    found: dict[ReceiverKey, torch.Tensor] = {}
    window = slice(spec["start"], spec["stop"])
    for sender, change in zip(spec["senders"], spec["changes"], strict=True):
        first, component, through = sender["layer"], sender["component"], sender["through_mlps"]
        delta = sent_by_head(model, base, sender, window, change) if component == "z" else change
        receivers: dict[int, list[PathReceiver]] = {}
        for receiver in sender["receivers"]:
            receivers.setdefault(receiver["layer"], []).append(receiver)
        for layer in range(first, max(receivers) + 1) if through else sorted(receivers):
            found.update(received(model, base, layer, window, delta, receivers.get(layer, [])))
            before_mlp = layer > first or (component in ("z", "attn_out") and not model["parallel"])
            if through and before_mlp and layer < max(receivers):
                if model["parallel"]:
                    stream = base[(layer, "stream")][:, window] + delta
                    delta = delta + mlp(model, layer, stream) - base[(layer, "mlp_out")][:, window]
                else:
                    mid = base[(layer, "resid_mid")][:, window] + delta
                    delta = mid + mlp(model, layer, mid) - base[(layer + 1, "stream")][:, window]
    return found


def sent_by_head(
    model: ModelParts, base: Points, sender: PathSender, window: slice, change: torch.Tensor
) -> torch.Tensor:
    """What a change of ``z`` of a head changes of what attention adds; other heads stay as in the base run.

    Parameters
    ----------
    model : ModelParts
    base : Points
        What the base run has, by the points of a planned pass.
    sender : PathSender
    window : slice
        The positions that are computed.
    change : tensor (example, position, column)

    Returns
    -------
    tensor (example, position, d_model)
    """
    layer, paths = sender["layer"], model["paths"]
    block = model["blocks"][layer]
    delta = combine(model, block, change, sender["columns"])
    if "attn_norm" not in paths:
        return delta
    made = call_module(block, paths["out"], base[(layer, "z")][:, window])
    return call_module(block, paths["attn_norm"], made + delta) - call_module(block, paths["attn_norm"], made)


def received(
    model: ModelParts,
    base: Points,
    layer: int,
    window: slice,
    delta: torch.Tensor,
    receivers: list[PathReceiver],
) -> dict[ReceiverKey, torch.Tensor]:
    """What the receivers of a layer make of a stream that has changed.

    Parameters
    ----------
    model : ModelParts
    base : Points
    layer : int
    window : slice
        Positions that are computed.
    delta : tensor (example, position, d_model)
        What the stream has changed by.
    receivers : list of PathReceiver
        ``q k v`` of heads, the MLP, or the logits, which get the change as it is.

    Returns
    -------
    dict
        ``(example, position, width)`` by the key of the receiver.
    """
    found: dict[ReceiverKey, torch.Tensor] = {}
    read = None
    for receiver in receivers:
        columns, key = receiver["columns"], receiver["key"]
        if receiver["point"] == "mlp_in":
            point = "stream" if model["parallel"] else "resid_mid"
            changed = base[(layer, point)][:, window] + delta
            found[key] = normed(model["blocks"][layer], model["paths"].get("norm_2"), changed)
        elif columns is None:
            found[key] = delta
        else:
            block = model["blocks"][layer]
            if read is None:
                read = normed(block, model["paths"].get("norm_1"), base[(layer, "stream")][:, window] + delta)
            found[key] = project(model, block, read, columns)
    return found


def with_path_values(spec: ResolvedPass, values: dict[ReceiverKey, torch.Tensor]) -> ResolvedPass:
    """`spec` with what paths bring in the writes that wait for it."""
    made = [
        {site: [brought(write, values) for write in writes] for site, writes in table.items()}
        for table in (spec["writes"], spec["pair_writes"])
    ]
    return {**spec, "writes": made[0], "pair_writes": made[1]}


def brought(write: TensorWrite, values: dict[ReceiverKey, torch.Tensor]) -> TensorWrite:
    """A write with what a path brings, if it waits for that."""
    value = write["value"]
    if not isinstance(value, dict) or value["kind"] != "path":
        return write
    return {**write, "value": values[value["receiver"]][:, value["positions"]]}


def mlp(model: ModelParts, layer: int, mid: torch.Tensor) -> torch.Tensor:
    """What the MLP of a layer makes of the stream that enters it."""
    module, paths = model["blocks"][layer], model["paths"]
    made = call_module(module, paths["mlp"], normed(module, paths.get("norm_2"), mid))
    return after(module, paths.get("mlp_norm"), made)


def sender_change(sender: PathSender, cache: RunCache) -> torch.Tensor:
    """What the value of a path's sender changes by: ``(example, position, column)``."""
    site, window = sender["site"], sender["window"]
    base = cache["base"][site]
    change: torch.Tensor = (cache["sources"][sender["run"]][site] - base)[:, window, sender["columns"]]
    if sender["positions"] is None:
        return change
    marks = torch.zeros(base.shape[1], device=change.device, dtype=torch.bool)
    marks[sender["positions"]] = True
    return change * marks[window, None]
