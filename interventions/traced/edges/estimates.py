"""Estimates of edge scores from slopes: EAP, EAP-IG, AtP* and RelP. Runs where the activations are.

An estimate is what the sender's value changes by, times the slope by what the receiver reads, summed over positions and
dimensions. `headwise.edge_scores` says what each estimator is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..attention import at_least_float32
from ..projections import combine, project, rotary_angles, sides
from ..rows import normed, points_of_source, split_last_axis
from .way_back import attended, back_through_attention, back_through_mlp, forward, slopes_of_logits, summed

if TYPE_CHECKING:
    from ..specs import Angles, EdgeEstimateSpec, ModelParts, Points, ReadSite, RunCache


def estimated(parts: ModelParts, cache: RunCache, spec: EdgeEstimateSpec) -> dict[str, torch.Tensor]:
    """The estimated change of each kernel's mean over scored positions, where one edge carries another run's value.

    Parameters
    ----------
    parts : ModelParts
    cache : RunCache
        Of both runs ``embed``, and of each layer ``z`` and ``mlp_out``; of the base run also what enters layer 0.
    spec : EdgeEstimateSpec

    Returns
    -------
    dict
        Kernel name to ``(edge, example)``, receiver by receiver in forward order: of a layer q of each head, k, v, and
        the MLP, last the logits; and of each receiver its senders in forward order.
    """
    base = cache["base"]
    senders = [(0, "embed"), *((layer, point) for layer in range(parts["layers"]) for point in ("z", "mlp_out"))]
    other = points_of_source(cache, spec["source"], senders)
    entering = base[(0, "resid_pre")]
    angles = rotary_angles(parts, entering, entering.shape[1])
    with torch.no_grad():
        changes = changes_of_senders(parts, base, other)
    found: dict[str, torch.Tensor] = {}
    for unit, share in spec["runs"]:
        first, fixed = entering, {}
        if unit is not None:
            moved = share * (other[unit] - base[unit])
            if unit[1] == "embed":
                first = entering + moved
            else:
                fixed = {unit: base[unit] + moved}
        points = forward(parts, angles, first, fixed)
        slopes = slopes_of_logits(
            parts, points[(parts["layers"], "stream")], cache["logits"], spec["scored"], spec["ruled"]
        )
        for name, slope in slopes.items():
            one = on_the_way_back(parts, angles, points, changes, slope, unit, spec) / len(spec["runs"])
            found[name] = found[name] + one if name in found else one
    return found


def changes_of_senders(parts: ModelParts, base: Points, other: Points) -> torch.Tensor:
    """What each sender writes in another run, less what it writes in the base run.

    Parameters
    ----------
    parts : ModelParts
    base, other : Points

    Returns
    -------
    tensor (sender, example, position, d_model)
        The embedding, then of each layer its heads and its MLP.
    """
    size, found = parts["d_head"], [other[(0, "embed")] - base[(0, "embed")]]
    for layer in range(parts["layers"]):
        z = other[(layer, "z")] - base[(layer, "z")]
        for head in range(parts["heads"]):
            columns = slice(head * size, (head + 1) * size)
            found.append(combine(parts, parts["blocks"][layer], z[..., columns], columns))
        found.append(other[(layer, "mlp_out")] - base[(layer, "mlp_out")])
    return torch.stack(found)


def on_the_way_back(
    parts: ModelParts,
    angles: list[Angles],
    points: Points,
    changes: torch.Tensor,
    slope: torch.Tensor,
    cut: ReadSite | None,
    spec: EdgeEstimateSpec,
) -> torch.Tensor:
    """The estimates of all edges in one run, from the logits to the first layer.

    Parameters
    ----------
    parts : ModelParts
    angles : list of Angles
    points : Points
        Of the run, as `forward` gives them.
    changes : tensor (sender, example, position, d_model)
    slope : tensor (example, position, d_model)
        By the stream after the last block.
    cut : ReadSite, optional
        What is fixed in the run, so that it has no slope by what it reads.
    spec : EdgeEstimateSpec

    Returns
    -------
    tensor (edge, example)
    """
    heads, drops, ruled = parts["heads"], spec["drops"], spec["ruled"]
    units, copies = 2 * parts["layers"], [slope]  # the first without a dropped part
    found = [of_drops([summed(changes, slope[None])], units)]
    for layer in range(parts["layers"] - 1, -1, -1):
        before = changes[: 1 + layer * (heads + 1)]
        into_mlp = before if parts["parallel"] else changes[: len(before) + heads]
        by_mlp = back_through_mlp(parts, layer, points[(layer, "mid")], copies, ruled)
        if cut == (layer, "mlp_out"):
            by_mlp = [torch.zeros_like(one) for one in by_mlp]
        to_mlp = of_drops([summed(into_mlp, one[None]) for one in by_mlp], units)
        whole = copies
        if not parts["parallel"]:
            copies = [one + more for one, more in zip(copies, by_mlp, strict=True)] + copies[: int(drops)]
        stream = points[(layer, "stream")]
        by_heads = back_through_attention(parts, angles, layer, stream, copies, ruled, before, spec["patterns"])
        if cut == (layer, "z"):
            by_heads = [{name: torch.zeros_like(value) for name, value in one.items()} for one in by_heads]
        each = [one["scores"] for one in by_heads]
        if spec["patterns"]:
            made = by_patterns(parts, angles, layer, stream, before, [one["z"] for one in by_heads], spec["rows"])
            each = [torch.cat([new, of_v]) for new, of_v in zip(made, each, strict=True)]
        found += [to_mlp, of_drops(each, units)]
        added = [one["stream"] for one in by_heads]
        if parts["parallel"]:
            copies = [one + more for one, more in zip(copies, by_mlp, strict=True)] + copies[: int(drops)]
            dropped = [whole[0] + by_mlp[0]] if drops else []
            added += added[: int(drops)]
            copies = [one + more for one, more in zip(copies, added, strict=True)] + dropped
        else:
            copies = [one + more for one, more in zip(copies, added, strict=True)] + copies[: int(drops)]
    return torch.cat([one.flatten(0, 1) for one in reversed(found)])


def of_drops(estimates: list[torch.Tensor], units: int) -> torch.Tensor:
    """The mean size of estimates over dropped parts, with the sign of the first, in which none is dropped.

    Parameters
    ----------
    estimates : list of tensor
        The first without a dropped part, then those with a part that comes after the receiver dropped. Where a part
        before the receiver is dropped, the estimate is the first one.
    units : int
        Parts in all. That of the receiver is not dropped.

    Returns
    -------
    tensor
    """
    plain, others = estimates[0], estimates[1:]
    if not others:
        return plain
    size = plain.abs() * (units - 1 - len(others)) + torch.stack(others).abs().sum(0)
    sign = torch.where(plain == 0, torch.stack(others).sum(0).sign(), plain.sign())
    return sign * size / (units - 1)


def by_patterns(
    parts: ModelParts,
    angles: list[Angles],
    layer: int,
    stream: torch.Tensor,
    changes: torch.Tensor,
    by_z: list[torch.Tensor],
    rows: int,
) -> list[torch.Tensor]:
    """Estimates of edges into q and k, whose pattern is made anew; what comes after it is linear.

    ``z`` is linear in the pattern, so the slope by the pattern times its change is the slope by ``z`` times what ``z``
    changes by.

    Parameters
    ----------
    parts : ModelParts
    angles : list of Angles
    layer : int
    stream : tensor (example, position, d_model)
        What enters the layer.
    changes : tensor (sender, example, position, d_model)
    by_z : list of tensor (example, position, head * d_head)
        Slopes.
    rows : int
        That go through attention at a time.

    Returns
    -------
    list of tensor (receiver, sender, example)
        For each slope; q of each head first, then k.
    """
    block, path, size = parts["blocks"][layer], parts["paths"].get("norm_1"), parts["d_head"]
    heads, kv_heads, examples = parts["heads"], parts["kv_heads"], len(stream)
    width, both = heads * size, (heads + kv_heads) * size
    found: list[list[torch.Tensor]] = [[] for _ in by_z]
    with torch.no_grad():
        q, k, v = sides(parts, block, normed(block, path, stream))
        z = attended(parts, angles, layer, q, k, v)
        step = max(1, rows // examples)
        for start in range(0, len(changes), step):
            some = changes[start : start + step]
            changed = project(parts, block, normed(block, path, (stream + some).flatten(0, 1)), slice(0, both))
            q_here, k_here, v_here, z_here = (one.repeat(len(some), 1, 1) for one in (q, k, v, z))
            by_q = attended(parts, angles, layer, changed[..., :width], k_here, v_here) - z_here
            by_k = attended(parts, angles, layer, q_here, changed[..., width:], v_here) - z_here
            for at, slope in enumerate(by_z):
                each = []
                for moved in (by_q, by_k):
                    times = at_least_float32(moved).reshape(len(some), *slope.shape) * at_least_float32(slope)
                    each.append(split_last_axis(times, heads, size).sum((2, 4)).movedim(-1, 0))
                of_keys = each[1].reshape(kv_heads, heads // kv_heads, *each[1].shape[1:]).sum(1)
                found[at].append(torch.cat([each[0], of_keys]))
    return [torch.cat(one, 1) for one in found]
