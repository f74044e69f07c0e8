"""How text is cut into windows: checked against slices of the encoded files."""

import re
from dataclasses import replace

import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError
from headwise.studies.text.windows import windows

WORDS = ["apple", "banana", "cherry", "dog", "cat", "house", "tree", "river", "stone", "bread"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of 23, 9 and 40 words, one in a folder, beside one that is hidden."""
    root = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    (root / "sub").mkdir()
    for name, size in (("a.txt", 23), ("sub/b.py", 9), ("c.txt", 40)):
        (root / name).write_text(" ".join(random.choice(WORDS, size)))
    (root / ".hidden").write_bytes(b"\xff\xfe")
    return root


def test_windows_are_slices_of_single_files(words_model, folder):
    cut = windows(words_model, folder, context=5, n=100)
    expected = []
    for name in ("a.txt", "c.txt", "sub/b.py"):
        ids = words_model.encode((folder / name).read_text())
        expected += [(name, start, ids[start : start + 5]) for start in range(0, len(ids), 5) if start + 5 <= len(ids)]
    found = list(zip(cut.files, cut.starts.tolist(), cut.tokens.tolist(), strict=True))
    assert found == expected
    assert len(expected) == cut.possible == 4 + 8 + 1
    assert cut.texts[0].tolist() == (folder / "a.txt").read_text().split()[:5]


def test_a_seed_draws_some_and_the_rest_are_the_reference(words_model, folder):
    every = {tuple(row) for row in windows(words_model, folder, context=5, n=100).tokens.tolist()}
    some, same, other = (windows(words_model, folder, context=5, n=4, seed=seed) for seed in (3, 3, 4))
    assert (some.tokens == same.tokens).all()
    assert not np.array_equal(some.tokens, other.tokens)
    drawn = {tuple(row) for row in some.tokens.tolist()}
    others = [tuple(row) for row in some.others.tolist()]
    assert len(drawn) == 4
    assert {*others[:9]} == every - drawn
    assert {*others[9:]} == drawn  # 9 are fewer than 32


def test_windows_are_a_task_that_scores_every_next_token(words_model, folder):
    cut = windows(words_model, folder, context=5, n=3)
    loss = hw.measure(words_model, cut, None, "loss", per_position=True)["loss"]
    logits = words_model.module(words_model.module.dummy_inputs["input_ids"].new_tensor(cut.tokens)).logits
    probabilities = logits.log_softmax(-1).detach()
    for row, tokens in enumerate(cut.tokens):
        for position in range(4):
            expected = -float(probabilities[row, position, tokens[position + 1]])
            assert float(loss[row].sel(position=position)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("nowhere", {}, "text='nowhere': there is no such file or folder"),
        (None, {}, "words-2l has no folder held_out with text that it has not read: give text="),
        ("", {"context": 41}, "has 0 windows of 41 tokens, and two are needed: its longest file, c.txt, has 40 tokens"),
        ("", {"context": 3}, "context, the tokens of a window, must be 4 or more, got 3"),
        ("", {"context": 129}, "context=129: words-2l reads at most 128 tokens"),
        ("", {"n": 1}, "n, the number of windows, must be 2"),
        (".hidden", {}, ".hidden is no text in UTF-8"),
    ],
)
def test_what_cannot_be_cut_is_refused(words_model, folder, text, options, message):
    given = text if text is None or text == "nowhere" else folder / text
    with pytest.raises(DeclarationError, match=re.escape(message)):
        windows(words_model, given, **{"context": 5} | options)


def test_words_that_a_model_lacks_are_named(words_model, tmp_path):
    (tmp_path / "text.txt").write_text("apple zzz banana yyy zzz")
    message = "text.txt has 2 words that are not in the vocabulary of words-2l, such as 'zzz', 'yyy'"
    with pytest.raises(DeclarationError, match=message):
        windows(words_model, tmp_path / "text.txt", context=4)
    with pytest.raises(DeclarationError, match="opened without a tokenizer"):
        windows(replace(words_model, tokenizer=None), tmp_path / "text.txt")
