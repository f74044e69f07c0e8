"""The gallery shows the lines that draw its pictures, and they run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import holoviews as hv
import pytest
from PIL import Image

import headwise as hw
from headwise.studies import plots

DOCS = Path(hw.__file__).parent / "docs"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("make_gallery", DOCS / "make_gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(gallery):
    text = (DOCS / "gallery.md").read_text()
    assert text == gallery.page(), "make gallery writes it again"
    shown = re.findall(r"!\[[a-z_]+\]\((gallery/[a-z_]+\.png)\)", text)
    assert len(shown) == len(gallery.PICTURES) >= 19
    assert {path.name for path in (DOCS / "gallery").iterdir()} == {Path(name).name for name in shown}
    assert sum((DOCS / name).stat().st_size for name in shown) < 1.5e6
    for name in shown:
        with Image.open(DOCS / name) as image:
            assert min(image.size) > 200


def test_every_picture_is_in_it(gallery):
    text = (DOCS / "gallery.md").read_text()
    absent = {name for name in plots.__all__ if f"plots.{name}(" not in text}
    relatives = {"along", "attention", "grid", "head_grid_over_steps", "head_grids", "words_table"}
    assert absent == relatives  # of each, a close one is there


@pytest.mark.heavy
def test_the_lines_run_as_they_are_shown(gallery, words_study, tmp_path, monkeypatch):
    hw.write_netcdf(words_study, tmp_path / "results" / "induction-words-2l.nc")
    monkeypatch.chdir(tmp_path)
    first, *blocks = re.findall(r"```python\n(.*?)```", (DOCS / "gallery.md").read_text(), re.DOTALL)
    space = {}
    exec(compile(first, "gallery.md", "exec"), space)
    for block in blocks:
        *before, last = block.strip().splitlines()
        exec(compile("\n".join(before), "gallery.md", "exec"), space)
        hv.render(eval(last, space), backend="bokeh")
