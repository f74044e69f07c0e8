"""Pictures as files: PNG and SVG through a browser that loads nothing, and leaves nothing behind."""

from __future__ import annotations

import stat
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import holoviews as hv
import numpy as np
import pytest
import xarray as xr
from PIL import Image

from headwise.errors import DeclarationError, ResultError
from headwise.studies import plots
from headwise.studies.output.page import rendered
from headwise.studies.plots.export import browser
from tests.support import browser as driver

needs_browser = pytest.mark.skipif(driver.found() is None, reason="Chromium is not installed: PNG and SVG not drawn")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def grid():
    values = xr.DataArray([[-2.0, 0.0], [1.0, 2.0]], dims=("layer", "head"), name="effect_loss")
    return plots.head_grid(values, title="<b>effect & more")


@pytest.fixture(autouse=True)
def own_temp(tmp_path, monkeypatch):
    """A temporary folder in which nothing may be left."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def program(tmp_path, text):
    """A browser that does what a script says."""
    path = tmp_path / "browser.py"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def group(leader):
    """Processes of a group that live: those that were ended and wait for the system to count them do not."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,comm="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [name for number, state, name in rows if int(number) == leader and not state.startswith("Z")]


@needs_browser
def test_png_has_two_pixels_for_each_and_is_cropped_to_the_figure(grid, tmp_path):
    with Image.open(plots.save(grid, tmp_path / "new" / "grid.png")) as image:
        image.load()
    model = rendered(grid)
    model.toolbar_location = None
    assert model.frame_width == 160
    assert 2 * 160 < image.width < 2 * 260
    assert 2 * 84 < image.height < 2 * 230
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours = {tuple(one) for one in np.unique(pixels, axis=0)}
    assert {(255, 255, 255), (11, 60, 115), (138, 58, 5)} <= colours  # the paper, and both ends of the scale
    white = (np.asarray(image.convert("L")) == 255).all(axis=1)
    assert white[-1]
    assert not white[: int(0.9 * len(white))][-40:].all()


@needs_browser
def test_svg_is_vectors_and_text(grid, tmp_path):
    path = plots.save(grid, tmp_path / "grid.SVG")
    root = ET.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    assert list(root.iter(f"{SVG}image")) == []
    texts = ["".join(one.itertext()) for one in root.iter(f"{SVG}text")]
    assert {"<b>effect & more", "+1.00", "-2.00", "layer", "head"} <= set(texts)
    assert len(list(root.iter(f"{SVG}linearGradient"))) == 1  # the colour bar
    assert float(root.get("width")) > 160


@needs_browser
def test_panels_of_a_layout_stand_side_by_side(grid, tmp_path):
    def width(layout):
        with Image.open(plots.save(layout, tmp_path / "one.png")) as image:
            return image.size

    alone, row, column = width(grid), width((grid + grid).cols(2)), width((grid + grid).cols(1))
    assert row == (2 * alone[0] + 24, alone[1])
    assert column == (alone[0], 2 * alone[1] + 24)


@needs_browser
def test_nothing_leaves_the_machine_and_nothing_is_left_running(grid, tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def record(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", record)
        plots.save(grid, tmp_path / "grid.png")
    (process,) = started
    assert process.returncode is not None
    command = process.args
    assert any(one.startswith("--host-resolver-rules=MAP * ~NOTFOUND") for one in command)
    assert command[-1].startswith("http://127.0.0.1:")
    until = time.monotonic() + 20
    while living := group(process.pid):
        assert time.monotonic() < until, f"still running: {living}"


def test_a_browser_that_ends_or_hangs_is_reported_and_ended(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_BROWSER", program(tmp_path, "import sys; sys.exit('no display')"))
    target = tmp_path / "grid.png"
    target.write_bytes(b"as it was")
    with pytest.raises(ResultError, match=r"ended before it drew the picture: no display"):
        plots.save(grid, target)
    monkeypatch.setenv("HEADWISE_BROWSER", program(tmp_path, "import time; time.sleep(60)"))
    with pytest.raises(ResultError, match=r"did not draw the picture within 0\.3 s"):
        plots.save(grid, target, timeout=0.3)
    tells = (
        "import sys, urllib.request as web; web.urlopen(web.Request(sys.argv[-1], data=b'TypeError: x', headers={"
        "'Content-Type': 'text/plain'}))"
    )
    monkeypatch.setenv("HEADWISE_BROWSER", program(tmp_path, tells))
    with pytest.raises(ResultError, match="could not draw the picture: TypeError: x"):
        plots.save(grid, target)
    assert target.read_bytes() == b"as it was"
    assert [one.name for one in tmp_path.iterdir() if "part" in one.name] == []


def test_without_a_browser_it_says_how_to_get_one(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(ResultError, match=r"install one .*HEADWISE_BROWSER; \.html needs none"):
        plots.save(grid, tmp_path / "grid.svg")
    monkeypatch.setenv("HEADWISE_BROWSER", "/nowhere/chrome")
    with pytest.raises(ResultError, match="HEADWISE_BROWSER=/nowhere/chrome: no such program"):
        plots.save(grid, tmp_path / "grid.svg")
    monkeypatch.undo()
    assert plots.save(grid, tmp_path / "grid.html").stat().st_size > 1e5


def test_the_page_answers_nobody_else():
    import urllib.error
    import urllib.request

    with browser._served(b"page") as (address, arrived, answer):
        assert urllib.request.urlopen(address).read() == b"page"
        other = address.rsplit("/", 1)[0] + "/other"
        for data in (None, b"forged"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(other, data=data))
            refused.value.close()
        assert not arrived.is_set()
        urllib.request.urlopen(urllib.request.Request(address, data=b"mine")).close()
        assert arrived.wait(20)
        assert answer["body"] == b"mine"


def test_what_is_no_picture_is_refused(grid, tmp_path):
    with pytest.raises(DeclarationError, match=r"x\.pdf: pictures are saved as \.html, \.png and \.svg"):
        plots.save(grid, tmp_path / "x.pdf")
    with pytest.raises(DeclarationError, match="takes a HoloViews element, overlay or layout, not ndarray"):
        plots.save(np.zeros(3), tmp_path / "x.png")
    with pytest.raises(DeclarationError, match="a table is no picture"):
        plots.save(hv.Table({"a": [1]}, ["a"]), tmp_path / "x.html")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ResultError, match="is a folder"):
        plots.save(grid, tmp_path / "x.png")


@needs_browser
def test_every_character_of_a_token_survives(tmp_path):
    tokens = ("position", ["</script>", "naïve", "日本語", '"&<>', "🙂"])
    ds = xr.Dataset({"pattern": (("query", "key"), np.eye(5))}, coords={"token": tokens})
    root = ET.parse(plots.save(plots.attention_viewer(ds), tmp_path / "t.svg")).getroot()
    texts = {"".join(one.itertext()) for one in root.iter(f"{SVG}text")}
    assert {"</script>", "naïve", "日本語", '"&<>', "🙂"} <= texts
