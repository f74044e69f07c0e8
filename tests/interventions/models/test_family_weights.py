"""What the weights of a family say, the whole study of it, and what it lacks or what is refused."""

from itertools import combinations
from operator import attrgetter

import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError, ModelError
from headwise.interventions import (
    Head,
    Knockout,
    Layer,
    ZeroAblate,
)
from headwise.metrics import loss
from headwise.studies import InductionStudy, capture, measure
from headwise.studies.analyses.composition import composition_scores
from tests.oracles import planned_cases as cases
from tests.oracles import raw_families
from tests.support.families import NAMES, TASK


def by_hand(module, layer, head, folded):
    """W_Q, W_K, W_V (d_model, d_head) and W_O (d_head, d_model) of a head, straight from the modules, float64."""
    own, (heads, kv_heads) = raw_families.anatomy(module), raw_families.heads_of(module)
    kind = module.config.model_type
    block = attrgetter(own.blocks)(module)[layer]
    attention = attrgetter(own.attention)(block)
    shared = head // (heads // kv_heads)
    if own.fused:
        rows = attrgetter(own.fused)(block).weight.detach().double().chunk(heads)[head].chunk(3)
    else:
        sides = [getattr(attention, f"{side}_proj").weight.detach().double() for side in "qkv"]
        rows = [sides[0].chunk(heads)[head], *(side.chunk(kv_heads)[shared] for side in sides[1:])]
    q, k, v = (part.T.numpy() for part in rows)
    o = attrgetter(own.out)(block).weight.detach().double().T.chunk(heads)[head].numpy()
    if folded:
        norm = block.ln_1 if hasattr(block, "ln_1") else getattr(block, "input_layernorm", None)
        more = float("gemma" in kind)
        if norm is not None:
            gain = norm.weight.detach().double().numpy() + more
            q, k, v = (gain[:, None] * part for part in (q, k, v))
        if hasattr(norm, "bias"):  # LayerNorm
            q, k, v = (part - part.mean(0) for part in (q, k, v))
            o = o - o.mean(1, keepdims=True)
        if kind in ("qwen3", "gemma3_text"):
            q = q * (attention.q_norm.weight.detach().double().numpy() + more)
            k = k * (attention.k_norm.weight.detach().double().numpy() + more)
        if kind == "olmo2":  # whose norms are of all heads at once
            q = q * attention.q_norm.weight.detach().double().chunk(heads)[head].numpy()
            k = k * attention.k_norm.weight.detach().double().chunk(kv_heads)[shared].numpy()
        if own.attn_out and kind != "gpt_neo":
            o = o * (getattr(block, own.attn_out).weight.detach().double().numpy() + more)
    return q, k, v, o


@pytest.mark.parametrize("variant", ["folded", "raw"])
def test_composition_equals_explicit_products(model, variant):
    scores = composition_scores(model, draws=3)["composition"].sel(variant=variant)
    for earlier, later in combinations(model.layers, 2):
        for sender, receiver in np.ndindex(len(model.heads), len(model.heads)):
            _, _, v, o = by_hand(model.module, earlier, sender, variant == "folded")
            q_2, k_2, v_2, o_2 = by_hand(model.module, later, receiver, variant == "folded")
            ov, qk, ov_2 = v @ o, q_2 @ k_2.T, v_2 @ o_2
            for kind, reader in (("q", qk), ("k", qk.T), ("v", ov_2)):
                wanted = np.linalg.norm(ov @ reader) / np.linalg.norm(ov) / np.linalg.norm(reader)
                found = float(scores.sel(kind=kind).values[earlier, sender, later, receiver])
                assert found == pytest.approx(wanted, rel=1e-5)


OFTEN = ("pythia", "qwen3")
"""Families whose whole study runs in `make test`; those of the others in `make test-heavy`."""


