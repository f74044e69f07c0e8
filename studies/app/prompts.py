"""A prompt that is typed, and what every head does on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import panel as pn
import xarray as xr

from ...errors import printable
from ...interventions.declare.sites import Head
from .. import plots
from . import firing
from . import text as sentences
from .figures import HeadGrid, drawn
from .firing import FIRES, TOKEN, Firing, Models
from .selection import Selection
from .widgets import PARTS, beside, button, framed, html, picture, select

EXAMPLE = "apple banana cherry apple banana"
NOTHING = {
    "prefix_matching": "No token of this prompt comes back, so there is nothing to match: type a word twice.",
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
        self.head, self.note = html(), html()
        self.picture, self.pattern = picture(), picture()
        self.text.param.watch(lambda event: self._entered(), "value")
        for widget in (self.fires, self.token):
            widget.param.watch(lambda event: self._chose(), "value")

    def roots(self) -> dict[str, Any]:
        """The parts by the place that the template gives them."""
        line = {"sizing_mode": "stretch_width", "margin": 0, "gap": "0 .8rem", "align_items": "flex-end"}
        asked = pn.FlexBox(self.text, self.run, self.fires, self.token, **line)
        return {
            "prompt": pn.Column(self.head, asked, self.note, sizing_mode="stretch_width", margin=0),
            "fires": pn.Column(framed(self.picture), sizing_mode="stretch_width", margin=0),
            "live": pn.Column(framed(self.pattern), sizing_mode="stretch_width", margin=0),
        }

    def open(self, tree: xr.DataTree | None, wanted: Selection) -> None:
        """Take another file, and with it another model; the prompt stays, and runs again where it had been run."""
        self._tree, self._fired, self._grid = tree, None, None
        name = str(tree.attrs.get("model", "")) if tree is not None else ""
        self.head.object = sentences.prompt_heading(self._models.instead or name)
        self._quiet = True
        if wanted.prompt:
            self.text.value = wanted.prompt
        if wanted.fires in self.fires.options.values():
            self.fires.value = wanted.fires
        self._quiet = False
        self._wanted_token = wanted.token
        self._offer()
        self._draw()
        if tree is not None and (wanted.prompt or self._ran):
            self._start()

    def chosen(self) -> dict[str, str]:
        """What the address keeps."""
        if not self._ran:
            return {}
        token = self.token.value or "" if self.fires.value == TOKEN else ""
        return {"prompt": self._ran, "fires": self.fires.value or "", "token": token}

    def show(self, head: str) -> None:
        """Mark another head and show its pattern."""
        self._head = head
        if self._grid is not None:
            self._grid.mark(head)
        self._draw_pattern()

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
        self.fires.visible, self.token.visible = bool(tokens), bool(tokens) and self.fires.value == TOKEN
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
