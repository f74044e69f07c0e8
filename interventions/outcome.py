"""What goes into the engine and what comes out of it: token ids, and values by reader, run, condition and example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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


@dataclass
class Outcome:
    """Values by reader and group: ``values[name, group]`` and ``baseline[name, run, group]``.

    Arrays are ``(condition, example, scored)`` for logits readers, ``(condition, example, layer, head)`` for pattern
    readers; the baseline lacks ``condition``.
    """

    values: dict[tuple[str, int], Array] = field(default_factory=dict)
    baseline: dict[tuple[str, str, int], Array] = field(default_factory=dict)

    def put_run(self, plan: Plan, chunk: Chunk, run: str, values: Mapping[str, torch.Tensor]) -> None:
        """Put in what a run gave as it is; of the base run, as what conditions start from."""
        size, examples = len(plan.groups[chunk.group].examples), slice(*chunk.examples)
        for name, tensor in values.items():
            value = tensor.detach().float().cpu().numpy()
            empty = np.empty((size, *value.shape[1:]), dtype=np.float32)
            self.baseline.setdefault((name, run, chunk.group), empty)[examples] = value
            if run == plan.base and plan.conditions:
                empty = np.empty((len(plan.conditions), size, *value.shape[1:]), dtype=np.float32)
                self.values.setdefault((name, chunk.group), empty)[:, examples] = value

    def put(self, plan: Plan, chunk: Chunk, part: Part, values: Mapping[str, torch.Tensor]) -> None:
        """Put in what a pass gave."""
        first = chunk.examples[0]
        examples = slice(first + part.examples[0], first + part.examples[1])
        for name, tensor in values.items():
            value = tensor.detach().float().cpu().numpy()
            value = value.reshape(len(part.one.conditions), -1, *value.shape[1:])
            table = self.values[name, chunk.group]
            if value.ndim == 3:  # scored positions before the first one computed keep the values of the base run
                table = table[..., table.shape[-1] - value.shape[-1] :]
            table[list(part.one.conditions), examples] = value


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
            return [
                replace(self, one=Pass(self.one.conditions[side], self.one.entries[side], self.one.start))
                for side in sides
            ]
        middle = (start + stop) // 2
        return [] if stop - start < 2 else [replace(self, examples=span) for span in ((start, middle), (middle, stop))]
