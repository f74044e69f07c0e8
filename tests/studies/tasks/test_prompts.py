"""Prompts as text and as token ids, answers of several tokens, and labelled positions, against plain forward passes."""

import copy

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from headwise.interventions import Add, Head, Knockout, Layer, MeanAblate, Patch, PathPatch, ResampleAblate, ZeroAblate
from headwise.interventions.run.deferred import derangement
from headwise.interventions.run.outcome import Inputs
from headwise.metrics import accuracy, kl, logit_diff, loss, prob, rank
from headwise.studies import Prompts, capture, measure
from headwise.studies.storage import pass_store
from headwise.studies.storage.registry import from_json, to_json
from headwise.studies.tasks.tasks import reference_tokens
from tests.oracles import raw_hooks

IDS = [[5, 9, 11, 5], [7, 3], [2, 4, 6, 8]]
OTHERS = [[5, 9, 12, 5], [7, 1], [2, 4, 9, 8]]
ANSWERS = [[33, 8, 9], [9], [3, 1]]
WRONG = [[12, 40], [30], [41, 7, 7, 2]]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def exact(small_model):
    """The module of `small_model` in double precision."""
    return copy.deepcopy(small_model.module).double()


def log_probs(module, prompt, answer, edits):
    """Log-probability of each token of an answer after those before it, and whether it has the largest logit."""
    found = []
    for at, token in enumerate(answer):
        before = torch.tensor([[*prompt, *answer[:at]]])
        logits = raw_hooks.run(module, before, edits(before))[0, -1]
        found.append((float(logits.log_softmax(-1)[token]), bool(logits.argmax() == token)))
    return found


def wanted(module, prompts, edits):
    """What the docstring of `Prompts` defines: loss, prob, accuracy and logit_diff of each prompt."""
    rows = []
    for number, (prompt, answer, wrong) in enumerate(zip(prompts, ANSWERS, WRONG, strict=True)):
        right = log_probs(module, prompt, answer, lambda before, at=number: edits(before, at))
        rival = log_probs(module, prompt, wrong, lambda before, at=number: edits(before, at))
        total = sum(one for one, _ in right)
        difference = total - sum(one for one, _ in rival)
        rows.append((-total, np.exp(total), float(all(best for _, best in right)), difference))
    return np.array(rows).T


def edits_of(module, name):
    """`CONDITIONS` for raw hooks: functions of the tokens up to the next one, and of the number of the prompt."""

    def last(before, at):
        return [raw_hooks.zero_edit("z", 0, 1, (len(IDS[at]) - 1,))]

    def everywhere(before, at):
        return [raw_hooks.zero_edit("z", 1, 2)]

    def patched(before, at):
        other = torch.tensor([[*OTHERS[at], *before[0, len(IDS[at]) :].tolist()]])
        return [raw_hooks.patch_edit(raw_hooks.activation(module, other, "resid_pre", 1), "resid_pre", 1)]

    return {"last": last, "everywhere": everywhere, "patched": patched, None: lambda before, at: []}[name]


CONDITIONS = {
    "last": ZeroAblate(Head(0, 1).z.at(-1)),
    "everywhere": ZeroAblate(Head(1, 2)),
    "patched": Patch(Layer(1).resid_pre),
}


def test_answers_of_several_tokens_against_plain_passes(small_model, exact):
    task = Prompts(IDS, answers=ANSWERS, distractors=WRONG, corrupted=OTHERS)
    ds = measure(small_model, task, CONDITIONS, [loss, prob, accuracy, logit_diff], **QUIET)
    names = ("loss", "prob", "accuracy", "logit_diff")
    for condition in CONDITIONS:
        for name, values in zip(names, wanted(exact, IDS, edits_of(exact, condition)), strict=True):
            np.testing.assert_allclose(ds[name].sel(condition=condition), values, atol=2e-4, rtol=2e-5, err_msg=name)
    for run, prompts in {"clean": IDS, "corrupted": OTHERS}.items():
        for name, values in zip(names, wanted(exact, prompts, edits_of(exact, None)), strict=True):
            np.testing.assert_allclose(ds[f"baseline_{name}"].sel(run=run), values, atol=2e-4, rtol=2e-5, err_msg=name)
    assert ds.sizes["example"] == 3
    assert ds["loss"].attrs["long_name"] == "cross-entropy of the answer"
    assert ds["loss"].attrs["references"] == "summed over its tokens"
    alone = measure(small_model, Prompts(IDS, answers=ANSWERS, corrupted=OTHERS), CONDITIONS, loss, **QUIET)
    np.testing.assert_allclose(alone["loss"], ds["loss"], atol=1e-5)


