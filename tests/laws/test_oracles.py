"""Owns the self-test of the oracles: `planted`, `raw_hooks` and `naive` against each other and against hand values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.oracles import naive, planted, raw_hooks
from tests.oracles.planted import HEADS, INDUCTION, LAYERS, LENGTH, PREVIOUS, SELF
from tests.oracles.raw_hooks import Edit, activation, mean_edit, patch_edit, resample_edit, run, zero_edit

torch.set_num_threads(1)

SHAPES: dict[str, dict[str, Any]] = {
    "2x3": {"layers": 2, "heads": 3, "d_head": 4, "vocab": 17, "context": 9, "n_inner": 20, "seed": 1},
    "3x2": {"layers": 3, "heads": 2, "d_head": 8, "vocab": 11, "context": 12, "seed": 2, "scale": 0.2},
    "1x4": {"layers": 1, "heads": 4, "d_head": 2, "vocab": 30, "context": 8, "seed": 3, "scale": 0.4},
}


def close(actual: Any, wanted: Any, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(actual, np.broadcast_to(wanted, np.shape(actual)), rtol=0, atol=atol)


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Any:
    return raw_hooks.random_gpt2(**SHAPES[request.param]).requires_grad_(False)


def draw(model: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (4, model.config.n_positions - 1), generator=generator)


def norm(x: torch.Tensor, layer_norm: Any) -> Any:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + layer_norm.eps).sqrt()
    return centred / scale * layer_norm.weight + layer_norm.bias


def unembed(model: Any, x: torch.Tensor) -> Any:
    return norm(x, model.transformer.ln_f) @ model.lm_head.weight.T


def after_mid(model: Any, mid: torch.Tensor) -> Any:
    """Logits from the last layer's resid_mid, by hand."""
    block = model.transformer.h[-1]
    return unembed(model, mid + block.mlp(norm(mid, block.ln_2)))


def test_random_model_is_far_from_linear_and_leaves_global_state_alone(model: Any) -> None:
    pattern = activation(model, draw(model), "pattern", 0)
    assert (pattern - torch.tensor(naive.uniform(pattern.shape[-1]))).abs().max() > 0.3
    before = torch.random.get_rng_state()
    one, same = (raw_hooks.random_gpt2(layers=1, heads=2, d_head=2, vocab=5, context=4, seed=7) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)


@pytest.mark.parametrize("component", raw_hooks.EDITABLE)
def test_patch_from_the_same_run_changes_nothing(model: Any, component: str) -> None:
    tokens = draw(model)
    clean = run(model, tokens)
    close(clean, model(tokens).logits, 0)
    for layer in range(model.config.n_layer):
        own = activation(model, tokens, component, layer)
        close(run(model, tokens, [patch_edit(own, component, layer)]), clean, 1e-6)
        close(run(model, tokens, [patch_edit(own, component, layer, None, (1, 3))]), clean, 1e-6)


@pytest.mark.parametrize("component", raw_hooks.EDITABLE)
def test_an_edit_is_what_is_read_back_and_nothing_else_moves(model: Any, component: str) -> None:
    tokens, last = draw(model), model.config.n_layer - 1
    head = 1 if component in raw_hooks.PER_HEAD else None
    own = activation(model, tokens, component, last)
    wanted = own.clone()
    for example in range(4):
        for n, position in enumerate((2, 5)):
            wanted[(example, position) if head is None else (example, position, head)] = 2.0 * example + n
    edit = Edit(component, last, head, (2, 5), torch.arange(8.0).reshape(4, 2, 1))
    close(activation(model, tokens, component, last, [edit]), wanted, 0)
    moved = (run(model, tokens, [edit]) - run(model, tokens)).abs().amax(dim=(0, 2))
    assert moved[:2].max() == 0
    assert moved[5] > 1e-3
    close(activation(model, tokens, component, last), own, 0)


