"""Agreement with TransformerLens' bridge, over the same random models: activations, patterns and interventions."""

import functools

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.interventions import Head, Layer, Neuron, Patch, Site, ZeroAblate
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, capture, measure
from tests.oracles import raw_families

pytestmark = pytest.mark.filterwarnings("ignore")  # those of TransformerLens are not ours
TASK = RepeatedTokens(n=3, length=6, seed=3)
CALLED = {
    "pythia": "EleutherAI/pythia-70m",
    "neox, one after the other": "EleutherAI/pythia-70m",
    "llama": "meta-llama/Llama-2-7b-hf",
    "llama 3": "meta-llama/Llama-2-7b-hf",
    "gpt-neo": "EleutherAI/gpt-neo-125M",
    "qwen2": "Qwen/Qwen2-0.5B",
    "qwen3": "Qwen/Qwen3-0.6B",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "gemma": "google/gemma-2b",
}
"""Which model of the same family the bridge is told it has; nothing of it is looked up."""
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn_in": "ln1.hook_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "q_rot": "attn.hook_rot_q",
    "k_rot": "attn.hook_rot_k",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_pre": "mlp.hook_pre",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


@pytest.fixture(scope="module", params=CALLED)
def pair(request):
    """A model, and the bridge over its twin."""
    lens = pytest.importorskip("transformer_lens.model_bridge", reason="transformer_lens is not installed")
    module, twin = (raw_families.random_model(request.param) for _ in range(2))
    twin.set_attn_implementation("eager")
    model = hw.load(module)
    bridge = lens.TransformerBridge.boot_transformers(
        CALLED[request.param], hf_model=twin, tokenizer=model.tokenizer, device="cpu"
    )
    bridge.eval()
    return model, bridge


def tokens_of(model, run):
    return torch.as_tensor(TASK.draw(model).runs[run])


def cache_of(model, bridge, run):
    """What the bridge computes; with what turning gives in GPT-NeoX, where it has no hooks behind it."""
    turned = {}

    def seen(layer, turn):
        def turn_and_keep(*given):
            both = turn(*given)
            for side, value in zip("qk", both, strict=True):
                turned[f"blocks.{layer}.attn.hook_rot_{side}"] = value.transpose(1, 2)
            return both

        return turn_and_keep

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if model.family.name == "gpt_neox":
            for layer in model.layers:
                attention = bridge.blocks[layer].attn
                patch.setattr(attention, "_apply_rotary_pos_emb", seen(layer, attention._apply_rotary_pos_emb))
        _, cache = bridge.run_with_cache(tokens_of(model, run))
    return {**cache, **turned}


def test_activations_agree(pair):
    model, bridge = pair
    cache = cache_of(model, bridge, "clean")
    to_compare = set(HOOKS) if model.shape.rotary else set(HOOKS) - {"q_rot", "k_rot"}
    for layer in model.layers:
        for component in to_compare:
            name = f"blocks.{layer}.{HOOKS[component]}"
            assert name in cache, f"nothing to compare {component} with"
            found = capture(model, TASK, Layer(layer).site(component))[f"L{layer}_{component}"].values
            wanted = cache[name].reshape(found.shape).numpy()
            np.testing.assert_allclose(found, wanted, atol=3e-5, rtol=1e-5, err_msg=name)


def test_which_families_turn_queries_and_keys(pair):
    model, _ = pair
    assert model.shape.rotary == (model.family.name != "gpt_neo")


def test_interventions_agree(pair):
    model, bridge = pair
    last = model.shape.layers - 1
    batch = TASK.draw(model)
    (group,) = batch.groups()
    targets = torch.as_tensor(batch.facts("clean", group).targets)[..., None]
    other = cache_of(model, bridge, "corrupted")

    def put(value, hook, site, source):
        where = (slice(None), slice(None) if site.positions is None else list(site.positions))
        where = where if site.part is None else (*where, site.part)
        value[where] = 0 if source is None else source[where]
        return value

    shared = model.kv_heads[-1]
    several = [
        ZeroAblate(Head(0, 1)),
        ZeroAblate(Head(last, 0)),
        ZeroAblate(Layer(0).mlp_out),
        Patch(Head(0, 1).q),
        Patch(Head(last, shared).k),
        Patch(Head(0, shared).v),
        Patch(Layer(last).resid_pre.at([2, 9])),
        Patch(Layer(0).attn_out),
        ZeroAblate(Neuron(0, 3)),
        Patch(Neuron(last, 2).mlp_pre.at([2, 9])),
        ZeroAblate(Layer(0).mlp_in),
        Patch(Layer(last).attn_in),
    ]
    if model.shape.rotary and model.family.name != "gpt_neox":  # which has no hooks to put them in by
        several += [Patch(Head(0, 1).q_rot), Patch(Head(last, shared).k_rot)]
    found = measure(model, TASK, {str(one): one for one in several}, [loss])["loss"].values
    for row, edit in enumerate(several):
        site: Site = edit.site
        name = f"blocks.{site.layer}.{HOOKS[str(site.component)]}"
        source = other[name] if isinstance(edit, Patch) else None
        with torch.no_grad():
            hook = functools.partial(put, site=site, source=source)
            logits = bridge.run_with_hooks(tokens_of(model, "clean"), fwd_hooks=[(name, hook)])
        there = logits[:, list(group.scored)].log_softmax(-1).gather(-1, targets)[..., 0]
        np.testing.assert_allclose(found[row], -there.mean(-1).numpy(), atol=1e-5, rtol=1e-5, err_msg=str(edit))
