"""Workers: the same numbers from any executor, pieces kept as they come, and what a lost worker costs."""

import os
import pickle
import signal
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ModelError
from headwise.interventions import Grid, Head, MeanAblate, Patch, ResampleAblate, ZeroAblate
from headwise.interventions.run import engine, memory
from headwise.metrics import Card, Metric, induction, logit_diff, loss, self_attention
from headwise.studies import InductionStudy, Prompts, RepeatedTokens, measure, plan
from headwise.studies.measuring import context, executors
from headwise.studies.storage.registry import metric_names
from headwise.studies.training.words_2l import build_tokenizer
from tests.oracles import raw_hooks
from tests.support import mortal

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

    def __init__(self, fails=(), error=None, stops=None):
        """`error` comes of the pieces of these numbers; from the piece `stops` on, none is taken."""
        self.fails, self.stops, self.items = set(fails), stops, []
        self.error = error or BrokenExecutor("the worker went away")

    def submit(self, function, item):
        future = Future()
        if len(self.items) + 1 == self.stops:
            raise self.error
        self.items.append(item)
        if len(self.items) in self.fails:
            future.set_exception(self.error)
            return future
        try:
            future.set_result(pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(item))))))
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


class KilledWorker(Exception):
    """As Dask has it: of no built-in kind."""

    __module__ = "distributed.scheduler"


class CommClosedError(OSError):
    __module__ = "distributed.comm.core"


