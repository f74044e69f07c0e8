"""Parts that are damaged or forged are set aside and done again."""

import json
import os

import netCDF4
import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import ResultError, ResultWarning
from headwise.interventions.base import memory
from headwise.interventions.base.hashing import short_hash
from headwise.studies.analyses import ablation
from headwise.studies.storage import netcdf
from tests.support.sweeps import STUDY, Halt, parts, stop_after, sweep


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "swapped"])
def test_a_damaged_part_is_set_aside_and_done_again(model, out, computed, damage):
    wanted = sweep(model, None)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(7))
    there = parts(out)
    for number, path in enumerate(there[:2]):
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(
            {
                "truncated": whole[:middle],
                "empty": b"",
                "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
                "swapped": there[2 + number].read_bytes(),
            }[damage]
        )
    with pytest.warns(ResultWarning, match="is damaged .*set aside as .*damaged, and computed again") as caught:
        found = sweep(model, out)
    assert len(caught) == 2
    xr.testing.assert_equal(found, wanted)


def test_a_damaged_part_stays_until_the_result_is_whole(model, out):
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(7))
    parts(out)[0].write_bytes(b"")
    with pytest.warns(ResultWarning), pytest.raises(Halt):
        sweep(model, out, progress=stop_after(0))
    assert len(list(parts(out)[0].parent.glob("*.damaged"))) == 1


def forged(path, change):
    """A part that somebody changed, with the hash that it then has, and the name of the hash of what it says."""
    part = xr.load_dataset(path)
    part = change(part)
    path.unlink()
    beside = path.with_name("forged")
    part.to_netcdf(beside)
    what = {
        "examples": [int(end) for end in np.atleast_1d(part.attrs["examples"])[:2]],
        "run": part.attrs["run"],
        "conditions": part.attrs["conditions"],
    }
    key = f"{path.name.split('-')[0]}-{short_hash(json.dumps(what))}"
    beside.rename(path.with_name(f"{key}.{short_hash(beside.read_bytes())}.nc"))


def other_examples(*ends):
    return lambda part: part.assign_attrs(examples=list(ends))


def twice(part):
    names = json.loads(part.attrs["conditions"])
    return part.assign_attrs(conditions=json.dumps(names[:1] * len(names)))


FORGERIES = {
    "one position for all": lambda part: part.map(lambda one: one.isel({one.dims[-1]: slice(0, 1)})),
    "one example for all": lambda part: part.isel(example=slice(0, 1)),
    "transposed": lambda part: part.transpose("example", ...),
    "an extra variable": lambda part: part.assign(more=("example", np.zeros(part.sizes["example"]))),
    "a coordinate": lambda part: part.assign_coords(example=np.arange(part.sizes["example"])),
    "another name": lambda part: part.rename_vars(loss="other"),
    "one metric": lambda part: part.drop_vars("loss"),
    "whole numbers": lambda part: part.astype("int32"),
    "text": lambda part: part.astype(str),
    "half precision": lambda part: part.map(lambda one: one.astype("float64").astype("complex64").real.astype("int8")),
    "examples that are not there": other_examples(2, 6),
    "no examples": other_examples(2, 2),
    "negative examples": other_examples(-4, 4),
    "examples that are a number": lambda part: part.assign_attrs(examples=3),
    "conditions twice": twice,
    "no conditions": lambda part: part.assign_attrs(conditions="[]"),
    "conditions that are no JSON": lambda part: part.assign_attrs(conditions="["),
    "conditions that are a number": lambda part: part.assign_attrs(conditions="3"),
    "conditions within each other": lambda part: part.assign_attrs(conditions="[" * 100_000 + "]" * 100_000),
    "a run that is not there": lambda part: part.assign_attrs(run="dirty"),
    "a number for a run": lambda part: part.assign_attrs(run=7),
    "nothing": lambda part: xr.Dataset(attrs=part.attrs),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_part_is_set_aside_and_done_again(model, out, kind):
    """Its hash is right, but it is not what the plan asks for."""
    wanted = sweep(model, None, batch_size=8)
    with pytest.raises(Halt):
        sweep(model, out, batch_size=8, progress=stop_after(5))
    there = [path for path in parts(out) if xr.load_dataset(path).attrs["run"] == ""]
    forged(there[0], FORGERIES[kind])
    with pytest.warns(ResultWarning, match=r"is damaged \(.*\): set aside as .*, and computed again"):
        found = sweep(model, out, batch_size=8)
    xr.testing.assert_identical(found.drop_attrs(), wanted.drop_attrs())


def test_a_forged_part_that_declares_more_than_there_is_memory(model, out):
    wanted = sweep(model, None)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(7))
    path = parts(out)[0]
    whole = path.with_name("forged")
    with netCDF4.Dataset(whole, "w") as file, xr.open_dataset(path) as part:
        file.setncatts({name: value for name, value in part.attrs.items()})
        file.createDimension("x", 10**6)
        file.createDimension("y", 10**6)
        file.createVariable("loss", "f4", ("x", "y"), chunksizes=(1000, 1000))
    path.unlink()
    whole.rename(path.with_name(f"{path.name.split('.')[0]}.{short_hash(whole.read_bytes())}.nc"))
    with pytest.warns(ResultWarning, match=r"it holds .*1000000, 1000000.* is asked for"):
        xr.testing.assert_equal(sweep(model, out), wanted)


