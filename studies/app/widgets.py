"""What the page is made of: its style sheets and templates, and the widgets, HTML and pictures that they hold."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import panel as pn
from bokeh.themes import Theme

from ...errors import HeadwiseError
from ..output.style import FONT, THEME

Value = TypeVar("Value")

COLOURS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --page: #f6f6f4; --card: #ffffff; --line: #d3d7dc;
  --accent: #0b5fa5; --on-accent: #ffffff; --mark: #eef2f6; --field: #ffffff; --warn: #a3470a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --soft: #a8afb7; --page: #15171a; --card: #1e2125;
  --line: #3b4148; --accent: #7db8ec; --on-accent: #10161c; --mark: #282c32; --field: #15171a; --warn: #f0a45d; } }
"""
PAGE = (
    COLOURS
    + """
* { box-sizing: border-box; }
html, body { height: auto; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 """
    + FONT
    + """; overflow-wrap: break-word; }
header, main, footer { max-width: 84rem; margin: 0 auto; padding: 0 1rem; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .8rem; padding-top: 1rem; }
h1 { font-size: 1.3rem; margin: 0; } header p { margin: 0; color: var(--soft); }
h2 { font-size: 1.1rem; margin: 0 0 .4rem; line-height: 1.3; }
.bar { margin: .8rem 0 1rem; }
.two { display: grid; grid-template-columns: minmax(0, 25.5rem) minmax(0, 1fr); gap: 1rem; align-items: start; }
.inner { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 0 1.4rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; min-width: 0;
  margin-bottom: 1rem; }
.card > *, .inner > * { min-width: 0; }
footer { color: var(--soft); padding-bottom: 2rem; }
.two > .card:first-child { position: sticky; top: .8rem; }
@media (max-width: 860px) { .two { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .two > .card:first-child { position: static; } }
@media (max-width: 600px) { header, main, footer { padding: 0 .6rem; } header { padding-top: .8rem; }
  .card { padding: .7rem .6rem; } }
"""
)
PARTS = (
    """
:host { color: var(--ink); font-size: 15px; --bokeh-font-size: 15px; font-family: """
    + FONT
    + """ !important; }
h2, h3, p, table, ul, label, button, input, select, summary { font-family: inherit !important; }
* { box-sizing: border-box; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; line-height: 1.3; } h3 { font-size: .98rem; margin: .9rem 0 .3rem; }
p { margin: .35rem 0; } .soft { color: var(--soft); font-size: .93em; } .warn { color: var(--warn); }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--mark); padding: .05em
  .3em; border-radius: 4px; overflow-wrap: anywhere; }
.role { font-weight: 400; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93em; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; padding: .22rem .5rem .22rem 0; border-top: 1px solid var(--line); font-weight: 400; }
thead th { border-top: 0; color: var(--soft); white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.bar { width: 34%; min-width: 5.5rem; padding-right: 0; }
svg { display: block; width: 100%; height: 1.15em; overflow: visible; }
svg .axis { stroke: var(--soft); stroke-width: 1; } svg .range { stroke: var(--accent); stroke-width: 5; opacity: .45; }
svg .dot { fill: var(--accent); } svg .chance { stroke: var(--warn); stroke-width: 2; }
ul { margin: .3rem 0; padding-left: 1.2rem; } li { margin: .15rem 0; }
label, .bk-input-group label { color: var(--soft); font-size: 13px; }
.bk-input, input, select { background-color: var(--field); color: var(--ink); border: 1px solid var(--line);
  border-radius: 6px; font: inherit; min-height: 2.3rem; width: 100%; }
select.bk-input { appearance: none; padding-right: 26px; text-overflow: ellipsis; background-repeat: no-repeat;
  background-image: linear-gradient(45deg, transparent 50%, var(--soft) 50%), linear-gradient(135deg, var(--soft) 50%,
  transparent 50%) !important; background-size: 6px 6px !important;
  background-position: right 14px center, right 8px center !important; }
select option, select optgroup { background: var(--field); color: var(--ink); }
.bk-input::placeholder { color: var(--soft); opacity: 1; }
.bk-btn, .bk-btn.bk-btn-default, :host(.solid) .bk-btn.bk-btn-default { background: var(--mark); color: var(--ink);
  border: 1px solid var(--line); border-radius: 6px; font: inherit; font-size: 14px; padding: .25rem .6rem;
  min-height: 2rem; }
.bk-btn.bk-btn-primary, :host(.solid) .bk-btn.bk-btn-primary { background: var(--accent); color: var(--on-accent);
  border-color: var(--accent); }
.bk-btn:hover { filter: brightness(1.08); }
.bk-input:focus-visible, .bk-btn:focus-visible, select:focus-visible, summary:focus-visible { outline: 3px solid
  var(--accent); outline-offset: 1px; box-shadow: none; }
:host(.partner) .bk-btn { font-size: 13px; padding: .15rem .45rem; min-height: 1.9rem; }
details summary { cursor: pointer; color: var(--accent); }
"""
)
FIGURE = """
:host { background: #ffffff; border-radius: 8px; padding: 4px; max-width: 100%; overflow-x: auto; color-scheme: light;
  color: #1c1e21; width: fit-content; }
"""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'self'"
)


