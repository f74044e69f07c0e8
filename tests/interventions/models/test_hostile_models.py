"""Folders of models that bring code, or sizes that cannot be, are refused before anything is run or built."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import xarray as xr
from transformers import dynamic_module_utils

import headwise as hw
from headwise.errors import ModelError
from headwise.interventions import Head, ZeroAblate
from headwise.interventions.remote.backend import open_model
from headwise.studies import RepeatedTokens, measure
from headwise.studies.cli.main import main
from tests.support.saved_models import saved
from tests.support.workers import Here

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
@pytest.mark.parametrize("which", ["a kind of its own", pytest.param("a tokenizer", marks=pytest.mark.heavy)])
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
