"""The study of induction on text against plain Hugging Face passes and explicit loops."""

import copy
import html
import json
import re
from itertools import product

import holoviews as hv
import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError
from headwise.metrics.statistics import rank_correlation
from headwise.studies.cli.main import main
from headwise.studies.text import findings
from headwise.studies.text import windows as windows_module
from headwise.studies.text.findings import conclude
from headwise.studies.text.measured import stands_out
from headwise.studies.text.occurrences import draw_replaced, find, mean_by_unit
from tests.support.elements import labelled, of_type

CONTEXT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words_model):
    """Five files of random words in which blocks come twice."""
    root = tmp_path_factory.mktemp("recurring")
    words = [word for word in words_model.tokenizer.get_vocab() if word.isalpha()]
    random = np.random.default_rng(1)
    for name in "abcde":
        text = []
        while len(text) < 2 * CONTEXT:
            block = [*random.choice(words, 6)]
            text += [*block, *random.choice(words, 5), *block[: random.integers(2, 6)], *random.choice(words, 3)]
        (root / f"{name}.txt").write_text(" ".join(text[: 2 * CONTEXT]))
    return root


@pytest.fixture(scope="module")
def study(folder):
    return hw.TextInduction(folder, context=CONTEXT, n=9, pairs=9)


@pytest.fixture(scope="module")
def tree(study, words_model):
    return study.run(words_model, False)


@pytest.fixture(scope="module")
def plain(words_model):
    """Losses ``(window, position)`` and patterns of a plain pass of the Hugging Face module."""

    def passes(tokens, ablate=None):
        module, ids = copy.deepcopy(words_model.module), torch.as_tensor(np.array(tokens))
        for layer in (0, 1) if ablate else ():
            module.transformer.h[layer].attn.c_proj.register_forward_pre_hook(ablate(layer))
        module.set_attn_implementation("eager")
        with torch.no_grad():
            out = module(ids, output_attentions=True)
        logits = out.logits.log_softmax(-1)
        losses = np.full(ids.shape, np.nan)
        for window, row in enumerate(ids.tolist()):
            for t in range(1, len(row)):
                losses[window, t] = -float(logits[window, t - 1, row[t]])
        return losses, [one.numpy() for one in out.attentions]

    return passes


def _single(tokens):
    found = find(tokens)
    return found, found.candidates == 1


def test_gains_are_those_of_plain_passes(tree, plain, study):
    tokens, others = (tree["windows"][name].values for name in ("tokens", "others"))
    found, single = _single(tokens)
    losses, _ = plain(tokens)
    gain = losses[found.window, found.first] - losses[found.window, found.second]
    assert tree["occurrences"]["gain"].values == pytest.approx(gain, abs=1e-4)
    drawn = draw_replaced(tokens, others, found, study.pairs, study.seed)
    assert tree["replaced"]["occurrence"].values.tolist() == drawn.occurrence.tolist()
    own = found.where(drawn.occurrence)
    intact, rows = losses[own.window, own.second], np.arange(len(own))
    causal = plain(drawn.without)[0][rows, own.second] - intact
    elsewhere = plain(drawn.elsewhere)[0][rows, own.second] - intact
    files = np.asarray([str(one) for one in tree["windows"]["file"].values])
    assert len({*files[found.window[single]]}) == 5
    keep = own.candidates == 1
    for name, values, of in (
        ("gain", gain[single], files[found.window[single]]),
        ("causal_gain", causal[keep], files[own.window[keep]]),
        ("elsewhere", elsewhere[keep], files[own.window[keep]]),
        ("net_gain", (causal - elsewhere)[keep], files[own.window[keep]]),
    ):
        here = tree["gains"].sel(gain=name)
        expected = (*mean_by_unit(values, of), len(values))
        assert [float(here[one]) for one in ("mean", "mean_low", "mean_high", "count")] == pytest.approx(
            expected, abs=1e-3
        )
    assert float(tree["gains"]["mean_low"].sel(gain="net_gain")) > 1  # words-2l repeats


def test_bins_hold_what_falls_into_them(tree):
    found, single = _single(tree["windows"]["tokens"].values)
    gain = tree["occurrences"]["gain"].values
    for name, axis, chosen in (
        ("distance", found.distance, single),
        ("position", found.second, single),
        ("candidates", found.candidates, np.ones(len(found), dtype=bool)),
    ):
        ds = tree[name].to_dataset()
        assert int(ds["count_gain"].sum()) == chosen.sum()
        for at in range(ds.sizes["bin"]):
            low, high = int(ds["from"][at]), int(ds["to"][at])
            here = gain[chosen & (axis >= low) & (axis <= high)]
            assert int(ds["count_gain"][at]) == len(here)
            assert float(ds["gain"][at]) == pytest.approx(here.mean())


