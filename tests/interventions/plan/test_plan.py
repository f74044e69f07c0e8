"""The plan: pure, checked before any forward pass, every condition and example exactly once."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise import studies
from headwise.errors import DeclarationError, HeadwiseError, UnknownNameError
from headwise.interventions import (
    Add,
    Head,
    Knockout,
    Layer,
    MeanAblate,
    Patch,
    PathPatch,
    ResampleAblate,
    Scale,
    ZeroAblate,
)
from headwise.interventions.base.shape import Group, Shape
from headwise.interventions.declare.changes import FromRun, Reduce
from headwise.interventions.plan import writes
from headwise.interventions.plan.cost import Extent, row_bytes
from headwise.interventions.plan.passes import Packer
from headwise.interventions.plan.plan import make_plan
from headwise.interventions.plan.writes import JOIN_STAGES, Keys, positions_in, writes_of
from headwise.interventions.traced.passes.planned_pass import reduce_examples
from headwise.metrics import logit_diff, loss
from headwise.studies import Prompts, RepeatedTokens

GPT2 = Shape(layers=12, heads=12, d_model=768, d_head=64, d_mlp=3072, vocabulary=50257, context=1024)
GROUP = Group(tuple(range(8)), 50, tuple(range(25, 49)))


def plan(*edits, groups=(GROUP,), runs=("clean", "corrupted"), base="clean", **options):
    conditions = [edit.edits() for edit in edits]
    return make_plan(
        conditions, model="openai-community/gpt2", shape=GPT2, groups=groups, runs=runs, base=base, **options
    )


def test_plan_imports_no_torch():
    code = "import sys, headwise.interventions.plan.plan; sys.exit('torch' in sys.modules or 'nnsight' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 12), st.integers(1, 64))
def test_every_condition_meets_every_example_once(conditions, first, second, batch_size):
    groups = (Group(tuple(range(first)), 10, (3,)), Group(tuple(range(first, first + second)), 12, (3,)))
    made = plan(*[ZeroAblate(Head(0, 0))] * conditions, groups=groups, batch_size=batch_size)
    met = Counter(
        (chunk.group, condition, groups[chunk.group].examples[example])
        for chunk in made.chunks
        for one in chunk.passes
        for condition in one.conditions
        for example in range(*chunk.examples)
    )
    assert set(met.values()) == {1}
    assert len(met) == conditions * (first + second)
    assert max(chunk.size * len(one.conditions) for chunk in made.chunks for one in chunk.passes) <= batch_size


def test_the_baseline_alone_keeps_to_the_batch_size():
    made = plan(batch_size=3)
    assert [chunk.examples for chunk in made.chunks] == [(0, 2), (2, 5), (5, 8)]
    assert (made.passes, made.steps) == (0, 6)


def test_edits_run_in_forward_order():
    made = plan(Patch(Layer(3).mlp_out) + ZeroAblate(Head(3, 1)) + ZeroAblate(Head(0, 11)))
    assert [str(edit.site) for edit in made.conditions[0]] == ["L0H11 z", "L3H1 z", "L3 mlp_out"]


HEADS = [ZeroAblate(Head(layer, head)) for layer in range(12) for head in range(12)]
RESIDUAL = [Patch(Layer(layer).resid_pre.at(position)) for layer in range(12) for position in range(50)]


def test_plan_says_how_much_it_is():
    lines = str(plan(*HEADS[120:], batch_size=96)).splitlines()
    assert lines[0] == "openai-community/gpt2: 24 conditions on 8 prompts of the clean run"
    assert lines[1] == "runs            2  as they are: clean and corrupted"
    assert lines[2] == "passes          2  at most 96 rows of 49 positions together"
    assert lines[3] == "logits             of the whole vocabulary at 192 of 400 positions"
    assert lines[4].startswith("work        0.266  of the naive way: 51.08 instead of 192 passes of a prompt")
    assert [line.split() for line in lines[-2:]] == [["10", "z", "96", "0", "0.223"], ["11", "z", "96", "0", "0.169"]]


def test_plan_names_conditions_that_change_nothing():
    made = plan(Patch(Head(11, 0).z.at(3)), Patch(Layer(3).resid_pre.at(49)), Patch(Head(11, 0).k.at(3)))
    assert str(made).splitlines()[-1].split()[:2] == ["none", "16"]
    assert [one.conditions for chunk in made.chunks for one in chunk.passes] == [(2,)]


def test_budget_holds_the_tensors_of_a_pass():
    extent = Extent(8, 0, 49, 24, 50257)
    assert Packer(GPT2, 50257, False, 2**30, 0.0).rows(GROUP) == 2**28 // row_bytes(GPT2, extent)
    assert Packer(GPT2, 50257, False, 1, 0.0).rows(GROUP) == 1
    small, large = (plan(*HEADS, budget=budget) for budget in (2**28, 2**31))
    assert small.passes > large.passes
    assert small.cost().memory < large.cost().memory
    assert small.cost().passes == large.cost().passes, "the same work, whatever the budget"


def test_memory_does_not_grow_with_the_number_of_conditions():
    few, many = plan(*HEADS[:60]).cost(), plan(*HEADS, *[Patch(edit.site) for edit in HEADS], *HEADS).cost()
    assert many.memory < 1.5 * few.memory


def test_conditions_stand_in_the_order_in_which_they_join():
    made = plan(ZeroAblate(Head(3, 1)), Patch(Head(0, 1).k), ZeroAblate(Layer(3).resid_pre), Patch(Layer(2).resid_post))
    (one,) = (one for chunk in made.chunks for one in chunk.passes)
    assert one.conditions == (1, 2, 3, 0)
    assert one.joins == ((0, writes.QKV), (3, writes.STREAM), (3, writes.STREAM), (3, writes.Z))


def test_late_positions_are_kept_apart_from_early_ones():
    made = plan(*RESIDUAL)
    starts = [one.start for one in made.chunks[0].passes]
    assert starts == sorted(starts)
    assert set(starts) == set(range(49))
    for one in made.chunks[0].passes:
        assert {made.writes[0][number][0].first for number in one.conditions} == {one.start}
    together = plan(*RESIDUAL[:50], overhead=1e13)
    assert {one.start for one in together.chunks[0].passes} == {0}


def by_hand(shape, layer, position, columns):
    """Operations of a residual patch at (layer, position), from first principles: 25 tokens twice, scored 25 .. 48."""
    positions = 49 - position
    scored = len([at for at in range(25, 49) if at >= position])
    d = shape.d_model
    total = 2 * scored * d * columns
    for later in range(layer, shape.layers):
        queries = scored if later == shape.layers - 1 else positions
        total += 2 * positions * d * 2 * d  # keys and values
        total += 2 * queries * d * (d + d + 8 * d)  # queries, output, MLP
        total += 2 * 2 * queries * 49 * d  # scores, and their sum over values
    return total


def test_residual_patching_costs_what_depends_on_the_patch():
    found = plan(*RESIDUAL, columns=2).cost()
    bound = 8 * sum(by_hand(GPT2, layer, position, 2) for layer in range(12) for position in range(49))
    assert found.passes == pytest.approx(bound, rel=1e-9)
    assert found.total < 1.02 * bound, "beside it, only the two runs as they are"


def test_the_yardstick_of_the_design():
    """Every head of GPT-2 small: at most half of naive with the loss, 0.37 with a logit difference."""
    one = (Group((0,), 50, tuple(range(25, 49))),)
    assert plan(*HEADS, groups=one).cost().share < 0.49
    assert plan(*HEADS, groups=one, columns=2).cost().share < 0.34


@pytest.mark.parametrize(
    ("edit", "layer", "point", "how", "value", "embedding"),
    [
        (ZeroAblate(Layer(0).embed), 0, "stream", "set", None, "embed"),
        (Add(Layer(0).embed, [1.0] * 768), 0, "stream", "add", (1.0,) * 768, "embed"),
        (ZeroAblate(Layer(3).resid_post), 4, "stream", "set", None, None),
        (ZeroAblate(Layer(11).resid_post), 12, "stream", "set", None, None),
        (Scale(Head(3, 1).head_out, 2.0), 3, "z", "scale", 2.0, None),
        (Add(Head(3, 1).head_out, [1.0] * 768), 3, "attn_out", "add", (1.0,) * 768, None),
        (Knockout(Head(3, 1), 4, 2), 3, "scores", "mask", Keys((2,)), None),
        (Knockout(Head(3, 1), 4, -48), 3, "scores", "mask", Keys((2,)), None),
        (PathPatch(Head(3, 1), "logits"), 12, "stream", "add", PathPatch(Head(3, 1), "logits"), None),
        (PathPatch(Head(3, 1), Head(5, 0).k), 5, "k", "set", PathPatch(Head(3, 1), Head(5, 0).k), None),
        (Patch(Head(3, 1).q, source="clean"), 3, "q", "set", FromRun("clean"), None),
        (MeanAblate(Head(3, 1)), 3, "z", "set", FromRun(None, Reduce.EXAMPLE), None),
        (MeanAblate(Head(3, 1), ("example", "position")), 3, "z", "set", FromRun(None, Reduce.EXAMPLE_POSITION), None),
        (ResampleAblate(Head(3, 1), seed=7), 3, "z", "set", FromRun(None, Reduce.PARTNER, 7), None),
    ],
)
def test_where_an_edit_takes_hold(edit, layer, point, how, value, embedding):
    (write,) = writes_of(edit.edits(), GPT2, GROUP)
    assert (write.layer, write.point, write.how) == (layer, point, how)
    assert (write.value, write.embedding) == (value, embedding)
    assert point in JOIN_STAGES


def test_what_reduces_a_run_has_one_name_in_the_plan_and_in_a_trace():
    source = torch.arange(24.0).reshape(2, 3, 4)
    taken = {
        Reduce.OWN: source[:, [1]],
        Reduce.PARTNER: source[[1, 0]][:, [1]],
        Reduce.EXAMPLE: source[:, [1]].mean(dim=0, keepdim=True),
        Reduce.EXAMPLE_POSITION: source.mean(dim=(0, 1), keepdim=True),
    }
    assert set(taken) == set(Reduce)
    for reduce, wanted in taken.items():
        value = {"reduce": reduce.value, "positions": [1], "partners": np.array([1, 0])}
        assert torch.equal(reduce_examples(source, value), wanted)


def test_positions_count_from_the_end():
    assert positions_in(Head(0, 0).z.at([-1, 2]), Group((0,), 10, ())) == [9, 2]
    assert positions_in(Head(0, 0).z, Group((0,), 10, ())) is None


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


@pytest.mark.parametrize(
    ("task", "what", "metric"),
    [
        (RepeatedTokens(n=2, length=4), ZeroAblate(Head(5, 0)), loss),
        (RepeatedTokens(n=2, length=4), Patch(Head(0, 0), source="noisy"), loss),
        (RepeatedTokens(n=2, length=4), PathPatch(Head(0, 0), Head(5, 0).k), loss),
        (RepeatedTokens(n=2, length=4), None, "los"),
        (Prompts(["dog cat"]), None, logit_diff),
        (Prompts(["dog"]), None, loss),
    ],
)
def test_a_plan_refuses_what_measuring_refuses(words_model, task, what, metric):
    messages = []
    for ask in (studies.plan, studies.measure):
        with pytest.raises(HeadwiseError) as caught:
            ask(words_model, task, what, [metric])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
