"""The planned forward pass: rows join where they are first changed. Runs inside a trace.

Plain functions of tensors, numbers, slices, handles and the dicts of `specs`: nothing here may need this package where
it runs. Rows stand in the order in which their conditions join, so that the rows at work are always the first ones and
those that join go behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .attention import attention, recomputed_z
from .logits import logits_kernels
from .projections import combine, project, rotary_angles
from .rows import append_joining_rows, append_rows, apply_writes, call_module

if TYPE_CHECKING:
    from .specs import ModelParts, Points, ReceiverKey, ResolvedPass, TensorWrite, WriteSite


def run(model: ModelParts, base: Points, spec: ResolvedPass, keep: dict[WriteSite, Any]) -> dict[str, torch.Tensor]:
    """Run a planned pass.

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
    spec = {**spec, "angles": rotary_angles(model, next(iter(base.values())), spec["stop"])}
    if spec["senders"]:
        spec = with_path_values(spec, path_values(model, base, spec))
    hidden, attended = None, {name: values.clone() for name, values in spec["base_attended"].items()}
    last = spec["layers"] - 1
    for layer in range(spec["first"], spec["layers"] + bool(spec["logits"]["kernels"])):
        at = spec["out"] if layer > last else slice(spec["start"], spec["stop"])
        hidden = append_joining_rows(hidden, base, (layer, "stream"), at, spec, (layer, 0))
        hidden = apply_writes(hidden, (layer, "stream"), spec, keep)
        if layer <= last:
            hidden = (parallel_block if model["parallel"] else block)(model, base, spec, layer, hidden, keep, attended)
    values = dict(attended)
    if spec["logits"]["kernels"]:
        values.update(logits_kernels(model["norm"](hidden), model["unembed"], spec["logits"], spec["examples"]))
    return values


def block(
    model: ModelParts,
    base: Points,
    spec: ResolvedPass,
    layer: int,
    hidden: torch.Tensor | None,
    keep: dict[WriteSite, Any],
    attended: dict[str, torch.Tensor],
) -> torch.Tensor | None:
    """One block on the rows that are at work, and on those that join in it. Of the last, scored positions only.

    Parameters
    ----------
    model : ModelParts
    base : Points
        What the base run has, by the points of a planned pass.
    spec : ResolvedPass
    layer : int
    hidden : tensor (row, position, d_model), optional
        The stream of the rows at work; None where there is none.
    keep : dict
        Gets what is at the sites that are its keys.
    attended : dict
        Kernel name to values ``(row, layer, head)``, which are put in.

    Returns
    -------
    tensor (row, position, d_model) or None
        The stream that leaves the block; None where no row is at work, or where nothing reads it.
    """
    module, last = model["blocks"][layer], layer == spec["layers"] - 1
    start = spec["start"]
    window = slice(start, spec["stop"])
    at = spec["out"] if last else window
    z = resid = None
    if hidden is not None:
        z = attention(model, base, spec, layer, hidden, keep, attended)
        resid = hidden[:, spec["out"] - start] if last else hidden
    if last and not spec["logits"]["kernels"]:
        return None
    if (layer, 1) in spec["joins"]:
        z = append_rows(z, recomputed_z(model, base, spec, layer, at))
        resid = append_joining_rows(resid, base, (layer, "stream"), at, spec, (layer, 1))
    z = append_joining_rows(z, base, (layer, "z"), at, spec, (layer, 2))
    resid = append_joining_rows(resid, base, (layer, "stream"), at, spec, (layer, 2))
    z = apply_writes(z, (layer, "z"), spec, keep)
    attn_out = None if z is None else call_module(module, model["paths"]["out"], z)
    attn_out = append_joining_rows(attn_out, base, (layer, "attn_out"), at, spec, (layer, 3))
    resid = append_joining_rows(resid, base, (layer, "stream"), at, spec, (layer, 3))
    attn_out = apply_writes(attn_out, (layer, "attn_out"), spec, keep)
    mid = None if attn_out is None or resid is None else resid + attn_out
    mid = append_joining_rows(mid, base, (layer, "resid_mid"), at, spec, (layer, 4))
    mid = apply_writes(mid, (layer, "mid"), spec, keep)
    mlp_out = None if mid is None else mlp(model, layer, mid)
    mlp_out = append_joining_rows(mlp_out, base, (layer, "mlp_out"), at, spec, (layer, 5))
    mid = append_joining_rows(mid, base, (layer, "resid_mid"), at, spec, (layer, 5))
    mlp_out = apply_writes(mlp_out, (layer, "mlp_out"), spec, keep)
    return None if mid is None or mlp_out is None else mid + mlp_out


