"""Opened results: values stay right whatever else is opened, closed, replaced, copied or pickled."""

import copy
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.studies.storage.reading import open_result
from tests.support.results_by_hand import measured, studied

ORDERS = """
import sys, threading
import headwise as hw
import xarray as xr
from headwise.studies import Results, open_result
from headwise.studies.storage.names import variable_names

folder, name, order, *turns = sys.argv[1:]
path = f"{folder}/{name}"
results = Results(folder)
right = 3.5
if order == "kept":
    kept = results.open(name)
    hw.open_result(path, load=True)
    again = results.open(name)
    found = [float(one["ablation"]["loss"].mean()) for one in (again, kept, results.open(name))]
elif order == "closed":
    kept, other = open_result(path), open_result(path)
    other["ablation"]["loss"].mean()
    other.close()
    variable_names(path)
    found = [float(kept["ablation"]["loss"].mean()), float(other["ablation"]["loss"].mean())]
elif order == "plain":  # somebody else holds the file open with plain xarray
    held = xr.open_datatree(path, engine="netcdf4")
    found = []
    for _ in range(5):
        hw.open_result(path, load=True)
        found += [float(open_result(path)["ablation"]["loss"].mean()), float(held["ablation"]["loss"].mean())]
elif order == "beside":  # somebody else reads with plain xarray meanwhile
    found, failed = [], []

    theirs = xr.open_dataset(path, engine="netcdf4", group="ablation", cache=False)

    def other():
        try:
            for _ in range(2000):
                found.append(float(theirs["loss"].mean()))
        except Exception as error:
            failed.append(repr(error))

    thread = threading.Thread(target=other)
    thread.start()
    while thread.is_alive():
        found.append(float(hw.open_result(path, load=True)["ablation"]["loss"].mean()))
    assert not failed, failed
elif order == "forked":  # while another thread reads
    import os

    from headwise.studies.storage.netcdf import alone

    inside, over = threading.Event(), threading.Event()

    def hold():
        with alone():
            inside.set()
            over.wait()

    threading.Thread(target=hold).start()
    inside.wait()
    child = os.fork()
    if not child:
        os._exit(0 if float(hw.open_result(path, load=True)["ablation"]["loss"].mean()) == right else 1)
    found = [right if os.waitpid(child, 0)[1] == 0 else 0.0]
    over.set()
else:
    found, failed = [], []
    shared = open_result(path)

    def work(number):
        try:
            for turn in range(int(turns[0])):
                some = open_result(path) if turn % 2 else shared
                found.append(float(some["ablation"].to_dataset().load()["loss"].mean()))
                hw.open_result(path, load=True), variable_names(path), results.table("ablation/loss")
                if number == 0:
                    hw.write_netcdf(hw.open_result(path, load=True), f"{folder}/other.nc")
                some.close()
        except Exception as error:
            failed.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    [one.start() for one in threads], [one.join() for one in threads]
    assert not failed, failed
assert found and set(found) == {right}, found
print("right", len(found))
"""


@pytest.mark.parametrize(
    "order",
    [
        "kept",
        "plain",
        "threads 3",
        *(pytest.param(one, marks=pytest.mark.heavy) for one in ("closed", "beside", "forked", "threads 10")),
    ],
)
def test_values_stay_right_whatever_else_is_opened_and_closed(tmp_path, order):
    """In a process of its own: the NetCDF library ended it where a file with text was open twice and closed once."""
    tree = studied(loss=((2.0, 5.0),))
    for number in range(20):  # text, in variables and in attributes
        tree[f"more{number}"] = xr.DataTree(
            xr.Dataset({"text": ("name", np.asarray(["a", "bc"] * 20, dtype=object))}, {"name": list("pqrstuvwxy" * 4)})
        )
    hw.write_netcdf(tree, tmp_path / "study.nc")
    command = [sys.executable, "-c", ORDERS, str(tmp_path), "study.nc", *order.split()]
    if order == "forked" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.startswith("right")


