"""A folder of results: what is listed, what is named as bad, what is opened, and questions over several files."""

import copy
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import headwise as hw
from headwise.interventions import Grid, Head, MeanAblate, ZeroAblate
from headwise.metrics import accuracy, loss
from headwise.studies import RepeatedTokens, capture, measure
from headwise.studies.catalogue import probe
from headwise.studies.catalogue.entries import Entry
from headwise.studies.catalogue.index import INDEX
from headwise.studies.catalogue.probe import Probe
from headwise.studies.catalogue.results import Results
from headwise.studies.catalogue.summary import summary
from headwise.studies.storage.provenance import SCHEMA
from headwise.studies.storage.reading import open_result

TASK = {"type": "RepeatedTokens", "n": 2, "length": 3, "seed": 0, "bos": False, "tokens": None, "score": "repeat"}


def attributes(model="small", seed=0, **more):
    """Root attributes as headwise writes them."""
    return {
        "Conventions": "headwise",
        "schema_version": SCHEMA,
        "model": model,
        "model_revision": "main",
        "versions": json.dumps({"headwise": "0.1.0", "numpy": "2.0"}),
        "created": "2026-03-04T05:06:07+00:00",
        "task": json.dumps(TASK | {"seed": seed}),
        "metrics": json.dumps(["loss"]),
        "interventions": json.dumps({"type": "ZeroAblate"}),
        "base": "clean",
    } | more


def measured(loss=((2.0, 3.0),), layers=(0,), **said):
    """A measurement by hand: ``loss(layer, head)``, one example; 1.0 without intervention."""
    values = np.asarray(loss)[..., None]
    return xr.Dataset(
        {
            "loss": (("layer", "head", "example"), values, {"units": "nat", "long_name": "next-token cross-entropy"}),
            "baseline_loss": (("run", "example"), [[1.0], [5.0]], {"units": "nat"}),
        },
        coords={"layer": list(layers), "head": range(values.shape[1]), "example": [0], "run": ["clean", "corrupted"]},
        attrs=attributes(**said),
    )


def studied(**said):
    """A study by hand, with its measurement in the group ``ablation``."""
    study = json.dumps({"type": "InductionStudy", "n": 2, "seed": said.get("seed", 0)})
    tree = xr.DataTree.from_dict({"/ablation": measured(**said), "/words": xr.Dataset({"prob": ("example", [0.5])})})
    tree.attrs = attributes(**{name: value for name, value in said.items() if name not in ("loss", "layers")}) | {
        "study": study,
        "title": "A study",
    }
    return tree


def unfinished(folder, name, **about):
    parts = folder / f"{name}.parts"
    parts.mkdir(parents=True)
    (parts / "about.json").write_text(json.dumps(attributes() | about))
    (parts / "pass-0.nc").write_bytes(b"\x00" * 100)
    return parts


@pytest.fixture
def folder(tmp_path):
    """Five results, one of them unfinished, in two folders."""
    hw.write_netcdf(measured([[2.0, 3.0]]), tmp_path / "a.nc")
    hw.write_netcdf(measured([[1.5, 9.0]], seed=1), tmp_path / "deep" / "b.nc")
    hw.write_netcdf(measured([[4.0, 1.0]], model="large", seed=2), tmp_path / "c.nc")
    hw.write_netcdf(studied(), tmp_path / "study.nc")
    unfinished(tmp_path, "later.nc")
    return tmp_path


def paths(results):
    return [entry.path for entry in results]


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


# ---------------------------------------------------------------------------------------------------------------------
# questions over several files


def test_a_table_over_several_files(folder):
    results = Results(folder)
    frame = results.table("loss", where="effect > 0.5 and layer >= 0", sort="-effect", top=4)
    assert list(frame.columns) == ["file", "model", "name", "layer", "head", "value", "effect"]
    assert list(zip(frame["file"], frame["name"], frame["effect"], strict=True)) == [
        ("deep/b.nc", "L0H1", 8.0),
        ("c.nc", "L0H0", 3.0),
        ("a.nc", "L0H1", 2.0),
        ("a.nc", "L0H0", 1.0),
    ]
    assert list(results.table("loss", where="model == 'large'")["value"]) == [4.0, 1.0]
    assert list(results.table("ablation/loss")["effect"]) == [1.0, 2.0]
    alone = results.select(study="InductionStudy").table("ablation/loss", sort="-effect")
    assert list(alone.columns) == ["name", "layer", "head", "value", "effect"]
    assert list(alone["name"]) == ["L0H1", "L0H0"]
    with pytest.raises(hw.errors.UnknownNameError, match=r"there is no variable 'lost' in a.nc: did you mean loss"):
        results.table("lost")
    with pytest.raises(hw.errors.DeclarationError, match="there is no column 'effekt'"):
        results.table("loss", where="effekt > 1")


