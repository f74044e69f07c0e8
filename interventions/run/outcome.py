"""What goes into the engine and what comes out of it: token ids, and values by reader, run, condition and example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from ...errors import ModelError
from ..plan.passes import ExampleChunk, Pass
from ..plan.plan import Plan
from .cache import CompiledMetric

Array = np.ndarray[Any, Any]
Blank = Callable[[tuple[int, ...], Any], Array]


@dataclass(frozen=True)
class Inputs:
    """Token ids for the engine, group by group.

    Attributes
    ----------
    runs : mapping of run name to a tuple of arrays (example, position), one for each group
    reference : tuple of arrays (example, position), one for each group
        The prompts of the reference draw that are as long as those of the group; may be empty where no edit uses them.
    whole_reference : tuple of arrays (example, position), one for each length
        All prompts of the reference draw, where they differ in length and a mean is over all of their positions.
    """

    runs: Mapping[str, tuple[Array, ...]]
    reference: tuple[Array, ...] = ()
    whole_reference: tuple[Array, ...] = ()


@dataclass(frozen=True)
class FinishedValues:
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
    answers : str
        What it was asked for by, where a worker gives it.
    """

    group: int
    examples: tuple[int, int]
    values: Mapping[str, Array]
    run: str | None = None
    conditions: tuple[int, ...] = ()
    answers: str = ""


class Store(Protocol):
    """Keeps values as they are finished, and gives back those that were kept before."""

    def found(self) -> Iterable[FinishedValues]:
        """What was kept of the same work."""

    def keep(self, finished: FinishedValues) -> None:
        """Keep finished values."""


@dataclass
class Outcome:
    """Values by reader and group: ``values[name, group]`` and ``baseline[name, run, group]``.

    Arrays are ``(condition, example, scored)`` for logits readers, ``(condition, example, layer, head)`` for pattern
    readers; the baseline lacks ``condition``.
    """

    plan: Plan
    readers: Sequence[CompiledMetric] = ()
    """Whose values there are to be. Without them the first `FinishedValues` say what the others are like."""
    positions: bool = True
    """Whether values of logits come for each scored position, or their mean."""
    values: dict[tuple[str, int], Array] = field(default_factory=dict)
    baseline: dict[tuple[str, str, int], Array] = field(default_factory=dict)
    done: dict[tuple[int, str | None], Array] = field(default_factory=dict)
    """Which examples of a run, and which ``(condition, example)``, are there."""
    like: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    """Shape of the values of a reader in a group, for one example."""
    dtypes: dict[str, Any] = field(default_factory=dict)
    blank: Blank = np.zeros
    """Makes the arrays that values of conditions are put in, of a shape and a dtype; zeros at first."""

    def __post_init__(self) -> None:
        shape = self.plan.shape
        for reader in self.readers:
            for at, group in enumerate(self.plan.groups):
                pattern = reader.kind == "pattern"
                self.like[reader.name, at] = (
                    (shape.layers, shape.heads) if pattern else (len(group.scored) if self.positions else 1,)
                )
        for at in range(len(self.plan.groups)):
            self.like |= {(name, at): sizes for name, sizes in self.plan.sizes_read(at).items()}

    def put(self, finished: FinishedValues) -> FinishedValues:
        """Put in finished values, and give them back.

        Raises
        ------
        ModelError
            They are not of this plan. Nothing of them is taken.
        """
        if wrong := self.wrong(finished):
            raise ModelError(f"values came back that were not asked for: {wrong}")
        group, size = finished.group, len(self.plan.groups[finished.group].examples)
        examples = slice(*finished.examples)
        for name, value in finished.values.items():
            self.dtypes.setdefault(name, value.dtype)
            self.like.setdefault((name, group), value.shape[1 if finished.run is not None else 2 :])
            if finished.run is not None:
                empty = np.zeros((size, *value.shape[1:]), dtype=value.dtype)  # a plan may leave examples out
                self.baseline.setdefault((name, finished.run, group), empty)[examples] = value
            else:
                if (name, group) not in self.values:
                    shape = (len(self.plan.conditions), size, *value.shape[2:])
                    self.values[name, group] = self.blank(shape, value.dtype)
                self.values[name, group][list(finished.conditions), examples] = value
        if finished.run is not None:
            self._done(group, finished.run)[examples] = True
        else:
            self._done(group)[list(finished.conditions), examples] = True
        return finished

    def take(self, store: Store | None) -> None:
        """Put in what was kept of the same plan; what does not fit is computed again."""
        for finished in store.found() if store is not None else ():
            if not self.wrong(finished):
                self.put(finished)

    def wrong(self, finished: Any) -> str:
        """Why something is not of this plan, if it is not. Values are never stretched or converted to fit."""
        if not isinstance(finished, FinishedValues) or not isinstance(finished.values, Mapping):
            return f"a {type(finished).__name__}, which is no piece of it"
        plan, run, numbers = self.plan, finished.run, finished.conditions
        if not _within((finished.group,), len(plan.groups)):
            return f"group {finished.group!r} of {len(plan.groups)}"
        size = len(plan.groups[finished.group].examples)
        if not (
            _within(finished.examples, size + 1)
            and len(finished.examples) == 2
            and finished.examples[0] < finished.examples[1]
        ):
            return f"examples {finished.examples!r} of {size}"
        if run is not None and (run not in plan.runs or numbers):
            return f"run {run!r} with conditions {numbers!r}"
        if run is None and not (_within(numbers, len(plan.conditions)) and 0 < len({*numbers}) == len(numbers)):
            return f"conditions {numbers!r} of {len(plan.conditions)}"
        due = {name for name, _ in self.like}
        if run is not None:
            due -= {*plan.sizes_read(finished.group)}  # which are of conditions only
        elif plan.inside is not None:
            due = {*plan.inside.sizes}
        if (due or self.like) and {*finished.values} != due:
            return (
                f"values of {', '.join(map(repr, finished.values)) or 'nothing'} in place of {', '.join(sorted(due))}"
            )
        span = finished.examples[1] - finished.examples[0]
        first = (span,) if run is not None else (len(numbers), span)
        for name, value in finished.values.items():
            if type(value) is not np.ndarray or value.dtype not in (np.float32, np.float64):
                given = value.dtype if type(value) is np.ndarray else type(value).__name__
                return f"{name} as {given}, where an array of float32 or float64 is due"
            shape = (*first, *self.like.get((name, finished.group), value.shape[len(first) :]))
            dtype = self.dtypes.get(name, value.dtype)
            if (value.shape, value.dtype) != (shape, dtype):
                return f"{name} as {value.dtype} {value.shape}, where {dtype} {shape} is due"
        return ""

    def finished(self, chunk: ExampleChunk) -> list[FinishedValues]:
        """What there is of a chunk: values of each run, then those of all conditions."""
        group, span = chunk.group, slice(*chunk.examples)
        names = sorted({name for name, at in self.like if at == group})
        runs = {run: {name: self.baseline[name, run, group][span] for name in names} for run in self.plan.runs}
        found = [FinishedValues(group, chunk.examples, values, run) for run, values in runs.items()]
        if numbers := tuple(number for one in chunk.passes for number in one.conditions):
            values = {name: self.values[name, group][list(numbers), span] for name in names}
            found.append(FinishedValues(group, chunk.examples, values, None, numbers))
        return found

    def missing(self, chunks: Sequence[ExampleChunk] | None = None) -> list[ExampleChunk]:
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

    def steps(self, chunks: Sequence[ExampleChunk]) -> int:
        """Forward passes of some chunks."""
        return sum(len(chunk.passes) + len(self.plan.runs) for chunk in chunks)

    def close(self) -> Outcome:
        """Give conditions that change nothing that is read, and so have no pass, the values of the base run.

        Raises
        ------
        ModelError
            Something is missing.
        """
        if left := self.steps(self.missing()):
            raise ModelError(f"values of {left} of {self.plan.steps} passes never came back")
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
                self.put(FinishedValues(group, span, base, None, tuple(idle)))
        return self

    def _done(self, group: int, run: str | None = None) -> Array:
        size = len(self.plan.groups[group].examples)
        shape = (size,) if run is not None else (len(self.plan.conditions), size)
        return self.done.setdefault((group, run), np.zeros(shape, dtype=bool))