def with_free(count):
    """The check of memory, as where so many bytes are free."""

    def shortage(*needed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "free_memory", lambda: count)
            return memory.shortage(*needed)

    return shortage


def test_want_of_memory_is_no_damage(model, out, monkeypatch):
    """What is finished is neither set aside nor computed again: the call says how much it needs."""
    wanted = sweep(model, None)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(7))
    before = [path.name for path in parts(out)]
    with monkeypatch.context() as short:
        short.setattr(netcdf, "shortage", with_free(20))
        short.setattr(netcdf, "UNASKED", 0)
        with pytest.raises(ResultError, match="and there is room for"):
            sweep(model, out)
    assert [path.name for path in parts(out)] == before
    xr.testing.assert_equal(sweep(model, out), wanted)


def test_a_finished_study_that_memory_does_not_hold_is_not_computed_again(words_model, out, monkeypatch):
    STUDY.run(words_model, out=out)
    before = out.read_bytes()
    monkeypatch.setattr(netcdf, "shortage", with_free(20_000))
    monkeypatch.setattr(netcdf, "UNASKED", 0)
    with pytest.raises(ResultError, match="and there is room for"):
        STUDY.run(words_model, out=out)
    assert out.read_bytes() == before


def test_a_file_needs_as_much_memory_as_its_numbers(tmp_path, monkeypatch):
    size = 4 * 10**6
    hw.write_netcdf(xr.Dataset({"a": ("x", np.arange(size // 4, dtype=np.float32))}), tmp_path / "a.nc")
    monkeypatch.setattr(netcdf, "UNASKED", 0)
    monkeypatch.setattr(netcdf, "shortage", with_free(size * 4 // 3 + 4))
    assert hw.open_result(tmp_path / "a.nc", load=True)["a"].sum() > 0
    monkeypatch.setattr(netcdf, "shortage", with_free(size))
    with pytest.raises(ResultError, match="the variable a"):
        hw.open_result(tmp_path / "a.nc", load=True)


def test_a_forged_stage_of_a_study(words_model, out, monkeypatch):
    """Of other sizes, it is made again; without what the study needs, the error says what to do."""

    def stopped():
        monkeypatch.setattr(ablation, "every_head", stop)
        with pytest.raises(Halt):
            STUDY.run(words_model, out=out)
        monkeypatch.undo()
        return next(path for path in parts(out) if path.name.split(".")[0].endswith("-heads"))

    def stop(*arguments, **named):
        raise Halt

    def forge(path, change):
        part = change(xr.load_dataset(path))
        key = path.name.split(".")[0]
        path.unlink()
        part.to_netcdf(out.with_name("forged"))
        os.replace(out.with_name("forged"), path.with_name("forged"))
        path.with_name("forged").rename(path.with_name(f"{key}.{short_hash(path.with_name('forged').read_bytes())}.nc"))

    forge(stopped(), lambda part: part.isel(head=slice(0, 3)))
    with pytest.warns(ResultWarning, match="it has 3 along head, where 8 are asked for"):
        path = stopped()
    forge(path, lambda part: part.drop_vars("induction"))
    with pytest.raises(ResultError, match=r"sweep.nc.parts may hold stages that are not what this study makes") as told:
        STUDY.run(words_model, out=out)
    assert "\n" not in str(told.value)
