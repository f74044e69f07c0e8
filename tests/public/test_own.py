"""What is brought along: a table of prompts, a model in memory, a metric from a function, a task; five lines each."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import headwise as hw


def test_a_pandas_table_of_prompts(words_model):
    model = words_model
    table = pd.DataFrame({"text": ["apple banana cherry apple", "dog cat dog"], "answer": ["banana", "cat"]})
    task = hw.Prompts(table["text"], answers=table["answer"])
    ds = hw.measure(model, task, {"none": hw.ZeroAblate("L1H2")}, [hw.metrics.loss], progress=False)
    table = table.join(ds["loss"].to_dataset("condition").to_dataframe())
    assert table.columns.tolist() == ["text", "answer", "none"]
    np.testing.assert_array_equal(table["none"], ds["loss"][0])
    assert task == hw.Prompts(["apple banana cherry apple", "dog cat dog"], ["banana", "cat"])


def test_a_model_in_memory():
    module = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=60))
    model = hw.load(module)  # tokenizer=... where prompts are text
    task = hw.Prompts([[5, 9, 11]], answers=[33])
    ds = hw.measure(model, task, hw.ZeroAblate("L1H2"), [hw.metrics.loss], progress=False)
    assert float(ds["loss"][0]) == pytest.approx(np.log(60), abs=0.5)  # untrained: about chance
    assert ds["token"].values.tolist() == [["5", "9", "11"]]


def test_a_metric_from_a_function(words_model):
    model = words_model

    def entropy(logits):
        return -(logits.log_softmax(-1) * logits.softmax(-1)).sum(-1)

    card = hw.metrics.Card("entropy", "entropy of the next token", "nat", (0, np.log(model.shape.vocabulary)), "")
    metric = hw.metrics.Metric(card, "logits", entropy, lambda prompts: {})
    ds = hw.measure(model, hw.Prompts("apple banana apple", "banana"), hw.ZeroAblate("L1H2"), metric, progress=False)
    logits = model.module(torch.tensor([model.encode("apple banana apple")])).logits[0, -1].detach()
    wanted = float(entropy(logits))
    assert float(ds["baseline_entropy"].sel(run="clean")[0]) == pytest.approx(wanted, abs=1e-5)


class Counting:
    """The tokens 2 to 11, twice; every next token is scored."""

    def draw(self, model):
        return hw.Prompts(np.tile(np.arange(2, 12), (1, 2))).draw(model)

    reference = draw


def test_a_task(words_model):
    ds = hw.measure(words_model, Counting(), hw.ZeroAblate("L1H2"), [hw.metrics.accuracy], progress=False)
    wanted = hw.Prompts([[*range(2, 12), *range(2, 12)]])
    known = hw.measure(words_model, wanted, hw.ZeroAblate("L1H2"), [hw.metrics.accuracy], progress=False)
    np.testing.assert_array_equal(ds["accuracy"], known["accuracy"])
    assert float(ds["baseline_accuracy"].mean()) > 0.3