def parallel_block(
    model: ModelParts,
    base: Points,
    spec: ResolvedPass,
    layer: int,
    hidden: torch.Tensor | None,
    keep: dict[WriteSite, Any],
    attended: dict[str, torch.Tensor],
) -> torch.Tensor | None:
    """`block` where the MLP reads what attention reads: rows that join later have the MLP of the base run.

    Parameters
    ----------
    model, base, spec, layer, hidden, keep, attended
        As for `block`.

    Returns
    -------
    tensor (row, position, d_model) or None
        As of `block`.
    """
    module, last = model["blocks"][layer], layer == spec["layers"] - 1
    start = spec["start"]
    at = spec["out"] if last else slice(start, spec["stop"])
    z = resid = mlp_out = None
    if hidden is not None:
        z = attention(model, base, spec, layer, hidden, keep, attended)
        resid = hidden[:, spec["out"] - start] if last else hidden
    if last and not spec["logits"]["kernels"]:
        return None
    if resid is not None:
        mlp_out = mlp(model, layer, resid)
    if (layer, 1) in spec["joins"]:
        z = append_rows(z, recomputed_z(model, base, spec, layer, at))
    z = append_joining_rows(z, base, (layer, "z"), at, spec, (layer, 2))
    z = apply_writes(z, (layer, "z"), spec, keep)
    attn_out = None if z is None else call_module(module, model["paths"]["out"], z)
    for stage in (3, 5):
        attn_out = append_joining_rows(attn_out, base, (layer, "attn_out"), at, spec, (layer, stage))
        attn_out = apply_writes(attn_out, (layer, "attn_out"), spec, keep) if stage == 3 else attn_out
    for stage in (1, 2, 3, 5):
        resid = append_joining_rows(resid, base, (layer, "stream"), at, spec, (layer, stage))
        mlp_out = append_joining_rows(mlp_out, base, (layer, "mlp_out"), at, spec, (layer, stage))
    mlp_out = apply_writes(mlp_out, (layer, "mlp_out"), spec, keep)
    return None if resid is None or attn_out is None or mlp_out is None else resid + attn_out + mlp_out


def path_values(model: ModelParts, base: Points, spec: ResolvedPass) -> dict[ReceiverKey, torch.Tensor]:
    """What direct paths bring to their receivers. Every attention layer on the way stays as in the base run."""
    found: dict[ReceiverKey, torch.Tensor] = {}
    window = slice(spec["start"], spec["stop"])
    for sender, change in zip(spec["senders"], spec["changes"], strict=True):
        first, of_mlp = sender["layer"], sender["component"] == "mlp_out"
        of_head = sender["component"] == "z"
        delta = combine(model, model["blocks"][first], change, sender["columns"]) if of_head else change
        for layer in range(first, max(receiver["layer"] for receiver in sender["receivers"])):
            if sender["through_mlps"] and model["parallel"]:
                if layer > first:  # what is sent from a layer does not enter its own MLP
                    stream = base[(layer, "stream")][:, window] + delta
                    delta = delta + mlp(model, layer, stream) - base[(layer, "mlp_out")][:, window]
            elif sender["through_mlps"] and not (layer == first and of_mlp):
                mid = base[(layer, "resid_mid")][:, window] + delta
                delta = mid + mlp(model, layer, mid) - base[(layer + 1, "stream")][:, window]
            for receiver in sender["receivers"]:
                if receiver["layer"] == layer + 1:
                    columns = receiver["columns"]
                    into = delta if columns is None else received(model, base, layer + 1, window, delta, columns)
                    found[receiver["key"]] = into
    return found


def received(
    model: ModelParts, base: Points, layer: int, window: slice, delta: torch.Tensor, columns: slice
) -> torch.Tensor:
    """These columns of q, k and v of a layer whose stream has changed by `delta`, ``(example, position, d_model)``.

    Parameters
    ----------
    model : ModelParts
    base : Points
    layer : int
    window : slice
        Positions that are computed.
    delta : tensor (example, position, d_model)
    columns : slice

    Returns
    -------
    tensor (example, position, column)
    """
    block, stream = model["blocks"][layer], base[(layer, "stream")][:, window] + delta
    made: torch.Tensor = project(model, block, call_module(block, model["paths"]["norm_1"], stream), columns)
    return made


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


def run_without_grad(model: ModelParts, base: Points, spec: ResolvedPass) -> dict[str, torch.Tensor]:
    """`run` without gradients."""
    with torch.no_grad():
        return run(model, base, spec, {})


def slopes(
    model: ModelParts, base: Points, spec: ResolvedPass, sites: list[WriteSite], names: list[str]
) -> tuple[dict[WriteSite, torch.Tensor], dict[str, dict[WriteSite, torch.Tensor]]]:
    """What is at sites in a pass, and the derivative by it of each kernel's mean over scored positions, summed.

    Parameters
    ----------
    model : ModelParts
    base : Points
        What the base run has, by the points of a planned pass.
    spec : ResolvedPass
    sites : list of WriteSite
    names : list of str
        Of kernels.

    Returns
    -------
    tuple of dict and dict
        What is at the sites; and for each kernel the slopes, of the same shapes, by site.
    """
    keep: dict[WriteSite, Any] = dict.fromkeys(sites)
    leaves = {point: value.detach().requires_grad_() for point, value in base.items()}
    values = run(model, leaves, spec, keep)
    found = {}
    for name in names:
        total = values[name].to(torch.promote_types(values[name].dtype, torch.float32)).mean(-1).sum()
        slope = torch.autograd.grad(total, list(keep.values()), retain_graph=True, allow_unused=True)
        found[name] = {
            site: torch.zeros_like(value) if one is None else one
            for (site, value), one in zip(keep.items(), slope, strict=True)
        }
    return {site: value.detach() for site, value in keep.items()}, found


def mlp(model: ModelParts, layer: int, mid: torch.Tensor) -> torch.Tensor:
    """What the MLP of a layer makes of the stream that enters it."""
    module = model["blocks"][layer]
    return call_module(module, model["paths"]["mlp"], call_module(module, model["paths"]["norm_2"], mid))
