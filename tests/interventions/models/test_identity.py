"""No number comes from another model than the one in hand: resumed, remembered, or sent to a worker."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import AutoModelForCausalLM

import headwise as hw
from headwise.errors import DeclarationError, ModelError, ResultWarning
from headwise.interventions import Head, Patch, Scale, ZeroAblate
from headwise.metrics import induction, logit_diff, loss
from headwise.studies import RepeatedTokens, Results, capture, composition_scores, measure, rerun
from tests.oracles import raw_families, raw_hooks

TASK = RepeatedTokens(n=4, length=6)
WHAT = {"zero": ZeroAblate(Head(1, 0)), "patch": Patch(Head(0, 1).k)}


def gpt2(**more):
    module = raw_hooks.random_gpt2(2, 2, 6, 40, 20, seed=3)
    for name, value in more.items():
        setattr(module.config, name, value)
    return type(module)._from_config(module.config).eval(), module.state_dict()


def of_configuration(family, **more):
    """A small model of random weights, which do not depend on the configuration."""
    if family == "gpt2":
        module, weights = gpt2(**more)
        module.load_state_dict(weights)
        return module
    return raw_families.random_model(family, **more)


def losses(module, **options):
    return measure(hw.load(module), TASK, WHAT, [loss], **options)["loss"].values


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


class Halt(Exception):
    """Stands for whatever ends a process."""


def stopped_or_done(module, out, finished, **options):
    """Measure into `out`, to the end or until some passes are done."""

    def halt(done, total):
        if not finished and done > total // 2:
            raise Halt

    try:
        measure(hw.load(module), TASK, WHAT, [loss], out=out, progress=halt, batch_size=4, **options)
    except Halt:
        assert list(out.with_name("out.nc.parts").glob("*.nc"))


def late(value, factor):
    """Times a factor from position 8 on, where the prompt of the fingerprint has ended."""
    return torch.cat([value[:, :8], value[:, 8:] * factor], 1)


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


def stepped(kind):
    def step(module):
        optimiser = kind(module.parameters(), lr=1e-2, fused=True)
        module(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimiser.step()

    return step


def through_data(module):
    module.transformer.h[1].mlp.c_fc.weight.data[0, 0] += 0.5


def through_numpy(module):
    module.transformer.h[1].mlp.c_fc.weight.detach().numpy()[0, 0] += 0.5


def embedding_of_another_token(module):
    """Which the prompt of the fingerprint does not hold: its weights are not those of the unembedding here."""
    seen = set(np.random.RandomState(0).randint(0, 40, (1, 8)).ravel().tolist())
    others = [token for token in range(40) if token not in seen]
    module.transformer.wte.weight.data[others] *= 2


WEIGHTS = {
    "fused AdamW": stepped(torch.optim.AdamW),
    "fused SGD": stepped(torch.optim.SGD),
    "through .data": through_data,
    "through a NumPy view": through_numpy,
    "embeddings that the fingerprint does not see": embedding_of_another_token,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_change_without_a_trace_are_read_anew(name, tmp_path):
    module = of_configuration("gpt2")
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    model, out = hw.load(module), tmp_path / "out.nc"
    before = model.weight_hash
    old = measure(model, TASK, WHAT, [loss], out=out)
    WEIGHTS[name](module)
    assert model.weight_hash != before
    wanted = measure(hw.load(copy.deepcopy(module)), TASK, WHAT, [loss])
    assert abs(wanted["loss"] - old["loss"]).max() > 1e-3
    in_memory = measure(model, TASK, WHAT, [loss])
    assert in_memory.attrs["weight_hash"] == wanted.attrs["weight_hash"]
    with pytest.warns(ResultWarning, match=r"another model than the one in hand: weights \w+ then, \w+ now"):
        found = measure(model, TASK, WHAT, [loss], out=out)
    xr.testing.assert_equal(found, wanted)
    assert found.attrs["weight_hash"] == wanted.attrs["weight_hash"] != before


def test_a_hook_whose_code_says_nothing_is_seen_by_what_the_model_computes(tmp_path, monkeypatch):
    """The fingerprint refuses: all facts are the same here, and the numbers are not."""
    module = of_configuration("gpt2")
    module.transformer.h[0].mlp.act.register_forward_hook(lambda act, given, made: made * np.factor_of_this_test)
    monkeypatch.setattr(np, "factor_of_this_test", 1.0, raising=False)
    model, out = hw.load(module), tmp_path / "out.nc"
    stopped_or_done(module, out, False)
    monkeypatch.setattr(np, "factor_of_this_test", 1.5)
    wanted = measure(model, TASK, WHAT, [loss])
    with pytest.warns(ResultWarning, match="with another model than the one in hand: what it computes on"):
        found = measure(model, TASK, WHAT, [loss], out=out, batch_size=4)
    np.testing.assert_allclose(found["loss"], wanted["loss"], atol=1e-6)
    monkeypatch.setattr(np, "factor_of_this_test", 2.0)
    wanted = measure(model, TASK, WHAT, [loss])
    with pytest.warns(ResultWarning, match="(?i)it is computed again"):
        found = measure(model, TASK, WHAT, [loss], out=out, batch_size=4)
    np.testing.assert_allclose(found["loss"], wanted["loss"], atol=1e-6)


def test_rounding_is_the_same_model(tmp_path):
    """One thread or two, eager or fused attention change the last bits only, and what is finished is used."""
    module = of_configuration("gpt2")
    stopped_or_done(module, tmp_path / "out.nc", False)
    kept = sorted(path.name for path in (tmp_path / "out.nc.parts").glob("*.nc"))
    torch.set_num_threads(2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stopped_or_done(module, tmp_path / "out.nc", False)
    finally:
        torch.set_num_threads(1)
    assert set(kept) <= {path.name for path in (tmp_path / "out.nc.parts").glob("*.nc")}


def test_every_result_holds_the_configuration(tmp_path):
    model = hw.load(of_configuration("gpt2", layer_norm_epsilon=0.25))
    made = [
        measure(model, TASK, WHAT, [loss]),
        capture(model, TASK, Head(0, 0)),
        composition_scores(model),
    ]
    for number, result in enumerate(made):
        stored = hw.open_result(hw.write_netcdf(result, tmp_path / f"{number}.nc"), load=True)
        assert json.loads(stored.attrs["configuration"])["layer_norm_epsilon"] == 0.25
        assert stored.attrs["weight_hash"] == model.weight_hash
        assert {"module_hash", "buffer_hash", "fingerprint"} <= stored.attrs.keys()
    assert "_name_or_path" not in made[0].attrs["configuration"]


def test_rerun_tells_what_is_different_from_what_is_not_known(tmp_path):
    first, second = of_configuration("gpt2"), of_configuration("gpt2", layer_norm_epsilon=0.5)
    path = hw.write_netcdf(measure(hw.load(first), TASK, WHAT, [loss]), tmp_path / "first.nc")
    same = rerun(path, model=hw.load(first))
    assert same.agrees
    assert not [note for note in same.notes if "another model" in note or "unknown" in note]
    found = rerun(path, model=hw.load(second))
    assert not found.agrees
    assert any("layer_norm_epsilon 1e-05 then, 0.5 now" in note for note in found.notes), found.notes
    older = hw.open_result(path, load=True)
    for name in ("configuration", "module_hash", "buffer_hash", "fingerprint", "attention"):
        del older.attrs[name]
    path = hw.write_netcdf(older, tmp_path / "older.nc")
    again = rerun(path, model=hw.load(first))
    assert again.agrees
    (note,) = [note for note in again.notes if "unknown" in note]
    assert note.startswith("the file does not say which configuration, modules, buffers and fingerprint its model had")
    assert not [note for note in again.notes if "another model" in note]


def test_seeds_of_two_models_do_not_stand_side_by_side(tmp_path):
    for seed, more in enumerate([{}, {}, {"layer_norm_epsilon": 0.5}]):
        task = RepeatedTokens(n=4, length=6, seed=seed)
        result = measure(hw.load(of_configuration("gpt2", **more)), task, WHAT, [loss])
        hw.write_netcdf(result, tmp_path / f"{seed}.nc")
    results = Results(tmp_path)
    with pytest.raises(
        DeclarationError, match=r"from different models: configuration \(layer_norm_epsilon 1e-05 in 0.nc"
    ):
        results.combine(dim="seed")
    (tmp_path / "2.nc").unlink()
    assert Results(tmp_path).combine(dim="seed").sizes["seed"] == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "small"
    of_configuration("gpt2").save_pretrained(place)
    words = {str(token): token for token in range(40)}
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0"))).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def replaced_activation(module):
    module.transformer.h[1].mlp.act = torch.nn.ReLU()


def changed_epsilon(module):
    module.transformer.h[0].ln_1.eps = 0.5


@pytest.mark.parametrize("change", [replaced_activation, changed_epsilon, through_data])
def test_a_model_that_workers_cannot_reproduce_is_refused(change, folder, pool):
    model = hw.load(folder)
    same = measure(model, TASK, WHAT, [loss], executor=pool)
    xr.testing.assert_allclose(same, measure(model, TASK, WHAT, [loss]), atol=1e-6)
    change(model.module)
    with pytest.raises(ModelError, match=r"a worker cannot reproduce small: opened there, it differs in ") as told:
        measure(model, TASK, WHAT, [loss], executor=pool)
    named = {
        replaced_activation: r"transformer.h.1.mlp.act is ReLU here, NewGELUActivation on a worker",
        changed_epsilon: r"transformer.h.0.ln_1 is LayerNorm with other attributes, hooks or code on a worker",
        through_data: r"weights",
    }
    assert named[change] in str(told.value)
    assert "\n" not in str(told.value)


FACTS = """
import json, sys
from tests.oracles import raw_families
import headwise as hw
from headwise.interventions.begin import begin
found = {}
for name in raw_families.MODELS:
    with begin(hw.load(raw_families.random_model(name)), check=False) as call:
        found[name] = call.identity.attrs()
