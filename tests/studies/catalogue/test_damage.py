"""Files that are damaged, hang their reader or may not be read are named as problems, and the others are listed."""

import json
import os
import random
import shutil
import sys

import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import headwise as hw
from headwise.studies.catalogue import probe
from headwise.studies.catalogue.probe import Probe
from headwise.studies.catalogue.results import Results
from headwise.studies.catalogue.summary import summary
from headwise.studies.storage.provenance import SCHEMA
from headwise.studies.storage.reading import open_result
from tests.support.results_by_hand import attributes, measured, paths, studied


def broken(folder, number, good, foreign):
    """Write a damaged or foreign file of one of many kinds, seeded by its number; the path and words of the reason."""
    rng = random.Random(number)
    path = folder / f"bad-{number:03d}.nc"
    kind = number % 16
    whole = good.read_bytes()
    if kind == 0:
        path.write_bytes(whole[: rng.randrange(9, len(whole) - 1)])
        return path, "damaged"
    if kind == 1:
        path.write_bytes(b"\x00" * rng.randrange(1, 5000))
        return path, "no NetCDF file"
    if kind == 2:
        path.write_bytes(rng.randbytes(rng.randrange(8, 5000)))
        return path, "no NetCDF file"
    if kind == 3:
        path.write_bytes(b"")
        return path, "an empty file"
    if kind == 4:
        shutil.copy(foreign, path)
        return path, "not written by headwise"
    if kind == 5:
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + rng.randbytes(rng.randrange(4000)))
        return path, "damaged"
    if kind == 6:
        path.write_bytes(whole[:200] + b"\x00" * (len(whole) - 200))
        return path, "damaged"
    if kind == 7:
        path.symlink_to(folder / "gone.nc")
        return path, "a link to nothing"
    if kind == 8:
        path.mkdir()
        return path, "a folder, not a file"
    if kind == 9:
        os.mkfifo(path)
        return path, "no regular file"
    if kind == 10:
        path.symlink_to(path)
        return path, "a link"
    if kind == 11:
        path.write_bytes(b"CDF\x01" + rng.randbytes(rng.randrange(200)))
        return path, "damaged"
    missing = rng.choice(["model", "created", "versions"])
    changes, reason = {
        12: ({missing: None}, f"it has no attribute {missing}"),
        13: ({"schema_version": str(int(SCHEMA) + rng.randrange(1, 9))}, "written by a newer headwise: schema"),
        14: (rng.choice([({"task": "{"}, "its attribute task is no JSON"), ({"study": "[1]"}, "no JSON object")])),
        15: (rng.choice([({"schema_version": "new"}, "schema_version is 'new'"), ({"created": "once"}, "is no date")])),
    }[kind]
    ds = measured()
    ds.attrs = {name: value for name, value in (ds.attrs | changes).items() if value is not None}
    ds.to_netcdf(path, engine="netcdf4")
    return path, reason


def test_200_bad_files_are_named_and_the_good_ones_listed(folder):
    good = folder / "a.nc"
    foreign = folder.parent / "foreign.nc"
    xr.Dataset({"temperature": ("x", [1.0])}, attrs={"title": "weather"}).to_netcdf(foreign, engine="netcdf4")
    bad = dict(broken(folder, number, good, foreign) for number in range(200))
    for _ in range(2):  # looked at, and from the cache
        results = Results(folder, all=True)
        assert paths(results) == ["a.nc", "c.nc", "deep/b.nc", "later.nc.parts", "study.nc"]
        assert {one.path for one in results.problems} == {path.name for path in bad}
        for one in results.problems:
            assert bad[folder / one.path] in one.reason, one
            assert "\n" not in one.reason
            assert len(one.reason) < 300
        assert repr(results).startswith(f"{folder}: 5 results, 1 not finished, 200 files that cannot be read\n")
        assert list(results.table("loss", sort="-effect", top=1)["effect"]) == [8.0]


def test_files_of_other_programs_are_passed_over(folder):
    weather = xr.Dataset({"temperature": ("x", [1.0])}, attrs={"title": "weather"})
    weather.to_netcdf(folder / "weather.nc", engine="netcdf4")
    weather.assign_attrs(Conventions="headwise").to_netcdf(folder / "own.nc", engine="netcdf4")
    (folder / "bad.nc").write_bytes(b"nothing")
    named = {"own.nc": "not whole: it has no attribute schema_version", "bad.nc": "no NetCDF file"}
    foreign = {"weather.nc": "not written by headwise: it has no attribute schema_version"}
    for _ in range(2):  # looked at, and from the cache
        for asked, expected in ((False, named), (True, named | foreign)):
            results = Results(folder, all=asked)
            for shown in (results, results.refresh(), results.select(model="small")):
                assert {one.path: one.reason for one in shown.problems} == expected
            assert f"{len(expected)} files that cannot be read" in repr(results)
            assert ("weather.nc" in repr(results)) == ("weather.nc" in results._repr_html_()) == asked
    with pytest.raises(hw.errors.ResultError, match=r"weather\.nc cannot be read: not written by headwise"):
        Results(folder).open("weather.nc")


