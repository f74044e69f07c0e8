"""What runs inside a trace of the model's own forward pass: reading and replacing. Imports torch and its parts.

Plain functions of tensors, numbers, slices and handles: nothing here may need this package where it runs.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from .attention import hidden_keys, soft_capped, weights_of_scores
from .projections import head_by_head, rotary_angles, rotated_sides, side_by_side

if TYPE_CHECKING:
    from .specs import Kernel, ModelParts, Points, ReadSite, RowChange


def columns(component: str, part: int | None, heads: int, d_head: int, kv_heads: int) -> slice:
    """Columns of a component (of one head or neuron, or of all) in the last axis of the tensor at its point.

    Parameters
    ----------
    component : str
    part : int, optional
        A head, of ``k v k_rot`` a key-value head, or a neuron; all where left out.
    heads, d_head, kv_heads : int
        Counts of the model.

    Returns
    -------
    slice
        All columns where the component has no heads or neurons.
    """
    if component in ("mlp_pre", "mlp_post") and part is not None:
        return slice(part, part + 1)
    count = kv_heads if component in ("k", "v", "k_rot") else heads
    start = {"k": heads, "k_rot": heads, "v": heads + kv_heads}.get(component, 0) * d_head
    if component not in ("q", "k", "v", "q_rot", "k_rot", "z", "head_out"):
        return slice(None)
    if part is None:
        return slice(start, start + count * d_head)
    return slice(start + part * d_head, start + (part + 1) * d_head)


def split_heads(value: torch.Tensor, heads: int) -> torch.Tensor:
    """``(example, position, head * width)`` as ``(example, position, head, width)``."""
    return value.reshape(*value.shape[:-1], heads, -1)


def attention_pattern(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention weights, whatever implementation of attention the model itself uses.

    Parameters
    ----------
    q : tensor (example, position, head, d_head)
    k : tensor (example, position, key-value head, d_head)
        May have fewer heads, each of which as many neighbouring heads of q read.
    scaling : float
        What scores are multiplied by.
    window : int, optional
        How many keys back a query sees, itself among them.
    cap : float, optional
        What scores are soft-capped at.
    sinks : tensor (example, position, head), optional
        What stands beside the scores of each query.

    Returns
    -------
    tensor (example, head, query, key)
        At least float32. Weights of a query sum to 1, with sinks to less.
    """
    k = k if k.shape[2] == q.shape[2] else k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("eqhd,ekhd->ehqk", q.to(wide), k.to(wide)) * scaling
    hidden = hidden_keys(torch.arange(q.shape[1], device=q.device), k.shape[1], window)
    beside = None if sinks is None else sinks.transpose(1, 2).unsqueeze(-1)
    return weights_of_scores(soft_capped(scores, cap).masked_fill_(hidden, float("-inf")), beside)


def pattern_at(model: ModelParts, layer: int, rotated: torch.Tensor) -> torch.Tensor:
    """Attention weights of all heads of a layer from rotated q and k side by side."""
    sinks, size = None, (model["heads"] + model["kv_heads"]) * model["d_head"]
    if "sinks" in model["paths"]:
        rotated, sinks = rotated[..., :size], rotated[..., size:]
    both = split_heads(rotated, model["heads"] + model["kv_heads"])
    q, k = both[:, :, : model["heads"]], both[:, :, model["heads"] :]
    return attention_pattern(q, k, model["scalings"][layer], model["windows"][layer], model["cap"], sinks)


def read_side(root: Any, path: str, side: str) -> torch.Tensor:
    """The value at a side of a module (the first, where a module returns several)."""
    module = operator.attrgetter(path)(root) if path else root
    if side == "weights":
        weights: torch.Tensor = module.output[1]
        return weights
    value: Any = module.input if side == "input" else module.output
    first: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return first