def test_coordinates_of_an_outer_group_are_found(tmp_path):
    inner = xr.Dataset({"score": (("layer",), [5.0, 6.0])})
    tree = xr.DataTree.from_dict({"/": xr.Dataset(coords={"layer": [3, 7]}), "/one/two": inner})
    tree.attrs = attributes()
    hw.write_netcdf(tree, tmp_path / "x.nc")
    assert Results(tmp_path).table("one/two/score").to_dict("list") == {"layer": [3, 7], "value": [5.0, 6.0]}


def test_combined_along_models_and_seeds(folder):
    results = Results(folder)
    seeds = results.select(study="measure", model="small", state="complete").combine("seed")
    assert seeds["loss"].dims == ("seed", "layer", "head", "example")
    assert list(seeds["seed"].values) == [0, 1]
    np.testing.assert_array_equal(seeds["loss"].sel(seed=1).values[0, :, 0], [1.5, 9.0])
    assert json.loads(seeds.attrs["combined"]) == ["a.nc", "deep/b.nc"]
    assert seeds.attrs["model"] == "small"
    assert "task" not in seeds.attrs
    np.testing.assert_array_equal(hw.effect(seeds, "loss").sel(seed=0).values[0, :, 0], [1.0, 2.0])
    hw.write_netcdf(measured([[7.0, 8.0]], model="other"), folder / "other.nc")
    models = results.refresh().select(where="seed == 0 and study == 'measure' and state == 'complete'").combine("model")
    assert list(models["model"].values) == ["small", "other"]
    np.testing.assert_array_equal(models["loss"].sel(model="other").values[0, :, 0], [7.0, 8.0])


def test_combined_along_steps(tmp_path):
    for step in (1000, 50):
        hw.write_netcdf(studied(model_revision=f"step{step}", loss=[[step, 0.0]]), tmp_path / f"{step}.nc")
    hw.write_netcdf(studied(step=7, loss=[[7, 0.0]]), tmp_path / "attribute.nc")
    results = Results(tmp_path)
    for what in ({"variable": "ablation/loss"}, {"group": "ablation"}):
        steps = results.combine("step", **what)
        assert list(steps["step"].values) == [7, 50, 1000]
        assert list(steps["loss"].values[:, 0, 0, 0]) == [7.0, 50.0, 1000.0]
        assert set(steps.data_vars) == {"loss", "baseline_loss"}
    with pytest.raises(hw.errors.UnknownNameError, match="has groups: say group= one of ablation and words"):
        results.combine("step")
    with pytest.raises(hw.errors.UnknownNameError, match="there is no group 'ablations' in"):
        results.combine("step", group="ablations")


def test_tokens_may_differ_between_seeds(tmp_path):
    for seed, tokens in enumerate((["a", "b"], ["c", "d"])):
        ds = measured(seed=seed).assign_coords(token=(("example", "position"), [tokens]), position=[0, 1])
        hw.write_netcdf(ds, tmp_path / f"{seed}.nc")
    both = Results(tmp_path).combine("seed")
    assert both["token"].dims == ("seed", "example", "position")
    assert both["token"].sel(seed=1).values.tolist() == [["c", "d"]]