def test_heads_attend_as_plain_patterns_do(tree, plain, words_model):
    tokens = tree["windows"]["tokens"].values
    found, single = _single(tokens)
    _, patterns = plain(tokens)
    own = found.where(single)
    for layer in (0, 1):
        after, same = [], []
        for window, j, t in zip(own.window, own.first, own.second, strict=True):
            pattern, row, back = patterns[layer][window], tokens[window], t - 1 - j
            others = [q for q in range(back + 1, CONTEXT) if q != t - 1 and row[q - back - 1] != row[q]]
            after.append(pattern[:, t - 1, j])
            same.append(np.mean([pattern[:, q, q - back] for q in others], axis=0))
        heads = tree["heads"].sel(layer=layer)
        assert heads["successor"].values == pytest.approx(np.mean(after, axis=0), abs=1e-5)
        assert heads["distance_control"].values == pytest.approx(np.mean(same, axis=0), abs=1e-5)
        difference = np.mean(after, axis=0) - np.mean(same, axis=0)
        assert heads["above_control"].values == pytest.approx(difference, abs=1e-5)
    described = hw.describe_heads(words_model, hw.RepeatedTokens(), untrained_task=hw.RepeatedTokens(n=8))
    on_random = described["induction"].mean("example").values
    assert tree["heads"]["induction"].mean("example").values == pytest.approx(on_random)
    assert (tree["heads"]["role"] == described["role"]).all()
    rho = rank_correlation(on_random, tree["heads"]["successor"].values)
    assert tree["heads"].attrs["rank_correlation"] == pytest.approx(rho)


def test_ablation_is_that_of_plain_passes(tree, plain):
    """Mean ablation by hand: means of z over the other windows, by position, put in the place of the heads' own."""
    tokens, others = (tree["windows"][name].values for name in ("tokens", "others"))
    found, single = _single(tokens)
    own, seen = found.where(single), {}

    def record(layer):
        def hook(module, given):
            seen[layer] = given[0].mean(0, keepdim=True)

        return hook

    plain(others, record)

    def gain_without(heads):
        def ablate(layer):
            def hook(module, given):
                z = given[0].clone()
                for place, head in heads:
                    if place == layer:
                        z[..., 8 * head : 8 * head + 8] = seen[layer][..., 8 * head : 8 * head + 8]
                return (z,)

            return hook

        losses, _ = plain(tokens, ablate)
        first, second = (losses[own.window, at].mean() for at in (own.first, own.second))
        return {"gain": first - second, "loss_first": first, "loss_second": second}

    ds = tree["ablation"].to_dataset().sel(set="induction heads", run="clean").isel(ablation=0)
    heads = [hw.Head.parse(one) for one in str(ds["heads"].values).split()]
    assert {str(one) for one in heads} == {*json.loads(tree.attrs["heads"])["induction"]}
    expected, before = gain_without([(one.layer, one.head) for one in heads]), gain_without([])
    for name, value in expected.items():
        assert float(ds[name]) == pytest.approx(value, abs=1e-3)
        assert float(ds[f"baseline_{name}"]) == pytest.approx(before[name], abs=1e-3)
    drawn = [hw.Head.parse(one) for one in str(ds["control_heads"].sel(control="all layers")[3].values).split()]
    assert len(drawn) == len(heads)
    random = gain_without([(one.layer, one.head) for one in drawn])
    assert float(ds["control_gain"].sel(control="all layers")[3]) == pytest.approx(random["gain"], abs=1e-3)
    alone = gain_without([(0, 3)])["gain"] - before["gain"]
    assert float(ds["alone_gain"].sel(layer=0, head=3)) == pytest.approx(alone, abs=1e-3)
    controls = ds["control_gain"].sel(control="all layers").values
    count = (controls <= float(ds["gain"])).sum()
    assert float(ds["p_gain"].sel(control="all layers")) == pytest.approx((1 + count) / (1 + 100))
    assert int(ds["draws"].sel(control="all layers")) == 100


def test_what_stands_out_by_hand():
    """Sums of three units less their median over heads; all eight ways to flip signs, the largest of all heads each."""
    random = np.random.default_rng(0)
    units = np.array(["a", "b", "b", "c", "c", "c"])
    fall = random.normal(0, 0.1, (2, 2, 6))
    fall[1, 0] += 1.0
    sums = {at: [sum(fall[at][units == one]) for one in "abc"] for at in np.ndindex(2, 2)}
    middle = [np.median([own[unit] for own in sums.values()]) for unit in range(3)]
    beyond = {at: np.subtract(own, middle) for at, own in sums.items()}
    largest = [max(sum(one * signs) for one in beyond.values()) for signs in product((1, -1), repeat=3)]
    found = stands_out(fall, units)
    for at, own in beyond.items():
        assert found[at] == np.mean([value >= sum(own) - 1e-12 for value in largest])
    assert found[1, 0] == 1 / 8
    assert np.isnan(stands_out(fall[..., :1], units[:1])).all()


