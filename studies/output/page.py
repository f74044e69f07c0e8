"""A self-contained HTML page: escaped text, tables, figures with captions, one style sheet. Knows nothing of studies.

Figures are Bokeh models whose script and data are written into the page, so it opens with the network off; the content
policy in its head forbids the browser to load anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from .phrases import rounded
from .style import POLICY, SCRIPT, STYLE, THEME


@dataclass
class Page:
    """Parts of a page in reading order; figures are collected, so that their data is written once.

    Attributes
    ----------
    title : str
    body : list of str
        HTML.
    models : dict
        Bokeh models by the place that each is put.
    """

    title: str
    body: list[str] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)

    def add(self, *html: str) -> None:
        """Append HTML."""
        self.body.extend(html)

    def figure(self, element: Any, caption: str) -> None:
        """Append a figure: a HoloViews element, a layout whose panels wrap on a narrow screen, or a ``HoloMap``."""
        import holoviews as hv

        panels = list(element) if isinstance(element, hv.Layout) else [element]
        places = [self._slider(panel) if isinstance(panel, hv.HoloMap) else self._placed(panel) for panel in panels]
        look = f'class="plots" tabindex="0" role="img" aria-label="{escape(caption)}"'
        self.add(
            f"<figure><div {look}>{''.join(places)}</div>",
            f"<figcaption>{escape(caption)}</figcaption></figure>",
        )

    def _placed(self, panel: Any) -> str:
        """Where an element goes."""
        place = f"plot{len(self.models)}"
        self.models[place] = model = rendered(panel)
        return placed(place, model)

    def _slider(self, panels: Any) -> str:
        """A slider, and the elements of a ``HoloMap``, of which the one that it stands at is shown; first the last."""
        last, name = len(panels) - 1, escape(panels.kdims[0].label)
        frames = []
        for at, (key, one) in enumerate(panels.items()):
            look = f'class="frame" data-at="{escape(str(key))}"{"" if at == last else " hidden"}'
            frames.append(f"<div {look}>{self._placed(one)}</div>")
        slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{name}">'
        shown = f"<output>{escape(str(list(panels.keys())[-1]))}</output>"
        return f'<div class="frames"><label>{name} {slider} {shown}</label>{"".join(frames)}</div>'

    def html(self) -> str:
        """The whole page as text."""
        script, inlined, body = "", "", "\n".join(self.body)
        if self.models:
            inlined, script, divs = embedded(self.models)
            for place, div in divs.items():
                body = body.replace(f"<!--{place}-->", div, 1)
        skip = '<a class="skip" href="#content">Skip to the content</a>' if 'id="content"' in body else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{escape(self.title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n{inlined}\n'
            f"</head>\n<body>\n{skip}\n{body}\n{script}\n"
            f"{f'<script>{SCRIPT}</script>' if self.models else ''}\n</body>\n</html>\n"
        )


def rendered(element: Any) -> Any:
    """The Bokeh figure of a HoloViews element, at its own size."""
    import holoviews as hv

    model = hv.render(element, backend="bokeh")
    if getattr(model, "frame_width", None):
        model.sizing_mode = None  # its size follows from that of its frame
    return model


def embedded(models: Mapping[str, Any]) -> tuple[str, str, dict[str, str]]:
    """Bokeh models as HTML: Bokeh itself, the script that draws them, and by name the place of each."""
    from bokeh.document import Document
    from bokeh.embed import components
    from bokeh.resources import Resources
    from bokeh.themes import Theme

    document = Document()
    with document.models.freeze():  # else Bokeh walks through all models again for each that is added
        for model in models.values():
            document.add_root(model)
    script, divs = components(dict(models), theme=Theme(json=THEME))
    library = Resources(mode="inline", components=["bokeh"]).js_raw
    return "".join(f"<script>{one}</script>\n" for one in library), script, divs


def placed(place: str, model: Any) -> str:
    """Where a model goes. One whose frame is fixed (cells are square) keeps its size, the others take what there is."""
    model.toolbar_location = "above"
    if model.frame_width:
        return f'<div class="panel"><!--{place}--></div>'
    width = model.width
    model.sizing_mode = "stretch_width"
    model.min_width = 280
    return f'<div class="panel wide" style="width:{width}px"><!--{place}--></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "", long: Sequence[int] = ()) -> str:
    """A table that scrolls within its own box; the first column names the row, numbers are right-aligned.

    Parameters
    ----------
    head : sequence of str
    rows : sequence of sequences
        Floats and ints are shown as they are given: format them as text first, and wrap it in `Number`.
    caption : str
    long : sequence of int
        Columns whose text may break anywhere.

    Returns
    -------
    str
        HTML.
    """
    right = [bool(rows) and all(isinstance(row[at], Number) for row in rows) for at in range(len(head))]

    def cell(at: int, value: object) -> str:
        """Write a cell: a heading in the first column, a number or a text in the others."""
        text = _unbroken(escape(str(value)))
        if at == 0:
            return f'<th scope="row">{text}</th>'
        kind = ' class="n"' if right[at] else ' class="long"' if at in long else ""
        return f"<td{kind}>{text}</td>"

    heads = "".join(
        f'<th scope="col"{" class=n" if right[at] else ""}>{escape(name)}</th>' for at, name in enumerate(head)
    )
    lines = "".join(f"<tr>{''.join(cell(at, value) for at, value in enumerate(row))}</tr>" for row in rows)
    above = f'<p class="note">{escape(caption)}</p>' if caption else ""
    inner = f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
    return (
        f'{above}<div class="scroll" role="region" aria-label="{escape(caption or head[0])}" tabindex="0">{inner}</div>'
    )


def folded(summary: str, inner: str) -> str:
    """HTML that is opened with a click on its summary."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


class Number(str):
    """Text of a number, right-aligned in a table."""


def number(value: float, pattern: str = ".2f") -> Number:
    """`value` as `pattern`, a dash where it is missing; what rounds to 0 has no sign."""
    return Number("–" if value != value else rounded(value, pattern))


def paragraphs(texts: Sequence[str]) -> str:
    """Each text as a paragraph."""
    return "".join(f"<p>{_kept(text)}</p>" for text in texts)


def _kept(text: str) -> str:
    """Text, escaped, that does not break a line within ``p = 0.05``."""
    return _unbroken(escape(text).replace(" = ", "\u00a0=\u00a0"))


def _unbroken(html: str) -> str:
    """HTML that does not break a line within an arrow, as of an edge."""
    return html.replace("-&gt;", '<span class="arrow">-&gt;</span>')


def bullets(texts: Sequence[str]) -> str:
    """Texts as a list; nothing where there are none."""
    return f"<ul>{''.join(f'<li>{_kept(text)}</li>' for text in texts)}</ul>" if texts else ""