print(json.dumps(found))
"""


def test_another_process_finds_the_same_facts_of_every_family():
    from headwise.interventions.models.identity import Identity

    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, env=environment)
        assert done.stdout, done.stderr
        found.append({name: Identity.from_attrs(attrs) for name, attrs in json.loads(done.stdout).items()})
    one, other = found
    assert list(one) == list(raw_families.MODELS)
    for name, identity in one.items():
        assert identity.exact == other[name].exact, name
        assert identity.differences(other[name]) == []
        assert identity.weights
        assert identity.modules_hash


SEEDS = """
import sys, warnings
warnings.simplefilter("ignore")
import peft, torch
from tests.oracles import raw_hooks
import headwise as hw
from headwise.interventions.begin import begin
module = raw_hooks.random_gpt2(2, 2, 6, 40, 20, seed=3)
config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
torch.manual_seed(0)
module = peft.get_peft_model(module, config).get_base_model()
module.transformer.h[0].mlp.act.register_forward_hook(lambda act, given, made: made * len({"a", "b", module.dtype}))
with begin(hw.load(module), check=False) as call:
    print(call.identity.modules_hash, call.identity.weights)
"""


def test_facts_do_not_depend_on_the_seed_of_hashes():
    pytest.importorskip("peft")
    found = set()
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", SEEDS], capture_output=True, text=True, env=environment)
        assert done.stdout, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_a_hook_that_holds_the_model_reads_no_weight_again(monkeypatch):
    """Modules and weights that a hook reaches count by their path: they are read once, as the model's own."""
    from headwise.interventions.base import contents
    from headwise.interventions.begin import begin

    module = of_configuration("gpt2").to(torch.bfloat16)
    for block in module.transformer.h:
        block.mlp.act.register_forward_hook(lambda act, given, made: made * (1 + 0 * len(module.transformer.h)))
    read, usual = [], contents.array_bytes
    monkeypatch.setattr(contents, "array_bytes", lambda array: read.append(array) or usual(array))
    with begin(hw.load(module)) as call:
        assert call.identity.fingerprint is not None
    assert read == []


