"""What is read in the passes of a plan: where a site is found in a pass, what it still sees, how large it is. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ...errors import DeclarationError
from ..base.shape import Group, Shape
from ..declare.components import Component
from ..declare.sites import Logits, Site
from .cost import BYTES
from .writes import IN_MLP, JOIN_STAGES, QKV, STREAM, Join, Write

Read = Site | Logits
"""What can be read."""


@dataclass(frozen=True)
class Inside:
    """What passes make of the sites that they read, at the scored positions, and give instead of their values.

    Attributes
    ----------
    kind : {"shares", "stream", "heads"}
        Direct attribution; or the logit lens of the stream or of heads, by the metrics of the plan.
    sizes : mapping of str to tuple of int
        Of each value of a row, before its scored positions.
    asked : tuple
        For each group, a `DirectSpec` without tokens; left empty by the lens.
    """

    kind: str
    sizes: Mapping[str, tuple[int, ...]]
    asked: tuple[Any, ...] = ()


IN_ATTENTION = ("q", "k", "v", "q_rot", "k_rot", "pattern")
"""Points that no row has which joins a pass beside them."""


def name_of(number: int) -> str:
    """The name of the values of the `number`-th site that is read."""
    return f"site{number}"


def own_point(read: Read, shape: Shape) -> tuple[int, str]:
    """Layer and point of the model's own forward pass where a site is found; of logits, what the final norm reads."""
    if isinstance(read, Logits):
        return shape.layers - 1, "resid_post"
    return read.layer, read.component.point


def planned_point(read: Read, shape: Shape) -> tuple[int, str] | None:
    """Layer and point of a planned pass where a site is found; None for embeddings, which no pass makes."""
    if isinstance(read, Logits):
        return shape.layers, "stream"
    same = {Component.resid_pre: "stream", Component.resid_mid: "mid"}
    if read.component is Component.resid_post:
        return read.layer + 1, "stream"
    return None if read.component.embedding else (read.layer, same.get(read.component, str(read.component)))


def seen_until(reads: Sequence[Read], shape: Shape) -> Join:
    """The last place at which a write changes what is read."""
    return max(_last(read, shape) for read in reads)


def _last(read: Read, shape: Shape) -> Join:
    at = planned_point(read, shape)
    if at is None:
        return Join(0, STREAM)
    point = "attn_out" if at[1] == "head_out" else at[1]  # where a vector is added
    if point not in JOIN_STAGES:
        raise DeclarationError(f"{read}: planned passes do not have it: capture it in memory, without interventions")
    return Join(at[0], JOIN_STAGES[point])


def blocks_run(reads: Sequence[Read], shape: Shape) -> int:
    """How many blocks passes go through: all, unless sites are read and nothing more."""
    if not reads:
        return shape.layers
    layer, stage = seen_until(reads, shape)
    return layer + (stage > STREAM)


def joins_whole(reads: Sequence[Read], shape: Shape, layer: int, stage: int) -> bool:
    """Whether what is read is made here, so that conditions have to join at the stream of the layer, and not here.

    Parameters
    ----------
    reads : sequence of Site or Logits
    shape : Shape
    layer, stage : int
        Where a condition would join.

    Returns
    -------
    bool
    """
    found = [at for at in (planned_point(read, shape) for read in reads) if at is not None]
    points = {point for where, point in found if where == layer}
    beside_attention = shape.parallel and JOIN_STAGES["mlp_in"] <= stage <= JOIN_STAGES["mlp_post"]
    return (stage == QKV and not points.isdisjoint(IN_ATTENTION)) or (
        beside_attention and not points.isdisjoint(IN_MLP)
    )


def writes_seen(writes: Sequence[Write], reads: Sequence[Read], shape: Shape) -> tuple[Write, ...]:
    """The writes that change what is read, or may."""
    return tuple(write for write in writes if not reads or write.join <= seen_until(reads, shape))


def positions_read(read: Read, group: Group) -> list[int] | None:
    """The positions of a site in the prompts of a group, counted from 0, in the order in which they were named."""
    return None if read.positions is None else group.count_out(read.positions)


def positions_needed(reads: Sequence[Read], group: Group) -> tuple[int, ...]:
    """The positions of a group that are read; all, where a site does not name any."""
    named = [positions_read(read, group) for read in reads]
    every = set(range(group.length)) if any(one is None for one in named) else {at for one in named for at in one or ()}
    return tuple(sorted(every))


def dims_of(read: Read, shape: Shape) -> tuple[str, ...]:
    """The dims of a site, after the example."""
    if isinstance(read, Logits):
        return ("position", "token")
    component = read.component
    shared = component.of_keys and shape.kv_heads < shape.heads
    head = () if read.head is not None else ("kv_head" if shared else "head",)
    if component is Component.pattern:
        return (*head, "query", "key")
    if component.per_neuron:
        return ("position", *(("neuron",) if read.neuron is None else ()))
    if not component.per_head:
        return ("position", "d_model")
    return ("position", *head, "d_model" if component is Component.head_out else "d_head")


def size_of(read: Read, shape: Shape, length: int, positions: int | None = None) -> tuple[int, ...]:
    """The sizes of a site, after the example, in prompts of a length; at so many positions, all where left out.

    Parameters
    ----------
    read : Site or Logits
    shape : Shape
    length : int
        Tokens of a prompt.
    positions : int, optional
        How many are read.

    Returns
    -------
    tuple of int
        One for each of `dims_of`.
    """
    some = length if positions is None else positions
    tokens = shape.vocabulary if not isinstance(read, Logits) or read.tokens is None else len(read.tokens)
    sizes = {
        "position": some,
        "query": some,
        "key": length,
        "head": shape.heads,
        "kv_head": shape.kv_heads,
        "d_head": shape.d_head,
        "d_model": shape.d_model,
        "neuron": shape.d_mlp,
        "token": tokens,
    }
    return tuple(sizes[dim] for dim in dims_of(read, shape))


def sizes_in(reads: Sequence[Read], shape: Shape, group: Group) -> dict[str, tuple[int, ...]]:
    """The sizes of what is read of each prompt of a group, by name."""
    named = [positions_read(read, group) for read in reads]
    return {
        name_of(number): size_of(read, shape, group.length, None if at is None else len(at))
        for number, (read, at) in enumerate(zip(reads, named, strict=True))
    }


def read_bytes(reads: Sequence[Read], shape: Shape, group: Group) -> int:
    """Bytes of what is read of one row, with what it is made of (float32)."""
    return 2 * BYTES * sum(map(prod, sizes_in(reads, shape, group).values()))


def sizes_of_logits(reads: Sequence[Read], shape: Shape, group: Group) -> list[tuple[int, ...]]:
    """Positions and tokens of each site of logits."""
    sizes = sizes_in(reads, shape, group)
    return [sizes[name_of(number)] for number, read in enumerate(reads) if isinstance(read, Logits)]
