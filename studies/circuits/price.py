"""What each stage of the study of a circuit costs, before it runs: from the plans of its measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ...interventions.declare.circuits import Circuit
from ...interventions.declare.edges import EdgePatches
from ...interventions.declare.graph import Graph
from ...interventions.plan.estimators import THERE_AND_BACK
from ..analyses.prices import Price, total
from ..measuring.request import set_up
from ..output.progress import duration
from ..tasks.tasks import Task
from .at_random import KINDS
from .curves import circuit_sizes
from .edge_scores import ESTIMATORS, SAMPLE
from .kept import BETWEEN, SELECTIONS, Behaviour

if TYPE_CHECKING:
    from ...interventions.models.model import Model

BACK = THERE_AND_BACK - 1
"""Work of a way back, in plain forward passes."""
LEFT = 3
"""The greedy search is priced for a set of one in so many heads."""


class Asked(Protocol):
    """What prices depend on of a `CircuitStudy`."""

    @property
    def task(self) -> Task:
        """The prompts."""

    @property
    def metric(self) -> Any:
        """What circuits are judged by."""

    @property
    def estimator(self) -> str:
        """How edges are scored."""

    @property
    def steps(self) -> int | None:
        """Of an integrated estimate."""

    @property
    def then_exact(self) -> int:
        """Edges of an estimate that are scored exactly."""

    @property
    def source(self) -> str:
        """What edges outside of a circuit carry."""

    @property
    def n(self) -> int | None:
        """Edges of the circuit that is looked at, if it was asked for."""

    @property
    def draws(self) -> int:
        """Random circuits of each size."""

    @property
    def seed(self) -> int:
        """Of what is drawn."""


@dataclass(frozen=True)
class CircuitPlan:
    """What a `CircuitStudy` costs on a model; ``print`` explains it.

    Attributes
    ----------
    model : str
    prompts, edges : int
    circuits : mapping of str to int
        Stage to the number of circuits that it measures, at most.
    stages : mapping of str to Price
        Greedy search of heads is priced for a set of a third of them.
    """

    model: str
    prompts: int
    edges: int
    circuits: Mapping[str, int]
    stages: Mapping[str, Price]

    @property
    def line(self) -> str:
        """The stages and minutes, in one line."""
        each = ", ".join(f"{name} {_words(price)}" for name, price in self.stages.items())
        whole = total(self.stages)
        return f"about {_words(whole)}{' plain forward passes' * (whole.seconds is None)} ({each})"

    def __str__(self) -> str:
        lines = [
            f"the circuit of {self.model}: {self.edges} edges, {self.prompts} prompts",
            "work is in plain forward passes of one prompt; nodes: where a third of the heads is needed",
            "",
            f"{'stage':<16}{'conditions':>11}{'passes':>8}{'work':>10}{'time':>9}",
        ]
        counts = {"edges": self.edges, **self.circuits, "inclusion": 0}
        for name, price in {**self.stages, "in all": total(self.stages)}.items():
            time = "" if price.seconds is None else duration(price.seconds)
            number = counts.get(name, sum(counts.values()))
            lines.append(f"{name:<16}{number:>11}{price.passes:>8}{price.forwards:>10.0f}{time:>9}".rstrip())
        return "\n".join(lines)


def _words(price: Price) -> str:
    return f"{price.forwards:.0f}" if price.seconds is None else duration(price.seconds)


def price_circuit(study: Asked, model: Model, *, timed: bool = True) -> CircuitPlan:
    """Price every stage, see `CircuitStudy.plan`.

    Parameters
    ----------
    study : CircuitStudy
    model : Model
    timed : bool
        Whether a pass is timed, so that there are seconds.

    Returns
    -------
    CircuitPlan
    """
    from ...interventions.begin import turn

    behaviour, graph = Behaviour(model, study.task, study.metric, study.source), Graph.of(model)
    plain, speed = _plan(behaviour, None), None
    if timed and model.backend.module is not None:
        with turn(model):
            speed = model.backend.speed(plain.plan, plain.inputs(study.task, model))
    forward = plain.plan.cost().forward

    def price(asked: Any) -> Price:
        cost = replace(asked.plan, speed=speed).cost()
        return Price(asked.plan.steps, cost.total / forward, cost.seconds)

    shares, numbers = circuit_sizes(graph).size, circuit_sizes(graph, "edges").size
    heads = len(behaviour.heads)
    some = max(1, heads // LEFT)
    counts = {
        "curve": shares * len(SELECTIONS),
        "numbers": numbers * len(SELECTIONS),
        "random": shares * study.draws * len(KINDS),
        "circuit": study.draws + 3 + (BETWEEN if study.n is None else 0),
        "nodes": 2 * heads + 1 + some * (some + 1) // 2 + 2 * study.draws + 4,
    }
    alone = price(plain)
    each = math.nan if alone.seconds is None else alone.seconds / max(alone.forwards, 1e-9)
    stages = {"edges": _edges(study, behaviour, price, each)} | {
        name: price(_plan(behaviour, _circuits(behaviour, number))) for name, number in counts.items()
    }
    if len(study.task.draw(model).lengths) > 1:
        stages["inclusion"] = Price(seconds=None if speed is None else 0.0)  # no pass: scores are there
    return CircuitPlan(model.name, len(study.task.draw(model).lengths), len(graph), counts, stages)


def _circuits(behaviour: Behaviour, number: int) -> dict[str, Any]:
    """So many circuits: what one costs does not depend on its edges."""
    return {str(at): Circuit(source=behaviour.source) for at in range(number)}


def _slopes(study: Asked, layers: int) -> tuple[int, int]:
    """Passes there, and ways back, of an estimate of all edges for each prompt."""
    steps = study.steps or ESTIMATORS[study.estimator].steps or 1
    if study.estimator == "atp*":
        return 1, 1 + 2 * layers  # attention and MLP of each layer are left out of the way back in turn
    runs = steps * (1 + 2 * layers if study.estimator == "eap-ig-activations" else 1)
    return runs, runs


def _edges(study: Asked, behaviour: Behaviour, price: Callable[[Any], Price], forward: float) -> Price:
    """The price of the scores of edges.

    Parameters
    ----------
    study : CircuitStudy
    behaviour : Behaviour
    price : callable
        Gives the price of a plan.
    forward : float
        Seconds of a plain pass of one prompt, NaN where no pass is timed.

    Returns
    -------
    Price
        Of an estimate: of the runs as they are, of its ways there and back, and of the edges that are scored exactly.
    """
    every = EdgePatches(source=behaviour.source)
    ends = price(_plan(behaviour, _circuits(behaviour, 2)))
    if study.estimator == "exact":
        return ends + price(_plan(behaviour, every))
    prompts = len(study.task.draw(behaviour.model).lengths)
    there, back = _slopes(study, behaviour.graph.layers)
    work = prompts * (there + BACK * back)
    found = ends + price(_plan(behaviour, None))
    found += Price(there, work, None if math.isnan(forward) else forward * work)
    if study.then_exact:
        every_edge = behaviour.graph.edges
        number = min(study.then_exact + SAMPLE, len(every_edge))  # which ones is not known: as many, from all layers
        some = Circuit(every_edge[at * len(every_edge) // number] for at in range(number))
        found += price(_plan(behaviour, EdgePatches(some, behaviour.source)))
    return found


def _plan(behaviour: Behaviour, what: Any) -> Any:
    return set_up(
        behaviour.model,
        behaviour.task,
        what,
        behaviour.metric,
        base="clean",
        per_position=False,
        batch_size="auto",
    )
