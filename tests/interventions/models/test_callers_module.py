"""The caller's module is as it was after a call: its modes, its weights, its hooks."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import headwise as hw
from headwise.errors import DeclarationError, ModelError
from headwise.interventions import Head, Scale
from headwise.metrics import induction, loss
from headwise.studies import capture, measure
from tests.support.changed_models import TASK, WHAT, adapted, deep, gpt2, losses, of_configuration, uneven


def with_dropout():
    module, weights = gpt2(resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    module.load_state_dict(weights)
    return module


def modes(module):
    return {name: one.training for name, one in module.named_modules()}


CALLS = {
    "measure": lambda model: measure(model, TASK, {"nothing": Scale(Head(0, 0), 1.0)}, [loss])["loss"],
    "capture": lambda model: capture(model, TASK, Head(1, 1))["L1H1_z"],
    "scores": lambda model: measure(model, TASK, None, [induction])["baseline_induction"],
    "estimate": lambda model: measure(model, TASK, WHAT, [loss], estimator="gradient")["loss"],
}


@pytest.mark.parametrize("name", CALLS)
def test_training_mode_changes_no_number_and_is_given_back(name):
    wanted = CALLS[name](hw.load(with_dropout().eval()))
    module = with_dropout().eval()
    model = hw.load(module)
    module.train()
    module.transformer.h[1].attn.eval()
    before = modes(module)
    for _ in range(3):
        np.testing.assert_allclose(CALLS[name](model), wanted, atol=1e-6)
        assert modes(module) == before
    with pytest.raises(hw.errors.HeadwiseError):
        capture(model, TASK, Head(7, 7))
    assert modes(module) == before


def test_weights_of_heads_are_those_in_evaluation_mode():
    wrapped = adapted(deep(), ["transformer.h.1.attn.c_attn"], lora_dropout=0.4)
    model = hw.load(wrapped.get_base_model())
    merged = hw.load(copy.deepcopy(wrapped).merge_and_unload())
    model.module.train()
    for mine, theirs in zip(model.head_weights(1), merged.head_weights(1), strict=True):
        assert (mine is None and theirs is None) or torch.allclose(mine, theirs, atol=1e-5)
    assert all(modes(model.module).values())


def test_a_module_whose_train_does_more_is_told():
    class Act(torch.nn.Module):
        factor = 1.0

        def train(self, mode=True):
            self.factor = 3.0 if mode else 1.0
            return super().train(mode)

        def forward(self, hidden):
            return torch.relu(hidden) * self.factor

    module = of_configuration("gpt2")
    module.transformer.h[0].mlp.act = Act()
    wanted = losses(module)
    module.train()
    np.testing.assert_allclose(losses(module), wanted, atol=1e-6)
    assert module.transformer.h[0].mlp.act.factor == 3.0
    assert all(modes(module).values())


def test_a_call_that_fails_gives_the_mode_back():
    module = with_dropout().train()
    module.transformer.h[1].register_forward_hook(uneven)
    with pytest.raises(ModelError):
        measure(hw.load(module), TASK, WHAT, [loss])
    assert all(modes(module).values())


def test_opening_a_module_changes_nothing_of_it():
    module = with_dropout().train()
    module.transformer.drop.eval()
    before, weights = modes(module), copy.deepcopy(module.state_dict())
    hooks = {name: len(one._forward_hooks) for name, one in module.named_modules()}
    half = hw.load(module, dtype="bfloat16")
    assert half.dtype == "bfloat16"
    assert half.module is not module
    assert hw.load(module).module is module
    assert {one.dtype for one in module.parameters()} == {torch.float32}
    assert modes(module) == before
    assert hooks == {name: len(one._forward_hooks) for name, one in module.named_modules()}
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name])
    wide = measure(hw.load(module), TASK, None, [loss])["baseline_loss"]
    np.testing.assert_allclose(measure(half, TASK, None, [loss])["baseline_loss"], wide, rtol=0.05)


def test_parameters_without_dims_are_hashed():
    module = of_configuration("gpt2")
    module.register_buffer("temperature", torch.tensor(1.0))
    module.transformer.h[0].scale = torch.nn.Parameter(torch.tensor(2.0))
    model = hw.load(module)
    before = model.weight_hash
    assert measure(model, TASK, WHAT, [loss]).attrs["weight_hash"] == before
    module.transformer.h[0].scale.data += 1
    assert model.weight_hash != before


def in_inference_mode():
    with torch.inference_mode():
        return of_configuration("gpt2")


REFUSED = {
    "of nnsight": (lambda: hw.load(of_configuration("gpt2")).traced, r"is a model of nnsight: .*load\(model._module\)"),
    "compiled": (lambda: torch.compile(of_configuration("gpt2"), backend="eager"), r"is compiled, .*_orig_mod"),
    "made under inference mode": (in_inference_mode, r"inference_mode.*load\(copy.deepcopy\(model\)\)"),
    "a number": (lambda: 3, r"cannot load int: give a shipped name \(code-4l and words-2l\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_opened_is_told_in_a_line(name):
    make, message = REFUSED[name]
    with pytest.raises(DeclarationError, match=message) as told:
        hw.load(make())
    assert "\n" not in str(told.value)


def test_a_model_that_is_spread_over_devices_is_refused_and_one_on_one_device_is_not():
    module = of_configuration("gpt2")
    module.hf_device_map = {"transformer.wte": 0, "transformer.h.0": 0, "transformer.h.1": 1, "lm_head": "cpu"}
    with pytest.raises(
        ModelError, match=r"is spread over the devices 0, 1 and cpu \(device_map\): headwise runs a model"
    ):
        hw.load(module)
    module.hf_device_map = {"": "cpu"}
    np.testing.assert_array_equal(losses(module), losses(of_configuration("gpt2")))


def test_a_copy_of_a_module_made_under_inference_mode_is_measured():
    module = in_inference_mode()
    found = losses(copy.deepcopy(module))
    np.testing.assert_allclose(found, losses(of_configuration("gpt2")), atol=1e-6)


def test_the_shipped_model_is_the_same_in_memory_and_by_name():
    from headwise.interventions.begin import begin

    shipped = hw.load("words-2l")
    memory = hw.load(
        AutoModelForCausalLM.from_pretrained(shipped.module.config.name_or_path), tokenizer=shipped.tokenizer
    )
    with begin(shipped) as one, begin(memory) as two:
        assert one.identity.differences(two.identity) == []
