"""The parts that the page is made of, with its style sheet: widgets, HTML, pictures, and the template around them."""

from __future__ import annotations

from typing import Any

import panel as pn
from bokeh.themes import Theme

from ..output.style import THEME
from . import look


def select(name: str, options: Any = None, value: Any = None, *, shared: bool = True) -> Any:
    """A select box; a shared one shares a line with others as far as there is room."""
    return pn.widgets.Select(
        label=name,
        options=[] if options is None else options,
        value=value,
        margin=(0, 0, 8, 0),
        min_width=150,
        stylesheets=[look.PARTS],
        styles={"flex": "1 1 10rem"} if shared else {},
        max_width=380,
    )


def html(text: str = "") -> Any:
    """HTML that is complete and escaped."""
    return pn.pane.HTML(text, sizing_mode="stretch_width", margin=0, stylesheets=[look.PARTS])


def note() -> Any:
    """A place for a sentence."""
    return html()


def picture() -> Any:
    """A place for a figure."""
    return pn.pane.Bokeh(None, margin=0)


def framed(part: Any) -> Any:
    """A picture on white, which its colours are made for; one that is too wide scrolls in its own box."""
    frame = pn.Column(part, margin=0, stylesheets=[look.FIGURE], visible=part.object is not None)
    part.param.watch(lambda event: frame.param.update(visible=event.new is not None), "object")
    return frame


class Page(pn.Template):  # type: ignore[misc]
    """A template whose parts are put into the page together: Bokeh looks through the whole page after each change."""

    def server_doc(self, doc: Any = None, title: str | None = None, location: Any = True) -> Any:
        """Put the parts into the page of a session."""
        with (doc or pn.state.curdoc).models.freeze():
            return super().server_doc(doc, title, location)


def template(text: str, folder: str, **roots: Any) -> Any:
    """A page with `roots` in their places."""
    location = bool(roots.pop("location", False))
    if pn.state.curdoc is not None:
        pn.state.curdoc.theme = Theme(json=THEME)  # the figures look as they do in reports
    made = Page(text, location=location)
    made.add_variable("folder", folder)
    for name, part in roots.items():
        made.add_panel(name, part)
    return made