FAILURES = {
    "no module": (
        ModuleNotFoundError("No module named 'mine'"),
        "a piece failed on a worker: ModuleNotFoundError: No ",
    ),
    "a key": (KeyError("answer"), r"a piece failed on a worker: KeyError: 'answer'; 1 of \d+ pieces failed, and with"),
    "a shape": (RuntimeError("size of tensor a\nmust match"), "on a worker: RuntimeError: size of tensor a; 1 of"),
    "no text": (ValueError(), "a piece failed on a worker: ValueError; 1 of"),
    "a file": (PermissionError(13, "denied"), "a piece failed on a worker: PermissionError: "),
    "its words": (ModelError("this model is gone"), "^this model is gone$"),
    "what was declared": (DeclarationError("no such head"), "^no such head$"),
    "broken": (BrokenExecutor(), r"1 of \d+ pieces were lost with their workers \(BrokenExecutor\); with out="),
    "cancelled": (CancelledError(), "were lost with their workers"),
    "unplugged": (ConnectionResetError("reset"), "were lost with their workers"),
    "dask, killed": (KilledWorker("tried 4 times"), r"were lost with their workers \(KilledWorker: tried 4 times\)"),
    "dask, cut off": (CommClosedError("closed"), "were lost with their workers"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_whatever_befalls_a_piece_the_others_are_kept(folder, tmp_path, how):
    error, told = FAILURES[how]
    model, out = hw.load(folder), tmp_path / "sweep.nc"
    wanted = sweep(model, None)
    first, second = Here(fails=[1], error=error), Here()
    with pytest.raises((ModelError, DeclarationError), match=told) as caught:
        sweep(model, first, out=out)
    assert "\n" not in str(caught.value)
    xr.testing.assert_equal(sweep(model, second, out=out), wanted)
    assert [mortal.passes_of(one) for one in second.items] == [mortal.passes_of(first.items[0])]


def test_of_all_that_befell_what_cannot_be_mended_by_other_workers_is_told(folder):
    class Many(Here):
        def submit(self, function, item):
            self.error = errors[len(self.items) % len(errors)]
            return super().submit(function, item)

    errors = [BrokenExecutor("gone"), KeyError("answer"), ModelError("no room")]
    with pytest.raises(ModelError, match=r"^no room$"):
        sweep(hw.load(folder), Many(fails=[1, 2, 3]))
    errors.pop()
    with pytest.raises(ModelError, match=r"failed on a worker: KeyError: 'answer'; 1 of \d+ pieces failed"):
        sweep(hw.load(folder), Many(fails=[1, 2, 3]))


@pytest.mark.parametrize("error", [RuntimeError("no new futures after shutdown"), BrokenExecutor("broken")])
def test_pieces_that_are_not_taken_are_lost_and_the_others_kept(folder, tmp_path, error):
    model, out = hw.load(folder), tmp_path / "sweep.nc"
    wanted, whole = sweep(model, None), Here()
    sweep(model, whole)
    total = len(whole.items)
    with pytest.raises(ModelError, match=rf"{total - 3} of {total} pieces were lost with their workers \(.*{error}\)"):
        sweep(model, Here(stops=4, error=error), out=out)
    rest = Here()
    xr.testing.assert_equal(sweep(model, rest, out=out), wanted)
    assert set(map(mortal.passes_of, rest.items)) <= set(map(mortal.passes_of, whole.items[3:]))


def test_a_pool_that_was_broken_before(folder):
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        with pytest.raises(BrokenExecutor):
            pool.submit(os._exit, 1).result()
        with pytest.raises(ModelError, match=r"(\d+) of \1 pieces were lost with their workers \(BrokenProcessPool: "):
            sweep(hw.load(folder), pool)


@pytest.mark.parametrize(
    ("kernel", "told"), [(mortal.wrong_shapes, "RuntimeError: mat1 and mat2"), (mortal.wrong_key, "KeyError: 'answer'")]
)
def test_an_error_of_a_metric_is_no_lost_worker(folder, kernel, told):
    with pytest.raises(ModelError, match=f"^a piece failed on a worker: {told}") as caught:
        sweep(hw.load(folder), Here(), metrics=[mortal.metric(kernel)], check=False)
    assert "lost" not in str(caught.value)
    assert isinstance(caught.value.__cause__, (RuntimeError, KeyError))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_ends_it_at_once(folder, error):
    with pytest.raises(error):
        sweep(hw.load(folder), Here(fails=[1], error=error()))


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


def die(item):
    """A worker that is killed at its second piece."""
    mark = os.environ["HEADWISE_TEST_MARK"]
    with open(mark, "a") as file:
        file.write("x")
    if os.path.getsize(mark) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return REAL(item)


REAL = executors.run_item


def test_a_worker_that_is_killed_costs_its_piece(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(executors, "run_item", die)
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
    with pytest.raises(ModelError, match=r"a worker cannot reproduce small: .* weights \w{16} here, \w{16} on"):
        sweep(model, Here())


def test_a_dask_cluster_with_a_worker_that_is_killed(folder, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="needs the extra cluster")
    monkeypatch.setenv(mortal.FOLDER, str(tmp_path))
    monkeypatch.setattr(executors, "run_item", mortal.die_at_the_third)
    model, out = hw.load(folder), tmp_path / "sweep.nc"
    wanted = sweep(model, None)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = sweep(model, client.get_executor(), out=out)
    begun = {path.stem: path.read_text().splitlines() for path in tmp_path.glob("*.begun")}
    killed = begun.pop((tmp_path / "killed").read_text())
    assert len(killed) == 3
    assert killed[-1] in {one for others in begun.values() for one in others}, (
        "what it had in hand is begun anew elsewhere"
    )
    xr.testing.assert_equal(found, wanted)
    xr.testing.assert_equal(xr.load_dataset(out), wanted)


class Liar(Here):
    """Runs each piece, and gives something else for those of some numbers."""

    def __init__(self, lie, at=(2,)):
        super().__init__()
        self.lie, self.at, self.first = lie, at, None

    def submit(self, function, item):
        future = super().submit(function, item)
        pieces = future.result()
        self.first = self.first or pieces
        if len(self.items) not in self.at:
            return future
        lied = Future()
        lied.set_result(self.lie(pieces, self.first))
        return lied


def with_values(change):
    """A lie: the values of all conditions changed."""

    def lie(pieces, first):
        last = pieces[-1]
        return [*pieces[:-1], replace(last, values={name: change(value) for name, value in last.values.items()})]

    return lie


LIES = {
    "another item's": (lambda pieces, first: first, "the answer to another question"),
    "no list": (lambda pieces, first: tuple(pieces), "a tuple, which is no list"),
    "a piece alone": (lambda pieces, first: pieces[-1], "a FinishedValues, which is no list"),
    "None": (lambda pieces, first: None, "a NoneType, which is no list"),
    "nothing": (lambda pieces, first: [], "0 pieces, which are not the 3"),
    "None within": (lambda pieces, first: [*pieces[:-1], None], "a NoneType, which is no piece"),
    "fewer": (lambda pieces, first: pieces[1:], "2 pieces, which are not the 3"),
    "one twice": (lambda pieces, first: [*pieces, pieces[-1]], "4 pieces, which are not the 3"),
    "another order": (lambda pieces, first: pieces[::-1], "3 pieces, which are not the 3"),
    "one condition": (
        lambda pieces, first: [
            *pieces[:-1],
            replace(
                pieces[-1],
                conditions=pieces[-1].conditions[:1],
                values={name: value[:1] for name, value in pieces[-1].values.items()},
            ),
        ],
        "3 pieces, which are not the 3",
    ),
    "rows of one condition": (with_values(lambda value: value[:1]), "logit_diff as float32 .1, 4, 5., where float32 "),
    "one example": (with_values(lambda value: value[:, :1]), "logit_diff as float32 "),
    "a mean": (with_values(lambda value: value.mean(-1, keepdims=True)), "logit_diff as float32 "),
    "transposed": (with_values(lambda value: value.transpose(2, 1, 0)), "logit_diff as float32 .5, 4, "),
    "float64": (with_values(lambda value: value.astype("float64")), "logit_diff as float64 "),
    "half": (
        with_values(lambda value: value.astype("float16")),
        "logit_diff as float16, where an array of float32 or ",
    ),
    "objects": (with_values(lambda value: value.astype(object)), "logit_diff as object, where an array"),
    "texts": (with_values(lambda value: value.astype(str)), "logit_diff as <U32, where an array"),
    "lists": (with_values(lambda value: value.tolist()), "logit_diff as list, where an array"),
    "masked": (with_values(lambda value: np.ma.masked_array(value)), "logit_diff as MaskedArray, where an array"),
    "other names": (
        lambda pieces, first: [replace(one, values={"loss": one.values["loss"]}) for one in pieces],
        "values of 'loss' in place of logit_diff, loss",
    ),
    "more names": (
        lambda pieces, first: [replace(one, values={**one.values, "kl": one.values["loss"]}) for one in pieces],
        "in place of logit_diff, loss",
    ),
    "no names": (lambda pieces, first: [replace(one, values={}) for one in pieces], "values of nothing in place of"),
    "no values": (
        lambda pieces, first: [replace(one, values=None) for one in pieces],
        "a FinishedValues, which is no piece",
    ),
    "another group": (lambda pieces, first: [replace(one, group=1) for one in pieces], "group 1 of 1"),
    "a negative group": (lambda pieces, first: [replace(one, group=-1) for one in pieces], "group -1 of 1"),
    "other examples": (lambda pieces, first: [replace(one, examples=(1, 5)) for one in pieces], "examples .1, 5. of 4"),
    "no examples": (lambda pieces, first: [replace(one, examples=(2, 2)) for one in pieces], "examples .2, 2. of 4"),
    "another run": (lambda pieces, first: [replace(pieces[0], run="dirty"), *pieces[1:]], "run 'dirty' with"),
    "no such condition": (
        lambda pieces, first: [*pieces[:-1], replace(pieces[-1], conditions=(99,))],
        r"conditions \(99,\) of 24",
    ),
    "numbers from the end": (
        lambda pieces, first: [*pieces[:-1], replace(pieces[-1], conditions=(-1,))],
        r"conditions \(-1,\) of 24",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_what_a_worker_was_not_asked_for_is_not_taken(folder, tmp_path, name):
    lie, told = LIES[name]
    model, out = hw.load(folder), tmp_path / "sweep.nc"
    wanted = sweep(model, None)
    liar, rest = Liar(lie), Here()
    with pytest.raises(ModelError, match=f"^a worker gave what it was not asked for: .*{told}") as caught:
        sweep(model, liar, out=out)
    assert "\n" not in str(caught.value)
    xr.testing.assert_equal(sweep(model, rest, out=out), wanted)
    assert [mortal.passes_of(one) for one in rest.items] == [mortal.passes_of(liar.items[1])], "the others are kept"


def test_what_answered_another_call_is_not_taken(folder):
    """Though it has the same groups, examples and conditions."""
    model, other = hw.load(folder), Here()
    sweep(model, other, task=RepeatedTokens(n=4, length=6, seed=5))
    before = executors.run_item(other.items[1])
    with pytest.raises(ModelError, match="gave what it was not asked for: the answer to another question"):
        sweep(model, Liar(lambda pieces, first: before))


def test_a_first_worker_that_lies_does_not_make_the_others_liars(folder):
    with pytest.raises(ModelError, match="gave what it was not asked for: logit_diff as float64"):
        sweep(hw.load(folder), Liar(with_values(lambda value: value.astype("float64")), at=(1,)))
    with pytest.raises(ModelError, match="gave what it was not asked for: logit_diff as float32"):
        sweep(hw.load(folder), Liar(with_values(lambda value: value[..., :1]), at=(1,)))


def test_values_that_are_no_numbers_may_come_back(folder):
    nothing = Liar(with_values(lambda value: np.full_like(value, np.nan)))
    found = sweep(hw.load(folder), nothing)
    passes = nothing.items[1].chunks[0].passes
    lost = found["loss"].isnull().all(["example", "position"])
    assert int(lost.sum()) == sum(len(one.conditions) for one in passes) == 4


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
