"""What can be refused before any forward pass: sites, edits and positions that the model or the prompts lack. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...errors import DeclarationError, UnknownNameError, choices
from ..base.shape import Group, Shape
from ..declare.circuits import CORRUPTED, Circuit
from ..declare.components import Component
from ..declare.edits import Edit, check_disjoint
from ..declare.graph import Graph
from ..declare.paths import AFTER, PathPatch
from ..declare.sites import Logits, Place, Site
from ..declare.steering import Knockout
from .writes import keys_in, keys_seen, positions_in, queries_in

GIVE_CORRUPTED = (
    "give the task a corrupted run, as in Prompts(..., corrupted=[...]): for each prompt, another one of as many tokens"
)
"""How a task of one's own gets the run that most comparisons are with."""


def check_site(site: Site, model: str, shape: Shape, groups: Sequence[Group]) -> None:
    """Refuse a layer, head or position that the model or the prompts do not have.

    Parameters
    ----------
    site : Site
    model : str
        Name, for messages.
    shape : Shape
    groups : sequence of Group

    Raises
    ------
    DeclarationError
        The text says what the model or the prompts have.
    """
    if site.layer >= shape.layers:
        raise DeclarationError(f"{site}: {model} has layers 0 to {shape.layers - 1}")
    missing = shape.missing(site.component)
    if missing:
        raise DeclarationError(f"{site}: {model} has no {site.component}: {missing}")
    if site.head is not None and site.head >= (shape.kv_heads if site.component.of_keys else shape.heads):
        raise DeclarationError(f"{site}: {model} has {_heads(site, shape)}")
    if site.neuron is not None and site.neuron >= shape.d_mlp:
        raise DeclarationError(f"{site}: {model} has neurons 0 to {shape.d_mlp - 1}")
    for group in groups if site.positions else ():
        check_places(site.positions or (), str(site), group)


def check_read(read: Site | Logits, model: str, shape: Shape, group: Group) -> None:
    """Refuse to read what the model or the prompts of a group do not have.

    Parameters
    ----------
    read : Site or Logits
    model : str
        Name, for messages.
    shape : Shape
    group : Group

    Raises
    ------
    DeclarationError, UnknownNameError
        The text says what the model or the prompts have.
    """
    if isinstance(read, Site):
        check_site(read, model, shape, [group])
        return
    check_places(read.positions or (), str(read), group)


def _heads(site: Site, shape: Shape) -> str:
    """The heads that a site may name, in words."""
    if not site.component.of_keys or shape.kv_heads == shape.heads:
        return f"heads 0 to {shape.heads - 1}"
    known = f"key-value heads 0 to {shape.kv_heads - 1}" if shape.kv_heads > 1 else "key-value head 0 only"
    if site.head is None or site.head >= shape.heads:
        return known
    own = shape.key_head(site.head)
    readers = shape.readers(own)
    return f"{known}; heads {choices(map(str, readers))} read key-value head {own}"


def check_places(places: Iterable[Place], what: str, group: Group) -> None:
    """Refuse a position outside the prompts of a group, and a label that they do not have."""
    length, labels = group.prompt, [label for label, _ in group.labels]
    for place in places:
        if isinstance(place, str):
            if place not in labels:
                known = f"the labels {choices(labels)}" if labels else "no labels: give Prompts(..., labels={'S2': 4})"
                raise UnknownNameError(f"{what}: no position has the label {place!r}; the task has {known}")
        elif not -length <= place < length:
            raise DeclarationError(
                f"{what}: position {place} does not exist in a prompt of {length} tokens "
                f"(0 to {length - 1}, or -{length} to -1 from the end)"
            )


def how_to_have(run: str) -> str:
    """What an error adds on how a task gets a run that it lacks; nothing of runs that have no usual name."""
    return f"; {GIVE_CORRUPTED}" if run == CORRUPTED else ""