def test_a_single_head_is_named_where_it_stands_out(tree):
    said = [one["text"] for one in json.loads(tree.attrs["conclusion"]) if one["group"] == "ablation"][-1]
    change, p = (float(tree["ablation"][name].sel(layer=0, head=3)) for name in ("alone_gain", "p_alone_gain"))
    assert p == 1 / 32  # five files
    assert f"Of single heads, L0H3 matters most: without it the gain changes by {change:+.2f} nats" in said
    for name, value in (("p_alone_gain", 0.2), ("alone_gain", -0.004), ("p_alone_gain", np.nan)):
        weaker = tree.copy(deep=True)
        weaker["ablation"][name][:] = value
        said = [one.text for one in conclude(weaker) if one.group == "ablation"][-1]
        assert "No single head is shown to matter more than others: without L" in said
        assert "-0.00" not in said
        assert ("p = " in said) == (value == value)


def test_findings_say_the_numbers(tree):
    told = {one["group"]: [] for one in json.loads(tree.attrs["conclusion"])}
    for one in json.loads(tree.attrs["conclusion"]):
        told[one["group"]].append(one["text"])
    gain = float(tree["gains"]["mean"].sel(gain="gain"))
    assert f"a gain of {gain:+.2f} (95%" in told["summary"][0]
    assert "the model uses it." in told["summary"][1]
    assert f"{int(tree['gains']['count'].sel(gain='gain'))} token pairs recur" in told["summary"][0]
    weaker = tree.copy(deep=True)  # as if a third of the random sets did as much
    random = weaker["ablation"]["control_gain"].sel(control="all layers").values.ravel()
    weaker["ablation"]["gain"][:] = np.quantile(random, 0.33)
    beat = random <= weaker["ablation"]["gain"].item()
    drawn = weaker["ablation"]["control_heads"].sel(control="all layers").values.ravel()[beat]
    assert float(tree["ablation"]["alone_gain"].min()) == float(tree["ablation"]["alone_gain"].sel(layer=0, head=3))
    holding = sum("L0H3" in str(one) for one in drawn)
    assert 0 < holding <= len(drawn) < 40
    said = next(one.text for one in conclude(weaker) if one.group == "ablation")
    assert f"{len(drawn)} do as much, {holding} of them with L0H3" in said
    assert any("is taken for granted" in text for text in told["limits"])


def test_a_study_is_kept_taken_from_where_it_was_and_repeated(words_model, study, tmp_path, tree, monkeypatch):
    stages = []
    first = study.run(words_model, stages.append, out=tmp_path / "text.nc")
    assert stages == ["occurrences", "replaced", "heads", "ablation"]
    again = study.run(words_model, stages.append, out=tmp_path / "text.nc")
    assert len(stages) == 4
    assert again["gains"].to_dataset().equals(first["gains"].to_dataset())
    assert first["gains"].to_dataset().equals(tree["gains"].to_dataset())
    assert hw.TextInduction.from_json(first.attrs["study"]) == study
    monkeypatch.setattr(windows_module, "read_text", None)  # what is repeated are the windows in the file
    found = hw.rerun(tmp_path / "text.nc")
    assert found.agrees
    assert found.largest == 0
    listed = hw.Results(tmp_path).frame
    assert listed["study"].tolist() == ["TextInduction"]
    assert "a gain of" in str(hw.summary(tmp_path / "text.nc"))


def test_bins_are_drawn_with_their_intervals(tree):
    ds = tree["distance"].to_dataset()
    drawn = hw.plots.gains_by_bin(ds, ["gain"])
    points, (segments,) = labelled(of_type(drawn, hv.Points), "gain"), of_type(drawn, hv.Segments)
    assert points.dimension_values("value") == pytest.approx(ds["gain"].values)
    assert points.dimension_values("count").tolist() == ds["count_gain"].values.tolist()
    known = np.isfinite(ds["gain_low"].values)
    assert segments.dimension_values("low")[known] == pytest.approx(ds["gain_low"].values[known])
    with pytest.raises(hw.errors.UnknownNameError, match="gains_by_bin needs"):
        hw.plots.gains_by_bin(tree["gains"].to_dataset())
    axes = hw.plots.words_agreement(tree["heads"], tree["heads"], name="successor", where="text")
    drawn = np.concatenate([one.dimension_values("words") for one in of_type(axes, hv.Points)])
    assert sorted(drawn) == pytest.approx(sorted(tree["heads"]["successor"].values.ravel()))


