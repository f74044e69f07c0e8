"""Conversations as prompts: the tokenizer's own template and tokens, labels, refusals, and what results hold."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from headwise.studies.reproduce.recipe import recipe
from headwise.studies.tasks import chat

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (  # as Llama 2: BOS, and the system message within the user's
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set start = messages[0].content + ': ' %}"
    "{% set messages = messages[1:] %}{% else %}{% set start = '' %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ start if loop.first else '' }}"
    "{{ message.content }} [/INST]{% elif message.role == 'assistant' %} {{ message.content }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "import os"},
    {"role": "user", "content": "def name(self):"},
    {"role": "assistant", "content": "return self"},
    {"role": "user", "content": "class Name:"},
]


def talking(template, **options):
    """code-4l with a chat template; with `bos`, a tokenizer that puts a BOS in front where it may."""
    model = hw.load("code-4l")
    model.tokenizer.chat_template = template
    if options.get("bos"):
        model.tokenizer.bos_token = "<|endoftext|>"
        model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        assert model.tokenizer("a")["input_ids"][0] == 0
    return model


@pytest.fixture(scope="module")
def model():
    return talking(CHATML)


def own_ids(model, messages, **options):
    """What transformers makes of messages."""
    options = {"add_generation_prompt": True} | options
    found = model.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(found["input_ids"])


def ids_of(model, prompts, **options):
    batch = hw.Prompts(prompts, **options).draw(model)
    return [row[:size].tolist() for row, size in zip(batch.runs["clean"], batch.lengths, strict=True)]


@pytest.mark.parametrize("template", [CHATML, INST])
@pytest.mark.parametrize("bos", [False, True])
def test_tokens_are_those_of_the_tokenizers_own_template(template, bos):
    model = talking(template, bos=bos)
    told = [TALK, TALK[1:], TALK[1:2]]
    assert ids_of(model, told) == [own_ids(model, messages) for messages in told]
    assert [row.count(0) for row in ids_of(model, told)] == [int(template == INST)] * 3  # and no second BOS
    going_on = TALK[:3]
    assert ids_of(model, [going_on]) == [
        own_ids(model, going_on, add_generation_prompt=False, continue_final_message=True)
    ]


def test_text_is_a_message_of_the_user_and_messages_are_written_in_several_ways(model):
    given = [
        hw.Chat("class Name:", system="import os"),
        hw.Chat([{"role": "system", "content": "import os"}, ("user", "class Name:")]),
        hw.Chat({"role": "user", "content": "class Name:"}, system="import os"),
        hw.Prompts([TALK[0], TALK[3]]).prompts[0],
        hw.Prompts([[TALK[0], TALK[3]]]).prompts[0],
        hw.Prompts([[("system", "import os"), ("user", "class Name:")]]).prompts[0],
    ]
    assert len({*given}) == 1
    assert given[0].messages == (("system", "import os"), ("user", "class Name:"))
    assert eval(repr(given[0]), {"Chat": hw.Chat}) == given[0]
    task = hw.Prompts([TALK, hw.Chat("self")], answers=[" a", " b"])
    assert hw.from_json(hw.to_json(task)) == task
    assert eval(repr(task), {"Chat": hw.Chat, "Prompts": hw.Prompts}) == task


def test_labels_say_what_each_token_holds(model):
    batch = hw.Prompts([TALK, TALK[1:2]]).draw(model)
    words = model.token_text(batch.runs["clean"][0].tolist())
    said = {label: "".join(words[at] for at in places[0]) for label, places in batch.labels.items()}
    assert said == {
        "template": "<|system|>\n\n<|user|>\n\n<|assistant|>\n\n<|user|>\n\n<|assistant|>\n",
        "system": "import os",
        "user": "def name(self):class Name:",
        "assistant": "return self",
    }
    assert [len(places[1]) > 0 for places in batch.labels.values()] == [True, False, True, False]
    every = sorted(at for places in batch.labels.values() for at in places[0])
    assert every == list(range(batch.lengths[0]))
    ds = hw.measure(model, hw.Prompts([TALK]), None, "loss")
    shown = ds["position_label"].values[0]
    assert ["".join(np.asarray(words)[shown == label]) for label in said] == [*said.values()]


def test_a_token_of_both_counts_to_the_message():
    model = talking("Q: {{ messages[0].content }}\n\nA:")
    batch = hw.Prompts([hw.Chat("name.")]).draw(model)
    (user,), words = batch.labels["user"], model.token_text(batch.runs["clean"][0].tolist())
    assert "".join(words[at] for at in user).strip() == "name."
    (rest,) = batch.labels["template"]
    assert sorted([*user, *rest]) == list(range(len(words)))


def test_a_message_is_found_where_the_template_trims_it(model):
    """The first is trimmed, and the line after it the template's; the second is a word of it; one is empty."""
    told = [("user", "  name\n"), ("assistant", "user"), ("user", ""), ("assistant", "|>")]
    rendered = hw.Chat(told).rendered(model)
    text = "<|user|>\nname\n<|assistant|>\nuser\n<|user|>\n\n<|assistant|>\n|>"
    assert rendered.text == text
    assert [part for part in rendered.parts if part[0] != "template"] == [
        ("user", "name"),
        ("assistant", "user"),
        ("assistant", "|>"),
    ]
    raw = talking("{% for m in messages %}{{ m.content | trim if m.role == 'user' else m.content }};{% endfor %}")
    assert hw.Chat([("system", " a "), ("user", " b ")]).rendered(raw).parts == (
        ("system", " a "), ("template", ";"), ("user", "b"), ("template", ";"))  # fmt: skip