@pytest.mark.parametrize(
    ("one", "two", "dim", "message"),
    [
        (measured(layers=[0]), measured(layers=[1], model="b"), "model",
         r"1.nc and 2.nc differ in the coordinate 'layer': at place 0 it is 0 and 1"),
        (measured([[1, 2]]), measured([[1, 2, 3]], model="b"), "model",
         r"1.nc and 2.nc differ in the coordinate 'head': 2 values \(0 to 1\) and 3 \(0 to 2\)"),
        (measured(), measured(), "model",
         r"1.nc and 2.nc have the same model, small: select one of them, or combine along seed and step"),
        (measured(), measured(), "seed", r"1.nc and 2.nc have the same seed, 0"),
        (measured(), measured(), "step", "1.nc has no step: it has no attribute step"),
        (measured(), measured(), "layer", "dim='layer': results are combined along model, seed and step"),
        (measured(), measured(model="b", seed=3), "model",
         r"differ in task: RepeatedTokens\(n=2, length=3\) and RepeatedTokens\(n=2, length=3, seed=3\)"),
        (measured(), measured(model="b", interventions='{"type": "MeanAblate"}'), "model",
         r"differ in interventions: ZeroAblate\(\) and MeanAblate\(\)"),
        (measured(), measured(model="b", base="corrupted"), "model", "differ in base: clean and corrupted"),
        (measured(), measured(model="b").rename(loss="kl"), "model", "kl only in 2.nc, loss only in 1.nc"),
        (measured(), measured(model="b").transpose("head", "layer", ...), "model", "differ in the dims of loss"),
        (measured(), measured(model="b").assign_coords(extra=1), "model", "'extra' is in only one of"),
    ],
)  # fmt: skip
def test_what_cannot_stand_side_by_side_is_said(tmp_path, one, two, dim, message):
    hw.write_netcdf(one, tmp_path / "1.nc")
    hw.write_netcdf(two, tmp_path / "2.nc")
    with pytest.raises(hw.errors.HeadwiseError, match=message):
        Results(tmp_path).combine(dim)


def test_real_measurements_are_catalogued_and_combined(tmp_path, words_model):
    grid = Grid(lambda head: ZeroAblate(Head(1, head)), head=range(2))
    netcdf = {}
    for seed in range(3):
        netcdf[seed] = measure(words_model, RepeatedTokens(n=4, length=5, seed=seed), grid, [loss, accuracy])
        hw.write_netcdf(netcdf[seed], tmp_path / f"{seed}.nc")
    hw.write_netcdf(capture(words_model, RepeatedTokens(n=2, length=4), [Head(1, 2).pattern]), tmp_path / "pattern.nc")
    results = Results(tmp_path)
    assert [(entry.study, entry.seed) for entry in results] == [
        *(("measure", seed) for seed in range(3)),
        ("capture", 0),
    ]
    seeds = results.select(study="measure").combine("seed")
    frame = results.select(study="measure").table("loss")
    for seed, ds in netcdf.items():
        np.testing.assert_array_equal(seeds["loss"].sel(seed=seed), ds["loss"])
        change = hw.effect(ds, "loss").mean("example").values
        np.testing.assert_array_equal(frame["effect"][frame["file"] == f"{seed}.nc"], change)
    hw.write_netcdf(
        measure(words_model, RepeatedTokens(n=4, length=5, seed=9), MeanAblate(Head(0, 0)), loss), tmp_path / "9.nc"
    )
    with pytest.raises(hw.errors.DeclarationError, match="differ in interventions"):
        results.refresh().select(study="measure").combine("seed")


# ---------------------------------------------------------------------------------------------------------------------
# files that are no results


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
        results = Results(folder)
        assert paths(results) == ["a.nc", "c.nc", "deep/b.nc", "later.nc.parts", "study.nc"]
        assert {one.path for one in results.problems} == {path.name for path in bad}
        for one in results.problems:
            assert bad[folder / one.path] in one.reason, one
            assert "\n" not in one.reason
            assert len(one.reason) < 300
        assert repr(results).startswith(f"{folder}: 5 results, 1 not finished, 200 files that cannot be read\n")
        assert list(results.table("loss", sort="-effect", top=1)["effect"]) == [8.0]


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


# ---------------------------------------------------------------------------------------------------------------------
# the cache


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


# ---------------------------------------------------------------------------------------------------------------------
# other tools, and people


def test_files_can_be_read_with_netcdf4_alone(tmp_path, words_model):
    task = RepeatedTokens(n=3, length=5)
    grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=words_model.layers, head=words_model.heads)
    ds = measure(words_model, task, grid, loss)
    hw.write_netcdf(ds, tmp_path / "one.nc")
    with netCDF4.Dataset(tmp_path / "one.nc") as file:
        variable = file.variables["loss"]
        assert variable.dimensions == ("layer", "head", "example")
        assert (variable.units, variable.long_name) == ("nat", "next-token cross-entropy")
        np.testing.assert_array_equal(np.asarray(variable[:]), ds["loss"].values)
        assert list(file.variables["head"][:]) == list(range(8))
        assert list(file.variables["run"][:]) == ["clean", "corrupted"]
        assert file.variables["token"][0, 0] == ds["token"].values[0, 0]
        assert file.model == "words-2l"
        assert json.loads(file.task)["length"] == 5
        assert json.loads(file.versions)["headwise"] == hw.__version__


