"""Prompts whose last word stood before: places by hand, losses against plain passes."""

import re

import numpy as np
import pytest
import torch

from headwise.errors import DeclarationError
from headwise.metrics.intervals import bootstrap_interval
from headwise.studies.text.own_prompts import own_prompts, parse, read_lines, replaced

TEXTS = ["apple banana cherry apple", "dog cat house tree dog", "red green blue river red"]


def test_places_of_the_first_occurrence(words_model):
    line = parse(words_model, "tree apple banana cherry apple")
    assert line.tokens == tuple(words_model.encode("tree apple banana cherry apple banana"))
    assert (line.start, line.first) == (1, 2)


def test_losses_are_those_of_plain_passes(words_model):
    ds = own_prompts(words_model, TEXTS, seed=0)
    lines = [parse(words_model, text) for text in TEXTS]

    def losses(tokens):
        with torch.no_grad():
            logits = words_model.module(torch.as_tensor([tokens])).logits[0].log_softmax(-1)
        return [np.nan] + [-float(logits[t - 1, tokens[t]]) for t in range(1, len(tokens))]

    whole = [losses(line.tokens) for line in lines]
    last = np.array([one[-1] for one in whole])
    first = np.array([one[line.first] for one, line in zip(whole, lines, strict=True)])
    changed = replaced(lines, 0)
    for line, new in zip(lines, changed, strict=True):
        places = [at for at, (a, b) in enumerate(zip(line.tokens, new, strict=True)) if a != b]
        assert places == [line.start, line.first]
    causal = np.array([losses(tokens)[-1] for tokens in changed]) - last
    assert ds["answer"].values.tolist() == ["banana", "cat", "green"]
    assert ds["loss"].values == pytest.approx(last, abs=1e-4)
    assert ds["prob"].values == pytest.approx(np.exp(-last), abs=1e-4)
    assert ds["gain"].values == pytest.approx(first - last, abs=1e-4)
    assert ds["causal_gain"].values == pytest.approx(causal, abs=1e-4)
    assert float(ds["mean_gain"]) == pytest.approx((first - last).mean(), abs=1e-4)
    ends = [float(ds[f"mean_gain_{end}"]) for end in ("low", "high")]
    assert ends == pytest.approx([*map(float, bootstrap_interval(first - last))], abs=1e-3)


def test_a_single_prompt_has_no_tokens_to_put_there(words_model):
    ds = own_prompts(words_model, TEXTS[:1], seed=0)
    assert np.isnan(ds["causal_gain"].values).all()
    assert np.isnan(ds["mean_gain_low"])
    assert float(ds["prob"][0]) > 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apple banana cherry", "its last word, 'cherry', does not stand in it before; give one prompt in a line"),
        ("apple", "its last word, 'apple', does not stand in it before"),
        ("apple zzz apple", "'zzz' is not in the vocabulary of words-2l"),
        ("apple " * 128, "and its answer have 129 tokens: words-2l reads at most 128"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(words_model, text, message):
    with pytest.raises(DeclarationError, match=re.escape(message)):
        parse(words_model, text)


def test_files_of_prompts(tmp_path):
    (tmp_path / "some.txt").write_text("one two one\n\n  three four three \n")
    assert read_lines(tmp_path / "some.txt") == ["one two one", "three four three"]
    (tmp_path / "none.txt").write_text(" \n")
    with pytest.raises(DeclarationError, match="holds no prompt: it holds one prompt in a line"):
        read_lines(tmp_path / "none.txt")
    with pytest.raises(DeclarationError, match="No such file or directory; it holds one prompt in a line"):
        read_lines(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "one two one\n\nPotter saw. Potter ran. Potter",
            "line 3: its last word, 'Potter', stands in it 2 times before, in front of 'saw.' and 'ran.'; give",
        ),
        ("a b c a b c a", "line 1: its last word, 'a', stands in it 2 times before, in front of 'b'; give"),
        ("one two one\ntwo two", "line 2: its last word, 'two', stands twice in a row; give"),
        ("one two\nb c b", "line 1: its last word, 'two', does not stand in it before; give"),
        ("a a\n" * 5, "line 1: its last word, 'a', stands twice in a row; line 2: its last word"),
        ("a a\n" * 5, "line 3: its last word, 'a', stands twice in a row; and 2 lines more; give"),
    ],
)
def test_lines_after_whose_word_no_one_token_followed_are_refused(text, message, tmp_path):
    (tmp_path / "some.txt").write_text(text)
    with pytest.raises(DeclarationError, match=re.escape(message)):
        read_lines(tmp_path / "some.txt")
