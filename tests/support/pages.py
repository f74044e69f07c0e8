"""Reading an HTML report in tests: headings, links, everything it would load, and the text that a reader sees."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

EVIL = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">'
"""Text that would run if a page did not escape it."""
LOADING = ("src", "srcset", "data", "poster", "action", "formaction", "background")


class Outline(HTMLParser):
    """Headings with their levels, links, ids, the sources of whatever a page would load, and its figures and tables."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.levels, self.targets, self.ids, self.sources, self.open = [], [], [], [], [], None
        self.labels, self.figures, self.bare_headers, self.scrolling = [], 0, 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
            self.headings.append("")
            self.open = tag
        if tag == "a":
            self.targets.append(attrs["href"])
        self.sources += [attrs[name] for name in LOADING if name in attrs]
        self.sources += [attrs["href"]] if tag in ("link", "base", "image", "use") and "href" in attrs else []
        self.figures += tag == "figure"
        self.labels += [attrs["aria-label"]] if attrs.get("role") == "img" else []
        self.bare_headers += tag == "th" and "scope" not in attrs
        if tag == "pre" or {"scroll", "plots"} & set(attrs.get("class", "").split()):
            self.scrolling.append(attrs.get("tabindex"))

    def handle_endtag(self, tag):
        if tag == self.open:
            self.open = None

    def handle_data(self, data):
        if self.open:
            self.headings[-1] += data


def shown(text):
    """The text of a page without its scripts and styles, spaces as a reader sees them."""
    body = re.sub(r"<(script|style).*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body))).replace(" .", ".")


def code(text):
    """What stands in the blocks of code: the command, and the Python lines."""
    return [html.unescape(block) for block in re.findall(r"<code>(.*?)</code>", text, re.DOTALL)]


def check_whole(text):
    """What holds for every report: one h1, no level left out, links that lead somewhere, nothing that it would load."""
    outline = Outline(text)
    assert outline.levels[0] == 1
    assert outline.levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(outline.levels, outline.levels[1:], strict=False))
    assert {target.removeprefix("#") for target in outline.targets} <= set(outline.ids)
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(outline.sources) == {"data:,"}
    assert "default-src 'none'" in text
    assert '<html lang="en">' in text
    assert "@import" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert outline.figures == len(outline.labels)
    assert all(outline.labels)
    assert outline.bare_headers == 0
    assert set(outline.scrolling) <= {"0"}  # what scrolls sideways can be reached with the keyboard
    return outline