def _within(numbers: Any, count: int) -> bool:
    """Whether these are whole numbers from 0 to below `count`, in a tuple."""
    return isinstance(numbers, tuple) and all(type(one) is int and 0 <= one < count for one in numbers)


def as_array(tensor: torch.Tensor) -> Array:
    """A tensor on this machine: float64 as it is, all else as float32."""
    kept = tensor.detach().cpu() if tensor.dtype == torch.float64 else tensor.detach().float().cpu()
    array: Array = kept.numpy()
    return array


def values_of_run(chunk: ExampleChunk, run: str, values: Mapping[str, torch.Tensor]) -> FinishedValues:
    """What a run gave as it is, ``(example, ...)`` by reader."""
    return FinishedValues(chunk.group, chunk.examples, {name: as_array(value) for name, value in values.items()}, run)


def values_of_conditions(
    chunk: ExampleChunk, examples: tuple[int, int], conditions: tuple[int, ...], values: Mapping[str, torch.Tensor]
) -> FinishedValues:
    """Make finished values of what a pass gave.

    Parameters
    ----------
    chunk : ExampleChunk
    examples : tuple of int
        Start and stop of the examples that were run, counted from the first example of the chunk.
    conditions : tuple of int
        Of the pass, in its order.
    values : mapping of str to Tensor
        By reader, ``(condition * example, ...)``.

    Returns
    -------
    FinishedValues
        ``(condition, example, ...)`` by reader.
    """
    span = (chunk.examples[0] + examples[0], chunk.examples[0] + examples[1])
    arrays = {name: as_array(value) for name, value in values.items()}
    found = {name: array.reshape(len(conditions), -1, *array.shape[1:]) for name, array in arrays.items()}
    return FinishedValues(chunk.group, span, found, None, conditions)


@dataclass(frozen=True)
class PassSlice:
    """A pass on some of the examples of its chunk; smaller than planned after running out of memory."""

    one: Pass
    examples: tuple[int, int]

    @property
    def rows(self) -> int:
        """Rows that go through the model."""
        return len(self.one.conditions) * (self.examples[1] - self.examples[0])

    def halves(self) -> list[PassSlice]:
        """Two smaller parts; none where it is a single row."""
        count, (start, stop) = len(self.one.conditions), self.examples
        if count > 1:
            sides = (slice(0, count // 2), slice(count // 2, count))
            return [replace(self, one=self.one.some(range(count)[side])) for side in sides]
        middle = (start + stop) // 2
        return [] if stop - start < 2 else [replace(self, examples=span) for span in ((start, middle), (middle, stop))]
