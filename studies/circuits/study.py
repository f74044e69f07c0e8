"""The study of a circuit: scores of edges, curves, the circuit itself, circuits of nodes, and how sure they are."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...errors import LARGEST_SEED, MOST_DRAWS, AdviceWarning, DeclarationError, choices, whole
from ...interventions.declare import codec
from ...interventions.declare.changes import MEAN
from ...interventions.declare.circuits import ABS, Circuit
from ...interventions.declare.edges import EdgePatches
from ...interventions.declare.graph import Graph
from ...interventions.declare.sites import LEFT_OUT
from ...interventions.plan.validate import how_to_have
from ...metrics.card import Metric
from ..measuring import context
from ..measuring.labels import task_json
from ..measuring.request import check_estimable, chosen_metrics
from ..storage import unfinished
from ..storage.provenance import as_attrs, inputs_of, provenance
from ..storage.registry import TASKS, metric_of, written_name
from ..tasks.tasks import RepeatedTokens, Task
from . import kept, nodes
from .edge_scores import check_options
from .edges import edges_of
from .findings import conclude
from .inclusion import MOST_RESAMPLES, edge_inclusion
from .price import CircuitPlan, price_circuit

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ...interventions.models.identity import Identity
    from ...interventions.models.model import Model

STAGES = {
    "edges": "scores of all edges",
    "curve": "circuits at MIB's shares of all edges",
    "numbers": "circuits by number of edges",
    "random": "random circuits at the same shares",
    "circuit": "the circuit, what is outside of it, and random ones as large",
    "nodes": "the smallest set of heads",
    "inclusion": "edges chosen again from prompts drawn again",
}


@dataclass(frozen=True)
class CircuitStudy:
    """The circuit of a behaviour at the level of edges: how small it is, how much it keeps, and how sure its edges are.

    Every edge is scored (`headwise.edge_scores`). Circuits of the edges with the largest scores, of growing size, are
    run: edges outside of a circuit carry the values of `source`. *Faithfulness* is the share of the behaviour that
    is kept, ``(m(circuit) - m(empty)) / (m(model) - m(empty))`` of mean metrics; see `headwise.circuit_curve`. The
    circuit that is looked at closely is that of the smallest number of edges, by absolute scores and pruned, that keeps
    `share`: the first of the numbers of the curves that does, of 29 between it and the one before, and so on, until the
    number before it is one less. The behaviour is what the whole model has more of than the empty circuit: signed
    selection takes higher for better where the mean of the whole model is above that of the empty circuit, and else
    lower; that this is not the way in which the metric is better is warned of.

    Parameters
    ----------
    task : Task
        With the runs ``clean`` and, but for ``"mean"``, `source`.
    metric : Metric or str
        Of the logits, such as ``"logit_diff"``.
    estimator : str
        Of the scores, as for `headwise.edge_scores`: ``"exact"`` measures each edge.
    steps : int, optional
        Of an integrated estimate.
    source : str
        What edges outside of a circuit carry, and an edge that is scored: that of a run, such as ``"corrupted"``, or
        ``"mean"``, means over the reference prompts.
    share : float
        Of the behaviour that the circuit, and the smallest set of heads, must keep.
    n : int, optional
        Edges of the circuit, before it is pruned; left out, as many as keep `share`.
    draws : int
        Random circuits of each size, and random sets of heads.
    resamples : int
        Draws of prompts, for how often each edge is chosen.
    seed : int
        Of all that is drawn.
    then_exact : int
        Of an estimate, how many edges with the largest scores are measured exactly.
    others : Task, optional
        Other prompts on which the circuit is judged besides; of `RepeatedTokens`, those of the next seed.

    Raises
    ------
    DeclarationError
        A value is not possible. What a model cannot have is refused when it runs.

    Examples
    --------
    >>> task = hw.RepeatedTokens(n=4, length=8)
    >>> study = hw.CircuitStudy(task, "logit_diff", draws=2, resamples=20)
    >>> hw.CircuitStudy.from_json(study.to_json()) == study
    True
    """

    task: Task
    metric: Metric | str = "logit_diff"
    estimator: str = "exact"
    steps: int | None = None
    source: str = "corrupted"
    share: float = 0.9
    n: int | None = None
    draws: int = 20
    resamples: int = 200
    seed: int = 0
    then_exact: int = field(default=0, metadata=LEFT_OUT)
    others: Task | None = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        for name in ("task", "others"):
            given = getattr(self, name)
            if not (hasattr(given, "draw") or (name == "others" and given is None)):
                raise DeclarationError(f"{name}={given!r}: give a task, such as RepeatedTokens(n=32, length=25)")
        found = chosen_metrics(self.metric)
        if len(found) > 1 or found[0].kind != "logits":
            names = choices(metric.name for metric in found)
            raise DeclarationError(f"metric={names}: circuits are judged by one metric of the logits, as 'logit_diff'")
        object.__setattr__(self, "metric", found[0])
        if not isinstance(self.source, str) or self.source == "clean":
            raise DeclarationError(f"source={self.source!r}: possible are a run such as 'corrupted', and {MEAN!r}")
        if not isinstance(self.share, float | int) or not 0 < self.share <= 1:
            raise DeclarationError(f"share={self.share}: a share of the behaviour lies above 0 and at most at 1")
        bounds = {
            "draws": ("draws, the random circuits of each size,", 1, MOST_DRAWS),
            "resamples": ("resamples", 2, MOST_RESAMPLES),
            "seed": ("a seed", 0, LARGEST_SEED),
            "then_exact": ("then_exact, the edges that are measured,", 0, None),
        }
        for name, (what, low, high) in bounds.items():
            more = {} if high is None else {"high": high}
            object.__setattr__(self, name, whole(getattr(self, name), what, low=low, **more))
        for name in ("n", "steps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(getattr(self, name), name, low=1))
        found_steps = check_options(self.estimator, self.steps, self.then_exact).steps
        check_estimable(found, self.estimator, self.steps or found_steps or 1, False, EdgePatches())

    def plan(self, model: Model, *, timed: bool = True) -> CircuitPlan:
        """What `run` would do on a model, stage by stage, without doing it.

        Parameters
        ----------
        model : Model
        timed : bool
            Run a few plain forward passes to estimate the time; not where the model is on a server.

        Returns
        -------
        CircuitPlan
            ``print`` explains it.

        Raises
        ------
        DeclarationError
            Edges are not defined for the model, or the task has no run `source`.
        """
        self._check(model)
        return price_circuit(self, model, timed=timed)

    def run(
        self,
        model: Model,
        progress: Callable[[str], None] | bool | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
        executor: Executor | None = None,
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
            again computes only what is missing: see `headwise.measure`. A file that holds something else is replaced
            once the new result is whole.
        resume : bool
            False takes nothing from what is there.
        executor : concurrent.futures.Executor, optional
            Runs the passes of circuits on workers: see `headwise.measure`.

        Returns
        -------
        DataTree
            ``edges``: scores; ``curve`` and ``numbers``: what circuits of growing size keep, with ``cpr``, ``cmd`` and
            intervals; ``random``: the same of random circuits; ``circuit``; ``nodes``: the smallest sets of heads;
            ``inclusion``: how often each edge is chosen (of two prompts or more). What was
            found as JSON in the attribute ``conclusion``, the circuit in ``circuit``.

        Raises
        ------
        DeclarationError
            Edges are not defined for the model, the task has no run `source`, or whole model and empty circuit have the
            same mean.
        ModelError
            A self-check failed: circuits without edges, and with all, are not the run `source` and the clean run.
        ResultError
            `out` cannot be written, or another process is writing it.
        """
        self._check(model)
        context.check_executor(model, executor)
        from ...interventions.begin import begin

        if out is None:
            with (
                begin(model, check=False) as call,
                context.using(executor=executor),
                context.stages(STAGES, progress) as say,
            ):
                return self._run(model, call.identity, say)
        with unfinished.keeping(out, resume) as store, begin(model, check=False, anew=True, ledger=store) as call:
            about = self._about(model)
            store.describe(provenance(model, call.identity) | about, call.identity)
            assert isinstance(self.metric, Metric)
            tasks = [task for task in (self.task, self._others) if task is not None]
            inputs = inputs_of(model, call.identity, json.dumps(about), tasks=tasks, metrics=[self.metric])
            if (there := store.finished(inputs, call.identity)) is not None:
                return there

            def keep(name: str, make: Callable[[], xr.Dataset]) -> xr.Dataset:
                return store.stage(f"{inputs}-{name.replace('_', '-')}", make, call.identity)

            with context.using(executor=executor, store=store), context.stages(STAGES, progress) as say:
                tree = self._run(model, call.identity, say, keep)
            tree.attrs["inputs"] = inputs
            store.finish(tree)
            return tree

    def _run(
        self,
        model: Model,
        identity: Identity,
        progress: Callable[[str], None],
        keep: Callable[[str, Callable[[], xr.Dataset]], xr.Dataset] = lambda name, make: make(),
    ) -> xr.DataTree:
        """Run it; `keep` gets each stage's name and what makes it, and gives what was made, now or before."""
        parts: dict[str, xr.Dataset] = {}
        seconds: dict[str, float] = {}

        def stage(name: str, make: Callable[[], xr.Dataset]) -> xr.Dataset:
            """Run a stage, or take it as it is stored."""
            progress(name)

            def timed() -> xr.Dataset:
                begun = time.monotonic()
                return make().assign_attrs(stage_seconds=round(time.monotonic() - begun, 3))

            with context.using(label=STAGES[name]):
                made = keep(name, timed)
            seconds[name] = float(made.attrs.pop("stage_seconds"))
            parts[name] = made.assign_attrs(long_name=STAGES[name])
            return parts[name]

        assert isinstance(self.metric, Metric)
        metric = self.metric

        def behaviour() -> kept.Behaviour:
            """One for each stage: what is measured in a stage must not depend on which stages were stored."""
            return kept.Behaviour(model, self.task, metric, self.source)

        edges = stage("edges", lambda: self._edges(behaviour()))
        scores = edges["score"].mean("example", keep_attrs=True)
        curves = [
            stage("curve", lambda: kept.curve(behaviour(), scores, "share")),
            stage("numbers", lambda: kept.curve(behaviour(), scores, "edges")),
        ]
        stage("random", lambda: kept.drawn(behaviour(), self.draws, self.seed))
        found = stage("circuit", lambda: self._circuit(behaviour(), scores, curves))
        n = int(found.attrs["n"])
        stage("nodes", lambda: nodes.node_circuits(behaviour(), self.share, self.draws, self.seed))
        if edges.sizes["example"] > 1:
            stage("inclusion", lambda: self._inclusion(edges["score"], n))
        tree = xr.DataTree.from_dict({f"/{name}": part for name, part in parts.items()})
        graph, circuit = Graph.of(model), Circuit(edges_of(found), self.source)
        more = {
            "seconds": round(sum(seconds.values()), 3),
            "seconds_by_stage": json.dumps(seconds),
            "graph": json.dumps(asdict(graph)),
            "graph_edges": len(graph),
            "circuit": codec.to_json(circuit),
        }
        tree.attrs = provenance(model, identity) | self._about(model) | as_attrs(more)
        tree.attrs["conclusion"] = json.dumps([asdict(finding) for finding in conclude(tree)])
        return tree

    def _edges(self, behaviour: kept.Behaviour) -> xr.Dataset:
        """Scores; refused before them where there is nothing to keep, on these prompts or on others that were given."""
        if self.others is not None:
            try:
                behaviour.on(self.others).gap()
            except DeclarationError as error:
                raise DeclarationError(f"others: {error}") from None
        return kept.scored(behaviour, estimator=self.estimator, steps=self.steps, then_exact=self.then_exact)

    def _circuit(self, behaviour: kept.Behaviour, scores: xr.DataArray, curves: list[xr.Dataset]) -> xr.Dataset:
        tried = xr.Dataset(attrs={"n": self.n})
        if self.n is None:
            tried = kept.smallest(behaviour, scores, curves, self.share)
        others = None if self._others is None else behaviour.on(self._others)
        if others is not None:
            try:
                others.gap()
            except DeclarationError:  # those of the next seed have none; those that were given were looked at first
                others = None
        found = kept.one_circuit(behaviour, scores, int(tried.attrs["n"]), self.draws, self.seed, others)
        return found.assign(tried.data_vars).assign_attrs(asked=int(self.n is not None))

    def _inclusion(self, scores: xr.DataArray, n: int) -> xr.Dataset:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdviceWarning)  # the findings say it
            return edge_inclusion(scores, n, ABS, resamples=self.resamples, seed=self.seed)

    @property
    def _others(self) -> Task | None:
        """Other prompts to judge the circuit on."""
        if self.others is not None or not isinstance(self.task, RepeatedTokens):
            return self.others
        return replace(self.task, seed=(self.task.seed + 1) % LARGEST_SEED)

    def _check(self, model: Model) -> None:
        """Refuse what a model or a task cannot have, before any pass."""
        model.check_laid_open("CircuitStudy")
        graph = Graph.of(model)
        if self.n is not None and self.n > len(graph):
            raise DeclarationError(f"n={self.n}: {model.name} has {len(graph)} edges, so n can be 1 to {len(graph)}")
        if self.then_exact > len(graph):
            raise DeclarationError(f"then_exact={self.then_exact}: {model.name} has {len(graph)} edges")
        for name, task in (("task", self.task), ("others", self._others)):
            needed = {"clean", *([] if self.source == MEAN else [self.source])}
            if task is not None and (lacking := needed - {*task.draw(model).runs}):
                raise DeclarationError(
                    f"{name} has no run {choices(lacking)}, which edges outside of a circuit carry; source={MEAN!r} "
                    f"takes means over reference prompts instead{''.join(map(how_to_have, sorted(lacking)))}"
                )

    def _about(self, model: Model) -> dict[str, str]:
        """What was asked for, as attributes."""
        assert isinstance(self.metric, Metric)
        at = "" if model.step is None else f" at step {model.step}"
        behaviour = self.metric.card.long_name.partition(",")[0]
        title = f"The circuit behind the {behaviour} of {model.name}{at}"
        return {"title": title, "study": self._declared(), "task": task_json(self.task)}

    def _declared(self) -> str:
        """The study as JSON; by its words where a task of one's own has none."""
        try:
            return self.to_json()
        except DeclarationError:
            return json.dumps({"type": "CircuitStudy", "repr": repr(self)})

    def to_json(self) -> str:
        """The study as JSON text; the metric by its name.

        Raises
        ------
        DeclarationError
            A task or a metric of your own cannot be written.
        """
        assert isinstance(self.metric, Metric)
        data = {name: codec.encode(value, TASKS) for name, value in codec.written(self).items() if name != "metric"}
        return json.dumps({"type": "CircuitStudy", **data, "metric": written_name(self.metric)})

    @classmethod
    def from_json(cls, text: str) -> CircuitStudy:
        """The study that `to_json` wrote.

        Raises
        ------
        DeclarationError, UnknownNameError
            The text holds something else, or a metric that does not ship with headwise.
        """
        data: Any = codec.read_json(text)
        if not isinstance(data, dict) or data.pop("type", None) != "CircuitStudy":
            raise DeclarationError("this JSON does not hold a CircuitStudy")
        metric = metric_of(str(data.pop("metric", "")))
        try:
            return cls(**{name: codec.decode(value, TASKS) for name, value in data.items()}, metric=metric)
        except TypeError as error:
            raise DeclarationError(f"JSON of a CircuitStudy has missing or unknown fields: {error}") from None
