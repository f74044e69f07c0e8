"""A small study, and a folder of results, for the commands."""

import numpy as np
import pytest

import headwise as hw


@pytest.fixture(scope="session")
def study(tmp_path_factory, words_model):
    """A small study, as the command makes it."""
    out = tmp_path_factory.mktemp("study") / "results" / "study.nc"
    hw.InductionStudy(n=4, length=8).run(words_model, out=out)
    return out


@pytest.fixture
def folder(tmp_path, study):
    """Two measurements by hand, a damaged file and an unfinished run."""
    from tests.support import results_by_hand as hand

    hw.write_netcdf(hand.measured([[2.0, 3.0]]), tmp_path / "a.nc")
    hw.write_netcdf(hand.measured([[9.0, np.nan]], model="large"), tmp_path / "b.nc")
    hand.unfinished(tmp_path, "later.nc")
    (tmp_path / "bad.nc").write_bytes(b"nothing")
    return tmp_path
