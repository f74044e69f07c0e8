"""A server with small jobs, with and without a websocket, and the numbers that are right."""

import pytest

from headwise.interventions.remote import listener, patience, run
from tests.support import remote_client


@pytest.fixture
def small_jobs(server, monkeypatch):
    """Several jobs in a sweep, and the server's books from here on."""
    monkeypatch.setattr(run, "ROWS", 32)
    monkeypatch.setattr(patience, "LOST", 1.5)
    monkeypatch.setattr(patience, "STILL", 1.0)
    begun = len(server.executed())
    return lambda: server.executed()[begun:]


@pytest.fixture
def asked(server, monkeypatch):
    """No websocket: what becomes of jobs is asked for."""
    monkeypatch.setattr(listener, "WITHOUT", {server.host})


@pytest.fixture(scope="session")
def wanted(words_model):
    return remote_client.sweep(words_model, None)
