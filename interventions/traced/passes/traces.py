"""The traces themselves: what is read of a run as it is, and a planned pass. Owns every trace of a sweep.

Plain functions of an nnsight handle of the model, tensors, numbers, slices and dicts of them: they run here, and inside
a session on a server that has torch and nnsight but not this package. ``parts`` is the `ModelParts` of `specs`.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from .. import activations
from ..attention import at_least_float32
from ..head_weights import GAINS, gains_made, gains_read, weights_read
from ..logits import after_unembedding, frozen_norm, heads_alone, logits_kernels, with_base_logits
from ..projections import combine, is_readable, linear, project, sides
from ..rows import call_module, no_tokens, normed
from . import planned_pass

if TYPE_CHECKING:
    from ..specs import (
        LogitsSpec,
        ModelDescription,
        ModelParts,
        Points,
        ReadSite,
        ResolvedPass,
        RowChange,
        RunSpec,
        WriteSite,
    )

DIRECTIONS = 3
"""Fixed vectors that those of a fingerprint are multiplied with."""
TOKENS = 16
"""Tokens whose logits are compared, more or less."""


def opened(root: Any, described: ModelDescription) -> ModelParts:
    """What a trace has to know of a model, from its description."""
    rotary, norms = described["rotary"], [operator.attrgetter(path)(root) for path in described["norm"].split()]
    return {
        **described,
        "blocks": operator.attrgetter(described["blocks"])(root),
        "norm": norms[0] if len(norms) == 1 else functools.partial(one_after_another, norms),
        "normed": norms[-1],
        "unembed": operator.attrgetter(described["unembed"])(root),
        "rotary": None if rotary is None else operator.attrgetter(rotary)(root),
        "like": None,
    }


def one_after_another(modules: list[Any], value: torch.Tensor) -> torch.Tensor:
    """What modules make of a value, each of what the one before it made."""
    for module in modules:
        value = module(value)
    return value


def tokens_of(parts: ModelParts, spec: ResolvedPass, device: Any) -> torch.Tensor:
    """Tokens of a planned pass: those of its rows where blocks are called; else it never goes through the model."""
    if not parts["called"] or spec["first"] >= spec["layers"]:
        return no_tokens(device)
    return spec["tokens"][:, : spec["stop"]].repeat(spec["conditions"], 1)


def end(parts: ModelParts, tracer: Any) -> None:
    """No more of the model is needed in this trace.

    A server that runs jobs apart from the weights loses count of what it was told once a trace of a session stopped
    early (ndif 0.1.2): there the model goes on to its end.
    """
    if not parts["apart"]:
        tracer.stop()


def read(root: Any, parts: ModelParts, tokens: torch.Tensor, wanted: set[ReadSite]) -> Points:
    """Read points in a pass without intervention.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : dict
        See `specs.ModelParts`.
    tokens : Tensor (example, position)
    wanted : set of ReadSite
        At least one.

    Returns
    -------
    dict
        ReadSite to a tensor ``(example, position, width)``.
    """
    layers = 1 + max(layer for layer, _ in wanted)
    with torch.no_grad(), root.trace(tokens, use_cache=False) as tracer:
        taken, _ = activations.read_activations(root, parts, layers, wanted, [], {})
        nnsight.save(taken)
        end(parts, tracer)
    return {at: value.expand(len(tokens), *value.shape[1:]) for at, value in taken.items()}


def as_it_is(
    root: Any,
    parts: ModelParts,
    run: RunSpec,
    keep_logits: bool,
) -> tuple[Points, dict[str, torch.Tensor], torch.Tensor | None]:
    """Run the model's own pass once, without intervention.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : ModelParts
    run : RunSpec
        Kernels in ``run["logits"]["compare"]`` also take ``base_logits``; where `keep_logits`, those of this very pass.
    keep_logits : bool
        Whether the scored logits are computed for the whole vocabulary and given back.

    Returns
    -------
    tuple of dict, dict and (Tensor or None)
        ReadSite to a tensor ``(example, position, width)``; kernel name to values, ``(example, scored)`` of logits and
        ``(example, layer, head)`` of patterns; and the logits ``(example, scored, vocabulary)``, if they are kept.
    """
    tokens, logits = run["tokens"], run["logits"]
    at = torch.tensor(run["scored"], device=tokens.device)
    with torch.no_grad(), root.trace(tokens, use_cache=False) as tracer:
        found: dict[str, Any] = {}
        taken, values = activations.read_activations(
            root, parts, parts["layers"], set(run["points"]), run["pattern_kernels"], {}
        )
        if logits["kernels"]:
            normed = parts["normed"].output[:, at]
            if keep_logits:
                found["logits"] = after_unembedding(parts["unembed"](normed), parts["tail"])
            spec = with_base_logits(logits, found.get("logits"))
            values.update(logits_kernels(normed, parts["unembed"], spec, len(tokens)))
        nnsight.save(taken)
        nnsight.save(values)
        nnsight.save(found)
        end(parts, tracer)
    points = {point: value.expand(len(tokens), *value.shape[1:]) for point, value in taken.items()}
    return points, dict(values), found.get("logits")


def lens(root: Any, parts: ModelParts, run: RunSpec, heads: bool = False) -> dict[str, torch.Tensor]:
    """What the final norm and the unembedding make of the stream before the first block and after each; or of heads.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : ModelParts
    run : RunSpec
        Its kernels of logits are applied to each.
    heads : bool
        Whether what each head writes is read, by the norm frozen as it is for the whole stream and without its bias.

    Returns
    -------
    dict
        Kernel name to values ``(layer + 1, example, scored)``; of heads ``(layer, head, example, scored)``.
    """
    tokens, last = run["tokens"], parts["layers"] - 1
    wanted = {(0, "resid_pre"), *((layer, "resid_post") for layer in range(last + 1))}
    if heads:
        wanted = {(last, "resid_post"), *((layer, "z") for layer in range(last + 1))}
    at = torch.tensor(run["scored"], device=tokens.device)
    with torch.no_grad(), root.trace(tokens, use_cache=False) as tracer:
        taken, _ = activations.read_activations(root, parts, last + 1, wanted, [], {})
        found: list[dict[str, torch.Tensor]] = []
        if heads:
            end_of = taken[(last, "resid_post")][:, at]
            frozen = frozen_norm(parts["norm"], end_of, parts["centred"])
            for layer in range(last + 1):
                normed = heads_alone(parts, frozen, layer, taken[(layer, "z")][:, at])
                found.append(logits_kernels(normed, parts["unembed"], run["logits"], len(tokens), biased=False))
        else:
            for stream in [taken[(0, "resid_pre")], *(taken[(layer, "resid_post")] for layer in range(last + 1))]:
                normed = parts["norm"](stream[:, at])
                found.append(logits_kernels(normed, parts["unembed"], run["logits"], len(tokens)))
        nnsight.save(found)
        end(parts, tracer)
    shape = (last + 1, parts["heads"]) if heads else (last + 2,)
    return {name: torch.stack([one[name] for one in found]).reshape(*shape, len(tokens), -1) for name in found[0]}


def lens_of_rows(
    root: Any,
    parts: ModelParts,
    logits: LogitsSpec,
    points: Points,
    added: dict[int, torch.Tensor],
    spec: ResolvedPass,
    device: Any,
) -> dict[str, torch.Tensor]:
    """What `lens` gives, of the rows of a pass.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : ModelParts
    logits : LogitsSpec
        Its kernels are for the examples of the pass.
    points : Points
        At the scored positions: ``resid_pre`` of layer 0 and each ``resid_post``; or the last, and each ``z``.
    added : dict of int to tensor (row, scored, head, d_model)
        What is added to what the heads of a layer write.
    spec : ResolvedPass
    device : torch.device
        Of the activations.

    Returns
    -------
    dict
        Kernel name with `` inside`` behind it to ``(row, layer + 1, scored)``; of heads ``(row, layer, head, scored)``.
    """
    last, examples, heads = parts["layers"] - 1, spec["examples"], (0, "z") in points
    rows = spec["conditions"] * examples
    with torch.no_grad(), root.trace(no_tokens(device), use_cache=False) as tracer:
        found: list[dict[str, torch.Tensor]] = []
        if heads:
            frozen = frozen_norm(parts["norm"], points[(last, "resid_post")], parts["centred"])
            for layer in range(last + 1):
                normed = heads_alone(parts, frozen, layer, points[(layer, "z")], added.get(layer))
                found.append(logits_kernels(normed, parts["unembed"], logits, examples, biased=False))
        else:
            streams = [points[(0, "resid_pre")], *[points[(layer, "resid_post")] for layer in range(last + 1)]]
            found += [logits_kernels(parts["norm"](one), parts["unembed"], logits, examples) for one in streams]
        nnsight.save(found)
        end(parts, tracer)
    shape = (last + 1, parts["heads"]) if heads else (last + 2,)
    every = {name: torch.stack([one[name] for one in found]).reshape(*shape, rows, -1) for name in found[0]}
    return {f"{name} inside": value.movedim(-2, 0) for name, value in every.items()}


def short_run(root: Any, parts: ModelParts, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The stream after each block, and the logits, of one prompt ``(1, position)``: each ``(position, width)``."""
    layers = parts["layers"]
    wanted = {(layer, "resid_post") for layer in range(layers)}
    with torch.no_grad(), root.trace(tokens, use_cache=False):
        taken, _ = activations.read_activations(root, parts, layers, wanted, [], {})
        found = nnsight.save([*(taken[(layer, "resid_post")][0] for layer in range(layers)), root.output.logits[0]])
    return list(found)


