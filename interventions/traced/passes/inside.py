"""What runs and passes hold: values of sites, sums and norms of them, and what they add to logits.

Plain functions, as in `traces`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..activations import pattern_between, split_heads
from ..head_weights import output_weights, weights_of
from ..logits import direct_shares, shares_in_rows, shares_of_rows
from ..projections import is_readable
from ..rows import write_into
from .traces import lens_of_rows, logits_of, read

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..specs import (
        CapturedSite,
        DirectSpec,
        ModelParts,
        Points,
        ReadSite,
        ResolvedPass,
        RunCache,
        TensorWrite,
        WriteSite,
    )

AT_ONCE = 64
"""Prompts that are read together."""
FEW = 8
"""Prompts of which every part is read together."""


def read_in_pass(
    root: Any, parts: ModelParts, cache: RunCache, spec: ResolvedPass, kept: dict[WriteSite, Any], device: Any
) -> dict[str, torch.Tensor]:
    """The values of the sites that a pass reads, by name: ``(condition * example, ...)``.

    Rows that did not join before a site, and positions that were not computed, are those of the base run.

    Parameters
    ----------
    root, parts, cache, device
        As for `server_jobs.run_pass`.
    spec : ResolvedPass
    kept : dict
        WriteSite to what is there, of the rows at work; None, or nothing, where there is none.

    Returns
    -------
    dict
        Name of a site to its value.
    """
    if spec["inside"] is not None:
        return inside_of(root, parts, cache, spec, kept, device)
    found, out_of = {}, output_weights(root, parts, spec["reads"])
    for site in spec["reads"]:
        where, whole = site["planned"], all_rows(cache, spec, kept, site)
        made = shaped(whole, site, out_of, spec["writes"].get(where["added"], []) if where["added"] else [])
        if site["kind"] == "logits":
            made = logits_of(root, parts, made, site["tokens"], device)
        found[where["name"]] = made
    return found


def all_rows(cache: RunCache, spec: ResolvedPass, kept: dict[WriteSite, Any], site: CapturedSite) -> torch.Tensor:
    """The columns of a site in every row of a pass, at all positions, before what is added to it afterwards.

    Parameters
    ----------
    cache, spec, kept
        As for `read_in_pass`.
    site : CapturedSite
        One that the pass reads.

    Returns
    -------
    tensor (row, position, column)
        Of a pattern ``(row, head, query, key)``.
    """
    where, before = site["planned"], cache["base"][site["site"]]
    value = kept.get(where["at"]) if where["at"] is not None else None
    at = spec["out"] if where["scored"] else slice(spec["start"], spec["stop"])
    if site["pattern"] is not None:
        whole = pattern_between(before, **site["pattern"]).repeat(spec["conditions"], 1, 1, 1)
        if value is not None:
            whole[: len(value), :, at, : spec["stop"]] = value[:, where["columns"]].to(whole.dtype)
    else:
        whole = before[..., site["columns"]].repeat(spec["conditions"], 1, 1)
        if value is not None:
            whole[: len(value), at] = value[..., where["columns"]].to(whole.dtype)
    return whole


def inside_of(
    root: Any, parts: ModelParts, cache: RunCache, spec: ResolvedPass, kept: dict[WriteSite, Any], device: Any
) -> dict[str, torch.Tensor]:
    """What is made of the sites that a pass reads: shares of parts, or what the logit lens says.

    Parameters
    ----------
    root, parts, cache, spec, kept, device
        As for `read_in_pass`.

    Returns
    -------
    dict
        ``shares``, ``(row, source + 1, scored)``, see `logits.shares_of_rows`; or for each kernel, with `` inside``
        behind its name, ``(row, layer + 1, scored)`` or ``(row, layer, head, scored)``.
    """
    asked = spec["inside"]
    assert asked is not None
    places: dict[tuple[ReadSite, int | None], torch.Tensor] = {}  # by site and head
    added: dict[int, torch.Tensor] = {}  # by layer, what heads are made to write, (row, scored, head, d_model)
    for site in spec["reads"]:
        (layer, point), more = site["site"], site["planned"]["added"]
        whole = all_rows(cache, spec, kept, site)
        length = whole.shape[1]
        if more is not None:
            whole = write_into(whole, spec["writes"].get(more, []))
        if point != "qkv":  # values of every key are needed
            whole = whole[:, :, asked["scored"]] if site["pattern"] is not None else whole[:, asked["scored"]]
        places[site["site"], site["head"]] = whole
        of_heads = spec["writes"].get((layer, "head_out read"), []) if point == "z" else []
        if of_heads:
            blank = whole.new_zeros(len(whole), length, parts["heads"], parts["d_model"])
            added[layer] = write_into(blank, of_heads)[:, asked["scored"]]
    direct = asked["direct"]
    if direct is not None and direct["parts"] is not None:
        check_linear(parts)
        with torch.no_grad():
            out_of = {one["layer"]: weights_of(root, parts, one["layer"])[3] for one in direct["parts"]}
            return {"shares": shares_in_rows(parts, places, added, out_of, direct, spec["conditions"], device)}
    points: Points = {at: value for (at, _), value in places.items()}
    if direct is None:
        return lens_of_rows(root, parts, cache["logits"], points, added, spec, device)
    check_linear(parts)
    with torch.no_grad():
        out_of = {layer: weights_of(root, parts, layer)[3] for layer in range(parts["layers"])}
        before = {at: value[:, asked["scored"]] for at, value in cache["base"].items() if at[1] in ("z", "attn_out")}
        return {"shares": shares_of_rows(parts, points, before, added, out_of, direct, device)}


def read_in_batches(root: Any, parts: ModelParts, tokens: torch.Tensor, wanted: Iterable[ReadSite]) -> Points:
    """Read points of many prompts in passes without intervention, `AT_ONCE` prompts at a time.

    Parameters
    ----------
    root, parts
        As for `server_jobs.run_unmodified`.
    tokens : Tensor (example, position)
    wanted : iterable of ReadSite

    Returns
    -------
    dict
        ReadSite to a tensor ``(example, position, width)``.
    """
    points, starts = set(wanted), range(0, len(tokens), AT_ONCE)
    batches = [read(root, parts, tokens[start : start + AT_ONCE], points) for start in starts]
    return {at: torch.cat([batch[at] for batch in batches]) for at in points}


def capture(
    root: Any, parts: ModelParts, tokens: torch.Tensor, sites: list[CapturedSite], out_of: dict[ReadSite, Any]
) -> dict[str, torch.Tensor]:
    """The values of sites, by their number.

    Parameters
    ----------
    root, parts
        As for `server_jobs.run_unmodified`.
    tokens : Tensor (example, position)
    sites : list of CapturedSite
    out_of : dict
        As `output_weights` gives it.

    Returns
    -------
    dict
        Number of a site, as text, to its value, in the shape that its component states.
    """
    points = read_in_batches(root, parts, tokens, [site["site"] for site in sites])
    return {str(number): value_at(points, site, out_of) for number, site in enumerate(sites)}


def value_at(points: Points, site: CapturedSite, out_of: dict[ReadSite, Any]) -> torch.Tensor:
    """The value of a site, in the shape that its component states."""
    value = points[site["site"]]
    if site["pattern"] is not None:
        return shaped(pattern_between(value, **site["pattern"]), site, out_of, [])
    return shaped(value[..., site["columns"]], site, out_of, [])


def shaped(
    value: torch.Tensor, site: CapturedSite, out_of: dict[ReadSite, Any], added: list[TensorWrite]
) -> torch.Tensor:
    """The columns of a site, at all positions, in the shape that its component states; at its own positions.

    Parameters
    ----------
    value : tensor (row, position, column)
        Of a pattern ``(row, head, query, key)``.
    site : CapturedSite
    out_of : dict
        As `output_weights` gives it.
    added : list of TensorWrite
        What is written to it after it was made.

    Returns
    -------
    tensor (row, ...)
    """
    head, at = site["head"], site["positions"]
    if site["pattern"] is not None:
        pattern = value if head is None else value[:, 0]
        return pattern if at is None else pattern[..., at, :]
    if site["kind"] == "head_out":
        weight = out_of[site["site"]].to(value.device)
        value = torch.einsum("ephd,hdm->ephm", split_heads(value, site["heads"]), weight)
        value = write_into(value, added)
        value = value if head is None else value[:, :, head]
    elif site["kind"] == "heads":
        value = split_heads(value, site["heads"]) if head is None else value
    elif site["kind"] == "neuron":
        value = value.squeeze(-1)
    else:
        value = write_into(value, added)
    return value if at is None else value[:, at]


def weighted_sums(
    root: Any,
    parts: ModelParts,
    tokens: list[torch.Tensor],
    weights: list[torch.Tensor],
    sites: list[CapturedSite],
) -> dict[str, torch.Tensor]:
    """The values of sites times a weight for each position, summed over groups, examples and positions.

    Parameters
    ----------
    root, parts
        As for `server_jobs.run_unmodified`.
    tokens, weights : list of Tensor (example, position)
        By group.
    sites : list of CapturedSite

    Returns
    -------
    dict
        Number of a site, as text, to its sum, float64 on the CPU.
    """
    out_of, wanted = output_weights(root, parts, sites), [site["site"] for site in sites]
    found: dict[str, Any] = {str(number): 0.0 for number in range(len(sites))}
    for ids, by_position in zip(tokens, weights, strict=True):
        for start in range(0, len(ids), AT_ONCE):
            points = read(root, parts, ids[start : start + AT_ONCE], set(wanted))
            each = by_position[start : start + AT_ONCE].cpu().double()
            for number, site in enumerate(sites):
                value = value_at(points, site, out_of).cpu().double()
                found[str(number)] = found[str(number)] + torch.tensordot(each, value, 2)
    return found


def check_linear(parts: ModelParts) -> None:
    """Refuse direct attribution where weights are not at hand, or the unembedding is more than a linear layer."""
    if parts["apart"]:
        raise RuntimeError("this server runs jobs apart from the weights, of which direct attribution needs some")
    if not is_readable(False, parts["unembed"]):
        raise ValueError("the unembedding is more than a linear layer, so that what parts add to logits has no sum")


def direct_of(root: Any, parts: ModelParts, spec: DirectSpec) -> torch.Tensor:
    """What each part adds, ``(source + 1, example, scored)``; see `logits.direct_shares`."""
    check_linear(parts)
    layers, tokens = range(parts["layers"]), spec["tokens"]
    inside, wanted = spec["parts"], {(layers[-1], "resid_post")}
    if inside is None:
        wanted |= {(0, "resid_pre")} | {(0, name) for name, _ in parts["embeddings"] if name == "pos_embed"}
        wanted |= {(layer, point) for layer in layers for point in ("z", "attn_out", "mlp_out")}
    else:
        wanted |= {(one["layer"], "mlp_post") for one in inside if one["head"] is None}
        wanted |= {(one["layer"], point) for one in inside if one["head"] is not None for point in ("qkv", "rotated")}
    found = []
    with torch.no_grad():
        needed = layers if inside is None else sorted({one["layer"] for one in inside if one["head"] is not None})
        out_of = {layer: weights_of(root, parts, layer)[3] for layer in needed}
        for start in range(0, len(tokens), FEW):
            some = slice(start, start + FEW)
            part: DirectSpec = {
                **spec,
                "tokens": tokens[some],
                "answers": None if spec["answers"] is None else spec["answers"][some],
                "others": None if spec["others"] is None else spec["others"][some],
            }
            points = read(root, parts, part["tokens"], wanted)
            found.append(direct_shares(parts, points, out_of, part, tokens.device))
    return torch.cat(found, 1)
