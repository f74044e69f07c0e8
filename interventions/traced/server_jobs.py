"""What a job does on a server: one session for a group of passes, of which only metrics come back.

Plain functions, as in `traces`: they run where torch and nnsight are but this package is not. Each takes an nnsight
handle of the model and a ``program``, a dict of plain data and of such functions, and gives what is to come back.
"""

from __future__ import annotations

from typing import Any

import torch

from .activations import pattern_between, split_heads
from .configuration import configuration_of
from .gradients import attribution
from .head_weights import weights_made, weights_read
from .logits import with_base_logits
from .structure import modules_of, names_of
from .traces import as_it_is, by_itself, changed, misshapen, nothing, opened, planned, read, short_run, sketch
from .values import resolve_values, with_compared

SAMPLE = 4096
"""Numbers of each tensor of weights that a fingerprint looks at."""
MODULUS = 2**61 - 1


def answered(root: Any, program: dict[str, Any]) -> Any:
    """What ``program["job"]`` gives, and a sketch of what the model that gave it computes on ``program["prompt"]``."""
    found = program["job"](root, program)
    parts, device = where(root, program["parts"])
    return {**found, "fingerprint": sketch(short_run(root, parts, program["prompt"].to(device)))}


def passes(root: Any, program: dict[str, Any]) -> Any:
    """Runs as they are, then the passes that start from them, chunk by chunk.

    A chunk has ``runs``, the base run first, each ``(name, tokens, scored, wanted, watch, score)``; ``reference``,
    ``(tokens, wanted)`` or None; and ``passes``, each ``(job, points)`` with the names that a pass has for points.
    """
    parts, device = where(root, program["parts"])
    program = moved(program, device)
    found = []
    for chunk in program["chunks"]:
        known, base, values = run_unmodified(root, parts, program, chunk)
        found += values
        for job, points in chunk["passes"]:
            taken = {at: known["base"][native] for at, native in points}
            made = planned(root, parts, taken, resolve_values(job, known), device)
            found.append(whole(made, base, job["conditions"], program["positions"]))
    return together(found)


def estimates(root: Any, program: dict[str, Any]) -> Any:
    """Runs as they are, then what every condition changes of each metric's mean, estimated from gradients."""
    parts, device = where(root, program["parts"])
    if parts["apart"]:
        raise RuntimeError("this server runs jobs apart from the weights, where nothing has a gradient: use exact")
    program = moved(program, device)
    found = []
    for chunk in program["chunks"]:
        known, _, values = run_unmodified(root, parts, program, chunk)
        found += values
        found.append(attribution(root, parts, known, chunk["estimate"], device))
    return together(found)


def run_unmodified(root: Any, parts: dict[str, Any], program: dict[str, Any], chunk: dict[str, Any]) -> Any:
    """What was read of the runs of a chunk, as `fill` takes it; the base run's values; and what is told."""
    known: Any = {"sources": {}, "reference": {}}
    base: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    if chunk["reference"] is not None:
        known["reference"] = pieces(root, parts, *chunk["reference"])
    logits = None
    for name, tokens, scored, wanted, watch, score in chunk["runs"]:
        logits_spec: Any = {**score, "apart": parts["apart"]}
        scoring = with_base_logits(logits_spec, logits)
        keep = program["compares"] and logits is None
        points, values, made = as_it_is(root, parts, tokens, scored, set(wanted), watch, scoring, keep)
        if wrong := misshapen(parts, values, watch, len(tokens), len(scored)):
            raise ValueError(wrong)
        known["sources"][name] = points
        if not found:
            logits, base = made, values
            attended = {kernel["name"]: values[kernel["name"]] for kernel in watch}
            known.update({"base": points, "pattern_kernels": watch, "logits": logits_spec, "base_attended": attended})
            known = with_compared(known, logits)
        found.append(whole(values, None, 1, program["positions"]))
    return known, base, found


def pieces(root: Any, parts: dict[str, Any], tokens: torch.Tensor, wanted: list[Any]) -> dict[Any, torch.Tensor]:
    """Points of many prompts, read some at a time."""
    read_here = [read(root, parts, tokens[start : start + 64], set(wanted)) for start in range(0, len(tokens), 64)]
    return {at: torch.cat([one[at] for one in read_here]) for at in wanted}


def whole(values: dict[str, Any], base: Any, conditions: int, positions: bool) -> dict[str, torch.Tensor]:
    """Values with the scored positions that were not computed as in the base run; their mean unless wanted one by one.

    ``(condition * example, scored)`` of logits; those of patterns, ``(row, layer, head)``, stay as they are. The mean
    is NumPy's, which rounds as it does where results are made.
    """
    found = {}
    for name, value in values.items():
        full = value.float()
        if full.dim() == 2:
            missing = 0 if base is None else base[name].shape[1] - full.shape[1]
            if missing:
                full = torch.cat([base[name].float().repeat(conditions, 1)[:, :missing], full], 1)
            full = full if positions else torch.from_numpy(full.cpu().numpy().mean(axis=-1, keepdims=True))
        found[name] = full
    return found