def test_labels_are_left_out_where_they_cannot_be_known(model, monkeypatch):
    batch = hw.Prompts([hw.Chat("name")]).draw(talking("{{ messages[0].content | upper }}:"))
    assert batch.labels == {}
    assert len(hw.Chat("name").rendered(talking("{{ messages[0].content | upper }}:")).text) == 5


def test_sites_take_the_roles_and_equal_positions_by_hand(model):
    task = hw.Prompts([TALK[:2]], answers=["pass"])
    places = task.draw(model).labels["user"][0]
    site = hw.Head(1, 6).z
    by_label, by_hand = (hw.measure(model, task, hw.ZeroAblate(site.at(at)), "loss") for at in ("user", places))
    np.testing.assert_array_equal(by_label["loss"], by_hand["loss"])
    assert float(abs(by_label["loss"] - by_label["baseline_loss"].sel(run="clean")).max()) > 1e-4
    several = hw.Prompts([TALK, TALK[1:2]])
    with pytest.raises(UnknownNameError, match="no position has the label 'system'; the task has the labels"):
        hw.measure(model, several, hw.ZeroAblate(hw.Head(1, 6).z.at("system")), "loss")
    with pytest.raises(DeclarationError, match=re.escape("labels['user']: tokens of conversations have this label")):
        hw.Prompts([TALK], labels={"user": 0}).draw(model)
    own = hw.Prompts([TALK[:2]], labels={"first": 0}, bos=False).draw(model).labels
    assert own["first"] == [(0,)]
    assert {*own} == {"first", "template", "system", "user"}


def test_a_bos_is_put_in_front_only_where_the_template_writes_none():
    model = talking(CHATML, bos=True)
    (plain,), (front,) = ids_of(model, [TALK]), ids_of(model, [TALK], bos=True)
    assert front == [0, *plain]
    labels, shifted = (hw.Prompts([TALK], bos=bos).draw(model).labels for bos in (False, True))
    assert shifted["user"][0] == tuple(at + 1 for at in labels["user"][0])
    assert shifted["template"][0] == (0, *(at + 1 for at in labels["template"][0]))
    with pytest.raises(DeclarationError, match="template of code-4l writes the BOS itself: leave out bos=True"):
        hw.Prompts([TALK], bos=True).draw(talking(INST, bos=True))


