"""Owns the self-test of `raw_families`: hand values, the model's own attention weights, and reads written back."""

from __future__ import annotations

import math
from operator import attrgetter

import pytest
import torch

from tests.oracles import raw_families, raw_variants
from tests.oracles.raw_families import Place, components, heads_of, read, run, write


@pytest.fixture(params=[*raw_families.MODELS, *raw_variants.MODELS])
def model(request):
    model = raw_families.random_model(request.param).requires_grad_(False)
    return model if request.param == "gpt-oss" else model.double()  # whose experts are float32 at most


FLOAT32 = ("gpt_neo", "gptj", "gemma2", "gpt_oss")
"""Whose attention is float32 always."""


def draw(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (3, 14), generator=generator)


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def placed(component, layer, positions=(9, 12)):
    layer = 0 if "embed" in component else layer
    per_head = component in (*raw_families.QKV, "q_rot", "k_rot", "pattern", "z", "head_out")
    return Place(layer, component, 0 if per_head or component in raw_families.PER_NEURON else None, positions)


def test_what_is_read_can_be_written_back_and_a_write_is_seen(model):
    tokens, last = draw(model), model.config.num_hidden_layers - 1
    clean, usual = model(tokens).logits, model.config._attn_implementation
    for component in components(model):
        for positions in (None, (9, 12)):
            where = placed(component, last, positions)
            old = read(model, tokens, where)
            rounding = 1e-4 if model.config.model_type in FLOAT32 else 1e-9
            close(write(model, tokens, where, old), clean, rounding)
        moved = (write(model, tokens, placed(component, last), 0.3) - clean).abs().amax((0, 2))
        assert moved[:9].max() < rounding, component
        assert moved[[9, 12]].max() > 1e-4, component
        assert model.config._attn_implementation == usual
    assert raw_families.ACTS == []


def test_the_stand_in_for_attention_is_the_models_own(model):
    """The weights that it returns under eager attention."""
    tokens = draw(model)
    heads, _ = heads_of(model)
    for layer, weights in enumerate(raw_families.own_weights(model, tokens)):
        for head in range(heads):
            own = weights[:, head].double()  # though its softmax is float32
            close(read(model, tokens, Place(layer, "pattern", head)).double(), own, 1e-5)


def test_windows_hide_what_is_too_far_back():
    for name, layers, size in (("mistral", (0, 1, 2), 5), ("gpt-neo", (1, 3), 5), ("qwen2", (1, 2), 6)):
        model = raw_families.random_model(name)
        tokens = draw(model)
        for layer in range(model.config.num_hidden_layers):
            pattern = read(model, tokens, Place(layer, "pattern", 1))
            there = torch.arange(14)
            far = there[:, None] - there >= size
            assert (pattern[:, far].max() == 0) == (layer in layers)
            assert pattern[:, ~far & (there[:, None] >= there)].min() > 0


def test_rotation_by_hand():
    """Pairs ``(i, i + half)`` of the first dimensions turn by ``position / 100 ** (2 i / width)``."""
    for name, width in (("pythia", 4), ("llama", 6)):
        model = raw_families.random_model(name).double()
        tokens = draw(model)
        for part, rotated in (("q", "q_rot"), ("k", "k_rot")):
            old, new = (read(model, tokens, Place(0, one, 1 if name == "pythia" else 0)) for one in (part, rotated))
            half = width // 2
            for position in (0, 1, 7):
                for pair in range(half):
                    angle = position / 100 ** (2 * pair / (2 * half))
                    x, y = old[:, position, pair], old[:, position, pair + half]
                    close(new[:, position, pair], x * math.cos(angle) - y * math.sin(angle), 1e-6)
                    close(new[:, position, pair + half], y * math.cos(angle) + x * math.sin(angle), 1e-6)
            close(new[:, :, 2 * half :], old[:, :, 2 * half :])


def test_key_value_heads_are_shared_by_neighbours():
    model = raw_families.random_model("llama")
    tokens = draw(model)
    zs = {head: read(model, tokens, Place(1, "z", head)) for head in range(4)}
    for key_head in range(2):
        seen = {}
        steps = [(Place(1, "v", key_head), torch.zeros_like)]
        run(model, tokens, [*steps, *(raw_families._reader(seen, Place(1, "z", head)) for head in range(4))])
        for head in range(4):
            zero = float(seen[str(Place(1, "z", head))].abs().max()) == 0
            assert zero == (head // 2 == key_head)
            assert zero or torch.equal(seen[str(Place(1, "z", head))], zs[head])


def test_neurons_by_hand(model):
    """The last matrix makes the output of the MLP from what is read before it, and that is of what is read before."""
    if model.config.model_type == "gpt_oss":
        pytest.skip("an MLP of experts")
    tokens, own = draw(model), raw_families.anatomy(model)
    normed, pre, post, out = (read(model, tokens, Place(0, f"mlp_{one}")) for one in ("in", "pre", "post", "out"))
    block, kind = attrgetter(own.blocks)(model)[0], model.config.model_type
    mlp = block.mlp
    if kind == "gptj":
        first, last, made = mlp.fc_in, mlp.fc_out, torch.nn.functional.gelu(pre, approximate="tanh")
    elif kind in ("gpt_neox", "gpt_neo"):
        first, last = (mlp.dense_h_to_4h, mlp.dense_4h_to_h) if kind == "gpt_neox" else (mlp.c_fc, mlp.c_proj)
        made = torch.nn.functional.gelu(pre, approximate="none" if kind == "gpt_neox" else "tanh")
    else:
        first, last = mlp.gate_proj, mlp.down_proj
        made = torch.nn.functional.gelu(pre, approximate="tanh") if "gemma" in kind else pre * pre.sigmoid()
        made = made * mlp.up_proj(normed)
    close(pre, first(normed))
    close(post, made)
    close(out, getattr(block, own.mlp_out)(last(post)) if own.mlp_out else last(post))
    close(read(model, tokens, Place(0, "mlp_post", 3)), post[:, :, 3])


def test_parallel_blocks_read_the_same_stream():
    model = raw_families.random_model("pythia").double()
    tokens = draw(model)
    stream, attention, mlp, end = (
        read(model, tokens, Place(1, one)) for one in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    )
    close(end, stream + attention + mlp)
    seen = {}
    run(model, tokens, [(Place(1, "attn_out"), torch.zeros_like), raw_families._reader(seen, Place(1, "mlp_out"))])
    close(seen[str(Place(1, "mlp_out"))], mlp, 0)
    assert "resid_mid" not in components(model)
