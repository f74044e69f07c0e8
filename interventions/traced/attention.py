"""Attention in a planned pass. Runs inside a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .projections import project, rotated, sides, sinks_of, split_sides
from .rows import apply_writes, normed, split_last_axis, write_into

if TYPE_CHECKING:
    from .specs import ModelParts, Points, ResolvedPass, ScoreMask, TensorWrite, WriteSite

BEFORE_Z = ("stream", "attn_in", "q", "k", "v", "q_rot", "k_rot", "pattern")
"""Points of a layer before the output of its heads."""


def attention(
    model: ModelParts,
    base: Points,
    spec: ResolvedPass,
    layer: int,
    hidden: torch.Tensor,
    keep: dict[WriteSite, Any],
    attended: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Compute ``z`` of the rows at work.

    Parameters
    ----------
    model : ModelParts
    base : Points
        What the base run has, by the points of a planned pass.
    spec : ResolvedPass
    layer : int
    hidden : tensor (row, position, d_model)
        The stream that enters the layer.
    keep : dict
        Gets what is at the sites that are its keys.
    attended : dict
        Kernel name to values ``(row, layer, head)``, which are put in.

    Returns
    -------
    tensor (row, query, head * d_head)
        Queries are the positions that are computed; of the last layer, the scored ones where logits are read.
    """
    module, heads, start = model["blocks"][layer], model["heads"], spec["start"]
    read = apply_writes(normed(module, model["paths"].get("norm_1"), hidden), (layer, "attn_in"), spec, keep)
    width, kv_width = heads * model["d_head"], model["kv_heads"] * model["d_head"]
    if asks_in_part(spec, layer):
        q = project(model, module, read[:, spec["out"] - start], slice(0, width))
        k, v = project(model, module, read, slice(width, width + 2 * kv_width)).chunk(2, -1)
    else:
        q, k, v = sides(model, module, read)
    return z_of_sides(model, base, spec, layer, (q, k, v), keep, attended)


def asks_in_part(spec: ResolvedPass, layer: int) -> bool:
    """Whether queries of a layer are computed at scored positions only."""
    last = layer == spec["layers"] - 1
    return last and not spec["pattern_kernels"] and len(spec["out"]) < spec["stop"] - spec["start"]


