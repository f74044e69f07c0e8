"""Attention in a planned pass. Runs inside a trace: plain functions, as `forward` says; imports its parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .projections import project, sides, split
from .rotary import rotated
from .rows import Base, Writes, apply_writes, call_module, split_last_axis, write_into


def attention(
    model: dict[str, Any],
    base: Base,
    job: dict[str, Any],
    layer: int,
    hidden: torch.Tensor,
    keep: dict[Any, torch.Tensor],
    attended: dict[str, torch.Tensor],
) -> torch.Tensor:
    """``z`` of the rows at work, ``(row, query, head * d_head)``."""
    module, heads, start, stop = model["blocks"][layer], model["heads"], job["start"], job["stop"]
    normed = call_module(module, model["paths"]["norm_1"], hidden)
    width, kv_width = heads * model["d_head"], model["kv_heads"] * model["d_head"]
    some = layer == job["layers"] - 1 and not job["watch"] and len(job["out"]) < stop - start
    if some:
        q = project(model, module, normed[:, job["out"] - start], slice(0, width))
        k, v = project(model, module, normed, slice(width, width + 2 * kv_width)).chunk(2, -1)
    else:
        q, k, v = sides(model, module, normed)
    q = apply_writes(q, layer, "q", job, keep)
    k, v = apply_writes(k, layer, "k", job, keep), apply_writes(v, layer, "v", job, keep)
    queries = job["out"] if some else torch.arange(start, stop, device=hidden.device)
    q = apply_writes(rotated(model, job["angles"], module, "q", q, queries), layer, "q_rot", job, keep)
    k = apply_writes(rotated(model, job["angles"], module, "k", k, slice(start, stop)), layer, "k_rot", job, keep)
    if start:
        k, v = after_earlier(model, base, job, layer, k, v)
    place = (layer, "pattern")
    pattern: Any
    z, pattern = attend(
        by_head(q, heads),
        shared(by_head(k, model["kv_heads"]), heads),
        shared(by_head(v, model["kv_heads"]), heads),
        queries,
        model["scalings"][layer],
        model["windows"][layer],
        job["writes"].get((layer, "scores"), []),
        job["writes"].get(place, []),
        bool(job["watch"]) or place in keep,
    )
    if place in keep:
        keep[place] = pattern
    for name, kernel, given in job["watch"]:
        rows = torch.arange(pattern.shape[0], device=pattern.device) % job["examples"]
        attended[name][: pattern.shape[0], layer] = kernel(pattern, **{key: one[rows] for key, one in given.items()})
    if job["watch"] and layer == job["layers"] - 1 and job["score"]["kernels"]:
        z = z[:, :, job["out"] - start]
    return joined_heads(z)


def after_earlier(
    model: dict[str, Any], base: Base, job: dict[str, Any], layer: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put k and v of the positions that are computed behind what the base run has at earlier ones."""
    start, copies = job["start"], k.shape[0] // job["examples"]
    _, early_k, early_v = split(model, base[(layer, "qkv")][:, :start])
    early_k = rotated(model, job["angles"], model["blocks"][layer], "k", early_k, slice(0, start))
    earlier = (part.repeat(copies, 1, 1) for part in (early_k, early_v))
    return torch.cat([next(earlier), k], 1), torch.cat([next(earlier), v], 1)


