"""Workers: the same numbers from any executor, pieces kept as they come, and what a lost worker costs."""

import os
import pickle
import signal
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import raw_hooks
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ModelError
from headwise.interventions import Grid, Head, MeanAblate, Patch, ResampleAblate, ZeroAblate
from headwise.metrics import Card, Metric, induction, logit_diff, loss, self_attention
from headwise.studies import InductionStudy, Prompts, RepeatedTokens, measure, workers

TASK = RepeatedTokens(n=4, length=6)
KINDS = {"patch": Patch, "mean": MeanAblate, "resample": ResampleAblate}
GRID = Grid(lambda kind, layer, head: KINDS[kind](Head(layer, head)), kind=list(KINDS), layer=range(2), head=range(4))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Here and in workers: other threads round otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Here(Executor):
    """Runs each piece at once, as a worker would that has everything: arguments and values travel as bytes."""

    def __init__(self, fails=()):
        self.fails, self.errands = set(fails), []

    def submit(self, function, errand):
        future = Future()
        self.errands.append(errand)
        if len(self.errands) in self.fails:
            future.set_exception(RuntimeError("the worker went away"))
            return future
        try:
            future.set_result(pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(errand))))))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that workers can open."""
    where = tmp_path_factory.mktemp("models") / "small"
    model = hw.load(raw_hooks.random_gpt2(2, 4, 8, 60, 40, seed=3))
    model.module.save_pretrained(where)
    model.tokenizer.save_pretrained(where)
    return where


def sweep(model, executor, task=TASK, what=GRID, metrics=(loss, logit_diff), **options):
    options = {"batch_size": 4, "per_position": True} | options
    return measure(model, task, what, metrics, executor=executor, **options)


def test_the_same_numbers_whoever_computes_them(folder):
    model = hw.load(folder)
    wanted = sweep(model, None)
    executor = Here()
    found = sweep(model, executor)
    xr.testing.assert_equal(found, wanted)
    assert 4 < len(executor.errands) <= workers.PIECES
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
    assert len(executor.errands) > 10
    assert workers.current(words_model) is None
    assert found.attrs["conclusion"] == wanted.attrs["conclusion"]
    for node in wanted.subtree:
        xr.testing.assert_allclose(found[node.path].dataset, node.dataset, rtol=1e-6, atol=1e-6)
    with pytest.raises(DeclarationError, match="is a module in memory"):
        study.run(hw.load(raw_hooks.random_gpt2(2, 4, 8, 60, 40, seed=3)), executor=executor)


def test_pieces_that_come_back_are_kept(folder, tmp_path):
    model, out = hw.load(folder), tmp_path / "sweep.nc"
    wanted = sweep(model, None)
    first = Here(fails=[2, 5])
    with pytest.raises(ModelError, match=r"2 of \d+ pieces were lost with their workers \(the worker went away\)"):
        sweep(model, first, out=out)
    second = Here()
    xr.testing.assert_equal(sweep(model, second, out=out), wanted)
    assert len(second.errands) <= 2
    xr.testing.assert_equal(xr.load_dataset(out), wanted)


def test_a_pool_of_processes(folder, tmp_path):
    model = hw.load(folder)
    wanted = sweep(model, None)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        xr.testing.assert_equal(sweep(model, pool, out=tmp_path / "sweep.nc"), wanted)


def test_threads_give_right_numbers_too(folder):
    model = hw.load(folder)
    with ThreadPoolExecutor(3) as pool:
        xr.testing.assert_equal(sweep(model, pool), sweep(model, None))


def die(errand):
    """A worker that is killed at its second piece."""
    mark = os.environ["HEADWISE_TEST_MARK"]
    with open(mark, "a") as file:
        file.write("x")
    if os.path.getsize(mark) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return REAL(errand)


REAL = workers.run_errand


def test_a_worker_that_is_killed_costs_its_piece(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(workers, "run_errand", die)
    model, out = hw.load(folder), tmp_path / "sweep.nc"
    wanted = sweep(model, None)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool, pytest.raises(ModelError, match="were lost"):
        sweep(model, pool, out=out)
    kept = list((tmp_path / "sweep.nc.parts").glob("*.nc"))
    assert kept, "the first piece was finished before the worker died"
    monkeypatch.undo()
    xr.testing.assert_equal(sweep(model, Here(), out=out), wanted)


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
    with pytest.raises(ModelError, match="has other weights on a worker"):
        sweep(model, Here())


def test_a_dask_cluster_with_a_worker_that_is_killed(folder, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs the extra cluster")
    model, out = hw.load(folder), tmp_path / "sweep.nc"
    wanted = sweep(model, None)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        killed = []

        def kill_one(done, total):
            if not killed:
                killed.extend(client.run(os.getpid).values())
                os.kill(killed[0], signal.SIGKILL)

        found = sweep(model, client.get_executor(), out=out, progress=kill_one)
    assert len(killed) == 2
    xr.testing.assert_equal(found, wanted)
    xr.testing.assert_equal(xr.load_dataset(out), wanted)