@pytest.mark.parametrize("name", [one if one in OFTEN else pytest.param(one, marks=pytest.mark.heavy) for one in NAMES])
def test_the_whole_study_runs(name, tmp_path):
    model = cases.model(name, "sdpa")
    if len(model.layers) < 2:
        pytest.skip("the study is about heads of two layers")
    tree = InductionStudy(n=3, length=6, draws=2).run(model)
    hw.write_netcdf(tree, tmp_path / "study.nc")
    assert tree["heads"]["induction"].shape == (len(model.layers), len(model.heads), 3)


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("llama", Head(0, 2).k, "L0H2 k: LlamaForCausalLM has key-value heads 0 to 1; heads 2 and 3 read key-value he"),
        ("llama", Head(0, 9).v, "L0H9 v: LlamaForCausalLM has key-value heads 0 to 1"),
        ("llama", Head(0, 4).q, "L0H4 q: LlamaForCausalLM has heads 0 to 3"),
        ("gemma", Head(1, 1).k_rot, "L1H1 k_rot: GemmaForCausalLM has key-value head 0 only; heads 0, 1, 2 and 3 read"),
        ("llama", Layer(0).pos_embed, "has no pos_embed: positions enter where q and k are rotated (q_rot, k_rot)"),
        ("pythia", Layer(0).resid_mid, "has no resid_mid: attention and MLP of a layer both read resid_pre"),
        ("gpt-neo", Head(0, 0).q_rot, "has no q_rot: it has no rotary embedding, and scores are made from q"),
    ],
)
def test_what_a_family_lacks_is_refused_in_words(name, site, message):
    for work in (
        lambda model: measure(model, TASK, ZeroAblate(site), [loss]),
        lambda model: capture(model, TASK, site),
    ):
        with pytest.raises(DeclarationError) as caught:
            work(cases.model(name, "sdpa"))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_head_knows_what_it_reads(model):
    for head in model.heads:
        one = Head(0, head)
        assert model.read_by(one, "q") == one.q
        shared = model.read_by(one, "k").head
        assert shared in model.kv_heads
        assert head in model.shape.readers(shared)


def test_a_model_says_that_its_heads_share_keys():
    assert "llama, 3 layers of 4 heads that share 2 of keys and values, float32" in repr(cases.model("llama", "sdpa"))
    assert "gpt_neox, 3 layers of 3 heads, float32" in repr(cases.model("pythia", "sdpa"))


def test_captured_keys_of_a_layer_are_named_by_key_value_head():
    found = capture(cases.model("llama", "sdpa"), TASK, [Layer(0).k, Layer(0).q, Layer(0).k_rot])
    assert found["L0_k"].dims == found["L0_k_rot"].dims == ("example", "position", "kv_head", "d_head")
    assert found["L0_q"].dims == ("example", "position", "head", "d_head")
    assert (found.sizes["kv_head"], found.sizes["head"]) == (2, 4)


def test_a_knockout_that_leaves_a_window_empty_is_refused():
    mistral = cases.model("mistral", "sdpa")
    with pytest.raises(DeclarationError, match="query 9 is left without any key to attend to; a query needs one of 5 "):
        measure(mistral, TASK, Knockout(Head(0, 1), 9, range(4, 12)), [loss])
    measure(mistral, TASK, Knockout(Head(0, 1), 9, range(6, 12)), [loss])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_logit_softcapping": 50.0}, "it caps its attention scores (attn_logit_softcapping=50.0)"),
        ({"final_logit_softcapping": 30.0}, "it caps its logits (final_logit_softcapping=30.0)"),
        ({"use_bidirectional_attention": True}, "it attends to later tokens too"),
        (
            {"rope_parameters": {"rope_type": "dynamic"}},
            "it turns q and k by angles that depend on the length of the prompt (rope_type='dynamic')",
        ),
    ],
)
def test_attention_that_headwise_does_not_compute_is_called(change, reason):
    module = raw_families.random_model("gemma")
    for key, value in change.items():
        setattr(module.config, key, value)
    model = hw.load(module)
    assert model.shape.called
    assert repr(model).endswith(f"; blocks are called: {reason}>")
    with pytest.raises(ModelError, match="head_weights needs blocks that are laid open, and those of GemmaForCausalLM"):
        model.head_weights(0)


def test_a_saved_model_loads_from_its_folder(model, tmp_path):
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    found = hw.load(tmp_path)
    assert (found.family, found.shape, found.weight_hash) == (model.family, model.shape, model.weight_hash)
    both = (measure(one, TASK, ZeroAblate(Head(0, 1)), [loss])["loss"].values for one in (model, found))
    np.testing.assert_allclose(*both, atol=1e-6)
