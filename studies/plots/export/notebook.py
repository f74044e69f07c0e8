"""Pictures in a notebook: they show themselves, with no network, until somebody says how with ``hv.extension``."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import holoviews as hv

from ...output.notebook import notebook
from ...output.page import placed, rendered
from ...output.style import THEME

Shown = tuple[dict[str, str], dict[str, Any]]
"""Texts by MIME type, and their metadata."""
UNTRUSTED = "This picture shows once the notebook is trusted and its first picture was shown, or the cell is run again."
BOX = "display: flex; flex-wrap: wrap; gap: 4px 12px; overflow-x: auto; background: #ffffff; color: #1c1e21"
WAIT = """(() => {
  let tries = 0;
  const draw = () => {
    const note = document.getElementById("%(name)s");
    if (!note || !window.Bokeh) { if (tries++ < 3000) setTimeout(draw, 100); return; }
    note.remove();
    %(draw)s
  };
  draw();
})();"""


def show_in_notebooks() -> None:
    """Have HoloViews show its elements by `Display` in a notebook, where it would show them as text.

    ``hv.extension``, called before or after, puts its own way in the place of this one.
    """
    if notebook() is not None and not hv.Store._display_hooks:
        hv.Store.set_display_hook("html+js", hv.core.dimension.LabelledData, Display())


class Display:
    """A display hook of HoloViews: an element as HTML that needs nothing from elsewhere.

    Bokeh's script, 1.3 MB, is written into the first picture of a session, and again where that picture is replaced,
    since its cell is run again or was deleted. Colab shows each cell in a page of its own, so there each gets it.
    """

    def __init__(self) -> None:
        self.cell: Any = None
        self.written = False

    def __call__(self, element: Any) -> Shown | None:
        """HTML of an element; None for what a page without Python cannot show, or another backend is to show."""
        moving = element.traverse(lambda one: one, [hv.HoloMap])
        if hv.Store.current_backend != "bokeh" or moving or notebook() is None:
            return None
        if isinstance(element, hv.Table):
            return {"text/html": element.dframe().to_html(index=False)}, {}
        return {"text/html": as_html(element, library=self._needs_library())}, {}

    def _needs_library(self) -> bool:
        """Whether the cell that runs is the first with a picture, or the one that was."""
        shell = notebook()
        parent: dict[str, Any] = shell.get_parent() if hasattr(shell, "get_parent") else {}
        about = parent.get("metadata", {})  # what Jupyter says of the cell that it has run
        cell, deleted = about.get("cellId"), about.get("deletedCells", ())
        again = self.cell is not None and (self.cell == cell or self.cell in deleted)
        if self.written and not again and "google.colab" not in str(type(shell)):
            return False
        self.cell, self.written = cell, True
        return True


def as_html(element: Any, *, library: bool = True) -> str:
    """A HoloViews element, overlay or layout as a piece of HTML; the panels of a layout stand side by side if they fit.

    It waits until it is part of the page, and until the page has Bokeh's script: of the output of another cell, if need
    be, which may come later.

    Parameters
    ----------
    element : HoloViews element, overlay or layout
    library : bool
        Whether Bokeh's script goes with it.

    Returns
    -------
    str
    """
    from bokeh.embed import components
    from bokeh.resources import Resources
    from bokeh.themes import Theme

    panels = list(element) if isinstance(element, hv.Layout) else [element]
    models = {f"plot{number}": rendered(panel) for number, panel in enumerate(panels)}
    places = [placed(place, model) for place, model in models.items()]
    draw, divs = components(models, wrap_script=False, theme=Theme(json=THEME))
    body = "".join(place.replace(f"<!--{name}-->", divs[name]) for name, place in zip(models, places, strict=True))
    script = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw) if library else ""
    name = f"headwise-{uuid4().hex}"
    return (
        f"{f'<script>if (!window.Bokeh) {{{script}}}</script>' if library else ''}"
        f'<div style="{BOX}"><div id="{name}" style="padding: .5em">{UNTRUSTED}</div>{body}</div>'
        f"<script>{WAIT % {'name': name, 'draw': draw}}</script>"
    )
