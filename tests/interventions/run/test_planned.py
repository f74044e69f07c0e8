"""Planned passes give what one plain forward pass for each condition gives, whatever is asked for and however packed.

The models, prompts and conditions are drawn by `planned_cases`; `planned_naive` says what they give.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.interventions import Grid, Head, Knockout, Layer, Patch, PathPatch, Scale, ZeroAblate
from headwise.interventions.run import memory
from headwise.metrics import induction, kl, logit_diff, loss
from headwise.studies import RepeatedTokens, measure
from tests.oracles import planned_cases as cases
from tests.oracles import raw_hooks, raw_paths
from tests.oracles.raw_paths import Place
from tests.support.heavy import heavy_but_few

TOLERANCE = {"atol": 1e-5, "rtol": 2e-6}
ROUNDING = 1e-6
"""What the layout of passes may change, relative to the largest logit."""
randoms = st.randoms(use_true_random=True)
"""Seeded; cases are drawn evenly from them, which drawing each choice by Hypothesis would not do."""


def measured(world, what, per_position=False, batch_size="auto", budget=None, overhead=None):
    """Values by metric; what `measure` takes from the machine is set from outside."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("budget", budget), ("overhead", overhead)):
            if value is not None:
                patch.setattr(memory, name, lambda device, value=value: value)
        options = {"base": world.base, "per_position": per_position, "batch_size": batch_size}
        found = measure(world.model, world.task, what, world.metrics, **options)
    return {metric.name: found[metric.name].values for metric in world.metrics}


def naively(world, several, per_position):
    return world.naive.measured([one.edits() for one in several], world.metrics, per_position)


def differs(world, several, what, per_position=False, **layout):
    """What is wrong with the planned values of conditions; nothing where they are the naive ones."""
    wanted = naively(world, several, per_position)
    try:
        found = measured(world, what, per_position, **layout)
        same = [
            np.allclose(found[name].reshape(one.shape), one, **TOLERANCE, equal_nan=True)
            for name, one in wanted.items()
        ]
        if not all(same):
            check_rounding(world, several, what, per_position, found, wanted, **layout)
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_rounding(world, several, what, per_position, found, wanted, **layout):
    """In double precision planned is naive, and in single it is off by rounding: a few times what naive is off by."""
    double = replace(world, double=True)
    exact, planned = naively(double, several, per_position), measured(double, what, per_position, **layout)
    for name, values in exact.items():
        np.testing.assert_allclose(planned[name].reshape(values.shape), values, **TOLERANCE, err_msg=f"{name}, double")
        rounding = max(3 * np.nanmax(np.abs(wanted[name] - values)), 5 * ROUNDING * world.naive.size)
        message = f"{name}, more than rounding"
        np.testing.assert_allclose(found[name].reshape(values.shape), values, rtol=0, atol=rounding, err_msg=message)


def check(world, several, what, per_position=False, **layout):
    """Planned values of conditions are the naive ones; if not, the failure shows few conditions that are enough."""
    wrong = differs(world, several, what, per_position, **layout)
    if wrong:
        few = cases.smaller(several, lambda some: differs(world, some, named(some), per_position, **layout))
        raise AssertionError(f"{few} in {world}, {per_position=}, {layout}\n{wrong}")


def check_equal(world, found, wanted, what):
    """Two measurements are the same but for rounding."""
    for name, values in wanted.items():
        size = max(1.0, world.naive.size, np.nanmax(np.abs(values)))
        message = f"{name}, {what} in {world}"
        np.testing.assert_allclose(found[name], values, rtol=0, atol=ROUNDING * size, err_msg=message)


def named(several):
    return {str(number): one for number, one in enumerate(several)}