def test_forward_pass_rebuilt_from_its_parts(model: Any) -> None:
    tokens, body, d_head = draw(model), model.transformer, model.config.n_embd // model.config.n_head
    future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    for layer, block in enumerate(body.h):
        at = {name: activation(model, tokens, name, layer) for name in raw_hooks.READABLE}
        flat = norm(at["resid_pre"], block.ln_1) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        for h in range(model.config.n_head):
            q, k, v, z = (at[name][:, :, h] for name in "qkvz")
            for part, tensor in enumerate((q, k, v)):
                first = part * model.config.n_embd + h * d_head
                close(tensor, flat[..., first : first + d_head])
            pattern = (q @ k.transpose(1, 2) / math.sqrt(d_head)).masked_fill(future, -math.inf).softmax(-1)
            close(at["pattern"][:, h], pattern)
            close(z, pattern @ v)
        close(at["attn_out"], at["head_out"].sum(2) + block.attn.c_proj.bias)
        close(at["resid_mid"], at["resid_pre"] + at["attn_out"])
        close(at["mlp_out"], block.mlp(norm(at["resid_mid"], block.ln_2)))
        close(at["resid_post"], at["resid_mid"] + at["mlp_out"])
    close(run(model, tokens), unembed(model, at["resid_post"]), 2e-5)


def test_a_zeroed_head_takes_its_head_out_and_resid_mid_sets_the_skip_connection_too(model: Any) -> None:
    tokens, layer = draw(model), model.config.n_layer - 1
    mid, attn_out, head_out = (activation(model, tokens, c, layer) for c in ("resid_mid", "attn_out", "head_out"))
    for head in range(model.config.n_head):
        edit = zero_edit("z", layer, head)
        close(attn_out - activation(model, tokens, "attn_out", layer, [edit]), head_out[:, :, head])
        close(run(model, tokens, [edit]), after_mid(model, mid - head_out[:, :, head]), 2e-5)
    other = mid.flip(0) * 2
    close(run(model, tokens, [Edit("resid_mid", layer, None, None, other)]), after_mid(model, other), 2e-5)


def test_all_heads_and_mlps_zeroed_leave_embeddings_and_biases(model: Any) -> None:
    tokens, body, layers = draw(model), model.transformer, range(model.config.n_layer)
    edits = [zero_edit("z", n, head) for n in layers for head in range(model.config.n_head)]
    edits += [zero_edit("mlp_out", n) for n in layers]
    left = body.wte.weight[tokens] + body.wpe.weight[: tokens.shape[1]]
    close(run(model, tokens, edits), unembed(model, left + sum(block.attn.c_proj.bias for block in body.h)))


def test_references(model: Any) -> None:
    tokens, other, order = draw(model), draw(model, seed=1), [1, 2, 3, 0]
    z = activation(model, other, "z", 0)
    for edit, wanted in (
        (mean_edit(z, "z", 0, 1, (2,)), (z[0, 2, 1] + z[1, 2, 1] + z[2, 2, 1] + z[3, 2, 1]) / 4),
        (mean_edit(z, "z", 0, 1, (2,), over=("example", "position")), z[:, :, 1].mean((0, 1))),
        (resample_edit(z, order, "z", 0, 1, (2,)), torch.stack([z[e, 2, 1] for e in order])),
        (patch_edit(z, "z", 0, 1, (2,)), z[:, 2, 1]),
    ):
        close(activation(model, tokens, "z", 0, [edit])[:, 2, 1], wanted, 1e-6)
    start = activation(model, other, "resid_pre", 0)
    close(run(model, tokens, [patch_edit(start, "resid_pre", 0)]), run(model, other), 1e-6)
    with pytest.raises(ValueError, match="pattern"):
        zero_edit("pattern", 0)