def sketch(found: list[torch.Tensor]) -> torch.Tensor:
    """Vectors in few numbers: ``(vector set, position, 1 + DIRECTIONS)``, in float64.

    First the root mean square of a vector, then its products with fixed vectors of length 1, which are about as large.
    """
    rows = []
    for one in found:
        vectors = one.detach().cpu().double()  # in this order, as not every device has float64
        order = torch.arange(1, vectors.shape[-1] + 1, dtype=torch.float64)
        along = torch.stack([torch.cos(order * (1.7 + direction)) for direction in range(DIRECTIONS)], -1)
        size = vectors.pow(2).mean(-1, keepdim=True).sqrt()
        rows.append(torch.cat([size, vectors @ (along / along.norm(dim=0))], -1))
    return torch.stack(rows)


def misshapen(parts: ModelParts, run: RunSpec, values: dict[str, torch.Tensor]) -> str:
    """Find a kernel whose values are not one for each row and scored position, or each row, layer and head.

    Parameters
    ----------
    parts : ModelParts
    run : RunSpec
    values : dict
        Kernel name to values.

    Returns
    -------
    str
        What is wrong with the first such kernel; empty where there is none.
    """
    rows, scored = len(run["tokens"]), len(run["scored"])
    of_patterns = {kernel["name"] for kernel in run["pattern_kernels"]}
    for name, value in values.items():
        axes = "(row, layer, head)" if name in of_patterns else "(row, scored)"
        wanted = (rows, parts["layers"], parts["heads"]) if name in of_patterns else (rows, scored)
        if tuple(value.shape) != wanted:
            return f"{name}: its kernel gives {tuple(value.shape)}, where {axes} is {wanted}"
    return ""


