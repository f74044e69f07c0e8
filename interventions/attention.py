"""Attention in a planned pass. Runs inside a trace: plain functions, as `forward` says; imports torch and `rows`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .rows import Base, Writes, called, changed, write_into


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
    normed = called(module, model["paths"]["norm_1"], hidden)
    width = heads * model["d_head"]
    some = layer == job["layers"] - 1 and not job["watch"] and len(job["out"]) < stop - start
    if some:
        q = model["project"](module, normed[:, job["out"] - start], slice(0, width))
        k, v = model["project"](module, normed, slice(width, 3 * width)).chunk(2, -1)
    else:
        q, k, v = called(module, model["paths"]["qkv"], normed).chunk(3, -1)
    q = changed(q, layer, "q", job, keep)
    k, v = changed(k, layer, "k", job, keep), changed(v, layer, "v", job, keep)
    if start:
        earlier = base[(layer, "qkv")][:, :start, width:].repeat(k.shape[0] // job["examples"], 1, 1)
        k, v = torch.cat([earlier[..., :width], k], 1), torch.cat([earlier[..., width:], v], 1)
    queries = job["out"] if some else torch.arange(start, stop, device=hidden.device)
    place = (layer, "pattern")
    pattern: Any
    z, pattern = attend(
        by_head(q, heads),
        by_head(k, heads),
        by_head(v, heads),
        queries,
        model["scalings"][layer],
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


def redone(model: dict[str, Any], base: Base, job: dict[str, Any], layer: int, at: Any) -> torch.Tensor:
    """``z`` of the conditions that join at q, k, v or pattern: that of the base run, with the changed heads redone."""
    heads, d_head, examples = model["heads"], model["d_head"], job["examples"]
    conditions, changed_heads = job["pairs"][layer]
    sides = base[(layer, "qkv")][:, : job["stop"]].reshape(examples, job["stop"], 3, heads, d_head)[
        :, :, :, changed_heads
    ]
    stop, device = job["stop"], sides.device
    queries = torch.arange(job["start"], stop, device=device) if isinstance(at, slice) else at
    q, k, v = (
        sides[:, where, side].permute(2, 0, 1, 3).reshape(-1, count, d_head)
        for side, where, count in ((0, queries, len(queries)), (1, slice(0, stop), stop), (2, slice(0, stop), stop))
    )
    writes = job["pair_writes"]
    for part, name in ((q, "q"), (k, "k"), (v, "v")):
        write_into(part, writes.get((layer, name), []))
    z, _ = attend(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        queries,
        model["scalings"][layer],
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
    masks: Writes,
    writes: Writes,
    needs_pattern: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention, ``(row, head, query, d_head)`` from q and from k, v of keys 0, 1, ..., and its pattern.

    A pattern is made only where it is read or changed; other rows never notice.
    """
    if needs_pattern:
        return through_pattern(q, k, v, queries, scaling, masks, writes)
    if q.shape[2] == k.shape[2]:
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    else:
        allowed = torch.arange(k.shape[2], device=q.device) <= queries[:, None]
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
    if not (masks or writes):
        return z, None
    starts = sorted({entry[0].start for entry in (*masks, *writes)})
    size = (masks or writes)[0][0].stop - (masks or writes)[0][0].start
    rows = torch.cat([torch.arange(start, start + size, device=q.device) for start in starts])
    here = {start: slice(place * size, (place + 1) * size) for place, start in enumerate(starts)}
    moved = [[(here[entry[0].start], *entry[1:]) for entry in entries] for entries in (masks, writes)]
    z[rows] = through_pattern(q[rows], k[rows], v[rows], queries, scaling, *moved)[0]
    return z, None


def through_pattern(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    scaling: float,
    masks: Writes,
    writes: Writes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` step by step, whatever implementation the model itself uses: scores, softmax, pattern, sum of values."""
    scores = (wide(q) @ wide(k).transpose(-1, -2)) * scaling
    future = torch.arange(k.shape[2], device=q.device) > queries[:, None]
    scores = scores.masked_fill(future, float("-inf"))
    for rows, where, some, keys in masks:
        scores[rows, some][:, :, where[:, None], keys] = float("-inf")
    pattern = scores.softmax(-1)
    if writes and torch.is_grad_enabled():
        pattern = pattern.clone()  # the softmax needs its own result for its gradient
    for rows, where, some, how, value in writes:
        there = pattern[rows, some]
        there[:, :, where] = there[:, :, where] * value if how == "scale" else 0 if value is None else value
    return pattern.to(v.dtype) @ v, pattern


def wide(value: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def by_head(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``(row, position, head * d_head)`` as ``(row, head, position, d_head)``."""
    return value.reshape(*value.shape[:-1], heads, -1).transpose(1, 2)


def joined_heads(z: torch.Tensor) -> torch.Tensor:
    """``(row, head, position, d_head)`` as ``(row, position, head * d_head)``."""
    return z.transpose(1, 2).flatten(-2)
