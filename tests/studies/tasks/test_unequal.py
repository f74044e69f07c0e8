"""Lists of prompts of unequal length, text or conversations: every function gives what it gives of one prompt alone."""

import numpy as np
import pytest

import headwise as hw

TEXTS = [
    "import os, sys",
    "def name(self):\n    return self",
    "x = 1",
    "class Name:\n    def name(self):\n        pass",
]
TALKS = [[("user", text)] for text in TEXTS[:2]] + [[("system", TEXTS[2]), ("user", TEXTS[0])], [("user", "x = 2")]]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ANSWERS, WRONG = [" x", "\n", "\n", " +"], [" y", " ", "(", " -"]
AXES = ("position", "query", "key")
WITHOUT = hw.ZeroAblate("L0H6")
CALLS = {
    "measure": lambda model, task: hw.measure(model, task, WITHOUT, ["loss", "accuracy", "kl", "logit_diff"]),
    "by position": lambda model, task: hw.measure(model, task, WITHOUT, ["loss"], per_position=True),
    "attention": lambda model, task: hw.measure(model, task, None, ["previous_token", "prefix_matching"]),
    "gradient": lambda model, task: hw.measure(model, task, WITHOUT, ["logit_diff"], estimator="gradient"),
    "capture": lambda model, task: hw.capture(model, task, ["L1H6.pattern", "L1.resid_post", "logits at -1"]),
    "capture under": lambda model, task: hw.capture(model, task, ["L1H6.pattern", "L2H1.z"], what=WITHOUT),
    "predict": lambda model, task: hw.predict(model, task, top=2, positions="all"),
    "lens": lambda model, task: hw.logit_lens(model, task, top=2, what=WITHOUT),
    "attribution": lambda model, task: hw.direct_logit_attribution(model, task),
    "norms": lambda model, task: hw.weighted_value_norms(model, task, layers=1),
}


@pytest.fixture(scope="module")
def model():
    model = hw.load("code-4l")
    model.tokenizer.chat_template = TEMPLATE
    return model


def task(prompts, some):
    return hw.Prompts(
        [prompts[at] for at in some], answers=[ANSWERS[at] for at in some], distractors=[WRONG[at] for at in some]
    )


@pytest.mark.parametrize("prompts", [TEXTS, TALKS], ids=["text", "conversations"])
@pytest.mark.parametrize("name", CALLS)
def test_a_prompt_gives_alone_what_it_gives_in_a_list(model, prompts, name):
    lengths = task(prompts, range(4)).draw(model).lengths.tolist()
    assert len({*lengths}) >= 3
    together = CALLS[name](model, task(prompts, range(4)))
    compared = 0
    for at in range(4):
        alone = CALLS[name](model, task(prompts, [at]))
        exact = lengths.count(lengths[at]) == 1
        for variable in together.data_vars:
            if "example" not in together[variable].dims or together[variable].dtype.kind not in "fi":
                continue
            own, single = together[variable].isel(example=at), alone[variable].isel(example=0)
            longer = own.sel({dim: single[dim].values for dim in single.dims if dim in AXES})
            beyond = own.size - longer.size
            missing = own.isnull() | (own == -1)  # what is beyond the end of a prompt is missing, as text it is empty
            assert int(missing.sum()) - int((longer.isnull() | (longer == -1)).sum()) == beyond
            np.testing.assert_allclose(longer, single, rtol=0, atol=0 if exact else 1e-5)
            compared += int(single.notnull().sum())
    assert compared >= 8


def test_mean_ablation_of_a_list_takes_prompts_of_each_length(model):
    with pytest.raises(hw.errors.DeclarationError, match="at least two reference prompts of 3 tokens: give Prompts"):
        hw.measure(model, task(TEXTS, range(4)), hw.MeanAblate("L1H6"), "loss")
    others = [text.replace("1", "2").replace("name", "self").replace("os", "re") for text in TEXTS]
    assert [len(model.encode(text)) for text in others[1:3]] == [len(model.encode(text)) for text in TEXTS[1:3]]
    given = hw.Prompts(TEXTS[1:3], answers=ANSWERS[1:3], others=[*TEXTS[1:3], *others[1:3]])
    ds = hw.measure(model, given, hw.MeanAblate("L1H6"), "loss")
    for at in (1, 2):
        alone = hw.Prompts([TEXTS[at]], answers=[ANSWERS[at]], others=[TEXTS[at], others[at]])
        single = hw.measure(model, alone, hw.MeanAblate("L1H6"), "loss")["loss"]
        np.testing.assert_array_equal(ds["loss"].isel(example=at - 1), single.isel(example=0))
