"""Estimates from gradients: slopes on the lines from old to new values. Runs where the activations are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nnsight
import torch

from ..edges.estimates import estimated
from ..rows import no_tokens, projected_out
from .planned_pass import resolve, resolve_values
from .traces import end, slopes

if TYPE_CHECKING:
    from ..specs import (
        Change,
        EdgeEstimateSpec,
        EstimateSpec,
        ModelParts,
        ResolvedPass,
        RunCache,
        StreamStart,
        TensorWrite,
        WriteSite,
    )

AT_ONCE = 32
"""Conditions whose new values are held at a time."""


def attribution(
    root: Any, parts: ModelParts, cache: RunCache, spec: EstimateSpec, device: Any
) -> dict[str, torch.Tensor]:
    """The estimated change of each kernel's mean over scored positions.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : ModelParts
    cache : RunCache
    spec : EstimateSpec
    device : torch.device

    Returns
    -------
    dict
        Kernel name to the change, ``(condition, example)``.
    """
    names, steps, examples = spec["names"], spec["steps"], spec["examples"]
    found = {name: torch.zeros(spec["conditions"], examples, dtype=torch.float32, device=device) for name in names}
    if spec["start"] is None:
        return found
    values, at_base = slopes_from(root, parts, cache, spec["start"], {}, spec["sites"], names, device)
    for group in spec["groups"]:
        site, start = group["site"], group["start"]
        old = values[site]
        for some in batches(group["changes"], AT_ONCE if start is None else len(group["changes"])):
            made: list[Change] = [{**change, "value": resolve(change["value"], cache)} for change in some]
            if start is None or steps is None:
                for change in made:
                    for name in names:
                        found[name][change["condition"]] += first_order_effect(site, change, old, at_base[name][site])
                continue
            for changes in disjoint_sets(site, made, old):
                writes = {site: interpolated_writes(site, changes, old, steps, examples)}
                _, on_lines = slopes_from(root, parts, cache, start, writes, [site], names, device)
                shape = (steps, examples, *old.shape[1:])
                mean = {name: on_lines[name][site].reshape(shape).mean(0) for name in names}
                for change in changes:
                    for name in names:
                        found[name][change["condition"]] += first_order_effect(site, change, old, mean[name])
    return found


def edge_estimates(
    root: Any, parts: ModelParts, cache: RunCache, spec: EdgeEstimateSpec, device: Any
) -> dict[str, torch.Tensor]:
    """Estimates of edge scores, as `estimates.estimated` gives them.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : ModelParts
    cache : RunCache
    spec : EdgeEstimateSpec
    device : torch.device

    Returns
    -------
    dict
        Kernel name to ``(edge, example)``.
    """
    with torch.enable_grad(), root.trace(no_tokens(device), use_cache=False) as tracer:
        found = estimated(parts, cache, spec)
        nnsight.save(found)
        end(parts, tracer)
    return dict(found)


def slopes_from(
    root: Any,
    parts: ModelParts,
    cache: RunCache,
    start: StreamStart,
    writes: dict[WriteSite, list[TensorWrite]],
    sites: list[WriteSite],
    names: list[str],
    device: Any,
) -> tuple[dict[WriteSite, torch.Tensor], dict[str, dict[WriteSite, torch.Tensor]]]:
    """What is at sites in a pass from the base run's stream, and the slope of each kernel by it.

    Parameters
    ----------
    root : nnsight handle of the model
    parts : ModelParts
    cache : RunCache
    start : StreamStart
    writes : dict
        What is written in the pass, by site.
    sites : list of WriteSite
    names : list of str
        Of kernels.
    device : torch.device

    Returns
    -------
    tuple of dict and dict
        See `traces.slopes`.
    """
    spec: ResolvedPass = {**resolve_values(start["spec"], cache), "writes": writes}
    base = {(start["layer"], "stream"): cache["base"][start["site"]]}
    return slopes(root, parts, base, spec, sites, names, device)


def batches(changes: list[Change], size: int) -> list[list[Change]]:
    """A list in lists of at most `size`."""
    return [changes[start : start + size] for start in range(0, len(changes), size)]


def changed_part(site: WriteSite, change: Change, value: torch.Tensor) -> torch.Tensor:
    """The part of a value at its site that a change changes: a view, where positions are a slice."""
    _, point = site
    positions: Any = change["positions"]
    if point == "pattern":
        return value[:, change["columns"]][:, :, positions]
    return value[:, positions, change["columns"]]


def changed_numbers(site: WriteSite, change: Change, value: torch.Tensor) -> torch.Tensor:
    """Which numbers of a value at its site a change changes: a mask ``(1, ...)``."""
    _, point = site
    positions: Any = change["positions"]
    mask = torch.zeros_like(value[:1], dtype=torch.bool)
    if point == "pattern":
        mask[:, change["columns"]][:, :, positions] = True
    else:
        mask[:, positions, change["columns"]] = True
    return mask


def difference(site: WriteSite, change: Change, old: torch.Tensor) -> torch.Tensor:
    """``new - old`` for the value at its site, ``(example, position, column)``."""
    there = changed_part(site, change, old)
    new: Any = change["value"]
    if new is None:
        return -there
    if not isinstance(new, torch.Tensor):
        scaled: torch.Tensor = (new - 1) * there
        return scaled
    new = new.to(there.dtype)
    if change["how"] == "project":
        new = projected_out(there, new)
    changed: torch.Tensor = new.expand_as(there) if change["how"] == "add" else new - there
    return changed


def first_order_effect(site: WriteSite, change: Change, old: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """What a change makes of each example, to first order.

    Parameters
    ----------
    site : WriteSite
    change : Change
    old, slope : tensor (example, ...)
        What is at the site in the base run, and the slope by it.

    Returns
    -------
    tensor (example,)
    """
    return (difference(site, change, old) * changed_part(site, change, slope)).flatten(1).sum(1)


def disjoint_sets(site: WriteSite, changes: list[Change], old: torch.Tensor) -> list[list[Change]]:
    """Changes at one site in sets whose members change different numbers."""
    sets: list[tuple[list[Change], torch.Tensor]] = []
    for change in changes:
        own = changed_numbers(site, change, old)
        for members, mask in sets:
            if not (mask & own).any():
                members.append(change)
                mask |= own
                break
        else:
            sets.append(([change], own))
    return [members for members, _ in sets]


def interpolated_writes(
    site: WriteSite, changes: list[Change], old: torch.Tensor, steps: int, examples: int
) -> list[TensorWrite]:
    """Writes that bring the values at a site to the middle of each step of their line, step by step as rows.

    Parameters
    ----------
    site : WriteSite
    changes : list of Change
        With disjoint numbers.
    old : tensor (example, ...)
    steps, examples : int

    Returns
    -------
    list of TensorWrite
        For rows ``step * examples + example``.
    """
    writes: list[TensorWrite] = []
    for step in range(steps):
        rows = slice(step * examples, (step + 1) * examples)
        for change in changes:
            moved = changed_part(site, change, old) + (step + 0.5) / steps * difference(site, change, old)
            at, columns = change["positions"], change["columns"]
            writes.append({"rows": rows, "positions": at, "columns": columns, "how": "set", "value": moved})
    return writes
