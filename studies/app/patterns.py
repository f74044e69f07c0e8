"""The pattern of the picked head: as the file has it, or else computed on prompts of the study."""

from __future__ import annotations

from collections.abc import Callable

import panel as pn
import xarray as xr

from ...interventions.declare.sites import Head
from .. import plots
from . import firing, head_facts, text
from .figures import drawn
from .firing import Firing, Models
from .widgets import beside, button, framed, html, picture, select

SHORT = "short"


class PatternView:
    """A select box of prompts, the pattern, and a line on where it comes from.

    Parameters
    ----------
    models : Models
    changed : callable
        Called when another prompt was chosen.
    """

    def __init__(self, models: Models, changed: Callable[[], None]) -> None:
        self._models, self._changed = models, changed
        self._tree: xr.DataTree | None = None
        self._stored: xr.Dataset | None = None
        self._fired: dict[bool, Firing] = {}
        self._head, self._quiet = "", False
        self.prompts, self.picture, self.note = select("Attention on", shared=False), picture(), html()
        self.frame = framed(self.picture)
        self.load = button("Load the model", lambda event: self._start(), visible=False, margin=(6, 0))
        self.prompts.param.watch(lambda event: self._chose(), "value")
        self.view = pn.Column(self.prompts, self.note, self.load, self.frame, sizing_mode="stretch_width", margin=0)

    def open(self, tree: xr.DataTree | None, wanted: str = "") -> None:
        """Take another file."""
        self._tree, self._fired = tree, {}
        self._stored = head_facts.stored_patterns(tree) if tree is not None else None
        options = {f"prompt {number + 1} of the study": str(number) for number in range(firing.PROMPTS)}
        if self._stored is not None:
            options = {"the short prompt of the file": SHORT} | options
        self._quiet = True
        self.prompts.options = options
        self.prompts.value = wanted if wanted in options.values() else next(iter(options.values()))
        self._quiet = False

    def chosen(self) -> dict[str, str]:
        """What the address keeps."""
        first = next(iter(self.prompts.options.values()), "")
        return {"pattern": "" if self.prompts.value == first else self.prompts.value or ""}

    def show(self, head: str) -> None:
        """Show the pattern of a head, at once where it is at hand, and else when it has been computed."""
        self._head, self.load.visible, self.frame.loading = head, False, False
        self.prompts.visible = bool(head)
        if not head or self._tree is None:
            self.picture.object, self.note.object = None, ""
        elif (
            self.prompts.value == SHORT and self._stored is not None and head in map(str, self._stored["shown"].values)
        ):
            self._draw(self._stored, "From the file.")
        elif (self.prompts.value == SHORT) in self._fired:
            self._draw_fired()
        elif self._models.ready(str(self._tree.attrs.get("model", ""))):
            self._start()
        else:
            self.picture.object, self.load.visible = None, True
            name = str(self._tree.attrs.get("model", "the model"))
            self.load.label = f"Load {name}"
            self.note.object = text.note(f"The file holds no pattern of {head} on this prompt; {name} can compute it.")

    def _chose(self) -> None:
        if not self._quiet:
            self.show(self._head)
            self._changed()

    def _start(self) -> None:
        pn.state.execute(self._compute)

    async def _compute(self) -> None:
        """Open the model and run it beside the page, so that no other tab waits."""
        tree, short = self._tree, self.prompts.value == SHORT
        if tree is None:
            return
        self.load.visible, self.frame.loading = False, True
        self.note.object = text.note(f"Computing the patterns with {tree.attrs.get('model', 'the model')} …")
        fired, said = await beside(lambda: self._fire(tree, short), "The pattern cannot be computed")
        if tree is not self._tree:  # another file was chosen meanwhile
            return
        if fired is None:
            self.picture.object, self.frame.loading = None, False
            self.note.object = text.note(said, warn=True)
            return
        self._fired[short] = fired
        if (self.prompts.value == SHORT) == short:
            self.show(self._head)

    def _fire(self, tree: xr.DataTree, short: bool) -> Firing:
        with self._models.using(tree.attrs) as model:
            return firing.fire_study(model, tree, short)

    def _draw_fired(self) -> None:
        short = self.prompts.value == SHORT
        fired = self._fired[short]
        example = 0 if short else min(int(self.prompts.value), len(fired.tokens) - 1)
        said = "Computed now, on the prompt of the file." if short else "Computed now, on a prompt that was measured."
        self._draw(fired.pattern(Head.parse(self._head), example), f"{said} {fired.differs}".strip())

    def _draw(self, ds: xr.Dataset, said: str) -> None:
        self.picture.object = drawn(plots.attention(ds, self._head))
        self.note.object = text.note(said)