def replace_side(root: Any, path: str, side: str, value: torch.Tensor) -> None:
    """Replace the value at a side of a module.

    Parameters
    ----------
    root : nnsight handle
    path : str
        Of the module, from the handle on; empty for the handle's own.
    side : {"input", "output"}
    value : tensor
    """
    module = operator.attrgetter(path)(root) if path else root
    if side == "input":
        module.input = value
        return
    before = module.output
    module.output = (value, *before[1:]) if isinstance(before, tuple) else value


def add_to_rows(value: torch.Tensor, changes: list[RowChange]) -> torch.Tensor:
    """A copy of `value` with a change added to each of some rows."""
    changed = value.clone()
    for one in changes:
        changed[one["row"]] += one["change"].to(changed.dtype)
    return changed


def pattern_between(
    rotated: torch.Tensor,
    q: slice,
    k: slice,
    d_head: int,
    scaling: float,
    window: int | None,
    cap: float | None,
    sinks: slice | None,
) -> torch.Tensor:
    """Attention weights of some heads.

    Parameters
    ----------
    rotated : tensor (example, position, width)
        Rotated q and k of all heads side by side, and sinks, where there are any; of blocks that are called the weights
        of all heads themselves.
    q, k : slice
        Columns of the heads.
    d_head : int
    scaling : float
        What scores are multiplied by.
    window : int, optional
        How many keys back a query sees, itself among them.
    cap : float, optional
        What scores are soft-capped at.
    sinks : slice, optional
        Columns of the sinks of the heads.

    Returns
    -------
    tensor (example, head, query, key)
    """
    if rotated.dim() == 4:
        wide = torch.promote_types(rotated.dtype, torch.float32)
        return rotated[:, q.start // d_head : q.stop // d_head].to(wide)
    queries, keys = (split_heads(rotated[..., at], rotated[..., at].shape[-1] // d_head) for at in (q, k))
    beside = None if sinks is None else rotated[..., sinks]
    return attention_pattern(queries, keys, scaling, window, cap, beside)


def read_point(
    model: ModelParts, block: Any, point: str, parts: list[tuple[str, str]], changes: list[RowChange], rows: int = 0
) -> torch.Tensor:
    """What is at a point of a block, q, k and v side by side; with changes, if any, added to some rows there.

    Parameters
    ----------
    model : ModelParts
    block : nnsight handle
    point : str
    parts : list of (path, side)
        Where the point is found.
    changes : list of RowChange
    rows : int
        Of the pass, where positions of all rows may lie one after the other.

    Returns
    -------
    tensor (row, position, width)
    """
    if model["called"]:
        return read_called(model, block, point, parts, changes, rows)
    by_head = point == "qkv" and model["layout"] == "by head"
    found, first = [], 0
    for path, side in parts:
        value = read_side(block, path, side)
        value = side_by_side(value, model["heads"]) if by_head else value
        if changes:
            last = first + value.shape[-1]
            value = add_to_rows(value, [{**one, "change": one["change"][..., first:last]} for one in changes])
            replace_side(block, path, side, head_by_head(value, model["heads"]) if by_head else value)
            first = last
        found.append(value)
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def read_called(
    model: ModelParts, block: Any, point: str, parts: list[tuple[str, str]], changes: list[RowChange], rows: int
) -> torch.Tensor:
    """`read_point` of a block that is called.

    Parameters
    ----------
    model : ModelParts
    block : nnsight handle
    point : str
    parts : list of (str, str)
        Paths of modules in the block, and a side of each.
    changes : list of RowChange
        What is added there.
    rows : int

    Returns
    -------
    tensor (row, position, width)
        What the parts have, side by side.
    """
    found, first = [], 0
    for path, side in parts:
        value = value_at_side(model, block, point, path, side, rows)
        if changes:
            last = first + value.shape[-1]
            value = add_to_rows(value, [{**one, "change": one["change"][..., first:last]} for one in changes])
            put_at_side(model, block, point, path, side, value)
            first = last
        found.append(value)
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def value_at_side(model: ModelParts, block: Any, point: str, path: str, side: str, rows: int) -> torch.Tensor:
    """What is at a side of a module of a block that is called, as it stands in for a point.

    Parameters
    ----------
    model : ModelParts
    block : nnsight handle
    point : str
    path, side : str
    rows : int
        Of the pass, as positions of all rows may lie one after the other there.

    Returns
    -------
    tensor (row, position, width)
        q, k and v that one module gives are side by side; what the stream gets has the factor that it gets there.
    """
    value = read_side(block, path, side)
    value = value.reshape(rows, -1, value.shape[-1]) if value.dim() == 2 else value
    value = side_by_side(value, model["heads"], model["kv_heads"]) if is_by_head(model, point) else value
    return value * model["factors"][point] if point in model["factors"] else value


def put_at_side(model: ModelParts, block: Any, point: str, path: str, side: str, value: torch.Tensor) -> None:
    """Replace what is at a side of a module of a block that is called, and was read just before.

    Parameters
    ----------
    model : ModelParts
    block : nnsight handle
    point : str
    path, side : str
    value : tensor (row, position, width)
        As `value_at_side` gives it.
    """
    value = value / model["factors"][point] if point in model["factors"] else value
    value = head_by_head(value, model["heads"], model["kv_heads"]) if is_by_head(model, point) else value
    replace_side(block, path, side, value.reshape(read_side(block, path, side).shape))


def is_by_head(model: ModelParts, point: str) -> bool:
    """Whether one module gives q, k and v there, head after head."""
    return point == "qkv" and model["layout"] == "by head"


def read_activations(
    root: Any,
    model: ModelParts,
    layers: int,
    reads: set[ReadSite],
    kernels: list[Kernel],
    writes: dict[ReadSite, list[RowChange]],
) -> tuple[Points, dict[str, torch.Tensor]]:
    """Go through the model in forward order, reading and (for checks) adding.

    Parameters
    ----------
    root : nnsight handle of the model
    model : ModelParts
    layers : int
    reads : set of ReadSite
        A point is an embedding, one of ``model["points"]``, or ``rotated``: q and k side by side as scores are made
        from them.
    kernels : list of Kernel
        Of attention patterns: ``function(pattern, **arguments) -> (row, head)``.
    writes : dict
        A ReadSite to a list of RowChange; not ``resid_mid``, which no module's output is.

    Returns
    -------
    taken : Points
        The tensors there, after any writes.
    attended : dict
        Kernel name to ``(row, layer, head)``.
    """
    taken: Points = {}
    attended: dict[str, list[torch.Tensor]] = {kernel["name"]: [] for kernel in kernels}
    angles = None
    for name, path in model["embeddings"]:
        if (0, name) in reads:
            taken[(0, name)] = read_side(root, path, "output")
    rows = len(model["blocks"][0].input) if model["called"] and layers else 0
    for layer in range(layers):
        for point, parts in model["points"]:
            site = (layer, point)
            rotates = point == ("rotated" if model["called"] else "qkv") and (kernels or (layer, "rotated") in reads)
            if not (site in writes or site in reads or rotates):
                continue
            value = read_point(model, model["blocks"][layer], point, parts, writes.get(site, []), rows)
            if site in reads:
                taken[site] = value.clone() if model["called"] else value  # its own blocks may add to it in place
            if rotates and not model["called"]:
                angles = rotary_angles(model, value, value.shape[1]) if angles is None else angles
                rotated = rotated_sides(model, angles[layer], model["blocks"][layer], value)
                if (layer, "rotated") in reads:
                    taken[(layer, "rotated")] = rotated
            if rotates and kernels:
                pattern = value if model["called"] else pattern_at(model, layer, rotated)
                for kernel in kernels:
                    attended[kernel["name"]].append(kernel["function"](pattern, **kernel["arguments"]))
    return taken, {name: torch.stack(values, dim=1) for name, values in attended.items()}
