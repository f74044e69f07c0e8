"""Families of one's own: the table that is shown to start from, tables that do not fit, and checks that find it."""

import dataclasses

import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ModelError
from headwise.interventions import (
    selfcheck,
)
from headwise.interventions.models import family
from headwise.interventions.models.architectures import standard_sizes, windows_everywhere
from headwise.studies.analyses.composition import composition_scores
from tests.oracles import planned_cases as cases
from tests.oracles import raw_families


@pytest.fixture
def stranger(monkeypatch):
    """A model of a family that nobody knows, built as Llama is."""
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    module = raw_families.random_model("llama")
    module.config.model_type = "stranger"
    return module


def test_the_template_of_an_unknown_family_is_printed_on_request_and_works(stranger):
    assert repr(hw.load(stranger)).endswith("; blocks are called: no table describes stranger models>")
    stranger.config.num_hidden_layers += 1  # now its parts are not found either
    with pytest.raises(
        ModelError,
        match="LlamaForCausalLM: no table describes stranger models, and its parts are not found without one",
    ) as caught:
        hw.load(stranger)
    stranger.config.num_hidden_layers -= 1
    assert "\n" not in str(caught.value)
    shown = str(caught.value).split("print(")[1].split(") shows")[0]
    code = eval(shown, {"hw": hw})
    assert code == hw.Family.template(stranger)
    with pytest.raises(DeclarationError, match="template of 5: give a model of transformers, or its model_type"):
        hw.Family.template(5)
    exec(code, {})
    model = hw.load(stranger)
    assert model.family.name == "stranger"
    assert selfcheck.failures(model) == []


def test_what_is_shown_makes_another_family_work_once_what_differs_is_changed(monkeypatch):
    """Phi: other paths, LayerNorm, an MLP without gate beside attention, and biases."""
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    rope = {**raw_families.ROPE, "partial_rotary_factor": 0.5}
    module = raw_families.random_weights("Phi", raw_families._llama_like(2, 3, 3, rope_parameters=rope))
    code = hw.Family.template(module)
    exec(code, {})
    with pytest.raises(ModelError, match=r"phi has norm at 'model.norm', where PhiForCausalLM has nothing"):
        hw.load(module)
    for old, new in [
        ("'self_attn.o_proj'", "'self_attn.dense'"),
        ("'norm_2': 'post_attention_layernorm'", "'norm_2': 'input_layernorm'"),
        ("'model.norm'", "'model.final_layernorm'"),
        ("centred=False", "centred=True"),
        ('"gated": True', '"gated": False'),
        ('"parallel": False', '"parallel": True'),
    ]:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(code, {})
    model = hw.load(module)
    assert (model.shape.gated, model.shape.parallel, model.shape.windows) == (False, True, ())
    assert selfcheck.failures(model) == []


def test_counts_that_a_configuration_does_not_have_are_named(stranger):
    """Under other names than the usual ones."""
    llama = family.FAMILIES["llama"]
    wrong = {"sizes": lambda config: {"layers": config.n_layer}}
    family.register(dataclasses.replace(llama, name="stranger", model_types=("stranger",), **wrong))
    with pytest.raises(ModelError, match=r"sizes of the family stranger do not fit its configuration: .* 'n_layer'"):
        hw.load(stranger)


def test_every_field_of_a_family_is_in_what_is_shown(stranger):
    shown = hw.Family.template(stranger)
    for field in dataclasses.fields(family.Family):
        assert f"\n    {field.name}=" in shown
    assert "# what scores are multiplied by: 1 / sqrt(d_head)" in shown


PHI = {"out": "self_attn.dense", "norm_2": "input_layernorm", "norm": "model.final_layernorm"}


@pytest.mark.parametrize(
    ("kind", "config", "modules", "facts"),
    [
        (
            "Phi",
            {"rope_parameters": {**raw_families.ROPE, "partial_rotary_factor": 0.5}},
            PHI,
            {"gated": False, "parallel": True},
        ),
        ("Starcoder2", {"num_key_value_heads": 1, "sliding_window": 6}, {}, {"gated": False}),
    ],
)
def test_a_family_of_ones_own(kind, config, modules, facts, monkeypatch):
    """Two that are not known: one norm for attention and MLP side by side; heads that share keys, and a window."""
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    module = raw_families.random_weights(kind, raw_families._llama_like(2, 3, 3, **config))
    llama, name = family.FAMILIES["llama"], module.config.model_type
    table = {
        "centred": True,
        "sizes": lambda config: standard_sizes(config) | facts | {"windows": windows_everywhere(config)},
    }
    family.register(
        dataclasses.replace(llama, name=name, model_types=(name,), modules={**llama.modules, **modules}, **table)
    )
    model = hw.load(module)
    assert selfcheck.failures(model) == []


