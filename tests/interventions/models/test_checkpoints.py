"""A model as it was at a step of its training, or at a revision of the Hub: which weights are opened."""

import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ModelError, UnknownNameError
from headwise.interventions.models.checkpoints import CHECKPOINTS, revision_and_step, step_of_revision
from headwise.interventions.models.locate import SHIPPED
from tests.support.saved_models import saved

WORDS = SHIPPED / "words-2l"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_weights_of_a_step_are_those_of_the_file(words_model):
    opened = hw.load("words-2l", step=np.int64(512))
    plain = GPT2LMHeadModel(GPT2Config.from_json_file(WORDS / "config.json")).eval()
    with safe_open(WORDS / CHECKPOINTS, "pt") as file:
        for name, parameter in plain.named_parameters():
            parameter.data = file.get_tensor(f"step000512/{name}").float()
    tokens = torch.arange(2, 30)[None]
    torch.testing.assert_close(opened.module(tokens).logits, plain(tokens).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(opened.module(tokens).logits, words_model.module(tokens).logits, atol=0.1)
    assert (opened.name, opened.revision, opened.step, type(opened.step)) == ("words-2l", "shipped", 512, int)
    assert opened.tokenizer_hash == words_model.tokenizer_hash


def test_the_last_step_is_the_shipped_model_to_the_last_bit(words_model):
    steps = hw.checkpoint_steps("words-2l")
    assert (len(steps), steps[0], steps[-1]) == (23, 0, 2000)
    last = hw.load("words-2l", step=steps[-1])
    assert last.weight_hash == words_model.weight_hash
    assert last.module.lm_head.weight is last.module.transformer.wte.weight
    assert words_model.step is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: hw.load("words-2l", step=513),
            UnknownNameError,
            "no checkpoint of step 513: there are 0, 8",
        ),
        (lambda: hw.load("words-2l", step="x"), DeclarationError, "step must be a whole number, got 'x'"),
        (lambda: hw.load("words-2l", step=-8), DeclarationError, "step must be 0 or more, got -8"),
        (lambda: hw.load("words-2l", step=8, remote=True), DeclarationError, "is for a Hub id: words-2l is shipped"),
        (lambda: hw.load("gpt2", step=8), ModelError, r"of EleutherAI/pythia-\*\): name a revision"),
        (lambda: hw.load("EleutherAI/pythia-70m", step=3), UnknownNameError, "0, 1, 2, 4, 8 to 512 .* 143000"),
        (lambda: hw.load("EleutherAI/pythia-70m", step=8, revision="main"), DeclarationError, "give one of them"),
    ],
)
def test_steps_that_there_are_not(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("option", [{"step": 8}, {"revision": "main"}])
def test_a_module_in_memory_has_no_steps(option, words_model):
    with pytest.raises(DeclarationError, match="is for a name or folder: a module in memory is as it is"):
        hw.load(words_model.module, **option)


def keep(folder, change=lambda weights: weights, steps="[7]"):
    """Write checkpoints of the model in a folder: its weights times two, at step 7."""
    weights = {key: 2 * value for key, value in load_file(folder / "model.safetensors").items()}
    kept = {f"step000007/{key}": value for key, value in change(weights).items()}
    save_file(kept, folder / CHECKPOINTS, {"steps": steps})


def test_a_folder_with_checkpoints(folder):
    with pytest.raises(ModelError, match=r"there is no checkpoints\.safetensors in mine"):
        hw.load(folder, step=7)
    keep(folder)
    model, opened = hw.load(folder), hw.load(folder, step=7)
    assert hw.checkpoint_steps(folder) == [7]
    assert (opened.name, opened.revision, opened.step) == ("mine", "local", 7)
    for name, parameter in model.module.named_parameters():
        assert torch.equal(opened.module.get_parameter(name), 2 * parameter)
    assert hw.load(folder, step=7, dtype="bfloat16").dtype == "bfloat16"


def without(weights):
    return {key: value for key, value in weights.items() if "h.1.ln_1" not in key}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"change": without}, r"the weights of mine lack 2 tensors \(transformer\.h\.1\.ln_1\.bias"),
        ({"change": lambda weights: weights | {"more": torch.ones(2)}}, r"beyond the configuration, 1 tensors \(more"),
        ({"change": lambda weights: weights | {"transformer.ln_f.bias": torch.ones(3)}}, "cannot read the model in"),
        ({"steps": '"x"'}, r"cannot read checkpoints\.safetensors of mine"),
        ({"steps": "7]"}, r"cannot read checkpoints\.safetensors of mine"),
    ],
)
def test_broken_checkpoints(folder, broken, message):
    keep(folder, **broken)
    with pytest.raises(ModelError, match=message) as caught:
        hw.load(folder, step=7)
    assert "\n" not in str(caught.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """What was fetched of the Hub: of a repository, main and another revision with other sizes and words."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def fetched(name, revision):
        where = tmp_path / f"models--{name.replace('/', '--')}"
        (where / "refs").mkdir(parents=True)
        for ref, commit, layers in (("main", COMMIT[::-1], 1), (revision, COMMIT, 2)):
            snapshot = where / "snapshots" / commit
            module = saved("gpt2", snapshot)
            config = json.loads((snapshot / "config.json").read_text())
            (snapshot / "config.json").write_text(json.dumps(config | {"n_layer": layers}))
            own = dict(module.named_parameters())
            kept = {key: layers * value.data for key, value in own.items() if layers == 2 or ".h.1." not in key}
            save_file(kept, snapshot / "model.safetensors", {"format": "pt"})
            words = json.loads((snapshot / "tokenizer.json").read_text())
            words["model"]["vocab"][f"word{layers}"] = words["model"]["vocab"].pop("3")
            (snapshot / "tokenizer.json").write_text(json.dumps(words))
            (where / "refs" / ref).write_text(commit)

    return fetched


def test_short_names_of_the_hub(cache):
    cache("gpt2", "v2")
    model = hw.load("gpt2")
    assert (model.name, model.revision, model.source, model.step) == ("gpt2", "main", "gpt2", None)
    assert (len(model.layers), model.encode("word1")) == (1, [3])


@pytest.mark.parametrize("revision", ["v2", COMMIT])
def test_a_revision_is_that_of_configuration_weights_and_tokenizer(cache, revision):
    cache("gpt2", "v2")
    model, main = hw.load("gpt2", revision=revision), hw.load("gpt2")
    assert (model.name, model.revision, len(model.layers), model.encode("word2")) == ("gpt2", revision, 2, [3])
    ours, theirs = (one.module.transformer.wpe.weight for one in (model, main))
    assert torch.equal(ours, 2 * theirs)
    with pytest.raises(ModelError, match="cannot get gpt2 from the Hugging Face Hub"):
        hw.load("gpt2", revision="v3")


def test_steps_of_pythia_are_revisions(cache):
    cache("EleutherAI/pythia-70m", "step1000")
    model = hw.load("EleutherAI/pythia-70m", step=1000)
    assert (model.revision, model.step, len(model.layers)) == ("step1000", 1000, 2)
    assert repr(model).startswith("<Model EleutherAI/pythia-70m (step1000): gpt2, 2 layers")
    assert hw.load("EleutherAI/pythia-70m", revision="step1000").step == 1000
    steps = hw.checkpoint_steps("EleutherAI/pythia-70m")
    assert (len(steps), steps[10], steps[11], steps[-1]) == (154, 512, 1000, 143000)


@pytest.mark.parametrize("name", ["word-2l", "words 2l", "a..b", "gpt2/", "x--y", "ä", "gpt2\n"])
def test_names_that_are_none(name):
    """Those that cannot be ids of the Hub are refused without asking it."""
    asked = "cannot get word-2l from the Hugging Face Hub"
    message = asked if name == "word-2l" else f"no model is called {name!r}: shipped are code-4l and words-2l"
    with pytest.raises(HeadwiseError, match=re.escape(message)) as caught:
        hw.load(name)
    assert "words-2l" in str(caught.value)


@pytest.mark.parametrize(
    ("revision", "step"),
    [
        ("step1000", 1000),
        ("checkpoint-500", 500),
        ("global_step7", 7),
        ("main", None),
        (None, None),
        ("step" + "9" * 30, None),
    ],
)
def test_the_step_of_a_revision(revision, step):
    assert step_of_revision(revision) == step
    if step is not None:
        assert revision_and_step(revision, step) == revision
        assert revision_and_step("shipped", step) == f"shipped, step {step}"