def test_a_distractor_of_several_tokens_alone(small_model, exact):
    """Then the sequences are compared too; an answer of one token keeps its loss."""
    one = Prompts([[5, 9, 11]], answers=[33], distractors=[[4]])
    two = Prompts([[5, 9, 11]], answers=[33], distractors=[[4, 2]])
    short, long = (measure(small_model, task, None, [loss, logit_diff], **QUIET) for task in (one, two))
    np.testing.assert_allclose(long["baseline_loss"], short["baseline_loss"], atol=1e-6)
    second = log_probs(exact, [5, 9, 11, 4], [2], lambda before: [])[0][0]
    np.testing.assert_allclose(long["baseline_logit_diff"], short["baseline_logit_diff"] - second, atol=1e-4)


def test_one_answer_of_several_tokens_changes_no_other_logit_difference(small_model):
    """For one token each, the difference of log-probabilities is the difference of logits."""
    mixed = Prompts(IDS, answers=[[33, 8, 9], 9, 3], distractors=[12, 30, 41])
    plain = Prompts(IDS, answers=[33, 9, 3], distractors=[12, 30, 41])
    found, known = (measure(small_model, task, CONDITIONS["last"], logit_diff, **QUIET) for task in (mixed, plain))
    said = [
        str(hw.plan(small_model, task, None, logit_diff, timed=False)).partition("\n")[0] for task in (mixed, plain)
    ]
    assert said[0].endswith("on 3 prompts of the clean run, each with its answer and with its distractor: 6 rows")
    assert said[1].endswith("on 3 prompts of the clean run")
    np.testing.assert_allclose(found["logit_diff"][1:], known["logit_diff"][1:], atol=1e-5)
    assert not np.isclose(found["logit_diff"][0], known["logit_diff"][0])


def test_answers_keep_their_values_in_a_file_and_position_by_position(words_model, tmp_path):
    task = Prompts(["apple banana cherry apple"], answers=["banana cherry"])
    ds = measure(words_model, task, ZeroAblate("L1H2"), loss, out=tmp_path / "one.nc", **QUIET)
    spread = measure(words_model, task, ZeroAblate("L1H2"), loss, per_position=True, **QUIET)
    np.testing.assert_allclose(spread["loss"].sum("position"), ds["loss"], atol=1e-6)
    assert np.isfinite(spread["loss"][0]).values.tolist() == [False, False, False, True, True]
    assert hw.rerun(tmp_path / "one.nc", yes=True).agrees


def test_ids_are_the_same_prompts_as_their_text(words_model):
    text = Prompts(["apple banana cherry apple", "dog cat dog"], answers=["banana", "cat"], distractors=["dog", "red"])
    encode = words_model.encode
    ids = Prompts(
        [np.array(encode("apple banana cherry apple")), torch.tensor(encode("dog cat dog"))],
        answers=np.array(encode("banana cat")),
        distractors=[encode("dog"), encode("red")],
    )
    found, known = (measure(words_model, task, ZeroAblate("1.2"), [loss, logit_diff], **QUIET) for task in (ids, text))
    for name in ("loss", "logit_diff", "token"):
        np.testing.assert_array_equal(found[name], known[name])


def test_a_model_without_tokenizer_reads_ids(small_model):
    ds = measure(small_model, Prompts([[5, 9, 11]], answers=[33]), ZeroAblate("0.1"), loss, **QUIET)
    assert ds["token"].values.tolist() == [["5", "9", "11"]]
    with pytest.raises(DeclarationError, match=r"GPT2LMHeadModel was opened without a tokenizer: give hw\.load"):
        Prompts("apple banana").draw(small_model)
    with pytest.raises(DeclarationError, match=r"answer 'pear' is not in .* opened without a tokenizer: give hw\.load"):
        Prompts("5 9", answers="pear").draw(small_model)


