"""The page of one session: what is chosen, the head grid and the picked head. Shares nothing with another session."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import panel as pn
import xarray as xr

from ...errors import HeadwiseError, printable
from ...interventions.declare.sites import Head
from .. import plots
from . import head_facts, variables
from . import text as sentences
from .circuit import CircuitView
from .figures import HeadGrid
from .firing import Models
from .folder import Folder
from .patterns import PatternView
from .prompts import PromptView
from .selection import Selection
from .variables import SHOWS, HeadVariable, short
from .widgets import EMPTY, TEMPLATE, button, framed, html, picture, select, template

MOST_FILES = 2000
"""Results that are offered; an address can name any other."""
KINDS = {"q": "queries", "k": "keys", "v": "values"}


def page(folder: Folder, models: Models) -> Any:
    """The page for the session that is being opened, as the address that it was opened with asks for it."""
    listed = folder.files()
    if all(one.reason for one in listed):
        return template(EMPTY, folder.name, files=html(sentences.files(listed, folder.name)))
    location = pn.state.location
    session = Session(folder, models, Selection.from_query(location.search if location else ""))
    made = template(
        TEMPLATE,
        folder.name,
        files=html(sentences.files(listed, folder.name)),
        location=True,
        **session.roots(),
    )
    session.open([one.name for one in listed if not one.reason])
    return made


class Session:
    """What one tab shows. Each widget's change is handled by one method, which redraws what depends on it.

    Parameters
    ----------
    folder : Folder
    models : Models
    wanted : Selection
        What the address asks for.
    """

    def __init__(self, folder: Folder, models: Models, wanted: Selection) -> None:
        self.folder, self.wanted = folder, wanted
        self.tree: xr.DataTree | None = None
        self._quiet = False
        self._grid: HeadGrid | None = None
        self.result, self.variable, self.show, self.head = (
            select(name) for name in ("Result set", "Variable", "Show", "Head")
        )
        self.dims = pn.FlexBox(gap="0 .8rem", margin=0)
        self.grid, self.grid_note = picture(), html()
        self.heading, self.facts = html(), html()
        self.circuit = CircuitView()
        self.partners = pn.Column(sizing_mode="stretch_width", margin=0)
        self.pattern = PatternView(models, self.remember)
        self.prompt = PromptView(models, self.remember, self.pick)
        self.result.param.watch(lambda event: self._loud(self.open_result), "value")
        self.variable.param.watch(lambda event: self._loud(self.open_variable), "value")
        self.show.param.watch(lambda event: self._loud(self.draw), "value")
        self.head.param.watch(lambda event: self._loud(self.draw_head), "value")

    def roots(self) -> dict[str, Any]:
        """The parts of the page by the place that the template gives them."""
        widgets = (self.result, self.variable, self.show, self.dims, self.head)
        return {
            "choose": pn.FlexBox(*widgets, sizing_mode="stretch_width", gap="0 .8rem", margin=0),
            "grid": pn.Column(self.grid_note, framed(self.grid), sizing_mode="stretch_width", margin=0),
            "head": self.heading,
            "facts": self.facts,
            "partners": self.partners,
            "circuit": self.circuit.view,
            "pattern": self.pattern.view,
            **self.prompt.roots(),
        }

    def open(self, names: list[str]) -> None:
        """Show the result that the address asks for, or else the first that opens."""
        with self._silence():
            asked = [self.wanted.result] if self.wanted.result in names[MOST_FILES:] else []
            self.result.options = {printable(name): name for name in [*names[:MOST_FILES], *asked]}
            self.result.value = self.wanted.result if self.wanted.result in names else names[0]
        missing = self.wanted.result if self.wanted.result not in ("", *names) else ""
        self.open_result()
        if missing:
            self._say(f"There is no result called {missing} here: this is {self.result.value}.")
        self.wanted = Selection()  # an address asks once

    def open_result(self) -> None:
        """Read the chosen file; a file that cannot be read leaves the page in words, not in pieces."""
        self.tree, found = None, []
        with self._in_words():
            self.tree = self.folder.open(self.result.value)
            found = variables.variables(self.tree)
        usual = variables.usual(found)
        with self._silence():
            self._known = {one.key: one for one in found}
            self.variable.groups = _grouped(found)
            if usual is not None:
                asked = self.wanted.variable
                self.variable.value = asked if asked in self._known else usual.key
        with self._in_words():
            self.circuit.open(self.tree)
        self.pattern.open(self.tree, self.wanted.pattern)
        self.prompt.open(self.tree, self.wanted)
        if self.tree is not None:
            self.open_variable()
            if usual is None:
                self._say("This file has no variable with a number for each head, so there is no grid to draw.")

    def open_variable(self) -> None:
        """Offer how the chosen variable can be shown, the labels of its other dims and its heads."""
        chosen = self._chosen()
        with self._silence():
            shows = chosen.shows if chosen else ()
            self.show.options = {SHOWS[one]: one for one in shows}
            self.show.value = self.wanted.show if self.wanted.show in shows else next(iter(shows), None)
            self.show.visible = len(shows) > 1
            self.dims.objects = [self._dim(dim, labels) for dim, labels in (chosen.others if chosen else {}).items()]
            count = sum(widget.visible for widget in self.dims.objects)
            self.dims.visible, self.dims.styles = count > 0, {"flex": f"{count} 1 {10 * count}rem"}
            names: list[str] = []
            with self._in_words():
                names = [str(Head(*at)) for at in variables.heads(self.tree, chosen)] if self.tree is not None else []
            before = self.head.value
            self.head.options = names
            asked = [one for one in (self.wanted.head, before) if one in names]
            best = self._strongest(chosen) if names and not asked else ""
            self.head.value = asked[0] if asked else best or next(iter(names), None)
        if chosen is not None and not names:
            self._grid, self.grid.object = None, None
            self.draw_head()
            return
        self.draw()
        if self.wanted.head and self.wanted.head not in names:
            self._say(f"There is no head {self.wanted.head} in this file: this is {self.head.value}.")

    def _strongest(self, chosen: HeadVariable | None) -> str:
        """The head where the chosen variable is largest, either way."""
        with contextlib.suppress(HeadwiseError):
            if chosen is not None and self.tree is not None:
                values = abs(variables.values(self.tree, chosen, self.show.value, self._at()))
                at = values.fillna(-1).argmax(("layer", "head"))
                layer, head = (int(values[dim].values[int(at[dim])]) for dim in ("layer", "head"))
                return str(Head(layer, head))
        return ""

    def _dim(self, dim: str, labels: tuple[str, ...]) -> Any:
        asked = self.wanted.at.get(dim, "")
        name = short(dim).replace("_", " ").capitalize()
        name += f" (the first {variables.MOST_LABELS})" if len(labels) >= variables.MOST_LABELS else ""
        widget = select(name, list(labels), asked if asked in labels else labels[0])
        widget.param.watch(lambda event: self._loud(self.draw), "value")
        widget.tags = [dim]
        widget.visible = len(labels) > 1
        return widget

    def draw(self) -> None:
        """Draw the grid of what is chosen, then what is shown of the head."""
        chosen, self._grid = self._chosen(), None
        with self._in_words():
            if chosen is not None and self.tree is not None:
                values = variables.values(self.tree, chosen, self.show.value, self._at())
                self._grid = HeadGrid(plots.head_grid(values), self.head.value or "", self.pick)
        self.grid.object = self._grid.figure if self._grid else None
        self.draw_head()

    def pick(self, name: str) -> None:
        """Show another head: one that was clicked on, in a grid or among the partners."""
        if name in self.head.options:
            self.head.value = name

    def draw_head(self) -> None:
        """Everything about the picked head."""
        if self.tree is None or not self.head.value:
            nothing = f"No head is in this file: headwise report {self.result.value or 'FILE'} shows what it holds."
            self.heading.object = sentences.note(nothing) if self.tree is not None else ""
            self.facts.object, self.partners.objects = "", []
            self.pattern.show("")
            return
        name = self.head.value
        head = Head.parse(name)
        if self._grid is not None:
            self._grid.mark(name)
        with self._in_words():
            self.heading.object = sentences.heading(name, head_facts.role(self.tree, head))
            about = head_facts.scores(self.tree, head), head_facts.effects(self.tree, head)
            self.facts.object = sentences.effects_table(
                about[1], head_facts.lost(self.tree, head)
            ) + sentences.scores_table(about[0])
            self.partners.objects = self._partners(head)
        self.pattern.show(name)
        self.prompt.show(name)
        self.remember()

    def _partners(self, head: Head) -> list[Any]:
        found = head_facts.partners(self.tree, head) if self.tree is not None else {}
        if not found:
            return [html('<p class="soft">This file holds no composition scores.</p>')]
        parts = [html("<h3>Partners in the circuit</h3>" + sentences.PARTNERS)]
        look = {"margin": (2, 3), "css_classes": ["partner"]}
        for (direction, kind), some in found.items():
            said = f"Its {KINDS[kind]} read" if direction == "from" else f"Its output is read by the {KINDS[kind]} of"
            buttons = [button(sentences.partner(one), self._picks(one), **look) for one in some]
            row = pn.FlexBox(*buttons, sizing_mode="stretch_width", margin=0)
            parts += [html(f'<p class="soft">{said}</p>'), row]
        return parts

    def _picks(self, one: head_facts.Partner) -> Callable[[Any], None]:
        return lambda event: self.pick(str(one.head))

    def remember(self) -> None:
        """Write what is chosen into the address."""
        at = {dim: label for dim, label in self._at().items() if label != self._chosen_labels(dim)[0]}
        chosen = Selection(
            result=self.result.value or "",
            variable=self.variable.value or "",
            show=(self.show.value or "") if self.show.visible else "",
            head=self.head.value or "",
            at=at,
            **self.pattern.chosen(),
            **self.prompt.chosen(),
        )
        location = pn.state.location
        if location is not None and not self._quiet and location.search != chosen.to_query():
            location.search = chosen.to_query()

    def _chosen(self) -> HeadVariable | None:
        return self._known.get(self.variable.value or "")

    def _chosen_labels(self, dim: str) -> tuple[str, ...]:
        chosen = self._chosen()
        return chosen.others[dim] if chosen else ("",)

    def _at(self) -> dict[str, str]:
        return {widget.tags[0]: widget.value for widget in self.dims.objects}

    def _say(self, text: str) -> None:
        self.grid_note.object = sentences.note(text, warn=True)

    def _loud(self, handle: Any) -> None:
        """Handle a change that the reader made; those that the page itself makes while it redraws are not."""
        if not self._quiet:
            self._say("")
            handle()

    @contextmanager
    def _silence(self) -> Iterator[None]:
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Whatever a file makes the numbers or the pictures raise is said on the page."""
        try:
            yield
        except HeadwiseError as error:
            self._say(str(error))
        except Exception as error:  # the file passed for a result and is none: the page stays usable
            logging.getLogger("headwise").exception("the app could not show %s", self.result.value)
            self._say(f"This cannot be shown ({type(error).__name__}): is the file whole?")


def _grouped(found: list[HeadVariable]) -> dict[str, dict[str, str]]:
    """The variables as a select box takes them, by group of the file."""
    groups: dict[str, dict[str, str]] = {}
    for one in found:
        same = groups.setdefault(short(one.group) or "all variables", {})
        same[one.label if one.label not in same else f"{one.label} ({short(one.name)})"] = one.key
    return groups
