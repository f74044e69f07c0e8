"""The script that makes the shipped model: seeded, whole, and its checkpoints are what they say."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import headwise as hw
from headwise.interventions.models.locate import SHIPPED
from headwise.metrics import accuracy
from headwise.studies import RepeatedTokens, measure
from headwise.studies.analyses.heads import head_scores

training = pytest.importorskip(
    "headwise.studies.training.words_2l", reason="needs the extra train", exc_type=ImportError
)
WORDS = SHIPPED / "words-2l"


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Two short runs of the same seed, and one of another."""
    threads = torch.get_num_threads()
    folders = [tmp_path_factory.mktemp("trained") for _ in range(3)]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        training.train(folder, training.Recipe(steps=20, seed=seed, threads=1, tokens=512), progress=False)
    torch.set_num_threads(threads)
    return folders


def test_the_same_seed_gives_the_same_weights(twice):
    one, same, other = (load_file(folder / "model.safetensors") for folder in twice)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_trained_as_a_plain_loop_trains_it(twice):
    """The recipe without Lightning: to the last bit the weights that the script gives."""
    recipe = training.Recipe(steps=20, threads=1, tokens=512)
    vocab = len(training.build_tokenizer())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = training.build_model(vocab, recipe).train()
    late = torch.arange(64) >= 24  # of layer 1, the heads from 3 on do not learn before step 700
    adam = torch.optim.AdamW(model.parameters(), 4e-3, (0.9, 0.98), eps=3e-4, weight_decay=0.01)
    data = training.RepeatData(vocab, recipe)
    for step in range(20):
        for group in adam.param_groups:
            group["lr"] = 4e-3 * float(np.interp(step, [0, 50, 12, 20], [0.02, 1.0, 1.0, 0.05]))
        tokens, counted = data[step]
        hidden = model.transformer(tokens).last_hidden_state[:, :-1][counted[:, 1:]]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), tokens[:, 1:][counted[:, 1:]])
        adam.zero_grad()
        loss.backward()
        attention = model.transformer.h[1].attn
        attention.c_attn.weight.grad[:, late.repeat(3)] = 0
        attention.c_attn.bias.grad[late.repeat(3)] = 0
        attention.c_proj.weight.grad[late] = 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    torch.set_num_threads(threads)
    found = load_file(twice[0] / "checkpoints.safetensors")
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(found[f"step000020/{name}"], value.half()), name


def test_what_it_writes_is_a_model_with_checkpoints(twice):
    folder = twice[0]
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "words.txt",
    }
    assert not [path for path in folder.iterdir() if path.is_dir()]
    assert hw.checkpoint_steps(folder) == [0, 8, 16, 20]
    model = hw.load(folder)
    tokens = torch.arange(2, 12)[None]
    last = hw.load(folder, step=20)
    torch.testing.assert_close(model.module(tokens).logits, last.module(tokens).logits, atol=1e-5, rtol=1e-5)


def test_batches_repeat_what_they_say_they_repeat():
    tokens, predictable = training.make_batch(np.random.default_rng(0), 40, 64, 857, training.Recipe())
    tokens, predictable = tokens.numpy(), predictable.numpy()
    for row, marks in zip(tokens, predictable, strict=True):
        seen = set()
        for t in range(1, len(row)):
            pair = (row[t - 1], row[t])
            assert marks[t] == (pair in seen)
            seen.add(pair)
    assert 0.3 < predictable.mean() < 0.9
    assert 0.1 < (tokens[:, 0] == 0).mean() < 0.4


def test_shipped_checkpoints_end_in_the_shipped_weights_and_show_the_circuit_form(words_model):
    steps = hw.checkpoint_steps("words-2l")
    assert 15 <= len(steps) <= 25
    assert steps[0] == 0
    task = RepeatedTokens(n=16)
    found = {}
    for step in (steps[0], 256, 480, steps[-1]):
        model = hw.load("words-2l", step=step)
        scores = head_scores(model, task).mean("example")
        right = measure(model, task, None, [accuracy])["baseline_accuracy"].sel(run="clean")
        found[step] = (float(right.mean()), float(scores["induction"].max()), float(scores["previous_token"].max()))
    assert found[0][0] < 0.05
    assert found[256][1] < 0.2 < found[480][1] < found[steps[-1]][1]
    assert found[steps[-1]][0] > 0.95
    final = hw.load("words-2l", step=steps[-1]).module.state_dict()
    shipped = words_model.module.state_dict()
    assert all(torch.equal(final[name], shipped[name]) for name in shipped)


def test_the_card_tells_the_configuration():
    config = json.loads((WORDS / "config.json").read_text())
    card = (WORDS / "README.md").read_text()
    heads, width = config["n_head"], config["n_embd"]
    assert f"{config['n_layer']} layers, {heads} heads of width {width // heads}, residual width {width}" in card
