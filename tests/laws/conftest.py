"""Random GPT-2s on which the oracles are compared with one another."""

from __future__ import annotations

from typing import Any

import pytest

from tests.oracles import raw_hooks
from tests.support.raw_places import SHAPES


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Any:
    return raw_hooks.random_gpt2(**SHAPES[request.param]).requires_grad_(False).double()