def _template(contents: str) -> str:
    """A page of Panel's with `contents` below its heading; it may load nothing from elsewhere."""
    return f"""{{% extends base %}}
{{% block preamble %}}{{{{ super() }}}}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<style>{PAGE}</style>
<script>addEventListener("popstate", () => location.reload())</script>
{{% endblock %}}
{{% block contents %}}
<header><h1>headwise</h1><p>{{{{ folder | e }}}}</p></header>
{contents}
{{% endblock %}}
"""


TEMPLATE = _template("""<main>
<section class="bar" aria-label="What is shown">{{ embed(roots.choose) }}</section>
<div class="two">
<section class="card" aria-label="Every head">{{ embed(roots.grid) }}</section>
<section class="card" aria-label="The picked head">{{ embed(roots.head) }}
<div class="inner"><div>{{ embed(roots.pattern) }}</div>
<div>{{ embed(roots.facts) }}{{ embed(roots.partners) }}</div></div>
</section>
</div>
<section aria-label="The circuit">{{ embed(roots.circuit) }}</section>
<section class="card" aria-label="Try a prompt">{{ embed(roots.prompt) }}
<div class="two"><div>{{ embed(roots.fires) }}</div><div>{{ embed(roots.live) }}</div></div>
{{ embed(roots.next) }}
</section>
</main>
<footer>{{ embed(roots.files) }}</footer>
{{ embed(roots.location) }}""")
EMPTY = _template("""<main><section class="card" style="margin-top: 1rem">{{ embed(roots.files) }}</section></main>""")


def select(name: str, options: Any = None, value: Any = None, *, shared: bool = True) -> Any:
    """A select box; a shared one shares a line with others as far as there is room.

    Parameters
    ----------
    name : str
        Its label.
    options : list, or dict of text to value, optional
    value : object, optional
        The chosen one.
    shared : bool

    Returns
    -------
    panel.widgets.Select
    """
    return pn.widgets.Select(
        label=name,
        options=[] if options is None else options,
        value=value,
        margin=(0, 0, 8, 0),
        min_width=150,
        stylesheets=[PARTS],
        styles={"flex": "1 1 10rem"} if shared else {},
        max_width=380,
    )


def button(label: str, act: Callable[[Any], None], **options: Any) -> Any:
    """A button; `act` gets its clicks."""
    made = pn.widgets.Button(label=label, stylesheets=[PARTS], **options)
    made.on_click(act)
    return made


def html(text: str = "") -> Any:
    """HTML that is complete and escaped."""
    return pn.pane.HTML(text, sizing_mode="stretch_width", margin=0, stylesheets=[PARTS])


def picture(*, wide: bool = False) -> Any:
    """A place for a figure; a wide one takes the width that there is."""
    return pn.pane.Bokeh(None, margin=0, **({"sizing_mode": "stretch_width"} if wide else {}))


def framed(part: Any, *, width: int | None = None) -> Any:
    """A picture on white, which its colours are made for; one that is too wide scrolls in its own box.

    With a `width`, for a picture that is wide, the box is as wide as there is room, and at most so many pixels.
    """
    look: dict[str, Any] = {"stylesheets": [FIGURE]}
    if width is not None:
        wide = ":host { width: 100%; box-sizing: border-box; }"
        look = {"stylesheets": [FIGURE, wide], "sizing_mode": "stretch_width", "max_width": width}
        look |= {"styles": {"flex": f"1 1 {width}px", "min-width": "0"}}
    frame = pn.Column(part, margin=0, visible=part.object is not None, **look)
    part.param.watch(lambda event: frame.param.update(visible=event.new is not None), "object")
    return frame


class Template(pn.Template):  # type: ignore[misc]
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
    made = Template(text, location=location)
    made.add_variable("folder", folder)
    for name, part in roots.items():
        made.add_panel(name, part)
    return made


async def beside(work: Callable[[], Value], failed: str) -> tuple[Value | None, str]:
    """What `work` gives, done in a thread so that no tab waits; or None and why not, as a sentence.

    Parameters
    ----------
    work : callable
    failed : str
        Begins the sentence on an error that is none of headwise's, such as ``The prompt cannot be run``.
    """
    try:
        return await asyncio.to_thread(work), ""
    except HeadwiseError as error:
        return None, str(error)
    except Exception as error:
        logging.getLogger("headwise").exception(failed)
        return None, f"{failed} ({type(error).__name__})."