def test_a_file_that_was_replaced_gives_its_own_values_or_an_error(folder, tmp_path_factory):
    path, gone = folder / "a.nc", folder / "c.nc"
    before, once, used, lost = open_result(path), open_result(path), open_result(path), open_result(gone)
    assert once["loss"][0, 0, 0] == 2.0
    assert (used["loss"][0, 0, 0], used["baseline_loss"][0, 0]) == (2.0, 1.0)
    hw.write_netcdf(measured(loss=((7.0, 8.0),)), path)
    gone.unlink()
    replaced = "a.nc is not the file that was opened"
    for opened, name in ((before, replaced), (once, replaced), (lost, "c.nc cannot be read: No such file")):
        with pytest.raises(hw.errors.ResultError, match=name):
            opened["loss"].load()
    np.testing.assert_array_equal(used["loss"][0, :, 0], [2.0, 3.0])  # small: read together when the second was used
    np.testing.assert_array_equal(used["baseline_loss"][:, 0], [1.0, 5.0])
    np.testing.assert_array_equal(open_result(path)["loss"][0, :, 0], [7.0, 8.0])


def test_a_large_variable_of_a_replaced_file_is_refused(tmp_path, monkeypatch):
    from headwise.studies.storage import netcdf, reading

    monkeypatch.setattr(reading, "SMALL", 0)
    for image in (netcdf.IMAGE, 0):
        monkeypatch.setattr(netcdf, "IMAGE", image)
        hw.write_netcdf(measured(), tmp_path / "one.nc")
        opened = open_result(tmp_path / "one.nc")
        assert opened["loss"][0, 1, 0] == 3.0
        hw.write_netcdf(measured(loss=((7.0, 8.0),)), tmp_path / "one.nc")
        with pytest.raises(hw.errors.ResultError, match="was replaced or changed; open it again"):
            opened["loss"].load()


def test_only_what_is_selected_is_read(tmp_path, monkeypatch):
    from headwise.studies.storage import reading

    values = np.arange(2_000_000.0).reshape(1000, 2000)
    xr.Dataset({"large": (("row", "column"), values)}).to_netcdf(tmp_path / "large.nc")
    opened = open_result(tmp_path / "large.nc")
    asked, raw = [], reading._raw

    class Spied:
        def __init__(self, variable):
            self.variable = variable

        def __getitem__(self, key):
            asked.append(key)
            return self.variable[key]

    monkeypatch.setattr(reading, "_raw", lambda variable: Spied(raw(variable)))
    np.testing.assert_array_equal(opened["large"].isel(row=[7, 3], column=slice(2, 5)), values[[7, 3], 2:5])
    np.testing.assert_array_equal(opened["large"][5, ::500], values[5, ::500])
    rows = xr.DataArray([1, 9], dims="at")
    np.testing.assert_array_equal(opened["large"].isel(row=rows, column=rows), [values[1, 1], values[9, 9]])
    assert len(asked) == 3
    assert not opened["large"].variable._in_memory


def test_opened_results_can_be_pickled_and_copied(folder):
    opened = open_result(folder / "study.nc")
    for other in (pickle.loads(pickle.dumps(opened)), opened.copy(deep=True), copy.deepcopy(opened)):
        np.testing.assert_array_equal(other["ablation/loss"][0, :, 0], [2.0, 3.0])
        assert other["ablation"].to_dataset().identical(opened["ablation"].to_dataset())
    late = pickle.loads(pickle.dumps(open_result(folder / "a.nc")))
    hw.write_netcdf(measured(loss=((7.0, 8.0),)), folder / "a.nc")
    with pytest.raises(hw.errors.ResultError, match="not the file that was opened"):
        late["loss"].load()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list open files")
@pytest.mark.parametrize("image", [64 * 2**20, 0], ids=["read as bytes", "opened by name"])
def test_many_openings_leave_nothing_open(folder, monkeypatch, image):
    from headwise.studies.storage import netcdf

    monkeypatch.setattr(netcdf, "IMAGE", image)
    hw.open_result(folder / "a.nc", load=True)
    before, kept = len(os.listdir("/proc/self/fd")), []
    for number in range(120):
        path = folder / ("a.nc", "c.nc", "deep/b.nc", "study.nc")[number % 4]
        opened = open_result(path)
        if number % 3 == 0:
            opened.load()
        if number % 5 == 0:
            opened.close()
        if number % 2 == 0:
            kept.append(opened)
        if number % 50 == 0:
            hw.open_result(path, load=True)
            with suppress(hw.errors.HeadwiseError):
                open_result(folder / "later.nc.parts" / "pass-0.nc")
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(kept) == 60
