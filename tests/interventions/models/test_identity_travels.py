"""What a model is, on workers and in other processes."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import ModelError
from headwise.metrics import loss
from headwise.studies import measure
from tests.oracles import raw_families
from tests.support.changed_models import TASK, WHAT, of_configuration, through_data


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


@pytest.fixture(scope="module")
def told():
    """What this process and one with another seed of hashes say: facts of every family, hashes of one with adapters."""
    program, here = FACTS + (SEEDS if find_spec("peft") else ""), io.StringIO()
    environment = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with contextlib.redirect_stdout(here), warnings.catch_warnings():
        exec(program, {})
    return [done.stdout.splitlines(), here.getvalue().splitlines()]


def test_another_process_finds_the_same_facts_of_every_family(told):
    from headwise.interventions.models.identity import Identity

    one, *others = (
        {name: Identity.from_attrs(attrs) for name, attrs in json.loads(lines[0]).items()} for lines in told
    )
    assert list(one) == list(raw_families.MODELS)
    for name, identity in one.items():
        assert identity.weights
        assert identity.modules_hash
        for other in others:
            assert identity.exact == other[name].exact, name
            assert identity.differences(other[name]) == []


def test_facts_do_not_depend_on_the_seed_of_hashes(told):
    pytest.importorskip("peft")
    assert len({lines[1] for lines in told}) == 1
    assert all(len(lines) == 2 for lines in told)


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
