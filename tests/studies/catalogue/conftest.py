"""A folder of results by hand."""

import pytest

import headwise as hw
from tests.support.results_by_hand import measured, studied, unfinished


@pytest.fixture
def folder(tmp_path):
    """Five results, one of them unfinished, in two folders."""
    hw.write_netcdf(measured([[2.0, 3.0]]), tmp_path / "a.nc")
    hw.write_netcdf(measured([[1.5, 9.0]], seed=1), tmp_path / "deep" / "b.nc")
    hw.write_netcdf(measured([[4.0, 1.0]], model="large", seed=2), tmp_path / "c.nc")
    hw.write_netcdf(studied(), tmp_path / "study.nc")
    unfinished(tmp_path, "later.nc")
    return tmp_path
