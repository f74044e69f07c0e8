"""The planned forward pass: rows join where they are first changed. Runs inside a trace; imports torch and its parts.

Plain functions of tensors, numbers, slices, handles and dicts of them: nothing here may need this package where it
runs. Rows are conditions times examples, condition by condition, in the order in which conditions join, so that the
rows at work are always the first ones and those that join go behind them.

Two dicts say what to do. ``model`` holds what there is to know of the model: handles ``blocks norm unembed rotary``
(None where nothing is turned); ``paths``, name to the path of a module in a block; ``layout`` and ``transposed`` of its
weights, see `projections`; ``heads kv_heads d_head parallel``; and for each layer ``scalings`` and ``windows``. ``job``
says what this pass does:

================  ===================================================================================
``examples``      number of examples
``layers``        number of layers; ``first``, the layer where the first condition joins
``start stop``    positions that are computed; keys and values before ``start`` come from the base run
``out``           scored positions from ``start`` on, as a tensor of positions
``joins``         ``(layer, stage)`` to the number of conditions that join there
``writes``        ``(layer, place)`` to a list of ``(rows, positions, columns, how, value)``; for ``pattern``
                  the columns are heads; for ``scores``, ``(rows, queries, heads, keys)``
``pairs``         layer to ``(condition, head)`` lists, of conditions that join at ``q k v pattern``
``pair_writes``   as ``writes``, for the rows of pairs
``senders``       of paths, see `path_values`
``watch``         kernels of patterns, ``(name, kernel, arguments)``; ``base_attended``, name to values
``score``         kernels of logits, see `score`
``angles``        put in by `run`, see `rotation`
================  ===================================================================================
"""

from __future__ import annotations

from typing import Any

import torch

from .attention import attention, redone
from .logits import score
from .projections import combine, project
from .rotary import angles
from .rows import Base, append_joining_rows, apply_writes, call_module, together


def run(model: dict[str, Any], base: Base, job: dict[str, Any], keep: dict[Any, torch.Tensor]) -> dict[str, Any]:
    """A pass: name of a kernel to its values, ``(row, scored)`` or ``(row, layer, head)``.

    `keep` comes with keys ``(layer, place)`` and is filled with what was at these places.
    """
    job = {**job, "angles": angles(model, next(iter(base.values())), job["stop"])}
    fill_paths(job, path_values(model, base, job) if job["senders"] else {})
    hidden, attended = None, {name: values.clone() for name, values in job["base_attended"].items()}
    last = job["layers"] - 1
    for layer in range(job["first"], job["layers"] + bool(job["score"]["kernels"])):
        at = job["out"] if layer > last else slice(job["start"], job["stop"])
        hidden = append_joining_rows(hidden, base, (layer, "stream"), at, job, (layer, 0))
        hidden = apply_writes(hidden, layer, "stream", job, keep)
        if layer <= last:
            hidden = (parallel if model["parallel"] else block)(model, base, job, layer, hidden, keep, attended)
    values: dict[str, Any] = dict(attended)
    if job["score"]["kernels"]:
        values.update(score(model["norm"](hidden), model["unembed"], job["score"], job["examples"]))
    return values


def block(
    model: dict[str, Any],
    base: Base,
    job: dict[str, Any],
    layer: int,
    hidden: torch.Tensor | None,
    keep: dict[Any, torch.Tensor],
    attended: dict[str, torch.Tensor],
) -> torch.Tensor | None:
    """One block on the rows that are at work, and on those that join in it. Of the last, scored positions only."""
    module, last = model["blocks"][layer], layer == job["layers"] - 1
    start = job["start"]
    window = slice(start, job["stop"])
    at = job["out"] if last else window
    z = resid = None
    if hidden is not None:
        z = attention(model, base, job, layer, hidden, keep, attended)
        resid = hidden[:, job["out"] - start] if last else hidden
    if last and not job["score"]["kernels"]:
        return None
    if (layer, 1) in job["joins"]:
        z = together(z, redone(model, base, job, layer, at))
        resid = append_joining_rows(resid, base, (layer, "stream"), at, job, (layer, 1))
    z = append_joining_rows(z, base, (layer, "z"), at, job, (layer, 2))
    resid = append_joining_rows(resid, base, (layer, "stream"), at, job, (layer, 2))
    z = apply_writes(z, layer, "z", job, keep)
    attn_out = None if z is None else call_module(module, model["paths"]["out"], z)
    attn_out = append_joining_rows(attn_out, base, (layer, "attn_out"), at, job, (layer, 3))
    resid = append_joining_rows(resid, base, (layer, "stream"), at, job, (layer, 3))
    attn_out = apply_writes(attn_out, layer, "attn_out", job, keep)
    mid = None if attn_out is None or resid is None else resid + attn_out
    mid = append_joining_rows(mid, base, (layer, "resid_mid"), at, job, (layer, 4))
    mid = apply_writes(mid, layer, "mid", job, keep)
    mlp_out = None if mid is None else mlp(model, layer, mid)
    mlp_out = append_joining_rows(mlp_out, base, (layer, "mlp_out"), at, job, (layer, 5))
    mid = append_joining_rows(mid, base, (layer, "resid_mid"), at, job, (layer, 5))
    mlp_out = apply_writes(mlp_out, layer, "mlp_out", job, keep)
    return None if mid is None or mlp_out is None else mid + mlp_out


