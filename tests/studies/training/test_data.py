"""Training data: which sequences, in which order, with any number of workers and from the middle of an epoch."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError


def batches(data):
    data.setup("fit")
    return list(data.train_dataloader())


def test_repeated_tokens_are_distinct_and_repeat():
    data = hw.RepeatedTokensData(length=7, vocabulary=20, batch_size=4, size=12, validation=6, seed=3)
    train, check = torch.cat(batches(data)), torch.cat(list(data.val_dataloader()))
    for tokens, count in ((train, 12), (check, 6)):
        assert tokens.shape == (count, 14)
        assert torch.equal(tokens[:, :7], tokens[:, 7:])
        assert all(len(set(row[:7].tolist())) == 7 for row in tokens)
        assert tokens.min() >= 0
        assert tokens.max() < 20
    rows = [tuple(row) for row in torch.cat([train, check]).tolist()]
    assert len({*rows}) == 18


def test_an_epoch_holds_every_sequence_once_in_an_order_of_its_own():
    data = hw.RepeatedTokensData(length=3, vocabulary=50, batch_size=5, size=20)
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append([tuple(row) for batch in loader for row in batch.tolist()])
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(tuple(data.sequence(number, False)) for number in range(20))


def test_workers_and_a_middle_make_no_difference():
    alone = hw.RepeatedTokensData(length=3, vocabulary=50, batch_size=4, size=16)
    wanted = batches(alone)
    shared = hw.RepeatedTokensData(length=3, vocabulary=50, batch_size=4, size=16, num_workers=1)
    assert all(torch.equal(one, two) for one, two in zip(batches(shared), wanted, strict=True))
    loader = alone.train_dataloader()
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    assert state == {"given": 2}
    again = alone.train_dataloader()
    again.load_state_dict(state)
    assert all(torch.equal(one, two) for one, two in zip(list(again), wanted[2:], strict=True))
    assert len(list(again)) == 4


def test_text_is_cut_into_sequences_with_the_end_between_texts(tmp_path, words_model):
    tokenizer = words_model.tokenizer
    one, two = "apple banana cherry apple", "cat dog"
    ids = [*tokenizer.encode(one), 0, *tokenizer.encode(two), 0]
    data = hw.TextData([one, two], tokenizer, length=2, batch_size=1, share=0.25)
    assert (data.size, data.validation) == (3, 1)
    np.testing.assert_array_equal(np.stack([data.sequence(n, False) for n in range(3)]).ravel(), ids[:6])
    np.testing.assert_array_equal(data.sequence(0, True), ids[6:8])
    (tmp_path / "a.txt").write_text(one)
    (tmp_path / "b.txt").write_text(two)
    np.testing.assert_array_equal(hw.TextData(tmp_path, tokenizer, length=2).tokens.ravel(), ids)


def test_a_mixture_draws_its_parts_as_often_as_said():
    parts = [hw.RepeatedTokensData(length=4, vocabulary=size) for size in (8, 500)]
    data = hw.MixedData(parts, weights=[3, 1], batch_size=50, size=400, validation=10)
    tokens = torch.cat(batches(data))
    small = (tokens < 8).all(1).float().mean()
    assert 0.68 < small < 0.82  # 300 of 400 are due; 4 standard deviations are 35
    assert torch.equal(tokens[:, :4], tokens[:, 4:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hw.RepeatedTokensData(length=9, vocabulary=8), "length=9 needs as many different tokens: there are 8"),
        (lambda: hw.RepeatedTokensData(length=9, batch_size=0), "batch_size"),
        (lambda: hw.MixedData([], []), r"weights=\[\] of 0 parts"),
        (
            lambda: hw.MixedData([hw.RepeatedTokensData(length=n, vocabulary=9) for n in (2, 3)], [1, 1]),
            r"sequences of \[4, 6\] tokens: give them one length",
        ),
        (
            lambda: hw.TextData("nowhere.txt", hw.load("words-2l").tokenizer),
            r"nowhere\.txt: there is no such text file",
        ),
        (
            lambda: hw.TextData(["apple"], hw.load("words-2l").tokenizer, length=9),
            "the text has 2 tokens: sequences of 9",
        ),
        (lambda: hw.CausalLM({"n_layer": 2}), "its configuration as a mapping with model_type"),
        (lambda: hw.CausalLM.tiny(schedule="steep"), "schedule='steep': possible are constant, linear and cosine"),
        (lambda: hw.CausalLM.tiny(heads=3, width=8), "width=8 is no multiple of heads=3"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(DeclarationError, match=message):
        make()
