"""Links and foreign files among the parts are neither followed nor taken away."""

import os
import shutil

import pytest
import xarray as xr

from headwise.errors import ResultError, ResultWarning
from tests.support.sweeps import Halt, parts, stop_after, sweep


def refill(folder):
    """A foreign folder: what is in it, to see that it stays."""
    (folder / "deep").mkdir(parents=True)
    kept = {"mine.txt": "mine", "thesis.nc": "no result", "deep/more.txt": "more", "0123456789abcdef.txt": "x"}
    for name, text in kept.items():
        (folder / name).write_text(text)
    return kept


def holds(folder, kept):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_in_the_place_of_the_parts_is_refused(model, out, computed, tmp_path, resume):
    precious = tmp_path / "precious"
    kept = refill(precious)
    parts_folder = out.with_name("sweep.nc.parts")
    parts_folder.symlink_to(precious)
    with pytest.raises(ResultError, match=r"sweep.nc.parts is a link, .*: remove the link, or write elsewhere"):
        sweep(model, out, resume=resume)
    parts_folder.unlink()
    parts_folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ResultError, match=r"sweep.nc.parts is a link"):
        sweep(model, out, resume=resume)
    assert computed == []
    assert holds(precious, kept)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["lock", "about.json", "0123456789abcdef-0123456789abcdef.0123456789abcdef.nc", "a"])
@pytest.mark.parametrize("dangling", [False, True])
def test_links_among_the_parts_are_refused(model, out, computed, tmp_path, name, dangling):
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_text("kept")
    folder = out.with_name("sweep.nc.parts")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    with pytest.raises(ResultError, match=rf"sweep.nc.parts holds the link {name}: remove it, or write elsewhere"):
        sweep(model, out)
    assert computed == []
    assert (folder / name).is_symlink()
    assert victim.exists() != dangling
    assert dangling or victim.read_text() == "kept"


@pytest.mark.parametrize("resume", [True, False])
def test_foreign_files_among_the_parts_stay(model, out, resume):
    folder = out.with_name("sweep.nc.parts")
    kept = refill(folder)
    wanted = sweep(model, None)
    with pytest.raises(Halt):
        sweep(model, out, progress=stop_after(5))
    assert len(parts(out)) > 4
    xr.testing.assert_equal(sweep(model, out, resume=resume), wanted)
    assert holds(folder, kept), "only what headwise wrote is gone"
    xr.testing.assert_equal(xr.load_dataset(out).drop_attrs(), wanted.drop_attrs())


def test_a_foreign_file_called_lock_stays(model, out, computed):
    folder = out.with_name("sweep.nc.parts")
    folder.mkdir()
    (folder / "lock").write_text("the combination is 12-34-56\n")
    os.utime(folder / "lock", (0, 0))
    with pytest.raises(ResultError, match="holds a file lock that headwise did not write: move it away"):
        sweep(model, out)
    assert (folder / "lock").read_text() == "the combination is 12-34-56\n"
    assert computed == []


@pytest.mark.parametrize("name", ["lock", "about.json", "0123456789abcdef-0123456789abcdef.0123456789abcdef.nc"])
def test_what_is_no_file_among_the_parts_is_refused(model, out, computed, name):
    """A FIFO would be waited for, for ever."""
    folder = out.with_name("sweep.nc.parts")
    folder.mkdir()
    os.mkfifo(folder / name)
    with pytest.raises(ResultError, match=rf"holds {name}, which is no file"):
        sweep(model, out)
    (folder / name).unlink()
    (folder / name).mkdir()
    (folder / name / "mine").write_text("mine")
    with pytest.raises(ResultError, match=rf"holds {name}, which is no file"):
        sweep(model, out)
    assert (folder / name / "mine").read_text() == "mine"
    assert computed == []


@pytest.mark.parametrize("kind", ["removed", "link", "folder"])
def test_the_parts_are_taken_away_in_mid_run(model, out, tmp_path, kind):
    wanted = sweep(model, None)
    folder, precious, calls = out.with_name("sweep.nc.parts"), tmp_path / "precious", []
    kept = refill(precious)
    moved = "0123456789abcdef-0123456789abcdef.0123456789abcdef.nc"
    (precious / moved).write_text("like a part")

    def update(done, total):
        calls.append(done)
        if len(calls) == 5:
            shutil.rmtree(folder)
            if kind == "link":
                folder.symlink_to(precious)
            elif kind == "folder":
                precious.rename(folder)

    if kind == "removed":
        with pytest.warns(ResultWarning, match=r"sweep.nc.parts was removed meanwhile: of sweep.nc, only"):
            found = sweep(model, out, progress=update)
        xr.testing.assert_equal(found, wanted)
        xr.testing.assert_equal(xr.load_dataset(out).drop_attrs(), wanted.drop_attrs())
        assert not folder.exists()
    else:
        with pytest.raises(ResultError, match="somebody put another folder, or a link, in the place of"):
            sweep(model, out, progress=update)
        assert holds(folder, kept | {moved: "like a part"})
        assert not out.exists()