def test_an_identity_travels(folder):
    from headwise.interventions.begin import begin

    with begin(hw.load(folder), check=False) as call:
        back = pickle.loads(pickle.dumps(call.identity))
    assert back == call.identity
    assert back.differences(call.identity) == []


# --- a number depends on the model alone -----------------------------------------------------------------------------


def soft_cap(module):
    module.lm_head.register_forward_hook(lambda head, given, made: 3 * torch.tanh(made / 3))


def bias_by_hook(module):
    module.lm_head.register_forward_hook(lambda head, given, made: made + torch.linspace(-2, 2, made.shape[-1]))


def adapted(module, names, **more):
    """LoRA on some modules, with random numbers in both of its factors."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out=True, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(module, config)


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


def deep():
    module = raw_hooks.random_gpt2(6, 2, 6, 40, 20, seed=3)
    return module


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


def test_scores_and_baselines_are_checked_too():
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


# --- the caller's module ---------------------------------------------------------------------------------------------


def with_dropout():
    module, weights = gpt2(resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    module.load_state_dict(weights)
    return module


def uneven(block, given, made):
    return made * torch.linspace(1, 2, made.shape[-1])


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
    "of peft": (lambda: adapted(of_configuration("gpt2"), ["c_attn"]), r"a model of peft: .*get_base_model"),
    "a number": (lambda: 3, r"cannot load int: give a shipped name \(words-2l\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_opened_is_told_in_a_line(name):
    make, message = REFUSED[name]
    with pytest.raises(DeclarationError, match=message) as told:
        hw.load(make())
    assert "\n" not in str(told.value)


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
