"""Opening models: a folder, a module, a shipped name; what is said when there is none, and what no folder can do."""

import json
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import threading

import pytest
import torch
import xarray as xr
from transformers import dynamic_module_utils

import headwise as hw
from headwise.errors import HeadwiseError, ModelError
from headwise.interventions import Head, ZeroAblate, load
from headwise.interventions.remote.backend import open_model
from headwise.studies import RepeatedTokens, measure
from headwise.studies.cli.main import main
from tests.oracles import raw_families, raw_hooks
from tests.studies.measuring.test_workers import Here


@pytest.fixture
def folder(tmp_path, words_model):
    """A local GPT-2 with a tokenizer, as the Hub would give it."""
    raw_hooks.random_gpt2(2, 2, 8, words_model.shape.vocabulary, 20).save_pretrained(tmp_path / "mine")
    words_model.tokenizer.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_local_folder_loads_as_it_was_saved(folder):
    model = hw.load(folder)
    assert (model.name, model.revision) == ("mine", "local")
    assert (model.layers, model.heads) == (range(2), range(2))
    original = raw_hooks.random_gpt2(2, 2, 8, model.shape.vocabulary, 20)
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(model.module(tokens).logits, original(tokens).logits)
    assert model.weight_hash == hw.load(original).weight_hash
    assert repr(model) == "<Model mine (local): gpt2, 2 layers of 2 heads, float32 on cpu, runs here>"


def test_weight_hash_sees_a_weight_changed_in_place(folder):
    model = hw.load(folder)
    before = model.weight_hash
    with torch.no_grad():
        model.module.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    changed = model.weight_hash
    assert changed != before
    with torch.no_grad():
        model.module.load_state_dict(hw.load(folder).module.state_dict())
    assert model.weight_hash == before


def test_weight_hash_sees_one_changed_weight(folder):
    model = hw.load(folder)
    other = hw.load(folder)
    with torch.no_grad():
        other.module.transformer.h[1].mlp.c_fc.bias[3] += 1e-3
    assert model.weight_hash != other.weight_hash


def test_shipped_model(words_model):
    assert "words-2l" in hw.shipped()
    assert (words_model.name, words_model.revision, words_model.family.name) == ("words-2l", "shipped", "gpt2")
    assert words_model.token_text(words_model.encode("apple banana, cherry")) == ["apple", "banana", ",", "cherry"]


