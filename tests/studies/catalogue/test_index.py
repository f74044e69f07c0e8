"""The index of a folder: only what changed is read again, and a damaged index is made again."""

import json
import os
from contextlib import contextmanager

import netCDF4
import pytest

import headwise as hw
from headwise.studies.catalogue.index import INDEX
from headwise.studies.catalogue.probe import Probe
from headwise.studies.catalogue.results import Results
from headwise.studies.storage.provenance import SCHEMA
from tests.support.results_by_hand import measured, paths


@contextmanager
def opened():
    """Names of the files that are opened as NetCDF inside."""
    seen = []
    ask = Probe.ask

    def counted(self, path):
        seen.append(path.name)
        return ask(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "ask", counted)
        yield seen


def test_after_the_first_listing_only_what_changed_is_opened(folder):
    with opened() as seen:
        before = list(Results(folder))
    assert sorted(seen) == ["a.nc", "b.nc", "c.nc", "study.nc"]
    with opened() as seen:
        assert list(Results(folder)) == before
    assert seen == []
    hw.write_netcdf(measured(model="new"), folder / "a.nc")
    hw.write_netcdf(measured(), folder / "d.nc")
    (folder / "c.nc").unlink()
    with opened() as seen:
        after = Results(folder)
        assert paths(after) == ["a.nc", "d.nc", "deep/b.nc", "later.nc.parts", "study.nc"]
    assert after["a.nc"].model == "new"
    assert sorted(seen) == ["a.nc", "d.nc"]


def test_bad_files_are_not_opened_again_either(folder):
    (folder / "bad.nc").write_bytes((folder / "a.nc").read_bytes()[:900])
    assert len(Results(folder).problems) == 1
    with opened() as seen:
        assert len(Results(folder).problems) == 1
    assert seen == []


def test_a_good_file_copied_over_a_damaged_one_is_seen(folder):
    """HDF5 keeps what it read of a file that it then refused, and mistakes what is copied over it for the same."""
    whole = (folder / "study.nc").read_bytes()
    (folder / "x.nc").write_bytes(whole[:600] + b"\xff" * 20 + whole[620:])
    assert [problem.path for problem in Results(folder).problems] == ["x.nc"]
    (folder / "x.nc").write_bytes((folder / "c.nc").read_bytes())
    results = Results(folder)
    assert results.problems == []
    assert results["x.nc"].model == "large"


def test_a_file_changed_in_place_is_seen(folder):
    list(Results(folder))
    path = folder / "a.nc"
    before = path.stat()
    with netCDF4.Dataset(path, "a") as file:
        file.setncattr("model", "other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been
    assert path.stat().st_size == before.st_size
    assert Results(folder)["a.nc"].model == "other"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\x00\x01",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: json.dumps({"index_version": 1, "schema": SCHEMA, "files": []}),
        lambda text: text.replace('"index_version": 1', '"index_version": 99'),
        lambda text: text.replace('"model": "small"', '"model": 3'),
        lambda text: text.replace('"row"', '"rows"'),
        lambda text: text.replace('"stamp": [', '"stamp": [7, '),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_cache_is_made_again(folder, damage):
    before = list(Results(folder))
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(damage(text))
    assert list(Results(folder)) == before
    with opened() as seen:
        assert list(Results(folder)) == before
    assert seen == []
    assert json.loads((folder / INDEX).read_text()) == json.loads(text)


def test_a_cache_that_cannot_be_written_is_no_matter(folder, monkeypatch):
    def full(*_):
        raise hw.errors.ResultError("cannot write: No space left on device")

    monkeypatch.setattr("headwise.studies.catalogue.index.write_beside", full)
    assert len(Results(folder)) == 5
    assert not (folder / INDEX).exists()
    (folder / INDEX).mkdir()
    assert len(Results(folder)) == 5


def test_the_cache_names_no_file_that_is_not_there(folder):
    list(Results(folder))
    index = json.loads((folder / INDEX).read_text())
    index["files"]["ghost.nc"] = index["files"]["a.nc"]
    (folder / INDEX).write_text(json.dumps(index))
    assert "ghost.nc" not in Results(folder)