def test_one_bare_text_is_one_prompt(words_model):
    assert Prompts("apple banana apple") == Prompts(["apple banana apple"])
    assert Prompts("apple", "banana", "dog") == Prompts(["apple"], ["banana"], ["dog"])
    assert Prompts([[5, 9]], answers=[3]) == Prompts([(5, 9)], answers=[[3]])


LABELLED = {"S2": 2, "end": -1, "names": [[0, 2], 1, [-1]]}


@pytest.mark.parametrize(
    "task",
    [
        Prompts([[5, 9, 11], [5, 9, 2], [1, 2, 3, 4]], answers=[[3, 4], 5, 6], labels=LABELLED),
        Prompts("a b", answers="c d", distractors="e"),
    ],
)
def test_tasks_are_the_call_that_makes_them_and_survive_json(task):
    assert eval(repr(task)) == task == from_json(to_json(task))
    assert hash(from_json(to_json(task))) == hash(task)
    assert ('"labels"' in to_json(task)) == bool(task.labels) == ("labels" in repr(task))


LABELLED_IDS = [[5, 9, 11, 5], [7, 3, 8, 1], [2, 4, 6, 8, 1]]
PLACES = {"S2": [1, 3, 1], "names": [(0, 2), (3,), (1, 2, 4)], "end": [3, 3, 4]}
LABELS = {"S2": [1, -1, 1], "names": [[0, 2], [-1], [4, 2, 1]], "end": -1}
"""As `PLACES`, some counted from the end, some out of order."""


def test_labels_against_each_prompt_alone(small_model):
    kinds = {
        "zero": lambda at: ZeroAblate(Head(0, 1).z.at(at("S2"))),
        "several": lambda at: ZeroAblate(Layer(1).resid_pre.at(at("names"))),
        "both": lambda at: Patch(Head(0, 2).k.at(at("S2"))) + Add(Layer(0).mlp_out.at(at("end")), [0.5] * 32),
        "path": lambda at: PathPatch(Head(0, 1).z.at(at("names")), Head(1, 0).q.at(at("end"))),
        "pattern": lambda at: Patch(Head(1, 1).pattern.at(at("end"))),
    }
    given = {"answers": [33, 9, 3], "corrupted": [[1, 9, 11, 5], [7, 3, 2, 1], [2, 4, 6, 9, 1]]}
    named = {name: make(lambda label: label) for name, make in kinds.items()}
    ds = measure(small_model, Prompts(LABELLED_IDS, **given, labels=LABELS), named, loss, **QUIET)
    for number, prompt in enumerate(LABELLED_IDS):
        alone = Prompts([prompt], **{name: [values[number]] for name, values in given.items()})
        counted = {name: make(lambda label, at=number: PLACES[label][at]) for name, make in kinds.items()}
        known = measure(small_model, alone, counted, loss, **QUIET)
        np.testing.assert_allclose(ds["loss"].isel(example=[number]), known["loss"], atol=2e-5, err_msg=str(number))
    assert ds["position_label"].values.tolist() == [
        ["names", "S2", "names", "end", ""],
        ["", "", "", "S2, names, end", ""],
        ["", "S2, names", "names", "", "names, end"],
    ]


def test_knockouts_by_label(small_model):
    task = Prompts(LABELLED_IDS[::2], answers=[33, 3], labels={"subject": [[1, 2], 3], "end": -1})
    ds = measure(small_model, task, Knockout("L1H3", query="end", key="subject"), loss, **QUIET)
    for number, keys in enumerate([(1, 2), (3,)]):
        alone = Prompts([task.prompts[number]], answers=[task.answers[number]])
        known = measure(small_model, alone, Knockout(Head(1, 3), query=-1, key=keys), loss, **QUIET)
        np.testing.assert_allclose(ds["loss"][number], known["loss"][0], atol=1e-5)


