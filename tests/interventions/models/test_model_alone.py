"""A number depends on the model alone: not on other metrics, on unchecked files or on which call came first."""

import copy

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import ModelError
from headwise.interventions import Head
from headwise.interventions.models import architectures
from headwise.metrics import induction, logit_diff, loss
from headwise.studies import RepeatedTokens, capture, composition_scores, measure
from tests.oracles import raw_families
from tests.support.changed_models import TASK, WHAT, adapted, deep, late, of_configuration, uneven


def soft_cap(module):
    module.lm_head.register_forward_hook(lambda head, given, made: 3 * torch.tanh(made / 3))


def bias_by_hook(module):
    module.lm_head.register_forward_hook(lambda head, given, made: made + torch.linspace(-2, 2, made.shape[-1]))


def lora_on_the_head(module):
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    adapted(module, ["lm_head"])


@pytest.mark.parametrize("change", [soft_cap, bias_by_hook, lora_on_the_head])
def test_a_number_does_not_depend_on_which_others_are_asked_for(change):
    module = of_configuration("gpt2")
    change(module)
    model = hw.load(module)
    alone = measure(model, TASK, WHAT, [logit_diff])
    beside = measure(model, TASK, WHAT, [logit_diff, loss])
    plain = measure(hw.load(of_configuration("gpt2")), TASK, WHAT, [logit_diff])
    np.testing.assert_allclose(alone["logit_diff"], beside["logit_diff"], atol=1e-5)
    assert abs(alone["logit_diff"] - plain["logit_diff"]).max() > 1e-2
    batch = TASK.draw(model)
    logits = module(torch.as_tensor(batch.runs["clean"])).logits
    rows, places = np.nonzero(batch.scored)
    gap = logits[rows, places, batch.targets[rows, places]] - logits[rows, places, batch.distractors[rows, places]]
    wanted = gap.detach().reshape(4, -1).mean(-1).numpy()
    np.testing.assert_allclose(alone["baseline_logit_diff"].sel(run="clean"), wanted, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_adapters_in_any_layer_give_what_the_merged_model_gives(layer):
    """Path patching, head outputs, weights of heads and composition, against LoRA merged into the weights."""
    from headwise.interventions import Layer, PathPatch

    names = [f"transformer.h.{layer}.attn.{part}" for part in ("c_attn", "c_proj")]
    wrapped = adapted(deep(), names)
    merged = hw.load(copy.deepcopy(wrapped).merge_and_unload())
    model = hw.load(wrapped.get_base_model())
    plain = hw.load(deep())
    paths = {
        "from": PathPatch(Head(layer, 1), Head(5, 0).k),
        "into": PathPatch(Head(0, 1), Head(layer, 0).q),
        "logits": PathPatch(Head(layer, 0), "logits"),
    }
    found, wanted, before = (measure(one, TASK, paths, [loss])["loss"] for one in (model, merged, plain))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert abs(found - before).max() > 1e-2
    name = f"L{layer}_head_out"
    found, wanted, before = (capture(one, TASK, Layer(layer).head_out)[name] for one in (model, merged, plain))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert abs(found - before).max() > 1e-2
    for mine, theirs in zip(model.head_weights(layer), merged.head_weights(layer), strict=True):
        assert (mine is None and theirs is None) or torch.allclose(mine, theirs, atol=1e-5)
    found, wanted, before = (composition_scores(one)["composition"] for one in (model, merged, plain))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert abs(found - before).max() > 1e-3


def test_weights_of_heads_that_no_matrix_gives_are_refused():
    module = deep()
    module.transformer.h[2].attn.c_proj.register_forward_hook(lambda out, given, made: torch.tanh(made))
    with pytest.raises(
        ModelError, match=r"self-check of GPT2LMHeadModel failed: parts \(weights of out of layer 2 is off"
    ):
        composition_scores(hw.load(module))


def test_scores_and_baselines_are_checked_too(monkeypatch):
    monkeypatch.setattr(architectures, "TABLES", ())  # whose models would be called
    module = raw_families.random_model("llama")
    for block in module.model.layers:
        block.self_attn.scaling *= 0.5
    model = hw.load(module)
    for metric in (induction, loss):
        with pytest.raises(ModelError, match="self-check of LlamaForCausalLM failed: identity"):
            measure(model, TASK, None, [metric])
    assert measure(model, TASK, None, [loss], check=False)["baseline_loss"].notnull().all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "pythia"])
def test_a_hook_on_the_whole_model_is_refused(name):
    """It comes after all that a trace hears of."""
    module = of_configuration(name)
    module.register_forward_hook(lambda model, given, made: type(made)(logits=made.logits * 0.5))
    with pytest.raises(ModelError, match="a hook on the whole model moves its logits"):
        measure(hw.load(module), TASK, None, [loss])


def test_the_self_check_looks_as_far_as_the_prompts_go():
    module = of_configuration("gpt2")
    module.transformer.h[1].register_forward_hook(
        lambda block, given, made: uneven(block, given, late(made, 1.0)) * 1.0
    )
    late_only = of_configuration("gpt2")
    late_only.transformer.h[1].register_forward_hook(
        lambda block, given, made: torch.cat([made[:, :8], uneven(block, given, made[:, 8:])], 1)
    )
    short, long = RepeatedTokens(n=2, length=4), RepeatedTokens(n=2, length=8)
    model = hw.load(late_only)
    measure(model, short, WHAT, [loss])
    with pytest.raises(ModelError, match="a pass that changes nothing moves the logits of 16 tokens"):
        measure(model, long, WHAT, [loss])
    with pytest.raises(ModelError, match="self-check"):
        measure(hw.load(module), short, WHAT, [loss])


def test_a_finished_file_of_an_unchecked_model_is_checked(tmp_path):
    module = of_configuration("gpt2")
    module.transformer.h[1].register_forward_hook(uneven)
    measure(hw.load(module), TASK, WHAT, [loss], out=tmp_path / "out.nc", check=False)
    with pytest.raises(ModelError, match="self-check"):
        measure(hw.load(module), TASK, WHAT, [loss], out=tmp_path / "out.nc")


def test_a_model_is_checked_again_once_it_is_another():
    module = of_configuration("gpt2")
    model = hw.load(module)
    measure(model, TASK, WHAT, [loss])
    module.transformer.h[1].register_forward_hook(uneven)
    with pytest.raises(ModelError, match="self-check of GPT2LMHeadModel failed"):
        measure(model, TASK, WHAT, [loss])


def test_untrained_models_to_compare_with_are_built_as_the_model_in_hand():
    from headwise.studies.analyses.heads import untrained_scores

    replaced, configured = of_configuration("gpt2"), of_configuration("gpt2", activation_function="relu")
    for block in replaced.transformer.h:
        block.mlp.act = torch.nn.ReLU()
    found, wanted, other = (
        untrained_scores(hw.load(module), TASK, [induction], [0, 1])["induction"]
        for module in (replaced, configured, of_configuration("gpt2"))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert abs(found - other).max() > 1e-5
    wrapped = adapted(of_configuration("gpt2"), ["transformer.h.0.attn.c_attn"]).get_base_model()
    with pytest.raises(ModelError, match=r"random weights do not fit it .* merge an adapter into the weights"):
        untrained_scores(hw.load(wrapped), TASK, [induction], [0])
