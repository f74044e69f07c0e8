"""Paths in other families than GPT-2: grouped heads, and attention and MLP side by side."""

import numpy as np
import pytest

import headwise as hw
from headwise.interventions import Compose, Head, Layer, Patch, PathPatch
from headwise.studies import RepeatedTokens
from tests.oracles import raw_families

TASK = RepeatedTokens(n=3, length=7, seed=2, score="all")
OTHERS = {
    "grouped": lambda: raw_families.random_model("llama"),
    "parallel": lambda: raw_families.random_model("pythia"),
    "one after the other": lambda: raw_families.random_model("neox, one after the other"),
}


@pytest.mark.parametrize("sender", [Layer(0).embed, Head(0, 1).z, Layer(0).attn_out, Layer(0).mlp_out], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_what_a_path_through_mlps_brings_is_what_is_there_with_all_attention_held(name, sender):
    """A receiver reads what it reads where the sender is patched and every head keeps its value."""
    model = hw.load(OTHERS[name]())
    last = model.shape.layers - 1
    held = [Patch(Layer(layer).z, source="clean") for layer in model.layers if sender.component != "z" or layer]
    held += [Patch(Head(0, head), source="clean") for head in model.heads if sender == Head(0, 1).z and head != 1]
    if sender.component == "attn_out":
        held = held[1:]
    with pytest.warns(UserWarning, match="changes nothing"):
        free = hw.capture(model, TASK, [Layer(last).mlp_in, Head(last, 1).q, Head(last, 0).k, "logits"],
                          what=Compose(Patch(sender), *held))  # fmt: skip
    for site in (Layer(last).mlp_in, Head(last, 1).q, Head(last, 0).k, "logits"):
        found = hw.capture(model, TASK, site, what=PathPatch(sender, site))
        (variable,) = found.data_vars
        np.testing.assert_allclose(found[variable], free[variable], atol=2e-5)
        base = hw.capture(model, TASK, site)[variable]
        assert float(abs(found[variable] - base).max()) > 1e-3