def together(found: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Many small tensors as one, with their names and shapes."""
    flat = [one.detach().float().cpu().flatten() for values in found for one in values.values()]
    return {
        "numbers": torch.cat(flat) if flat else torch.zeros(0),
        "shapes": [[[name, list(one.shape)] for name, one in values.items()] for values in found],
    }


def activations(root: Any, program: dict[str, Any]) -> Any:
    """The values of sites, ``(kind, point, columns, heads, head, positions)`` each, and nothing else."""
    parts, device = where(root, program["parts"])
    layers = sorted({site[1][0] for site in program["sites"] if site[0] == "head_out"})
    parts["out_of"] = {layer: weights_of(root, parts, layer, parts["like"])[3] for layer in layers}
    program = moved(program, device)
    found: list[dict[str, Any]] = []
    for tokens in program["tokens"]:
        points = pieces(root, parts, tokens, [site[1] for site in program["sites"]])
        found.append({str(number): value_at(root, parts, points, site) for number, site in enumerate(program["sites"])})
    return together(found)


def value_at(root: Any, parts: dict[str, Any], points: dict[Any, torch.Tensor], site: Any) -> torch.Tensor:
    """The value of a site, in the shape that its component states."""
    kind, point, cols, heads, head, at = site
    value = points[point]
    if kind == "pattern":
        pattern = pattern_between(value, *cols)
        pattern = pattern if head is None else pattern[:, 0]
        return pattern if at is None else pattern[..., at, :]
    if kind == "head_out":
        value = torch.einsum("ephd,hdm->ephm", split_heads(value, heads), parts["out_of"][point[0]].to(value.device))
        value = value if head is None else value[:, :, head]
    elif kind == "heads":
        value = value[..., cols]
        value = split_heads(value, heads) if head is None else value
    return value if at is None else value[:, at]


def scores_of_weights(root: Any, program: dict[str, Any]) -> Any:
    """``program["score"]`` of the weights of all heads, which stay here: float64 arrays by layer."""
    parts, _ = where(root, program["parts"])
    layers = [
        [
            None if one is None else one.detach().double().cpu().numpy()
            for one in weights_of(root, parts, layer, parts["like"])
        ]
        for layer in range(parts["layers"])
    ]
    return {"table": torch.from_numpy(program["score"](layers))}


def facts(root: Any, program: dict[str, Any]) -> Any:
    """What this copy of the model is: number format, device, configuration, modules, and samples of its numbers."""
    weights = sorted(root._module.state_dict().items())
    if any([weight.is_meta for _, weight in weights]):  # its format is the configuration's, and not the server's
        like = where(root, program["parts"])[0]["like"]
        return {"dtype": str(like.dtype)[6:], "device": "", "weights": [], "buffers": [], "modules": {}}
    buffers = sorted(root._module.named_buffers())
    return {
        "dtype": str(weights[0][1].dtype)[6:],
        "device": weights[0][1].device.type,
        "weights": sampled(weights),
        "buffers": sampled(buffers),
        "modules": modules_of(root._module, names_of),
        "configuration": configuration_of(root._module.config),
        "attention": str(root._module.config._attn_implementation),
    }


def sampled(tensors: list[tuple[str, torch.Tensor]]) -> list[Any]:
    """Names, shapes, formats and a sum over a sample of the bytes of tensors."""
    prints = []
    for name, weight in tensors:
        flat = weight.detach().reshape(-1)
        chosen = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
        sample = flat[chosen.to(flat.device)].cpu().contiguous().view(torch.uint8).long()
        order = torch.arange(1, sample.numel() + 1)
        total = int((sample * (order * 2654435761 % 1000003 + 1)).sum() % MODULUS)
        prints.append([name, list(weight.shape), str(weight.dtype), total])
    return prints


def check(root: Any, program: dict[str, Any]) -> Any:
    """The passes of a self-check, with the model's own pass and the family's own functions beside them."""
    planned_here = passes(root, program)
    parts, device = where(root, program["parts"])
    rows, writes, scored = moved([program["rows"], program["writes"], program["scored"]], device)
    logits, deviation = changed(root, parts, rows, writes, scored)
    points = pieces(root, parts, rows[:1], program["wanted"]) if program["wanted"] else {}
    off = by_itself(root, parts, points, program["layers"], device)
    probes = program["probe"](logits).float().cpu()
    return {"planned": planned_here, "own": probes, "deviation": float(deviation), "off": off}


def where(root: Any, described: dict[str, Any]) -> Any:
    """The handles of a model, and the device on which its activations are."""
    parts = {**opened(root, described), "apart": next(iter(root._module.parameters())).is_meta}
    like = read(root, parts, nothing("cpu"), {(0, "resid_pre")})[(0, "resid_pre")]
    return {**parts, "like": like}, like.device


def moved(value: Any, device: Any) -> Any:
    """Plain data with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    if isinstance(value, list):
        return [moved(one, device) for one in value]
    if isinstance(value, tuple):
        return tuple([moved(one, device) for one in value])
    return value


def weights_of(root: Any, parts: dict[str, Any], layer: int, like: torch.Tensor) -> list[torch.Tensor | None]:
    """The fields of `HeadWeights` of a layer, read; or what its modules make of unit vectors, where they cannot be."""
    block = parts["blocks"][layer]
    if not parts["apart"]:
        return weights_read(parts, block._module)
    with torch.no_grad(), root.trace(nothing(like.device), use_cache=False):
        made = weights_made(parts, block, like)
    return made