def redone(model: dict[str, Any], base: Base, job: dict[str, Any], layer: int, at: Any) -> torch.Tensor:
    """``z`` of the conditions that join at q, k, v or pattern: that of the base run, with the changed heads redone."""
    heads, d_head, examples = model["heads"], model["d_head"], job["examples"]
    conditions, changed_heads = job["pairs"][layer]
    owners = [head * model["kv_heads"] // heads for head in changed_heads]
    stop, block = job["stop"], model["blocks"][layer]
    q, k, v = split(model, base[(layer, "qkv")][:, :stop])
    device = q.device
    queries = torch.arange(job["start"], stop, device=device) if isinstance(at, slice) else at
    writes = job["pair_writes"]
    q, k, v = picked(q[:, queries], changed_heads, d_head), picked(k, owners, d_head), picked(v, owners, d_head)
    for part, name in ((q, "q"), (k, "k"), (v, "v")):
        write_into(part, writes.get((layer, name), []))
    q = write_into(rotated(model, job["angles"], block, "q", q, queries), writes.get((layer, "q_rot"), []))
    k = write_into(rotated(model, job["angles"], block, "k", k, slice(0, stop)), writes.get((layer, "k_rot"), []))
    z, _ = attend(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        queries,
        model["scalings"][layer],
        model["windows"][layer],
        writes.get((layer, "scores"), []),
        writes.get((layer, "pattern"), []),
        False,
    )
    count = job["joins"][(layer, 1)]
    whole = base[(layer, "z")][:, at].repeat(count, 1, 1).reshape(count, examples, len(queries), heads, d_head)
    first = job["ahead"][layer]
    local = torch.tensor([condition - first for condition in conditions], device=device)
    whole[local, :, :, torch.tensor(changed_heads, device=device)] = z.reshape(-1, examples, len(queries), d_head)
    return whole.flatten(-2).flatten(0, 1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    scaling: float,
    window: int | None,
    masks: Writes,
    writes: Writes,
    needs_pattern: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention, ``(row, head, query, d_head)`` from q and from k, v of keys 0, 1, ..., and its pattern.

    A pattern is made only where it is read or changed; other rows never notice.
    """
    starts = sorted({entry[0].start for entry in (*masks, *writes)})
    size = (masks or writes)[0][0].stop - (masks or writes)[0][0].start if starts else 0
    if needs_pattern:
        return through_pattern(q, k, v, queries, scaling, window, masks, writes)
    if len(starts) * size == q.shape[0]:
        return through_pattern(q, k, v, queries, scaling, window, masks, writes)[0], None
    if q.shape[2] == k.shape[2] and (window is None or window >= k.shape[2]):
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    else:
        allowed = ~hidden_keys(queries, k.shape[2], window)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
    if not starts:
        return z, None
    rows = torch.cat([torch.arange(start, start + size, device=q.device) for start in starts])
    here = {start: slice(place * size, (place + 1) * size) for place, start in enumerate(starts)}
    moved = [[(here[entry[0].start], *entry[1:]) for entry in entries] for entries in (masks, writes)]
    z[rows] = through_pattern(q[rows], k[rows], v[rows], queries, scaling, window, *moved)[0]
    return z, None


def through_pattern(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    scaling: float,
    window: int | None,
    masks: Writes,
    writes: Writes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` step by step, whatever implementation the model itself uses: scores, softmax, pattern, sum of values."""
    scores = (wide(q) @ wide(k).transpose(-1, -2)) * scaling
    scores = scores.masked_fill(hidden_keys(queries, k.shape[2], window), float("-inf"))
    for rows, where, some, keys in masks:
        scores[rows, some][:, :, where[:, None], keys] = float("-inf")
    pattern = scores.softmax(-1)
    if writes and torch.is_grad_enabled():
        pattern = pattern.clone()  # the softmax needs its own result for its gradient
    for rows, where, some, how, value in writes:
        there = pattern[rows, some]
        there[:, :, where] = there[:, :, where] * value if how == "scale" else 0 if value is None else value
    return pattern.to(v.dtype) @ v, pattern


def hidden_keys(queries: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """Which of keys 0, 1, ... a query does not see ``(query, key)``: later ones, and those outside of its window."""
    places = torch.arange(keys, device=queries.device)
    hidden = places > queries[:, None]
    return hidden if window is None else hidden | (places <= queries[:, None] - window)


def shared(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``(row, key-value head, position, d_head)`` as each head reads it."""
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], 1)


def picked(value: torch.Tensor, heads: list[int], d_head: int) -> torch.Tensor:
    """Some heads of ``(example, position, head * d_head)`` as rows, head by head."""
    return split_last_axis(value, -1, d_head)[:, :, heads].permute(2, 0, 1, 3).flatten(0, 1)


def wide(value: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def by_head(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``(row, position, head * d_head)`` as ``(row, head, position, d_head)``."""
    return value.reshape(*value.shape[:-1], heads, -1).transpose(1, 2)


def joined_heads(z: torch.Tensor) -> torch.Tensor:
    """``(row, head, position, d_head)`` as ``(row, position, head * d_head)``."""
    return z.transpose(1, 2).flatten(-2)
