"""A prompt that is typed, and what every head does on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import holoviews as hv
import numpy as np
import panel as pn
import xarray as xr

from ...errors import printable
from ...interventions.declare.sites import Head
from .. import plots
from ..storage.record import Record
from . import firing
from . import text as sentences
from .figures import HeadGrid, drawn
from .firing import FIRES, TOKEN, Firing, Models
from .selection import Selection
from .widgets import PARTS, beside, button, framed, html, picture, select

EXAMPLE = "apple banana cherry apple banana"
NOTHING = {
    TOKEN: "No token comes after this one.",
}


class PromptView:
    """A prompt, how strongly every head fires on it, and the pattern of the picked head.

    Parameters
    ----------
    models : Models
    changed : callable
        Called when something was chosen that the address keeps.
    pick : callable
        Called with the name of a head that was clicked on.
    """

    def __init__(self, models: Models, changed: Callable[[], None], pick: Callable[[str], None]) -> None:
        self._models, self._changed, self._pick = models, changed, pick
        self._tree: xr.DataTree | None = None
        self._fired: Firing | None = None
        self._grid: HeadGrid | None = None
        self._head, self._ran, self._asked, self._quiet = "", "", 0, False
        self._next: tuple[Any, ...] = ()
        self.text = pn.widgets.TextInput(
            label="Prompt",
            placeholder=EXAMPLE,
            margin=(0, 0, 8, 0),
            stylesheets=[PARTS],
            styles={"flex": "4 1 16rem"},
            max_length=firing.LETTERS,
        )
        self.run = button("Run", lambda event: self._start(), color="primary", margin=(0, 0, 8, 0))
        self.fires = select("Show attention to", {text: name for name, text in FIRES.items()} | {"one token": TOKEN})
        self.token = select("Token")
        self.without = pn.widgets.TextInput(
            label="Next token, without",
            placeholder="the picked head",
            margin=(0, 0, 8, 0),
            stylesheets=[PARTS],
            max_width=380,
            max_length=firing.LETTERS,
            visible=False,
        )
        self.head, self.note, self.said = html(), html(), html()
        self.note.min_height = 34  # pixels: a line comes and goes without moving what is below
        self.picture, self.pattern = picture(), picture()
        self.likely = picture(), picture()
        self.text.param.watch(lambda event: self._entered(), "value")
        self.without.param.watch(lambda event: self._left_out(), "value")
        for widget in (self.fires, self.token):
            widget.param.watch(lambda event: self._chose(), "value")

    def roots(self) -> dict[str, Any]:
        """The parts by the place that the template gives them."""
        line = {"sizing_mode": "stretch_width", "margin": 0, "gap": "0 .8rem", "align_items": "flex-end"}
        asked = pn.FlexBox(self.text, self.run, self.fires, self.token, **line)
        likely = pn.FlexBox(*map(framed, self.likely), sizing_mode="stretch_width", margin=0, gap=".8rem")
        wide = {"sizing_mode": "stretch_width", "margin": 0}
        return {
            "prompt": pn.Column(self.head, asked, self.note, **wide),
            "fires": pn.Column(framed(self.picture), **wide),
            "live": pn.Column(framed(self.pattern), **wide),
            # below the grid: it comes later, and nothing may move under the reader's pointer
            "next": pn.Column(self.without, self.said, likely, **wide),
        }

    def open(self, tree: xr.DataTree | None, wanted: Selection) -> None:
        """Take another file, and with it another model; the prompt stays, and runs again where it had been run."""
        self._tree, self._fired, self._grid = tree, None, None
        name = str(tree.attrs.get("model", "")) if tree is not None else ""
        self.head.object = sentences.prompt_heading(self._models.instead or name)
        self._quiet = True
        if wanted.prompt:
            self.text.value, self.without.value = wanted.prompt, wanted.without
        if wanted.fires in self.fires.options.values():
            self.fires.value = wanted.fires
        self._quiet = False
        self._wanted_token = wanted.token
        self._offer()
        self._draw()
        self.said.object = ""
        for place in self.likely:
            place.object = None
        if tree is not None and (wanted.prompt or self._ran):
            self._start()

    def chosen(self) -> dict[str, str]:
        """What the address keeps."""
        if not self._ran:
            return {}
        token = self.token.value or "" if self.fires.value == TOKEN else ""
        without = self.without.value or ""
        return {"prompt": self._ran, "fires": self.fires.value or "", "token": token, "without": without}

    def show(self, head: str) -> None:
        """Mark another head and show its pattern."""
        self._head = head
        if self._grid is not None:
            self._grid.mark(head)
        self._draw_pattern()
        if self._ran and not self.without.value and self._follows():
            self._predict()

    def _follows(self) -> bool:
        """Whether a click on a head may run the model: not where that is a job for a server."""
        return self._tree is not None and not Record.from_attrs(self._tree.attrs).server

    def _left_out(self) -> None:
        if not self._quiet:
            self._predict()
            self._changed()

    def _predict(self) -> None:
        pn.state.execute(self._say_next)

    async def _say_next(self) -> None:
        """Show what is likeliest next, of the model as it is and without what is left out."""
        tree, text, without = self._tree, self._ran, self.without.value or self._head
        self._next = (tree, text, without)
        found, said = None, ""
        if tree is not None and text:
            found, said = await beside(lambda: self._likely(tree, text, without), "The next token cannot be predicted")
        if self._next != (tree, text, without) or text != self._ran:
            return
        drawn_next = [] if found is None else plots.predictions(found)
        panels = [drawn(one) for one in ([drawn_next] if isinstance(drawn_next, hv.Overlay) else drawn_next)]
        for place, panel in zip(self.likely, [*panels, None, None], strict=False):
            place.object = panel
        self.said.object = sentences.note(said, warn=True)

    def _likely(self, tree: xr.DataTree, text: str, without: str) -> xr.Dataset:
        with self._models.using(tree.attrs) as model:
            return firing.likely(model, text, without)

    def _entered(self) -> None:
        if not self._quiet:
            self._start()

    def _start(self) -> None:
        pn.state.execute(self._run)

    async def _run(self) -> None:
        """Run the prompt beside the page, so that no other tab waits; a later prompt overtakes an earlier one."""
        tree, text = self._tree, self.text.value or ""
        if tree is None:
            return
        self._asked += 1
        asked = self._asked
        self._say(f"Running it on {self._models.instead or tree.attrs.get('model', 'the model')} …")
        fired, said = await beside(lambda: self._fire(tree, text, asked), "The prompt cannot be run")
        if asked != self._asked or tree is not self._tree:
            return
        self._fired, self._ran = fired, text if fired is not None else ""
        self._offer()
        self._say(said, warn=True)
        self._draw()
        self._predict()
        self._changed()

    def _fire(self, tree: xr.DataTree, text: str, asked: int) -> Firing | None:
        firing.check_prompt(text)  # before a model is opened for it
        with self._models.using(tree.attrs) as model:
            return firing.fire(model, text, tree.attrs) if asked == self._asked else None

    def _offer(self) -> None:
        """Offer what the prompt has: its tokens."""
        self._quiet = True
        tokens = self._fired.tokens[0] if self._fired is not None else []
        self.token.options = {
            f"{at}: {printable(token.strip()) or repr(token)}": str(at) for at, token in enumerate(tokens)
        }
        known = list(self.token.options.values())
        self.token.value = self._wanted_token if self._wanted_token in known else next(iter(known), None)
        self._wanted_token = self.token.value or self._wanted_token
        self.fires.visible = self.without.visible = bool(tokens)
        self.token.visible = bool(tokens) and self.fires.value == TOKEN
        self._quiet = False

    def _chose(self) -> None:
        if self._quiet:
            return
        self.token.visible = self.fires.value == TOKEN and self._fired is not None
        self._wanted_token = self.token.value or ""
        self._say("")
        self._draw_grid()
        self._changed()

    def _draw(self) -> None:
        self._draw_grid()
        self._draw_pattern()

    def _draw_grid(self) -> None:
        self._grid = None
        if self._fired is None:
            self.picture.object = None
        else:
            values = self._fired.score(self.fires.value, int(self.token.value or 0))
            self._grid = HeadGrid(plots.head_grid(values, limits=(0, 1)), self._head, self._pick)
            self.picture.object = self._grid.figure
            if not np.isfinite(values.values).any():
                if self.fires.value == "prefix_matching":
                    self._say(sentences.nothing_comes_back(self._fired.tokens[0]))
                else:
                    self._say(NOTHING.get(self.fires.value, "Nothing in this prompt is of that kind."))
            elif self._fired.differs:
                self._say(self._fired.differs)

    def _draw_pattern(self) -> None:
        head = Head.parse(self._head) if self._head else None
        if self._fired is None or head is None or not self._fired.has(head):
            self.pattern.object = None
        else:
            self.pattern.object = drawn(plots.attention(self._fired.pattern(head), self._head))

    def _say(self, text: str, warn: bool = False) -> None:
        self.note.object = sentences.note(text, warn=warn)
