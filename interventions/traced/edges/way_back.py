"""A run whose receivers each read a stream of their own: forward layer by layer, and the slopes back. Runs in a trace.

The slope by what a receiver reads is found from the last layer to the first. Each layer is computed again on the way
back, so that no more than one layer is held with its slopes.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from ..attention import at_least_float32, attend, by_head, expand_key_heads, joined_heads
from ..logits import frozen_norm, logits_kernels
from ..projections import project, rotated, sides, sinks_of
from ..rows import call_module, normed

if TYPE_CHECKING:
    from ..specs import Angles, LogitsSpec, ModelParts, Points

SMALL = 1e-6
"""What an activation function gets is not nearer to 0 where it is divided by."""


def forward(parts: ModelParts, angles: list[Angles], stream: torch.Tensor, fixed: Points) -> Points:
    """Run all blocks without slopes.

    Parameters
    ----------
    parts : ModelParts
    angles : list of Angles
        By layer, see `projections.rotary_angles`.
    stream : tensor (example, position, d_model)
        What enters the first block.
    fixed : Points
        ``z`` or ``mlp_out`` of layers, which are put in the place of what the run makes.

    Returns
    -------
    Points
        ``stream``, which enters a layer, and of the layer after the last; and ``mid``, which its MLP reads.
    """
    found: Points = {}
    with torch.no_grad():
        for layer in range(parts["layers"]):
            block = parts["blocks"][layer]
            found[layer, "stream"] = stream
            z = fixed.get((layer, "z"))
            if z is None:
                z = attended(parts, angles, layer, *sides(parts, block, entering(parts, layer, stream, False)))
            attn_out = call_module(block, parts["paths"]["out"], z)
            mid = found[layer, "mid"] = stream if parts["parallel"] else stream + attn_out
            mlp_out = fixed.get((layer, "mlp_out"))
            mlp_out = mlp(parts, layer, mid) if mlp_out is None else mlp_out
            stream = stream + attn_out + mlp_out
        found[parts["layers"], "stream"] = stream
    return found


def entering(parts: ModelParts, layer: int, stream: torch.Tensor, ruled: bool, norm: str = "norm_1") -> torch.Tensor:
    """What attention (or, by the second norm, the MLP) of a layer reads; `ruled`, its norm divides by a number.

    Parameters
    ----------
    parts : ModelParts
    layer : int
    stream : tensor (row, position, d_model)
    ruled : bool
        Whether what the norm divides by has no slope.
    norm : str

    Returns
    -------
    tensor (row, position, d_model)
    """
    block, path = parts["blocks"][layer], parts["paths"].get(norm)
    if not ruled or path is None:
        return normed(block, path, stream)
    return divided(operator.attrgetter(path)(block), stream, parts["centred"])


def mlp(parts: ModelParts, layer: int, mid: torch.Tensor) -> torch.Tensor:
    """What the MLP of a layer makes of the stream that it reads."""
    read = entering(parts, layer, mid, False, "norm_2")
    return call_module(parts["blocks"][layer], parts["paths"]["mlp"], read)


def divided(norm: Any, stream: torch.Tensor, centred: bool) -> torch.Tensor:
    """What a norm makes of the stream, where what it divides by has no slope."""
    with torch.no_grad():
        frozen = frozen_norm(norm, stream, centred)
        made: torch.Tensor = norm(stream)
    middle = stream - stream.mean(-1, keepdim=True) if centred else stream
    sloped = (frozen["gain"] * frozen["scale"] * middle).to(stream.dtype)
    return sloped + (made - sloped).detach()


def attended(
    parts: ModelParts, angles: list[Angles], layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """``z`` of all heads from q, k and v of all positions, before they are rotated.

    Parameters
    ----------
    parts : ModelParts
    angles : list of Angles
    layer : int
    q, k, v : tensor (row, position, head * d_head)

    Returns
    -------
    tensor (row, position, head * d_head)
    """
    block, heads, kv_heads, every = parts["blocks"][layer], parts["heads"], parts["kv_heads"], slice(0, q.shape[1])
    q = rotated(parts, angles[layer], block, "q", q, every)
    k = rotated(parts, angles[layer], block, "k", k, every)
    sinks = sinks_of(parts, block)
    z, _ = attend(
        by_head(q, heads),
        expand_key_heads(by_head(k, kv_heads), heads),
        expand_key_heads(by_head(v, kv_heads), heads),
        torch.arange(q.shape[1], device=q.device),
        parts["scalings"][layer],
        parts["windows"][layer],
        [],
        [],
        False,
        parts["cap"],
        None if sinks is None else sinks[:, None, None],
    )
    return joined_heads(z)


def slopes_of_logits(
    parts: ModelParts, stream: torch.Tensor, logits: LogitsSpec, scored: list[int], ruled: bool
) -> dict[str, torch.Tensor]:
    """The slope of each kernel's mean over scored positions by the stream after the last block.

    Parameters
    ----------
    parts : ModelParts
    stream : tensor (example, position, d_model)
    logits : LogitsSpec
    scored : list of int
    ruled : bool
        Whether what the last norm divides by has no slope.

    Returns
    -------
    dict
        Kernel name to a tensor ``(example, position, d_model)``.
    """
    at, found = torch.tensor(scored, device=stream.device), {}
    with torch.enable_grad():
        leaf = stream[:, at].detach().requires_grad_()
        read = divided(parts["norm"], leaf, parts["centred"]) if ruled else parts["norm"](leaf)
        values = logits_kernels(read, parts["unembed"], logits, len(stream))
        for name, value in values.items():
            total = value.to(torch.promote_types(value.dtype, torch.float32)).mean(-1).sum()
            found[name] = torch.zeros_like(stream)
            found[name][:, at] = torch.autograd.grad(total, leaf, retain_graph=True)[0]
    return found


def back_through_mlp(
    parts: ModelParts, layer: int, mid: torch.Tensor, towards: list[torch.Tensor], ruled: bool
) -> list[torch.Tensor]:
    """The slopes by what an MLP reads, one for each slope by what it writes.

    Parameters
    ----------
    parts : ModelParts
    layer : int
    mid : tensor (example, position, d_model)
        What it reads.
    towards : list of tensor (example, position, d_model)
    ruled : bool
        Whether the rules of RelP hold.

    Returns
    -------
    list of tensor (example, position, d_model)
    """
    with torch.enable_grad():
        leaf = mid.detach().requires_grad_()
        made = mlp_by_rules(parts, layer, leaf) if ruled else mlp(parts, layer, leaf)
        return [torch.autograd.grad(made, leaf, one, retain_graph=True)[0] for one in towards]


def mlp_by_rules(parts: ModelParts, layer: int, mid: torch.Tensor) -> torch.Tensor:
    """What an MLP makes, with the slopes of RelP: norm and activation multiply by numbers, a gate halves the slope."""
    block, paths = parts["blocks"][layer], parts["paths"]
    read = entering(parts, layer, mid, True, "norm_2")
    pre = call_module(block, paths["pre"], read)
    with torch.no_grad():
        divisor = torch.where(pre.abs() < SMALL, torch.where(pre < 0, -SMALL, SMALL).to(pre.dtype), pre)
        ratio = call_module(block, paths["act"], divisor) / divisor
    post = pre * ratio
    if parts["gated"]:
        post = post * call_module(block, paths["up"], read)
        post = post / 2 + (post / 2).detach()
    return call_module(block, paths["down"], post)


def back_through_attention(
    parts: ModelParts,
    angles: list[Angles],
    layer: int,
    stream: torch.Tensor,
    towards: list[torch.Tensor],
    ruled: bool,
    changes: torch.Tensor,
    only_v: bool,
) -> list[dict[str, torch.Tensor]]:
    """The slopes by what q, k and v of each head read, for each slope by what attention writes.

    Parameters
    ----------
    parts : ModelParts
    angles : list of Angles
    layer : int
    stream : tensor (example, position, d_model)
        What they read.
    towards : list of tensor (example, position, d_model)
    ruled : bool
        Whether the rules of RelP hold: of norms, while attention has its own slopes.
    changes : tensor (sender, example, position, d_model)
        Of the senders before the layer.
    only_v : bool
        Whether scores are wanted of v alone: then q and k of all heads read one stream together, which is quicker.

    Returns
    -------
    list of dict
        ``scores``, changes times slopes, ``(receiver, sender, example)``, q of each head first, then k, then v;
        ``stream``, the sum of the slopes, ``(example, position, d_model)``; and ``z``, the slope by ``z``, ``(example,
        position, head * d_head)``.
    """
    block, size, heads, kv_heads = parts["blocks"][layer], parts["d_head"], parts["heads"], parts["kv_heads"]
    first, found = heads + kv_heads, []  # of q and k
    streams = [0 if only_v and at < first else at - only_v * (first - 1) for at in range(first + kv_heads)]
    with torch.enable_grad():
        leaf = stream.detach().expand(streams[-1] + 1, *stream.shape).clone().requires_grad_()
        read = entering(parts, layer, leaf.flatten(0, 1), ruled).chunk(len(leaf))
        each = [project(parts, block, read[at], slice(n * size, (n + 1) * size)) for n, at in enumerate(streams)]
        q, k, v = each[:heads], each[heads:first], each[first:]
        z = attended(parts, angles, layer, torch.cat(q, -1), torch.cat(k, -1), torch.cat(v, -1))
        made = call_module(block, parts["paths"]["out"], z)
        for one in towards:
            slopes, by_z = torch.autograd.grad(made, [leaf, z], one, retain_graph=True)
            found.append({"scores": summed(changes, slopes[int(only_v) :]), "stream": slopes.sum(0), "z": by_z})
    return found


def summed(changes: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Changes ``(sender, example, position, d_model)`` times slopes ``(receiver, ...)``, by receiver and sender."""
    return torch.einsum("sepd,repd->rse", at_least_float32(changes), at_least_float32(slopes))