def planned(
    root: Any, parts: ModelParts, base: Points, spec: ResolvedPass, device: Any
) -> tuple[dict[str, torch.Tensor], dict[WriteSite, Any]]:
    """Run a planned pass, in a trace that never goes through the model itself.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : dict
        See `specs.ModelParts`.
    base : Points
        What the base run has, by the points of a planned pass.
    spec : ResolvedPass
    device : torch.device
        Of the activations.

    Returns
    -------
    tuple of dict and dict
        Kernel name to values, ``(row, scored)`` of logits and ``(row, layer, head)`` of patterns; and what is at the
        sites that are read, of the rows at work.
    """
    with root.trace(tokens_of(parts, spec, device), use_cache=False) as tracer:
        found = planned_pass.run_without_grad(parts, base, spec)
        nnsight.save(found)
        end(parts, tracer)
    values, kept = found
    return dict(values), dict(kept)


def logits_of(
    root: Any, parts: ModelParts, stream: torch.Tensor, tokens: list[int] | None, device: Any
) -> torch.Tensor:
    """Logits of some tokens, or of all, from the stream that leaves the last block.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : ModelParts
    stream : tensor (row, position, d_model)
    tokens : list of int, optional
        None for the whole vocabulary.
    device : torch.device
        Of the activations.

    Returns
    -------
    tensor (row, position, token)
    """
    with torch.no_grad(), root.trace(no_tokens(device), use_cache=False) as tracer:
        normed, unembed = parts["norm"](stream), parts["unembed"]
        if tokens is not None and is_readable(parts["apart"], unembed):
            made = linear(normed, unembed, tokens)
        else:
            made = unembed(normed)
            made = made if tokens is None else made[..., tokens]
        found: torch.Tensor = nnsight.save(after_unembedding(made, parts["tail"]))
        end(parts, tracer)
    return found


