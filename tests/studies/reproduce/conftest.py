"""Measured files to run again."""

import pytest

import headwise as hw
from tests.support.changed_files import MEASURED


@pytest.fixture(scope="module")
def files(words_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    return {name: hw.write_netcdf(make(words_model), folder / f"{name}.nc") for name, make in MEASURED.items()}
