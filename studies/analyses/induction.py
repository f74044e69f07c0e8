"""The flagship study: the whole induction-head analysis of a model, from behaviour to circuit, as one result tree."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...errors import MOST_DRAWS, MOST_STEPS, DeclarationError, HeadwiseError, ModelError, ResultError, whole
from ...interventions.declare import codec
from ...interventions.declare.sites import Head
from ..measuring import context
from ..storage import unfinished
from ..storage.provenance import as_attrs, inputs_of, provenance
from ..storage.registry import TASKS
from ..tasks.tasks import RepeatedTokens
from . import ablation, attribution, behaviour, composition, heads, patching, word_lists
from .conclusion import conclude
from .estimates import SWEEPS, estimates_beside, prices
from .paths import strongest_pairs
from .prices import StudyPlan, price_study

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ...interventions.models.identity import Identity
    from ...interventions.models.model import Model

STAGES = {
    "behaviour": "loss and accuracy by position",
    "heads": "attention scores of every head",
    "patterns": "what the top heads attend to",
    "ablation": "every head ablated",
    "sets": "sets of heads against random sets",
    "patching": "q, k and v of every head patched",
    "composition": "composition between heads",
    "attribution": "what heads write towards the answer",
    "words": "words in context",
    "estimates": "estimates from gradients against what was measured",
}
TOP = 3
"""Heads of each kind whose patterns are kept: those with the role, or the best one where none has it."""
ALPHA = 0.05
"""False discovery rate for standing out from untrained heads."""


@dataclass(frozen=True)
class InductionStudy:
    """The induction-head analysis of a GPT-2-like model.

    Parameters
    ----------
    n, length, seed, bos
        Of the repeated random tokens: prompts, half length, seed, BOS in front.
    threshold : float
        Attention score from which a head counts as a head of that kind.
    draws : int
        Random sets of heads of each control.
    untrained : int
        Models with random weights that scores are compared with, 20 at least.
    first : int
        Prompts that the sweeps start with: ablation of every head, patching, and the causal check of composition; sets
        start with half as many (4 at least), and untrained models are measured on these alone.
        They are doubled, up to `n`, until the verdicts of the stage are settled. Intervals and p-values over prompts
        allow for looking more than once (Bonferroni over the looks, see `intervals.looks`), so that the error rate is
        the one that is stated. With ``first=n`` all prompts are measured at once.

    Raises
    ------
    DeclarationError
        A value is not possible.

    Examples
    --------
    >>> tree = hw.InductionStudy(n=2, length=8, draws=2).run(hw.load("words-2l"))
    >>> list(tree.children)[:5]
    ['behaviour', 'heads', 'patterns', 'ablation', 'sets']
    >>> hw.InductionStudy.from_json(tree.attrs["study"]) == hw.InductionStudy(n=2, length=8, draws=2)
    True
    """

    n: int = 32
    length: int = 25
    seed: int = 0
    bos: bool = False
    threshold: float = 0.4
    draws: int = 50
    untrained: int = 20
    first: int = 8

    def __post_init__(self) -> None:
        whole(self.n, "n, the number of prompts,", low=2)  # one prompt has no interval
        for name, value in vars(self.task).items():
            if name in ("n", "length", "seed", "bos"):
                object.__setattr__(self, name, value)
        object.__setattr__(self, "draws", whole(self.draws, "draws", low=1, high=MOST_DRAWS))
        object.__setattr__(self, "untrained", whole(self.untrained, "untrained", high=MOST_STEPS))
        object.__setattr__(self, "first", whole(self.first, "first, the number of prompts to start with,", low=2))
        if not isinstance(self.threshold, float | int) or not 0 < self.threshold < 1:
            raise DeclarationError(f"threshold={self.threshold}: a score lies between 0 and 1")
        heads.check_untrained(self.untrained, ALPHA)

    @property
    def task(self) -> RepeatedTokens:
        """The repeated random tokens it measures on."""
        return RepeatedTokens(self.n, self.length, self.seed, self.bos)

    def plan(self, model: Model, *, timed: bool = True) -> StudyPlan:
        """What `run` would do on a model, stage by stage, without doing it.

        Parameters
        ----------
        model : Model
        timed : bool
            Run a few plain forward passes to estimate the time; not where the model is on a server.

        Returns
        -------
        StudyPlan
            ``print`` explains it; its prices come from the plans that `run` carries out.

        Raises
        ------
        DeclarationError
            The prompts do not fit the model.
        ModelError
            Its blocks are called, not laid open.

        Examples
        --------
        >>> plan = hw.InductionStudy().plan(hw.load("words-2l"), timed=False)
        >>> round(plan.least["ablation"].forwards), round(plan.most["ablation"].forwards)
        (192, 770)
        """
        _check(model)
        self.task.draw(model)
        return price_study(self, model, timed=timed)

    def run(
        self,
        model: Model,
        progress: Callable[[str], None] | bool | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
        executor: Executor | None = None,
    ) -> xr.DataTree:
        """Run the whole analysis.

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
        executor : concurrent.futures.Executor, optional
            Runs the passes of its sweeps on workers: see `headwise.measure`. Weights, estimates and untrained models
            that scores are compared with stay here.

        Returns
        -------
        DataTree
            One group for each stage (``estimates`` holds two, ``ablation`` and ``patching``; it and ``attribution`` are
            left out where a server runs jobs apart from the weights), and the conclusion as JSON in the attributes.

        Raises
        ------
        DeclarationError
            The prompts do not fit the model, or an executor cannot run its passes.
        ModelError
            Its blocks are called, not laid open; a self-check failed; or an untrained model to compare with does not
            fit in memory.
        ResultError
            `out` cannot be written, or another process is writing it.
        """
        _check(model)
        self.task.draw(model)  # what does not fit the model is refused before any forward pass
        context.check_executor(model, executor)
        heads.check_room(model)
        from ...interventions.begin import begin

        if out is None:
            with (
                begin(model, check=False) as call,
                context.using(executor=executor),
                context.stages(STAGES, progress) as say,
            ):
                return self._run(model, call.identity, say)
        with unfinished.keeping(out, resume) as kept, begin(model, check=False, anew=True, ledger=kept) as call:
            about = {"title": self._title(model), "study": self.to_json(), "task": self._task()}
            kept.describe(provenance(model, call.identity) | about, call.identity)
            inputs = inputs_of(model, call.identity, self.to_json())
            if (there := kept.finished(inputs, call.identity)) is not None:
                return there

            sizes = {"layer": model.shape.layers, "head": model.shape.heads}

            def keep(name: str, make: Callable[[], xr.Dataset]) -> xr.Dataset:
                return kept.stage(f"{inputs}-{name}", make, call.identity, sizes)

            try:
                with context.using(executor=executor, store=kept), context.stages(STAGES, progress) as say:
                    tree = self._run(model, call.identity, say, keep)
            except HeadwiseError:
                raise
            except (LookupError, ValueError, TypeError, AttributeError) as error:
                if not kept.taken:
                    raise
                raise ResultError(
                    f"{kept.folder} may hold stages that are not what this study makes ({error}): remove it, or take "
                    "nothing from it, with resume=False or --fresh"
                ) from error
            tree.attrs["inputs"] = inputs
            kept.finish(tree)
            return tree

    def _run(
        self,
        model: Model,
        identity: Identity,
        progress: Callable[[str], None],
        keep: Callable[[str, Callable[[], xr.Dataset]], xr.Dataset] = lambda name, make: make(),
    ) -> xr.DataTree:
        """Run it; `keep` gets each stage's name and what makes it, and gives what was made, now or before."""
        task = self.task
        seconds: dict[str, float] = {}
        parts: dict[str, xr.Dataset] = {}

        def timed(make: Callable[[], xr.Dataset]) -> xr.Dataset:
            """Make a part, and note in it how many seconds that took."""
            begun = time.monotonic()
            made = make()
            return made.assign_attrs(stage_seconds=round(time.monotonic() - begun, 3))

        def stage(name: str, make: Callable[[], xr.Dataset], group: str | None = None) -> None:
            """Run a stage, or take it as it is stored."""
            if group is None:
                progress(name)
            with context.using(label=STAGES[name]):
                made = keep((group or name).replace("/", "-"), lambda: timed(make))
            seconds[name] = round(seconds.get(name, 0.0) + float(made.attrs.pop("stage_seconds")), 3)
            parts[group or name] = made if group else made.assign_attrs(long_name=STAGES[name])

        stage("behaviour", lambda: behaviour.by_position(model, task))
        stage("heads", lambda: self._heads(model))
        found = {
            "induction": heads.heads_with(parts["heads"], "induction", "induction"),
            "previous-token": heads.heads_with(parts["heads"], "previous-token", "previous_token"),
        }
        stage("patterns", lambda: behaviour.patterns(model, task, self._shown(parts["heads"])))
        stage("ablation", lambda: ablation.every_head(model, task, first=self.first))
        stage("sets", lambda: self._sets(model, found, parts["ablation"]))
        stage("patching", lambda: patching.qkv_of_every_head(model, task, found["induction"], first=self.first))
        stage("composition", lambda: self._composition(model, found["previous-token"], found["induction"]))
        if model.has_gradients:  # as these, it cannot be had of a server that runs jobs apart from the weights
            stage("attribution", lambda: self._attribution(model, found["induction"]))
        score = parts["heads"]["induction"].mean("example")
        stage("words", lambda: word_lists.words_in_context(model, found["induction"], score))
        if model.has_gradients:
            stage("estimates", xr.Dataset)  # two groups, and nothing beside them: their metrics differ
        for name in SWEEPS if model.has_gradients else ():
            if prices(model, task, name, parts[name].sizes["example"]).chosen:
                make = partial(estimates_beside, model, task, name, parts[name])
                stage("estimates", make, f"estimates/{name}")

        tree = xr.DataTree.from_dict({f"/{name}": part for name, part in parts.items()})
        tree.attrs = provenance(model, identity) | as_attrs(
            {
                "title": self._title(model),
                "study": self.to_json(),
                "task": self._task(),
                "heads": json.dumps({role: [str(head) for head in members] for role, members in found.items()}),
                "seconds": round(sum(seconds.values()), 3),
                "seconds_by_stage": json.dumps(seconds),
            }
        )
        tree.attrs["conclusion"] = json.dumps([asdict(finding) for finding in conclude(tree)])
        return tree

    def _heads(self, model: Model) -> xr.Dataset:
        return heads.describe_heads(
            model,
            self.task,
            threshold=self.threshold,
            alpha=ALPHA,
            untrained=self.untrained,
            seed=self.seed,
            untrained_task=heads.task_of_untrained(self.task, self.first),
        )

    def _shown(self, scores: xr.Dataset) -> list[tuple[Head, str]]:
        shown: dict[Head, str] = {}
        for kind, role in (("induction", "induction"), ("previous_token", "previous-token")):
            best = heads.heads_with(scores, role, kind)[:TOP]
            for head in best or [head for head, _ in heads.ranked(scores[kind].mean("example"), 1)]:
                shown.setdefault(head, kind)
        return list(shown.items())

    def _sets(self, model: Model, found: dict[str, list[Head]], alone: xr.Dataset) -> xr.Dataset:
        if not (sets := ablation.sets_of(found)):
            return xr.Dataset()
        return ablation.sets_against_controls(
            model,
            self.task,
            sets,
            draws=self.draws,
            seed=self.seed,
            first=ablation.first_of_sets(self.n, self.first),
            alone=alone,
        )

    def _composition(self, model: Model, senders: list[Head], receivers: list[Head]) -> xr.Dataset:
        scores = composition.composition_scores(model, seed=self.seed)
        causal = composition.causal_check(
            model,
            self.task,
            senders,
            receivers,
            strongest_pairs(scores),
            draws=self.draws,
            seed=self.seed,
            first=self.first,
        )
        pairs = [(one, two) for one in senders for two in receivers if one.layer < two.layer]
        own = [composition.pair_scores(scores, senders, receivers)] if pairs else []
        return xr.merge([scores, *own, causal], combine_attrs="drop_conflicts")

    def _attribution(self, model: Model, heads: list[Head]) -> xr.Dataset:
        return attribution.what_heads_write(model, self.task, heads, draws=self.draws, seed=self.seed)

    def _task(self) -> str:
        return codec.to_json(self.task, TASKS)

    @staticmethod
    def _title(model: Model) -> str:
        return f"Induction heads of {model.name}" + ("" if model.step is None else f" at step {model.step}")

    def to_json(self) -> str:
        """The study as JSON text."""
        return codec.to_json(self, {"InductionStudy": InductionStudy})

    @classmethod
    def from_json(cls, text: str) -> InductionStudy:
        """The study that `to_json` wrote. One that does not say with how many prompts it starts took all at once."""

        def made(**fields: Any) -> InductionStudy:
            return cls(**({"first": fields.get("n", cls.n)} | fields))

        study = codec.from_json(text, {"InductionStudy": made})
        if not isinstance(study, cls):
            raise DeclarationError("this JSON does not hold an InductionStudy")
        return study


def _check(model: Model) -> None:
    """Refuse a model of which weights of heads cannot be had."""
    if model.shape.called:
        raise ModelError(
            f"the induction study needs weights of heads, and blocks of {model.name} are called, not laid open: "
            f"{model.family.why_called}. Possible are measurements and captures, hw.measure and hw.capture, of "
            f"{', '.join(map(str, model.sites))}"
        )
