"""The study of induction on text that a model has not read: gains, heads, ablation, and where it fails."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ...errors import LARGEST_SEED, MOST_DRAWS, MOST_PROMPTS, MOST_STEPS, DeclarationError, whole
from ...interventions.declare import codec
from ...interventions.declare.sites import LEFT_OUT, Head
from ..analyses.heads import check_room, check_untrained
from ..analyses.induction import ALPHA
from ..measuring import context as running
from ..storage import unfinished
from ..storage.provenance import as_attrs, inputs_of, provenance
from . import measured, own_prompts
from .findings import conclude
from .measured import BINS, Text
from .price import TextPlan, price_text
from .windows import Windows, windows

if TYPE_CHECKING:
    from ...interventions.models.identity import Identity
    from ...interventions.models.model import Model

STAGES = {
    "occurrences": "the loss at first and second occurrences",
    "replaced": "the loss where the first occurrence is replaced",
    "heads": "what every head attends to",
    "ablation": "induction heads ablated",
    "prompts": "prompts of your own",
}
METHODS = ("mean", "resample")


@dataclass(frozen=True)
class TextInduction:
    """Induction on text: what a second occurrence of a token pair gains, and which heads that rests on.

    The text is cut into windows. At a *second occurrence* ``t`` of a window ``x``, the pair ``(x[t-1], x[t])`` stood in
    the window exactly once before, ending at ``j < t - 1`` (the *first occurrence*), and ``x[t]`` is the only token
    that followed a copy of ``x[t-1]`` before (one candidate). With the loss ``l(t) = -ln p(x[t] | x[<t])``:

    ==================  ==============================================================================================
    gain                ``l(j) - l(t)``. It also holds what more context gives, and what frequent pairs do
    causal gain         ``l(t | x[j-1], x[j] replaced) - l(t)``: what the first occurrence itself is worth. The tokens
                        that replace it are a pair of the text's other windows, with neither token of the old pair
    elsewhere           ``l(t | another pair of tokens replaced by the same one) - l(t)``: what any replacement does
    net gain            causal gain less elsewhere
    ==================  ==============================================================================================

    A head's *attention to the first successor* is its mean attention from ``t - 1`` (the query that predicts ``t``) to
    ``j``; the control is its attention over the same distance from other queries of the window, to tokens that follow
    no copy of them. Induction heads are found on repeated random tokens, as `InductionStudy` finds them, and ablated on
    the text together, beside as many random other heads.

    Intervals are 95% studentised bootstrap intervals of ratios of sums over files, or over windows where the windows
    are of fewer than five files: occurrences of one file are not independent.

    Parameters
    ----------
    text : str, optional
        A file or folder of text that the model has not read. Left out, the model's own folder ``held_out``.
    context : int, optional
        Tokens of a window, which no file's end crosses; left out, as many as the model reads.
    n : int
        Windows that are drawn; all where there are fewer.
    seed : int
        Of the windows, replaced tokens, random tokens and random heads.
    pairs : int
        Occurrences with one candidate whose first is replaced, and as many with several.
    threshold : float
        Induction score on random tokens from which a head counts as an induction head.
    controls : int
        Random sets of as many heads in the same layers, and as many over all layers; 100 or more, all distinct sets
        where there are fewer.
    ablation : {"mean", "resample"}
        What heads are replaced by: the mean over other windows at the same position, or another window's.
    untrained : int
        Models with random weights that scores on random tokens are compared with, 20 at least.
    prompts : str, optional
        A text file with one prompt in a line, whose last word stands in it once before: ``Harry Potter went home.
        Then Harry``. Measured is the first token of what followed that word.

    Raises
    ------
    DeclarationError
        A value is not possible. That there is text, and that pairs recur in it, is seen when the model is known.

    Examples
    --------
    >>> from pathlib import Path
    >>> words = "dog cat apple tree dog cat bread house river tree dog apple"
    >>> _ = Path("words.txt").write_text(f"{words} " * 8)
    >>> study = hw.TextInduction("words.txt", context=12, n=8, pairs=8)
    >>> print(study.plan(hw.load("words-2l"), timed=False).line)  # doctest: +ELLIPSIS
    about ... plain forward passes (...
    """

    text: str | None = None
    context: int | None = None
    n: int = 32
    seed: int = 0
    pairs: int = 256
    threshold: float = 0.4
    controls: int = 100
    ablation: str = "mean"
    untrained: int = 20
    prompts: str | None = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        for name in ("text", "prompts"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, str | os.PathLike):
                raise DeclarationError(f"{name}={given!r}: give the path of a file" + " or folder" * (name == "text"))
            object.__setattr__(self, name, None if given is None else os.fspath(given))
        bounds = {
            "n": ("n, the number of windows,", 2, MOST_PROMPTS),
            "seed": ("a seed", 0, LARGEST_SEED),
            "pairs": ("pairs, the occurrences that are replaced,", 2, MOST_PROMPTS),
            "controls": ("controls, the random sets,", 100, MOST_DRAWS),
            "untrained": ("untrained", 0, MOST_STEPS),
        }
        for name, (what, low, high) in bounds.items():
            object.__setattr__(self, name, whole(getattr(self, name), what, low=low, high=high))
        if self.context is not None:
            object.__setattr__(self, "context", whole(self.context, "context, the tokens of a window,", low=4))
        if not isinstance(self.threshold, float | int) or not 0 < self.threshold < 1:
            raise DeclarationError(f"threshold={self.threshold}: a score lies between 0 and 1")
        if self.ablation not in METHODS:
            raise DeclarationError(f"ablation={self.ablation!r}: possible are 'mean' and 'resample'")
        check_untrained(self.untrained, ALPHA)

    def draw(self, model: Model) -> Text:
        """The windows, and the pairs that recur in them.

        Parameters
        ----------
        model : Model

        Returns
        -------
        Text

        Raises
        ------
        DeclarationError
            There is no text, or no pair recurs in it.
        """
        return _checked(windows(model, self.text, self.context, self.n, self.seed))

    def plan(self, model: Model, *, timed: bool = True) -> TextPlan:
        """What `run` would do on a model, stage by stage, without doing it.

        Parameters
        ----------
        model : Model
        timed : bool
            Run a few plain forward passes to estimate the time; not where the model is on a server.

        Returns
        -------
        TextPlan
            ``print`` explains it. The ablation is priced for two induction heads.

        Raises
        ------
        DeclarationError
            There is no text, no pair recurs in it, or a prompt cannot be used.
        """
        return price_text(self, model, self.draw(model), len(self._lines(model)), timed=timed)

    def run(
        self,
        model: Model,
        progress: Callable[[str], None] | bool | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
    ) -> xr.DataTree:
        """Run the study.

        Parameters
        ----------
        model : Model
        progress : callable or bool, optional
            Called with the key of each stage (see `STAGES`) when it starts. True says them as they start, as a notebook
            does when this is left out; False shows nothing.
        out : path, optional
            NetCDF file to write. Until it is whole, finished stages and passes are kept beside it, and the same call
            again computes only what is missing: see `headwise.measure`.
        resume : bool
            False takes nothing from what is there.

        Returns
        -------
        DataTree
            The groups ``windows``, ``occurrences``, ``replaced``, ``gains``, ``distance``, ``candidates``,
            ``position``, ``heads``, ``ablation`` and, where there are any, ``prompts``; what was found as JSON in the
            attribute ``conclusion``.

        Raises
        ------
        DeclarationError
            There is no text, no pair recurs in it, or a prompt cannot be used.
        ModelError
            A self-check failed, or an untrained model to compare with does not fit in memory.
        ResultError
            `out` cannot be written, or another process is writing it.
        """
        return self._with(model, self.draw(model), self._lines(model), progress, out, resume)

    def again(self, model: Model, stored: xr.DataTree, progress: Callable[[str], None]) -> xr.DataTree:
        """Run the study on the windows and prompts that a result of it holds, wherever its text is now."""
        held = stored["windows"].to_dataset()
        parts = {name: held[name].values for name in ("tokens", "start", "texts", "others")}
        files, digest = tuple(map(str, held["file"].values)), str(held.attrs["sha256"])
        cut = Windows(
            parts["tokens"], files, parts["start"], parts["texts"], parts["others"], int(held.attrs["possible"]), digest
        )
        own = stored["prompts"].to_dataset()["prompt"].values if "prompts" in stored.children else ()
        lines = [str(one) for one in own]
        return self._with(model, _checked(cut), lines, progress, None, True)

    def _with(
        self,
        model: Model,
        text: Text,
        lines: list[str],
        progress: Callable[[str], None] | bool | None,
        out: str | os.PathLike[str] | None,
        resume: bool,
    ) -> xr.DataTree:
        check_room(model)
        from ...interventions.begin import begin

        names = {name: words for name, words in STAGES.items() if lines or name != "prompts"}
        if out is None:
            with begin(model, check=False) as call, running.stages(names, progress) as say:
                return self._run(model, text, lines, call.identity, say)
        with unfinished.keeping(out, resume) as kept, begin(model, check=False, anew=True, ledger=kept) as call:
            about = self._about(model, text.cut)
            kept.describe(provenance(model, call.identity) | about, call.identity)
            inputs = inputs_of(model, call.identity, json.dumps(about), *lines)
            if (there := kept.finished(inputs, call.identity)) is not None:
                return there

            def keep(name: str, make: Callable[[], xr.Dataset]) -> xr.Dataset:
                return kept.stage(f"{inputs}-{name}", make, call.identity)

            with running.using(store=kept), running.stages(names, progress) as say:
                tree = self._run(model, text, lines, call.identity, say, keep)
            tree.attrs["inputs"] = inputs
            kept.finish(tree)
            return tree

    def _run(
        self,
        model: Model,
        text: Text,
        lines: list[str],
        identity: Identity,
        progress: Callable[[str], None],
        keep: Callable[[str, Callable[[], xr.Dataset]], xr.Dataset] = lambda name, make: make(),
    ) -> xr.DataTree:
        """Run it; `keep` gets each stage's name and what makes it, and gives what was made, now or before."""
        parts = {"windows": _windows(text.cut)}
        seconds: dict[str, float] = {}

        def stage(name: str, make: Callable[[], xr.Dataset]) -> xr.Dataset:
            """Run a stage, or take it as it is stored."""
            progress(name)

            def timed() -> xr.Dataset:
                begun = time.monotonic()
                return make().assign_attrs(stage_seconds=round(time.monotonic() - begun, 3))

            with running.using(label=STAGES[name]):
                made = keep(name, timed)
            seconds[name] = float(made.attrs.pop("stage_seconds"))
            parts[name] = made.assign_attrs(long_name=STAGES[name])
            return parts[name]

        before = stage("occurrences", lambda: measured.occurrences(model, text))
        after = stage("replaced", lambda: measured.replaced(model, text, before, self.pairs, self.seed))
        heads = stage("heads", lambda: self._heads(model, text))
        found = measured.induction_heads(heads)
        stage("ablation", lambda: self._ablation(model, text, found, before))
        if lines:
            stage("prompts", lambda: own_prompts.own_prompts(model, lines, self.seed))
        parts["gains"] = measured.gains(text, before, after)
        parts |= {name: measured.binned(text, before, after, name) for name in BINS}
        tree = xr.DataTree.from_dict({f"/{name}": part for name, part in parts.items()})
        more = {"seconds": round(sum(seconds.values()), 3), "seconds_by_stage": json.dumps(seconds)}
        tree.attrs = provenance(model, identity) | self._about(model, text.cut) | as_attrs(more)
        tree.attrs["heads"] = json.dumps({"induction": [str(head) for head in found]})
        tree.attrs["conclusion"] = json.dumps([asdict(finding) for finding in conclude(tree)])
        return tree

    def _heads(self, model: Model, text: Text) -> xr.Dataset:
        return measured.heads(model, text, threshold=self.threshold, untrained=self.untrained, seed=self.seed)

    def _ablation(self, model: Model, text: Text, found: list[Head], before: xr.Dataset) -> xr.Dataset:
        return measured.ablation(
            model, text, found, method=self.ablation, draws=self.controls, seed=self.seed, whole=before
        )

    def _lines(self, model: Model) -> list[str]:
        """The prompts of the file, each seen to be one that can be used."""
        lines = [] if self.prompts is None else own_prompts.read_lines(self.prompts)
        for line in lines:
            own_prompts.parse(model, line)
        return lines

    def _about(self, model: Model, cut: Windows) -> dict[str, str]:
        """What was asked for, as attributes."""
        title = f"Induction on text, {model.name}" + ("" if model.step is None else f" at step {model.step}")
        return {"title": title, "study": self.to_json(), "task": json.dumps({"repr": repr(cut)})}

    def to_json(self) -> str:
        """The study as JSON text."""
        return codec.to_json(self, {"TextInduction": TextInduction})

    @classmethod
    def from_json(cls, text: str) -> TextInduction:
        """The study that `to_json` wrote."""
        study = codec.from_json(text, {"TextInduction": TextInduction})
        if not isinstance(study, cls):
            raise DeclarationError("this JSON does not hold a TextInduction")
        return study


def _checked(cut: Windows) -> Text:
    """The text with its pairs; refused where none recurs."""
    text = Text.of(cut)
    single = int((text.found.candidates == 1).sum())
    if single < 2 or not len(text.single):
        n, size = cut.tokens.shape
        raise DeclarationError(
            f"{single} token pairs recur once in the {n} windows of {size} tokens, with one candidate, and two are "
            f"needed: give text in which pairs recur, longer windows (context=) or more (n=, of {cut.possible})"
        )
    return text


def _windows(cut: Windows) -> xr.Dataset:
    """The windows as they are stored."""
    ds = xr.Dataset(attrs={"sha256": cut.sha256, "possible": cut.possible, "long_name": "windows of the text"})
    ds["tokens"] = (("window", "position"), cut.tokens, {"long_name": "token ids"})
    ds["texts"] = (("window", "position"), cut.texts, {"long_name": "tokens as text"})
    ds["file"] = ("window", np.asarray(cut.files, dtype=object), {"long_name": "file"})
    ds["start"] = ("window", cut.starts, {"long_name": "where the window begins in its file, in tokens"})
    ds["others"] = (
        ("other", "position"),
        cut.others,
        {"long_name": "token ids of windows for mean and resample ablation"},
    )
    return ds