def parallel(
    model: dict[str, Any],
    base: Base,
    job: dict[str, Any],
    layer: int,
    hidden: torch.Tensor | None,
    keep: dict[Any, torch.Tensor],
    attended: dict[str, torch.Tensor],
) -> torch.Tensor | None:
    """`block` where the MLP reads what attention reads: rows that join later have the MLP of the base run."""
    module, last = model["blocks"][layer], layer == job["layers"] - 1
    start = job["start"]
    at = job["out"] if last else slice(start, job["stop"])
    z = resid = mlp_out = None
    if hidden is not None:
        z = attention(model, base, job, layer, hidden, keep, attended)
        resid = hidden[:, job["out"] - start] if last else hidden
    if last and not job["score"]["kernels"]:
        return None
    if resid is not None:
        mlp_out = mlp(model, layer, resid)
    if (layer, 1) in job["joins"]:
        z = together(z, redone(model, base, job, layer, at))
    z = append_joining_rows(z, base, (layer, "z"), at, job, (layer, 2))
    z = apply_writes(z, layer, "z", job, keep)
    attn_out = None if z is None else call_module(module, model["paths"]["out"], z)
    for stage in (3, 5):
        attn_out = append_joining_rows(attn_out, base, (layer, "attn_out"), at, job, (layer, stage))
        attn_out = apply_writes(attn_out, layer, "attn_out", job, keep) if stage == 3 else attn_out
    for stage in (1, 2, 3, 5):
        resid = append_joining_rows(resid, base, (layer, "stream"), at, job, (layer, stage))
        mlp_out = append_joining_rows(mlp_out, base, (layer, "mlp_out"), at, job, (layer, stage))
    mlp_out = apply_writes(mlp_out, layer, "mlp_out", job, keep)
    return None if resid is None or attn_out is None or mlp_out is None else resid + attn_out + mlp_out


def path_values(model: dict[str, Any], base: Base, job: dict[str, Any]) -> dict[Any, torch.Tensor]:
    """What direct paths bring to their receivers.

    ``job["senders"]`` is a list of ``(layer, kind, columns, change, through_mlps, receivers)``: `change` is what the
    sender's value changes by, ``(example, position, width)``; `receivers` are ``(key, layer, columns of q k v)``, with
    no columns for the logits. Every attention layer on the way stays as in the base run.
    """
    found: dict[Any, torch.Tensor] = {}
    window = slice(job["start"], job["stop"])
    for layer, kind, columns, change, through_mlps, receivers in job["senders"]:
        module = model["blocks"][layer]
        delta = combine(model, module, change, columns) if kind == "z" else change
        end = max(receiver[1] for receiver in receivers)
        for now in range(layer, end):
            if through_mlps and model["parallel"]:
                if now > layer:  # what is sent from a layer does not enter its own MLP
                    stream = base[(now, "stream")][:, window] + delta
                    delta = delta + mlp(model, now, stream) - base[(now, "mlp_out")][:, window]
            elif through_mlps and not (now == layer and kind == "mlp_out"):
                mid = base[(now, "resid_mid")][:, window] + delta
                delta = mid + mlp(model, now, mid) - base[(now + 1, "stream")][:, window]
            for key, at, part in receivers:
                if at != now + 1:
                    continue
                if part is None:
                    found[key] = delta
                    continue
                stream = base[(at, "stream")][:, window] + delta
                receiver = model["blocks"][at]
                found[key] = project(model, receiver, call_module(receiver, model["paths"]["norm_1"], stream), part)
    return found


def fill_paths(job: dict[str, Any], values: dict[Any, torch.Tensor]) -> None:
    """Turn the writes that wait for what a path brings, ``("path", (key, positions))``, into writes of it."""
    for table in (job["writes"], job["pair_writes"]) if values else ():
        for writes in table.values():
            for number, entry in enumerate(writes):
                if entry[-2] == "path":
                    key, positions = entry[-1]
                    how = "add" if key[2] == "stream" else "set"  # the logits, which have other paths too
                    writes[number] = (*entry[:-2], how, values[key][:, positions])


def run_without_grad(model: dict[str, Any], base: Base, job: dict[str, Any]) -> dict[str, Any]:
    """`run` without gradients."""
    with torch.no_grad():
        return run(model, base, job, {})


def slopes(
    model: dict[str, Any], base: Base, job: dict[str, Any], places: list[tuple[int, str]], names: list[str]
) -> tuple[dict[Any, torch.Tensor], dict[str, dict[Any, torch.Tensor]]]:
    """What is at places in a pass, and the derivative by it of each kernel's mean over scored positions, summed."""
    keep: dict[Any, Any] = dict.fromkeys(places)
    leaves = {point: value.detach().requires_grad_() for point, value in base.items()}
    values = run(model, leaves, job, keep)
    found = {}
    for name in names:
        total = values[name].to(torch.promote_types(values[name].dtype, torch.float32)).mean(-1).sum()
        slope = torch.autograd.grad(total, list(keep.values()), retain_graph=True, allow_unused=True)
        found[name] = {
            place: torch.zeros_like(value) if one is None else one
            for (place, value), one in zip(keep.items(), slope, strict=True)
        }
    return {place: value.detach() for place, value in keep.items()}, found


def mlp(model: dict[str, Any], layer: int, mid: torch.Tensor) -> torch.Tensor:
    """What the MLP of a layer makes of the stream that enters it."""
    module = model["blocks"][layer]
    return call_module(module, model["paths"]["mlp"], call_module(module, model["paths"]["norm_2"], mid))
