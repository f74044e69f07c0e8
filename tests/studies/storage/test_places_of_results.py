"""Where a result is written: folders that change, long and odd names, links, pipes and devices."""

import errno
import os
import tempfile
from functools import partial

import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ResultError
from headwise.studies import Results
from tests.support.sweeps import sweep


def test_out_is_where_it_was_when_the_call_began(model, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    calls = []

    def update(done, total):
        calls.append(done)
        if len(calls) == 4:
            os.chdir(tmp_path / "other")

    sweep(model, "sweep.nc", progress=update)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["sweep.nc"]
    assert list((tmp_path / "other").iterdir()) == []


def test_a_folder_of_results_is_where_it_was(model, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    sweep(model, tmp_path / "one" / "sweep.nc")
    monkeypatch.chdir(tmp_path)
    results = Results("one")
    monkeypatch.chdir(tmp_path / "one")
    assert len(results.select(model="*")) == len(results.refresh()) == 1
    assert str(results.folder) == "one"


NAMES = {
    "a\0b.nc": r"the file name .* has a NUL",
    "a\ud800.nc": r"the file name .* has half of a character",
    f"a{chr(0xDC80)}.nc": r"the file name .* has half of a character",
    "x" * 253 + ".nc": r"File name too long",
    "~nobody-is-called-so/a.nc": r"cannot write ~nobody-is-called-so/a.nc: Could not determine home directory",
    "dangling/a.nc": r"dangling is a link to nothing",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["measure", "write_netcdf"])
def test_names_that_no_file_can_have_are_refused_before_any_pass(model, tmp_path, computed, monkeypatch, name, way):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    write = partial(sweep, model) if way == "measure" else partial(hw.write_netcdf, xr.Dataset({"a": 1}))
    with pytest.raises(HeadwiseError, match=NAMES[name]) as told:
        write(name)
    assert "\n" not in str(told.value)
    assert computed == []


@pytest.mark.parametrize("size", [247, 249, 250, 255])
def test_long_names(model, tmp_path, computed, size):
    """Every name that a file can have; unfinished work needs room for the name of its folder."""
    name = "é" + "x" * (size - 5) + ".nc"
    assert len(os.fsencode(name)) == size
    found = hw.write_netcdf(xr.Dataset({"a": 1}), tmp_path / name)
    assert xr.load_dataset(found)["a"] == 1
    found.unlink()
    if size < 250:
        sweep(model, tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == [name]
    else:
        with pytest.raises(DeclarationError, match=rf"the name has {size} bytes, possible are 249"):
            sweep(model, tmp_path / name)
        assert computed == []


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_the_result_is_replaced(model, out, tmp_path, dangling):
    """What it leads to stays as it is: somebody else may have put the link there."""
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_text("kept")
    out.symlink_to(victim)
    wanted = sweep(model, out)
    assert not out.is_symlink()
    xr.testing.assert_equal(xr.load_dataset(out).drop_attrs(), wanted.drop_attrs())
    assert dangling != victim.exists()
    assert dangling or victim.read_text() == "kept"


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    """The NetCDF library says "Permission denied" of a file that it cannot begin."""

    def denied(self, path, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    ds = xr.Dataset({"a": 1})
    monkeypatch.setattr(xr.Dataset, "to_netcdf", denied)
    with pytest.raises(ResultError, match=r"cannot write .*a.nc: Permission denied"):
        hw.write_netcdf(ds, tmp_path / "a.nc")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ResultError, match=r"cannot write .*a.nc: No space left on device"):
        hw.write_netcdf(ds, tmp_path / "a.nc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_or_a_device_keeps_its_place(tmp_path):
    os.mkfifo(tmp_path / "pipe.nc")
    with pytest.raises(ResultError, match=r"pipe\.nc is a device, a pipe or a socket: give the name of a file"):
        hw.write_netcdf(xr.Dataset({"a": ("x", [1.0])}), tmp_path / "pipe.nc")
    assert (tmp_path / "pipe.nc").is_fifo()
