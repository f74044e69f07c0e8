"""Models whose blocks are called, on a server: the same numbers, with and without weights where jobs run."""

import numpy as np
import pytest
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import Add, Head, Knockout, Layer, Patch, ZeroAblate
from headwise.metrics import logit_diff, loss
from headwise.studies import RepeatedTokens, capture, measure
from tests.support.architectures import build
from tests.support.loopback import Loopback
from tests.support.saved_models import kept

TASK = RepeatedTokens(n=3, length=5)
NAMES = {"trusted": "granite", "apart": "glm4"}


@pytest.mark.parametrize("kind", NAMES)
def test_a_called_model_there_is_the_called_model_here(kind, server, tmp_path, monkeypatch):
    folder = (tmp_path / "model").resolve()
    kept(build(NAMES[kind], 0), folder)
    other = Loopback(tmp_path, {str(folder): str(folder)}, apart=kind == "apart").start()
    try:
        monkeypatch.setattr(CONFIG.API, "HOST", other.host)
        there, here = hw.load(folder, remote=True), hw.load(folder)
        assert there.shape.work == here.shape.work
        assert there.sites == here.sites
        assert "blocks are called: no table describes" in repr(there)
        what = {
            "z": ZeroAblate(Head(0, 1)),
            "q": Patch(Head(1, 0).q, "corrupted"),
            "mid": ZeroAblate((Layer(0).mlp_in if kind == "trusted" else Layer(0).resid_mid).at(4))
            + Add(Layer(1).mlp_out.at(-2), np.linspace(-1, 1, 32)),
        }
        found, wanted = (measure(model, TASK, what, [loss, logit_diff]) for model in (there, here))
        for variable in wanted.data_vars:
            np.testing.assert_allclose(found[variable], wanted[variable], rtol=1e-6, atol=1e-5)
        sites = [Layer(1).attn_out, Head(0, 2).z]
        read, own = (capture(model, TASK, sites) for model in (there, here))
        for variable in own.data_vars:
            np.testing.assert_allclose(read[variable], own[variable], rtol=1e-6, atol=1e-5)
        with pytest.raises(DeclarationError, match="has no pattern: attention does not give its weights"):
            measure(there, TASK, Knockout(Head(0, 1), 5, 2), [loss])
    finally:
        other.stop()
