"""The mark of pictures whose intervals are over few prompts: a line in the title. Owns `marks_few` and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import holoviews as hv
import numpy as np
import xarray as xr

from ....metrics.intervals import few_prompts
from .style import styled

Plot = TypeVar("Plot", bound=Callable[..., Any])


def marks_few(plot: Plot) -> Plot:
    """A function that draws a dataset, its figures marked where they show intervals over few prompts."""

    @wraps(plot)
    def marked(ds: Any, *given: Any, **options: Any) -> Any:
        drawn = plot(ds, *given, **options)
        parts = ds.subtree if isinstance(ds, xr.DataTree) else [ds]
        sizes = [getattr(part, "sizes", {}).get("example", 0) for part in parts]
        examples = min((size for size in sizes if size), default=0)
        if not few_prompts(examples):
            return drawn
        words = f"95% intervals over {examples} prompts say little"
        if isinstance(drawn, hv.Layout):
            return hv.Layout([_titled(panel, words) for panel in drawn]).cols(drawn._max_cols)
        return _titled(drawn, words)

    return marked  # type: ignore[return-value]


def _titled(figure: Any, words: str) -> Any:
    if not any(_spans(part) for part in figure.traverse(lambda part: part, [hv.Segments, hv.Area])):
        return figure
    title = hv.Store.lookup_options("bokeh", figure, "plot").kwargs.get("title", "")
    return styled(figure, title=f"{title}\n{words}" if title else words)


def _spans(part: Any) -> bool:
    """Whether the two ends of an interval differ somewhere."""
    low, high = (0, 2) if isinstance(part, hv.Segments) else (1, 2)
    return bool(np.any(part.dimension_values(low) != part.dimension_values(high)))
