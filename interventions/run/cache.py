"""What passes need to know before they run: the metrics as the engine sees them, and what was read of the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Given = dict[str, torch.Tensor]
Points = dict[tuple[int, str], torch.Tensor]


@dataclass(frozen=True)
class CompiledMetric:
    """A metric as the engine sees it.

    Attributes
    ----------
    name : str
    kind : {"logits", "pattern"}
    kernel : callable
        ``kernel(logits, **arguments) -> (row, scored)`` with logits ``(row, scored, vocabulary)``, or
        ``kernel(pattern, **arguments) -> (row, head)`` with pattern ``(row, head, query, key)``, once for each layer.
    arguments : mapping of run name to a tuple of mappings
        For each group, argument name to an array whose first axis is the example, and, for logits, whose second is the
        scored position.
    needs_base : bool
        Whether the kernel also takes ``base_logits`` of the same rows, without any intervention.
    tokens : tuple of str
        Arguments that hold token ids, where the kernel looks at their logits only.
    """

    name: str
    kind: str
    kernel: Callable[..., torch.Tensor]
    arguments: Mapping[str, tuple[Mapping[str, Array], ...]]
    needs_base: bool = False
    tokens: tuple[str, ...] = ()


@dataclass
class RunCache:
    """What is known of the examples of a chunk before its passes: what was read of runs, and the readers' arguments.

    Attributes
    ----------
    base : dict
        ``(layer, point)`` to what the base run has there.
    sources : dict
        Run name to the same for that run.
    reference : dict
        The same for the whole reference draw.
    watch, score : as in `forward`, for the base run
    base_attended : dict
        Reader name to the values of the base run, ``(example, layer, head)``.
    drawn : int
        Examples of the reference draw.
    """

    base: Points = field(default_factory=dict)
    sources: dict[str, Points] = field(default_factory=dict)
    reference: Points = field(default_factory=dict)
    watch: list[Any] = field(default_factory=list)
    score: dict[str, Any] = field(default_factory=dict)
    base_attended: dict[str, torch.Tensor] = field(default_factory=dict)
    drawn: int = 0

    def part(self, examples: slice) -> RunCache:
        """The same for some of the examples."""

        def cut(given: Given) -> Given:
            return {name: value[examples] for name, value in given.items()}

        def points(given: Points) -> Points:
            return {at: value[examples] for at, value in given.items()}

        score = dict(self.score)
        score["kernels"] = [(name, kernel, cut(given)) for name, kernel, given in score["kernels"]]
        score["tokens"] = None if score["tokens"] is None else score["tokens"][examples]
        return RunCache(
            points(self.base),
            {run: points(source) for run, source in self.sources.items()},
            self.reference,
            [(name, kernel, cut(given)) for name, kernel, given in self.watch],
            score,
            cut(self.base_attended),
            self.drawn,
        )