def test_captures_by_label(small_model):
    task = Prompts(LABELLED_IDS, answers=[[33, 4], 9, 3], labels=LABELS)
    ds = capture(small_model, task, ["L0.resid_post at S2", "L1H2.pattern at names", "L0.q at end", "L0.k at -1"])
    whole = capture(small_model, task, ["L0.resid_post", "L1H2.pattern", "L0.q", "L0.k"])
    assert ds["L1H2_pattern_at_names_query"].values.tolist() == ["names 0", "names 1", "names 2"]
    assert ds["L0_resid_post_at_S2_position"].values.tolist() == ["S2"]
    for number in range(3):
        for name, label in (("L0_resid_post", "S2"), ("L0_q", "end")):
            known = whole[name][number, PLACES[label][number]]
            np.testing.assert_array_equal(ds[f"{name}_at_{label}"][number, 0], known)
        np.testing.assert_array_equal(ds["L0_k_at_m1"][number, 0], whole["L0_k"][number, PLACES["end"][number]])
        rows = np.full((3, 5), np.nan)
        rows[: len(PLACES["names"][number])] = whole["L1H2_pattern"][number, list(PLACES["names"][number])]
        np.testing.assert_array_equal(ds["L1H2_pattern_at_names"][number], rows)


def test_a_label_keeps_partners_of_resampling_apart(small_model):
    """Prompts are grouped by their labels; each is still resampled from another prompt, not from itself."""
    ids = [[5, 9, 11], [7, 3, 8], [2, 4, 6], [1, 2, 3]]
    task = Prompts(ids, answers=[33, 9, 3, 1], labels={"S": [0, 1, 0, 1]})
    plan = hw.plan(small_model, task, ResampleAblate("L0.resid_pre at S"), loss)
    assert [group.examples for group in plan.groups] == [(0, 2), (1, 3)]
    for group, drawn in zip(plan.groups, reference_tokens(task, small_model, plan)[0], strict=True):
        for seed in range(8):
            for example, partner in zip(group.examples, drawn[derangement(4, seed)[:2]].tolist(), strict=True):
                assert partner in ids
                assert partner != ids[example]