def losses_alone(model, messages, answer):
    """Minus the summed log-probability of an answer after a conversation, by a plain pass."""
    prompt, more = own_ids(model, messages), model.tokenizer.encode(answer, add_special_tokens=False)
    with torch.no_grad():
        said = model.module(torch.tensor([prompt + more])).logits[0].log_softmax(-1)
    return -sum(float(said[len(prompt) - 1 + at, token]) for at, token in enumerate(more))


def test_losses_are_those_of_plain_passes(model):
    told, answers = [TALK, TALK[1:2], TALK[:2]], ["pass", "self", "x = 1"]
    ds = hw.measure(model, hw.Prompts(told, answers=answers), {"as it is": None}, "loss")
    expected = [losses_alone(model, *pair) for pair in zip(told, answers, strict=True)]
    assert ds["loss"].sel(condition="as it is").values == pytest.approx(expected, abs=1e-4)


def test_everything_that_takes_prompts_takes_messages(model):
    plain = hw.Prompts([own_ids(model, TALK)])
    assert model(TALK, top=2)["token"].equals(model(plain, top=2)["token"])
    assert model(TALK)["prompt"].item().startswith("<|system|>\nimport os\n<|user|>")
    site = hw.Head(1, 6).pattern
    (one,), (other,) = (hw.capture(model, task, site).data_vars.values() for task in (hw.Prompts(TALK), plain))
    np.testing.assert_array_equal(one, other)
    lens, same = (hw.logit_lens(model, task, top=1)["token_id"] for task in (hw.Prompts(TALK), plain))
    np.testing.assert_array_equal(lens, same)
    patched = hw.Prompts([TALK], answers=[" x"], corrupted=[[*TALK[:3], {"role": "user", "content": "class Self:"}]])
    with pytest.raises(DeclarationError, match=r"assistant|>.n' has 59 tokens, its corrupted one 60: make them equal"):
        patched.draw(model)
    patched = hw.Prompts([TALK], answers=[" x"], corrupted=[[*TALK[:3], {"role": "user", "content": "class Node:"}]])
    ds = hw.measure(model, patched, hw.Patch("L1H6"), "loss")
    assert ds["run"].values.tolist() == ["clean", "corrupted"]
    assert hw.plan(model, patched, hw.Patch("L1H6"), "loss").steps > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hw.Chat([]), "a conversation has at least one message: give Chat('text', system='text')"),
        (lambda: hw.Chat(3), "a conversation is text or messages, got 3"),
        (lambda: hw.Chat([{"role": "user"}]), "a message has role and content, got 'role'"),
        (lambda: hw.Chat([TALK[0] | {"name": "x"}]), "has role and content, got 'role', 'content' and 'name'"),
        (lambda: hw.Chat([{"role": "user", "content": 3}]), "role and content of a message are text, got ('user', 3)"),
        (lambda: hw.Chat(TALK, system="x"), "a conversation has one system message: give it as system=, or among"),
        (lambda: hw.Chat([("template", "x")]), "a role cannot be called 'template'"),
        (lambda: hw.Prompts([TALK, "text"]), "prompts mix text and conversations: give Chat('text') for a message"),
        (lambda: hw.Prompts([TALK], corrupted=["text"]), "prompts and corrupted mix text and conversations"),
        (lambda: hw.Prompts([TALK], runs={"a": ["text"]}), "prompts of the run a mix text and conversations"),
        (lambda: hw.Prompts([TALK], others=[[1, 2]]), "prompts and others mix text and token ids"),
        (lambda: hw.Prompts([TALK], answers=[3]), "prompts and answers mix text and token ids"),
        (lambda: hw.Prompts(["a"], answers=[TALK]), "answers are text, token ids, or lists of these"),
    ],
)
def test_what_is_no_conversation_is_refused(make, message):
    with pytest.raises(DeclarationError, match=re.escape(message)):
        make()


