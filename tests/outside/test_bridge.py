"""Agreement with TransformerLens' bridge, over the same random models, and the table that tells of it.

With ``HEADWISE_PARITY=README.md`` the largest differences of each family are written into that file.
"""

import functools
import importlib.metadata
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.interventions import Head, Layer, Neuron, Patch, Site, ZeroAblate
from headwise.metrics import loss
from headwise.metrics.outputs import logit_diff
from headwise.studies import RepeatedTokens, capture, measure
from tests.oracles import raw_families, raw_hooks
from tests.support import parity

pytestmark = pytest.mark.filterwarnings("ignore")  # those of TransformerLens are not ours
TASK = RepeatedTokens(n=3, length=6, seed=3)
CALLED = {
    "gpt2": "gpt2",
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


DIFFERENCES: dict[str, dict[str, float]] = {}
"""What is apart how far, by family; see `tests.support.parity`."""


@pytest.fixture(scope="module", autouse=True)
def _table(request):
    """Write the table where that is asked for, all families were compared, and nothing failed."""
    failed = request.session.testsfailed
    yield
    path = os.environ.get("HEADWISE_PARITY")
    if path and request.session.testsfailed == failed and set(DIFFERENCES) == set(CALLED):
        names = ("transformer-lens", "torch", "transformers")
        parity.write(Path(path), DIFFERENCES, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


@pytest.fixture
def agree(request):
    """Compares two arrays, and keeps how far they are apart under the name of what they are."""
    family = request.node.callspec.params["pair"]

    def compared(what, found, wanted, where="", atol=1e-5):
        found, wanted = np.asarray(found), np.asarray(wanted)
        np.testing.assert_allclose(found, wanted, atol=atol, rtol=1e-5, err_msg=where)
        apart = float(np.abs(found - wanted).max()) / max(1.0, float(np.abs(wanted).max()))
        known = DIFFERENCES.setdefault(family, {})
        known[what] = max(known.get(what, 0.0), apart)

    return compared


@pytest.fixture(scope="module", params=CALLED)
def pair(request):
    """A model, and the bridge over its twin."""
    lens = pytest.importorskip("transformer_lens.model_bridge", reason="transformer_lens is not installed")
    gpt2 = functools.partial(raw_hooks.random_gpt2, layers=2, heads=4, d_head=8, vocab=60, context=40)
    make = gpt2 if request.param == "gpt2" else functools.partial(raw_families.random_model, request.param)
    module, twin = make(), make()
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


def test_activations_agree(pair, agree):
    model, bridge = pair
    cache = cache_of(model, bridge, "clean")
    to_compare = set(HOOKS) if model.shape.rotary else set(HOOKS) - {"q_rot", "k_rot"}
    for layer in model.layers:
        for component in to_compare:
            name = f"blocks.{layer}.{HOOKS[component]}"
            assert name in cache, f"nothing to compare {component} with"
            found = capture(model, TASK, Layer(layer).site(component))[f"L{layer}_{component}"].values
            wanted = cache[name].reshape(found.shape).numpy()
            what = "neurons" if component in ("mlp_pre", "mlp_post") else "activations"
            agree(what, found, wanted, name, atol=3e-5)


def test_which_families_turn_queries_and_keys(pair):
    model, _ = pair
    assert model.shape.rotary == (model.family.name not in ("gpt2", "gpt_neo"))


def hook_of(edit, other):
    """The name of the bridge's hook, and what puts in zeros, or the values that the `other` run has there."""
    site: Site = edit.site
    name = f"blocks.{site.layer}.{HOOKS[str(site.component)]}"
    source = other[name] if isinstance(edit, Patch) else None
    where = (slice(None), slice(None) if site.positions is None else list(site.positions))
    where = where if site.part is None else (*where, site.part)

    def put(value, hook):
        value[where] = 0 if source is None else source[where]
        return value

    return name, put


def test_interventions_agree(pair, agree):
    model, bridge = pair
    last = model.shape.layers - 1
    batch = TASK.draw(model)
    (group,) = batch.groups()
    targets = torch.as_tensor(batch.facts("clean", group).targets)[..., None]
    other = cache_of(model, bridge, "corrupted")

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
        with torch.no_grad():
            logits = bridge.run_with_hooks(tokens_of(model, "clean"), fwd_hooks=[hook_of(edit, other)])
        there = logits[:, list(group.scored)].log_softmax(-1).gather(-1, targets)[..., 0]
        agree("interventions", found[row], -there.mean(-1).numpy(), str(edit))


def test_captures_under_interventions_agree(pair, agree):
    model, bridge = pair
    last = model.shape.layers - 1
    other = cache_of(model, bridge, "corrupted")
    what = {
        "clean": None,
        "head": ZeroAblate(Head(0, 1)),
        "mlp": Patch(Layer(0).mlp_out),
        "neuron": ZeroAblate(Neuron(0, 3)),
        "keys": Patch(Head(0, model.kv_heads[-1]).k),
    }
    components = ("pattern", "z", "mlp_post", "resid_post")
    found = capture(model, TASK, [Layer(last).site(component) for component in components], what=what)
    for condition, edit in what.items():
        hooks = [] if edit is None else [hook_of(edit, other)]
        with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
            _, cache = bridge.run_with_cache(tokens_of(model, "clean"))
        for component in components:
            there = found[f"L{last}_{component}"].sel(condition=condition).values
            wanted = cache[f"blocks.{last}.{HOOKS[component]}"].reshape(there.shape).numpy()
            agree("captures under interventions", there, wanted, f"{condition} {component}", atol=3e-5)


def likeliest(logits, top):
    """Ids, logits and probabilities of the likeliest tokens."""
    found = logits.topk(top)
    return found.indices.numpy(), found.values.numpy(), logits.softmax(-1).gather(-1, found.indices).numpy()


def test_logits_agree(pair, agree):
    model, bridge = pair
    with torch.no_grad():
        logits = bridge(tokens_of(model, "clean"))
    top = model.shape.vocabulary
    ds = hw.predict(model, TASK, top=min(top, 100), positions="all")
    ids, values, probs = likeliest(logits, ds.sizes["rank"])
    np.testing.assert_array_equal(ds["token_id"], ids)
    agree("logits", ds["logit"], values)
    agree("logits", ds["prob"], probs)


def test_the_logit_lens_agrees(pair, agree):
    model, bridge = pair
    cache, top = cache_of(model, bridge, "clean"), 5
    ds = hw.logit_lens(model, TASK, top=top, positions="all")
    for layer in (-1, *model.layers):
        name = "blocks.0.hook_resid_pre" if layer < 0 else f"blocks.{layer}.hook_resid_post"
        with torch.no_grad():
            logits = bridge.unembed(bridge.ln_final(cache[name]))
        _, values, probs = likeliest(logits, top)
        there = ds.sel(layer=layer)
        own = logits.gather(-1, torch.as_tensor(there["token_id"].values))  # ranks of equal logits may differ
        agree("logit lens", there["logit"], values, name)
        agree("logit lens", there["logit"], own.numpy(), name)
        agree("logit lens", there["prob_of_token"], probs, name)


def test_direct_logit_attribution_agrees(pair, agree):
    model, bridge = pair
    cache, batch = cache_of(model, bridge, "clean"), TASK.draw(model)
    (group,) = batch.groups()
    scored = list(group.scored)
    facts = batch.facts("clean", group)
    targets, others = torch.as_tensor(facts.targets), torch.as_tensor(logit_diff.prepare(facts)["distractors"])
    ds = hw.direct_logit_attribution(model, TASK, per_position=True).isel(position=scored)
    norm = bridge.ln_final.original_component
    gain = norm.weight.detach() + (model.family.name == "gemma")
    last = cache[f"blocks.{model.layers[-1]}.hook_resid_post"][:, scored]
    centred = isinstance(norm, torch.nn.LayerNorm)
    unembed = bridge.unembed.W_U.detach()
    towards = (unembed.T[targets] - unembed.T[others]) * gain
    scale = (last - last.mean(-1, keepdim=True) * centred).pow(2).mean(-1, keepdim=True)
    scale = (scale + getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))).sqrt()

    def share(vector):
        vector = vector - vector.mean(-1, keepdim=True) * centred
        return (vector / scale * towards).sum(-1).numpy()

    for layer in model.layers:
        z = cache[f"blocks.{layer}.attn.hook_z"][:, scored]
        z = z.reshape(*z.shape[:2], model.shape.heads, -1)
        into = bridge.blocks[layer].attn.W_O.detach()
        for head in model.heads:
            found = ds["attribution"].sel(source=f"L{layer}H{head}")
            agree("attribution of heads", found, share(z[:, :, head] @ into[head]), f"L{layer}H{head}")
        mlp = share(cache[f"blocks.{layer}.hook_mlp_out"][:, scored])
        agree("attribution of MLPs", ds["attribution"].sel(source=f"L{layer}.mlp"), mlp, f"L{layer}.mlp")
    with torch.no_grad():
        logits = bridge(tokens_of(model, "clean"))[:, scored]
    both = [logits.gather(-1, one[..., None])[..., 0] for one in (targets, others)]
    agree("attribution of heads", ds["whole"], (both[0] - both[1]).numpy(), "whole")


