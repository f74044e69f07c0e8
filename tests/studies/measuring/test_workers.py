"""Workers: the same numbers from any executor, and pieces kept as they come."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import count
from multiprocessing import get_context

import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ModelError
from headwise.interventions import Grid, Head, Patch, ZeroAblate
from headwise.interventions.run import engine, memory
from headwise.metrics import Card, Metric, induction, logit_diff, loss, self_attention
from headwise.studies import InductionStudy, Prompts, plan
from headwise.studies.measuring import context, executors
from headwise.studies.storage.registry import metric_names
from headwise.studies.training.words_2l import build_tokenizer
from tests.oracles import raw_hooks
from tests.support.workers import GRID, TASK, Here, sweep


def test_the_same_numbers_whoever_computes_them(folder):
    model = hw.load(folder)
    wanted = sweep(model, None)
    executor = Here()
    found = sweep(model, executor)
    xr.testing.assert_equal(found, wanted)
    assert 4 < len(executor.items) <= executors.PIECES
    for metrics in ([loss, induction], [self_attention]):
        options = {"metrics": metrics, "per_position": False}
        xr.testing.assert_equal(sweep(model, Here(), **options), sweep(model, None, **options))


def test_prompts_of_unequal_length_travel(words_model):
    task = Prompts(["dog cat dog", "apple banana cherry apple"], answers=["cat", "banana"])
    options = {"task": task, "what": {"one": Patch(Head(0, 1), source="clean"), "two": ZeroAblate(Head(1, 2))}}
    options["metrics"] = [loss]
    xr.testing.assert_equal(sweep(words_model, Here(), **options), sweep(words_model, None, **options))


def test_the_whole_study_on_workers(words_model, tmp_path):
    study, executor = InductionStudy(n=4, length=6, draws=2), Here()
    found, wanted = study.run(words_model, out=tmp_path / "study.nc", executor=executor), study.run(words_model)
    assert len(executor.items) > 10
    assert context.current().executor is None
    assert found.attrs["conclusion"] == wanted.attrs["conclusion"]
    for node in wanted.subtree:
        xr.testing.assert_allclose(found[node.path].dataset, node.dataset, rtol=1e-6, atol=1e-6)
    with pytest.raises(DeclarationError, match="is a module in memory"):
        study.run(hw.load(raw_hooks.random_gpt2(2, 4, 8, 60, 40, seed=3)), executor=executor)


def test_pieces_that_come_back_are_kept(folder, tmp_path):
    model, out = hw.load(folder), tmp_path / "sweep.nc"
    wanted = sweep(model, None)
    first = Here(fails=[2, 5])
    with pytest.raises(ModelError, match=r"2 of \d+ pieces were lost with their workers \(BrokenExecutor: the worker"):
        sweep(model, first, out=out)
    second = Here()
    xr.testing.assert_equal(sweep(model, second, out=out), wanted)
    assert len(second.items) <= 2
    xr.testing.assert_equal(xr.load_dataset(out), wanted)


@pytest.mark.parametrize("estimator", ["gradient", "integrated"])
def test_estimates_take_no_executor(folder, estimator):
    model, executor = hw.load(folder), Here()
    with pytest.raises(DeclarationError, match=f"executor=...: estimator='{estimator}' takes few passes, which run he"):
        sweep(
            model,
            executor,
            estimator=estimator,
            metrics=[loss],
            per_position=False,
            what=Grid(lambda layer, head: Patch(Head(layer, head)), layer=range(2), head=range(4)),
        )
    with context.using(executor=executor):
        sweep(model, None, estimator=estimator, metrics=[loss], per_position=False, what=Patch(Head(0, 1)))
    assert not executor.items


def test_the_passes_are_those_that_were_planned(folder, monkeypatch):
    ran, run_chunks = [], engine.run_chunks

    def seen(model, chunks, readers, inputs, outcome, *rest):
        ran.append((tuple(chunks), outcome.plan.budget))
        return run_chunks(model, chunks, readers, inputs, outcome, *rest)

    monkeypatch.setattr(engine, "run_chunks", seen)
    model, executor = hw.load(folder), Here()
    wanted = sweep(model, None, batch_size=3)
    planned = plan(model, TASK, GRID, (loss, logit_diff), batch_size=3, timed=False)
    ran.clear()
    budgets = count(10**8)  # of a worker's own, another each time
    monkeypatch.setattr(memory, "budget", lambda device: next(budgets))
    xr.testing.assert_equal(sweep(model, executor, batch_size=3), wanted)
    assert ran == [(item.chunks, 10**8) for item in executor.items]
    sent = [(chunk.group, chunk.examples, one) for chunks, _ in ran for chunk in chunks for one in chunk.passes]
    assert sent == [(chunk.group, chunk.examples, one) for chunk in planned.chunks for one in chunk.passes]


def test_a_tokenizer_of_ones_own_stays_here(words_model):
    words = sorted(words_model.tokenizer.get_vocab(), key=words_model.tokenizer.get_vocab().get)
    own = hw.load("words-2l", tokenizer=build_tokenizer([word for word in reversed(words) if word[0] != "<"]))
    options = {"task": Prompts(["dog cat dog"], answers=["cat"]), "what": ZeroAblate(Head(1, 2)), "metrics": [loss]}
    with pytest.raises(ModelError, match="words-2l has other tokens for these prompts on a worker than here"):
        sweep(own, Here(), **options)
    same = hw.load("words-2l", tokenizer=build_tokenizer())
    xr.testing.assert_equal(sweep(same, Here(), **options), sweep(words_model, None, **options))


def test_the_attention_that_was_chosen_travels(folder, monkeypatch):
    seen, run_item = [], executors.run_item

    def watched(item):
        pieces = run_item(item)
        seen.append(executors._opened(*item.model).module.config._attn_implementation)
        return pieces

    monkeypatch.setattr(executors, "run_item", watched)
    model = hw.load(folder)
    for chosen in ("eager", "sdpa"):
        model.module.set_attn_implementation(chosen)
        xr.testing.assert_equal(sweep(model, Here()), sweep(model, None))
        assert set(seen) == {chosen}
        seen.clear()


def test_a_pool_of_processes(folder, tmp_path):
    model = hw.load(folder)
    wanted = sweep(model, None)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        xr.testing.assert_equal(sweep(model, pool, out=tmp_path / "sweep.nc"), wanted)


def test_threads_give_right_numbers_too(folder):
    model = hw.load(folder)
    with ThreadPoolExecutor(3) as pool:
        xr.testing.assert_equal(sweep(model, pool), sweep(model, None))


def test_what_cannot_travel_is_refused_before_any_pass(folder):
    model = hw.load(folder)
    mine = Metric(Card("mine", "", "1", (0, 1)), "logits", lambda logits, targets: logits[..., 0], loss.prepare)
    with pytest.raises(DeclarationError, match="the metric mine cannot travel to workers"):
        sweep(model, Here(), metrics=[mine])
    with pytest.raises(DeclarationError, match="is a module in memory, which workers cannot open: save it in a folder"):
        sweep(hw.load(raw_hooks.random_gpt2(2, 4, 8, 60, 40, seed=3)), Here())


def test_other_weights_on_a_worker_are_found(folder):
    model = hw.load(folder)
    with torch.no_grad():
        model.module.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    with pytest.raises(ModelError, match=r"a worker cannot reproduce small: .* weights \w{16} here, \w{16} on"):
        sweep(model, Here())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_metric_comes_back_in_the_format_that_is_due(folder, dtype):
    model = hw.load(folder, dtype=dtype)
    every = [metric for _, metric in metric_names().values() if "bos" not in metric.name]
    options = {"metrics": every, "per_position": False, "what": ZeroAblate(Head(0, 1))}
    xr.testing.assert_equal(sweep(model, Here(), **options), sweep(model, None, **options))


@pytest.mark.parametrize("given", [None, "the same"])
def test_an_executor_that_gives_no_future_of_its_own_for_each_piece(folder, given):
    class Odd(Here):
        def submit(self, function, item):
            future = super().submit(function, item)
            self.one = getattr(self, "one", future)
            return None if given is None else self.one

    with pytest.raises(DeclarationError, match=r"its submit gives (NoneType|Future), where a new Future is due for e"):
        sweep(hw.load(folder), Odd())
