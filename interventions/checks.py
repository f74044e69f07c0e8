"""What can be refused before any forward pass: sites, edits and positions that the model or the prompts lack. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DeclarationError, UnknownNameError, choices
from .components import Component
from .edits import Edit, check_disjoint
from .lowering import keys_in, positions_in, queries_in
from .paths import AFTER, PathPatch
from .shape import Group, Shape
from .sites import Site
from .steering import Add, Knockout


def check_site(site: Site, model: str, shape: Shape, groups: Sequence[Group]) -> None:
    """Refuse a layer, head or position that the model or the prompts do not have."""
    if site.layer >= shape.layers:
        raise DeclarationError(f"{site}: {model} has layers 0 to {shape.layers - 1}")
    if site.head is not None and site.head >= shape.heads:
        raise DeclarationError(f"{site}: {model} has heads 0 to {shape.heads - 1}")
    for group in groups:
        for position in site.positions or ():
            check_position(position, str(site), group.length)


def check_position(position: int, what: str, length: int) -> None:
    """Refuse a position outside a prompt of `length` tokens."""
    if not -length <= position < length:
        raise DeclarationError(
            f"{what}: position {position} does not exist in a prompt of {length} tokens "
            f"(0 to {length - 1}, or -{length} to -1 from the end)"
        )


def check_edit(edit: Edit, model: str, shape: Shape, groups: Sequence[Group], runs: Sequence[str]) -> None:
    """Refuse an edit whose site, source run or value does not fit."""
    if not (isinstance(edit, PathPatch) and edit.site.layer == AFTER):
        check_site(edit.site, model, shape, groups)
    if edit.run is not None and edit.run not in runs:
        raise UnknownNameError(f"{edit!r}: the task has the runs {choices(runs)}")
    if isinstance(edit, PathPatch):
        check_site(edit.sender, model, shape, groups)
    if isinstance(edit, Add):
        component = edit.site.component
        narrow = component.per_head and component is not Component.head_out
        width = shape.d_head if narrow else shape.d_model
        if len(edit.vector) != width:
            raise DeclarationError(f"{edit!r}: {edit.site} of {model} takes {width} numbers, got {len(edit.vector)}")
    if isinstance(edit, Knockout):
        for group in groups:
            for key in edit.key or ():
                check_position(key, str(edit.site), group.length)


def check_together(edits: Sequence[Edit], groups: Sequence[Group]) -> None:
    """Refuse edits that meet only once positions from the end are counted out, and a query left without any key."""
    if any(position < 0 for edit in edits for position in edit.site.positions or ()):
        for group in groups:
            check_disjoint(edits, [_counted_out(edit.site, group.length) for edit in edits])
    knockouts = [edit for edit in edits if isinstance(edit, Knockout)]
    for group in groups if knockouts else ():
        _check_keys_left(knockouts, group.length)


def _check_keys_left(knockouts: Sequence[Knockout], length: int) -> None:
    gone: dict[tuple[int, int | None, int], set[int]] = {}
    for edit in sorted(knockouts, key=lambda edit: edit.site.head is not None):  # those of all heads first
        layer, head, keys = edit.site.layer, edit.site.head, keys_in(edit, length)
        for query in queries_in(edit, length):
            forbidden = gone.setdefault((layer, head, query), set(gone.get((layer, None, query), ())))
            forbidden.update(keys)
            if len(forbidden) > query and forbidden.issuperset(range(query + 1)):
                raise DeclarationError(
                    f"{edit!r}: query {query} is left without any key to attend to; a query needs one of 0 to {query}"
                )


def _counted_out(site: Site, length: int) -> Site:
    positions = positions_in(site, length)
    return site if positions is None else site.at(positions)
