"""Numbers that pictures are drawn of."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from tests.support.elements import HEADS, LAYERS


@pytest.fixture
def values():
    numbers = np.arange(8.0).reshape(LAYERS, HEADS) / 10
    attrs = {"long_name": "induction score", "units": "1"}
    return xr.DataArray(numbers, dims=("layer", "head"), name="induction", attrs=attrs)
