"""What a metric is: a pure function with a card. Owns `Card`, `PromptFacts`, `Metric`; imports errors and arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import DeclarationError, choices

Array = np.ndarray[Any, Any]
Kernel = Callable[..., torch.Tensor]
KINDS = ("logits", "pattern")
OVER: Mapping[str, Callable[[Array], Array]] = {
    "mean": lambda values: values.mean(axis=-1),
    "sum": lambda values: values.sum(axis=-1),
    "product": lambda values: values.prod(axis=-1),
    "least": lambda values: values.min(axis=-1),
    "difference": lambda values: values.sum(axis=-1),
}
"""How values ``(..., scored)`` make up that of a prompt."""


@dataclass(frozen=True)
class Card:
    """What a reader must know to read a metric's numbers.

    Attributes
    ----------
    name : str
        Variable name in results.
    long_name : str
        Label of axes and tables.
    units : str
        ``"1"`` for a pure number, as in the CF conventions.
    bounds : tuple of float
        Smallest and largest possible value.
    better : {"lower", "higher", ""}
        Which way a model does better, where that can be said.
    reference : str
        Definition, or where it comes from.
    """

    name: str
    long_name: str
    units: str
    bounds: tuple[float, float]
    better: str = ""
    reference: str = ""


@dataclass(frozen=True, eq=False)
class PromptFacts:
    """The facts of a run that metrics may need: prompts of one length, and what counts as right.

    Attributes
    ----------
    tokens : array (example, position)
        Token ids.
    scored : tuple of int
        Positions whose next token is judged.
    targets : array (example, scored), optional
        The right next token.
    distractors : array (example, scored), optional
        A wrong next token to compare it with.
    period : int, optional
        Half length `L` of a repeated sequence.
    start : int
        Tokens in front of the repeated sequence (1 with a BOS).
    """

    tokens: Array
    scored: tuple[int, ...] = ()
    targets: Array | None = None
    distractors: Array | None = None
    period: int | None = None
    start: int = 0


@dataclass(frozen=True, eq=False)
class Metric:
    """A named quantity read off a run.

    Attributes
    ----------
    card : Card
    kind : {"logits", "pattern"}
        Whether it reads the logits at the scored positions or the attention patterns of every head.
    kernel : callable
        A plain function of tensors: ``(logits, **arguments) -> (row, scored)`` or
        ``(pattern, **arguments) -> (row, head)``. It may run on a server that does not have this package.
    prepare : callable
        ``Run -> arguments`` for the kernel, arrays whose first axis is the example and, for logits, whose second is the
        scored position; the kernel judges each scored position by itself.
    needs_base : bool
        Whether the kernel also takes ``base_logits``, those of the same prompts without any intervention.
    tokens : tuple of str
        Arguments that hold token ids ``(example, scored)``, where the kernel looks at the logits of these tokens only.
        Then no other logit is computed: the kernel gets theirs side by side, and their places there as arguments.
    differentiable : bool
        Whether a gradient says how it changes; not so for a count.
    over : {"mean", "sum", "product", "least", "difference"}
        How the values at the scored positions of a prompt make up that of the prompt. ``"difference"`` is the sum less
        that of the same prompt with its distractor for an answer.
    """

    card: Card
    kind: str
    kernel: Kernel = field(repr=False)
    prepare: Callable[[PromptFacts], Mapping[str, Array]] = field(repr=False)
    needs_base: bool = False
    tokens: tuple[str, ...] = ()
    differentiable: bool = True
    over: str = "mean"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DeclarationError(f"{self.card.name} reads {self.kind!r}: a metric reads {choices(KINDS)}")
        if self.over not in OVER:
            raise DeclarationError(f"{self.card.name} has over={self.over!r}: possible are {choices(OVER)}")
        if self.needs_base and self.tokens:
            raise DeclarationError(
                f"{self.card.name} compares with all base logits (needs_base), so it cannot read those of tokens only"
            )

    @property
    def name(self) -> str:
        """Variable name in results."""
        return self.card.name

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """Apply the kernel."""
        return self.kernel(*arguments, **named)

    def __repr__(self) -> str:
        return self.card.name


def need(value: Array | None, metric: str, what: str) -> Array:
    """`value`, or an error that says what the metric lacks."""
    if value is None:
        raise DeclarationError(f"{metric} needs {what}")
    return value
