"""The metrics as the engine sees them, and parts of what was read of the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..traced.specs import Kernel, RunCache

Array = np.ndarray[Any, Any]


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


def part_of(cache: RunCache, examples: slice) -> RunCache:
    """What was read of the runs of some of the examples."""

    def part(given: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        return {key: value[examples] for key, value in given.items()}

    def kernels(given: list[Kernel]) -> list[Kernel]:
        return [{**kernel, "arguments": part(kernel["arguments"])} for kernel in given]

    logits = cache["logits"]
    tokens = None if logits["tokens"] is None else logits["tokens"][examples]
    return {
        "tokens": cache["tokens"][examples],
        "base": part(cache["base"]),
        "sources": {run: part(points) for run, points in cache["sources"].items()},
        "reference": cache["reference"],
        "pattern_kernels": kernels(cache["pattern_kernels"]),
        "logits": {**logits, "kernels": kernels(logits["kernels"]), "tokens": tokens},
        "base_attended": part(cache["base_attended"]),
    }


def drawn_examples(cache: RunCache) -> int:
    """Examples of the reference draw."""
    return len(next(iter(cache["reference"]["alike"].values()), ()))