@given(seed=st.integers(0, 10_000), flips=st.integers(1, 40), cut=st.booleans())
def test_any_damage_is_a_problem_or_harmless(tmp_path_factory, seed, flips, cut):
    """Bytes changed anywhere, the end cut off: listing, opening and asking give an answer or one of our errors."""
    folder = tmp_path_factory.mktemp("damage")
    path = hw.write_netcdf(studied(), folder / "x.nc")
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(flips):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data[: rng.randrange(len(data))] if cut else data)
    results = Results(folder)
    assert len(results) + len(results.problems) == 1
    refused = [one.reason for one in results.problems]
    if len(results):
        for question in (
            lambda: results.table("ablation/loss"),
            lambda: open_result(path).close(),
            lambda: summary(path),
        ):
            try:
                question()
            except hw.errors.HeadwiseError as error:
                refused.append(str(error))
    assert not [text for text in refused if "\n" in text]


def test_a_file_that_makes_its_reader_hang_or_end_is_a_problem(folder, monkeypatch, tmp_path_factory):
    """There are such files, of a byte changed, for each release of HDF5; here a reader that is made to plays them."""
    child = tmp_path_factory.mktemp("child") / "child.py"
    ends = "        if 'crash' in path:\n            import os\n            os._exit(139)\n"
    hangs = "        while 'hang' in path:\n            time.sleep(1)\n"
    opens = '        return {"attributes": attributes(path)}'
    assert opens in probe.CHILD.read_text()
    child.write_text(probe.CHILD.read_text().replace(opens, ends + hangs + opens))
    monkeypatch.setattr(probe, "CHILD", child)
    for name in ("b-hang.nc", "crash.nc", "hang.nc"):
        shutil.copy(folder / "a.nc", folder / name)
    ask = Probe.ask

    def sooner(self, path):
        if self._process is None:
            self._start()  # which may take longer
        with monkeypatch.context() as patch:
            patch.setattr(probe, "LIMIT_SECONDS", 2.0 if "hang" in path.name else 60.0)
            return ask(self, path)

    monkeypatch.setattr(Probe, "ask", sooner)
    results = Results(folder)
    assert [str(one) for one in results.problems] == [
        "b-hang.nc: damaged: after 2 s it was still not read",
        "crash.nc: damaged: reading it ended the process that read it",
        "hang.nc: damaged: after 2 s it was still not read",
    ]
    assert paths(results) == ["a.nc", "c.nc", "deep/b.nc", "later.nc.parts", "study.nc"]


def test_where_no_process_can_be_started_files_are_read_in_this_one(folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    (folder / "bad.nc").write_bytes((folder / "a.nc").read_bytes()[:900])
    results = Results(folder)
    assert paths(results) == ["a.nc", "c.nc", "deep/b.nc", "later.nc.parts", "study.nc"]
    assert [one.path for one in results.problems] == ["bad.nc"]


def test_files_and_folders_that_may_not_be_read(folder, monkeypatch):
    opened = os.open

    def refuse(path, *arguments, **given):
        if path == folder / "a.nc":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **given)

    monkeypatch.setattr(os, "open", refuse)
    walk = os.walk

    def walked(top, onerror):
        onerror(PermissionError(13, "Permission denied", str(folder / "deep")))
        for where, inner, netcdf in walk(top):
            inner[:] = [name for name in inner if name != "deep"]
            yield where, inner, netcdf

    monkeypatch.setattr(os, "walk", walked)
    results = Results(folder)
    assert [str(one) for one in results.problems] == [
        "a.nc: Permission denied",
        "deep: the folder cannot be read: Permission denied",
    ]
    assert paths(results) == ["c.nc", "later.nc.parts", "study.nc"]


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda parts: (parts / "about.json").unlink(), "an unfinished run without about.json"),
        (lambda parts: (parts / "about.json").write_text("{"), "whose about.json cannot be read"),
        (lambda parts: (parts / "about.json").write_text("[]"), "whose about.json is no JSON object"),
        (lambda parts: (parts / "about.json").write_bytes(b"\xff\xfe"), "whose about.json cannot be read"),
        (
            lambda parts: (parts / "about.json").write_text(json.dumps(attributes(schema_version="99"))),
            "a newer headwise",
        ),
    ],
)
def test_bad_notes_of_unfinished_runs_are_problems(folder, write, reason):
    write(folder / "later.nc.parts")
    results = Results(folder)
    assert len(results) == 4
    (problem,) = results.problems
    assert problem.path == "later.nc.parts"
    assert reason in problem.reason


def test_an_unfinished_run_beside_its_finished_file(folder):
    hw.write_netcdf(measured(), folder / "later.nc")
    states = {entry.path: entry.state for entry in Results(folder)}
    assert (states["later.nc"], states["later.nc.parts"]) == ("complete", "partial")


def test_hidden_files_and_shards_are_no_results(folder):
    shutil.copy(folder / "a.nc", folder / ".a.nc.123.part")
    shutil.copy(folder / "a.nc", folder / ".hidden.nc")
    (folder / ".cache").mkdir()
    shutil.copy(folder / "a.nc", folder / ".cache" / "a.nc")
    shutil.copy(folder / "a.nc", folder / "later.nc.parts" / "shard.nc")
    results = Results(folder)
    assert paths(results) == ["a.nc", "c.nc", "deep/b.nc", "later.nc.parts", "study.nc"]
    assert results.problems == []
