"""What other threads do meanwhile changes no number: they open models, set formats, share out passes, fork."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import xarray as xr
from transformers import AutoModelForCausalLM, PreTrainedModel

import headwise as hw
from headwise.interventions import Grid, Head, ZeroAblate
from headwise.interventions.begin import begin
from headwise.interventions.load import load
from headwise.interventions.run import untrained
from headwise.studies import (
    InductionStudy,
    Prompts,
    capture,
    measure,
    rerun,
    write_netcdf,
)
from tests.support.threads import CALLS, LONG, TASK, at_once, small


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
