"""A folder of results for the app, and the app that serves it."""

from __future__ import annotations

import importlib.util

import pytest
import xarray as xr

import headwise as hw
from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import accuracy, loss
from headwise.studies import RepeatedTokens, measure
from headwise.studies.app.folder import Folder
from tests.support.app import (
    STUDY,
    SWEEP,
    serving,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, words_model, words_study):
    """A study, a measurement in a folder, and files that are no results."""
    place = tmp_path_factory.mktemp("app") / "results"
    hw.write_netcdf(words_study, place / STUDY)
    heads = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=words_model.layers, head=words_model.heads)
    hw.write_netcdf(measure(words_model, RepeatedTokens(n=4, length=8), heads, [loss, accuracy]), place / SWEEP)
    (place / "torn.nc").write_bytes((place / STUDY).read_bytes()[:2000])
    (place / "<b>noise.nc").write_bytes(b"no NetCDF at all")
    xr.Dataset({"rain": ("day", [1.0, 2.0])}).to_netcdf(place / "weather.nc")
    (place / "notes.txt").write_text("not a result")
    secret = place.parent / "secret.nc"
    secret.write_bytes((place / STUDY).read_bytes())
    (place / "link.nc").symlink_to(secret)
    return place


@pytest.fixture(scope="session")
def tree(folder):
    return Folder(folder).open(STUDY)


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """The app in a process of its own; gives the address of its page."""
    if importlib.util.find_spec("panel") is None:
        pytest.skip("Panel is not installed")
    yield from serving(folder, tmp_path_factory.mktemp("elsewhere"))
