"""The counts of a model, and how examples are grouped by length. Plain numbers: imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Counts of a model: layers, heads (of a layer), d_model, d_head, d_mlp, vocabulary, context (positions)."""

    layers: int
    heads: int
    d_model: int
    d_head: int
    d_mlp: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class Group:
    """Examples of equal length, which run together.

    Attributes
    ----------
    examples : tuple of int
        Which examples of the batch.
    length : int
        Their length in tokens.
    scored : tuple of int
        Positions whose logits are read.
    """

    examples: tuple[int, ...]
    length: int
    scored: tuple[int, ...]
