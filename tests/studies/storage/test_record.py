"""What a result says about itself, and how much of a file is read for it."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.studies.storage import netcdf, reading
from headwise.studies.storage.record import KINDS, Record
from headwise.studies.storage.unfinished import UnfinishedResult
from tests.support import hostile

TASK = hw.RepeatedTokens(n=2, length=4)
MEASURED = {
    "model": "words-2l",
    "task": hw.to_json(TASK),
    "interventions": hw.to_json(hw.ZeroAblate(hw.Head(0, 3))),
    "metrics": '["loss"]',
    "base": "clean",
    "estimator": "integrated, 3 steps",
}


@pytest.mark.parametrize(
    ("changed", "kind", "missing"),
    [
        ({}, "measurement", []),
        ({"estimators": '["gradient"]', "estimator": None}, "estimates", []),
        ({"sites": "[]"}, "capture", []),
        ({"study": "{}"}, "study", []),
        ({"base": None, "estimator": None}, "measurement", ["base", "estimator"]),
        ({"metrics": None}, "data", ["metrics"]),
    ],
)
def test_what_kind_a_result_is_and_what_it_lacks(changed, kind, missing):
    attrs = {name: value for name, value in (MEASURED | changed).items() if value is not None}
    record = Record.from_attrs(attrs)
    assert (record.kind, record.missing()) == (kind, missing)
    assert record.kind in KINDS


def test_a_record_gives_back_what_was_declared():
    record = Record.from_attrs(
        MEASURED | {"executed": "https://api.ndif.us", "seconds": "2.5", "model_revision": "main"}
    )
    assert (record.model, record.revision, record.server) == ("words-2l", "main", "https://api.ndif.us")
    assert (record.task["n"], record.metrics, record.seconds, record.study) == (2, ["loss"], 2.5, {})
    assert record.declared_task() == TASK
    assert record.declared_what() == hw.ZeroAblate(hw.Head(0, 3))
    assert record.declared_metrics() == [hw.metrics.loss]
    ds = xr.Dataset({"baseline_loss": (("run", "example", "position"), np.zeros((1, 2, 3)))})
    expected = {"base": "clean", "per_position": True, "estimator": "integrated", "steps": 3}
    assert record.options(ds) == expected
    with pytest.raises(hw.errors.ResultError, match="its estimator 'integrated, many steps' is not known"):
        Record.from_attrs(MEASURED | {"estimator": "integrated, many steps"}).options(ds)


@pytest.mark.parametrize("odd", [3, 2.5, b"\xff", "\ud800", "{", "[1]", "9" * 5000, hostile.DEEP, np.arange(3)])
def test_a_record_is_made_of_any_attributes(odd):
    record = Record.from_attrs(
        dict.fromkeys([*MEASURED, "study", "versions", "model_shape", "seconds", "executed"], odd)
    )
    assert record.kind == "study"
    assert {type(one) for one in (record.study, record.task, record.shape, record.versions)} == {dict}
    assert isinstance(record.metrics, list)


@pytest.fixture
def file(tmp_path):
    made = {f"m{number}": ("x", np.arange(4.0) + number) for number in range(5)}
    return hw.write_netcdf(xr.Dataset(made, attrs={"model": json.dumps("x")}), tmp_path / "a.nc")


def test_one_variable_is_read_alone_and_two_with_all_others(file, monkeypatch):
    seen = []
    raw = reading._raw
    monkeypatch.setattr(reading, "_raw", lambda variable: seen.append(variable.name) or raw(variable))
    result = hw.open_result(file)
    assert float(result["m1"].mean()) == 2.5
    assert seen == ["m1"]
    assert [float(result[f"m{number}"].mean()) for number in range(5)] == [1.5, 2.5, 3.5, 4.5, 5.5]
    assert seen == ["m1", "m0", "m1", "m2", "m3", "m4"]


def test_a_part_is_read_once(tmp_path, monkeypatch):
    class Same:
        fingerprint = None

        def attrs(self):
            return {}

    parts = UnfinishedResult(tmp_path / "a.nc", resume=True)
    parts.acquire()
    parts.save("0" * 16, xr.Dataset({"loss": ("x", [1.0, 2.0])}), Same())
    times = []
    monkeypatch.setattr(netcdf, "regular", lambda path: pytest.fail("read again"))
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: times.append(path) or whole(path))
    assert parts.load("0" * 16, Same())["loss"].values.tolist() == [1.0, 2.0]
    assert len(times) == 1
    parts.release()


def test_a_mistake_in_the_code_that_reads_is_not_blamed_on_the_file(tmp_path):
    xr.Dataset({"a": ("x", np.arange(3.0))}).to_netcdf(tmp_path / "a.nc")
    source = netcdf.Source(tmp_path / "a.nc")
    for mistake in (TypeError("a mistake"), ValueError("another"), RuntimeError("a third")):
        with pytest.raises(type(mistake)) as caught, source.open():
            raise mistake
        assert caught.value is mistake
    with pytest.raises(hw.errors.ResultError, match=r"a\.nc cannot be read: "), source.open() as root:
        root.variables["a"][7]
