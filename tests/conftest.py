"""Strict, seeded, offline; and the models that several test files share."""

import os
import signal
import time
from pathlib import Path

if "HEADWISE_HUB" not in os.environ:  # the network stays off unless the tests marked hub are asked for
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # in processes that tests begin too: several threads round otherwise
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; a test that wants a width sets it itself
os.environ["PYTHONPATH"] = os.pathsep.join(  # processes that tests begin find `tests` too
    [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import pytest
import torch
from hypothesis import HealthCheck, settings

import headwise as hw
from tests.oracles.planted import planted_model
from tests.oracles.raw_hooks import random_gpt2
from tests.support.loopback import KEY, Loopback, last_words

settings.register_profile(
    "headwise",
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("headwise")

SHAPES = {
    "two layers": {"layers": 2, "heads": 4, "d_head": 8, "vocab": 60, "context": 40},
    "deep and narrow": {"layers": 4, "heads": 2, "d_head": 5, "vocab": 45, "context": 30},
    "one wide layer": {"layers": 1, "heads": 3, "d_head": 16, "vocab": 97, "context": 24},
    "three layers": {"layers": 3, "heads": 5, "d_head": 4, "vocab": 51, "context": 32},
}
"""Random GPT-2s whose layers, heads, head widths and vocabularies all differ."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test of `make ndif` that fails is shown with what the server's processes said meanwhile."""
    report = yield
    logs = os.environ.get("HEADWISE_NDIF_LOGS")
    if logs and report.failed and item.get_closest_marker("ndif"):
        since = time.time() - call.duration - 60
        report.sections.append(("what the server said last", last_words(Path(logs), since)))
    return report


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it gives, and much more on a busy machine


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c():
    """Python's own handler, which is not there where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=SHAPES)
def random_model(request):
    """A model with random weights, large enough that a mistake shows."""
    return hw.load(random_gpt2(**SHAPES[request.param]))


@pytest.fixture(scope="session")
def small_model():
    return hw.load(random_gpt2(**SHAPES["two layers"]))


@pytest.fixture(scope="session")
def planted():
    """The planted circuit."""
    return hw.load(planted_model())


@pytest.fixture(scope="session")
def words_model():
    """The shipped model."""
    return hw.load("words-2l")


@pytest.fixture(scope="session")
def words_study(words_model):
    """A small study of the shipped model, to be looked at and not changed."""
    return hw.InductionStudy(n=4, length=8, draws=3).run(words_model)


@pytest.fixture(scope="session")
def _loopback(tmp_path_factory):
    from headwise.interventions.models.locate import SHIPPED

    folder = str((SHIPPED / "words-2l").resolve())
    server = Loopback(tmp_path_factory.mktemp("ndif"), {folder: folder}, key=KEY).start()
    yield server
    server.stop()


@pytest.fixture
def server(_loopback, monkeypatch):
    """A server on loopback that has the shipped model, and nnsight set to it."""
    from nnsight.schema.config import CONFIG

    from headwise.interventions.remote import patience

    monkeypatch.setattr(CONFIG.API, "HOST", _loopback.host)
    monkeypatch.setattr(CONFIG.API, "APIKEY", KEY)
    monkeypatch.setattr(patience, "PAUSES", (0.02, 0.1))
    monkeypatch.setattr(patience, "GIVE_UP", 20.0)
    yield _loopback
    _loopback.quiet()
