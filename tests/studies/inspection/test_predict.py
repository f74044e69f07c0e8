"""What a model says next, against its own forward pass and plain torch hooks."""

import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from tests.oracles.raw_hooks import random_gpt2

PROMPTS = ["apple banana cherry apple", "dog cat dog", "red green blue red"]


def logits_of(model, ids):
    with torch.no_grad():
        return model.module(torch.tensor([ids])).logits[0]


def expected(logits, top):
    """Tokens, logits and probabilities in falling order, from the definitions."""
    order = sorted(range(len(logits)), key=lambda token: -float(logits[token]))[:top]
    share = torch.exp(logits.double()) / torch.exp(logits.double()).sum()
    return order, [float(logits[one]) for one in order], [float(share[one]) for one in order]


def test_the_last_position_of_prompts_of_any_length(words_model):
    ds = hw.predict(words_model, PROMPTS, top=4)
    assert ds["token"].dims == ds["prob"].dims == ds["logit"].dims == ("example", "rank")
    for row, prompt in enumerate(PROMPTS):
        tokens, logits, probs = expected(logits_of(words_model, words_model.encode(prompt))[-1], 4)
        assert ds["token_id"][row].values.tolist() == tokens
        assert ds["token"][row].values.tolist() == words_model.token_text(tokens)
        np.testing.assert_allclose(ds["logit"][row], logits, atol=1e-4)
        np.testing.assert_allclose(ds["prob"][row], probs, atol=1e-5)
    assert ds["prompt"].values.tolist() == PROMPTS
    assert ds["token"][0, 0] == "banana"
    assert (ds["prob"].attrs["units"], ds["logit"].attrs["units"]) == ("1", "logit")


def test_under_interventions_and_without(words_model):
    what = {"clean": None, "without L0H3": hw.ZeroAblate("L0H3")}
    ds = hw.predict(words_model, PROMPTS, what, top=3)
    assert ds["token_id"].dims == ("condition", "example", "rank")
    assert ds["condition"].values.tolist() == list(what)
    bare = hw.predict(words_model, PROMPTS, top=3)
    np.testing.assert_array_equal(ds["token_id"].sel(condition="clean"), bare["token_id"])

    def without(module, args):
        z = args[0].clone()
        z[..., 24:32] = 0
        return (z,)

    hook = words_model.module.transformer.h[0].attn.c_proj.register_forward_pre_hook(without)
    try:
        for row, prompt in enumerate(PROMPTS):
            tokens, logits, _ = expected(logits_of(words_model, words_model.encode(prompt))[-1], 3)
            assert ds["token_id"].sel(condition="without L0H3")[row].values.tolist() == tokens
            np.testing.assert_allclose(ds["logit"].sel(condition="without L0H3")[row], logits, atol=1e-4)
    finally:
        hook.remove()


def test_several_positions(words_model):
    ds = hw.predict(words_model, PROMPTS[:1], top=2, positions=[0, 3])
    assert ds["token_id"].dims == ("example", "position", "rank")
    assert ds["position"].values.tolist() == [0, 3]
    assert ds["read_token"].values.tolist() == [["apple", "apple"]]
    every = hw.predict(words_model, PROMPTS, top=2, positions="all")
    for row, prompt in enumerate(PROMPTS):
        ids = words_model.encode(prompt)
        for at, logits in enumerate(logits_of(words_model, ids)):
            assert every["token_id"][row, at].values.tolist() == expected(logits, 2)[0]
        assert np.isnan(every["prob"][row, len(ids) :]).all()
        assert (every["token"][row, len(ids) :] == "").all()
    np.testing.assert_allclose(ds["logit"], every["logit"][:1, [0, 3]], atol=1e-5)


def test_any_task_and_token_ids():
    model = hw.load(random_gpt2(2, 4, 8, 40, 30))
    ds = hw.predict(model, [[5, 9, 11], [3, 4]], top=2)
    for row, ids in enumerate([[5, 9, 11], [3, 4]]):
        assert ds["token_id"][row].values.tolist() == expected(logits_of(model, ids)[-1], 2)[0]
    task = hw.RepeatedTokens(n=3, length=5)
    drawn = task.draw(model).runs
    for run in ("clean", "corrupted"):
        ds = hw.predict(model, task, top=1, run=run)
        tokens = [expected(logits_of(model, ids)[-1], 1)[0] for ids in drawn[run].tolist()]
        assert ds["token_id"].values.tolist() == tokens


def test_an_answer_is_no_part_of_what_is_read(words_model):
    task = hw.Prompts(["dog cat dog"], answers=["cat red"])
    tokens, _, _ = expected(logits_of(words_model, words_model.encode("dog cat dog"))[-1], 3)
    assert hw.predict(words_model, task, top=3)["token_id"].values.tolist() == [tokens]


def test_it_is_kept_and_read_back(words_model, tmp_path):
    ds = hw.predict(words_model, PROMPTS, {"none": hw.ZeroAblate("L0H3")}, top=2)
    ds.to_netcdf(tmp_path / "said.nc")
    back = hw.open_result(tmp_path / "said.nc")
    np.testing.assert_array_equal(back["token"], ds["token"])
    assert back.attrs["model"] == "words-2l"
    assert hw.from_json(back.attrs["task"]) == hw.Prompts(PROMPTS)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"top": 0}, "top, the number of tokens,"),
        ({"positions": [0, -1]}, "prompts of different lengths have no common end"),
        ({"top": 101}, "must be at most 100, got 101"),
        ({"positions": 9}, "positions=9: the shortest prompt has 3 tokens"),
        ({"positions": []}, "positions=.*: give"),
        ({"positions": "end"}, "positions='end': give"),
        ({"what": {"one": 3}}, "each condition must be an intervention, or None"),
        ({"run": "other"}, "other"),
    ],
)
def test_what_cannot_be_is_refused(words_model, given, says):
    with pytest.raises((DeclarationError, UnknownNameError), match=says):
        hw.predict(words_model, PROMPTS, **given)


def test_a_model_that_is_called_says_the_same(words_model):
    what = {"clean": None, "without L0H3": hw.ZeroAblate("L0H3")}
    said = words_model(PROMPTS, what, top=3, positions=[0])
    xr.testing.assert_equal(said, hw.predict(words_model, PROMPTS, what, top=3, positions=[0]))
    assert words_model("apple banana cherry apple", top=1)["token"].item() == "banana"
    with pytest.raises(DeclarationError, match="top"):
        words_model(PROMPTS, top=0)


@pytest.mark.parametrize("positions", [1.5, None, True, [0, 1.5], [], {"a"}, "none"])
def test_positions_that_are_none_are_refused(words_model, positions):
    with pytest.raises(DeclarationError, match="give a position, a list of them, or 'all'"):
        hw.predict(words_model, "dog cat dog", positions=positions)


def test_a_whole_number_of_numpy_is_a_position(words_model):
    said = hw.predict(words_model, "dog cat dog", positions=np.int64(-1))
    assert said["prob"].dims == ("example", "rank")
