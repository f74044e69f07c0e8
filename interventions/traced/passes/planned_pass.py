"""The planned forward pass, in which rows join where they are first changed, and what its writes put in.

Plain functions of tensors, numbers, slices, handles and the dicts of `specs`: nothing here may need this package where
it runs. Rows stand in the order in which their conditions join, so that the rows at work are always the first ones and
those that join go behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..activations import pattern_between
from ..attention import attention, ends_in_attention, recomputed_z
from ..logits import logits_kernels
from ..projections import combine, project, rotary_angles
from ..rows import (
    IN_MLP,
    append_joining_rows,
    append_rows,
    apply_writes,
    call_module,
    mlp,
    mlp_with_writes,
    normed,
    points_of_source,
    write_into,
)
from .called import run as run_called
from .circuits import run_circuits

if TYPE_CHECKING:
    from ..specs import (
        CircuitRows,
        EmbeddingSum,
        FromRun,
        LogitsSpec,
        ModelParts,
        PassSpec,
        PathReceiver,
        PathSender,
        Points,
        ReceiverKey,
        ResolvedPass,
        RunCache,
        TensorWrite,
        Value,
        WriteSite,
    )


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
    if model["called"]:
        return run_called(model, base, spec, keep)
    if spec["circuits"]:
        return run_circuits(model, base, spec, keep)
    spec = {**spec, "angles": rotary_angles(model, next(iter(base.values())), spec["stop"])}
    if spec["senders"]:
        spec = with_path_values(spec, path_values(model, base, spec))
    hidden, attended = None, {name: values.clone() for name, values in spec["base_attended"].items()}
    last, end = spec["layers"] - 1, spec["blocks"]
    for layer in range(spec["first"], end + bool(spec["logits"]["kernels"] or (end, "stream") in keep)):
        at = spec["out"] if layer > last else slice(spec["start"], spec["stop"])
        hidden = append_joining_rows(hidden, base, (layer, "stream"), at, spec, (layer, "stream"))
        hidden = apply_writes(hidden, (layer, "stream"), spec, keep)
        if layer < end:
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
    last = layer == spec["layers"] - 1
    start = spec["start"]
    window = slice(start, spec["stop"])
    at = spec["out"] if last else window
    hidden = append_joining_rows(hidden, base, (layer, "stream"), window, spec, (layer, "attn_in"))
    z = resid = None
    if hidden is not None:
        z = attention(model, base, spec, layer, hidden, keep, attended)
        resid = hidden[:, spec["out"] - start] if last else hidden
    if ends_in_attention(spec, layer, keep):
        return None
    if (layer, "qkv") in spec["joins"]:
        z = append_rows(z, recomputed_z(model, base, spec, layer, at))
        resid = append_joining_rows(resid, base, (layer, "stream"), at, spec, (layer, "qkv"))
    z = append_joining_rows(z, base, (layer, "z"), at, spec, (layer, "z"))
    resid = append_joining_rows(resid, base, (layer, "stream"), at, spec, (layer, "z"))
    z = written_z(z, layer, spec, keep)
    attn_out = None if z is None else added_by_heads(model, spec, layer, z, keep)
    attn_out = append_joining_rows(attn_out, base, (layer, "attn_out"), at, spec, (layer, "attn_out"))
    resid = append_joining_rows(resid, base, (layer, "stream"), at, spec, (layer, "attn_out"))
    attn_out = apply_writes(attn_out, (layer, "attn_out"), spec, keep)
    mid = None if attn_out is None or resid is None else resid + attn_out
    mid = append_joining_rows(mid, base, (layer, "resid_mid"), at, spec, (layer, "mid"))
    mid = apply_writes(mid, (layer, "mid"), spec, keep)
    mlp_out = mlp_with_writes(model, base, spec, layer, mid, keep)
    mlp_out = append_joining_rows(mlp_out, base, (layer, "mlp_out"), at, spec, (layer, "mlp_out"))
    for stage in (*IN_MLP, "mlp_out"):
        mid = append_joining_rows(mid, base, (layer, "resid_mid"), at, spec, (layer, stage))
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
    """`block` where the MLP reads what attention reads: rows that join in attention have the MLP of the base run.

    Those that join in the MLP have the attention of the base run. No row that joins in attention is written to in the
    MLP of the same layer: the plan has such a row join at its stream.

    Parameters
    ----------
    model, base, spec, layer, hidden, keep, attended
        As for `block`.

    Returns
    -------
    tensor (row, position, d_model) or None
        As of `block`.
    """
    last = layer == spec["layers"] - 1
    start = spec["start"]
    at = spec["out"] if last else slice(start, spec["stop"])
    through = 0 if hidden is None else len(hidden)
    hidden = append_joining_rows(hidden, base, (layer, "stream"), slice(start, spec["stop"]), spec, (layer, "attn_in"))
    z = resid = mlp_out = None
    if hidden is not None:
        z = attention(model, base, spec, layer, hidden, keep, attended)
        resid = hidden[:, spec["out"] - start] if last else hidden
    if ends_in_attention(spec, layer, keep):
        return None
    if resid is not None and through:
        alone: ResolvedPass = {**of_rows(spec, layer, slice(0, through)), "joins": {}}
        mlp_out = mlp_with_writes(model, base, alone, layer, resid[:through], keep)
    if (layer, "qkv") in spec["joins"]:
        z = append_rows(z, recomputed_z(model, base, spec, layer, at))
    z = append_joining_rows(z, base, (layer, "z"), at, spec, (layer, "z"))
    z = written_z(z, layer, spec, keep)
    attn_out = None if z is None else added_by_heads(model, spec, layer, z, keep)
    attn_out = append_joining_rows(attn_out, base, (layer, "attn_out"), at, spec, (layer, "attn_out"))
    attn_out = apply_writes(attn_out, (layer, "attn_out"), spec, keep)
    for stage in (*IN_MLP, "mlp_out"):
        attn_out = append_joining_rows(attn_out, base, (layer, "attn_out"), at, spec, (layer, stage))
    for stage in ("qkv", "z", "attn_out", *IN_MLP, "mlp_out"):
        resid = append_joining_rows(resid, base, (layer, "stream"), at, spec, (layer, stage))
    for stage in ("attn_in", "qkv", "z", "attn_out"):
        mlp_out = append_joining_rows(mlp_out, base, (layer, "mlp_out"), at, spec, (layer, stage))
    rest = of_rows(spec, layer, slice(0 if mlp_out is None else len(mlp_out), None))
    mlp_out = append_rows(mlp_out, mlp_with_writes(model, base, rest, layer, None, {}))
    mlp_out = append_joining_rows(mlp_out, base, (layer, "mlp_out"), at, spec, (layer, "mlp_out"))
    mlp_out = apply_writes(mlp_out, (layer, "mlp_out"), spec, keep)
    return None if resid is None or attn_out is None or mlp_out is None else resid + attn_out + mlp_out


def written_z(z: Any, layer: int, spec: ResolvedPass, keep: dict[WriteSite, Any]) -> Any:
    """``z`` after what is written to it, and to what heads write, which is linear in it.

    Parameters
    ----------
    z : tensor (row, position, column), optional
    layer : int
    spec : ResolvedPass
    keep : dict
        As for `apply_writes`; what is kept of ``z`` is from before the second.

    Returns
    -------
    tensor (row, position, column) or None
    """
    z = apply_writes(z, (layer, "z"), spec, keep)
    if z is not None and (layer, "z") in keep and spec["writes"].get((layer, "head_out")):
        z = z.clone()
    return apply_writes(z, (layer, "head_out"), spec, keep)


def added_by_heads(
    model: ModelParts, spec: ResolvedPass, layer: int, z: torch.Tensor, keep: dict[WriteSite, Any]
) -> torch.Tensor:
    """What attention adds to the stream.

    Parameters
    ----------
    model : ModelParts
    spec : ResolvedPass
    layer : int
    z : tensor (row, position, column)
    keep : dict
        As for `apply_writes`.

    Returns
    -------
    tensor (row, position, d_model)
        After the norm that follows, if one does; vectors that are added to what heads write are added before it.
    """
    module, paths = model["blocks"][layer], model["paths"]
    made = call_module(module, paths["out"], z)
    if "attn_norm" not in paths:
        return made
    return call_module(module, paths["attn_norm"], apply_writes(made, (layer, "heads"), spec, keep))


def of_rows(spec: ResolvedPass, layer: int, rows: slice) -> ResolvedPass:
    """`spec` with the writes in the MLP of a layer to some rows only, counted from the first of them."""
    writes, start = dict(spec["writes"]), rows.start
    for point in IN_MLP:
        writes[(layer, point)] = [
            {**write, "rows": slice(write["rows"].start - start, write["rows"].stop - start)}
            for write in spec["writes"].get((layer, point), [])
            if start <= write["rows"].start and (rows.stop is None or write["rows"].stop <= rows.stop)
        ]
    return {**spec, "writes": writes}


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


def run_without_grad(
    model: ModelParts, base: Points, spec: ResolvedPass
) -> tuple[dict[str, torch.Tensor], dict[WriteSite, Any]]:
    """`run` without gradients, and what is at the sites that are read, of the rows at work (None without any)."""
    sites = [read["planned"]["at"] for read in spec["reads"] if "planned" in read]
    keep: dict[WriteSite, Any] = {site: None for site in sites if site is not None}
    with torch.no_grad():
        return run(model, base, spec, keep), keep


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


def resolve_values(spec: PassSpec, cache: RunCache) -> ResolvedPass:
    """A pass with the values that were known only when the runs were read."""
    attended = cache["base_attended"]
    return {
        **spec,
        "writes": resolve_writes(spec["writes"], cache),
        "pair_writes": resolve_writes(spec["pair_writes"], cache),
        "changes": [sender_change(sender, cache) for sender in spec["senders"]],
        "circuits": [with_carried(circuit, cache) for circuit in spec["circuits"]],
        "pattern_kernels": cache["pattern_kernels"],
        "base_attended": {name: value.repeat(spec["conditions"], 1, 1) for name, value in attended.items()},
        "logits": without_first(cache["logits"], spec["skip"]),
        "angles": [],
        "tokens": cache["tokens"],
    }


def resolve_writes(table: dict[WriteSite, list[TensorWrite]], cache: RunCache) -> dict[WriteSite, list[TensorWrite]]:
    """Writes with their values."""
    return {
        site: [{**write, "value": resolve(write["value"], cache)} for write in writes] for site, writes in table.items()
    }


def resolve(value: Value, cache: RunCache) -> Any:
    """A deferred value as a tensor, broadcastable to ``(example, position, column)``; anything else as it is.

    What a path brings stays deferred: the pass itself finds it.
    """
    if not isinstance(value, dict) or value["kind"] == "path":
        return value
    if value["kind"] == "vector":
        like = next(iter(cache["base"].values()))
        return torch.tensor(value["numbers"], dtype=like.dtype, device=like.device)
    if value["kind"] == "embeddings":
        return embedding_sum(value, cache)
    reference, site, pattern = cache["reference"], value["site"], value["pattern"]
    if value["run"] is None and reference["whole"] and value["reduce"] == "mean over example and position":
        parts = [points[site][..., value["columns"]].flatten(0, 1) for points in reference["whole"]]
        return torch.cat(parts).mean(dim=0)[None, None]
    source = (reference["alike"] if value["run"] is None else cache["sources"][value["run"]])[site]
    if pattern is None:
        return reduce_examples(source[..., value["columns"]], value)
    taken = reduce_examples(pattern_between(source, **pattern).transpose(1, 2), value)
    return taken.transpose(1, 2)[..., : value["stop"]]


def reduce_examples(source: torch.Tensor, value: FromRun) -> torch.Tensor:
    """What a deferred value takes of ``(example, position, ...)``."""
    positions: Any = value["positions"]
    if value["reduce"] == "mean over example":
        return source[:, positions].mean(dim=0, keepdim=True)
    if value["reduce"] == "mean over example and position":
        return source.mean(dim=(0, 1), keepdim=True)
    if value["reduce"] == "partner":
        return source[torch.as_tensor(value["partners"], device=source.device)][:, positions]
    return source[:, positions]


def embedding_sum(value: EmbeddingSum, cache: RunCache) -> torch.Tensor:
    """The stream before layer 0 as the sum of its embeddings, some of them changed."""
    base = cache["base"]
    parts = {name: base[(0, name)].clone() for name in ("embed", "pos_embed") if (0, name) in base}
    for one in value["writes"]:
        write = one["write"]
        write_into(parts[one["embedding"]], [{**write, "value": resolve(write["value"], cache)}])
    positions: Any = value["positions"]
    return torch.stack(list(parts.values())).sum(0)[:, positions]


def sender_change(sender: PathSender, cache: RunCache) -> torch.Tensor:
    """What the value of a path's sender changes by: ``(example, position, column)``."""
    site, window = sender["site"], sender["window"]
    base = cache["base"][site]
    other = points_of_source(cache, sender["run"], [site])[site]
    change: torch.Tensor = (other - base)[:, window, sender["columns"]]
    if sender["positions"] is None:
        return change
    marks = torch.zeros(base.shape[1], device=change.device, dtype=torch.bool)
    marks[sender["positions"]] = True
    return change * marks[window, None]


def with_carried(circuit: CircuitRows, cache: RunCache) -> CircuitRows:
    """A circuit with what its other edges carry; at ``input``, what the embedding has more in the base run."""
    carried = points_of_source(cache, circuit["run"], circuit["sites"])
    carried[(0, "input")] = cache["base"][(0, "embed")] - carried[(0, "embed")]
    return {**circuit, "carried": carried}


def without_first(spec: LogitsSpec, skip: int) -> LogitsSpec:
    """`spec` without the first scored positions."""
    return {
        **spec,
        "kernels": [
            {**kernel, "arguments": {name: value[:, skip:] for name, value in kernel["arguments"].items()}}
            for kernel in spec["kernels"]
        ],
        "tokens": None if spec["tokens"] is None else spec["tokens"][:, skip:],
    }
