"""Against the real NDIF server (`make ndif`): its numbers are those of this machine."""

import os
import subprocess
import sys

import numpy as np
import pytest

import headwise as hw
from headwise.interventions import Add, Head, Knockout, Layer, MeanAblate, Patch, PathPatch, Scale, ZeroAblate
from headwise.metrics import accuracy, induction, kl, logit_diff, loss
from headwise.studies import RepeatedTokens, capture, composition_scores, measure

HOST = os.environ.get("HEADWISE_NDIF")
pytestmark = [
    pytest.mark.ndif,
    pytest.mark.skipif(not HOST, reason="no NDIF server: `make ndif` starts one and runs this"),
]
TASK = RepeatedTokens(n=4, length=8)
WHAT = {
    "zero": ZeroAblate(Head(1, 2)),
    "mean": MeanAblate(Head(0, 3)),
    "steer": Add(Layer(1).resid_pre.at(-1), [0.1] * 64),
    "half": Scale(Head(1, 2), 0.5),
    "blind": Knockout(Head(1, 2), 9, 2),
    "pattern": Patch(Head(1, 2).pattern),
    "path": PathPatch(Head(0, 3), Head(1, 2).k),
    "two": ZeroAblate(Head(0, 1)) + Patch(Head(1, 2).v),
}
KILLED = """
import logging
import sys
logging.basicConfig(level=logging.INFO)
import headwise as hw
from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure
heads = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))
model = hw.load("words-2l", remote=True)
model.facts
print("go", file=sys.stderr, flush=True)
measure(model, RepeatedTokens(n=64, length=25), heads, [loss], out=sys.argv[1], check=False)
"""


def same(found, wanted):
    assert set(found.data_vars) == set(wanted.data_vars)
    for name, values in wanted.data_vars.items():
        if values.dtype.kind in "fiu":
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=str(name))


@pytest.fixture(scope="module")
def there():
    from nnsight.schema.config import CONFIG

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CONFIG.API, "HOST", HOST)
        yield hw.load("words-2l", remote=True)


@pytest.mark.parametrize("metrics", [[loss, accuracy, kl], [logit_diff], [induction]])
def test_numbers_are_those_of_this_machine(there, words_model, metrics):
    found = measure(there, TASK, WHAT, metrics)
    same(found, measure(words_model, TASK, WHAT, metrics))
    assert found.attrs["executed"] == HOST


def test_captured(there, words_model):
    sites = [Head(1, 2).pattern, Head(0, 1), Layer(0).resid_post, Head(1, 3).k.at([2, -1])]
    same(capture(there, TASK, sites), capture(words_model, TASK, sites))


def test_composition(there, words_model):
    same(composition_scores(there), composition_scores(words_model))


def test_estimates(there, words_model):
    what = {"v": Patch(Head(1, 2).v)}
    same(*(measure(model, TASK, what, [loss], estimator="gradient") for model in (there, words_model)))


def test_a_killed_client_goes_on(there, tmp_path):
    out = tmp_path / "killed.nc"
    first = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stderr=subprocess.PIPE, text=True)
    lines = iter(first.stderr.readline, "")
    assert any(line == "go\n" for line in lines)
    assert any("sent job" in line for line in lines)
    first.kill()
    first.wait()
    first.stderr.close()
    assert not out.is_file()
    again = subprocess.run([sys.executable, "-c", KILLED, str(out)], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert out.is_file()
    assert "sent job" not in again.stderr.partition("\ngo\n")[2]