def test_shown_as_text(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)  # the line of the folder is as long as its name
    folder = Path(folder.name)
    (folder / "bad.nc").write_bytes(b"x")
    lines = repr(Results(folder)).splitlines()
    assert lines[0] == f"{folder}: 5 results, 1 not finished, 1 file that cannot be read"
    assert lines[1].split() == ["path", "model", "study", "task", "size", "date", "state"]
    assert [line.split()[0] for line in lines[3:8]] == ["a.nc", "c.nc", "deep/b.nc", "later.nc.parts", "study.nc"]
    assert "2026-03-04 05:06" in lines[3]
    assert lines[-1] == "cannot be read: bad.nc: no NetCDF file"
    assert max(map(len, lines)) <= 110
    assert repr(Results(folder).select(model="large")).startswith(f"{folder}: 1 selected result, 1 file")


def test_shown_in_a_notebook(folder):
    hw.write_netcdf(measured(model="<b>bold</b>"), folder / "z.nc")
    (folder / "<i>.nc").write_bytes(b"x")
    text = Results(folder)._repr_html_()
    assert text.count("<tr") == 7
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert "<b>" not in text
    assert "&lt;i&gt;.nc: no NetCDF file" in text
    assert "#" not in text.replace("&#", "")  # no colours of its own


def test_summary_of_a_measurement_by_hand(folder):
    said = summary(folder / "deep" / "b.nc")
    text = str(said)
    assert text.splitlines()[0] == "Measurement of small"
    assert "2 conditions (layer 1 x head 2) of ZeroAblate on the clean run, by loss" in text
    assert "2 prompts in which 3 random tokens are repeated once, seed 1" in text
    assert "2026-03-04 05:06 UTC, headwise 0.1.0" in text
    assert said.points == ("loss is 1 nat without intervention; changed most by L0H1 +8 and L0H0 +0.5",)
    assert "loss           layer 1 x head 2 x example 1  nat  next-token cross-entropy" in text
    assert summary(measured([[1.5, 9.0]], seed=1)) == said
    html = said._repr_html_()
    assert "L0H1 +8" in html
    assert "layer 1 x head 2 x example 1" in html


def test_summary_of_a_study(folder):
    tree = studied()
    tree.attrs["conclusion"] = json.dumps(
        [
            {"group": "summary", "text": "It does."},
            {"group": "x", "text": "More."},
            {"group": "limits", "text": "Less."},
        ]
    )
    said = summary(tree)
    assert said.title == "A study"
    assert said.points == ("It does.", "What was not shown: 1 limit, in the report.")
    assert [part.name for part in said.parts] == ["ablation", "words"]
    assert "More." not in str(said)
    assert json.loads(json.dumps(said.as_dict()))["facts"]["model"] == "small (main)"
    assert "prob  example 1" in said.text(full=True)


@pytest.mark.parametrize(
    "result",
    [
        xr.Dataset(),
        xr.Dataset({"a": ("x", [1.0])}),
        xr.Dataset(attrs={"task": "{", "study": "5", "conclusion": '[1, {"group": "summary"}]', "metrics": '["loss"]'}),
        xr.DataTree.from_dict({"/a": xr.Dataset({"b": 1.0})}),
        xr.DataTree(),
    ],
)
def test_summary_of_anything(result):
    said = summary(result)
    assert str(said).startswith(said.title)
    assert said._repr_html_()


# ---------------------------------------------------------------------------------------------------------------------
# one way of opening


ORDERS = """
import sys, threading
import headwise as hw
import xarray as xr
from headwise.studies import Results, open_result
from headwise.studies.storage.names import variable_names

folder, name, order = sys.argv[1:]
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
            for turn in range(10):
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


@pytest.mark.parametrize("order", ["kept", "closed", "plain", "threads", "beside", "forked"])
def test_values_stay_right_whatever_else_is_opened_and_closed(tmp_path, order):
    """In a process of its own: the NetCDF library ended it where a file with text was open twice and closed once."""
    tree = studied(loss=((2.0, 5.0),))
    for number in range(20):  # text, in variables and in attributes
        tree[f"more{number}"] = xr.DataTree(
            xr.Dataset({"text": ("name", np.asarray(["a", "bc"] * 20, dtype=object))}, {"name": list("pqrstuvwxy" * 4)})
        )
    hw.write_netcdf(tree, tmp_path / "study.nc")
    command = [sys.executable, "-c", ORDERS, str(tmp_path), "study.nc", order]
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
    for number in range(500):
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
    assert len(kept) == 250
