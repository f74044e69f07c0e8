"""`raw_edges` itself: transformers' own logits, hooks on single receivers, `raw_paths`, limits, and a trial."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import headwise as hw
from headwise.interventions.models.locate import SHIPPED
from tests.oracles import raw_edges, raw_paths
from tests.oracles.raw_families import random_model
from tests.oracles.raw_hooks import random_gpt2
from tests.oracles.raw_paths import Place

MODELS = {
    "gpt-2": lambda: random_gpt2(layers=2, heads=3, d_head=4, vocab=20, context=12),
    "grouped": lambda: random_model("llama", num_hidden_layers=2),
    "parallel": lambda: random_model("pythia", num_hidden_layers=2),
    "one after the other": lambda: random_model("neox, one after the other"),
}


def drawn(model: Any, seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.tensor(random.integers(0, model.config.vocab_size, (3, 7)))


def score(logits: Tensor) -> Tensor:
    return (logits[:, 3:, 1] - logits[:, 3:, 2] ** 2 / 10).mean(1)


def tolerance(model: Any) -> float:
    """How near transformers comes: it rounds Llama's norms to float32."""
    return 1e-5 if model.config.model_type == "llama" else 1e-9


def close(one: Any, other: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=MODELS)
def module(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().double()


@pytest.fixture
def gpt2() -> Any:
    return MODELS["gpt-2"]().double()


@torch.no_grad()
def hooked(model: Any, tokens: Tensor, receiver: str, moved: Tensor) -> Tensor:
    """Transformers' own logits where one receiver reads its stream plus `moved`, and nothing else does."""
    parts = raw_edges.Parts(model)
    if receiver == "logits":
        norm = next(
            module for name, module in parts.body.named_children() if name in ("ln_f", "final_layer_norm", "norm")
        )
        handles = [norm.register_forward_pre_hook(lambda _module, args: (args[0] + moved,))]
    elif receiver.startswith("m"):
        block = parts.blocks[int(receiver[1:])]
        norm = block.ln_2 if parts.gpt2 else block.post_attention_layernorm
        handles = [norm.register_forward_pre_hook(lambda _module, args: (args[0] + moved,))]
    else:
        layer, head, which = int(receiver[1:].split(".")[0]), int(receiver.split("h")[1].split("<")[0]), receiver[-2]
        block, stream = parts.blocks[layer], []
        norm = block.ln_1 if parts.gpt2 else block.input_layernorm
        handles = [norm.register_forward_pre_hook(lambda _module, args: stream.append(args[0]))]

        def replace(projection: Any, _args: Any, output: Tensor) -> Tensor:
            other = projection.forward(norm.forward(stream[0] + moved))
            if parts.gpt2:
                shape, at = (3, parts.heads, parts.d_head), (..., "qkv".index(which), head, slice(None))
            elif parts.neox:
                shape, at = (parts.heads, 3, parts.d_head), (..., head, "qkv".index(which), slice(None))
            else:
                shape, at = (-1, parts.d_head), (..., head, slice(None))
            whole = output.unflatten(-1, shape).clone()
            whole[at] = other.unflatten(-1, shape)[at]
            return whole.flatten(2)

        attention = block.attn if parts.gpt2 else block.attention if parts.neox else block.self_attn
        name = "c_attn" if parts.gpt2 else "query_key_value" if parts.neox else f"{which}_proj"
        handles.append(getattr(attention, name).register_forward_hook(replace))
    try:
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits
    finally:
        for handle in handles:
            handle.remove()


def test_a_whole_circuit_is_the_clean_run_and_an_empty_one_the_corrupted(module: Any) -> None:
    clean, corrupted = drawn(module), drawn(module, 1)
    close(raw_edges.forward(module, clean).logits, module(clean).logits, tolerance(module))
    other = raw_edges.forward(module, corrupted).sent
    empty = raw_edges.forward(module, clean, raw_edges.kept_only([]), other)
    close(empty.logits, module(corrupted).logits, tolerance(module))
    close(
        raw_edges.measured(module, clean, score, raw_edges.edges(module), other),
        score(module(clean).logits).detach(),
        tolerance(module),
    )


def test_each_edge_changes_one_reader_alone(module: Any) -> None:
    clean, corrupted = drawn(module), drawn(module, 1)
    exact = raw_edges.exact_scores(module, clean, corrupted, score)
    with torch.no_grad():
        here, other = (raw_edges.forward(module, tokens).sent for tokens in (clean, corrupted))
        base = score(module(clean).logits)
    assert list(exact) == raw_edges.edges(module)
    for (sender, receiver), value in exact.items():
        logits = hooked(module, clean, receiver, other[sender] - here[sender])
        close(value, score(logits) - base, tolerance(module))
    assert max(float(value.abs().max()) for value in exact.values()) > 0.01


def test_edges_of_heads_are_direct_paths(gpt2: Any) -> None:
    clean, corrupted = drawn(gpt2), drawn(gpt2, 1)
    exact = raw_edges.exact_scores(gpt2, clean, corrupted, score)
    base = score(gpt2(clean).logits).detach()
    for sender, place in (("a0.h1", Place(0, "z", 1)), ("m0", Place(0, "mlp_out"))):
        for receiver, end in (("a1.h2<q>", "q"), ("a1.h2<k>", "k"), ("a1.h2<v>", "v"), ("logits", "logits")):
            ends = "logits" if end == "logits" else [Place(1, end, 2)]
            logits = raw_paths.path_patch(gpt2, clean, corrupted, place, ends, through_mlps=False)
            close(exact[sender, receiver], score(logits) - base)


def test_edges_by_position_are_kept_where_they_are_kept(gpt2: Any) -> None:
    clean, corrupted = drawn(gpt2), drawn(gpt2, 1)
    with torch.no_grad():
        here, other = (raw_edges.forward(gpt2, tokens).sent for tokens in (clean, corrupted))
    at = (torch.arange(7) < 4)[:, None]

    def keep(sender: str, receiver: str) -> bool | Tensor:
        return at if (sender, receiver) == ("m0", "a1.h2<v>") else True

    moved = torch.where(at, 0.0, other["m0"] - here["m0"])
    close(raw_edges.forward(gpt2, clean, keep, other).logits.detach(), hooked(gpt2, clean, "a1.h2<v>", moved))


def test_eap_is_the_slope_of_the_exact_score(module: Any) -> None:
    clean, corrupted, step = drawn(module), drawn(module, 1), 1e-6
    found = raw_edges.estimated_scores(module, clean, corrupted, score)
    with torch.no_grad():
        here, other = (raw_edges.forward(module, tokens).sent for tokens in (clean, corrupted))
        near = {name: here[name] + step * (other[name] - here[name]) for name in here}
        base = score(raw_edges.forward(module, clean).logits)
        for edge in raw_edges.edges(module)[::3]:
            run = raw_edges.forward(module, clean, lambda *one, edge=edge: one != edge, near)
            close(found[edge], (score(run.logits) - base) / step, 1e-4)


def test_integrated_gradients_are_means_of_slopes(gpt2: Any) -> None:
    clean, corrupted = drawn(gpt2), drawn(gpt2, 1)
    each = [raw_edges.estimated_scores(gpt2, clean, corrupted, score, [share]) for share in (0.25, 0.75)]
    both = raw_edges.estimated_scores(gpt2, clean, corrupted, score, [0.25, 0.75])
    for edge, value in both.items():
        close(value, (each[0][edge] + each[1][edge]) / 2)
    at_clean = raw_edges.estimated_scores(gpt2, clean, corrupted, score, [1.0], at="activations")
    slopes = raw_edges.estimated_scores(gpt2, clean, corrupted, score)
    for (sender, receiver), value in at_clean.items():  # of five runs, m1 does not depend on what it reads in one
        if receiver in ("logits", "m1"):
            close(value, slopes[sender, receiver] * {"logits": 1.0, "m1": 0.8}[receiver])


def linear(model: Any) -> Any:
    """A GPT-2 whose scores are linear: no norms, no activation function, the same attention to every key."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, : 2 * model.config.n_embd] = 0
            block.attn.c_attn.bias[: 2 * model.config.n_embd] = 0
            block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
    model.transformer.ln_f = nn.Identity()
    return model


def test_on_a_linear_model_estimates_are_exact_with_their_sign(gpt2: Any) -> None:
    model = linear(gpt2)
    clean, corrupted = drawn(model), drawn(model, 1)

    def first(logits: Tensor) -> Tensor:
        return logits[:, -1, 1] - logits[:, -1, 2]

    exact = raw_edges.exact_scores(model, clean, corrupted, first)
    for at, shares in (("inputs", [1.0]), ("inputs", [0.1, 0.5, 0.9])):
        found = raw_edges.estimated_scores(model, clean, corrupted, first, shares, at)
        for edge, value in exact.items():
            close(found[edge], value)
    into_logits = sum(value for (_, receiver), value in exact.items() if receiver == "logits")
    close(into_logits, (first(model(corrupted).logits) - first(model(clean).logits)).detach())
    assert float(exact["m1", "logits"].abs().max()) > 0.01


@pytest.mark.heavy
@torch.no_grad()
def test_the_shipped_model_gives_the_figures_of_an_independent_trial(words_model: Any) -> None:
    batch = hw.RepeatedTokens(n=32, length=25, seed=0).draw(words_model)
    model = AutoModelForCausalLM.from_pretrained(str(SHIPPED / "words-2l")).double().eval()
    clean, corrupted = (torch.tensor(batch.runs[run]) for run in ("clean", "corrupted"))
    scored = np.flatnonzero(batch.scored[0])
    targets, distractors = (torch.tensor(ids[:, scored, None]) for ids in (batch.targets, batch.distractors))

    def logit_diff(logits: Tensor) -> Tensor:
        here = logits[:, scored]
        return (here.gather(-1, targets) - here.gather(-1, distractors))[..., 0].mean(1)

    exact = raw_edges.exact_scores(model, clean, corrupted, logit_diff)
    with torch.enable_grad():
        eap = raw_edges.estimated_scores(model, clean, corrupted, logit_diff)
        shares = [(step + 0.5) / 5 for step in range(5)]
        integrated = raw_edges.estimated_scores(model, clean, corrupted, logit_diff, shares)
    means = {name: {edge: float(value.mean()) for edge, value in one.items()}
             for name, one in {"exact": exact, "eap": eap, "eap-ig": integrated}.items()}  # fmt: skip
    largest = raw_edges.top(means["exact"], 3, absolute=True)
    assert largest == [("input", "a0.h3<v>"), ("m1", "logits"), ("a0.h3", "a1.h1<k>")]
    for name, cpr, cmd in (("exact", 0.926, 0.089), ("eap-ig", 0.738, 0.110), ("eap", 0.275, 0.152)):
        curves = [
            raw_edges.faithfulness(model, clean, corrupted, logit_diff, means[name], absolute)
            for absolute in (False, True)
        ]
        assert raw_edges.areas(raw_edges.SHARES, curves[0])[0] == pytest.approx(cpr, abs=0.0005)
        assert raw_edges.areas(raw_edges.SHARES, curves[1])[1] == pytest.approx(cmd, abs=0.0005)
