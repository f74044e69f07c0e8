"""What goes into the engine and what comes out of it: token ids, and values by reader, run, condition and example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from .packing import Chunk, Pass
from .plan import Plan

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Inputs:
    """Token ids for the engine, group by group.

    Attributes
    ----------
    runs : mapping of run name to a tuple of arrays (example, position), one for each group
    reference : tuple of arrays (example, position), one for each group
        The reference draw; may be empty where no edit uses it.
    """

    runs: Mapping[str, tuple[Array, ...]]
    reference: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Finished values of some examples of a group: of a run as it is, or of conditions.

    Attributes
    ----------
    group : int
    examples : (start, stop)
        Among the examples of the group.
    values : mapping of reader name to array
        ``(example, ...)`` of a run, ``(condition, example, ...)`` of conditions; then ``scored`` for logits readers,
        ``layer, head`` for pattern readers.
    run : str, optional
    conditions : tuple of int
        Left empty for a run.
    """

    group: int
    examples: tuple[int, int]
    values: Mapping[str, Array]
    run: str | None = None
    conditions: tuple[int, ...] = ()


class Keeper(Protocol):
    """Keeps pieces as they are finished, and gives back those that were kept before."""

    def found(self) -> Iterable[Piece]:
        """What was kept of the same work."""

    def keep(self, piece: Piece) -> None:
        """Keep a piece."""


@dataclass
class Outcome:
    """Values by reader and group: ``values[name, group]`` and ``baseline[name, run, group]``.

    Arrays are ``(condition, example, scored)`` for logits readers, ``(condition, example, layer, head)`` for pattern
    readers; the baseline lacks ``condition``.
    """

    plan: Plan
    values: dict[tuple[str, int], Array] = field(default_factory=dict)
    baseline: dict[tuple[str, str, int], Array] = field(default_factory=dict)
    done: dict[tuple[int, str | None], Array] = field(default_factory=dict)
    """Which examples of a run, and which ``(condition, example)``, are there."""

    def put(self, piece: Piece) -> Piece:
        """Put in a piece, and give it back."""
        group, size = piece.group, len(self.plan.groups[piece.group].examples)
        examples = slice(*piece.examples)
        for name, value in piece.values.items():
            if piece.run is not None:
                empty = np.empty((size, *value.shape[1:]), dtype=value.dtype)
                self.baseline.setdefault((name, piece.run, group), empty)[examples] = value
            else:
                empty = np.empty((len(self.plan.conditions), size, *value.shape[2:]), dtype=value.dtype)
                self.values.setdefault((name, group), empty)[list(piece.conditions), examples] = value
        if piece.run is not None:
            self._done(group, piece.run)[examples] = True
        else:
            self._done(group)[list(piece.conditions), examples] = True
        return piece

    def run_piece(self, chunk: Chunk, run: str, values: Mapping[str, torch.Tensor]) -> Piece:
        """What a run gave as it is."""
        return Piece(chunk.group, chunk.examples, {name: as_array(value) for name, value in values.items()}, run)

    def part_piece(self, chunk: Chunk, part: Part, values: Mapping[str, torch.Tensor]) -> Piece:
        """What a pass gave; scored positions before the first one computed have the values of the base run."""
        span = (chunk.examples[0] + part.examples[0], chunk.examples[0] + part.examples[1])
        conditions, found = part.one.conditions, {}
        for name, tensor in values.items():
            value = as_array(tensor)
            value = value.reshape(len(conditions), -1, *value.shape[1:])
            base = self.baseline[name, self.plan.base, chunk.group][slice(*span)]
            whole = np.repeat(base[None], len(conditions), axis=0)
            if value.ndim == 3:
                whole[..., whole.shape[-1] - value.shape[-1] :] = value
            else:
                whole[:] = value
            found[name] = whole
        return Piece(chunk.group, span, found, None, conditions)

    def missing(self, chunks: Sequence[Chunk] | None = None) -> list[Chunk]:
        """What is left of the plan, or of some chunks: passes without the conditions that are there."""
        left = []
        for chunk in self.plan.chunks if chunks is None else chunks:
            span = slice(*chunk.examples)
            there: Array = np.all(self._done(chunk.group)[:, span], axis=1)
            passes = tuple(
                one.some([at for at, number in enumerate(one.conditions) if not there[number]])
                for one in chunk.passes
                if not there[list(one.conditions)].all()
            )
            if passes or not all(self._done(chunk.group, run)[span].all() for run in self.plan.runs):
                left.append(replace(chunk, passes=passes))
        return left

    def steps(self, chunks: Sequence[Chunk]) -> int:
        """Forward passes of some chunks."""
        return sum(len(chunk.passes) + len(self.plan.runs) for chunk in chunks)

    def close(self) -> Outcome:
        """Give conditions that change nothing that is read, and so have no pass, the values of the base run."""
        for group in range(len(self.plan.groups)):
            passes = [one for chunk in self.plan.chunks if chunk.group == group for one in chunk.passes]
            idle = sorted(
                set(range(len(self.plan.conditions))) - {number for one in passes for number in one.conditions}
            )
            if idle:
                span = (0, len(self.plan.groups[group].examples))
                base = {
                    name: np.repeat(value[None], len(idle), axis=0)
                    for (name, run, at), value in self.baseline.items()
                    if (run, at) == (self.plan.base, group)
                }
                self.put(Piece(group, span, base, None, tuple(idle)))
        return self

    def _done(self, group: int, run: str | None = None) -> Array:
        size = len(self.plan.groups[group].examples)
        shape = (size,) if run is not None else (len(self.plan.conditions), size)
        return self.done.setdefault((group, run), np.zeros(shape, dtype=bool))


def as_array(tensor: torch.Tensor) -> Array:
    """A tensor on this machine: float64 as it is, all else as float32."""
    kept = tensor.detach().cpu() if tensor.dtype == torch.float64 else tensor.detach().float().cpu()
    array: Array = kept.numpy()
    return array


@dataclass(frozen=True)
class Part:
    """A pass on some of the examples of its chunk; smaller than planned after running out of memory."""

    one: Pass
    examples: tuple[int, int]

    @property
    def rows(self) -> int:
        """Rows that go through the model."""
        return len(self.one.conditions) * (self.examples[1] - self.examples[0])

    def halves(self) -> list[Part]:
        """Two smaller parts; none where it is a single row."""
        count, (start, stop) = len(self.one.conditions), self.examples
        if count > 1:
            sides = (slice(0, count // 2), slice(count // 2, count))
            return [replace(self, one=self.one.some(range(count)[side])) for side in sides]
        middle = (start + stop) // 2
        return [] if stop - start < 2 else [replace(self, examples=span) for span in ((start, middle), (middle, stop))]
