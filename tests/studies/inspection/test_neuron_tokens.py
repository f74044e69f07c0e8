"""Tokens of neurons against whole matrices, in every family."""

from operator import attrgetter

import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError
from tests.oracles import raw_circuits, raw_families
from tests.oracles.raw_hooks import random_gpt2
from tests.support.families import PLAIN


def matrices(module, layer, folded):
    """What neurons read and write as ``(neuron, token)``, by the names of the result."""
    block = raw_circuits.blocks_of(module)[layer]
    gpt2 = raw_circuits.is_gpt2(module)
    before = block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm
    names = ("mlp.c_fc", "mlp.c_proj") if gpt2 else raw_families.anatomy(module).matrices
    read, write = (raw_circuits.dense(attrgetter(name)(block).weight) for name in names)
    read, write = (read, write) if gpt2 else (read.T, write.T)
    embed = raw_circuits.embedding(module) @ raw_circuits.norm(before, folded)
    logits = write @ raw_circuits.norm(raw_circuits.last_norm(module), folded) @ raw_circuits.unembedding(module)
    found = {"input": (embed @ read).T, "output": logits - logits.mean(1, keepdims=True)}
    if hasattr(block.mlp, "up_proj"):
        found["up"] = (embed @ raw_circuits.dense(block.mlp.up_proj.weight).T).T
    return found


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", ["gpt2", *PLAIN])
def test_tokens_of_every_neuron_of_a_layer(name, folded):
    module = random_gpt2(3, 4, 8, 40, 30) if name == "gpt2" else raw_families.random_model(name)
    model = hw.load(module)
    layer = model.layers[-1]
    ds = hw.neuron_tokens(model, hw.Layer(layer), top=3, folded=folded)
    wanted = matrices(module, layer, folded)
    assert {name.partition("_")[0] for name in ds.data_vars} == {*wanted}
    assert ds.sizes["neuron"] == model.shape.d_mlp
    for name, matrix in wanted.items():
        for side, sign in (("highest", -1), ("lowest", 1)):
            order = np.argsort(sign * matrix, 1)[:, :3]
            here = ds.sel(side=side)
            np.testing.assert_array_equal(here[f"{name}_id"], order)
            np.testing.assert_allclose(here[f"{name}_weight"], np.take_along_axis(matrix, order, 1), rtol=1e-6)


def test_one_neuron_and_several(words_model):
    several = hw.neuron_tokens(words_model, ["L1N3", hw.Neuron(0, 17)], top=4)
    one = hw.neuron_tokens(words_model, hw.Neuron(0, 17), top=4)
    assert several["neuron"].values.tolist() == ["L1N3", "L0N17"]
    assert several["layer"].values.tolist() == [1, 0]
    assert one["input_token"].dims == ("side", "rank")
    for name in ("input_token", "input_weight", "output_id"):
        np.testing.assert_array_equal(several[name].isel(neuron=1), one[name])
    words = [words_model.token_text([token])[0] for token in one["output_id"].sel(side="lowest").values]
    assert one["output_token"].sel(side="lowest").values.tolist() == words
    assert (one["output_weight"].attrs["units"], one["input_weight"].attrs["units"]) == ("logit", "1")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (hw.Neuron(0, 4000), "has neurons 0 to"),
        ("L7N0", "has layers 0 to 1"),
        (hw.Layer(2), "has layers 0 to 1"),
        ("L0H1", "cannot read 'L0H1' as a neuron"),
        ([], "is no neuron"),
        ([hw.Head(0, 1)], "is no neuron"),
        (17, "17 is no neuron"),
    ],
)
def test_what_cannot_be_is_refused(words_model, given, says):
    with pytest.raises(DeclarationError, match=says):
        hw.neuron_tokens(words_model, given)