def test_dtype_is_honoured(folder):
    assert hw.load(folder, dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: hw.load(tmp), "is a folder without config.json: a model folder holds config.json and weights"),
        (lambda tmp: hw.load(tmp / "none"), "there is no folder"),
        (
            lambda tmp: hw.load("gpt2-small"),
            "no model is called 'gpt2-small': shipped are words-2l; a Hub id is written owner/name",
        ),
        (lambda tmp: hw.load("nobody/nothing"), "cannot get nobody/nothing from the Hugging Face Hub"),
        (lambda tmp: hw.load("words-2l", device="tpu"), "device 'tpu' cannot be used here: possible are auto, cpu"),
        (lambda tmp: hw.load("words-2l", device=None), "device None cannot be used here"),
        (lambda tmp: hw.load("words-2l", device="meta"), "device 'meta' cannot be used here"),
        (lambda tmp: hw.load("words-2l", revision="v2"), "revision='v2' is for a Hub id: words-2l is shipped"),
        (
            lambda tmp: hw.load("words-2l", dtype="int3"),
            "possible are float32, float64, bfloat16 and float16",
        ),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, make, message):
    with pytest.raises(HeadwiseError) as caught:
        make(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_broken_model_is_refused(folder):
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").write_bytes(b"not weights".ljust(size, b"!"))
    with pytest.raises(ModelError, match="cannot read the model in"):
        hw.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the model in"):
        hw.load(folder)


def edited(folder, change):
    """The folder after `change` of its tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_folder_that_lacks_weights_is_refused_not_filled_with_random_ones(folder):
    def lose(tensors):
        for name in [name for name in tensors if ".h.1." in name]:
            del tensors[name]

    with pytest.raises(ModelError, match=r"the weights of mine lack 12 tensors \(transformer\.h\.1\.attn"):
        hw.load(edited(folder, lose))


def test_a_folder_with_more_layers_than_it_says_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(ModelError, match="the weights of mine have, beyond the configuration, 11 tensors"):
        hw.load(folder)


def saved(name, folder):
    """A random model of a family, with a tokenizer."""
    module = raw_hooks.random_gpt2(2, 2, 8, 50, 20) if name == "gpt2" else raw_families.random_model(name)
    module.save_pretrained(folder)
    load._id_tokenizer(50).save_pretrained(folder)
    return module


OLD = {
    "gpt2": ["transformer.h.1.attn.bias", "transformer.h.0.attn.masked_bias"],
    "gpt-neo": ["transformer.h.0.attn.attention.bias", "transformer.h.1.attn.attention.masked_bias"],
    "pythia": [f"gpt_neox.layers.0.attention.{end}" for end in ("bias", "masked_bias", "rotary_emb.inv_freq")],
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
}


@pytest.mark.parametrize("name", OLD)
def test_masks_and_frequencies_that_older_files_hold_are_no_weights(name, tmp_path, caplog, monkeypatch):
    module = saved(name, tmp_path)
    edited(tmp_path, lambda tensors: tensors.update({key: torch.ones(3) for key in OLD[name]}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING", "transformers")
    found = hw.load(tmp_path)
    assert caplog.text == ""
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(found.module(tokens).logits, module(tokens).logits)


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj.bias"),
        ("gpt-neo", "transformer.h.1.attn.attention.out_proj.bias"),
        ("pythia", "gpt_neox.layers.0.attention.dense.bias"),
        ("llama, wide heads", "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_bias_is_a_weight(name, bias, tmp_path):
    saved(name, tmp_path)
    with pytest.raises(ModelError, match=re.escape(f"lack 1 tensors ({bias}): is it whole?")):
        hw.load(edited(tmp_path, lambda tensors: tensors.pop(bias)))


def test_a_bias_beyond_the_configuration_is_found(tmp_path):
    saved("neox without biases", tmp_path)
    bias = "gpt_neox.layers.0.attention.dense.bias"
    with pytest.raises(ModelError, match=re.escape(f"beyond the configuration, 1 tensors ({bias}): is it whole?")):
        hw.load(edited(tmp_path, lambda tensors: tensors.update({bias: torch.ones(24)})))


@pytest.mark.parametrize("broken", [{"n_head": 0}, {"n_layer": "two"}, {"n_embd": 24}])
def test_a_folder_whose_configuration_cannot_be_is_refused(folder, broken):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | broken))
    with pytest.raises(ModelError, match="cannot read the model in") as caught:
        hw.load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="mine has no tokenizer"):
        hw.load(folder)


def test_a_module_in_memory_keeps_its_own_dtype():
    module = raw_hooks.random_gpt2(1, 2, 4, 20, 10).to(torch.bfloat16)
    assert hw.load(module).dtype == "bfloat16"
    assert hw.load(module, dtype="float32").dtype == "float32"


def test_an_unknown_family_lists_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt", "hidden_size": 8}')
    with pytest.raises(ModelError, match="is a opt model: headwise knows gpt2"):
        hw.load(tmp_path)


CODE = """
import pathlib
pathlib.Path(__file__).parent.joinpath("marker").touch()
pathlib.Path({marker!r}).touch()
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerFast

class Mine(GPT2LMHeadModel):
    def forward(self, *args, **options):
        return super().forward(*args, **options)

class MineConfig(GPT2Config):
    pass

class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAPS = {
    "a model": ("config.json", {"AutoModelForCausalLM": "mine.Mine"}, {}),
    "a configuration": ("config.json", {"AutoConfig": "mine.MineConfig"}, {}),
    "a kind of its own": ("config.json", {"AutoConfig": "mine.MineConfig"}, {"model_type": "mine"}),
    "another repository's": ("config.json", {"AutoModelForCausalLM": "someone/else--mine.Mine"}, {}),
    "a tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["mine.MineTokenizer", None]}, {}),
    "a tokenizer of a kind": (
        "tokenizer_config.json",
        {"AutoTokenizer": [None, "mine.MineTokenizer"]},
        {"tokenizer_class": "MineTokenizer"},
    ),
}


@pytest.fixture
def with_code(folder, tmp_path, monkeypatch):
    """Makes the folder bring code: gives what is beside it once that ran."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "ran"

    def bring(which):
        name, auto_map, more = MAPS[which]
        (folder / "mine.py").write_text(CODE.format(marker=str(marker)))
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"auto_map": auto_map} | more))
        return marker

    return bring


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("which", MAPS)
def test_code_that_a_folder_brings_is_refused(which, remote, folder, with_code):
    marker = with_code(which)
    with pytest.raises(
        ModelError, match=rf"^mine brings code of its own \(auto_map in {MAPS[which][0]}\), which"
    ) as caught:
        hw.load(folder, remote=remote)
    assert "trust_remote_code=True" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_attention_from_a_repository_is_code_too(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/attention"}))
    with pytest.raises(ModelError, match=r"attention from a repository of kernels in config\.json"):
        hw.load(folder)


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal")
@pytest.mark.parametrize("which", ["a kind of its own", "a tokenizer"])
def test_nobody_is_asked_at_a_terminal_whether_code_may_run(which, folder, with_code):
    import pty

    marker = with_code(which)
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 5)
    code = (
        "import sys, headwise as hw\ntry:\n hw.load(sys.argv[1])\nexcept hw.errors.ModelError as error:\n print(error)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, folder], stdin=theirs, capture_output=True, text=True, timeout=120, check=True
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout.startswith("mine brings code of its own (auto_map in ")
    assert "Do you wish" not in done.stdout + done.stderr
    assert not marker.exists()


def test_code_that_is_trusted_runs_here_and_on_workers(folder, with_code, capsys):
    task, what = RepeatedTokens(n=2, length=5), ZeroAblate(Head(1, 1))
    wanted = measure(hw.load(folder), task, what)
    marker = with_code("a model")
    model = hw.load(folder, trust_remote_code=True)
    assert marker.exists()
    assert (type(model.module).__name__, model.trusted) == ("Mine", True)
    xr.testing.assert_equal(measure(model, task, what), wanted)
    xr.testing.assert_equal(measure(model, task, what, executor=Here()), wanted)
    assert main(["plan", "--model", str(folder), "--trust-remote-code", "--n", "2", "--length", "5"]) == 0
    capsys.readouterr()
    assert main(["plan", "--model", str(folder)]) != 0
    assert "mine brings code of its own" in capsys.readouterr().err
    with pytest.raises(ModelError, match="brings code of its own"):
        hw.load(folder)


class Runs:
    """A pickle that runs something."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["in place of tensors", "beside tensors", "old format", "no pickle"])
def test_weights_that_run_code_are_refused_without_advice_to_run_it(how, folder, tmp_path):
    marker = tmp_path / "ran"
    state = hw.load(folder).module.state_dict()
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    if how == "in place of tensors":
        file.write_bytes(pickle.dumps(Runs(marker), protocol=2).ljust(100_000))
    elif how == "no pickle":
        file.write_bytes(b"?" * 100_000)
    else:
        torch.save(state | {"more": Runs(marker)}, file, _use_new_zipfile_serialization=how == "beside tensors")
    with pytest.raises(ModelError, match=r"cannot read the model in .*reading such a file can run code") as told:
        hw.load(folder)
    assert not marker.exists()
    assert "weights_only" not in str(told.value)
    assert str(told.value).endswith("have the weights as safetensors")
    assert "\n" not in str(told.value)
    torch.save(state, file)
    assert hw.load(folder).layers == range(2), "a pickle of tensors alone is read"


HUGE = 10**9
TOO_LARGE = {
    "layers": ("gpt2", {"n_layer": HUGE}, "num_hidden_layers as 1,000,000,000, and no model has more than 10,000"),
    "layers by their other name": ("gpt2", {"num_hidden_layers": HUGE}, "num_hidden_layers as 1,000,000,000"),
    "layers of llama": ("llama", {"num_hidden_layers": HUGE}, "num_hidden_layers as 1,000,000,000"),
    "layers of qwen": ("qwen2", {"num_hidden_layers": HUGE, "layer_types": None}, "num_hidden_layers as 1,000,000,000"),
    "layers of a kind": ("gpt-neo", {"attention_types": [[["global", "local"], HUGE]]}, "num_hidden_layers as 1,000"),
    "layers beyond the weights": ("gpt2", {"n_layer": 9_000}, "e+06 parameters or more, and the weights beside it are"),
    "more than a float holds": ("gpt2", {"n_layer": 10**400}, "its configuration has no usable sizes"),
    "labels": ("gpt2", {"num_labels": HUGE}, "num_labels as 1,000,000,000, and no model has more than 1,000,000"),
    "width": ("gpt2", {"n_embd": HUGE}, "parameters or more, and the weights beside it are"),
    "width of llama": ("llama", {"hidden_size": HUGE}, "parameters or more, and the weights beside it are"),
    "heads": ("llama", {"head_dim": HUGE}, "parameters or more, and the weights beside it are"),
    "mlp": ("gpt2", {"n_inner": HUGE}, "parameters or more, and the weights beside it are"),
    "words": ("llama", {"vocab_size": HUGE}, "parameters or more, and the weights beside it are"),
    "positions": ("gpt2", {"n_positions": HUGE}, "parameters or more, and the weights beside it are"),
}


def test_sizes_that_cannot_be_are_refused_before_anything_is_built(tmp_path):
    """In a process of their own, with a deadline: what is built for them takes minutes and all memory."""
    folders = []
    for number, (kind, change, _) in enumerate(TOO_LARGE.values()):
        saved(kind, tmp_path / str(number))
        path = tmp_path / str(number) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        folders.append(str(tmp_path / str(number)))
    code = (
        "import sys, headwise as hw\nfor one in sys.argv[1:]:\n try:\n  hw.load(one)\n"
        " except hw.errors.ModelError as error:\n  print(error)\n else:\n  print('opened')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=200, check=True
    )
    for line, (_, _, told) in zip(done.stdout.splitlines(), TOO_LARGE.values(), strict=True):
        assert line.startswith("cannot read the model in ")
        assert told in line


def test_sizes_of_a_model_that_stays_on_a_server_are_looked_at_too(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": HUGE}))
    with pytest.raises(ModelError, match="num_hidden_layers as 1,000,000,000, and no model has more than 10,000"):
        open_model("mine", str(folder), "local", None, False)


def test_a_model_that_takes_more_than_the_memory_is_refused(folder, monkeypatch):
    from headwise.interventions.base import memory

    monkeypatch.setattr(memory, "free_memory", lambda: 10_000)
    with pytest.raises(
        ModelError, match=r"its weights hold at least, as float32, takes 0\.\d MiB, and there is room for 0\.0 MiB"
    ):
        hw.load(folder)


def test_a_python_without_docstrings_is_refused_at_once(tmp_path):
    code = "import headwise as hw\nprint(hw.shipped())\nhw.load('words-2l')"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "['words-2l']\n"
    assert "ModelError: transformers reads docstrings to make a model, and python -OO (PYTHONOPTIMIZE=2)" in done.stderr
    listed = [sys.executable, "-OO", "-m", "headwise", "results", "ls", str(tmp_path)]
    done = subprocess.run(listed, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.endswith(": 0 results\n")


CACHED = """
import sys, time, headwise as hw
hw.load, hw.Model  # imports transformers
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        print(hw.load(name.removeprefix("remote:"), remote=name.startswith("remote:")))
    except hw.errors.ModelError as error:
        print(error)
    print(f"{time.monotonic() - began:.0f}")
"""


@pytest.fixture(params=["refuses", "never answers", "fails"])
def no_hub(request, tmp_path):
    """Runs `CACHED` where the Hub is not: lines and seconds, and how often the Hub was asked."""
    listening = socket.create_server(("127.0.0.1", 0))
    port, asked, held = listening.getsockname()[1], [], []

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            asked.append(connection)
            held.append(connection)
            if request.param == "fails":
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.close()

    if request.param == "refuses":
        listening.close()
    else:
        threading.Thread(target=serve, daemon=True).start()

    def run(*arguments):
        asked.clear()
        here = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf")}
        here = {name: value for name, value in here.items() if name != "HF_HUB_OFFLINE" and "proxy" not in name.lower()}
        done = subprocess.run(
            [sys.executable, "-c", CACHED, *arguments],
            env=here,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        said = done.stdout.splitlines()
        return said[::2], [int(one) for one in said[1::2]], len(asked)

    yield run
    listening.close()
    for connection in held:
        connection.close()


def test_without_the_hub_that_is_said_soon_and_what_was_fetched_before_is_opened(no_hub, folder, tmp_path):
    commit = "0123456789" * 4
    cached = tmp_path / "hf" / "hub" / "models--some--id"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / commit)
    (fetched, *never), seconds, asked = no_hub("some/id", "nobody/nothing", "remote:nobody/nothing")
    assert fetched == "<Model some/id (main): gpt2, 2 layers of 2 heads, float32 on cpu, runs here>"
    for line in never:
        assert line.startswith("cannot get nobody/nothing from the Hugging Face Hub: it cannot be reached (")
        assert "and this model was not fetched before; without the Hub use a local folder or a shipped model" in line
    assert asked <= 4, "once for each, and huggingface_hub may ask for itself"
    assert max(seconds) < 20, "trying each file again and again takes 29 s"
