"""From edits to writes: where in the planned forward pass each edit takes hold, how, and what it puts in. Pure.

A kind of edit says itself what it does (`Edit.change`); all later code reads `Write.how` and `Write.value`.

The planned pass writes at fewer points than there are components, because some components are one point:

==============  ==========================================================
component       written at the point
==============  ==========================================================
``embed``       ``stream`` of layer 0, as the sum of both embeddings (so is ``pos_embed``)
``resid_pre``   ``stream`` of its layer
``resid_post``  ``stream`` of the next layer; of layer ``layers`` at last
``head_out``    ``z``, through which it is linear; an added vector joins ``attn_out``, or where a norm follows
                ``heads``, what is before it
``resid_mid``   ``mid``
the others      themselves
==============  ==========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...errors import DeclarationError
from ..base.shape import Group, Shape
from ..declare.changes import FromRun, How
from ..declare.circuits import Circuit
from ..declare.components import Component
from ..declare.edits import Edit
from ..declare.paths import AFTER, PathPatch
from ..declare.sites import Site
from ..declare.steering import Knockout

STAGES = ("stream", "attn_in", "qkv", "z", "attn_out", "mid", "mlp_in", "mlp_pre", "mlp_post", "mlp_out")
"""The stages of a layer, in forward order: places at which rows join a pass."""

STREAM, ATTN_IN, QKV, Z, ATTN_OUT, MID, MLP_IN, MLP_PRE, MLP_POST, MLP_OUT = range(len(STAGES))

JOIN_STAGES = {
    "stream": STREAM,
    "attn_in": ATTN_IN,
    "q": QKV,
    "k": QKV,
    "v": QKV,
    "q_rot": QKV,
    "k_rot": QKV,
    "scores": QKV,
    "pattern": QKV,
    "z": Z,
    "heads": Z,
    "attn_out": ATTN_OUT,
    "mid": MID,
    "mlp_in": MLP_IN,
    "mlp_pre": MLP_PRE,
    "mlp_post": MLP_POST,
    "mlp_out": MLP_OUT,
}
"""Point to the stage of a layer at which a row that is first changed there joins the pass."""

BY_QUERY = (
    *("q", "q_rot", "scores", "pattern", "z", "heads", "attn_out", "mid"),
    *("mlp_in", "mlp_pre", "mlp_post", "mlp_out"),
)
"""Points of the last layer that matter at scored positions only."""

IN_MLP = ("mlp_in", "mlp_pre", "mlp_post")
"""Points in an MLP."""

OF_KEYS = ("k", "v", "k_rot")
"""Points whose heads are key-value heads."""

Positions = tuple[int, ...] | None


@dataclass(frozen=True)
class Keys:
    """Positions of the keys that queries may not attend to, counted from 0."""

    positions: tuple[int, ...]


Value = FromRun | PathPatch | Circuit | Keys | tuple[float, ...] | float | None
"""What is written: values of a run, what a path or circuit brings, masked keys, a vector, a factor, or zeros (None)."""


class Join(NamedTuple):
    """Where a condition joins a pass: before this stage of this layer its rows are those of the base run."""

    layer: int
    stage: int


@dataclass(frozen=True)
class Write:
    """One change at one point of a planned pass.

    Attributes
    ----------
    layer : int
        ``0 .. layers``; the stream of layer ``layers`` is what the final norm reads.
    point : str
        A key of `JOIN_STAGES`.
    part : int, optional
        A head or a neuron; None for all.
    positions : tuple of int, optional
        Counted from 0; those that no number depends on are left out. None for all.
    how : How
    value : Value
    edit : Edit
        What was declared.
    """

    layer: int
    point: str
    part: int | None
    positions: Positions
    how: How
    value: Value
    edit: Edit

    @property
    def first(self) -> int:
        """The first position that it changes; causal attention leaves those before as they are."""
        return 0 if self.positions is None else self.positions[0]

    @property
    def join(self) -> Join:
        """Where a condition joins the pass if this is the first thing that it changes."""
        return Join(self.layer, JOIN_STAGES[self.point])

    @property
    def embedding(self) -> str | None:
        """The embedding that is changed, where the stream is written as the sum of its embeddings."""
        component = self.edit.site.component
        return str(component) if component.embedding else None


def positions_in(site: Site, group: Group) -> list[int] | None:
    """The positions of a site in the prompts of a group, counted from 0; None for all."""
    return None if site.positions is None else group.count_out(site.positions)


def keys_in(edit: Knockout, group: Group) -> list[int]:
    """The keys that a knockout forbids in the prompts of a group, counted from 0."""
    return list(range(group.length)) if edit.key is None else group.count_out(edit.key)


def keys_seen(query: int, window: int | None) -> range:
    """The keys that a query sees, where it sees so many back, itself among them; None for all."""
    return range(0 if window is None else max(0, query - window + 1), query + 1)


def queries_in(edit: Knockout, group: Group, window: int | None = None) -> list[int]:
    """The queries that a knockout works on: those named, or all that keep a key."""
    named = positions_in(edit.site, group)
    if named is not None:
        return sorted(named)
    keys = {*keys_in(edit, group)}
    return [query for query in range(group.length) if not keys.issuperset(keys_seen(query, window))]


def last_position(group: Group, every: bool) -> int:
    """One past the last position that any number depends on; the end where `every` one is computed."""
    return group.length if every or not group.scored else max(group.scored) + 1


def writes_of(edits: Sequence[Edit], shape: Shape, group: Group, reads_patterns: bool = False) -> tuple[Write, ...]:
    """Make the writes of a condition, in forward order; none where no number depends on it.

    Parameters
    ----------
    edits : sequence of Edit
        One condition.
    shape : Shape
    group : Group
        The examples.
    reads_patterns : bool
        Whether attention patterns are read, at every position.

    Returns
    -------
    tuple of Write

    Raises
    ------
    DeclarationError
        The site of an edit is at no point that passes write at.
    """
    made = []
    for edit in sorted(edits, key=lambda edit: edit.site.order):
        if isinstance(edit, Knockout):
            positions: list[int] | None = queries_in(edit, group, shape.window(edit.site.layer))
        else:
            positions = positions_in(edit.site, group)
        write = _write(edit, shape, group, positions)
        if isinstance(edit, PathPatch) and (len(edits) == 1 or edit.site.layer == AFTER):
            write = _on_path(write, edit, group)
        kept = _where_read(write, shape, group, reads_patterns)
        if kept is not None:
            made.append(kept)
    return tuple(made)


def alike_in_groups(edits: Sequence[Edit]) -> bool:
    """Whether the writes of a condition are the same whatever the lengths of prompts and the scored positions are."""
    return not any(
        edit.site.positions is not None
        or isinstance(edit, Knockout)
        or (isinstance(edit, PathPatch) and edit.sender.positions is not None)
        for edit in edits
    )


def _value(edit: Edit, value: Value, group: Group) -> Value:
    """What a write puts in, for the prompts of a group, where the change that was declared has `value`."""
    if isinstance(edit, PathPatch | Circuit):
        return edit
    return Keys(tuple(keys_in(edit, group))) if isinstance(edit, Knockout) else value


def _write(edit: Edit, shape: Shape, group: Group, positions: list[int] | None) -> Write:
    site = edit.site
    how, value = edit.change()
    component, layer, point = site.component, site.layer, str(site.component)
    if component.embedding or component is Component.resid_pre:
        point = "stream"
    elif component is Component.resid_post:
        point, layer = "stream", min(layer + 1, shape.layers)
    elif component is Component.resid_mid:
        point = "mid"
    elif component is Component.head_out:
        added = "heads" if shape.normed_after else "attn_out"
        point = added if how is How.ADD else "z"
    elif how is How.MASK:
        point = "scores"
    if point not in JOIN_STAGES:
        raise DeclarationError(f"{edit!r}: {component} can be read, and no pass writes to it")
    part = None if point in ("heads", "attn_out") else site.part
    return Write(
        layer,
        point,
        part,
        None if positions is None else tuple(sorted(positions)),
        how,
        _value(edit, value, group),
        edit,
    )


def _on_path(write: Write, edit: PathPatch, group: Group) -> Write:
    """A path alone changes its receiver only where its sender changes: what lies between works position by position.

    Beside other edits, the receiver keeps what it would be in the base run at the other positions too.
    """
    sender_positions = positions_in(edit.sender, group)
    if sender_positions is None:
        return write
    both = tuple(sorted(sender_positions if write.positions is None else {*sender_positions} & {*write.positions}))
    return replace(write, positions=both)


def _where_read(write: Write, shape: Shape, group: Group, reads_patterns: bool) -> Write | None:
    """A write at the positions that some number depends on; None where there is none."""
    if reads_patterns or write.positions is None:
        return write if write.positions is None or write.positions else None
    at_end = write.layer == shape.layers or (write.layer == shape.layers - 1 and write.point in BY_QUERY)
    scored = {*group.scored}
    stop = last_position(group, shape.called)
    kept = tuple(at for at in write.positions if (at in scored if at_end else at < stop))
    return replace(write, positions=kept) if kept else None