def slopes(
    root: Any,
    parts: ModelParts,
    base: Points,
    spec: ResolvedPass,
    sites: list[WriteSite],
    names: list[str],
    device: Any,
) -> tuple[dict[WriteSite, torch.Tensor], dict[str, dict[WriteSite, torch.Tensor]]]:
    """Run a planned pass and its way back: what is at sites, and the slope of each kernel by that.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : dict
        See `specs.ModelParts`.
    base : Points
        What the base run has, by the points of a planned pass.
    spec : ResolvedPass
    sites : list of WriteSite
    names : list of str
        Of kernels.
    device : torch.device
        Of the activations.

    Returns
    -------
    tuple of dict and dict
        WriteSite to what is there, ``(row, position, column)`` or, of a pattern, ``(row, head, query, key)``; and
        kernel name to the derivatives of the kernel's mean over scored positions, by WriteSite, in these shapes.
    """
    with torch.enable_grad(), root.trace(tokens_of(parts, spec, device), use_cache=False) as tracer:
        found = planned_pass.slopes(parts, base, spec, sites, names)
        nnsight.save(found)
        end(parts, tracer)
    values, by_name = found
    return dict(values), {name: dict(slope) for name, slope in by_name.items()}


def run_with_writes(
    root: Any, parts: ModelParts, tokens: torch.Tensor, writes: dict[ReadSite, list[RowChange]], scored: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model's own pass with changes added to some rows.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : dict
        See `specs.ModelParts`.
    tokens : Tensor (row, position)
    writes : dict
        ReadSite to a list of ``(row, tensor (position, width))``.
    scored : list of int
        Positions whose logits are wanted.

    Returns
    -------
    tuple of Tensor and Tensor
        Logits ``(row, scored, vocabulary)``; and the standard deviation of all logits of the first row.
    """
    with torch.no_grad(), root.trace(tokens, use_cache=False):
        activations.read_activations(root, parts, parts["layers"], set(), [], writes)
        made = root.output.logits
        found = nnsight.save([made[:, scored], made[0].float().std()])
    return found[0], found[1]


def by_itself(
    root: Any, parts: ModelParts, points: Points, layers: list[int], device: Any
) -> list[list[tuple[str, float, float, float]]]:
    """Compare, layer by layer, what the family's table leads to with what the model has.

    The table leads to q, k and v of all heads (``sides``), some columns of them (``project``), what heads write
    (``combine``), the weights of heads (``weights of q, k and v``, ``weights of out``) and what norms multiply by
    (``gain``); in layer 0, the sum of the embeddings; after the last layer, the logits of some tokens (``columns``).

    Parameters
    ----------
    root : nnsight handle of the model
    parts : dict
        See `specs.ModelParts`.
    points : Points
        Of one prompt: ``resid_pre``, ``z`` and ``qkv`` of the layers; of layer 0 also the embeddings, of the last layer
        also ``resid_post``.
    layers : list of int
    device : torch.device
        Of the activations.

    Returns
    -------
    list of lists of (str, float, float, float)
        For each layer and part: its name, how far off it is at most, the standard deviation of what the model has, and
        what rounding can do where that is a difference of larger numbers.
    """
    size, out = (parts["heads"] + 2 * parts["kv_heads"]) * parts["d_head"], parts["paths"].get("out", "")
    every = []
    for layer in layers:
        block, z = parts["blocks"][layer], points[(layer, "z")]
        with torch.no_grad(), root.trace(no_tokens(device), use_cache=False) as tracer:
            entering = normed(block, parts["paths"].get("norm_1"), points[(layer, "resid_pre")])
            whole = torch.cat(sides(parts, block, entering), -1)
            bias = torch.cat(sides(parts, block, torch.zeros_like(entering)), -1)
            thirds = range(0, size, size // 3 + 1)  # do not end where heads do
            some = [project(parts, block, entering, slice(start, start + size // 3 + 1)) for start in thirds]
            written = combine(parts, block, z, slice(0, z.shape[-1]))
            full = call_module(block, out, z)
            given = full - call_module(block, out, torch.zeros_like(z))
            gains = [] if parts["apart"] else gains_made(parts, block, entering)
            found = nnsight.save([whole, torch.cat(some, -1), written, given, entering, bias, full, *gains])
            end(parts, tracer)
        qkv = points[(layer, "qkv")]
        pairs = [("sides", found[0], qkv), ("project", found[1], qkv), ("combine", found[2], found[3])]
        if layer == 0:
            embedded = torch.stack(
                [points[(0, name)].expand_as(points[(0, "resid_pre")]) for name, _ in parts["embeddings"]]
            )
            pairs.append(("embeddings", embedded.sum(0), points[(0, "resid_pre")]))
        if layer == parts["layers"] - 1:
            pairs.append(("columns", *columns(root, parts, points[(layer, "resid_post")], device)))
        if not parts["apart"]:
            *matrices, written_out = (
                at_least_float32(one) for one in weights_read(parts, block._module)[:4] if one is not None
            )
            made = [torch.einsum("epm,hmd->ephd", at_least_float32(found[4]), one).flatten(-2) for one in matrices]
            pairs.append(("weights of q, k and v", torch.cat(made, -1) + at_least_float32(found[5]), found[0]))
            pairs.append(("weights of out", at_least_float32(z) @ written_out.flatten(0, 1), found[3]))
        large = {"combine": found[6], "weights of out": found[6], "weights of q, k and v": found[0]}
        every.append(
            [
                (what, far_off(a, b), float(b.float().std()), rounding_of(large[what]) if what in large else 0.0)
                for what, a, b in pairs
            ]
        )
        of_table = [] if parts["apart"] else gains_read(parts, block._module)
        for name, made, gain in zip(GAINS, found[7:], of_table, strict=False):
            if gain is not None and name in parts["paths"]:
                mean = float(gain.float().pow(2).mean().sqrt())
                norm = operator.attrgetter(parts["paths"][name])(block._module)
                added = getattr(norm, "bias", None)
                every[-1].append(
                    (f"gain of {name}", far_off(made, gain), mean, 0.0 if added is None else rounding_of(added))
                )
    return every


def rounding_of(value: torch.Tensor) -> float:
    """What rounding can do to the difference of two tensors that are as large as this one."""
    return 8 * float(torch.finfo(value.dtype).eps) * float(value.detach().float().abs().max())


def columns(root: Any, parts: ModelParts, stream: torch.Tensor, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of some tokens as a metric gets them, and as the last layer gives them.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : dict
        See `specs.ModelParts`.
    stream : Tensor (1, position, d_model)
        What leaves the last block.
    device : torch.device
        Of the activations.

    Returns
    -------
    tuple of tensors (1, position, token)
    """
    with torch.no_grad(), root.trace(no_tokens(device), use_cache=False) as tracer:
        normed = parts["norm"](stream)
        logits = after_unembedding(parts["unembed"](normed), parts["tail"])
        size = logits.shape[-1]
        tokens = torch.arange(0, size, max(1, size // TOKENS), device=logits.device).expand(*logits.shape[:2], -1)
        kernel = {"name": "columns", "function": as_they_are, "arguments": {}}
        spec: Any = {
            "kernels": [kernel],
            "tokens": tokens,
            "compare": [],
            "apart": parts["apart"],
            "tail": parts["tail"],
        }
        spec.update(rows=1, rows_of_all=1)
        made = logits_kernels(normed, parts["unembed"], spec, 1)["columns"]
        found = nnsight.save([made, logits.gather(-1, tokens)])
        end(parts, tracer)
    return found[0], found[1]


def as_they_are(logits: torch.Tensor) -> torch.Tensor:
    """A kernel that gives the logits that it gets."""
    return logits


def far_off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference."""
    return float((found.float() - wanted.to(found.device).float()).abs().max())
