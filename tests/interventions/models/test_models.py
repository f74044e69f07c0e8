"""Opening models: a folder, a module, a shipped name; what is said when there is none, and what no folder can do."""

import json
import logging
import re
import subprocess
import sys

import pytest
import torch

import headwise as hw
from headwise.errors import HeadwiseError, ModelError
from tests.oracles import raw_hooks
from tests.support.saved_models import saved


def test_a_local_folder_loads_as_it_was_saved(folder):
    model = hw.load(folder)
    assert (model.name, model.revision) == ("mine", "local")
    assert (model.layers, model.heads) == (range(2), range(2))
    original = raw_hooks.random_gpt2(2, 2, 8, model.shape.vocabulary, 20)
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(model.module(tokens).logits, original(tokens).logits)
    assert model.weight_hash == hw.load(original).weight_hash
    assert repr(model) == "<Model mine (local): gpt2, 2 layers of 2 heads, float32 on cpu, runs here>"


def test_weight_hash_sees_a_weight_changed_in_place(folder):
    model = hw.load(folder)
    before = model.weight_hash
    with torch.no_grad():
        model.module.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    changed = model.weight_hash
    assert changed != before
    with torch.no_grad():
        model.module.load_state_dict(hw.load(folder).module.state_dict())
    assert model.weight_hash == before


def test_weight_hash_sees_one_changed_weight(folder):
    model = hw.load(folder)
    other = hw.load(folder)
    with torch.no_grad():
        other.module.transformer.h[1].mlp.c_fc.bias[3] += 1e-3
    assert model.weight_hash != other.weight_hash


def test_shipped_model(words_model):
    assert "words-2l" in hw.shipped()
    assert (words_model.name, words_model.revision, words_model.family.name) == ("words-2l", "shipped", "gpt2")
    assert words_model.token_text(words_model.encode("apple banana, cherry")) == ["apple", "banana", ",", "cherry"]


def test_dtype_is_honoured(folder):
    assert hw.load(folder, dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: hw.load(tmp), "is a folder without config.json: a model folder holds config.json and weights"),
        (lambda tmp: hw.load(tmp / "none"), "there is no folder"),
        (
            lambda tmp: hw.load("gpt2-small"),
            "cannot get gpt2-small from the Hugging Face Hub: We couldn't connect to",
        ),
        (lambda tmp: hw.load("nobody/nothing"), "cannot get nobody/nothing from the Hugging Face Hub"),
        (lambda tmp: hw.load("words-2l", device="tpu"), "device 'tpu' cannot be used here: possible are auto, cpu"),
        (lambda tmp: hw.load("words-2l", device=None), "device None cannot be used here"),
        (lambda tmp: hw.load("words-2l", device="meta"), "device 'meta' cannot be used here"),
        (lambda tmp: hw.load("words-2l", revision="v2"), "revision='v2' is for a Hub id: words-2l is shipped"),
        (
            lambda tmp: hw.load("words-2l", dtype="int3"),
            "possible are float32, float64, bfloat16 and float16",
        ),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, make, message):
    with pytest.raises(HeadwiseError) as caught:
        make(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_broken_model_is_refused(folder):
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").write_bytes(b"not weights".ljust(size, b"!"))
    with pytest.raises(ModelError, match="cannot read the model in"):
        hw.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the model in"):
        hw.load(folder)


def edited(folder, change):
    """The folder after `change` of its tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_folder_that_lacks_weights_is_refused_not_filled_with_random_ones(folder):
    def lose(tensors):
        for name in [name for name in tensors if ".h.1." in name]:
            del tensors[name]

    with pytest.raises(ModelError, match=r"the weights of mine lack 12 tensors \(transformer\.h\.1\.attn"):
        hw.load(edited(folder, lose))


def test_a_folder_with_more_layers_than_it_says_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(ModelError, match="the weights of mine have, beyond the configuration, 11 tensors"):
        hw.load(folder)


OLD = {
    "gpt2": ["transformer.h.1.attn.bias", "transformer.h.0.attn.masked_bias"],
    "gpt-neo": ["transformer.h.0.attn.attention.bias", "transformer.h.1.attn.attention.masked_bias"],
    "pythia": [f"gpt_neox.layers.0.attention.{end}" for end in ("bias", "masked_bias", "rotary_emb.inv_freq")],
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
}


@pytest.mark.parametrize("name", OLD)
def test_masks_and_frequencies_that_older_files_hold_are_no_weights(name, tmp_path, caplog, monkeypatch):
    module = saved(name, tmp_path)
    edited(tmp_path, lambda tensors: tensors.update({key: torch.ones(3) for key in OLD[name]}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING", "transformers")
    found = hw.load(tmp_path)
    assert caplog.text == ""
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(found.module(tokens).logits, module(tokens).logits)


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj.bias"),
        ("gpt-neo", "transformer.h.1.attn.attention.out_proj.bias"),
        ("pythia", "gpt_neox.layers.0.attention.dense.bias"),
        ("llama, wide heads", "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_bias_is_a_weight(name, bias, tmp_path):
    saved(name, tmp_path)
    with pytest.raises(ModelError, match=re.escape(f"lack 1 tensors ({bias}): is it whole?")):
        hw.load(edited(tmp_path, lambda tensors: tensors.pop(bias)))


def test_a_bias_beyond_the_configuration_is_found(tmp_path):
    saved("neox without biases", tmp_path)
    bias = "gpt_neox.layers.0.attention.dense.bias"
    with pytest.raises(ModelError, match=re.escape(f"beyond the configuration, 1 tensors ({bias}): is it whole?")):
        hw.load(edited(tmp_path, lambda tensors: tensors.update({bias: torch.ones(24)})))


@pytest.mark.parametrize("broken", [{"n_head": 0}, {"n_layer": "two"}, {"n_embd": 24}])
def test_a_folder_whose_configuration_cannot_be_is_refused(folder, broken):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | broken))
    with pytest.raises(ModelError, match="cannot read the model in") as caught:
        hw.load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="mine has no tokenizer"):
        hw.load(folder)


def test_a_module_in_memory_keeps_its_own_dtype():
    module = raw_hooks.random_gpt2(1, 2, 4, 20, 10).to(torch.bfloat16)
    assert hw.load(module).dtype == "bfloat16"
    assert hw.load(module, dtype="float32").dtype == "float32"


@pytest.mark.parametrize("tokenizer", ["gpt2", 5])
def test_what_is_no_tokenizer_is_refused(tokenizer, words_model):
    for source in ("words-2l", words_model.module):
        with pytest.raises(HeadwiseError, match=f"tokenizer={tokenizer!r} is no tokenizer: give one of transformers"):
            hw.load(source, tokenizer=tokenizer)


@pytest.mark.heavy  # compiles all that is imported
def test_a_python_without_docstrings_is_refused_at_once(tmp_path):
    code = "import headwise as hw\nprint(hw.shipped())\nhw.load('words-2l')"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "['code-4l', 'words-2l']\n"
    assert "ModelError: transformers reads docstrings to make a model, and python -OO (PYTHONOPTIMIZE=2)" in done.stderr
    listed = [sys.executable, "-OO", "-m", "headwise", "results", "ls", str(tmp_path)]
    done = subprocess.run(listed, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.endswith(": 0 results\n")
