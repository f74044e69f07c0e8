"""A self-contained HTML page: escaped text, tables, figures with captions, one style sheet. Knows nothing of studies.

Figures are Bokeh models whose script and data are written into the page, so it opens with the network off; the content
policy in its head forbids the browser to load anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --page: #fbfbfa; --card: #ffffff; --line: #dcdfe3;
  --accent: #0b5fa5; --mark: #f1f4f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --soft: #a2a9b1; --page: #15171a; --card: #ffffff;
  --line: #353a40; --accent: #7db8ec; --mark: #1f2328; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
main, header, footer { max-width: 74rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 3rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--line);
  }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul, ol, dl, blockquote { max-width: 46rem; }
p { margin: .6rem 0; }
li { margin: .3rem 0; }
a { color: var(--accent); }
.lead { font-size: 1.08rem; color: var(--soft); }
nav { margin: 1.2rem 0 0; padding: .8rem 1.2rem; background: var(--mark); border-radius: 8px; }
nav ol { columns: 2 22rem; max-width: none; margin: 0; padding-left: 1.3rem; }
nav li { margin: .15rem 0; break-inside: avoid; }
.summary { font-size: 1.08rem; }
.topic { display: grid; grid-template-columns: 11rem minmax(0, 46rem); gap: 0 1.2rem; border-top: 1px solid
  var(--line);
  padding: .5rem 0; }
.topic:first-of-type { border-top: 0; }
.topic h3 { margin: .3rem 0; } .topic ul { margin: 0; padding-left: 1.1rem; }
.not { border-left: 4px solid #d9731a; padding: .2rem 0 .2rem 1rem; margin: 1.4rem 0; }
.not h3 { margin-top: .2rem; }
figure { margin: 1.4rem 0 2rem; }
.plots { display: flex; flex-wrap: wrap; width: fit-content; max-width: 100%; gap: 4px 12px; background: var(--card);
  border: 1px solid var(--line);
  border-radius: 8px; padding: 10px; overflow-x: auto; color: #1c1e21; color-scheme: light; }
.plots > div { flex: 0 0 auto; }
.plots > div.wide { flex: 0 1 auto; min-width: 0; }
figcaption { color: var(--soft); font-size: .93rem; margin-top: .5rem; max-width: 52rem; }
.scroll { width: fit-content; max-width: 100%; overflow-x: auto; border: 1px solid var(--line); border-radius: 8px;
  margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; font-variant-numeric: tabular-nums; }
.note { color: var(--soft); font-size: .93rem; margin: 1.2rem 0 .4rem; }
.note + .scroll { margin-top: 0; }
th, td { text-align: left; padding: .35rem .7rem; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; background: var(--mark); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
td, th { white-space: nowrap; }
td.n, th.n { text-align: right; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
pre { background: var(--mark); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .88rem;
  line-height: 1.5; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--accent); }
footer { color: var(--soft); font-size: .9rem; padding: 1rem 1rem 3rem; margin-top: 3rem; border-top: 1px solid
  var(--line); }
@media (max-width: 600px) { .topic { display: block; } h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; } nav {
  padding: .6rem .8rem; }
  .plots { padding: 6px; } }
@media print { .plots { overflow: visible; } details > * { display: block; } }
"""
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
THEME = {
    "attrs": {
        "Axis": {
            "axis_label_text_font": FONT,
            "axis_label_text_font_size": "12px",
            "axis_label_text_font_style": "normal",
            "axis_line_color": "#8a8a8a",
            "major_label_text_font": FONT,
            "major_label_text_font_size": "12px",
            "major_tick_line_color": "#8a8a8a",
            "minor_tick_line_color": None,
        },
        "ColorBar": {
            "title_text_font": FONT,
            "title_text_font_size": "12px",
            "major_label_text_font": FONT,
            "major_label_text_font_size": "11px",
        },
        "Legend": {"label_text_font": FONT},
        "Title": {"text_font": FONT, "text_font_size": "13px"},
        "Toolbar": {"logo": None, "autohide": True},
    }
}


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
        """Append a figure: a HoloViews element, or a layout whose panels wrap on a narrow screen."""
        import holoviews as hv

        panels = list(element) if isinstance(element, hv.Layout) else [element]
        places = []
        for panel in panels:
            place = f"plot{len(self.models)}"
            self.models[place] = model = hv.render(panel, backend="bokeh")
            if getattr(model, "frame_width", None):
                model.sizing_mode = None  # its size follows from that of its frame
            places.append(_place(place, model))
        self.add(
            f'<figure><div class="plots" role="img" aria-label="{escape(caption)}">{"".join(places)}</div>',
            f"<figcaption>{escape(caption)}</figcaption></figure>",
        )

    def html(self) -> str:
        """The whole page as text."""
        from bokeh.document import Document
        from bokeh.embed import components
        from bokeh.resources import Resources
        from bokeh.themes import Theme

        script, inlined, body = "", "", "\n".join(self.body)
        if self.models:
            document = Document()
            with document.models.freeze():  # else Bokeh walks through all models again for each that is added
                for model in self.models.values():
                    document.add_root(model)
            script, divs = components(self.models, theme=Theme(json=THEME))
            for place, div in divs.items():
                body = body.replace(f"<!--{place}-->", div, 1)
            inlined = "".join(
                f"<script>{one}</script>\n" for one in Resources(mode="inline", components=["bokeh"]).js_raw
            )
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{escape(self.title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n{inlined}\n'
            f"</head>\n<body>\n{body}\n{script}\n</body>\n</html>\n"
        )


def _place(place: str, model: Any) -> str:
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
    """
    right = [bool(rows) and all(isinstance(row[at], Number) for row in rows) for at in range(len(head))]

    def cell(at: int, value: object) -> str:
        text = escape(str(value))
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


class Number(str):
    """Text of a number, right-aligned in a table."""


def number(value: float, pattern: str = ".2f") -> Number:
    """`value` as `pattern`, a dash where it is missing."""
    return Number("–" if value != value else format(value, pattern))


def paragraphs(texts: Sequence[str]) -> str:
    """Each text as a paragraph."""
    return "".join(f"<p>{_kept(text)}</p>" for text in texts)


def _kept(text: str) -> str:
    """Text, escaped, that does not break a line within ``p = 0.05``."""
    return escape(text).replace(" = ", "\u00a0=\u00a0")


def bullets(texts: Sequence[str]) -> str:
    """Texts as a list; nothing where there are none."""
    return f"<ul>{''.join(f'<li>{_kept(text)}</li>' for text in texts)}</ul>" if texts else ""
