"""A hostile server, and waiting that ends soon."""

import pytest
from nnsight.schema.config import CONFIG

from headwise.interventions.remote import listener, patience, protocol, reaching
from tests.support.hostile_server import (
    Hostile,
)
from tests.support.loopback import KEY


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Waiting for what never comes ends soon, and no server is known yet."""
    monkeypatch.setattr(patience, "PAUSES", (0.02, 0.1))
    monkeypatch.setattr(patience, "GIVE_UP", 0.3)
    monkeypatch.setattr(patience, "LOST", 0.3)
    monkeypatch.setattr(protocol, "READ", 1.0)
    monkeypatch.setattr(protocol, "TAKE", 1.0, raising=False)
    monkeypatch.setattr(listener, "OPENING", 1.0)
    monkeypatch.setattr(listener, "WITHOUT", set())
    monkeypatch.setattr(reaching, "REACH", 2.0)
    monkeypatch.setattr(reaching, "REACHED", set())


@pytest.fixture
def hostile(monkeypatch):
    """Makes a hostile server, to which nnsight is set."""
    made = []

    def make(result=b"", /, **routes):
        made.append(Hostile(result, **routes))
        monkeypatch.setattr(CONFIG.API, "HOST", made[0].host)
        monkeypatch.setattr(CONFIG.API, "APIKEY", KEY)
        return made[-1]

    yield make
    for one in made:
        one.close()
