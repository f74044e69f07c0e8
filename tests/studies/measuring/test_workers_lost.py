"""What a lost worker costs: its piece, and no other."""

import os
import signal
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ModelError
from headwise.studies.measuring import executors
from tests.support import mortal
from tests.support.workers import Here, sweep


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


@pytest.mark.heavy
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
