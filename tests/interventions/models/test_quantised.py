"""Quantised weights and adapters of peft: the modules of a model run as they are, against plain hooks."""

import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import headwise as hw
from headwise.errors import DeclarationError, ModelError
from headwise.interventions import Add, Head, Layer, Patch, ZeroAblate
from headwise.studies import Prompts, capture
from tests.oracles import raw_architectures as raw
from tests.oracles.raw_architectures import Place
from tests.support.saved_models import kept

HEADS, KV_HEADS, POSITIONS = 4, 2, (2, 5)


def bits(**given):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**given)


def torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


KINDS = {
    "8 bits": lambda: bits(load_in_8bit=True, llm_int8_threshold=0.0),
    "4 bits": lambda: bits(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "torchao": torchao,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    plain().save_pretrained(path)
    return path


def plain():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 90}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()


def quantised(folder, kind, packs="never"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = AutoModelForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind](), dtype=torch.float32)
    for one in made.modules():
        if packs and hasattr(one, "support_avx512bf16_for_cpu"):
            one.support_avx512bf16_for_cpu = packs == "always"
    return made


def check(model, module, without=("embed", "head_out", "pattern", "q_rot", "k_rot")):
    """Reads, and writes of three kinds at every component of both layers, against hooks on the module."""
    tokens = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:24].reshape(3, 8)
    corrupted = tokens.roll(1, 0).flip(1)
    task, vector = Prompts(tokens.tolist(), corrupted=corrupted.tolist()), torch.linspace(-1, 1, 128)
    what, wanted = {}, {}
    for component, layer in [(one, layer) for one in model.sites for layer in (0, 1)]:
        if str(component) not in raw.components(module) or component in without:
            continue
        head = (KV_HEADS if str(component)[0] in "kv" else HEADS) - 1 if component in raw.PER_HEAD else None
        site = (Layer(layer) if head is None else Head(layer, head)).site(component)
        place, name = Place(layer, str(component), head, POSITIONS), f"{component} {layer}"
        there = raw.read(module, corrupted, place)[0]
        what[f"add {name}"] = Add(site.at(POSITIONS), vector[: there.shape[-1]].tolist())
        wanted[f"add {name}"] = (place, lambda old: old + vector[: old.shape[-1]])
        if component not in raw.PER_NEURON:
            what[f"zero {name}"] = ZeroAblate(site.at(POSITIONS))
            wanted[f"zero {name}"] = (place, torch.zeros_like)
            what[f"patch {name}"] = Patch(site.at(POSITIONS), "corrupted")
            wanted[f"patch {name}"] = (place, lambda old, new=there: new)
    assert len(what) > 40
    found = capture(model, task, ["logits"], what=what)["logits"]
    with torch.no_grad():
        clean = module(tokens, use_cache=False).logits
    for name, change in wanted.items():
        logits = raw.run(module, tokens, [change])
        assert (logits - clean).abs().max() > 1e-3, name
        np.testing.assert_allclose(found.sel(condition=name), logits, atol=1e-5 * clean.abs().max(), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_open_from_a_folder_and_blocks_are_called(kind, folder, tmp_path):
    module = kept(quantised(folder, kind), tmp_path)
    model = hw.load(tmp_path, device="cpu")
    assert {"resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out", "mlp_post"} <= {*map(str, model.sites)}
    assert "blocks are called: its weights are quantised" in repr(model)
    check(model, module, ("embed", "mlp_pre", "pattern"))  # the oracle does not see the width of packed weights
    with pytest.raises(ModelError, match=r"head_weights needs blocks that are laid open, .* quantised"):
        model.head_weights(0)
    same, other = hw.load(module), hw.load(plain())
    assert model.weight_hash == same.weight_hash != other.weight_hash


def test_every_part_of_quantised_weights_stands_in_their_hash(folder):
    hashes = {kind: hw.load(quantised(folder, kind)).weight_hash for kind in KINDS}
    assert len({*hashes.values()}) == len(KINDS)
    scales = {
        "8 bits": lambda one: one.weight.SCB if one.state.SCB is None else one.state.SCB,
        "4 bits": lambda one: one.weight.quant_state.absmax,
        "torchao": lambda one: one.weight.scale,
    }
    for kind, scale in scales.items():
        model = hw.load(quantised(folder, kind))
        scale(model.module.model.layers[1].self_attn.v_proj).data[0] *= 1.5
        assert model.weight_hash != hashes[kind], kind


def test_a_result_with_quantised_weights_runs_again(folder, tmp_path):
    kept(quantised(folder, "4 bits"), tmp_path / "model")
    model, task = hw.load(tmp_path / "model", device="cpu"), hw.RepeatedTokens(n=3, length=6, seed=0)
    ds = hw.measure(model, task, ZeroAblate("L1H2"), ["loss"])
    assert "bnb_4bit_quant_type" in ds.attrs["configuration"]
    hw.write_netcdf(ds, tmp_path / "a.nc")
    assert hw.rerun(tmp_path / "a.nc", yes=True).agrees


def test_4_bits_that_the_first_pass_packs_are_refused_in_memory_and_read_from_a_folder(folder, tmp_path):
    module = quantised(folder, "4 bits", packs="always")
    with pytest.raises(ModelError, match=r"packs its 4-bit weights in its first pass .* save it to a folder before"):
        hw.load(module)
    kept(module, tmp_path)
    model, task = hw.load(tmp_path, device="cpu"), hw.RepeatedTokens(n=3, length=6, seed=0)
    before = model.weight_hash
    first = hw.measure(model, task, None, ["loss"])["loss"].values
    assert model.weight_hash == before
    np.testing.assert_array_equal(hw.measure(model, task, None, ["loss"])["loss"].values, first)


def test_8_bits_by_which_prompts_depend_on_each_other_are_refused(folder):
    pytest.importorskip("bitsandbytes")
    module = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ModelError, match=r"llm_int8_threshold=6 .* each prompt depends .* llm_int8_threshold=0.0"):
        hw.load(module)


def adapted(**more):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    names = ["q_proj", "o_proj", "down_proj"]
    return peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, **more))


def test_a_model_of_peft_opens_with_its_adapter():
    wrapped = adapted().eval()
    model = hw.load(wrapped)
    check(model, wrapped.get_base_model())
    tokens = torch.arange(8)[None]
    with wrapped.disable_adapter(), torch.no_grad():
        without = wrapped(tokens).logits
    found = capture(model, Prompts(tokens.tolist()), ["logits"])["logits"].values
    with torch.no_grad():
        np.testing.assert_allclose(found, wrapped(tokens).logits, atol=1e-4)
    assert np.abs(found - without.numpy()).max() > 0.1
    torch.manual_seed(0)
    assert model.weight_hash != hw.load(plain()).weight_hash


def test_what_is_put_in_front_of_prompts_is_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(plain(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(DeclarationError, match="in front of prompts: headwise runs adapters that sit in modules"):
        hw.load(wrapped)
