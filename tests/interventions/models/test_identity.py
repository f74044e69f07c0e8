"""No number comes from another model than the one in hand: another configuration, hook, class or buffer is seen."""

from functools import partial

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import ResultWarning
from tests.support.changed_models import late, losses, of_configuration, stopped_or_done

CONFIGURATIONS = {
    "rope_theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}),
    "layer_norm_epsilon": ("gpt2", {"layer_norm_epsilon": 0.5}),
    "sliding_window": ("mistral", {"sliding_window": 3}),
    "a window longer than the prompt of the fingerprint": ("mistral", {"sliding_window": 9}),
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "activation_function": ("gpt2", {"activation_function": "relu"}),
}


@pytest.fixture
def facts_alone(monkeypatch):
    """Without the fingerprint, which sees most changes whatever the facts say of them."""
    from headwise.interventions.models.identity import Fingerprint

    monkeypatch.setattr(Fingerprint, "unlike", lambda *given: "")


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("finished", [True, False], ids=["finished file", "parts"])
@pytest.mark.usefixtures("facts_alone")
def test_another_configuration_takes_nothing(name, finished, tmp_path):
    family, change = CONFIGURATIONS[name]
    out = tmp_path / "out.nc"
    first, second = of_configuration(family), of_configuration(family, **change)
    assert hw.load(first).weight_hash == hw.load(second).weight_hash
    stopped_or_done(first, out, finished)
    wanted = losses(second)
    assert abs(wanted - losses(first)).max() > 1e-3
    with pytest.warns(ResultWarning, match=r"begun with another model than the one in hand: configuration \("):
        np.testing.assert_array_equal(losses(second, out=out), wanted)


def acts(factor):
    """A class of one's own; two of them differ in what they do, and not by name."""

    class Act(torch.nn.Module):
        def forward(self, hidden):
            return late(torch.relu(hidden), factor)

    return Act()


class Holder:
    def __init__(self, factor):
        self.factor, self.table = factor, np.arange(3000.0)

    def __repr__(self):
        return "a holder"

    def __call__(self, module, given, made):
        return late(made, self.factor)

    def bound(self, hidden):
        return late(torch.relu(hidden), self.factor)


class ModuleAsHook(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __call__(self, module, given, made):
        return late(made, self.factor)


def with_attribute(factor):
    def hook(act, given, made):
        return late(made, hook.factor)

    hook.factor = factor
    return hook


def hook_on(act, hook):
    act.register_forward_hook(hook)


def of_block(module, number=0):
    return module.transformer.h[number]


def scaled_by_parametrisation(module, factor):
    class Scaled(torch.nn.Module):
        def forward(self, weight):
            return factor * weight

    torch.nn.utils.parametrize.register_parametrization(of_block(module).mlp.c_fc, "weight", Scaled())


def given_late(factor):
    return lambda mlp, given: (late(given[0], factor),)


def forward_of_partial(module, factor):
    of_block(module).mlp.act.forward = partial(lambda factor, hidden: late(torch.relu(hidden), factor), factor)


IN_PLACE = {
    "another activation": lambda module, factor: setattr(
        of_block(module, 1).mlp, "act", torch.nn.ReLU() if factor == 1 else torch.nn.SiLU()
    ),
    "epsilon": lambda module, factor: setattr(of_block(module).ln_1, "eps", factor - 0.9),
    "class of one's own": lambda module, factor: setattr(of_block(module).mlp, "act", acts(factor)),
    "hook": lambda module, factor: hook_on(of_block(module).mlp.act, lambda act, given, made: late(made, factor)),
    "hook that is an object": lambda module, factor: hook_on(of_block(module).mlp.act, Holder(factor)),
    "hook that is a module": lambda module, factor: hook_on(of_block(module).mlp.act, ModuleAsHook(factor)),
    "hook with an attribute": lambda module, factor: hook_on(of_block(module).mlp.act, with_attribute(factor)),
    "hook before": lambda module, factor: of_block(module).mlp.register_forward_pre_hook(given_late(factor)),
    "forward": lambda module, factor: setattr(
        of_block(module).mlp.act, "forward", lambda hidden: late(torch.relu(hidden), factor)
    ),
    "forward of another object": lambda module, factor: setattr(
        of_block(module).mlp.act, "forward", Holder(factor).bound
    ),
    "forward that is a partial": forward_of_partial,
    "parametrisation": scaled_by_parametrisation,
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("finished", [True, False], ids=["finished file", "parts"])
@pytest.mark.usefixtures("facts_alone")
def test_what_is_changed_in_place_takes_nothing(name, finished, tmp_path):
    made = [of_configuration("gpt2") for _ in range(3)]
    for module, factor in zip(made, (1.0, 2.0, 2.0), strict=True):
        IN_PLACE[name](module, factor)
    first, second, third = made
    stopped_or_done(first, tmp_path / "out.nc", finished)
    wanted = losses(second)
    assert abs(wanted - losses(first)).max() > 1e-3
    with pytest.warns(ResultWarning, match="with another model than the one in hand"):
        np.testing.assert_array_equal(losses(second, out=tmp_path / "out.nc"), wanted)
    before = (tmp_path / "out.nc").stat().st_mtime_ns
    np.testing.assert_array_equal(losses(third, out=tmp_path / "out.nc"), wanted)
    assert (tmp_path / "out.nc").stat().st_mtime_ns == before, "one that is changed alike is the same model"


@pytest.mark.usefixtures("facts_alone")
def test_a_patched_class_of_a_library_takes_nothing(tmp_path, monkeypatch):
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    module, usual = of_configuration("gpt2"), GPT2MLP.forward
    stopped_or_done(module, tmp_path / "out.nc", True)
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, hidden: 2 * usual(self, hidden))
    second = of_configuration("gpt2")
    wanted = losses(second)
    with pytest.warns(ResultWarning, match="modules"):
        np.testing.assert_array_equal(losses(second, out=tmp_path / "out.nc"), wanted)


def test_a_buffer_that_no_file_holds_counts(tmp_path):
    first, second = (of_configuration("llama") for _ in range(2))
    second.model.rotary_emb.inv_freq *= 3
    losses(first, out=tmp_path / "out.nc")
    wanted = losses(second)
    assert abs(wanted - losses(first)).max() > 1e-3
    with pytest.warns(ResultWarning, match=r"another model than the one in hand: buffers \w+ then, \w+ now"):
        np.testing.assert_array_equal(losses(second, out=tmp_path / "out.nc"), wanted)