def test_heads_that_share_keys_in_one_fused_matrix(monkeypatch):
    """Phi-3: q of all heads, then k and v of fewer."""
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    module = raw_families.random_weights("Phi3", raw_families._llama_like(2, 4, 2))
    llama = family.FAMILIES["llama"]
    modules = {name: path for name, path in llama.modules.items() if name not in ("q", "k", "v")}
    table = {"modules": {**modules, "qkv": "self_attn.qkv_proj"}, "layout": "side by side"}
    family.register(dataclasses.replace(llama, name="phi3", model_types=("phi3",), **table))
    model = hw.load(module)
    assert selfcheck.failures(model) == []
    found, block = model.head_weights(1), module.model.layers[1]
    rows = block.self_attn.qkv_proj.weight.detach()
    for matrix, start, heads in ((found.W_Q, 0, 4), (found.W_K, 24, 2), (found.W_V, 36, 2)):
        assert matrix.shape == (heads, 24, 6)
        for head in range(heads):
            torch.testing.assert_close(matrix[head], rows[start + 6 * head : start + 6 * head + 6].T)
    assert composition_scores(model, draws=3)["composition"].shape == (3, 2, 2, 4, 2, 4)


def test_a_norm_without_weight_has_a_gain_of_one(monkeypatch):
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    llama = family.FAMILIES["llama"]
    family.register(dataclasses.replace(llama, name="olmo", model_types=("olmo",), centred=True))
    model = hw.load(raw_families.random_weights("Olmo", raw_families._llama_like(2, 4, 2)))
    assert selfcheck.failures(model) == []
    assert model.head_weights(0).gain.tolist() == [1.0] * 24
    family.register(dataclasses.replace(llama, name="olmo", model_types=("olmo",)))
    failed = selfcheck.failures(hw.load(model.module))
    assert any("gain of norm_1" in one for one in failed), failed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "model.blocks"}, "stranger has blocks at 'model.blocks', where LlamaForCausalLM has nothing"),
        ({"modules": {"q": "self_attn.wq"}}, "stranger has q of a block at 'self_attn.wq', where LlamaForCausalLM has"),
        ({"embeddings": {}}, "the table of stranger lacks embed"),
        ({"layout": "by head"}, "the table of stranger lacks qkv"),
        ({"layout": "apart, by head"}, "possible are 'apart', 'side by side' and 'by head'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(stranger, change, message):
    llama = family.FAMILIES["llama"]
    if "modules" in change:
        change = {"modules": {**llama.modules, **change["modules"]}}

    def attempt():
        family.register(dataclasses.replace(llama, name="stranger", model_types=("stranger",), **change))
        hw.load(stranger)

    with pytest.raises(HeadwiseError) as caught:
        attempt()
    assert message in str(caught.value)
    with pytest.raises(DeclarationError, match="a family is registered as a Family, got 'stranger'"):
        family.register("stranger")


def test_a_window_that_is_not_what_the_table_says_is_found():
    for size, seen in ((5, "identity"), (11, "windows")):
        model = hw.load(raw_families.random_model("mistral", sliding_window=size))
        assert selfcheck.failures(model) == []
        wrong = dataclasses.replace(model.shape, windows=(size + 1,) * 3)
        failed = selfcheck.failures(dataclasses.replace(model, shape=wrong))
        assert any(one.startswith(seen) for one in failed), failed


def test_a_model_that_is_not_what_its_table_says_is_found():
    """Each fact that the tables state, stated wrong."""
    for name, change in {
        "pythia": {"layout": "side by side"},
        "gemma": {"gain_offset": 0.0},
        "llama": {"scaling": lambda config, layer: 1.0},
        "qwen3": {"modules": dict(family.FAMILIES["llama"].modules)},
        "mistral": {"modules": {k: v for k, v in family.FAMILIES["llama"].modules.items() if k != "rotary"}},
    }.items():
        model = cases.model(name, "sdpa")
        wrong = dataclasses.replace(model, family=dataclasses.replace(model.family, **change))
        assert selfcheck.failures(wrong) != [], name


@pytest.mark.parametrize(
    ("name", "change", "norm"),
    [
        ("gemma", {"gain_offset": 0.0}, "norm_1"),
        ("llama", {"gain_offset": 1.0}, "norm_1"),
        ("llama", {"centred": True}, "norm_1"),
        ("pythia", {"centred": False}, "norm_1"),
        ("qwen3", {"gain_offset": 0.5}, "q_norm"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gain_that_is_not_what_the_table_says_is_found(name, change, norm, dtype):
    model = hw.load(raw_families.random_model(name), dtype=dtype)
    wrong = dataclasses.replace(model, family=dataclasses.replace(model.family, **change))
    failed = selfcheck.failures(wrong)
    assert any(one.startswith(f"parts (gain of {norm} of layer 0 is off by") for one in failed), failed
