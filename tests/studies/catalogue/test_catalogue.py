"""A folder of results: what is listed, what is selected, and what is opened."""

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.studies.catalogue.entries import Entry
from headwise.studies.catalogue.results import Results
from tests.support.results_by_hand import measured, paths


def test_a_row_for_each_result(folder):
    results = Results(folder)
    assert len(results) == 5
    assert paths(results) == ["a.nc", "c.nc", "deep/b.nc", "later.nc.parts", "study.nc"]
    assert results.problems == []
    assert results[0] == Entry(
        path="a.nc",
        model="small",
        study="measure",
        task="RepeatedTokens(n=2, length=3)",
        size=(folder / "a.nc").stat().st_size,
        date="2026-03-04T05:06:07+00:00",
        version="0.1.0",
        state="complete",
        seed=0,
        step=None,
        revision="main",
    )
    assert results["deep/b.nc"].task == "RepeatedTokens(n=2, length=3, seed=1)"
    assert results["study"].study == "InductionStudy"
    assert (results["later.nc.parts"].state, results["later.nc.parts"].size) == ("partial", 100)
    frame = results.frame
    assert list(frame["model"]) == ["small", "large", "small", "small", "small"]
    assert list(frame["seed"]) == [0, 2, 1, 0, 0]
    assert frame["date"].dt.year.tolist() == [2026] * 5
    assert "a.nc" in results
    assert "nothing.nc" not in results


def test_selection(folder):
    results = Results(folder)
    assert paths(results.select(model="lar*")) == ["c.nc"]
    assert paths(results.select(model=["large", "none"])) == ["c.nc"]
    assert paths(results.select(study="InductionStudy")) == ["study.nc"]
    assert paths(results.select(study="measure", state="complete")) == ["a.nc", "c.nc", "deep/b.nc"]
    assert paths(results.select(task="*seed=1*")) == ["deep/b.nc"]
    assert paths(results.select(model="small", where="seed > 0")) == ["deep/b.nc"]
    assert paths(results.select(where="date >= '2026-01-01' and size < 1e9 and 'tudy' in study")) == ["study.nc"]
    assert paths(results.select(where="date < '2026-01-01'")) == []
    assert paths(results.select(where="state == 'partial'")) == ["later.nc.parts"]
    assert len(results.select()) == 5
    with pytest.raises(hw.errors.DeclarationError, match="there is no column 'sized'"):
        results.select(where="sized > 1")


def test_an_empty_folder_and_none(tmp_path):
    results = Results(tmp_path)
    assert len(results) == 0
    assert results.frame.shape == (0, 11)
    assert len(results.select(where="seed > 3")) == 0
    assert repr(results) == f"{tmp_path}: 0 results"
    assert not list(tmp_path.iterdir())
    with pytest.raises(hw.errors.UnknownNameError, match="there is no finished result"):
        results.table("loss")
    with pytest.raises(hw.errors.ResultError, match="does not exist"):
        Results(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(hw.errors.ResultError, match="is a file"):
        Results(tmp_path / "file")


def test_opened_is_plain_xarray_read_when_used(folder):
    results = Results(folder)
    for which in (0, -5, "a.nc", "a", folder / "a.nc"):
        with results.open(which) as ds:
            assert isinstance(ds, xr.Dataset)
            assert not ds["loss"].variable._in_memory
            np.testing.assert_array_equal(ds["loss"][0, :, 0], [2.0, 3.0])
    with results.open("b") as ds:
        assert ds["loss"][0, 1, 0] == 9.0
    with results.open("study.nc") as tree:
        assert isinstance(tree, xr.DataTree)
        assert tree["ablation/loss"].dims == ("layer", "head", "example")
        assert tree.attrs["title"] == "A study"
    assert results.path("b") == folder / "deep" / "b.nc"


@pytest.mark.parametrize("which", ["../a.nc", "/etc/passwd", "deep/../../x.nc", "..", "sub/../../a.nc"])
def test_nothing_outside_of_the_folder_is_opened(folder, which):
    hw.write_netcdf(measured(), folder.parent / "x.nc")
    with pytest.raises(hw.errors.ResultError, match="lies outside of"):
        Results(folder).open(which)


def test_links_that_lead_outside_are_named_and_not_opened(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    hw.write_netcdf(measured(model="secret"), outside / "secret.nc")
    (folder / "link.nc").symlink_to(outside / "secret.nc")
    (folder / "inner.nc").symlink_to(folder / "a.nc")
    (folder / "folder").symlink_to(outside)
    results = Results(folder)
    assert [str(one) for one in results.problems] == ["link.nc: a link to a place outside of the folder"]
    assert "inner.nc" in results
    assert "secret" not in {entry.model for entry in results}
    for which in ("link.nc", "folder/secret.nc", folder / "link.nc"):
        with pytest.raises(hw.errors.ResultError, match="outside of"):
            results.open(which)
    (folder / "a.nc").unlink()
    (folder / "a.nc").symlink_to(outside / "secret.nc")
    for question in (lambda: results.open("a.nc"), lambda: results.table("loss"), lambda: results.path(0)):
        with pytest.raises(hw.errors.ResultError, match="outside of"):
            question()


def test_what_is_not_here_is_said(folder):
    results = Results(folder)
    with pytest.raises(hw.errors.UnknownNameError, match=r"'stud.nc' is no result here: study.nc"):
        results.open("stud.nc")
    with pytest.raises(hw.errors.UnknownNameError, match="there is no result 5"):
        results.open(5)
    with pytest.raises(
        hw.errors.ResultError, match=r"later.nc.parts is not finished: the same call or command again goes on"
    ):
        results.open("later.nc.parts")
    (folder / "bad.nc").write_bytes(b"")
    with pytest.raises(hw.errors.ResultError, match=r"bad.nc cannot be read: an empty file"):
        results.refresh().open("bad.nc")
    hw.write_netcdf(measured(), folder / "deep" / "a.nc")
    hw.write_netcdf(measured(), folder / "deeper" / "b.nc")
    with pytest.raises(hw.errors.UnknownNameError, match=r"'b' could be deep/b.nc and deeper/b.nc"):
        results.refresh().open("b")
    (folder / "a.nc").unlink()
    with pytest.raises(hw.errors.ResultError, match="there is no file"):
        results.open("a.nc")
