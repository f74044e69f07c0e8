"""Tasks: exactly the prompts that are meant, the same everywhere, or a clear refusal."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import Add, Head, Layer, MeanAblate, Patch, ZeroAblate
from headwise.interventions.declare.codec import from_json, to_json
from headwise.metrics import loss
from headwise.studies import Prompts, RepeatedTokens, capture, measure
from headwise.studies.storage.registry import TASKS
from tests.oracles import raw_hooks


def test_clean_repeats_and_corrupted_does_not(small_model):
    batch = RepeatedTokens(n=10, length=8).draw(small_model)
    clean, corrupted = batch.runs["clean"], batch.runs["corrupted"]
    np.testing.assert_array_equal(clean[:, :8], clean[:, 8:])
    np.testing.assert_array_equal(clean[:, 8:], corrupted[:, 8:])
    for row in range(10):
        assert len(set(clean[row])) == 8
        assert len(set(corrupted[row])) == 16


def test_targets_and_distractors_by_hand(small_model):
    batch = RepeatedTokens(n=3, length=4).draw(small_model)
    clean, corrupted = batch.runs["clean"], batch.runs["corrupted"]
    (group,) = batch.groups()
    assert group.scored == (4, 5, 6)
    facts = batch.facts("clean", group)
    np.testing.assert_array_equal(facts.targets, clean[:, 5:8])
    np.testing.assert_array_equal(facts.targets, clean[:, 1:4])
    np.testing.assert_array_equal(facts.distractors, corrupted[:, 1:4])
    assert (facts.period, facts.start) == (4, 0)


def test_scoring_everything_judges_each_run_on_its_own_next_tokens(small_model):
    batch = RepeatedTokens(n=2, length=4, score="all").draw(small_model)
    (group,) = batch.groups()
    assert group.scored == tuple(range(7))
    for run in ("clean", "corrupted"):
        np.testing.assert_array_equal(batch.facts(run, group).targets, batch.runs[run][:, 1:])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("half", [4, 7])
def test_corruptions_token_by_token(half, bos):
    """Each prompt built again by loops from the first half and the other tokens, as the docstring defines it."""
    model, given = hw.load("words-2l"), {"n": 3, "length": half, "seed": 4, "bos": bos}
    second = RepeatedTokens(**given, corrupt="second").draw(model)
    for row in range(3):
        front, first = second.runs["clean"][row, :bos].tolist(), second.runs["clean"][row, bos : bos + half].tolist()
        other = second.runs["corrupted"][row, bos + half :].tolist()
        assert len({*front, *first, *other}) == bos + 2 * half
        cued = [other[at] if at % 2 == 0 else first[at] for at in range(half)]
        wanted = {"first": [*front, *other, *first], "second": [*front, *first, *other], "cue": [*front, *cued, *first]}
        for corrupt, corrupted in wanted.items():
            batch = RepeatedTokens(**given, corrupt=corrupt).draw(model)
            (group,) = batch.groups()
            assert batch.runs["clean"][row].tolist() == [*front, *first, *first]
            assert batch.runs["corrupted"][row].tolist() == corrupted
            places = [at for at in range(half - 1) if corrupt != "cue" or at % 2 == 0]
            assert group.scored == tuple(bos + half + at for at in places)
            targets = [first[at + 1] for at in places]
            distractors = targets[1:] + targets[:1] if corrupt == "cue" else [other[at + 1] for at in places]
            for run in ("clean", "corrupted"):
                facts = batch.facts(run, group)
                assert facts.targets[row].tolist() == targets
                assert facts.distractors[row].tolist() == distractors
            if corrupt == "cue":  # both stand in the first half of both runs
                assert {*targets, *distractors} <= {*cued}


RESTORED = {
    "first": {"q": 0.0, "k": -0.83, "v": 0.05, "z": -0.15, "previous": -0.95},
    "second": {"q": 0.97, "k": 0.0, "v": 0.0, "z": 0.03, "previous": 0.0},
    "cue": {"q": 0.0, "k": 0.85, "v": 0.0, "z": 0.99, "previous": 1.0},
}
"""What denoising restores of the logit difference, of q, k, v of layer 1 and of z of layer 0 and its head 3."""


@pytest.mark.parametrize("corrupt", RESTORED)
def test_what_denoising_restores(words_model, corrupt):
    what = {name: Patch(Layer(1).site(name), source="clean") for name in "qkv"}
    what |= {"z": Patch(Layer(0).z, source="clean"), "previous": Patch(Head(0, 3), source="clean")}
    task = RepeatedTokens(n=16, corrupt=corrupt)
    ds = measure(words_model, task, what, [hw.metrics.logit_diff], base="corrupted", progress=False)
    found = hw.normalized(ds, "logit_diff")
    for name, wanted in RESTORED[corrupt].items():
        assert float(found.sel(condition=name)) == pytest.approx(wanted, abs=0.05), name
    assert abs(float(ds["baseline_logit_diff"].sel(run="corrupted").mean())) < 0.5


def test_a_declaration_reads_as_before_where_nothing_new_is_said():
    """Stored results hold this text, and are compared by it."""
    old = (
        '{"type": "RepeatedTokens", "n": 32, "length": 25, "seed": 0, "bos": false, "tokens": null, "score": "repeat"}'
    )
    assert to_json(RepeatedTokens(), TASKS) == old
    assert from_json(old, TASKS) == RepeatedTokens(corrupt="first") == RepeatedTokens()
    assert repr(RepeatedTokens()) == "RepeatedTokens(n=32, length=25, seed=0, bos=False, tokens=None, score='repeat')"
    cue = RepeatedTokens(corrupt="cue")
    assert repr(cue) == "RepeatedTokens(n=32, length=25, seed=0, bos=False, tokens=None, score='repeat', corrupt='cue')"
    assert from_json(to_json(cue, TASKS), TASKS) == cue == eval(repr(cue))


def test_bos_shifts_every_index():
    from transformers import AutoTokenizer

    from tests.oracles.raw_hooks import random_gpt2

    words = hw.load("words-2l")
    assert isinstance(words.tokenizer, type(AutoTokenizer.from_pretrained(words.module.config.name_or_path)))
    with_bos, without = RepeatedTokens(n=2, length=4, bos=True).draw(words), RepeatedTokens(n=2, length=4).draw(words)
    np.testing.assert_array_equal(with_bos.runs["clean"][:, 1:], without.runs["clean"])
    assert (with_bos.runs["clean"][:, 0] == words.tokenizer.bos_token_id).all()
    assert with_bos.groups()[0].scored == tuple(index + 1 for index in without.groups()[0].scored)
    np.testing.assert_array_equal(
        with_bos.facts("clean", with_bos.groups()[0]).targets, without.facts("clean", without.groups()[0]).targets
    )
    with pytest.raises(DeclarationError, match="bos=True: GPT2LMHeadModel was opened without a tokenizer"):
        RepeatedTokens(bos=True, length=4).draw(hw.load(random_gpt2(1, 1, 4, 60, 20)))


def test_the_same_seed_is_the_same_batch_everywhere(small_model):
    """Written out: the stream behind it is frozen, so these ids must never change."""
    first = RepeatedTokens(n=2, length=3, seed=5).draw(small_model).runs["clean"]
    np.testing.assert_array_equal(first, RepeatedTokens(n=2, length=3, seed=5).draw(small_model).runs["clean"])
    assert first[:, :3].tolist() == FROZEN
    assert not np.array_equal(first, RepeatedTokens(n=2, length=3, seed=6).draw(small_model).runs["clean"])


FROZEN = [[32, 52, 33], [30, 2, 59]]


def test_the_reference_draw_is_another(small_model):
    task = RepeatedTokens(n=40, length=6)
    drawn, reference = task.draw(small_model).runs["clean"], task.reference(small_model).runs["clean"]
    assert len(reference) == 40
    assert not {tuple(row) for row in drawn} & {tuple(row) for row in reference}
    assert len(RepeatedTokens(n=2, length=6).reference(small_model).lengths) == 32


def test_vocabulary_range_and_special_tokens(words_model):
    batch = RepeatedTokens(n=50, length=10, tokens=(0, 60)).draw(words_model)
    used = set(batch.runs["clean"].ravel()) | set(batch.runs["corrupted"].ravel())
    assert max(used) < 60
    assert not used & set(words_model.tokenizer.all_special_ids)


def test_prompts_are_grouped_and_scored_at_the_end(words_model):
    task = Prompts(
        ["apple banana cherry apple", "dog cat dog", "red green blue red"], answers=["banana", " cat", "green"]
    )
    batch = task.draw(words_model)
    assert [(group.examples, group.length, group.scored) for group in batch.groups()] == [
        ((1,), 3, (2,)),
        ((0, 2), 4, (3,)),
    ]
    assert words_model.token_text(batch.facts("clean", batch.groups()[1]).targets[:, 0]) == ["banana", "green"]


def test_prompts_without_answers_score_every_next_token(words_model):
    batch = Prompts(["apple banana cherry"]).draw(words_model)
    (group,) = batch.groups()
    assert group.scored == (0, 1)
    assert words_model.token_text(batch.facts("clean", group).targets[0]) == ["banana", "cherry"]


def test_reference_prompts_of_one_token(words_model):
    """Nothing is scored in reference prompts, so they need no next token."""
    site, prompts = Head(0, 1).z.at(0), {"prompts": ["dog"], "answers": ["cat"]}
    found = measure(words_model, Prompts(**prompts, others=["dog", "apple"]), MeanAblate(site), [loss])
    own, other = capture(words_model, Prompts(["dog", "apple"], answers=["cat", "cat"]), Head(0, 1))["L0H1_z"].values[
        :, 0
    ]
    mean = (own + other) / 2
    wanted = measure(words_model, Prompts(**prompts), Add(site, mean - own), [loss])
    np.testing.assert_allclose(found["loss"], wanted["loss"], atol=1e-5)
    with pytest.raises(DeclarationError, match="no next token to score"):
        measure(words_model, Prompts(["dog"]), None, [loss])


UNEQUAL = [[5, 9, 11, 7], [7, 3], [2, 4, 6]]
BOTH = ("example", "position")


@pytest.mark.parametrize("others", [None, [[8, 1], [4, 4, 4, 4, 2]]])
@pytest.mark.parametrize(("component", "head"), [("z", 1), ("resid_pre", None), ("q", None)])
def test_a_mean_over_examples_and_positions_takes_in_each_token_once(small_model, component, head, others):
    """Read prompt by prompt with plain hooks, of whatever length, and put in at every position or some."""
    module, task = small_model.module, Prompts(UNEQUAL, answers=[33, 9, 3], others=others)
    read = [raw_hooks.activation(module, torch.tensor([ids]), component, 1)[0] for ids in others or UNEQUAL]
    mean = torch.cat(read).mean(0, keepdim=True)
    mean = mean if head is None else mean[:, head]
    site = Layer(1).site(component) if head is None else Head(1, head).site(component)
    what = {"all": MeanAblate(site, over=BOTH), "some": MeanAblate(site.at([0, -1]), over=BOTH)}
    what["beside"] = MeanAblate(site, over=BOTH) + ZeroAblate(Head(0, 2))
    ds = measure(small_model, task, what, [loss], progress=False)
    for row, (ids, answer) in enumerate(zip(UNEQUAL, (33, 9, 3), strict=True)):
        for name in what:
            positions = tuple(range(len(ids))) if name != "some" else (0, len(ids) - 1)
            edits = [raw_hooks.Edit(component, 1, head, positions, mean.expand(1, len(positions), *mean.shape[1:]))]
            edits += [raw_hooks.zero_edit("z", 0, 2)] if name == "beside" else []
            logits = raw_hooks.run(module, torch.tensor([ids]), edits)[0, -1]
            wanted = -float(logits.log_softmax(-1)[answer])
            assert float(ds["loss"].sel(condition=name)[row]) == pytest.approx(wanted, abs=2e-4), (name, row)


def test_means_by_position_and_over_positions_in_one_measurement(small_model):
    """Each as it is alone; the one by position needs another prompt of equal length, and says so."""
    ids = [*UNEQUAL, [1, 2], [3, 4, 5], [6, 7, 8, 9]]
    what = {"by position": MeanAblate(Head(1, 1)), "over positions": MeanAblate(Head(1, 1), over=BOTH)}
    task = Prompts(ids, answers=[3] * 6)
    both = measure(small_model, task, what, [loss], progress=False)
    for name, edit in what.items():
        alone = measure(small_model, task, edit, [loss], progress=False)
        np.testing.assert_allclose(both["loss"].sel(condition=name), alone["loss"], atol=1e-5)
    assert not np.allclose(both["loss"][0], both["loss"][1])
    one = measure(small_model, Prompts([[5, 9, 11]], answers=[3]), what["over positions"], [loss], progress=False)
    assert np.isfinite(one["loss"]).all()
    with pytest.raises(DeclarationError, match="prompts of 2 tokens: give Prompts"):
        measure(small_model, Prompts(UNEQUAL, answers=[1, 2, 3]), what, [loss], progress=False)


@pytest.mark.parametrize(
    "task",
    [
        RepeatedTokens(n=3, length=4, seed=2, bos=True, tokens=(5, 50), score="all"),
        Prompts(
            ["dog cat dog"], answers=["cat"], distractors=["dog"], corrupted=["cow cat dog"], others=["a b c"], bos=True
        ),
    ],
)
def test_tasks_survive_json(task):
    assert from_json(to_json(task, TASKS), TASKS) == task


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: RepeatedTokens(n=0), "n, the number of prompts, must be 1 or more, got 0"),
        (lambda model: RepeatedTokens(length=1), "length, the half length, must be 2 or more, got 1"),
        (lambda model: RepeatedTokens(seed=-1), "a seed must be 0 or more, got -1"),
        (lambda model: RepeatedTokens(score="some"), "score='some': possible are 'repeat' and 'all'"),
        (lambda model: RepeatedTokens(corrupt="all"), "corrupt='all': possible are 'first', 'second' and 'cue'"),
        (lambda model: RepeatedTokens(corrupt=["cue"]), "corrupt=['cue']: possible are 'first', 'second' and 'cue'"),
        (lambda model: RepeatedTokens(corrupt="cue", length=3), "length=3: corrupt='cue' needs 4 or more"),
        (
            lambda model: RepeatedTokens(corrupt="cue", score="all"),
            "score='all' goes with corrupt='first' and 'second'",
        ),
        (lambda model: RepeatedTokens(tokens=(9, 3)), "tokens=(9, 3): give a start and a larger stop"),
        (
            lambda model: RepeatedTokens(length=100).draw(model),
            "length=100 makes prompts of 200 tokens: words-2l reads at most 128, so length can be 2 to 64",
        ),
        (
            lambda model: RepeatedTokens(tokens=(2, 30)).draw(model),
            "length=25 needs 50 different tokens (a half and its",
        ),
        (lambda model: RepeatedTokens(tokens=(2, 9999)).draw(model), "words-2l has the token ids 0 to"),
        (lambda model: RepeatedTokens(n="3"), "n, the number of prompts, must be a whole number, got '3'"),
        (lambda model: RepeatedTokens(length=4.0), "length, the half length, must be a whole number, got 4.0"),
        (lambda model: RepeatedTokens(seed=2**32), "a seed must be at most 4294967295"),
        (lambda model: RepeatedTokens(tokens=5), "tokens=5: give a start and a larger stop"),
        (lambda model: RepeatedTokens(tokens=("a", "b")), "tokens=('a', 'b'): give a start and a larger stop"),
        (lambda model: Prompts(5), "prompts is a text, or a list of texts or of lists of token ids, got 5"),
        (lambda model: Prompts([]), "Prompts needs at least one prompt"),
        (
            lambda model: Prompts(["apple", 3]),
            "lists of token ids such as [[5, 9, 11]], or conversations such as Chat('text'), got 3",
        ),
        (lambda model: Prompts(["apple", "pear"], answers=["pear"]), "1 answers for 2 prompts: give one for each"),
        (
            lambda model: Prompts(["apple"], distractors=["pear"]),
            "distractors are compared with answers: give answers too",
        ),
        (lambda model: Prompts([""]).draw(model), "prompt '' is empty"),
        (lambda model: Prompts(["apple"]).draw(model), "prompt 'apple' is one token: there is no next token to score"),
        (lambda model: Prompts(["apple bananna"]).draw(model), "'bananna' is not in the vocabulary of words-2l"),
        (
            lambda model: Prompts(["apple"], answers=["Zyx"]).draw(model),
            "answer 'Zyx' is not in the vocabulary of words-2l",
        ),
        (lambda model: Prompts(["apple pear " * 70]).draw(model), "has 140 tokens: words-2l reads at most 128"),
        (
            lambda model: Prompts(["apple pear"], corrupted=["apple"]).draw(model),
            "prompt 'apple pear' has 2 tokens, its corrupted one 1: make them equal",
        ),
        (
            lambda model: measure(
                model, Prompts(["apple pear", "dog"], answers=["apple", "apple"]), MeanAblate(Head(0, 0)), [loss]
            ),
            "resample ablation, and means by position, need at least two reference prompts of 1 tokens: give "
            "Prompts(..., others=[...]); MeanAblate(..., over=('example', 'position')) needs none",
        ),
    ],
)
def test_wrong_tasks_say_what_is_possible(words_model, make, message):
    with pytest.raises(DeclarationError) as caught:
        make(words_model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
