"""Pictures of `headwise.studies.plots` as Bokeh figures of the page, and the head grid that can be clicked on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.events import Tap
from bokeh.io.doc import patch_curdoc
from bokeh.models import ColumnDataSource

from ..output.page import rendered

MARK = "picked head"
"""Name of the outline around the picked head."""


def drawn(element: Any, *, wide: bool = False) -> Any:
    """A HoloViews element as a Bokeh figure; a wide one is as wide as its place."""
    apart = Document()  # else HoloViews ties every figure that it ever drew to the session
    with patch_curdoc(apart):
        figure = rendered(element)
    figure.toolbar_location = "above"
    if wide:
        figure.update(sizing_mode="stretch_width", min_width=280)
    return figure


class HeadGrid:
    """A head grid whose cells can be clicked on, with an outline around the picked head.

    Parameters
    ----------
    element : holoviews.HeatMap
        From `headwise.studies.plots.head_grid`.
    picked : str
        Name of the head to mark, such as ``L1H2``.
    on_pick : callable
        Called with the name of the head that was clicked on.

    Attributes
    ----------
    figure : bokeh figure
    """

    def __init__(self, element: Any, picked: str, on_pick: Callable[[str], None]) -> None:
        at = [np.asarray(element.dimension_values(name), dtype=float) for name in ("head", "layer")]
        names = [str(name) for name in element.dimension_values("name")]
        self._places = {name: place for name, place in zip(names, zip(*at, strict=True), strict=True)}
        self._source = ColumnDataSource({"head": [], "layer": []}, name=MARK)
        self.figure = drawn(element)
        for colour, width, dash in (("#000000", 5, "solid"), ("#ffffff", 2, "solid")):
            self.figure.rect(
                x="head",
                y="layer",
                width=1,
                height=1,
                fill_alpha=0,
                line_color=colour,
                line_width=width,
                line_dash=dash,
                line_join="miter",
                level="overlay",
                source=self._source,
            )
        self._on_pick = on_pick
        self.figure.on_event(Tap, self._tapped)
        self.mark(picked)

    def mark(self, name: str) -> None:
        """Move the outline to a head; it goes where the grid has no such head."""
        place = self._places.get(name)
        self._source.data = {
            "head": [] if place is None else [place[0]],
            "layer": [] if place is None else [place[1]],
        }

    def _tapped(self, event: Any) -> None:
        name = self.at(event.x, event.y)
        if name is not None:
            self._on_pick(name)

    def at(self, x: float | None, y: float | None) -> str | None:
        """The head whose cell holds a place of the picture; None beside the grid."""
        if x is None or y is None:
            return None
        for name, (head, layer) in self._places.items():
            if abs(x - head) <= 0.5 and abs(y - layer) <= 0.5:
                return name
        return None