def test_templates_that_are_not_there_or_refuse_say_so(words_model, model):
    with pytest.raises(DeclarationError, match="words-2l has a tokenizer without chat template, so that no conv"):
        words_model([{"role": "user", "content": "dog"}])
    strict = talking(INST)
    with pytest.raises(DeclarationError, match="does not take a conversation of user, tool: only user and assistant"):
        hw.Prompts([[("user", "a"), ("tool", "b")]]).draw(strict)
    broken = talking("{{ messages[0].content.nothing.more }}")
    with pytest.raises(DeclarationError, match="the chat template of code-4l does not take a conversation of user: "):
        hw.Prompts([hw.Chat("a")]).draw(broken)
    several = talking({"tool_use": "a", "rag": "b"})
    with pytest.raises(DeclarationError, match="multiple chat templates with no default"):
        hw.Prompts([hw.Chat("a")]).draw(several)
    named = talking({"default": CHATML, "rag": "b"})
    assert ids_of(named, [TALK]) == ids_of(model, [TALK])


def test_a_result_holds_the_text_and_is_repeated_with_it(model, tmp_path, monkeypatch):
    task = hw.Prompts([TALK, TALK[1:2]], answers=["pass", "self"])
    ds = hw.measure(model, task, hw.ZeroAblate(hw.Head(1, 6).z.at("user")), "loss", out=tmp_path / "talk.nc")
    kept = json.loads(ds.attrs["task"])["prompts"]
    text = model.tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert "".join(part for _, part in kept[0]["parts"]) == text
    assert {one["template"] for one in kept} == {chat.template_hash(model)}
    same = hw.rerun(tmp_path / "talk.nc", model=model)
    assert (same.agrees, same.largest, same.notes) == (True, 0.0, ())
    for other in (talking(INST), talking(None)):
        again = hw.rerun(tmp_path / "talk.nc", model=other)
        assert (again.agrees, again.largest) == (True, 0.0)
        assert "another chat template than that of the file: the prompts are as the file holds them" in again.notes
    short = hw.predict(model, hw.Chat("self"), top=1)
    lines = recipe(short.attrs, short, "short.nc").python.splitlines()
    space = {"hw": hw, "model": model}
    exec("\n".join(line for line in lines if line.startswith(("task", "ds"))), space)
    assert space["ds"]["token"].equals(short["token"])
    looked = hw.predict(model, TALK, top=2)
    hw.write_netcdf(looked, tmp_path / "next.nc")
    assert hw.rerun(tmp_path / "next.nc", model=talking(None)).agrees
    page = hw.write_report(tmp_path / "talk.nc", tmp_path / "talk.html").read_text()
    assert "2 prompts of conversations, such as “import os def name(self): return self class Name:”" in page
    assert "2 prompts, such as 'import os def name(self):" in str(hw.summary(tmp_path / "talk.nc"))


def test_a_template_that_changes_makes_another_request(model, tmp_path):
    task = hw.Prompts([TALK], answers=["pass"])
    hw.measure(model, task, None, "loss", out=tmp_path / "talk.nc")
    again = hw.measure(talking(INST), task, None, "loss", out=tmp_path / "talk.nc")
    fresh = hw.measure(talking(INST), task, None, "loss")
    np.testing.assert_array_equal(again["loss"], fresh["loss"])
    assert "".join(again["token"].values[0]).startswith("<|endoftext|>[INST]")


def test_the_template_is_asked_once_where_it_tells_the_time():
    """Templates of Llama 3 write today's date: the tokens of a call, and those that it stores, are of one moment."""
    model = talking("{{ strftime_now('%f') }}: {{ messages[0].content }}")
    ds = hw.measure(model, hw.Prompts([hw.Chat("name")]), None, "loss")
    (kept,) = json.loads(ds.attrs["task"])["prompts"]
    assert "".join(part for _, part in kept["parts"]) == "".join(ds["token"].values[0])


def test_workers_get_the_text_and_ask_no_template(model, tmp_path):
    """A worker opens the model by its name, whose tokenizer has no template."""
    task = hw.Prompts([TALK, TALK[1:2]], answers=["pass", "self"])
    what = hw.Grid(lambda head: hw.ZeroAblate(hw.Head(1, head).z.at("user")), head=model.heads)
    with ThreadPoolExecutor(1) as pool:
        there = hw.measure(model, task, what, "loss", executor=pool)
    np.testing.assert_array_equal(there["loss"], hw.measure(model, task, what, "loss")["loss"])
