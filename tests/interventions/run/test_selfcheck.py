"""Self-checks: silent on models that are read right, and each names itself where a model is not what it seems."""

import dataclasses

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import ModelError
from headwise.interventions import Head, ZeroAblate, selfcheck
from headwise.interventions.models import architectures
from headwise.interventions.traced.passes import planned_pass, traces
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, capture, composition_scores, measure
from tests.oracles import raw_hooks

TASK = RepeatedTokens(n=2, length=5)


def module():
    return raw_hooks.random_gpt2(3, 2, 6, 40, 20)


def test_nothing_fails_on_models_that_are_read_right(random_model, planted):
    assert selfcheck.failures(random_model) == []
    assert selfcheck.failures(planted) == []


@pytest.mark.parametrize("context", [1, 2, 3])
def test_nothing_fails_on_a_short_context(context):
    assert selfcheck.failures(hw.load(raw_hooks.random_gpt2(2, 2, 4, 9, context))) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_no_failure(dtype):
    assert selfcheck.failures(hw.load(module(), dtype=dtype)) == []


def test_double_precision_is_no_failure():
    assert selfcheck.failures(hw.load(module().double())) == []


def scaled():
    strange = module()
    for block in strange.transformer.h:
        block.attn.scaling *= 3
    return strange


def test_a_model_that_its_table_does_not_give_is_called():
    model = hw.load(scaled())
    assert repr(model).endswith("; blocks are called: the table of gpt2 gives other logits than the model>")
    assert selfcheck.failures(model) == []
    found = measure(model, TASK, ZeroAblate(Head(0, 1)), [loss])["baseline_loss"]
    batch = TASK.draw(model)
    with torch.no_grad():
        said = scaled()(torch.as_tensor(batch.runs["clean"])).logits.log_softmax(-1)
    losses = -said.gather(-1, torch.as_tensor(batch.targets)[..., None])[..., 0].numpy()
    own = [row[at].mean() for row, at in zip(losses, batch.scored, strict=True)]
    np.testing.assert_allclose(found.sel(run="clean").values, own, atol=1e-5)


def test_scores_scaled_behind_the_configuration_are_found(monkeypatch):
    strange = scaled()
    monkeypatch.setattr(architectures, "TABLES", ())  # whose models would be called
    with pytest.raises(ModelError) as caught:
        measure(hw.load(strange), TASK, ZeroAblate(Head(0, 1)), [loss])
    message = str(caught.value)
    assert message.startswith("self-check of GPT2LMHeadModel failed: identity (a pass that changes nothing moves")
    assert "seen (a write to q of layer 0 moves them elsewhere" in message
    assert "check=False measures all the same" in message


def test_a_block_that_keeps_something_to_itself_is_found():
    strange = module()
    strange.transformer.h[1].register_forward_hook(lambda block, given, made: made * 1.5)
    assert any(one.startswith("identity") for one in selfcheck.failures(hw.load(strange)))


@pytest.mark.parametrize("part", ["project", "combine"])
def test_a_part_that_computes_something_else_is_found(part, monkeypatch):
    usual = getattr(traces, part)
    monkeypatch.setattr(traces, part, lambda *given: 2 * usual(*given))
    assert any(one.startswith(f"parts ({part} of layer 0") for one in selfcheck.failures(hw.load(module())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "by head"}, "self-check of GPT2LMHeadModel failed: parts (project of layer 0 is off by"),
        ({"scaling": lambda config, layer: 2.0}, "self-check of GPT2LMHeadModel failed: identity (a pass that"),
        ({"transposed": False}, "self-check of GPT2LMHeadModel ended early: "),
        ({"embeddings": {"embed": "transformer.wte"}}, "parts (embeddings of layer 0 is off by"),
    ],
)
def test_a_table_that_does_not_fit_is_found(change, message):
    model = hw.load(module())
    wrong = dataclasses.replace(model, family=dataclasses.replace(model.family, **change))
    with pytest.raises(ModelError) as caught:
        measure(wrong, TASK, ZeroAblate(Head(0, 1)), [loss])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "work",
    [lambda model, **more: capture(model, TASK, Head(0, 1).pattern, **more), composition_scores],
    ids=["capture", "composition"],
)
def test_what_is_read_is_checked_too(work, monkeypatch):
    model = hw.load(module())
    wrong = dataclasses.replace(model, family=dataclasses.replace(model.family, scaling=lambda config, layer: 2.0))
    with pytest.raises(ModelError, match=r"self-check of GPT2LMHeadModel failed: identity .* check=False measures all"):
        work(wrong)
    work(wrong, check=False)
    calls = []
    monkeypatch.setattr(selfcheck, "failures", lambda model: calls.append(model) or [])
    for _ in range(2):
        work(model)
    assert calls == [model]


def test_writes_between_attention_and_mlp_and_to_embeddings_are_compared_too(monkeypatch):
    model, usual = hw.load(module()), planned_pass.apply_writes
    for point, names in (("mid", ["resid_mid"]), ("stream", ["resid_pre", "embed", "pos_embed"])):

        def without(value, site, *more, lost=point):
            return value if site[1] == lost else usual(value, site, *more)

        monkeypatch.setattr(planned_pass, "apply_writes", without)
        failed = selfcheck.failures(model)
        for name in names:
            assert any(one.startswith(f"seen (a write to {name} of layer 0 moves") for one in failed), failed


def test_a_write_that_moves_nothing_is_found():
    strange = module()
    for block in strange.transformer.h:
        block.register_forward_hook(lambda block, given, made: given[0])
    failed = selfcheck.failures(hw.load(strange))
    assert "moved (no write to mlp_out moves the logits)" in failed
    assert "moved (no write to attn_out moves the logits)" in failed


def test_a_model_is_checked_once_before_anything_is_measured(monkeypatch):
    calls = []
    monkeypatch.setattr(selfcheck, "failures", lambda model: calls.append(model) or [])
    model = hw.load(module())
    measure(model, TASK, ZeroAblate(Head(0, 1)), [loss], check=False)
    assert calls == []
    for what in (None, ZeroAblate(Head(0, 1)), None):
        measure(model, TASK, what, [loss])
    assert calls == [model]
