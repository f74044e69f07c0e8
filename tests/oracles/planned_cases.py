"""Random cases for the planned engine: models, prompts, edits, compositions, and how they are laid out in passes.

Everything is drawn from a plain `random.Random`, evenly over corner cases; `smaller` says which part of a case fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import combinations
from random import Random

import headwise as hw
from headwise.interventions import (
    Add,
    Compose,
    Head,
    Knockout,
    Layer,
    MeanAblate,
    Neuron,
    Patch,
    PathPatch,
    ProjectOut,
    ResampleAblate,
    Scale,
    Site,
    ZeroAblate,
)
from headwise.interventions.base.shape import Shape
from headwise.interventions.declare.edits import Intervention
from headwise.metrics import induction, kl, logit_diff, loss, self_attention
from headwise.studies import Prompts, RepeatedTokens
from tests.oracles import raw_families, raw_hooks, raw_variants
from tests.oracles.planned_naive import QKV, Naive, starved

PER_HEAD = (*QKV, "q_rot", "k_rot", "pattern", "z", "head_out")
PER_NEURON = raw_families.PER_NEURON
MODELS = {
    "two layers": {"layers": 2, "heads": 4, "d_head": 8, "vocab": 60, "context": 40},
    "deep, narrow": {"layers": 4, "heads": 2, "d_head": 5, "vocab": 45, "context": 12},
    "one layer": {"layers": 1, "heads": 3, "d_head": 8, "vocab": 97, "context": 24, "n_inner": 7},
    "one head": {"layers": 3, "heads": 1, "d_head": 12, "vocab": 51, "context": 32},
    "scaled": {"layers": 3, "heads": 3, "d_head": 6, "vocab": 50, "context": 20},
}
GPT2_COMPONENTS = ("embed", "pos_embed", *raw_hooks.READABLE)
Positions = list[int] | None


@cache
def model(name: str, implementation: str, double: bool = False) -> hw.Model:
    """A random model with either implementation of attention; "scaled" divides scores by the number of the layer."""
    if double:
        return hw.load(deepcopy(model(name, implementation).module).double())
    if name in raw_families.MODELS | raw_variants.MODELS:
        module = raw_families.random_model(name)
        if name not in ("gpt-neo", "gemma2", "gpt-oss", "gptj"):  # which have one implementation
            module.set_attn_implementation(implementation)
        return hw.load(module)
    module = raw_hooks.random_gpt2(**MODELS[name])
    module.set_attn_implementation(implementation)
    if name == "scaled":
        module.config.scale_attn_by_inverse_layer_idx = True
        for block in module.transformer.h:
            block.attn.scaling /= block.attn.layer_idx + 1
    return hw.load(module)


@dataclass(frozen=True)
class World:
    """A model, prompts, the run that is intervened on, and what is measured there."""

    name: str
    implementation: str
    task: RepeatedTokens | Prompts
    base: str
    metrics: tuple
    double: bool = False

    @property
    def model(self):
        return model(self.name, self.implementation, self.double)

    @property
    def shape(self):
        return self.model.shape

    @cached_property
    def components(self):
        """What the model has, in forward order."""
        if self.name in MODELS:
            return GPT2_COMPONENTS
        return raw_families.components(self.model.module)

    def heads(self, component):
        return self.shape.kv_heads if component in raw_families.OF_KEYS else self.shape.heads

    @cached_property
    def naive(self):
        return Naive(self.model, self.task, self.base)

    @cached_property
    def runs(self):
        return [*self.naive.batch.runs]

    @cached_property
    def lengths(self):
        return [group.length for group in self.naive.groups]

    @cached_property
    def has_reference(self):
        """Whether a mean and a partner can be had for every prompt."""
        batch = self.naive.reference
        return self.base in batch.runs and all((batch.lengths == length).sum() > 1 for length in self.lengths)


def prompts(random: Random, vocabulary: int) -> Prompts:
    """Prompts of one length or several, one token long at least where an answer is scored."""
    answers, others, corrupted, distractors, more = (random.random() < 0.6 for _ in range(5))
    sizes = random.sample([2 - answers, 3, 4, 7, 8], random.randint(1, 3))
    lengths = random.choices(sizes, k=random.randint(1, 5))

    def texts(sizes: Sequence[int]) -> list[str]:
        return [" ".join(str(random.randrange(vocabulary)) for _ in range(size)) for size in sizes]

    return Prompts(
        texts(lengths),
        answers=texts([1] * len(lengths)) if answers else None,
        distractors=texts([1] * len(lengths)) if answers and distractors else None,
        corrupted=texts(lengths) if corrupted else None,
        others=texts(sorted({*lengths}) * random.randint(2, 3)) if others and min(lengths) > 1 else None,
        runs={"more": texts(lengths)} if more else (),
    )


def world(random: Random, names: Sequence[str] = tuple(MODELS)) -> World:
    name, implementation = random.choice([*names]), random.choice(["sdpa", "eager"])
    choices = [(loss,), (loss, kl), (self_attention, loss), (self_attention,)]
    if random.random() < 0.6:
        sizes = random.randint(1, 4), random.randint(2, 6), random.randrange(100)
        task = RepeatedTokens(*sizes, score=random.choice(["repeat", "all"]))
        choices += [(induction, loss), (induction,), (induction, logit_diff)]
    else:
        task = prompts(random, model(name, implementation).shape.vocabulary)
    if isinstance(task, RepeatedTokens) or task.distractors:
        choices += [(logit_diff,), (logit_diff,), (loss, logit_diff, kl), (loss, logit_diff, kl)]
    base = random.choice([*task.draw(model(name, implementation)).runs])
    return World(name, implementation, task, base, random.choice(choices))


def positions(random: Random, lengths: Sequence[int]) -> Positions:
    """All (None), one, or some, that differ in every prompt; the last one is likely."""
    short, kept = min(lengths), []
    for at in random.choices([-1, *range(-short, short)], k=random.choice([0, 1, 1, 2, 3, 5])):
        if all(at % length not in {one % length for one in kept} for length in lengths):
            kept.append(at)
    return kept or None


def meet(one: Site, other: Site, lengths: Sequence[int]) -> bool:
    """Whether two sites share a place in prompts of some length, wherever their positions are counted from."""
    if (one.layer, one.component) != (other.layer, other.component):
        return False
    if None not in (one.part, other.part) and one.part != other.part:
        return False
    if None in (one.positions, other.positions):
        return True
    return any({at % length for at in one.positions} & {at % length for at in other.positions} for length in lengths)


def width(where: Site, shape: Shape) -> int:
    """Numbers of a vector that is added to a site."""
    if where.component in PER_NEURON:
        return shape.d_mlp if where.neuron is None else 1
    return shape.d_head if where.component in (*QKV, "q_rot", "k_rot", "z") else shape.d_model


def placed(target: Site, at: Positions) -> Site:
    return target if at is None else target.at(at)


def site(random: Random, there: World, components: Sequence[str], near: Site | None, whole: bool = True) -> Site:
    """A site of one of the components; where `near` is given, likely in its layer or the next, of its head, there."""
    last = there.shape.layers - 1
    component, layer = random.choice(components), random.choice([0, last, *range(last + 1)])
    head, at = random.randrange(there.heads(component)), positions(random, there.lengths)
    if near is not None and random.random() < 0.5:
        layer = min(near.layer + random.randrange(2), last)
        at = random.choice([at, near.positions])
        head = near.head if near.head is not None and near.head < there.heads(component) else head
    if component in PER_HEAD and (not whole or random.random() < 0.6):
        return placed(Head(layer, head).site(component), at)
    if component in PER_NEURON and random.random() < 0.6:
        return placed(Neuron(layer, random.choice([0, 3, there.shape.d_mlp - 1])).site(component), at)
    return placed(Layer(0 if "embed" in component else layer).site(component), at)


def knockout(random: Random, there: World, near: Site | None) -> Knockout:
    """Of keys that leave every query that is named one; there is none in prompts of one token."""
    while True:
        where, keys = site(random, there, ["pattern"], near), positions(random, there.lengths)
        if keys is None and where.positions is None:
            continue
        found = Knockout(where, where.positions, keys)
        window = there.shape.window(where.layer)
        named = [(length, query) for length in there.lengths for query in where.positions or ()]
        if not any(starved(found, length, query, window) for length, query in named):
            return found


def path(random: Random, there: World, near: Site | None) -> PathPatch:
    last, receivers = there.shape.layers - 1, []
    sender = site(random, there, ["z", "attn_out", "mlp_out"], near, whole=False)
    sender = replace(sender, layer=random.randint(0, sender.layer))
    for _ in range(random.choice([0, 1, 1, 3]) if sender.layer < last else 0):
        end = site(random, there, QKV, None, whole=False)
        end = replace(end, layer=max(end.layer, sender.layer + 1))
        if not any(meet(end, other, there.lengths) for other in receivers):
            receivers.append(end)
    if not receivers or random.random() < 0.3:
        receivers.append("logits")
    return PathPatch(sender, receivers, random.choice(there.runs), random.random() < 0.5)


def intervention(random: Random, there: World, near: Site | None = None) -> Intervention:
    """Of any kind on one site, or along a path; some change nothing."""
    kinds = [ZeroAblate, Patch, Add, ProjectOut, Scale, path] + [MeanAblate, ResampleAblate] * there.has_reference
    kinds += [knockout] * (min(there.lengths) > 1)
    kind = random.choice(kinds)
    if kind in (knockout, path):
        return kind(random, there, near)
    never = {Add: ("pattern",), ProjectOut: ("pattern", "head_out")}.get(kind, ())
    components = [one for one in (*there.components, "pattern", "resid_post") if one not in never]
    where = site(random, there, components, near, whole=not never)
    if kind is Patch:
        return Patch(where, random.choice(there.runs))
    if never:
        return kind(where, [random.gauss(0, 1) for _ in range(width(where, there.shape))])
    if kind is Scale:
        return Scale(where, random.choice([-1.5, 0.0, 0.5, 1.0, 2.0]))
    if kind is MeanAblate:
        return MeanAblate(
            where, random.choice([("example", "position")] * (where.component != "pattern") + ["example"])
        )
    return ResampleAblate(where, random.randrange(4)) if kind is ResampleAblate else ZeroAblate(where)


def _rounding_alone(edit: Intervention, there: World) -> bool:
    """Whether an edit adds to the stream what is 0 but for rounding, which matters where the stream was zeroed."""
    return isinstance(edit, PathPatch) and edit.source == there.base and edit.receivers == ("logits",)


def condition(random: Random, there: World) -> Intervention:
    """One intervention, or up to four that do not meet, in one pass."""
    parts = [intervention(random, there)]
    for _ in range(random.choice([0, 0, 1, 2, 3])):
        kept = [edit for part in parts for edit in part.edits()]
        one = intervention(random, there, kept[-1].site)
        together = [*kept, *one.edits()]
        met = any(meet(new.site, old.site, there.lengths) for new in one.edits() for old in kept)
        if not met and not any(_rounding_alone(edit, there) for edit in together):
            parts.append(one)
    return parts[0] if len(parts) == 1 else Compose(*parts)


def family(random: Random, there: World) -> list[Intervention]:
    """One kind of edit at one component of every layer and head, or of every layer and some positions."""
    component, length = random.choice(there.components), min(there.lengths)
    kinds = [ZeroAblate, lambda where: Patch(where, random.choice(there.runs)), lambda where: Scale(where, -1.5)]
    kinds += [MeanAblate, ResampleAblate] * there.has_reference
    if component == "pattern" and length > 1:
        kinds += [lambda where: Knockout(where, -1, [0]), lambda where: Knockout(where, range(1, length), [1])]
    kind, layers = random.choice(kinds), [0] if "embed" in component else range(there.shape.layers)
    if component in PER_HEAD and random.random() < 0.5:
        at = positions(random, there.lengths)
        every = [Head(layer, head).site(component) for layer in layers for head in range(there.heads(component))]
        return [kind(placed(one, at)) for one in every]
    if component in PER_NEURON and random.random() < 0.5:
        return [kind(Neuron(layer, one).site(component)) for layer in layers for one in range(0, there.shape.d_mlp, 3)]
    steps = range(0, length, random.randint(1, 3))
    return [kind(Layer(layer).site(component).at(at)) for layer in layers for at in steps]


def layout(random: Random) -> dict[str, float | str | None]:
    """How rows are packed into passes, which changes no number."""
    return {
        "batch_size": random.choice(["auto", "auto", "auto", 1, 2, 3, 7]),
        "budget": random.choice([None, None, 1, 50_000, 500_000]),
        "overhead": random.choice([None, 0.0, 0.0, 1e5, 1e15]),
    }


def smaller(several: Sequence[Intervention], fails: Callable[[list[Intervention]], bool]) -> list[Intervention]:
    """Few of the conditions, and few of the edits of one, that still fail; as they are where none do."""
    for one in several:
        edits = one.edits()
        for count in range(1, len(edits) + 1):
            for some in combinations(edits, count):
                if fails([Compose(*some)]):
                    return [Compose(*some)]
    return next((list(pair) for pair in combinations(several, 2) if fails(list(pair))), list(several))
