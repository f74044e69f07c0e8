"""The logit lens against the model's own norm and unembedding, called on what plain hooks read."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from tests.oracles import raw_families, raw_paths
from tests.oracles.raw_direct import _last_norm, head_logits
from tests.oracles.raw_hooks import random_gpt2
from tests.oracles.raw_paths import Place

TASK = hw.RepeatedTokens(n=3, length=5, seed=2)
QUICK = ("pythia", "gemma")


@torch.no_grad()
def streams(module, tokens):
    """The logits of the stream before the first layer and after each, ``(layer + 1, example, position, token)``."""
    read = raw_paths.read if module.config.model_type == "gpt2" else raw_families.read
    layers = module.config.num_hidden_layers
    places = [Place(0, "resid_pre"), *(Place(layer, "resid_post") for layer in range(layers))]
    norm, unembed = _last_norm(module), module.lm_head
    return torch.stack([unembed(norm(read(module, tokens, place))) for place in places])


def check(module):
    model, batch = hw.load(module), TASK.draw(hw.load(module))
    logits = streams(module, torch.tensor(batch.runs["clean"]))
    targets = torch.tensor(batch.targets)
    loss = torch.nn.functional.cross_entropy(
        logits.movedim(-1, 1).flatten(3), targets.expand(logits.shape[:-1]), reduction="none"
    )
    ds = hw.logit_lens(model, TASK, top=3, metrics=["loss", "prob"])
    assert ds["token"].dims == ds["prob_of_token"].dims == ("layer", "example", "position", "rank")
    assert ds["layer"].values.tolist() == [-1, *model.layers]
    at = np.flatnonzero(batch.scored[0])
    assert ds["position"].values.tolist() == at.tolist()
    best = logits[:, :, at].topk(3)
    np.testing.assert_array_equal(ds["token_id"], best.indices)
    np.testing.assert_allclose(ds["logit"], best.values, atol=2e-4)
    np.testing.assert_allclose(ds["prob_of_token"], logits.softmax(-1).topk(3).values[:, :, at], atol=1e-5)
    np.testing.assert_allclose(ds["loss"], loss[:, :, at], atol=2e-4)
    own = hw.measure(model, TASK, None, "loss", per_position=True)["loss"].isel(position=at)
    np.testing.assert_allclose(ds["loss"].isel(layer=-1), own, atol=1e-4)


def check_heads(module):
    model, batch = hw.load(module), TASK.draw(hw.load(module))
    at = np.flatnonzero(batch.scored[0])
    logits = head_logits(module, torch.tensor(batch.runs["clean"]))[..., at, :]
    ds = hw.logit_lens(model, TASK, of="heads", top=3, metrics="prob")
    assert ds["token"].dims == ("layer", "head", "example", "position", "rank")
    assert ds["layer"].values.tolist() == [*model.layers]
    assert ds["head"].values.tolist() == [*model.heads]
    best = logits.topk(3)
    np.testing.assert_allclose(ds["logit"], best.values, atol=2e-4)
    said = logits.gather(-1, torch.tensor(ds["token_id"].values.astype(int)))
    np.testing.assert_allclose(said, best.values, atol=2e-4)  # where two are nearly equal, either comes first
    np.testing.assert_allclose(ds["prob_of_token"], logits.softmax(-1).topk(3).values, atol=1e-5)
    targets = torch.tensor(batch.targets)[:, at]
    prob = logits.softmax(-1).gather(-1, targets.expand(logits.shape[:-1])[..., None])[..., 0]
    np.testing.assert_allclose(ds["prob"], prob, atol=1e-5)
    shares = hw.direct_logit_attribution(model, TASK, "logit", per_position=True)["attribution"][:, :, at]
    answer = logits.gather(-1, targets.expand(logits.shape[:-1])[..., None])[..., 0].flatten(0, 1)
    if getattr(module.lm_head, "bias", None) is None:
        np.testing.assert_allclose(answer, shares[shares["kind"] == "head"], atol=2e-4)


FAMILIES = [pytest.param(one, marks=() if one in QUICK else pytest.mark.heavy) for one in raw_families.MODELS]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    check(raw_families.random_model(name))
    check_heads(raw_families.random_model(name))


def test_gpt2():
    check(random_gpt2(3, 4, 8, 40, 30))
    check_heads(random_gpt2(3, 4, 8, 40, 30))


def test_an_induction_head_says_the_answer(words_model):
    texts = ["apple banana cherry apple", "dog cat dog"]
    ds = hw.logit_lens(words_model, texts, of="heads", top=2, positions=-1)
    assert ds["token"].dims == ("layer", "head", "example", "rank")
    assert ds["token"].sel(layer=1, head=2, rank=0).values.tolist() == ["banana", "cat"]


def test_the_answer_appears_after_the_induction_heads(words_model):
    ds = hw.logit_lens(words_model, ["apple banana cherry apple", "dog cat dog"], top=2, positions=-1)
    assert ds["token"].dims == ("layer", "example", "rank")
    assert ds["token"].sel(layer=1, rank=0).values.tolist() == ["banana", "cat"]
    assert not set(ds["token"].sel(layer=0, rank=0).values) & {"banana", "cat"}
    assert ds["token"].sel(layer=1, rank=0).values.tolist() == (
        hw.predict(words_model, ["apple banana cherry apple", "dog cat dog"], top=1)["token"][:, 0].values.tolist()
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"metrics": ["kl"]}, "kl compares with the logits of the base run"),
        ({"metrics": ["induction"]}, "induction reads attention patterns"),
        ({"metrics": ["loss"], "positions": -1}, "positions=-1: metrics are of the scored positions"),
        ({"of": "neurons"}, "of='neurons': possible are 'stream' and 'heads'"),
        ({"top": 0}, "top, the number of tokens,"),
    ],
)
def test_what_cannot_be_is_refused(words_model, given, says):
    with pytest.raises(DeclarationError, match=says):
        hw.logit_lens(words_model, TASK, **given)


def test_an_answer_of_several_tokens_needs_a_position(words_model):
    task = hw.Prompts(["dog cat dog"], answers=["cat red"])
    with pytest.raises(DeclarationError, match="an answer has several tokens: say where"):
        hw.logit_lens(words_model, task)
    said = hw.logit_lens(words_model, task, top=3, positions=-1)["token_id"].sel(layer=1)
    np.testing.assert_array_equal(said, hw.predict(words_model, task, top=3)["token_id"])


def test_tokens_with_equal_logits_stand_once(words_model):
    """An ablated head gives every token the same logit."""
    lens = hw.logit_lens(words_model, "dog cat dog", of="heads", what=hw.ZeroAblate("L0H3"), top=5, positions=-1)
    ids = lens["token_id"].sel(layer=0, head=3).values.ravel()
    assert len(set(ids.tolist())) == 5
    np.testing.assert_allclose(lens["logit"].sel(layer=0, head=3), 0, atol=1e-6)


def test_the_bias_of_the_unembedding_is_no_heads_own():
    task = hw.Prompts([[1, 2, 3, 1, 2]])
    plain, biased = (random_gpt2(2, 2, 8, 40, 30) for _ in range(2))
    biased.lm_head.bias = torch.nn.Parameter(torch.arange(float(biased.config.vocab_size)))
    for of, same in (("heads", True), ("stream", False)):
        logits = [hw.logit_lens(hw.load(one), task, of=of, top=2, positions=-1)["logit"] for one in (plain, biased)]
        assert np.allclose(*logits, atol=1e-4) is same
    what = {"as it is": None}
    under = hw.logit_lens(hw.load(biased), task, of="heads", top=2, positions=-1, what=what)["logit"]
    wanted = hw.logit_lens(hw.load(plain), task, of="heads", top=2, positions=-1)["logit"]
    np.testing.assert_allclose(under.sel(condition="as it is"), wanted, atol=1e-4)


def test_positions_come_in_the_order_in_which_they_are_asked_for(words_model):
    lens = hw.logit_lens(words_model, "dog cat dog cat", top=1, positions=np.asarray([2, 0]))
    said = hw.predict(words_model, "dog cat dog cat", top=1, positions=[2, 0])
    assert lens["position"].values.tolist() == said["position"].values.tolist() == [2, 0]
    np.testing.assert_array_equal(lens["token_id"].sel(layer=1), said["token_id"])
