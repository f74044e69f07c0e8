"""Calls on one model take turns, models side by side do not disturb each other, and nothing waits for ever."""

import asyncio
import copy
import threading

import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import Head, ZeroAblate
from headwise.metrics import Card, Metric, loss
from headwise.studies import (
    measure,
)
from tests.support.threads import CALLS, LONG, TASK, at_once, small


def mixed(model, first, times):
    """Calls of every kind, in an order of their own."""
    names = [*CALLS]
    return [(name, CALLS[name](model)) for at in range(times) for name in [names[(first + at) % len(names)]]]


def test_calls_on_one_model_from_many_threads_give_the_numbers_of_calls_one_by_one():
    module = small()
    handles = [hw.load(module), hw.load(module), hw.load(module)]
    wanted = {name: call(hw.load(small())) for name, call in CALLS.items()}
    jobs = [lambda at=at: mixed(handles[at % 3], at, 10) for at in range(8)]
    for found in at_once(*jobs):
        for name, one in found:
            xr.testing.assert_equal(one, wanted[name])
    assert all(handle._memory.call is None for handle in handles)


def test_models_without_common_parts_run_side_by_side():
    models = [hw.load(small(seed)) for seed in (1, 2)] + [hw.load("words-2l")]
    wanted = [{name: call(model) for name, call in CALLS.items()} for model in models]
    inside, met = [threading.Event(), threading.Event()], []

    def one(at):
        def meet(done, total):
            inside[at].set()
            met.append(inside[1 - at].wait(LONG))

        measure(models[at], TASK, ZeroAblate(Head(0, 0)), progress=meet)
        return []

    at_once(lambda: one(0), lambda: one(1))
    assert met
    assert all(met), "each was in a call while the other was"
    jobs = [lambda model=model, at=at: mixed(model, at, 8) for at, model in enumerate(models)]
    for at, found in enumerate(at_once(*jobs)):
        for name, dataset in found:
            xr.testing.assert_equal(dataset, wanted[at][name])


def test_asyncio_to_thread():
    model = hw.load(small())

    async def all_of_them():
        return await asyncio.gather(*(asyncio.to_thread(CALLS[name], model) for name in [*CALLS] * 3))

    for name, found in zip([*CALLS] * 3, asyncio.run(all_of_them()), strict=True):
        xr.testing.assert_equal(found, CALLS[name](model))


def test_calls_that_nobody_waits_for_any_more_leave_the_model_free():
    module = small().train()
    model, begun, go_on = hw.load(module), threading.Event(), threading.Event()

    def hold(done, total):
        begun.set()
        go_on.wait(LONG)

    async def cancelled():
        task = asyncio.create_task(asyncio.to_thread(measure, model, TASK, ZeroAblate(Head(0, 0)), progress=hold))
        await asyncio.to_thread(begun.wait, LONG)
        task.cancel()
        go_on.set()

    asyncio.run(cancelled())
    (found,) = at_once(lambda: measure(model, TASK))
    xr.testing.assert_equal(found, measure(model, TASK))
    assert all(one.training for one in module.modules())


@pytest.mark.parametrize("how", ["same handle", "another handle"])
def test_a_call_inside_a_call(how):
    module = small()
    model = hw.load(module)
    inner, wanted, found = model if how == "same handle" else hw.load(module), measure(model, TASK), []
    outer = measure(model, TASK, ZeroAblate(Head(1, 1)))

    def progress(done, total):
        found.append(measure(inner, TASK))

    xr.testing.assert_equal(measure(model, TASK, ZeroAblate(Head(1, 1)), progress=progress), outer)

    assert len(found) >= 3
    for one in found:
        xr.testing.assert_equal(one, wanted)


def scoring(inner, found):
    """The loss, by a kernel that calls headwise on a model."""

    def kernel(logits, targets):
        found.append(measure(inner, TASK))
        return loss.kernel(logits, targets)

    return Metric(Card("loss", loss.card.long_name, "nats", loss.card.bounds), "logits", kernel, loss.prepare)


