"""Prompts from text that end where a pair recurs, against explicit loops over their tokens."""

import re

import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError
from headwise.studies.text.recurring import line_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words_model):
    """Files of random words in which blocks come twice."""
    root = tmp_path_factory.mktemp("recurring")
    words = [word for word in words_model.tokenizer.get_vocab() if word.isalpha()]
    random = np.random.default_rng(1)
    for name in "abcdefgh":
        text = []
        while len(text) < 400:
            block = [*random.choice(words, 6)]
            text += [*block, *random.choice(words, 5), *block[: random.integers(2, 6)], *random.choice(words, 3)]
        (root / f"{name}.txt").write_text(" ".join(text))
    return root


@pytest.fixture(scope="module")
def task(folder, words_model):
    return hw.recurring_prompts(words_model, folder, n=8, context=20, distance=5)


def test_each_prompt_ends_where_a_pair_recurs_that_stood_once(task):
    rows = zip(task.prompts, task.corrupted, task.answers, task.distractors, strict=True)
    for clean, other, (answer,), (distractor,) in rows:
        assert len(clean) == len(other) == 20
        whole = [*clean, answer]
        pairs = [at for at in range(len(clean) - 1) if whole[at : at + 2] == [clean[-1], answer]]
        assert len(pairs) == 1
        assert {whole[at + 1] for at in range(len(clean) - 1) if whole[at] == clean[-1]} == {answer}
        at = pairs[0]
        assert len(clean) - (at + 1) >= 5
        changed = [place for place in range(20) if clean[place] != other[place]]
        assert {*changed} <= {at, at + 1}
        assert not {clean[-1], answer} & {other[at], other[at + 1]}
        assert other[at + 1] == distractor != answer


def test_the_same_seed_draws_the_same_and_others_are_left(folder, words_model, task):
    again = hw.recurring_prompts(words_model, folder, n=8, context=20, distance=5)
    assert again == task
    assert hw.recurring_prompts(words_model, folder, n=8, context=20, seed=1) != task
    longer = hw.recurring_prompts(words_model, folder, n=16, context=20, distance=5)
    rest = hw.recurring_prompts(words_model, folder, n=8, context=20, distance=5, first=8)
    assert longer.prompts == task.prompts + rest.prompts
    assert not {*task.prompts} & {*rest.prompts}


def test_the_model_answers_in_the_clean_run_alone(words_model, task):
    values = hw.measure(words_model, task, None, "logit_diff", runs="all")["baseline_logit_diff"].mean("example")
    assert float(values.sel(run="clean")) > 4
    assert float(values.sel(run="corrupted")) < 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n": 10_000}, "windows of the text have a pair that recurs within 20 tokens, and 10000 are needed"),
        ({"n": 0}, "n, the number of prompts, must be 1 or more, got 0"),
        ({"distance": 1}, "distance, the tokens between the pairs, must be 2 or more, got 1"),
        ({"distance": 21}, "distance, the tokens between the pairs, must be"),
        ({"context": 200}, "context=200: words-2l reads at most 128 tokens"),
        ({"text": "nowhere"}, "text='nowhere': there is no such file or folder"),
    ],
)
def test_what_cannot_be_is_refused(folder, words_model, given, says):
    options = {"text": folder, "n": 4, "context": 20} | given
    with pytest.raises(DeclarationError, match=re.escape(says)):
        hw.recurring_prompts(words_model, options.pop("text"), **options)


def test_prompts_of_a_file_are_a_task(words_model, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("apple banana cherry apple\ndog cat house tree dog")
    task = line_prompts(words_model, path)
    encoded = [tuple(words_model.encode(text)) for text in ("apple banana cherry apple", "dog cat house tree dog")]
    assert task.prompts == tuple(encoded)
    assert task.answers == ((encoded[0][1],), (encoded[1][1],))
    for clean, other, (distractor,) in zip(task.prompts, task.corrupted, task.distractors, strict=True):
        assert clean[2:] == other[2:]
        assert not {*clean[:2]} & {*other[:2]}
        assert other[1] == distractor
    path.write_text("apple banana apple")
    with pytest.raises(DeclarationError, match="has no other prompt to take other tokens from"):
        line_prompts(words_model, path)
