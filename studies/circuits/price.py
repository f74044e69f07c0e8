"""What each stage of the study of a circuit costs, before it runs: from the plans of its measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from .at_random import KINDS, random_circuits
from .curves import circuit_sizes
from .edge_scores import ESTIMATORS, SAMPLE
from .kept import SELECTIONS, Behaviour

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

    sizes = {"curve": circuit_sizes(graph).values.tolist(), "numbers": circuit_sizes(graph, "edges").values.tolist()}
    one = {name: random_circuits(graph, some, 1, study.seed)[0] for name, some in sizes.items()}
    heads = behaviour.heads
    some = heads[: max(1, len(heads) // LEFT)]
    searched = [behaviour.between(heads[:-1])] * (2 * len(heads) + 1)
    searched += [behaviour.between(some[:size]) for size in range(len(some)) for _ in range(size + 1)]
    circuits = {
        "curve": one["curve"] * len(SELECTIONS),
        "numbers": one["numbers"] * len(SELECTIONS),
        "random": one["curve"] * study.draws * len(KINDS),
        "circuit": [graph.prune(Circuit(graph.edges)), *one["numbers"][-2:-1] * (study.draws + 2)],
        "nodes": [*searched, *[behaviour.between(some)] * (2 * study.draws + 4)],
    }
    alone = price(plain)
    each = math.nan if alone.seconds is None else alone.seconds / max(alone.forwards, 1e-9)
    stages = {"edges": _edges(study, behaviour, price, each)} | {
        name: price(_plan(behaviour, _named(behaviour, some))) for name, some in circuits.items()
    }
    if len(study.task.draw(model).lengths) > 1:
        stages["inclusion"] = Price(seconds=None if speed is None else 0.0)  # no pass: scores are there
    counts = {name: len(some) for name, some in circuits.items()}
    return CircuitPlan(model.name, len(study.task.draw(model).lengths), len(graph), counts, stages)


def _named(behaviour: Behaviour, circuits: Sequence[Circuit]) -> dict[str, Any]:
    return {str(at): Circuit(one.edges, source=behaviour.source) for at, one in enumerate(circuits)}


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
    ends = price(_plan(behaviour, _named(behaviour, [Circuit(), Circuit(behaviour.graph.edges)])))
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
