"""Running out of memory: a pass is done again in halves, later ones are kept as small, and no number changes."""

import gc
import tracemalloc

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import ModelError
from headwise.interventions import Grid, Head, Layer, MeanAblate, Patch
from headwise.interventions.run import engine, memory
from headwise.interventions.traced.passes import server_jobs
from headwise.metrics import induction, logit_diff, loss
from headwise.studies import RepeatedTokens, measure
from tests.oracles import raw_hooks

TASK = RepeatedTokens(n=5, length=6, seed=4)


def grid(layers=2, heads=4):
    kinds = {"patch": Patch, "mean": MeanAblate}
    return Grid(
        lambda kind, layer, head: kinds[kind](Head(layer, head)),
        kind=list(kinds),
        layer=range(layers),
        head=range(heads),
    )


def refusing(monkeypatch, name, allowed, error):
    """Let a function of the engine fail where it is given more rows than allowed; returns the rows of each call."""
    real, seen = getattr(engine, name), []

    def stub(model, *arguments):
        rows = arguments[2].rows if name == "run_part" else arguments[1].size
        seen.append(rows)
        if rows > allowed:
            raise error
        return real(model, *arguments)

    monkeypatch.setattr(engine, name, stub)
    return seen


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("allowed", [1, 3, 17])
def test_a_pass_that_runs_out_of_memory_is_done_in_halves(small_model, monkeypatch, allowed, error):
    wanted = measure(small_model, TASK, grid(), [loss, logit_diff], per_position=True)
    seen = refusing(monkeypatch, "run_part", allowed, error)
    calls = []
    found = measure(
        small_model, TASK, grid(), [loss, logit_diff], per_position=True, progress=lambda *at: calls.append(at)
    )
    for name in ("loss", "logit_diff", "baseline_loss"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-6)
    assert max(seen) > allowed >= min(seen)
    assert sum(rows for rows in seen if rows <= allowed) == 16 * 5, "each row is done once"
    assert calls[-1][0] == calls[-1][1]


def test_a_row_that_fits_beside_fewer_prompts_only(small_model, monkeypatch):
    """What one row needs depends on the runs held beside it, so the prompts of a pass are halved too."""
    wanted = measure(small_model, TASK, grid(), [loss])
    real, seen = engine.run_part, []

    def stub(model, plan, chunk, part, known):
        seen.append(chunk.size)
        if chunk.size > 2:
            raise ERRORS[0]
        return real(model, plan, chunk, part, known)

    monkeypatch.setattr(engine, "run_part", stub)
    found = measure(small_model, TASK, grid(), [loss])
    np.testing.assert_allclose(found["loss"], wanted["loss"], atol=1e-6)
    assert max(seen) == 5
    assert min(seen) <= 2


def test_later_passes_are_kept_as_small(small_model, monkeypatch):
    monkeypatch.setattr(memory, "budget", lambda device: 1_200_000)
    planned = [hw.plan(small_model, TASK, grid(), [loss], timed=False)]
    assert planned[0].passes > 2
    seen = refusing(monkeypatch, "run_part", 5, ERRORS[0])
    measure(small_model, TASK, grid(), [loss], check=False)
    failures = [number for number, rows in enumerate(seen) if rows > 5]
    assert max(failures) < 4, f"after the first pass none is tried at full size again: {seen}"


def test_runs_that_are_too_large_are_read_in_halves(small_model, monkeypatch):
    wanted = measure(small_model, TASK, grid(), [loss, induction])
    seen = refusing(monkeypatch, "run_unmodified", 2, ERRORS[0])
    found = measure(small_model, TASK, grid(), [loss, induction])
    for name in wanted.data_vars:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-6)
    assert seen[0] == 5
    assert sum(rows for rows in seen if rows <= 2) == 5


@pytest.mark.parametrize("name", ["run_part", "run_unmodified"])
def test_a_single_row_that_does_not_fit_is_said(small_model, monkeypatch, name):
    refusing(monkeypatch, name, 0, ERRORS[0])
    with pytest.raises(ModelError, match="more memory"):
        measure(small_model, TASK, grid(), [loss])


def test_other_errors_are_not_taken_for_it(small_model, monkeypatch):
    refusing(monkeypatch, "run_part", 0, RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        measure(small_model, TASK, grid(), [loss])


def test_an_error_inside_a_trace_is_recognised(small_model):
    def hungry(logits, targets):
        raise torch.OutOfMemoryError("CUDA out of memory")

    from headwise.metrics import Card, Metric

    metric = Metric(Card("hungry", "", "1", (0, 1)), "logits", hungry, loss.prepare)
    with pytest.raises(ModelError, match="more memory"):
        measure(small_model, TASK, grid(), [metric])


@pytest.mark.parametrize("budget", [1, 10_000, 200_000, 10**9])
def test_results_do_not_depend_on_the_budget(small_model, monkeypatch, budget):
    what = Grid(lambda layer, at: Patch(Layer(layer).resid_pre.at(at)), layer=range(2), at=range(12))
    wanted = measure(small_model, TASK, what, [loss, logit_diff])
    monkeypatch.setattr(memory, "budget", lambda device: budget)
    found = measure(small_model, TASK, what, [loss, logit_diff])
    for name in wanted.data_vars:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-6)


def test_memory_is_flat_in_the_number_of_conditions(monkeypatch):
    """The largest set of live tensors in a trace, for one grid and for eight times as many conditions."""
    model = hw.load(raw_hooks.random_gpt2(2, 4, 8, 60, 40))
    monkeypatch.setattr(memory, "budget", lambda device: 2**24)
    peaks = []
    real = server_jobs.planned

    def watched(*arguments):
        values = real(*arguments)
        tensors = {id(one.untyped_storage()): one.untyped_storage().nbytes() for one in _tensors()}
        peaks[-1] = max(peaks[-1], sum(tensors.values()))
        return values

    monkeypatch.setattr(server_jobs, "planned", watched)
    for times in (1, 8):
        peaks.append(0)
        what = {f"{number} {head}": Patch(Head(1, head)) for number in range(12 * times) for head in range(4)}
        measure(model, TASK, what, [loss])
    assert len(peaks) == 2
    assert peaks[1] < 1.1 * peaks[0]


def _tensors():
    return [one for one in gc.get_objects() if type(one) is torch.Tensor]


def test_weights_are_hashed_without_a_copy(words_model):
    largest = max(one.nbytes for one in words_model.module.state_dict().values())
    tracemalloc.start()
    assert words_model.weight_hash == "abb6b470135c2619"
    assert tracemalloc.get_traced_memory()[1] < largest / 2
    tracemalloc.stop()


def test_the_budget_is_a_share_of_free_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 80 * 2**20)
    assert memory.budget(torch.device("cpu")) == 20 * 2**20
    monkeypatch.setattr(memory, "free_memory", lambda: 2**40)
    assert memory.budget(torch.device("cpu")) == memory.DEFAULT_BUDGET