def check_edit(edit: Edit, model: str, shape: Shape, groups: Sequence[Group], runs: Sequence[str]) -> None:
    """Refuse an edit whose site, source run or value does not fit.

    Parameters
    ----------
    edit : Edit
    model : str
        Name, for messages.
    shape : Shape
    groups : sequence of Group
    runs : sequence of str
        That the task has.

    Raises
    ------
    DeclarationError, UnknownNameError
        The text says what is possible.
    """
    if isinstance(edit, Circuit):
        for group in groups:
            check_places(edit.positions or (), f"{edit!r}", group)
        if shape.called:
            raise DeclarationError(f"{edit!r}: edges join parts of blocks, and those of {model} are called whole")
        Graph.of(shape).check(edit)
    if not (isinstance(edit, PathPatch) and edit.site.layer == AFTER):
        check_site(edit.site, model, shape, groups)
        if why := dict(shape.read_only).get(str(edit.site.component)):
            raise DeclarationError(f"{edit!r}: {edit.site.component} of {model} can be read, and not written: {why}")
    if edit.run is not None and edit.run not in runs:
        raise UnknownNameError(f"{edit!r}: the task has the runs {choices(runs)}{how_to_have(edit.run)}")
    if isinstance(edit, PathPatch):
        if shape.called:
            raise DeclarationError(f"{edit!r}: paths go through parts of blocks, and those of {model} are called whole")
        check_site(edit.sender, model, shape, groups)
        if shape.parallel and edit.site.component is Component.mlp_in and edit.site.layer == edit.after:
            raise DeclarationError(
                f"{edit!r}: no direct path from {edit.sender} to {edit.site}: attention and MLP of a layer of {model} "
                "both read resid_pre"
            )
    vector = edit.change().value
    if isinstance(vector, tuple):
        width = _width(edit.site, shape)
        if len(vector) != width:
            takes = "one number" if width == 1 else f"{width} numbers"
            raise DeclarationError(f"{edit!r}: {edit.site} of {model} takes {takes}, got {len(vector)}")
    if isinstance(edit, Knockout):
        for group in groups:
            check_places(edit.key or (), f"{edit!r}", group)


def _width(site: Site, shape: Shape) -> int:
    """How many numbers a vector has that is written to each position of a site."""
    component = site.component
    if component.per_neuron:
        return shape.d_mlp if site.neuron is None else 1
    return shape.d_head if component.per_head and component is not Component.head_out else shape.d_model


def check_condition(edits: Sequence[Edit], shape: Shape, groups: Sequence[Group]) -> None:
    """Refuse edits that meet once labels and positions from the end are counted from 0, and a query without any key."""
    if any(isinstance(place, str) or place < 0 for edit in edits for place in edit.site.positions or ()):
        for group in groups:
            check_disjoint(edits, [_from_start(edit.site, group) for edit in edits])
    knockouts = [edit for edit in edits if isinstance(edit, Knockout)]
    for group in groups if knockouts else ():
        _check_keys_left(knockouts, shape, group)


BESIDE_CIRCUITS = (
    *(Component.q, Component.k, Component.v, Component.q_rot, Component.k_rot, Component.pattern, Component.z),
    *(Component.mlp_in, Component.mlp_pre, Component.mlp_post, Component.mlp_out),
)
"""What can be changed or read beside a circuit."""


def check_beside(edits: Sequence[Edit], reads: Sequence[Site | Logits]) -> None:
    """Refuse to change or read, beside a circuit, what its receivers do not share."""
    circuit = next((edit for edit in edits if isinstance(edit, Circuit)), None)
    if circuit is None:
        return
    why = f"each receiver of a circuit reads a stream of its own: possible beside it are {choices(BESIDE_CIRCUITS)}"
    for edit in edits:
        if isinstance(edit, PathPatch) or not (isinstance(edit, Circuit) or edit.site.component in BESIDE_CIRCUITS):
            raise DeclarationError(f"{edit!r} beside {circuit!r}: {why}, and no paths")
    for read in reads:
        if isinstance(read, Site) and read.component not in BESIDE_CIRCUITS:
            raise DeclarationError(f"{read} under {circuit!r}: {why}, and the logits")


def _check_keys_left(knockouts: Sequence[Knockout], shape: Shape, group: Group) -> None:
    gone: dict[tuple[int, int | None, int], set[int]] = {}
    for edit in sorted(knockouts, key=lambda edit: edit.site.head is not None):  # those of all heads first
        layer, head, keys = edit.site.layer, edit.site.head, keys_in(edit, group)
        for query in queries_in(edit, group, shape.window(layer)):
            forbidden = gone.setdefault((layer, head, query), set(gone.get((layer, None, query), ())))
            forbidden.update(keys)
            seen = keys_seen(query, shape.window(layer))
            if len(forbidden) >= len(seen) and forbidden.issuperset(seen):
                raise DeclarationError(
                    f"{edit!r}: query {query} is left without any key to attend to; a query needs one of {seen[0]} to "
                    f"{query}"
                )


def _from_start(site: Site, group: Group) -> Site:
    positions = positions_in(site, group)
    return site if positions is None else site.at(positions)