def test_the_command_prints_and_writes(study, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["text", "--model", "words-2l", "--text", str(study.text), "--context", "40", "--n", "4", "--pairs", "2"]
    assert main([*given, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "induction on text, words-2l: 4 windows of 40 tokens" in said
    assert [line.split()[0] for line in said.splitlines()[4:]] == ["occurrences", "replaced", "heads", "ablation", "in"]
    assert main([*given, "--plan", "--heads"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[5:]]
    assert [row[0] for row in rows] == ["occurrences", "replaced", "heads", "ablation", "claims", "claims", "in"]
    assert sum(int(row[1]) for row in rows[:4]) + int(rows[4][1]) + int(rows[5][2]) == int(rows[6][2])
    assert main([*given, "--plan", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["windows"] == 4
    assert [*figures["stages"]["ablation"]] == ["passes", "forwards", "seconds"]
    potter = tmp_path / "prompts.txt"
    potter.write_text("apple banana cherry apple\ndog cat house tree dog")
    assert main([*given, "--prompts", str(potter)]) == 0
    said = capsys.readouterr()
    assert "5/5 prompts of your own" in said.err
    assert "On 2 prompts of your own, the answer has a probability of " in said.out
    assert (tmp_path / "results" / "text-words-2l.nc").is_file()
    report = (tmp_path / "results" / "text-words-2l.html").read_text()
    for words in (
        "Induction on text, words-2l",
        "4 of the 10 windows of 40 tokens that the text has, from ",
        "What does a second occurrence gain?",
        "Does it fail near the end of the context?",
        "dog cat house tree dog",
        "headwise text --model words-2l --text ",
        "tree = hw.TextInduction(text=",
        "Mean ablation takes a mean over reference prompts",
    ):
        assert html.escape(words, quote=False) in report, words
    assert main([*given, "--prompts", str(potter), "--json"]) == 0
    figures, kept = json.loads(capsys.readouterr().out), hw.open_result(tmp_path / "results" / "text-words-2l.nc")
    assert figures["file"] == str(tmp_path / "results" / "text-words-2l.nc")
    assert figures["gains"]["net_gain"]["mean"] == kept["gains"]["mean"].sel(gain="net_gain").item()
    assert figures["heads"]["L0H3"]["alone_gain"] == kept["ablation"]["alone_gain"].sel(layer=0, head=3).item()
    assert figures["findings"] == json.loads(kept.attrs["conclusion"])
    assert main(["text", "--text", "nowhere"]) == 1
    assert "headwise: text='nowhere': there is no such file or folder" in capsys.readouterr().err
    assert main(["text", "--model", "words-2l"]) == 1
    assert "headwise: words-2l has no folder held_out with text that it has not read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": 3}, "text=3: give the path of a file or folder"),
        ({"n": 1}, "n, the number of windows, must be 2 or more, got 1"),
        ({"controls": 99}, "controls, the random sets, must be 100 or more, got 99"),
        ({"pairs": 0}, "pairs, the occurrences that are replaced, must be 2 or more, got 0"),
        ({"threshold": 1}, "threshold=1: a score lies between 0 and 1"),
        ({"ablation": "zero"}, "ablation='zero': possible are 'mean' and 'resample'"),
        ({"untrained": 3}, "untrained=3: with so few, no single head can stand out at 0.05"),
    ],
)
def test_values_that_are_not_possible_are_refused(options, message):
    with pytest.raises(DeclarationError, match=re.escape(message)):
        hw.TextInduction(**options)


def test_text_in_which_nothing_recurs_is_refused(words_model, tmp_path):
    words = [word for word in words_model.tokenizer.get_vocab() if word.isalpha()]
    (tmp_path / "once.txt").write_text(" ".join(words[:200]))
    with pytest.raises(DeclarationError, match="0 token pairs recur once in the 5 windows of 40 tokens"):
        hw.TextInduction(tmp_path / "once.txt", context=40).plan(words_model)


def test_what_is_said_of_where_it_fails_looks_at_every_part():
    def part(values, counts):
        lows = [value - 0.5 for value in values]
        names = [str(at) for at in range(len(values))]
        columns = {"net_gain": values, "net_gain_low": lows, "count_net_gain": counts}
        return xr.Dataset({name: ("bin", one) for name, one in columns.items()}, coords={"bin": names})

    parts = {"distance": part([-0.5], [200]), "candidates": part([2.0, 1.5], [50, 30]), "position": part([1.0], [5])}
    (said,) = findings._where(xr.DataTree.from_dict(parts))
    assert said == (
        "The net gain in nats: by number of candidates +2.00 at 0 and +1.50 at 1. It is not shown to be above 0 at "
        "distance 0."
    )
    parts["distance"] = part([0.6], [200])
    (said,) = findings._where(xr.DataTree.from_dict(parts))
    assert said.endswith("It is above 0 in every part with 20 occurrences or more.")
