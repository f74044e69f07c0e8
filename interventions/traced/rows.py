"""Rows of a planned pass: how they join, are written into, and go through a module. Runs inside a trace."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .specs import Join, ModelParts, PassSpec, Points, ReadSite, ResolvedPass, RunCache, TensorWrite, WriteSite

IN_MLP = ("mlp_in", "mlp_pre", "mlp_post")
"""Points and stages in an MLP."""


def append_joining_rows(
    value: torch.Tensor | None, base: Points, site: ReadSite, at: Any, spec: PassSpec, join: Join
) -> Any:
    """`value` (None where no row is at work) with the rows that join here behind it, as the base run has them.

    Parameters
    ----------
    value : tensor (row, ...), optional
    base : Points
    site : ReadSite
        Where the base run has the rows that join.
    at : slice or tensor
        Positions of them.
    spec : PassSpec
    join : Join

    Returns
    -------
    tensor (row, ...) or None
    """
    count = spec["joins"].get(join)
    return value if count is None else append_rows(value, base[site][:, at].repeat(count, 1, 1))


def append_rows(value: torch.Tensor | None, more: torch.Tensor | None) -> Any:
    """Rows and more rows, if there are any."""
    if value is None or more is None:
        return more if value is None else value
    return torch.cat([value, more])


def apply_writes(value: Any, site: WriteSite, spec: PassSpec, keep: dict[WriteSite, Any]) -> Any:
    """`value` (None where no row is at work) after what is written at a site; kept where that is asked for.

    Parameters
    ----------
    value : tensor (row, position, column), optional
    site : WriteSite
    spec : PassSpec
    keep : dict
        Gets the value where the site is one of its keys.

    Returns
    -------
    tensor (row, position, column) or None
    """
    writes = spec["writes"].get(site, [])
    if value is not None and writes:
        value = write_into(value.clone() if torch.is_grad_enabled() else value, writes)
    if site in keep and value is not None:
        keep[site] = value
    return value


def write_into(value: torch.Tensor, writes: list[TensorWrite]) -> torch.Tensor:
    """Write into `value`, in place."""
    for write in writes:
        rows, positions, columns = write["rows"], write["positions"], write["columns"]
        new: Any = write["value"]
        if write["how"] == "set":
            value[rows, positions, columns] = 0 if new is None else new.to(value.dtype)
        elif write["how"] == "scale":
            value[rows, positions, columns] *= new
        elif write["how"] == "project":
            value[rows, positions, columns] = projected_out(value[rows, positions, columns], new)
        else:
            value[rows, positions, columns] += new.to(value.dtype)
    return value


def projected_out(value: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """`value` without its part along a direction ``(column,)``; worked out in float32 at least."""
    wide = torch.promote_types(value.dtype, torch.float32)
    unit = direction.to(wide) / direction.to(wide).norm()
    full = value.to(wide)
    rest: torch.Tensor = full - (full * unit).sum(-1, keepdim=True) * unit
    return rest.to(value.dtype)


def normed(block: Any, path: str | None, stream: torch.Tensor) -> torch.Tensor:
    """What a norm of a block (None: it has none) makes of the stream, as a tensor of its own, not the stream itself."""
    made = stream if path is None else call_module(block, path, stream)
    return made.clone() if made is stream else made


def after(block: Any, path: str | None, value: torch.Tensor) -> torch.Tensor:
    """`value` after a norm of a block (None: it has none)."""
    return value if path is None else call_module(block, path, value)


def split_last_axis(value: torch.Tensor, *sizes: int) -> torch.Tensor:
    """`value` with its last axis in several, of these sizes."""
    return value.reshape(*value.shape[:-1], *sizes)


def call_module(block: Any, path: str, value: torch.Tensor) -> torch.Tensor:
    """What a module of a block makes of `value` (the first, where it returns several)."""
    made: Any = operator.attrgetter(path)(block)(value)
    first: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return first


def mlp_with_writes(
    model: ModelParts,
    base: Points,
    spec: ResolvedPass,
    layer: int,
    mid: torch.Tensor | None,
    keep: dict[WriteSite, Any],
) -> torch.Tensor | None:
    """What the MLP of a layer makes of the rows at work, and of those that join in it; by its parts where needed.

    Parameters
    ----------
    model, base, spec, layer, keep
        As for the block of a planned pass.
    mid : tensor (row, position, d_model), optional
        The stream that enters it; None where no row is at work.

    Returns
    -------
    tensor (row, position, d_model) or None
        None where no row is at work.
    """
    module, paths, last = model["blocks"][layer], model["paths"], layer == spec["layers"] - 1
    at = spec["out"] if last else slice(spec["start"], spec["stop"])

    def joined(value: torch.Tensor | None, point: str, stage: str) -> Any:
        return append_joining_rows(value, base, (layer, point), at, spec, (layer, stage))

    read = joined(None if mid is None else normed(module, paths.get("norm_2"), mid), "mlp_in", "mlp_in")
    read = apply_writes(read, (layer, "mlp_in"), spec, keep)
    sites = [(layer, point) for point in IN_MLP[1:]]
    if not any([site in spec["joins"] or spec["writes"].get(site) or site in keep for site in sites]):
        return None if read is None else after(module, paths.get("mlp_norm"), call_module(module, paths["mlp"], read))
    pre = joined(None if read is None else call_module(module, paths["pre"], read), "mlp_pre", "mlp_pre")
    pre = apply_writes(pre, (layer, "mlp_pre"), spec, keep)
    post = None if pre is None else call_module(module, paths["act"], pre)
    if model["gated"] and post is not None:
        up = joined(None if read is None else call_module(module, paths["up"], read), "mlp_up", "mlp_pre")
        post = post * up
    post = apply_writes(joined(post, "mlp_post", "mlp_post"), (layer, "mlp_post"), spec, keep)
    return None if post is None else after(module, paths.get("mlp_norm"), call_module(module, paths["down"], post))


def mlp(model: ModelParts, layer: int, mid: torch.Tensor) -> torch.Tensor:
    """What the MLP of a layer makes of the stream that enters it."""
    module, paths = model["blocks"][layer], model["paths"]
    made = call_module(module, paths["mlp"], normed(module, paths.get("norm_2"), mid))
    return after(module, paths.get("mlp_norm"), made)


def points_of_source(cache: RunCache, run: str | None, sites: list[ReadSite]) -> Points:
    """What a run has at sites, ``(example, position, width)``; means over the reference draw, as one example."""
    if run is None:
        return {site: cache["reference"]["alike"][site].mean(dim=0, keepdim=True) for site in sites}
    return {site: cache["sources"][run][site] for site in sites}


def no_tokens(device: Any) -> torch.Tensor:
    """Tokens for a trace that never goes through the model itself."""
    return torch.zeros((1, 1), dtype=torch.long, device=device)