def test_another_position_of_a_label_is_not_taken_from_what_was_kept(small_model):
    """What was kept is found by a hash of these; the declaration of the intervention holds the label only."""
    found = []
    for task in (Prompts([[5, 9, 11]], answers=[3], labels={"S": position}) for position in (0, 1)):
        plan = hw.plan(small_model, task, ZeroAblate("L0.resid_pre at S"), loss)
        found.append(tuple(pass_store.prompts(plan, Inputs({"clean": (np.array([[5, 9, 11]]),)}), 0)))
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: Prompts([5, 9, 11]),
            "lists of token ids such as [[5, 9, 11]], or conversations such as Chat('text'), got 5",
        ),
        (
            lambda model: Prompts([b"apple"]),
            "lists of token ids such as [[5, 9, 11]], or conversations such as Chat('text'), got b'apple'",
        ),
        (
            lambda model: Prompts([[5, 9.5]]),
            "lists of token ids such as [[5, 9, 11]], or conversations such as Chat('text'), got [5, 9.5]",
        ),
        (lambda model: Prompts([[]]), "prompts hold []: a list of token ids has at least one, and none below 0"),
        (
            lambda model: Prompts([[5, -1]]),
            "prompts hold [5, -1]: a list of token ids has at least one, and none below 0",
        ),
        (lambda model: Prompts(["a", [5]]), "prompts mix text and token ids: give all as text, or all as token ids"),
        (
            lambda model: Prompts("a b", answers=[33]),
            "prompts and answers mix text and token ids: give all as text, or",
        ),
        (lambda model: Prompts("a", others=[[3], [4]]), "prompts and others mix text and token ids"),
        (lambda model: Prompts([[5]], answers=[True]), "answers are text, token ids, or lists of these, got True"),
        (
            lambda model: Prompts([[5, 9999]], answers=[3]).draw(model),
            "prompt [5, 9999] has the token id 9999: words-2l has 0 to",
        ),
        (lambda model: Prompts("apple", answers="").draw(model), "answer '' is empty"),
        (
            lambda model: Prompts([[5] * 127], answers=[[3] * 3]).draw(model),
            "a prompt and its answer have 129 tokens: words-2l reads at most 128",
        ),
        (
            lambda model: Prompts("a b", labels=3),
            "labels=3: give a mapping of names to a position for all prompts, or to",
        ),
        (lambda model: Prompts("a b", labels={"S": 1.5}), "labels={'S': 1.5}: give a mapping of names to a position"),
        (lambda model: Prompts("a b", labels={"S": [[]]}), "labels={'S': [[]]}: give a mapping of names to a position"),
        (
            lambda model: Prompts("a b", labels={"S": [1, 2]}),
            "labels['S'] has 2 entries for 1 prompts: give one position",
        ),
        (lambda model: Prompts("a b", labels={"S,T": 1}), "the label of a position is text without commas, and"),
        (lambda model: Prompts("a b", labels={5: 1}), "the label of a position is text, got 5"),
        (
            lambda model: Prompts("apple pear", labels={"S": 2}).draw(model),
            "labels['S']: position 2 does not exist in a prompt of 2 tokens (0 to 1, or -2 to -1 from the end)",
        ),
        (
            lambda model: measure(model, Prompts("apple pear", labels={"S2": 1}), ZeroAblate("L0H1 at S1"), loss),
            "L0H1 z at S1: no position has the label 'S1'; the task has the labels S2",
        ),
        (
            lambda model: capture(model, Prompts("apple pear"), "L0H1.k at S1"),
            "no position has the label 'S1'; the task has no labels: give Prompts(..., labels={'S2': 4})",
        ),
        (
            lambda model: measure(
                model, Prompts("apple pear", labels={"S": 1}), Knockout("0.1", query=1, key="T"), loss
            ),
            "Knockout(Head(0, 1), query=1, key='T'): no position has the label 'T'; the task has the labels S",
        ),
        (
            lambda model: measure(
                model,
                Prompts("apple pear", labels={"S": 1}),
                ZeroAblate(Head(0, 1).at("S")) + ZeroAblate("L0H1 at 1"),
                loss,
            ),
            "two edits of one place: ZeroAblate(site=Head(0, 1).z.at('S')) and ZeroAblate(site=Head(0, 1).z.at(1))",
        ),
        (
            lambda model: measure(model, Prompts("apple", "pear dog"), None, rank),
            "rank is not defined for an answer of several tokens: possible are loss, accuracy, prob and logit_diff",
        ),
        (
            lambda model: measure(model, Prompts("apple", "pear dog"), None, kl),
            "kl is not defined for an answer of several",
        ),
        (
            lambda model: measure(model, Prompts("apple", "pear dog"), None, logit_diff),
            "there are no distractors: give",
        ),
        (
            lambda model: measure(model, Prompts("apple", "pear dog", "dog"), None, logit_diff, per_position=True),
            "per_position=True: logit_diff of answers of several tokens compares two continuations",
        ),
        (
            lambda model: measure(model, Prompts("apple", "pear dog"), ZeroAblate("0.1"), loss, estimator="gradient"),
            "cross-entropy of the answer: there is only estimator='exact'",
        ),
        (
            lambda model: measure(model, Prompts("apple", "pear dog", "dog"), MeanAblate("0.1"), logit_diff),
            "MeanAblate(site=Head(0, 1).z, over='example'): logit_diff of answers of several tokens compares prompts",
        ),
    ],
)
def test_what_cannot_be_meant_says_what_is_possible(words_model, make, message):
    with pytest.raises((DeclarationError, UnknownNameError)) as caught:
        make(words_model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("prompt", "answer"), [("lesson", "apple"), ("apple", "lesson")])
def test_a_tokenizer_of_another_model_is_told(words_model, prompt, answer):
    (token,) = words_model.encode("lesson")
    model = hw.load(raw_hooks.random_gpt2(1, 2, 4, 60, 20), tokenizer=words_model.tokenizer)
    with pytest.raises(DeclarationError, match=f"'lesson' has the token id {token}: GPT2LMHeadModel has 0 to 59"):
        hw.measure(model, Prompts([prompt], answers=[answer]), None, "loss")
