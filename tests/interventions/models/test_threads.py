"""Threads: calls on one model take turns, models side by side do not disturb each other, and nothing waits for ever."""

import asyncio
import copy
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
import xarray as xr
from transformers import AutoModelForCausalLM, PreTrainedModel

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import Grid, Head, MeanAblate, Patch, ZeroAblate
from headwise.interventions.begin import begin
from headwise.interventions.load import load
from headwise.interventions.run import untrained
from headwise.metrics import Card, Metric, induction, loss
from headwise.studies import (
    InductionStudy,
    Prompts,
    RepeatedTokens,
    capture,
    compare_estimates,
    composition_scores,
    measure,
    rerun,
    write_netcdf,
)
from tests.oracles import raw_hooks

TASK = RepeatedTokens(n=2, length=5)
LONG = 120.0
"""Seconds after which what still waits is taken to wait for ever."""
CALLS = {
    "measure": lambda model: measure(model, TASK, ZeroAblate(Head(1, 1)), [loss, induction]),
    "sweep": lambda model: measure(model, TASK, Grid(lambda head: Patch(Head(0, head)), head=range(2)), batch_size=1),
    "capture": lambda model: capture(model, TASK, [Head(1, 0).pattern, Head(0, 1).head_out]),
    "gradient": lambda model: measure(model, TASK, {"one": MeanAblate(Head(0, 1))}, estimator="gradient"),
    "estimates": lambda model: compare_estimates(model, TASK, {"one": Patch(Head(0, 1))}, loss),
    "composition": lambda model: composition_scores(model, draws=3),
    "weights": lambda model: xr.Dataset({"W_Q": (("a", "b", "c"), model.head_weights(1).W_Q.detach().numpy())}),
}


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def small(seed=3):
    return raw_hooks.random_gpt2(2, 4, 8, 60, 40, seed=seed)


def at_once(*jobs):
    """What jobs give that begin at the same moment, each in a thread of its own; an error of one is raised."""
    start, futures = threading.Barrier(len(jobs)), [Future() for _ in jobs]

    def run(job, future):
        start.wait(LONG)
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    for job, future in zip(jobs, futures, strict=True):
        threading.Thread(target=run, args=(job, future), daemon=True).start()
    return [future.result(LONG) for future in futures]


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


def test_one_thread_at_a_time_opens_models(tmp_path, monkeypatch):
    model = hw.load(small())
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    tie, reads = PreTrainedModel.tie_weights, AutoModelForCausalLM.from_pretrained
    inside, most, guard = [0], [0], threading.Lock()

    def watched(*args, **options):
        with guard:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        try:
            threading.Event().wait(0.05)
            return reads(*args, **options)
        finally:
            with guard:
                inside[0] -= 1

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    found = at_once(*[lambda: hw.load(tmp_path)] * 4)
    assert most == [1]
    assert PreTrainedModel.tie_weights is tie, "transformers replaces it while it opens a model"
    for one in found:
        xr.testing.assert_equal(measure(one, TASK), measure(model, TASK))


def test_random_weights_do_not_depend_on_other_threads():
    models = [hw.load(small(seed)) for seed in (1, 2, 3, 4)]

    def drawn(model):
        with begin(model, check=False) as call:
            return [load(untrained.untrained_module(model, call.identity, seed)).weight_hash for seed in range(6)]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    wanted = [drawn(model) for model in models]
    assert at_once(*(lambda model=model: drawn(model) for model in models)) == wanted
    assert torch.equal(torch.get_rng_state(), before), "the generator is as it was"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_numbers_do_not_depend_on_the_number_format_of_the_process(name, dtype):
    """Another thread that opens a model sets it for as long."""
    model = hw.load(small())
    wanted = CALLS[name](model)
    torch.set_default_dtype(dtype)
    try:
        found = CALLS[name](hw.load(model.module))
    finally:
        torch.set_default_dtype(torch.float32)
    xr.testing.assert_equal(found, wanted)


def test_an_executor_of_threads_beside_other_threads(tmp_path):
    model = hw.load(small())
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    model = hw.load(tmp_path)
    grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(4))
    wanted, plain = measure(model, TASK, grid, batch_size=2), measure(model, TASK)
    with ThreadPoolExecutor(3) as pool:
        found = at_once(
            *[lambda: measure(model, TASK, grid, batch_size=2, executor=pool)] * 2,
            *[lambda: [measure(model, TASK) for _ in range(5)]] * 2,
        )
    for one in found[:2]:
        xr.testing.assert_equal(one, wanted)
    for many in found[2:]:
        for one in many:
            xr.testing.assert_equal(one, plain)


def test_a_study_beside_measurements_and_a_rerun(words_model, tmp_path):
    study, task = InductionStudy(n=2, length=4, draws=2), Prompts(["dog cat dog"], answers=["cat"])
    stored = write_netcdf(measure(words_model, task, ZeroAblate(Head(1, 2))), tmp_path / "one.nc")
    wanted, plain = study.run(words_model), measure(words_model, task)
    other = hw.load(words_model.module, tokenizer=words_model.tokenizer)
    tree, agreement, *many = at_once(
        lambda: study.run(other),
        lambda: rerun(stored or tmp_path / "one.nc", model=words_model),
        *[lambda: [measure(words_model, task) for _ in range(4)]] * 2,
    )
    for node in wanted.subtree:
        xr.testing.assert_equal(tree[node.path].to_dataset(), node.to_dataset())
    assert agreement.agrees
    assert set(agreement.differences.values()) == {0.0}
    for one in [one for some in many for one in some]:
        xr.testing.assert_equal(one, plain)


def test_calls_on_a_model_of_a_server_take_turns(server):
    model = hw.load("words-2l", remote=True)
    task = Prompts(["dog cat dog", "apple banana cherry apple"], answers=["cat", "banana"])
    calls = [
        lambda: measure(model, task, ZeroAblate(Head(1, 2))),
        lambda: capture(model, task, Head(1, 2).pattern),
        lambda: measure(model, task),
    ]
    wanted = [call() for call in calls]
    for found in at_once(*[lambda: [call() for call in calls]] * 3):
        for one, other in zip(found, wanted, strict=True):
            xr.testing.assert_equal(one, other)
    assert model._memory.call is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have():
    model, begun, go_on = hw.load(small()), threading.Event(), threading.Event()
    measure(model, TASK)

    def hold(done, total):
        begun.set()
        go_on.wait(LONG)

    thread = threading.Thread(target=measure, args=(model, TASK), kwargs={"progress": hold})
    thread.start()
    begun.wait(LONG)
    child = os.fork()
    if not child:  # takes the turn that the other thread has where it was forked
        with begin(model, check=False):
            os._exit(0)
    limit = threading.Timer(LONG, os.kill, (child, 9))
    limit.start()
    try:
        assert os.waitpid(child, 0)[1] == 0
    finally:
        limit.cancel()
        go_on.set()
        thread.join()
