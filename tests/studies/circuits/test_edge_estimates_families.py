"""Estimates of edges in every family that is laid open: those of a sender add up to that of patching the sender."""

import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError
from tests.support.architectures import build

TASK = hw.RepeatedTokens(n=2, length=5, seed=1)
FAMILIES = [
    *("gpt_neo", "gptj", "mistral", "ministral", "qwen2", "qwen3", "gemma", "phi3", "starcoder2", "mixtral"),
    *("qwen2_moe", "qwen3_moe", "gpt_oss", "nemotron"),
]
NO_NEURONS = ("phi3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
FEW = ("gptj", "qwen3", "gemma", "gpt_oss")


@pytest.mark.parametrize(
    "family", [name if name in FEW else pytest.param(name, marks=pytest.mark.heavy) for name in FAMILIES]
)
def test_estimates_of_a_sender_add_up_to_that_of_patching_it(family):
    model = hw.load(build(family, 1).eval())
    found = hw.edge_scores(model, TASK, "logit_diff", estimator="eap")["score"].groupby("sender").sum()
    patches = {"input": hw.Patch(hw.Layer(0).embed)}
    for layer in model.layers:
        patches |= {f"a{layer}.h{head}": hw.Patch(hw.Head(layer, head)) for head in model.heads}
        patches[f"m{layer}"] = hw.Patch(hw.Layer(layer).mlp_out)
    assert [*patches] == [*hw.Graph.of(model).senders]
    ds = hw.measure(model, TASK, patches, "logit_diff", estimator="gradient")
    whole = hw.effect(ds, "logit_diff").transpose("condition", "example")
    rounding = 2e-5 * max(1, float(np.abs(ds["baseline_logit_diff"]).max()), float(np.abs(whole).max()))
    np.testing.assert_allclose(found.sel(sender=[*patches]).transpose("sender", "example"), whole, atol=rounding)
    assert float(np.abs(whole).max()) > 1e-3
    star = hw.edge_scores(model, TASK, "logit_diff", estimator="atp*")["score"]
    assert np.isfinite(star).all()
    if family in NO_NEURONS:
        with pytest.raises(DeclarationError, match=r"estimator='relp': in .* possible are the other estimators"):
            hw.edge_scores(model, TASK, "logit_diff", estimator="relp")
    else:
        assert np.isfinite(hw.edge_scores(model, TASK, "logit_diff", estimator="relp")["score"]).all()
