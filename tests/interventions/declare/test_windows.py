"""Windows of attention: in the families whose models have them, as they have them, and found where a table is wrong."""

import dataclasses

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import ModelError
from headwise.interventions import Head, ZeroAblate, selfcheck
from headwise.interventions.models import family, windows
from headwise.interventions.models.architectures import LLAMA, QWEN2, standard_sizes, windows_everywhere
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure
from tests.oracles import raw_families

FULL, SLIDING = "full_attention", "sliding_attention"
LONG = {"max_position_embeddings": 1300, "vocab_size": 700}


def random(kind, layers=2, **config):
    return raw_families.random_weights(kind, raw_families._llama_like(layers, 2, 1, **config))


def seen_by(module, length=12):
    """How many keys the last query of each layer sees, by the attention weights that the model itself returns."""
    weights = raw_families.own_weights(module, torch.arange(length)[None])
    return tuple(int((one[0, 0, -1] > 0).sum()) for one in weights)


@pytest.mark.parametrize(
    ("kind", "config", "wanted"),
    [
        ("Llama", {"sliding_window": 5}, ()),
        ("Llama", {"sliding_window": 5, "layer_types": [SLIDING, FULL]}, ()),
        ("Gemma", {"sliding_window": 5}, ()),
        ("Mistral", {"sliding_window": None}, ()),
        ("Mistral", {"sliding_window": 5, "layer_types": [FULL, SLIDING]}, (5, 5)),
        ("Qwen2", {"sliding_window": 5, "use_sliding_window": False, "max_window_layers": 0}, ()),
        ("Qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}, (None, 5)),
        ("Qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 9}, ()),
        ("Qwen3", {"sliding_window": 5, "use_sliding_window": True, "layer_types": [SLIDING, FULL]}, (5, None)),
    ],
)
def test_windows_are_those_that_the_model_has(kind, config, wanted):
    module = random(kind, **config)
    model = hw.load(module)
    assert model.shape.windows == wanted
    assert seen_by(module) == tuple(model.shape.window(layer) or 12 for layer in model.layers)
    assert selfcheck.failures(model) == []


def test_a_window_that_the_model_ignores_changes_no_number():
    """More tokens than the configuration's window, against a plain hook."""
    module = random("Llama", sliding_window=600, **LONG)
    task = RepeatedTokens(n=1, length=320)
    model = hw.load(module)
    batch = task.draw(model)
    (group,) = batch.groups()
    size = model.shape.d_head
    hook = module.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, given: torch.cat([torch.zeros_like(given[0][..., :size]), given[0][..., size:]], -1)
    )
    with torch.no_grad():
        logits = module(torch.as_tensor(batch.runs["clean"])).logits[:, list(group.scored)]
    hook.remove()
    targets = torch.as_tensor(batch.facts("clean", group).targets)[..., None]
    wanted = -logits.log_softmax(-1).gather(-1, targets)[..., 0].mean(-1)
    found = measure(model, task, {"zero": ZeroAblate(Head(0, 0))}, [loss])["loss"].values[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_layers_that_neither_headwise_nor_the_model_computes_are_refused(kind):
    module = random(kind)
    module.config.layer_types = [FULL, "chunked_attention"]
    with pytest.raises(ModelError, match=r"ForCausalLM: it has 'chunked_attention' in layer 1 \(layer_types\), and"):
        hw.load(module)


def test_layers_that_only_the_model_computes_are_called():
    module = random("Llama")
    module.config.layer_types = [FULL, "chunked_attention"]
    assert repr(hw.load(module)).endswith("blocks are called: it has 'chunked_attention' in layer 1 (layer_types)>")


def test_a_window_without_a_size_is_refused():
    module = random("Qwen3")
    module.config.layer_types = [FULL, SLIDING]
    with pytest.raises(
        ModelError, match="layer 1 of a qwen3 model has 'sliding_attention', and its configuration does"
    ):
        hw.load(module)


LARGE = {"sliding_window": 600, "use_sliding_window": True, "max_window_layers": 1, **LONG}


WIDE = {"sliding_window": 600, **LONG}


@pytest.mark.parametrize(
    ("kind", "config", "stated", "message"),
    [
        ("Llama", WIDE, (600, 600), "layer 0 of the table has a window of 600, where the model has no window"),
        ("Mistral", WIDE, (), "layer 0 of the table has no window, where the model has a window of 600"),
        ("Mistral", WIDE, (None, 600), "layer 0 of the table has no window, where the model has a window of 600"),
        ("Starcoder2", {"sliding_window": 9}, (), "has no window, where the model has a window of 9"),
        ("Qwen2", LARGE, (600, 600), "layer 0 of the table has a window of 600, where the model has no window"),
        ("Qwen3", LARGE, (None, None), "layer 1 of the table has no window, where the model has a window of 600"),
        ("Qwen3", LARGE, (None, 601), "layer 1 of the table has a window of 601, where the model has a window of 600"),
    ],
)
def test_a_window_of_any_size_that_is_not_what_the_table_says_is_found(kind, config, stated, message, monkeypatch):
    module = random(kind, **config)
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    kind_of = module.config.model_type
    like = family.FAMILIES.get(kind_of, dataclasses.replace(LLAMA, name=kind_of, model_types=(kind_of,)))
    sizes = {"sizes": lambda config: standard_sizes(config) | {"windows": stated, "gated": kind != "Starcoder2"}}
    family.register(dataclasses.replace(like, centred=kind == "Starcoder2", **sizes))
    failed = selfcheck.failures(hw.load(module))
    assert any(message in one for one in failed), failed


@pytest.mark.parametrize(
    ("kind", "config"),
    [("Mistral", {"sliding_window": 600}), ("Qwen2", LARGE), ("Llama", {"sliding_window": 600})],
)
def test_large_windows_that_are_right_are_no_failure_and_take_no_pass(kind, config, monkeypatch):
    model = hw.load(random(kind, **{**LONG, **config}))
    lengths = []
    usual = selfcheck._planned_and_own
    monkeypatch.setattr(
        selfcheck, "_planned_and_own", lambda *given: lengths.append(given[1].shape[1]) or usual(*given)
    )
    assert selfcheck.failures(model) == []
    assert lengths == [selfcheck.LENGTH]


def test_a_window_that_hides_nothing_is_none():
    module = random("Mistral", sliding_window=4096)
    assert selfcheck.failures(hw.load(module)) == []
    assert windows.unlike(module, "model.layers", "self_attn", (), 24) == []
    assert windows.unlike(module, "model.layers", "self_attn", (), 5000) != []


def test_standard_sizes_know_no_windows():
    config = random("Mistral", sliding_window=5).config
    assert "windows" not in standard_sizes(config)
    assert windows_everywhere(config) == (5, 5)
    assert LLAMA.sizes is standard_sizes
    assert QWEN2.sizes(config)["windows"] == ()