def test_a_metric_may_measure_another_model_but_not_the_one_that_it_scores():
    module, found = small(), []
    model, other = hw.load(module), hw.load(small(4))
    wanted = measure(model, TASK, ZeroAblate(Head(1, 1)), check=False)
    made = measure(model, TASK, ZeroAblate(Head(1, 1)), scoring(other, found), check=False)
    xr.testing.assert_allclose(made, wanted, rtol=1e-6, atol=1e-6)
    assert found
    for one in found:
        xr.testing.assert_equal(one, measure(other, TASK))
    for inner in (model, hw.load(module)):
        with pytest.raises(DeclarationError, match=r"^a pass of this model is under way, and no o"):
            measure(model, TASK, ZeroAblate(Head(1, 1)), scoring(inner, found), check=False)
        xr.testing.assert_equal(measure(inner, TASK, ZeroAblate(Head(1, 1)), check=False), wanted)


def test_threads_that_wait_for_each_others_models_are_told():
    models, both = [hw.load(small(seed)) for seed in (1, 2)], threading.Barrier(2)
    wanted = [measure(model, TASK) for model in models]

    def one(at):
        met = []

        def other(done, total):
            if not met:
                met.append(both.wait(LONG))
                measure(models[1 - at], TASK)

        try:
            return measure(models[at], TASK, progress=other)
        except DeclarationError as error:
            return str(error)

    found = at_once(lambda: one(0), lambda: one(1))
    (told,) = [one for one in found if isinstance(one, str)]
    assert told.startswith("two threads wait for each other: each is in a call on a model, and calls the other's in it")
    for at, one in enumerate(found):
        if not isinstance(one, str):
            xr.testing.assert_equal(one, wanted[at])
    for model, one in zip(models, wanted, strict=True):
        xr.testing.assert_equal(*at_once(lambda model=model: measure(model, TASK)), one)


def test_modules_that_share_parts_take_turns():
    one, two = small(1), small(2)
    two.transformer, two.lm_head = one.transformer, copy.deepcopy(two.lm_head)
    whole, half, other = hw.load(one), hw.load(two), hw.load(small(5))
    wanted = [measure(whole, TASK), measure(half, TASK)]
    assert not wanted[0].equals(wanted[1])
    begun, go_on, order = threading.Event(), threading.Event(), []

    def hold(done, total):
        begun.set()
        go_on.wait(LONG)
        order.append("whole")

    def second():
        begun.wait(LONG)
        threading.Timer(0.3, go_on.set).start()
        found = measure(half, TASK, progress=lambda done, total: order.append("half"))
        return found

    first, found = at_once(lambda: measure(whole, TASK, progress=hold), second)
    xr.testing.assert_equal(first, wanted[0])
    xr.testing.assert_equal(found, wanted[1])
    assert order == sorted(order, reverse=True)
    other.module.transformer.h[0] = one.transformer.h[0]  # a part from elsewhere, after it was known
    begun.clear(), go_on.clear(), order.clear()
    half = hw.load(other.module)
    at_once(lambda: measure(whole, TASK, progress=hold), second)
    assert order == sorted(order, reverse=True)


def test_a_thread_that_fails_leaves_the_model_free_and_its_modes_as_they_were():
    module = small().train()
    module.transformer.h[0].eval()
    modes = {name: one.training for name, one in module.named_modules()}
    model = hw.load(module)
    wanted = measure(model, TASK)

    def broken(logits, targets):
        raise KeyError("mine")

    mine = Metric(Card("mine", "", "1", (0, 1)), "logits", broken, loss.prepare)

    def fails():
        with pytest.raises(KeyError, match="mine"):
            measure(model, TASK, ZeroAblate(Head(0, 0)), mine)

    jobs = [fails, lambda: measure(model, TASK)] * 4
    for found in at_once(*jobs)[1::2]:
        xr.testing.assert_equal(found, wanted)
    assert {name: one.training for name, one in module.named_modules()} == modes


def test_a_model_that_is_opened_while_a_call_runs_on_its_module_is_as_it_would_be_else():
    module = small().train()
    model, begun, go_on = hw.load(module), threading.Event(), threading.Event()

    def hold(done, total):
        begun.set()
        go_on.wait(LONG)

    def second():
        begun.wait(LONG)
        threading.Timer(0.3, go_on.set).start()
        return hw.load(module), hw.load(module, dtype="float64")

    found, (same, wider) = at_once(lambda: measure(model, TASK, progress=hold), second)
    xr.testing.assert_equal(found, measure(same, TASK))
    assert all(one.training for one in wider.module.modules()), "a copy has the modes of the module, not of the call"