def test_scores_of_circuits_agree(pair, agree):
    """From TransformerLens' weights, as they are, by its factored matrices."""
    from transformer_lens import FactoredMatrix

    model, bridge = pair
    ds = hw.circuit_scores(model, folded=False)
    embed, unembed = bridge.embed.W_E.detach().double(), bridge.unembed.W_U.detach().double()
    repeats = model.shape.heads // model.shape.kv_heads
    for layer in model.layers:
        attention = bridge.blocks[layer].attn
        q, k, v, o = (getattr(attention, f"W_{name}").detach().double() for name in "QKVO")
        k, v = (one if len(one) == len(q) else one.repeat_interleave(repeats, 0) for one in (k, v))
        for head in model.heads:
            ov = FactoredMatrix(embed @ v[head], o[head] @ unembed).eigenvalues
            qk = FactoredMatrix(embed @ q[head], (embed @ k[head]).T).eigenvalues
            there = ds.sel(layer=layer, head=head)
            agree("OV and QK scores", there["copying"], (ov.real > 0).double().mean(), f"L{layer}H{head}")
            for circuit, found in (("ov", ov), ("qk", qk)):
                wanted = (found.sum() / found.abs().sum()).real
                agree("OV and QK scores", there["eigenvalue_score"].sel(circuit=circuit), wanted, f"L{layer}H{head}")
