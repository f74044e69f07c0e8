"""From edits to writes: where in the planned forward pass each edit takes hold, and from which position on. Pure.

The planned pass knows fewer places than there are components, because some are one place under two names:

==============  ==========================================================
component       written as
==============  ==========================================================
``embed``       ``stream`` of layer 0, as the sum of both embeddings (so is ``pos_embed``)
``resid_pre``   ``stream`` of its layer
``resid_post``  ``stream`` of the next layer; of layer ``layers`` at last
``head_out``    ``z``, through which it is linear; an added vector joins ``attn_out``
``resid_mid``   ``mid``
the others      themselves
==============  ==========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..base.shape import Group, Shape
from ..declare.components import Component
from ..declare.edits import Edit
from ..declare.paths import AFTER, PathPatch
from ..declare.sites import Site
from ..declare.steering import Add, Knockout, Scale

STAGES = {
    "stream": 0,
    "q": 1,
    "k": 1,
    "v": 1,
    "q_rot": 1,
    "k_rot": 1,
    "scores": 1,
    "pattern": 1,
    "z": 2,
    "attn_out": 3,
    "mid": 4,
    "mlp_out": 5,
}
"""Place to the stage of a layer at which a row that is first changed there joins the pass."""

BY_QUERY = ("q", "q_rot", "scores", "pattern", "z", "attn_out", "mid", "mlp_out")
"""Places of the last layer that matter at scored positions only."""

OF_KEYS = ("k", "v", "k_rot")
"""Places whose heads are key-value heads."""

HOW: dict[type[Edit], str] = {Add: "add", Scale: "scale", Knockout: "mask", PathPatch: "path"}
"""Kind of edit to how it is written; the others set a value."""

Positions = tuple[int, ...] | None


@dataclass(frozen=True)
class Write:
    """One change of one place in a planned pass.

    Attributes
    ----------
    layer : int
        ``0 .. layers``; the stream of layer ``layers`` is what the final norm reads.
    place : str
        A key of `STAGES`.
    head : int, optional
    positions : tuple of int, optional
        Counted from 0; those that no number depends on are left out. None for all.
    how : {"set", "add", "scale", "mask", "path", "embed"}
        ``path`` is what a path brings; ``embed`` changes one of the embeddings that the stream starts as the sum of.
    edit : Edit
        Where the value comes from.
    """

    layer: int
    place: str
    head: int | None
    positions: Positions
    how: str
    edit: Edit

    @property
    def first(self) -> int:
        """The first position that it changes; causal attention leaves those before as they are."""
        return 0 if self.positions is None else self.positions[0]


def positions_in(site: Site, length: int) -> list[int] | None:
    """The positions of a site in a prompt of `length` tokens, counted from 0; None for all."""
    if site.positions is None:
        return None
    return [position % length for position in site.positions]


def keys_in(edit: Knockout, length: int) -> list[int]:
    """The keys that a knockout forbids in a prompt of `length` tokens, counted from 0."""
    return list(range(length)) if edit.key is None else [key % length for key in edit.key]


def keys_seen(query: int, window: int | None) -> range:
    """The keys that a query sees, where it sees so many back, itself among them; None for all."""
    return range(0 if window is None else max(0, query - window + 1), query + 1)


def queries_in(edit: Knockout, length: int, window: int | None = None) -> list[int]:
    """The queries that a knockout works on: those named, or all that keep a key."""
    named = positions_in(edit.site, length)
    if named is not None:
        return sorted(named)
    keys = {*keys_in(edit, length)}
    return [query for query in range(length) if not keys.issuperset(keys_seen(query, window))]


def last_position(group: Group, reads_patterns: bool) -> int:
    """One past the last position that any number depends on."""
    return group.length if reads_patterns or not group.scored else max(group.scored) + 1


def lower(edits: Sequence[Edit], shape: Shape, group: Group, reads_patterns: bool = False) -> tuple[Write, ...]:
    """The writes of a condition in forward order; none where no number depends on it."""
    made = []
    for edit in sorted(edits, key=lambda edit: edit.site.order):
        if isinstance(edit, Knockout):
            positions: list[int] | None = queries_in(edit, group.length, shape.window(edit.site.layer))
        else:
            positions = positions_in(edit.site, group.length)
        write = _place(edit, shape, positions)
        if isinstance(edit, PathPatch) and (len(edits) == 1 or edit.site.layer == AFTER):
            write = _on_path(write, edit, group.length)
        kept = _that_matter(write, shape, group, reads_patterns)
        if kept is not None:
            made.append(kept)
    return tuple(made)


def _place(edit: Edit, shape: Shape, positions: list[int] | None) -> Write:
    site = edit.site
    where = None if positions is None else tuple(sorted(positions))
    how = HOW.get(type(edit), "set")
    component, layer, place = site.component, site.layer, str(site.component)
    if component.embedding:
        place, how = "stream", "embed"
    elif component is Component.resid_pre:
        place = "stream"
    elif component is Component.resid_post:
        place, layer = "stream", min(layer + 1, shape.layers)
    elif component is Component.resid_mid:
        place = "mid"
    elif component is Component.head_out:
        place = "attn_out" if how == "add" else "z"
    elif how == "mask":
        place = "scores"
    return Write(layer, place, None if place == "attn_out" else site.head, where, how, edit)


def _on_path(write: Write, edit: PathPatch, length: int) -> Write:
    """A path alone changes its receiver only where its sender changes: what lies between works position by position.

    Beside other edits, the receiver keeps what it would be in the base run at the other positions too.
    """
    sent = positions_in(edit.sender, length)
    if sent is None:
        return write
    both = tuple(sorted(sent if write.positions is None else {*sent} & {*write.positions}))
    return Write(write.layer, write.place, write.head, both, write.how, write.edit)


def _that_matter(write: Write, shape: Shape, group: Group, reads_patterns: bool) -> Write | None:
    if reads_patterns or write.positions is None:
        return write if write.positions is None or write.positions else None
    at_end = write.layer == shape.layers or (write.layer == shape.layers - 1 and write.place in BY_QUERY)
    scored = {*group.scored}
    stop = last_position(group, False)
    kept = tuple(at for at in write.positions if (at in scored if at_end else at < stop))
    return Write(write.layer, write.place, write.head, kept, write.how, write.edit) if kept else None
