"""A family that was found in a model itself: its blocks are called, not laid open. Imports family and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.shape import Shape
from ..traced.specs import CallFacts
from .family import Family

Places = tuple[tuple[str, str], ...]
"""Where a point is found: paths of modules within a block, and a side of each (``"input"`` or ``"output"``)."""


def unscaled(config: Any, layer: int) -> float:
    """No factor: attention weights are read as the model gives them."""
    return 1.0


@dataclass(frozen=True)
class CalledFamily(Family):
    """What was found in a model of which no table is right: where its parts enter and leave modules.

    The model's own blocks run, and are read and written at these places. `find_parts` makes it, for one model.

    Attributes
    ----------
    reason : str
        Why its blocks are not laid open.
    places : tuple of (str, Places)
        Point to where it is found in a block, in the order in which a pass comes by.
    factors : mapping of str to float
        What the model multiplies ``attn_out`` and ``mlp_out`` by before it adds them, where that is not 1.
    gives : int
        How many things a block gives in a tuple; 0 where it gives the stream alone.
    counts : Shape
    """

    reason: str = ""
    places: tuple[tuple[str, Places], ...] = ()
    factors: Mapping[str, float] = field(default_factory=dict)
    gives: int = 0
    scaling: Callable[[Any, int], float] = unscaled
    counts: Shape = field(kw_only=True)

    def __post_init__(self) -> None:
        """Nothing is missing in what was found."""

    def shape(self, config: Any, module: Any = None) -> Shape:
        """The counts that were found."""
        return self.counts

    @property
    def why_called(self) -> str:
        """The reason."""
        return self.reason

    def calls(self) -> CallFacts:
        """What was found."""
        return {"called": True, "gives": self.gives, "factors": dict(self.factors)}

    def points(self, shape: Shape) -> list[tuple[str, list[tuple[str, str]]]]:
        """Where what a block makes is found, in forward order."""
        return [(name, list(places)) for name, places in self.places]
