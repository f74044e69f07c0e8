"""The arithmetic of estimates from gradients: slopes on the lines from old to new values. Runs where activations are.

Plain functions, as in `forward`: nothing here may need this package where it runs. A change is a tuple ``(condition,
where, columns, how, new)``: one write of one condition at a place, ``new`` being as in `fill`.
"""

from __future__ import annotations

from typing import Any

import torch

from .traces import slopes
from .values import resolve, resolve_values

AT_ONCE = 32
"""Conditions whose new values are held together."""


def attribution(
    root: Any, parts: dict[str, Any], known: dict[str, Any], given: dict[str, Any], device: Any
) -> dict[str, torch.Tensor]:
    """Kernel name to the estimated change, ``(condition, example)``.

    ``given`` has ``names`` of kernels; ``conditions`` and ``examples``, how many; ``steps``, None for the slope at the
    base run; ``places`` with ``frame``, the job of a pass from the first of them, and ``stream``, the point that it
    starts from; and ``groups`` of changes, ``(place, changes, frame, stream)``, that are on their lines together.
    """
    names, steps, examples = given["names"], given["steps"], given["examples"]
    found = {name: torch.zeros(given["conditions"], examples, dtype=torch.float32, device=device) for name in names}
    if not given["places"]:
        return found
    start = (given["frame"], given["stream"])
    values, flat = from_stream(root, parts, known, start, {}, given["places"], names, device)
    for place, changes, *begin in given["groups"]:
        old = values[place]
        for piece in pieces(changes, AT_ONCE if steps is None else len(changes)):
            made = [(*change[:4], resolve(change[4], known)) for change in piece]
            for together in [made] if steps is None else disjoint_sets(place, made, old):
                here = {name: flat[name][place] for name in names}
                if steps is not None:
                    moved = {place: on_the_way(place, together, old, steps, examples)}
                    _, there = from_stream(root, parts, known, begin, moved, [place], names, device)
                    shape = (steps, examples, *old.shape[1:])
                    here = {name: there[name][place].reshape(shape).mean(0) for name in names}
                for change in together:
                    for name in names:
                        found[name][change[0]] += first_order_effect(place, change, old, here[name])
    return found


def from_stream(
    root: Any,
    parts: dict[str, Any],
    known: dict[str, Any],
    start: Any,
    writes: dict[Any, Any],
    places: list[Any],
    names: list[str],
    device: Any,
) -> Any:
    """What is at places in a pass from the base run's stream, and each kernel's slope by it."""
    frame, (first, point) = start
    job = {**resolve_values(frame, known), "writes": writes}
    return slopes(root, parts, {(first, "stream"): known["base"][point]}, job, places, names, device)


def pieces(members: list[Any], size: int) -> list[list[Any]]:
    """A list in lists of at most `size`."""
    return [members[start : start + size] for start in range(0, len(members), size)]


def cut(place: tuple[int, str], change: Any, value: torch.Tensor) -> torch.Tensor:
    """The part of a value at its place that a change changes."""
    _, where, columns, *_ = change
    if place[1] == "pattern":
        return value[:, columns][:, :, where]
    return value[:, where, columns]


def touched(place: tuple[int, str], change: Any, value: torch.Tensor) -> torch.Tensor:
    """Which numbers of a value at its place a change changes."""
    _, where, columns, *_ = change
    marks = torch.zeros_like(value[:1], dtype=torch.bool)
    if place[1] == "pattern":
        marks[:, columns][:, :, where] = True
    else:
        marks[:, where, columns] = True
    return marks


def delta(place: tuple[int, str], change: Any, old: torch.Tensor) -> torch.Tensor:
    """``new - old`` for the value at its place, ``(example, position, column)``."""
    there, (*_, how, new) = cut(place, change, old), change
    if new is None:
        return -there
    if not isinstance(new, torch.Tensor):
        scaled: torch.Tensor = (new - 1) * there
        return scaled
    new = new.to(there.dtype)
    return new - there if how == "set" else new.expand_as(there)


def first_order_effect(place: tuple[int, str], change: Any, old: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """What a change makes of each example, to first order."""
    return (delta(place, change, old) * cut(place, change, slope)).flatten(1).sum(1)


def disjoint_sets(place: tuple[int, str], changes: list[Any], old: torch.Tensor) -> list[list[Any]]:
    """Changes of one place in sets whose members touch different numbers."""
    sets: list[tuple[list[Any], torch.Tensor]] = []
    for change in changes:
        marked = touched(place, change, old)
        for members, marks in sets:
            if not (marks & marked).any():
                members.append(change)
                marks |= marked
                break
        else:
            sets.append(([change], marked))
    return [members for members, _ in sets]


def on_the_way(place: tuple[int, str], changes: list[Any], old: torch.Tensor, steps: int, examples: int) -> list[Any]:
    """Writes that bring the values at a place to the middle of each step of their line, step by step as rows."""
    writes = []
    for step in range(steps):
        rows = slice(step * examples, (step + 1) * examples)
        for change in changes:
            moved = cut(place, change, old) + (step + 0.5) / steps * delta(place, change, old)
            writes.append((rows, change[1], change[2], "set", moved))
    return writes