@pytest.mark.parametrize("bos", [False, True])
def test_planted_patterns_and_scores(bos: bool) -> None:
    model, start = planted.planted_model(), int(bos)
    clean, _ = planted.repeated_prompts(6, seed=2, bos=bos)
    patterns = [activation(model, clean, "pattern", layer) for layer in range(LAYERS)]
    for layer, pattern in enumerate(patterns):
        scores = {
            "induction": naive.induction(pattern, LENGTH, start),
            "previous_token": naive.previous_token(pattern),
            "duplicate_token": naive.duplicate_token(pattern, LENGTH, start),
            "first_token": naive.first_token(pattern),
            "self": naive.self_attention(pattern),
        }
        for head in range(HEADS):
            wanted = planted.predicted_pattern(layer, head, bos=bos)
            close(pattern[:, head], wanted, 1e-6)
            for name, value in planted.predicted_scores(layer, head, bos=bos).items():
                close(scores[name][:, head], value, 1e-6)
    close(planted.predicted_pattern(0, 0, bos=bos), naive.uniform(clean.shape[1]), 0)
    assert (patterns[0][:, PREVIOUS[1]].diagonal(-1, 1, 2) == 1).all()
    assert (patterns[0][:, SELF[1]].diagonal(0, 1, 2) == 1).all()
    close(naive.prefix_matching(patterns[1], clean)[:, INDUCTION[1]], 1, 1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_planted_interventions(attention: str) -> None:
    model, queries = planted.planted_model(attention), range(LENGTH, 2 * LENGTH - 1)
    clean, corrupted = planted.repeated_prompts(6, seed=3)
    targets = clean[:, [i + 1 for i in queries]]
    distractors = corrupted[:, [i + 1 - LENGTH for i in queries]]
    good, bad = ({part: activation(model, t, part, 1) for part in "qkv"} for t in (clean, corrupted))
    bad_previous = patch_edit(activation(model, corrupted, "z", 0), "z", *PREVIOUS)
    diff, loss = planted.predicted_logit_diff_clean(), planted.predicted_loss_clean()
    k_noised = [planted.predicted_logit_diff_k_noised(i) for i in queries]
    k_loss = [planted.predicted_loss_k_noised(i) for i in queries]
    v_noised, v_loss = planted.predicted_logit_diff_v_noised(), planted.predicted_loss_v_noised()
    previous_ablated = [planted.predicted_logit_diff_previous_ablated(i) for i in queries]
    base = [planted.predicted_logit_diff_corrupted(i) for i in queries]
    idle = [zero_edit("z", 1, 7), zero_edit("z", 0, 0), zero_edit("z", *SELF), zero_edit("mlp_out", 1)]
    cases: list[tuple[torch.Tensor, list[Edit], Any, Any]] = [
        (clean, [], 20, math.log(1 + 23 * math.exp(-20))),
        (clean, [patch_edit(bad["q"], "q", *INDUCTION)], planted.predicted_logit_diff_q_noised(), loss),
        (clean, [patch_edit(bad["k"], "k", *INDUCTION)], k_noised, k_loss),
        (clean, [bad_previous], k_noised, k_loss),
        (clean, [patch_edit(bad["v"], "v", *INDUCTION)], v_noised, v_loss),
        (clean, [zero_edit("z", *INDUCTION)], planted.predicted_logit_diff_ablated(), planted.predicted_loss_ablated()),
        (clean, [zero_edit("z", *PREVIOUS)], previous_ablated, None),
        (clean, idle[:2] + idle[3:], diff, loss),
        (clean, [*idle, zero_edit("z", *INDUCTION)], 0, math.log(24)),
        (corrupted, [], base, None),
        (corrupted, [patch_edit(good["q"], "q", *INDUCTION)], base, None),
        (corrupted, [patch_edit(good["k"], "k", *INDUCTION)], v_noised, v_loss),
        (corrupted, [patch_edit(good["v"], "v", *INDUCTION)], k_noised, k_loss),
    ]
    for tokens, edits, wanted_diff, wanted_loss in cases:
        logits = run(model, tokens, edits)[:, list(queries)]
        close(naive.logit_diff(logits, targets, distractors), wanted_diff, 2e-5)
        if wanted_loss is not None:
            close(naive.loss(logits, targets), wanted_loss, 2e-5)
    close(naive.accuracy(run(model, clean)[:, list(queries)], targets), 1, 0)


def test_planted_composition_and_loading(tmp_path: Path) -> None:
    model = planted.planted_model()
    for read in (naive.raw, naive.folded):
        later = read(model, *INDUCTION)
        for kind, value in {"q": 0.0, "k": planted.predicted_k_composition(), "v": 0.0}.items():
            assert naive.composition(kind, read(model, *PREVIOUS), later) == pytest.approx(value, abs=1e-7)
            assert naive.composition(kind, read(model, *SELF), later) == pytest.approx(0.0, abs=1e-7)
            assert math.isnan(naive.composition(kind, read(model, 0, 0), later))
    assert planted.predicted_k_composition() == pytest.approx(0.2025479, abs=1e-6)
    model.save_pretrained(tmp_path)
    tokens, _ = planted.repeated_prompts(3)
    close(run(GPT2LMHeadModel.from_pretrained(tmp_path).eval(), tokens), run(model, tokens), 0)


# Four positions, L = 2; rows sum to 1. With a BOS, five positions: only the entries named are not 0.
SMALL = np.array([[1, 0, 0, 0], [0.25, 0.75, 0, 0], [0.5, 0.2, 0.3, 0], [0.1, 0.2, 0.3, 0.4]])[None, None]
WITH_BOS = np.zeros((1, 1, 5, 5))
for _query, _key, _value in ((1, 0, 0.4), (3, 1, 0.2), (3, 2, 0.5), (4, 2, 0.1), (4, 3, 0.7)):
    WITH_BOS[0, 0, _query, _key] = _value


@pytest.mark.parametrize(
    ("score", "value"),
    [
        (naive.induction(SMALL, 2), (0.2 + 0.3) / 2),
        (naive.induction(WITH_BOS, 2, 1), (0.5 + 0.7) / 2),
        (naive.duplicate_token(SMALL, 2), (0.5 + 0.2) / 2),
        (naive.duplicate_token(WITH_BOS, 2, 1), (0.2 + 0.1) / 2),
        (naive.previous_token(SMALL), (0.25 + 0.2 + 0.3) / 3),
        (naive.previous_token(naive.uniform(4)[None, None]), (1 / 2 + 1 / 3 + 1 / 4) / 3),
        (naive.first_token(SMALL), (0.25 + 0.5 + 0.1) / 3),
        (naive.self_attention(SMALL), (1 + 0.75 + 0.3 + 0.4) / 4),
        (naive.induction_stripe(SMALL, 2), (0.25 + 0.2 + 0.3) / 3),
        (naive.induction_bos(WITH_BOS, 2), (0.4 + 0 + 0.5 + 0.7) / 4),
        (naive.prefix_matching(SMALL, [[5, 6, 5, 6]]), (0.2 + 0.3) / 2),
        (naive.prefix_matching(SMALL, [[5, 5, 5, 6]]), (0.75 + (0.2 + 0.3)) / 2),
        (naive.prefix_matching(WITH_BOS, [[9, 1, 2, 1, 2]]), (0.5 + 0.7) / 2),
        (naive.prefix_matching(SMALL, [[1, 2, 3, 4]]), math.nan),
        (naive.mul(SMALL, naive.detection_previous(4)), 0.75 / 4),
        (naive.abs_score(SMALL, naive.detection_previous(4)), 1 - (1 + 2 * (0.75 + 0.8 + 0.7)) / 16 * 4),
        (naive.mul(SMALL, naive.detection_duplicate([5, 6, 5, 6])), (0.5 + 0.2) / 4),
        (naive.mul(SMALL, naive.detection_induction([5, 6, 5, 6])), (0.2 + 0.3) / 4),
        (naive.mul(SMALL, naive.detection_induction([5, 5, 5, 6])), (0.75 + 0.2 + 0.3) / 4),
    ],
)
def test_attention_scores_by_hand(score: Any, value: float) -> None:
    close(score, [[value]], 1e-12)


def test_output_metrics_and_statistics_by_hand() -> None:
    logits = np.log([[[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]]) + 3.0
    two = math.log(2)
    close(naive.loss(logits, [[1, 2]]), [[2 * two, 2 * two]], 1e-12)
    close(naive.prob(logits, [[2, 0]]), [[0.125, 0.25]], 1e-12)
    close(naive.accuracy(np.repeat(logits, 2, 0), [[0, 0], [1, 3]]), [[1, 1], [0, 0]], 0)
    close(naive.rank(logits, [[3, 3]]), [[2, 0]], 0)
    close(naive.logit_diff(logits, [[0, 1]], [[2, 3]]), [[2 * two, 0]], 1e-12)
    close(naive.kl(np.log([[[0.5, 0.5]]]), np.log([[[0.25, 0.75]]])), two / 2 + math.log(2 / 3) / 2, 1e-12)
    assert naive.normalized([1, 3], [4, 6], [1, 1]) == pytest.approx(0.25)
    assert math.isnan(naive.normalized([1], [2, 4], [3]))
    close(naive.benjamini_hochberg([0.01, 0.04, 0.03, 0.5]), [0.04, 0.16 / 3, 0.16 / 3, 0.5], 1e-12)
    close(naive.benjamini_hochberg([0.9, 0.8]), [0.9, 0.9], 1e-12)
    assert [naive.null_p_value(x, [1, 2, 3, 0]) for x in (2, 9)] == pytest.approx([3 / 5, 1 / 5])


def test_composition_by_hand() -> None:
    # d_model 2, d_head 1. M_OV1 = [[1, 2], [0, 0]]; M_QK2 = [[0, 0], [3, 1]]; M_OV2 = [[1, 0], [1, 0]].
    first = {"W_V": np.array([[1.0], [0]]), "W_O": np.array([[1.0, 2]])}
    second = {"W_Q": np.array([[0.0], [1]]), "W_K": np.array([[3.0], [1]])}
    second |= {"W_V": np.array([[1.0], [1]]), "W_O": np.array([[1.0, 0]])}
    # M_OV1 @ M_QK2 = [[6, 2], [0, 0]]; M_OV1 @ M_QK2.T = [[0, 5], [0, 0]]; M_OV1 @ M_OV2 = [[3, 0], [0, 0]].
    wanted = {"q": math.sqrt(40) / math.sqrt(5 * 10), "k": 5 / math.sqrt(5 * 10), "V": 3 / math.sqrt(5 * 2)}
    assert {kind: naive.composition(kind, first, second) for kind in wanted} == pytest.approx(wanted)


def test_folded_weights_give_the_models_own_q_k_v_and_z(model: Any) -> None:
    tokens, layer, head = draw(model), model.config.n_layer - 1, 1
    block, weights = model.transformer.h[layer], naive.folded(model, layer, head)
    x = activation(model, tokens, "resid_pre", layer).double().numpy()
    scaled = x / np.sqrt(x.var(-1, keepdims=True) + block.ln_1.eps)  # not centred: the folded weights do that
    offset = (block.ln_1.bias @ block.attn.c_attn.weight + block.attn.c_attn.bias).double().numpy()
    for name, bias in zip("qkv", offset.reshape(3, model.config.n_head, -1)[:, head], strict=True):
        wanted = activation(model, tokens, name, layer)[:, :, head]
        close(scaled @ weights[f"W_{name.upper()}"] + bias, wanted, 1e-4)
    z, out = (activation(model, tokens, name, layer)[:, :, head].numpy() for name in ("z", "head_out"))
    close(z @ weights["W_O"], out - out.mean(-1, keepdims=True), 1e-4)
    close(z @ naive.raw(model, layer, head)["W_O"], out, 1e-4)
