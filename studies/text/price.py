"""What each stage of the study of induction on text costs, before it runs: from the plans of its sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ...interventions.declare.sites import Head
from ...metrics.attention import SCORES
from ...metrics.outputs import loss
from ..analyses.ablation import draw_sets
from ..analyses.prices import Price, total
from ..measuring.request import set_up
from ..output.progress import duration
from ..tasks.prompts import Prompts
from .measured import DISTANCE, SET, SUCCESSOR, Text, random_tokens, sets_grid, single_heads

if TYPE_CHECKING:
    from ...interventions.models.model import Model


class Asked(Protocol):
    """What prices depend on of a `TextInduction`."""

    @property
    def pairs(self) -> int:
        """Occurrences whose first is replaced."""

    @property
    def controls(self) -> int:
        """Random sets of each control."""

    @property
    def untrained(self) -> int:
        """Models with random weights."""

    @property
    def ablation(self) -> str:
        """What heads are replaced by."""

    @property
    def seed(self) -> int:
        """Of what is drawn."""


@dataclass(frozen=True)
class TextPlan:
    """What a `TextInduction` costs on a model; ``print`` explains it.

    Attributes
    ----------
    model : str
    windows, tokens, occurrences : int
        Windows, tokens of each, and second occurrences with one candidate in them.
    stages : mapping of str to Price
        The ablation is that of two induction heads in the middle of the model.
    """

    model: str
    windows: int
    tokens: int
    occurrences: int
    stages: Mapping[str, Price]

    @property
    def line(self) -> str:
        """The stages and minutes, in one line."""
        each = ", ".join(f"{name} {_words(price)}" for name, price in self.stages.items())
        whole = total(self.stages)
        return f"about {_words(whole)}{' plain forward passes' * (whole.seconds is None)} ({each})"

    def __str__(self) -> str:
        lines = [
            f"induction on text, {self.model}: {self.windows} windows of {self.tokens} tokens, {self.occurrences} "
            "second occurrences with one candidate",
            "work is in plain forward passes of one window; the ablation is that of two induction heads",
            "",
            f"{'stage':<14}{'work':>10}{'time':>9}",
        ]
        for name, price in {**self.stages, "in all": total(self.stages)}.items():
            time = "" if price.seconds is None else duration(price.seconds)
            lines.append(f"{name:<14}{price.forwards:>10.0f}{time:>9}".rstrip())
        return "\n".join(lines)


def _words(price: Price) -> str:
    return f"{price.forwards:.0f}" if price.seconds is None else duration(price.seconds)


def price_text(study: Asked, model: Model, text: Text, lines: int, *, timed: bool = True) -> TextPlan:
    """Price every stage, see `TextInduction.plan`.

    Parameters
    ----------
    study : TextInduction
    model : Model
    text : Text
    lines : int
        Prompts of the user's own.
    timed : bool
        Whether a pass is timed, so that there are seconds.

    Returns
    -------
    TextPlan
    """
    from ...interventions.begin import turn

    cut, shape = text.cut, model.shape
    plain = _plan(model, cut, None, (loss,))
    speed = None
    if timed and model.backend.module is not None:
        with turn(model):
            speed = model.backend.speed(plain.plan, plain.inputs(cut, model))
    forward = plain.plan.cost().forward

    def price(asked: Any, times: float = 1) -> Price:
        cost = replace(asked.plan, speed=speed).cost()
        seconds = None if cost.seconds is None else times * cost.seconds
        return Price(round(times * asked.plan.steps), times * cost.total / forward, seconds)

    single = text.found.candidates == 1
    changed = min(study.pairs, int(single.sum())) + min(study.pairs, int((~single).sum()))
    some = [Head(shape.layers // 2, head) for head in range(min(2, shape.heads - 1) or 1)]
    wanted, drawn = draw_sets(model, {SET: some}, study.controls, study.seed)
    sets = [*dict.fromkeys([*wanted.values(), *(one for each in drawn.values() for one in each)])]
    random = random_tokens(model, study.seed)
    stages = {
        "occurrences": price(plain),
        "replaced": price(plain, 2 * changed / len(cut.tokens)),
        "heads": price(_plan(model, cut, None, (SUCCESSOR, DISTANCE)))
        + price(_plan(model, random, None, SCORES))
        + price(_plan(model, replace(random, n=8), None, SCORES), study.untrained),
        "ablation": price(_plan(model, cut, single_heads(model, study.ablation), (loss,)))
        + price(_plan(model, cut, sets_grid(sets, study.ablation), (loss,))),
    }
    if lines:
        stages["prompts"] = price(_plan(model, Prompts(((0, 1),) * lines), None, (loss,)), 2)
    size = cut.tokens.shape
    return TextPlan(model.name, size[0], size[1], int(single.sum()), stages)


def _plan(model: Model, task: Any, what: Any, metrics: Any) -> Any:
    return set_up(model, task, what, metrics, base="clean", per_position=False, batch_size="auto")