def z_of_sides(
    model: ModelParts,
    base: Points,
    spec: ResolvedPass,
    layer: int,
    made: tuple[torch.Tensor, ...],
    keep: dict[WriteSite, Any],
    attended: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Compute ``z`` from what the projections made.

    Parameters
    ----------
    model, base, spec, layer, keep, attended
        As for `attention`.
    made : tuple of tensors (row, position, width)
        q, k and v before norms and rotation; q at scored positions only where `asks_in_part`.

    Returns
    -------
    tensor (row, query, head * d_head)
    """
    module, heads, start, stop = model["blocks"][layer], model["heads"], spec["start"], spec["stop"]
    q, k, v = made
    q = apply_writes(q, (layer, "q"), spec, keep)
    k, v = apply_writes(k, (layer, "k"), spec, keep), apply_writes(v, (layer, "v"), spec, keep)
    queries = spec["out"] if asks_in_part(spec, layer) else torch.arange(start, stop, device=q.device)
    angles, sinks = spec["angles"][layer], sinks_of(model, module)
    q = apply_writes(rotated(model, angles, module, "q", q, queries), (layer, "q_rot"), spec, keep)
    k = apply_writes(rotated(model, angles, module, "k", k, slice(start, stop)), (layer, "k_rot"), spec, keep)
    if start:
        k, v = with_earlier_keys(model, base, spec, layer, k, v)
    site = (layer, "pattern")
    pattern: Any
    z, pattern = attend(
        by_head(q, heads),
        expand_key_heads(by_head(k, model["kv_heads"]), heads),
        expand_key_heads(by_head(v, model["kv_heads"]), heads),
        queries,
        model["scalings"][layer],
        model["windows"][layer],
        spec["masks"].get(layer, []),
        spec["writes"].get(site, []),
        bool(spec["pattern_kernels"]) or site in keep,
        model["cap"],
        None if sinks is None else sinks[:, None, None],
    )
    if site in keep:
        keep[site] = pattern
    score_patterns(spec, layer, pattern, attended)
    if spec["pattern_kernels"] and layer == spec["layers"] - 1 and spec["logits"]["kernels"]:
        z = z[:, :, spec["out"] - start]
    return joined_heads(z)


def ends_in_attention(spec: ResolvedPass, layer: int, keep: dict[WriteSite, Any]) -> bool:
    """Whether nothing is read after the attention of a layer."""
    read = [at < layer or (at == layer and point in BEFORE_Z) for at, point in keep]
    return layer == spec["blocks"] - 1 and not spec["logits"]["kernels"] and all(read)


def score_patterns(spec: ResolvedPass, layer: int, pattern: Any, attended: dict[str, torch.Tensor]) -> None:
    """Apply the kernels of patterns to those of a layer.

    Parameters
    ----------
    spec : ResolvedPass
    layer : int
    pattern : tensor (row, head, query, key) or None
        Of the rows at work; None where there is no such kernel.
    attended : dict
        Kernel name to values ``(row, layer, head)``, which are put in.
    """
    for kernel in spec["pattern_kernels"]:
        rows = torch.arange(pattern.shape[0], device=pattern.device) % spec["examples"]
        given = {name: value[rows] for name, value in kernel["arguments"].items()}
        attended[kernel["name"]][: pattern.shape[0], layer] = kernel["function"](pattern, **given)


def with_earlier_keys(
    model: ModelParts, base: Points, spec: ResolvedPass, layer: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put k and v of the positions that are computed behind what the base run has at earlier ones.

    Parameters
    ----------
    model : ModelParts
    base : Points
        What the base run has, by the points of a planned pass.
    spec : ResolvedPass
    layer : int
    k, v : tensor (row, position, width)
        k is rotated.

    Returns
    -------
    tuple of tensors (row, key, width)
    """
    start, copies = spec["start"], k.shape[0] // spec["examples"]
    _, early_k, early_v = split_sides(model, base[(layer, "qkv")][:, :start])
    early_k = rotated(model, spec["angles"][layer], model["blocks"][layer], "k", early_k, slice(0, start))
    earlier = (part.repeat(copies, 1, 1) for part in (early_k, early_v))
    return torch.cat([next(earlier), k], 1), torch.cat([next(earlier), v], 1)


def recomputed_z(model: ModelParts, base: Points, spec: ResolvedPass, layer: int, at: Any) -> torch.Tensor:
    """``z`` of the conditions that join at q, k, v or pattern: of the base run, with the changed heads new.

    Parameters
    ----------
    model : ModelParts
    base : Points
        What the base run has, by the points of a planned pass.
    spec : ResolvedPass
    layer : int
    at : slice or tensor
        Positions of the queries.

    Returns
    -------
    tensor (row, query, head * d_head)
    """
    heads, d_head, examples = model["heads"], model["d_head"], spec["examples"]
    conditions, changed_heads = spec["pairs"][layer]["conditions"], spec["pairs"][layer]["heads"]
    owners = [head * model["kv_heads"] // heads for head in changed_heads]
    stop, block, angles = spec["stop"], model["blocks"][layer], spec["angles"][layer]
    sinks = sinks_of(model, block)
    q, k, v = split_sides(model, base[(layer, "qkv")][:, :stop])
    device = q.device
    queries = torch.arange(spec["start"], stop, device=device) if isinstance(at, slice) else at
    writes = spec["pair_writes"]
    if model["joint_norms"]:  # writes to q and k join before
        q, k = (rotated(model, angles, block, side, part, slice(0, stop)) for side, part in (("q", q), ("k", k)))
    q, k, v = (
        select_heads(q[:, queries], changed_heads, d_head),
        select_heads(k, owners, d_head),
        select_heads(v, owners, d_head),
    )
    for part, name in ((q, "q"), (k, "k"), (v, "v")):
        write_into(part, writes.get((layer, name), []))
    if not model["joint_norms"]:
        q = rotated(model, angles, block, "q", q, queries)
        k = rotated(model, angles, block, "k", k, slice(0, stop))
    q = write_into(q, writes.get((layer, "q_rot"), []))
    k = write_into(k, writes.get((layer, "k_rot"), []))
    z, _ = attend(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        queries,
        model["scalings"][layer],
        model["windows"][layer],
        spec["pair_masks"].get(layer, []),
        writes.get((layer, "pattern"), []),
        False,
        model["cap"],
        None if sinks is None else sinks[changed_heads].repeat_interleave(examples)[:, None, None, None],
    )
    count = spec["joins"][(layer, "qkv")]
    made = base[(layer, "z")][:, at].repeat(count, 1, 1).reshape(count, examples, len(queries), heads, d_head)
    first = spec["ahead"][layer]
    local = torch.tensor([condition - first for condition in conditions], device=device)
    made[local, :, :, torch.tensor(changed_heads, device=device)] = z.reshape(-1, examples, len(queries), d_head)
    return made.flatten(-2).flatten(0, 1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    scaling: float,
    window: int | None,
    masks: list[ScoreMask],
    writes: list[TensorWrite],
    needs_pattern: bool,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention, ``(row, head, query, d_head)`` from q and from k, v of keys 0, 1, ..., and its pattern.

    A pattern is made only where it is read or changed; other rows never notice.

    Parameters
    ----------
    q : tensor (row, head, query, d_head)
    k, v : tensor (row, head, key, d_head)
        Of keys 0, 1, ...
    queries : tensor (query,)
        Positions of the queries.
    scaling : float
        What scores are multiplied by.
    window : int, optional
        How many keys back a query sees, itself among them.
    masks : list of ScoreMask
    writes : list of TensorWrite
        To the pattern.
    needs_pattern : bool
    cap : float, optional
        What scores are soft-capped at.
    sinks : tensor, optional
        What stands beside the scores of each query; broadcasts to ``(row, head, query, 1)``.

    Returns
    -------
    tuple of tensor (row, head, query, d_head) and tensor (row, head, query, key) or None
    """
    changed = [write["rows"] for write in (*masks, *writes)]
    starts = sorted({rows.start for rows in changed})
    size = changed[0].stop - changed[0].start if changed else 0
    if needs_pattern:
        return through_pattern(q, k, v, queries, scaling, window, masks, writes, cap, sinks)
    if len(starts) * size == q.shape[0] or cap is not None or sinks is not None:
        return through_pattern(q, k, v, queries, scaling, window, masks, writes, cap, sinks)[0], None
    if q.shape[2] == k.shape[2] and (window is None or window >= k.shape[2]):
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    else:
        allowed = ~hidden_keys(queries, k.shape[2], window)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
    if not starts:
        return z, None
    rows = torch.cat([torch.arange(start, start + size, device=q.device) for start in starts])
    here = {start: slice(place * size, (place + 1) * size) for place, start in enumerate(starts)}
    masks = [{**mask, "rows": here[mask["rows"].start]} for mask in masks]
    writes = [{**write, "rows": here[write["rows"].start]} for write in writes]
    z[rows] = through_pattern(q[rows], k[rows], v[rows], queries, scaling, window, masks, writes)[0]
    return z, None


def through_pattern(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    scaling: float,
    window: int | None,
    masks: list[ScoreMask],
    writes: list[TensorWrite],
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` step by step, whatever implementation the model itself uses: scores, softmax, pattern, sum of values.

    Parameters
    ----------
    q, k, v, queries, scaling, window, masks, writes, cap, sinks
        As for `attend`.

    Returns
    -------
    tuple of tensor (row, head, query, d_head) and tensor (row, head, query, key)
    """
    scores = (at_least_float32(q) @ at_least_float32(k).transpose(-1, -2)) * scaling
    scores = soft_capped(scores, cap).masked_fill(hidden_keys(queries, k.shape[2], window), float("-inf"))
    for mask in masks:
        scores[mask["rows"], mask["heads"]][:, :, mask["queries"][:, None], mask["keys"]] = float("-inf")
    pattern = weights_of_scores(scores, sinks)
    if writes and torch.is_grad_enabled():
        pattern = pattern.clone()  # the softmax needs its own result for its gradient
    for write in writes:
        there, at = pattern[write["rows"], write["columns"]], write["positions"]
        value: Any = write["value"]
        there[:, :, at] = there[:, :, at] * value if write["how"] == "scale" else 0 if value is None else value
    return pattern.to(v.dtype) @ v, pattern


def soft_capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(scores / cap)``, where there is a cap."""
    return scores if cap is None else (scores / cap).tanh() * cap


def weights_of_scores(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """The softmax of scores ``(row, head, query, key)``, where there are sinks with these as one more key, left out."""
    if sinks is None:
        return scores.softmax(-1)
    return torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def hidden_keys(queries: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """Which of keys 0, 1, ... a query does not see ``(query, key)``: later ones, and those outside of its window."""
    places = torch.arange(keys, device=queries.device)
    hidden = places > queries[:, None]
    return hidden if window is None else hidden | (places <= queries[:, None] - window)


def expand_key_heads(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``(row, key-value head, position, d_head)`` as each head reads it."""
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], 1)


def select_heads(value: torch.Tensor, heads: list[int], d_head: int) -> torch.Tensor:
    """Some heads of ``(example, position, head * d_head)`` as rows, head by head."""
    return split_last_axis(value, -1, d_head)[:, :, heads].permute(2, 0, 1, 3).flatten(0, 1)


def at_least_float32(value: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, where its format is narrower."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def by_head(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``(row, position, head * d_head)`` as ``(row, head, position, d_head)``."""
    return value.reshape(*value.shape[:-1], heads, -1).transpose(1, 2)


def joined_heads(z: torch.Tensor) -> torch.Tensor:
    """``(row, head, position, d_head)`` as ``(row, position, head * d_head)``."""
    return z.transpose(1, 2).flatten(-2)
