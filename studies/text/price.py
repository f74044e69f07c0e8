"""What each stage of the study of induction on text costs, before it runs, and `text_heads`: from plans of sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ...interventions.declare.sites import Head
from ...metrics.attention import SCORES, prefix_matching
from ...metrics.outputs import loss
from ..analyses.ablation import draw_sets
from ..analyses.prices import Price, total
from ..measuring.request import set_up
from ..output.progress import duration
from ..tasks.prompts import Prompts
from .heads import ABLATED, claims_on
from .measured import DISTANCE, SET, SUCCESSOR, Text, random_tokens, sets_grid, single_heads
from .windows import Windows, windows

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
    heads : mapping of str to Price
        Those of `text_heads`, where it is to run as well (see `price_heads`).
    notes : tuple of str
        On what the prices of `heads` depend.
    """

    model: str
    windows: int
    tokens: int
    occurrences: int
    stages: Mapping[str, Price]
    heads: Mapping[str, Price] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The stages and minutes, in one line."""
        stages = {**self.stages, **self.heads}
        each = ", ".join(f"{name} {_words(price)}" for name, price in stages.items())
        whole = total(stages)
        return f"about {_words(whole)}{' plain forward passes' * (whole.seconds is None)} ({each})"

    def __str__(self) -> str:
        lines = [
            f"induction on text, {self.model}: {self.windows} windows of {self.tokens} tokens, {self.occurrences} "
            "second occurrences with one candidate",
            "work is in plain forward passes of one window; the ablation is that of two induction heads",
            *self.notes,
            "",
            f"{'stage':<16}{'passes':>8}{'work':>10}{'time':>9}",
        ]
        stages = {**self.stages, **self.heads}
        for name, price in {**stages, "in all": total(stages)}.items():
            time = "" if price.seconds is None else duration(price.seconds)
            lines.append(f"{name:<16}{price.passes:>8}{price.forwards:>10.0f}{time:>9}".rstrip())
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
    cut = text.cut
    plain, price = _pricer(model, cut, timed)
    single = text.found.candidates == 1
    changed = min(study.pairs, int(single.sum())) + min(study.pairs, int((~single).sum()))
    wanted, drawn = draw_sets(model, {SET: _middle(model)}, study.controls, study.seed)
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


def price_heads(
    plan: TextPlan,
    model: Model,
    text: str | None,
    *,
    context: int | None,
    n: int,
    controls: int,
    seed: int,
    timed: bool = True,
) -> TextPlan:
    """A plan with the prices of `text_heads` besides.

    Parameters
    ----------
    plan : TextPlan
        Of the study on the same text.
    model : Model
    text, context, n, controls, seed
        As for `text_heads`.
    timed : bool
        As for `TextInduction.plan`.

    Returns
    -------
    TextPlan
        Which claims fit heads is not known before: priced are two heads, in the middle of the model, for each.

    Raises
    ------
    DeclarationError
        As for `text_heads`.
    """
    cut = windows(model, text, context, n, seed)
    _, price = _pricer(model, cut, timed)
    timed = timed and model.backend.module is not None
    claims, seconds = claims_on(model, text, cut, timed)
    scoring = price(_plan(model, cut, None, (prefix_matching,)))
    stages = {"claims": replace(scoring, seconds=seconds)}
    if controls:
        wanted, drawn = draw_sets(model, {SET: _middle(model)}, controls, seed)
        sets = [*wanted.values(), *(one for each in drawn.values() for one in each)]
        ablated = replace(cut, tokens=cut.tokens[:ABLATED])
        stages["claims ablated"] = price(_plan(model, ablated, sets_grid(sets, "mean"), (loss,)), claims)
    notes = f"claims: what every head does in {len(cut.tokens)} windows; ablated: two heads for each of {claims} claims"
    return replace(plan, heads=stages, notes=(notes,))


def _pricer(model: Model, cut: Windows, timed: bool) -> tuple[Any, Callable[..., Price]]:
    """A plain pass of windows as it is planned, and what prices a plan that runs so many times."""
    from ...interventions.begin import turn

    plain, speed = _plan(model, cut, None, (loss,)), None
    if timed and model.backend.module is not None:
        with turn(model):
            speed = model.backend.speed(plain.plan, plain.inputs(cut, model))
    forward = plain.plan.cost().forward

    def price(asked: Any, times: float = 1) -> Price:
        cost = replace(asked.plan, speed=speed).cost()
        seconds = None if cost.seconds is None else times * cost.seconds
        return Price(round(times * asked.plan.steps), times * cost.total / forward, seconds)

    return plain, price


def _middle(model: Model) -> list[Head]:
    """Two heads of one layer in the middle of the model; one where it has no other to compare it with."""
    return [Head(model.shape.layers // 2, head) for head in range(min(2, model.shape.heads - 1) or 1)]


def _plan(model: Model, task: Any, what: Any, metrics: Any) -> Any:
    return set_up(model, task, what, metrics, base="clean", per_position=False, batch_size="auto")
