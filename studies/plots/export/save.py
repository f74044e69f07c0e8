"""Pictures as files: HTML, PNG, SVG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ....errors import DeclarationError, choices
from ...output.page import Page, rendered
from ...storage.files import check_writable, write_beside
from .browser import drawn

ENDINGS = (".html", ".png", ".svg")


def save(element: Any, path: str | os.PathLike[str], *, timeout: float = 60.0) -> Path:
    """Write a picture as a file; what was there before stays until the new one is complete.

    HTML opens in any browser with no network, with tooltips and zoom. PNG has two pixels for each pixel of the screen,
    SVG is drawn in vectors; both are drawn by Chromium, Chrome, Edge or Brave without a window, found on the path or
    named by the environment variable ``HEADWISE_BROWSER``, and loading nothing.

    Parameters
    ----------
    element : HoloViews element, overlay or layout
    path : str or path
        Ends in ``.html``, ``.png`` or ``.svg``. Folders that are missing are made.
    timeout : float
        Seconds that the browser may take for PNG or SVG.

    Returns
    -------
    Path

    Raises
    ------
    DeclarationError
        For another ending, or what is no picture.
    ResultError
        Where the file cannot be written, there is no browser, or it fails.
    """
    import holoviews as hv

    name = Path(path).name
    kind = Path(path).suffix.lower()
    if kind not in ENDINGS:
        raise DeclarationError(f"{name}: pictures are saved as {choices(ENDINGS)}")
    if isinstance(element, hv.Table):
        raise DeclarationError(f"{name}: a table is no picture; element.dframe().to_csv(...) saves it")
    if not isinstance(element, hv.core.Dimensioned) or (
        isinstance(element, hv.Dataset) and type(element) is hv.Dataset
    ):
        raise DeclarationError(
            f"{name}: save takes a HoloViews element, overlay or layout, not {type(element).__name__}"
        )
    if kind != ".html" and element.traverse(lambda one: one, [hv.HoloMap]):
        raise DeclarationError(f"{name}: a picture with a slider is saved as .html; element[key] is one without")
    target = check_writable(path)
    if kind == ".html":
        page = Page(target.stem)
        page.add("<main>")
        page.figure(element, target.stem)
        page.add("</main>")
        html = _with_callbacks(page)
        return write_beside(target, lambda beside: Path(beside).write_text(html, encoding="utf-8"))
    panels = list(element) if isinstance(element, hv.Layout) else [element]
    columns = element._max_cols if isinstance(element, hv.Layout) else 1
    models = {f"panel{number}": rendered(panel) for number, panel in enumerate(panels)}
    for model in models.values():
        model.toolbar_location = None
    picture = drawn(models, columns, kind[1:], timeout)
    return write_beside(target, lambda beside: Path(beside).write_bytes(picture))


def _with_callbacks(page: Page) -> str:
    """The page as text. Bokeh compiles what hovering does in the browser, which the page's policy then has to allow."""
    from bokeh.models import CustomJS

    html = page.html()
    if any(isinstance(one, CustomJS) for model in page.models.values() for one in model.references()):
        html = html.replace("script-src 'unsafe-inline'", "script-src 'unsafe-inline' 'unsafe-eval'", 1)
    return html
