"""What parts write and runs differ in, on a server: the numbers of this machine, and nothing else comes back."""

import numpy as np
import pytest

import headwise as hw

TASK = hw.RepeatedTokens(n=8, length=10)
WHAT = {"clean": None, "head": hw.ZeroAblate("L0H3"), "end": hw.Add("L1.resid_post", [0.1] * 64)}
ASKED = {
    "neurons": (lambda model: hw.direct_logit_attribution(model, TASK, parts=hw.Layer(1)), 129 + 1),
    "some": (lambda model: hw.direct_logit_attribution(model, TASK, parts=["L0N3", "L1N7", "L1H2"]), 2 + 20 + 1),
    "under": (lambda model: hw.direct_logit_attribution(model, TASK, what=WHAT), 3 * (2 + 2 * 9 + 2 + 1)),
    "lens under": (lambda model: hw.logit_lens(model, TASK, top=1, what=WHAT), 3 * 3 * 3 + 3),
    "heads": (lambda model: hw.logit_lens(model, TASK, of="heads", top=1), 2 * 8 * 3),
}
"""What is asked for, and how many numbers of each scored position come back."""


@pytest.fixture
def there(server):
    return hw.load("words-2l", remote=True)


def sent(server, there, call):
    """What a call gives, and the bytes of its answers."""
    there.identity  # noqa: B018
    hw.predict(there, "dog cat dog", top=1, positions=-1)  # the self-check is done
    before = len(server.lines("sent"))
    found = call(there)
    return found, sum(line["bytes"] for line in server.lines("sent")[before:])


@pytest.mark.parametrize("name", ASKED)
def test_parts_and_heads(there, words_model, server, name):
    call, numbers = ASKED[name]
    found, size = sent(server, there, call)
    wanted = call(words_model)
    assert list(found) == list(wanted)
    for variable in wanted:
        if wanted[variable].dtype == object:
            np.testing.assert_array_equal(found[variable], wanted[variable])
        else:
            np.testing.assert_allclose(found[variable], wanted[variable], rtol=1e-5, atol=1e-5)
    assert size < 4 * numbers * int(TASK.draw(words_model).scored.sum()) + 6_000


def test_conversations_are_written_here(there, words_model, server):
    template = "{% for m in messages %}{{ 'red' if m.role == 'user' else 'green' }} {{ m.content }} {% endfor %}blue"
    here = hw.load("words-2l")
    here.tokenizer.chat_template = there.tokenizer.chat_template = template
    told = [hw.Chat("dog cat dog", system="tree house"), hw.Chat("apple banana cherry apple")]
    task, what = hw.Prompts(told, answers=["cat", "banana"]), hw.ZeroAblate(hw.Head(1, 2).z.at("user"))
    found, wanted = (hw.measure(model, task, what, "loss") for model in (there, here))
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5, atol=1e-5)
    assert found["position_label"].values[0].tolist() == wanted["position_label"].values[0].tolist()
    assert found["position_label"].values[0].tolist() == [
        "template",
        "system",
        "system",
        "template",
        "user",
        "user",
        "user",
        "template",
    ]
    assert found["token"].values[1].tolist()[:6] == ["red", "apple", "banana", "cherry", "apple", "blue"]


def test_the_difference_is_one_vector_a_layer(there, words_model, server):
    sites = [hw.Layer(layer).resid_post for layer in words_model.layers]
    found, size = sent(server, there, lambda model: hw.difference(model, TASK, sites))
    np.testing.assert_allclose(found, hw.difference(words_model, TASK, sites), atol=1e-6)
    assert size < 2 * 64 * 4 + 4_000
    ds = hw.measure(there, TASK, hw.Add("L1.resid_post", found.sel(layer=1)), "loss")
    wanted = hw.measure(words_model, TASK, hw.Add("L1.resid_post", found.sel(layer=1)), "loss")
    np.testing.assert_allclose(ds["loss"], wanted["loss"], rtol=1e-6, atol=1e-5)


def test_norms_of_weighted_values(there, words_model, server):
    found, size = sent(server, there, lambda model: hw.weighted_value_norms(model, TASK, layers=[1]))
    np.testing.assert_allclose(found["norm"], hw.weighted_value_norms(words_model, TASK, layers=[1])["norm"], atol=1e-5)
    assert size < 8 * 8 * 20 * 20 * 4 + 4_000
    entropy = hw.measure(there, TASK, None, "attention_entropy")["attention_entropy"]
    here = hw.measure(words_model, TASK, None, "attention_entropy")["attention_entropy"]
    np.testing.assert_allclose(entropy, here, atol=1e-5)