def sweep(random, most=8):
    """A world, and conditions there."""
    world = cases.world(random)
    return world, [cases.condition(random, world) for _ in range(random.choice([1, most // 2, most]))]


def asked(random, several):
    """Conditions as `measure` takes them: alone, as a mapping, or as a grid of two axes."""
    if len(several) == 1:
        return several[0]
    if random.random() < 0.7:
        return named(several)
    table = np.arange(len(several)).reshape(2 - len(several) % 2, -1)
    rows, columns = map(range, table.shape)
    return Grid(lambda row, column: several[table[row, column]], row=rows, column=columns)


@given(randoms)
@settings(max_examples=20)
def test_planned_is_naive(random):
    """Any conditions, measured in any way, packed in any way."""
    check_planned(random)


@pytest.mark.heavy
@given(randoms)
@settings(max_examples=500)
def test_planned_is_naive_in_hundreds_of_cases(random):
    check_planned(random)


def check_planned(random):
    world, several = sweep(random)
    check(world, several, asked(random, several), random.random() < 0.5, **cases.layout(random))


@given(randoms)
@settings(max_examples=10)
def test_families_are_naive(random):
    """One kind of edit in every head, or at every position: many conditions join at one place."""
    check_families(random)


@pytest.mark.heavy
@given(randoms)
@settings(max_examples=150)
def test_families_are_naive_in_hundreds_of_cases(random):
    check_families(random)


def check_families(random):
    world = cases.world(random)
    several = cases.family(random, world)
    check(world, several, asked(random, several), random.random() < 0.5, **cases.layout(random))


@given(randoms)
@settings(max_examples=40)
def test_the_layout_changes_nothing(random):
    world, several = sweep(random)
    wanted = measured(world, named(several))
    for _ in range(2):
        layout = cases.layout(random)
        check_equal(world, measured(world, named(several), **layout), wanted, layout)


@given(randoms)
@settings(max_examples=30)
def test_the_order_of_conditions_changes_nothing_nor_does_one_again(random):
    world, several = sweep(random)
    order = random.choices(range(len(several)), k=len(several) + 1)
    straight = measured(world, named(several))
    turned = measured(world, named([several[at] for at in order]))
    check_equal(world, turned, {name: values[order] for name, values in straight.items()}, order)


@given(randoms)
@settings(max_examples=20)
def test_alone_is_as_among_others(random):
    world, several = sweep(random, most=4)
    together = measured(world, named(several))
    for row, one in enumerate(several):
        check_equal(world, measured(world, one), {name: values[row] for name, values in together.items()}, one)


def small(*metrics, **options):
    task = RepeatedTokens(n=3, length=5, **options)
    return cases.World("two layers", "sdpa", task, "clean", metrics)


FOUND = {
    "a knockout of keys after the last scored position": [Knockout(Head(0, 1), query=3, key=9)],
    "a knockout of keys from the end, in a layer of all heads": [Knockout(Layer(1), query=[-2], key=[-1])],
    "both embeddings zeroed": [ZeroAblate(Layer(0).embed) + ZeroAblate(Layer(0).pos_embed)],
    "both embeddings scaled away at a position": [
        Scale(Layer(0).embed.at(7), 0.0) + Scale(Layer(0).pos_embed.at(7), 0.0) + Scale(Head(0, 1).q, 2.0)
    ],
    "a path from one position below an ablation of others": [
        ZeroAblate(Layer(0).resid_mid.at(3)) + PathPatch(Head(0, 1).z.at(6), Head(1, 2).k)
    ],
    "a path from some positions below another edit, two receivers": [
        Scale(Layer(0).mlp_out, 0.5) + PathPatch(Layer(0).attn_out.at([2, 8]), [Head(1, 0).v, Head(1, 1).q, "logits"])
    ],
    "a knockout of the first key, for all queries that keep one": [Knockout(Head(1, 0), key=0)],
    "two knockouts of one query": [Knockout(Layer(1), 5, 0) + Knockout(Head(1, 2), 5, [2, 3])],
    "the last stream beside an earlier site": [Patch(Layer(0).z), Patch(Layer(1).resid_post)],
    "a path to the logits beside an earlier site": [Patch(Head(1, 0).q), PathPatch(Layer(0).mlp_out, "logits")],
}
"""What drawn cases once found, smaller."""


@pytest.mark.parametrize(
    ("found", "metrics"), heavy_but_few([*FOUND], [(loss, kl), (logit_diff,), (induction,), (induction, loss)]), ids=str
)
def test_what_was_found_is_naive(found, metrics):
    check(small(*metrics), FOUND[found], named(FOUND[found]))


@given(randoms)
def test_the_naive_passes_are_those_of_other_hooks(random):
    """Paths alone, and patterns under edits, as the other hooks of the tests have them."""
    world = cases.world(random)
    naive, length = world.naive, random.choice(world.lengths)
    tokens, path = naive.tokens(world.base, length), cases.path(random, world, None)
    ends = [one if one == "logits" else _place(one) for one in path.receivers]
    source = naive.tokens(path.source, length)
    wanted = raw_paths.path_patch(naive.module, tokens, source, _place(path.sender), ends, path.through_mlps)
    torch.testing.assert_close(naive.run(path.edits(), length)[0], wanted, atol=1e-4, rtol=1e-5)
    places = [cases.site(random, world, raw_hooks.EDITABLE, None) for _ in range(2)]
    zeros = [ZeroAblate(place) for place in places]
    raw = [raw_hooks.zero_edit(str(one.component), one.layer, one.part, one.positions) for one in places]
    _, patterns = naive.run(zeros, length, attend=True)
    for layer, pattern in enumerate(patterns):
        there = raw_hooks.activation(naive.module, tokens, "pattern", layer, raw)
        torch.testing.assert_close(pattern, there, atol=1e-5, rtol=1e-5)


def _place(site):
    return Place(site.layer, str(site.component), site.part, site.positions)
