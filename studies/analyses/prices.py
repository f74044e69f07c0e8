"""What each stage of the induction study costs, before it runs: from the plans of the sweeps that it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...interventions.declare.sites import Head
from ...metrics.attention import SCORES, induction, prefix_matching
from ...metrics.card import Metric
from ...metrics.intervals import looks
from ...metrics.outputs import accuracy, logit_diff, loss
from ...metrics.weights import KINDS
from ..measuring.looks import request_some
from ..measuring.request import What, set_up
from ..output.progress import duration
from ..tasks.tasks import RepeatedTokens, Task
from . import ablation, attribution, behaviour, composition, estimates, heads, patching, paths, word_lists

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.plan.plan import Plan

DRAWN = 1_000_000
"""Random numbers that are drawn to see how long a model with random weights takes to make."""


class Asked(Protocol):
    """What prices depend on of an `InductionStudy`."""

    @property
    def task(self) -> RepeatedTokens:
        """Its prompts."""

    @property
    def first(self) -> int:
        """Prompts that its sweeps start with."""

    @property
    def draws(self) -> int:
        """Random sets of each control."""

    @property
    def untrained(self) -> int:
        """Models with random weights."""

    @property
    def seed(self) -> int:
        """Of the random sets."""


@dataclass(frozen=True)
class Sweep:
    """A sweep of a stage.

    Attributes
    ----------
    task : Task
    what : Intervention, mapping of str to Intervention, Grid, or None
    metrics : tuple of Metric
    base : str
    first : int, optional
        Prompts that it starts with, where it does not take all at once.
    times : int
        How often it runs.
    runs : str, optional
        As for `measure`.
    """

    task: Task
    what: What
    metrics: tuple[Metric, ...]
    base: str = "clean"
    first: int | None = None
    times: int = 1
    runs: str | None = None

    def plans(self, model: Model, every: bool) -> Iterator[Plan]:
        """The plans that run, up to the first look or to the last."""
        if self.first is None or not isinstance(self.task, RepeatedTokens):
            options: dict[str, Any] = {"base": self.base, "runs": self.runs, "per_position": False}
            yield set_up(model, self.task, self.what, self.metrics, batch_size="auto", **options).plan
            return
        counts = looks(self.task.n, self.first)
        for span in pairwise((0, *(counts if every else counts[:1]))):
            yield request_some(model, self.task, self.what, self.metrics, span, self.base).plan


@dataclass(frozen=True)
class Price:
    """What a stage costs.

    Attributes
    ----------
    passes : int
        Forward passes: the runs as they are, and those with interventions.
    forwards : float
        Work, in plain forward passes of one prompt.
    seconds : float or None
        Where the speed was measured.
    """

    passes: int = 0
    forwards: float = 0.0
    seconds: float | None = None

    def __add__(self, other: Price) -> Price:
        seconds = None if None in (self.seconds, other.seconds) else (self.seconds or 0.0) + (other.seconds or 0.0)
        return Price(self.passes + other.passes, self.forwards + other.forwards, seconds)


@dataclass(frozen=True)
class StudyPlan:
    """What an `InductionStudy` costs on a model; ``print`` explains it.

    Attributes
    ----------
    model : str
    prompts : tuple of int
        Prompts that sweeps start with, and all.
    least, most : mapping of str to Price
        Stage to its price where the first prompts settle every verdict, and where all are used. ``sets``, and in
        ``composition`` all but the weights and 3 paths, run only where heads have a role: priced for one
        previous-token head and two induction heads, in the middle of the model.
    bare : mapping of str to Price
        As `least`, for a model in which no head has a role.
    left_out : mapping of str to float
        Estimates that are not run, to how many times the exact values they cost.
    """

    model: str
    prompts: tuple[int, int]
    least: Mapping[str, Price]
    most: Mapping[str, Price]
    bare: Mapping[str, Price]
    left_out: Mapping[str, float]

    @property
    def line(self) -> str:
        """The stages and minutes, in one line."""
        stages = ", ".join(
            f"{name} {_time(price) or f'{price.forwards:.0f}'}" for name, price in self.bare.items() if price.forwards
        )
        bare, least, most = (_words(total(one)) for one in (self.bare, self.least, self.most))
        first, every = self.prompts
        text = f"about {bare} ({stages}); {least} if heads with a role are found"
        bound = f"up to {most} if verdicts need all {every} prompts (--n {first}, in Python n={first}, bounds it)"
        return text if first == every else f"{text}, {bound}"

    def __str__(self) -> str:
        first, every = self.prompts
        lines = [
            f"the induction study on {self.model}: {first} prompts first, {every} where verdicts need them"
            if first < every
            else f"the induction study on {self.model}: {every} prompts",
            "work is in plain forward passes of one prompt; roles: where heads have a role",
            "",
            f"{'stage':<14}{'no roles':>19}{'roles':>22}{f'roles, {every} prompts':>22}",
            f"{'':<14}" + f"{'work':>10}{'time':>9}   " * 3,
        ]
        columns = [{**prices, "in all": total(prices)} for prices in (self.bare, self.least, self.most)]
        for name in columns[0]:
            cells = "".join(f"{one[name].forwards:>10.0f}{_time(one[name]):>9}   " for one in columns)
            lines.append(f"{name:<14}{cells}".rstrip())
        lines += [
            f"not run: {name} (costs {times:.2f} times the exact values)" for name, times in self.left_out.items()
        ]
        return "\n".join(lines)


def total(prices: Mapping[str, Price]) -> Price:
    """The price of all stages."""
    return sum(prices.values(), Price(seconds=0.0))


def _time(price: Price) -> str:
    return "" if price.seconds is None else duration(price.seconds)


def _words(price: Price) -> str:
    """The time, or where it is not known the work."""
    return _time(price) or f"{price.forwards:.0f} plain forward passes"


def sweeps_of(study: Asked, model: Model, found: Mapping[str, Sequence[Head]]) -> dict[str, list[Sweep]]:
    """The sweeps of each stage but the estimates, where `found` are the heads with a role."""
    task, first, shape = study.task, study.first, model.shape
    senders, receivers = found["previous-token"], found["induction"]
    connected = any(one.layer < two.layer for one in senders for two in receivers)
    wanted, drawn = ablation.draw_sets(model, ablation.sets_of(found), study.draws, study.seed)
    sets = dict.fromkeys([*wanted.values(), *(one for some in drawn.values() for one in some)])
    many = [one for one in sets if len(one) > 1]  # what one head does alone is known by then
    controlled = composition.ablated_sets(model, senders, receivers, study.draws, study.seed) if connected else []
    anywhere = {kind: (Head(0, 0), Head(shape.layers - 1, 0), 0.0) for kind in KINDS if shape.layers > 1}
    patched = paths.paths_into(model, senders, receivers) | paths.paths_of_pairs(model, anywhere)
    lists, _ = word_lists.lists_for(model)
    outputs = (loss, accuracy)
    sweeps = {
        "behaviour": [Sweep(replace(task, score="all"), None, outputs, runs="all")],
        "heads": [
            Sweep(task, None, SCORES),
            Sweep(heads.task_of_untrained(task, first), None, SCORES, times=study.untrained),
        ],
        "patterns": [Sweep(replace(task, n=1, length=min(task.length, behaviour.SHOWN_LENGTH)), None, (induction,))],
        "ablation": [Sweep(task, ablation.each_head(model, ablation.METHODS), outputs, first=first)],
        "sets": [],
        "patching": [
            Sweep(task, patching.each_head(model, source), (logit_diff,), base, first)
            for base, source in patching.DIRECTIONS.values()
        ],
        "composition": [Sweep(task, patched, (logit_diff,), first=first)] if patched else [],
        "attribution": [Sweep(task, None, (logit_diff,))],
        "words": [],
    }
    if many:
        few = ablation.first_of_sets(task.n, first)
        sweeps["sets"].append(Sweep(task, ablation.ablation_grid(many), outputs, first=few))
    if len(looks(task.n, first)) > 1:
        sweeps["patching"] += [Sweep(task, None, (logit_diff,), run) for run in ("clean", "corrupted")]
    if receivers:
        sweeps["patching"].append(
            Sweep(task, patching.set_grid(model, receivers), (logit_diff, induction), first=first)
        )
    if controlled:
        sweeps["composition"].append(Sweep(task, ablation.ablation_grid(controlled), (induction,), first=first))
    if lists is not None:
        sweeps["words"] = [
            Sweep(lists, word_lists.conditions_on(model, lists, receivers), word_lists.METRICS),
            Sweep(lists, None, (prefix_matching,)),
        ]
    return sweeps


def price_study(study: Asked, model: Model, *, timed: bool = True) -> StudyPlan:
    """Price every stage, see `InductionStudy.plan`."""
    from ...interventions.begin import turn

    task, layers = study.task, model.shape.layers
    example = set_up(model, task, None, (loss,), base="clean", per_position=False, batch_size="auto")
    speed, drawing = None, None
    if timed and model.backend.module is not None:
        with turn(model):
            speed = model.backend.speed(example.plan, example.inputs(task, model))
        drawing = _seconds_to_draw()
    first = looks(task.n, study.first)[0]
    counter = _Counter(study, model, speed, drawing, example.plan.cost().forward)
    none: dict[str, list[Head]] = {"previous-token": [], "induction": []}
    receivers = [Head(layers // 2, head) for head in range(min(2, model.shape.heads))]
    some = {"previous-token": [Head(layers // 3, model.shape.heads - 1)], "induction": receivers}
    dear = {}
    for name in estimates.SWEEPS if model.has_gradients else ():
        for one, times in estimates.prices(model, task, name, first).too_dear.items():
            dear[f"{one} estimates of {name}"] = times
    return StudyPlan(
        model.name,
        (first, task.n),
        counter.stages(some, False),
        counter.stages(some, True),
        counter.stages(none, False),
        dear,
    )


@dataclass(frozen=True)
class _Counter:
    """Adds up prices; `forward` is the work of one plain forward pass of one prompt."""

    study: Asked
    model: Model
    speed: float | None
    drawing: float | None
    forward: float

    @property
    def nothing(self) -> Price:
        """The price of nothing."""
        return Price(seconds=None if self.speed is None else 0.0)

    def stages(self, found: Mapping[str, Sequence[Head]], every: bool) -> dict[str, Price]:
        """Stage to its price, where `found` are the heads with a role; up to the first look, or to the last."""
        prices = {
            name: sum((self.of_sweep(one, every) for one in sweeps), self.nothing)
            for name, sweeps in sweeps_of(self.study, self.model, found).items()
        }
        if self.drawing is not None:
            numbers = sum(weight.numel() for weight in self.model.module.parameters())
            prices["heads"] += Price(seconds=self.study.untrained * self.drawing * numbers)
        prices["composition"] += self.of_work(composition.score_flops(self.model.shape))
        if not self.model.has_gradients:
            prices.pop("attribution")
        else:
            positions = self.study.task.draw(self.model).scored.sum()
            prices["attribution"] += self.of_work(attribution.flops(self.model.shape, int(positions)))
            prompts = looks(self.study.task.n, self.study.first)[-1 if every else 0]
            prices["estimates"] = sum((self.of_estimates(name, prompts) for name in estimates.SWEEPS), self.nothing)
        return prices

    def of_sweep(self, sweep: Sweep, every: bool) -> Price:
        """The price of a sweep."""
        found = self.nothing
        for plan in sweep.plans(self.model, every):
            cost = replace(plan, speed=self.speed).cost()
            seconds = None if cost.seconds is None else sweep.times * cost.seconds
            found += Price(sweep.times * plan.steps, sweep.times * cost.total / self.forward, seconds)
        return found

    def of_estimates(self, name: str, prompts: int) -> Price:
        """The price of the estimates of a sweep that are not too dear."""
        prices = estimates.prices(self.model, self.study.task, name, prompts)
        return sum((self.of_work(prices.estimates[one]) for one in prices.chosen), self.nothing)

    def of_work(self, operations: float) -> Price:
        """The price of work outside planned passes."""
        return Price(0, operations / self.forward, None if self.speed is None else operations / self.speed)


def _seconds_to_draw() -> float:
    """Seconds to draw one random weight."""
    numbers = torch.empty(DRAWN)
    began = time.perf_counter()
    numbers.normal_(generator=torch.Generator())
    return (time.perf_counter() - began) / DRAWN
