"""The plan: pure, checked before any forward pass, every condition and example exactly once."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise import DeclarationError, HeadwiseError, UnknownNameError
from headwise.interventions import Head, Layer, MeanAblate, Patch, ZeroAblate
from headwise.interventions.plan import make_plan, positions_in, rows_within
from headwise.interventions.shape import Group, Shape

GPT2 = Shape(layers=12, heads=12, d_model=768, d_head=64, vocabulary=50257, context=1024)
GROUP = Group(tuple(range(8)), 50, tuple(range(25, 49)))


def plan(*edits, groups=(GROUP,), runs=("clean", "corrupted"), base="clean", **options):
    conditions = [edit.edits() for edit in edits]
    return make_plan(
        conditions, model="openai-community/gpt2", shape=GPT2, groups=groups, runs=runs, base=base, **options
    )


def test_plan_imports_no_torch():
    code = "import sys, headwise.interventions.plan; sys.exit('torch' in sys.modules or 'nnsight' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 12), st.integers(1, 64))
def test_every_condition_meets_every_example_once(conditions, first, second, batch_size):
    groups = (Group(tuple(range(first)), 10, (3,)), Group(tuple(range(first, first + second)), 12, (3,)))
    made = plan(*[ZeroAblate(Head(0, 0))] * conditions, groups=groups, batch_size=batch_size)
    met = Counter(
        (chunk.group, condition, groups[chunk.group].examples[example])
        for chunk in made.chunks
        for span in chunk.conditions
        for condition in range(*span)
        for example in range(*chunk.examples)
    )
    assert set(met.values()) == {1}
    assert len(met) == conditions * (first + second)
    assert max(max(chunk.rows) for chunk in made.chunks) <= batch_size


def test_the_baseline_alone_keeps_to_the_batch_size():
    made = plan(batch_size=3)
    assert [chunk.examples for chunk in made.chunks] == [(0, 3), (3, 6), (6, 8)]
    assert (made.passes, made.steps) == (0, 6)


def test_edits_run_in_forward_order():
    made = plan(Patch(Layer(3).mlp_out) + ZeroAblate(Head(3, 1)) + ZeroAblate(Head(0, 11)))
    assert [str(edit.site) for edit in made.conditions[0]] == ["L0H11 z", "L3H1 z", "L3 mlp_out"]


def test_plan_says_how_much_it_is():
    made = plan(*[ZeroAblate(Head(layer, head)) for layer in range(12) for head in range(12)], batch_size=96)
    assert str(made) == (
        "openai-community/gpt2: 144 conditions on 8 examples of the clean run, 12 passes, 1152 rows, at most 96 rows "
        "together; before them the runs clean and corrupted without any intervention"
    )


def test_budget_holds_the_largest_tensors():
    rows = rows_within(2**30, GPT2, GROUP, False)
    assert rows * 4 * 24 * 50257 <= 2**30
    assert rows_within(1, GPT2, GROUP, True) == 1


def test_positions_count_from_the_end():
    assert positions_in(Head(0, 0).z.at([-1, 2]), 10) == [9, 2]
    assert positions_in(Head(0, 0).z, 10) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plan(ZeroAblate(Head(5, 12))), "L5H12 z: openai-community/gpt2 has heads 0 to 11"),
        (lambda: plan(ZeroAblate(Layer(12).mlp_out)), "L12 mlp_out: openai-community/gpt2 has layers 0 to 11"),
        (
            lambda: plan(ZeroAblate(Head(0, 0).k.at(50))),
            "L0H0 k at 50: position 50 does not exist in a prompt of 50 tokens (0 to 49, or -50 to -1 from the end)",
        ),
        (lambda: plan(ZeroAblate(Head(0, 0).k.at(-51))), "position -51 does not exist in a prompt of 50 tokens"),
        (
            lambda: plan(ZeroAblate(Head(0, 0)), batch_size=0),
            'batch_size=0: possible are "auto" and a whole number from 1',
        ),
        (lambda: plan(ZeroAblate(Head(0, 0)), batch_size="big"), "batch_size='big': possible are"),
        (lambda: plan(ZeroAblate(Head(0, 0)), batch_size=2.5), "batch_size=2.5: possible are"),
        (lambda: plan(ZeroAblate(Head(0, 0)), batch_size=None), "batch_size=None: possible are"),
        (
            lambda: plan(groups=(Group((0,), 1025, (3,)),)),
            "a prompt has 1025 tokens: openai-community/gpt2 reads at most 1024",
        ),
        (
            lambda: plan(ZeroAblate(Head(0, 0).k.at(49)) + MeanAblate(Head(0, 0).k.at(-1))),
            "(site=Head(0, 0).k.at(-1), over='example') and ZeroAblate(site=Head(0, 0).k.at(49)); keep one",
        ),
    ],
)
def test_what_does_not_exist_is_refused(make, message):
    with pytest.raises(DeclarationError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plan(Patch(Head(0, 0), source="noisy")), "source='noisy'): the task has the runs clean and corrupted"),
        (lambda: plan(ZeroAblate(Head(0, 0)), base="dirty"), "base='dirty': the task has the runs clean and corrupted"),
        (lambda: plan(Patch(Head(0, 0)), runs=("clean",)), "the task has the runs clean"),
    ],
)
def test_a_run_the_task_has_not_got_is_refused(make, message):
    with pytest.raises(UnknownNameError) as caught:
        make()
    assert message in str(caught.value)
    assert isinstance(caught.value, HeadwiseError)
