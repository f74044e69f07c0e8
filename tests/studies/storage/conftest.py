"""A model, a place for its result, and the passes that were computed."""

import pytest

import headwise as hw
from headwise.interventions.run import engine
from tests.oracles import raw_hooks


@pytest.fixture
def model():
    return hw.load(raw_hooks.random_gpt2(2, 2, 6, 40, 20, seed=3))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "sweep.nc"


@pytest.fixture
def computed(monkeypatch):
    """The conditions of every pass that comes to its end."""
    real, seen = engine.run_part, []

    def counted(model, plan, chunk, part, known):
        found = real(model, plan, chunk, part, known)
        seen.append((chunk.group, part.one.conditions, part.examples))
        return found

    monkeypatch.setattr(engine, "run_part", counted)
    return seen
