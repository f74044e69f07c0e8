"""The report of a study: what is in the file."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
import xarray as xr
from transformers import GPT2Config, GPT2LMHeadModel

import headwise as hw
from headwise.errors import ResultError
from headwise.studies import InductionStudy
from headwise.studies.report import report as writing
from headwise.studies.report.report import write_report
from tests.oracles.planted import planted_model
from tests.support.pages import EVIL, Outline, check_whole, code, shown

QUESTIONS = [
    "The answer",
    "How well does the model do on repeated sequences?",
    "Which heads are which?",
    "What do they attend to?",
    "What happens without a head?",
    "Is it these heads, or any heads?",
    "Which of q, k, v carries the pattern, which the token?",
    "Do previous-token heads feed the induction heads?",
    "Do the induction heads write the answer themselves?",
    "Do the same heads fire on words?",
    "Would gradients have told the same?",
    "What was run, and how to run it again",
    "Assumptions, and what was not tested",
]


@pytest.fixture(scope="module")
def tree():
    return InductionStudy(n=8, length=10, draws=20).run(hw.load(planted_model()))


@pytest.fixture(scope="module")
def report(tree, tmp_path_factory):
    return write_report(with_words(tree), tmp_path_factory.mktemp("report") / "planted.html")


def with_words(tree):
    """The tree with a words group as a model that knows the words has it; its tokenizer here knows numbers only."""
    score = tree["heads"]["induction"]
    attrs = {"long_name": "probability of the target", "units": "1"}
    words = xr.Dataset(
        {
            "prob": ("example", np.linspace(0.5, 0.9, score.sizes["example"]), attrs),
            "rank": ("example", np.zeros(score.sizes["example"])),
            "prompt": ("example", ["sun moon star sun"] * score.sizes["example"]),
            "answer": ("example", ["moon"] * score.sizes["example"]),
            "ablated_prob": (("ablation", "example"), np.full((1, score.sizes["example"]), 0.1)),
            "prefix_matching": score.rename("prefix_matching"),
        },
        coords={"ablation": ["zero"]},
    )
    parts = {node.path: node.to_dataset() for node in tree.descendants} | {"/words": words}
    joined = xr.DataTree.from_dict(parts)
    joined.attrs = dict(tree.attrs)
    return joined


def test_every_question_has_its_section_in_order(report):
    outline = Outline(report.read_text())
    assert [name for name in outline.headings if name in QUESTIONS] == QUESTIONS


def test_the_file_is_complete_in_itself(report):
    outline = check_whole(report.read_text())
    assert report.stat().st_size < 5e6
    assert outline.figures > 10


def test_every_sentence_of_the_conclusion_is_there(tree, report):
    text = report.read_text().replace("\u00a0", " ")
    for finding in json.loads(tree.attrs["conclusion"]):
        sentence = finding["text"].split("(")[0].replace("'", "&#x27;")
        assert sentence in text, sentence
    assert "What was not shown" in text


def test_no_sentence_stands_twice(report):
    body = report.read_text().partition("</style>")[2]
    said = [shown(one) for one in re.findall(r"<p>(.*?)</p>|<li>([^<]*)</li>", body) for one in one if len(one) > 40]
    assert len(said) > 20
    assert sorted(said) == sorted({*said})


def test_it_says_why_denoising_restores_nothing(tree, report):
    ratio = tree["patching"]["denoising_normalized"]
    assert ratio.max() < 0.5
    assert ratio.min() < -0.1
    assert "restoring the match copies the distractor" in shown(report.read_text())
    assert "repeated once (seed 0). In the corrupted run, the first half is other tokens." in shown(report.read_text())


def test_the_loss_has_a_line_at_a_uniform_guess(tree, report):
    vocabulary = json.loads(tree.attrs["model_shape"])["vocabulary"]
    assert f"uniform guess, ln {vocabulary} = {np.log(vocabulary):.2f}" in report.read_text()


def test_it_says_how_to_run_it_again(tree, report):
    text = report.read_text()
    command, python = code(text)
    assert command == "headwise induction --model GPT2LMHeadModel --n 8 --length 10 --seed 0"
    assert "The command does not set draws; the Python lines do." in text
    assert "The model was an object in memory" in text
    assert tree.attrs["weight_hash"] in text
    made = re.search(r"tree = hw\.(InductionStudy\(.*?\))\.run\(model\)", python)
    assert eval(made[1], {"InductionStudy": InductionStudy}) == InductionStudy(n=8, length=10, draws=20)


def test_the_command_is_one_that_there_is(report, monkeypatch):
    from headwise.studies.analyses import induction
    from headwise.studies.cli.main import main

    asked = []

    def run(self, model, *others, **named):
        asked.append((self, model.name))
        raise ResultError("this is enough")

    monkeypatch.setattr(induction.InductionStudy, "run", run)
    command = shlex.split(code(report.read_text())[0].replace("GPT2LMHeadModel", "words-2l"))
    assert command[0] == "headwise"
    monkeypatch.chdir(report.parent)
    assert main(command[1:]) == 1
    assert asked == [(InductionStudy(n=8, length=10), "words-2l")]


def test_tables_hold_the_numbers(tree, report):
    text = report.read_text()
    row = re.search(r'<th scope="row">L1H2</th><td>induction</td><td class="n">([\d.]+)</td>', text)
    assert float(row[1]) == pytest.approx(float(tree["heads"]["induction"][1, 2].mean()), abs=0.005)
    sets = tree["sets"].to_dataset().sel(set="induction heads", ablation="zero")
    p = f"{float(sets['p_accuracy'].sel(control='same layers')):.3f} ({int(sets['draws'].sel(control='same layers'))})"
    assert p in text
    estimates = tree["estimates/patching"].to_dataset().sel(estimator="gradient")
    rho, miss = (f"{float(estimates[fact]):.2f}" for fact in ("rank_correlation", "largest_miss"))
    row = re.search(r'<th scope="row">patching</th><td>gradient</td><td class="n">([-\d.]+)</td>(.*?)</tr>', text)
    assert row[1] == rho
    assert f'<td class="n">{miss}</td><td>logit</td><td>{", ".join(estimates["worst"].values[:3])}</td>' in row[2]
    assert "<td>moon</td>" in text


def test_every_path_stands_in_a_figure_and_a_table(tree, report):
    text, ds = report.read_text(), tree["composition"].to_dataset()
    assert {"into k", "into q", "into v"} <= {*re.findall(r"into [qkv]", text.rpartition("</main>")[2])}
    before = float(ds["path_baseline"].sel(run="clean").mean())
    for sender in ds["sender"].values[ds["is_sender"].values == 1]:
        here = ds.sel(sender=sender, path="k")
        after, p = float(here["path_logit_diff"].mean()), float(here["p_path"])
        low, high = (f"{float(here[f'path_effect_{end}']):+.2f}" for end in ("low", "high"))
        cells = ["–", f"{after:+.2f}", f"{after - before:+.2f}", f"{low} to {high}", f"{p:.3f}"]
        found = re.search(rf'<th scope="row">{sender}</th><td>k of the induction heads</td>(.*?)</tr>', text)[1]
        assert re.findall(r"<td[^>]*>([^<]*)</td>", found) == cells
    for kind in "qkv":
        score, pair = float(ds["strongest_score"].sel(kind=kind)), str(ds["strongest_pair"].sel(kind=kind).values)
        sender, receiver = pair.split(" to ")
        assert re.search(rf'<th scope="row">{sender}</th><td>{kind} of {receiver}</td><td[^>]*>{score:.2f}</td>', text)


def test_text_of_the_result_is_escaped(tree, tmp_path):
    evil = with_words(tree)
    patterns = evil["patterns"].to_dataset()
    evil["patterns"] = patterns.assign_coords(token=("position", [EVIL] * patterns.sizes["position"]))
    findings = [{"group": "behaviour", "text": EVIL}]
    evil.attrs |= {"title": EVIL, "model": EVIL, "conclusion": json.dumps(findings)}
    evil.attrs |= {"device": EVIL, "task": EVIL, "versions": EVIL, "model_shape": EVIL}
    text = write_report(evil, tmp_path / "evil.html").read_text()
    assert "<script>window.pwned" not in text
    assert "<img" not in text


def test_a_model_without_induction_heads_is_reported_too(tmp_path):
    tokenizer = hw.load(planted_model()).tokenizer
    config = GPT2Config(vocab_size=24, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=23, eos_token_id=23)
    model = hw.load(GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)
    result = InductionStudy(n=4, length=6, draws=2).run(model)
    assert "set" not in result["sets"].dims
    text = write_report(result, tmp_path / "none.html").read_text()
    assert [name for name in Outline(text).headings if name in QUESTIONS] == QUESTIONS
    assert "there is no set to ablate" in text
    assert "no head can read what another wrote" in text


def stop(*given):
    raise RuntimeError("stopped")


def test_a_place_that_cannot_be_written_is_refused(tree, tmp_path, monkeypatch):
    with pytest.raises(ResultError, match="is a folder"):
        write_report(tree, tmp_path)
    kept = tmp_path / "kept.html"
    kept.write_text("before")
    monkeypatch.setattr(writing, "render", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        write_report(tree, kept)
    assert kept.read_text() == "before"


def test_groups_that_it_does_not_know_are_shown_too(tree, tmp_path):
    more = xr.DataTree.from_dict(
        {node.path: node.to_dataset() for node in tree.descendants if node.path in ("/heads", "/behaviour")}
        | {"/mine/deep": xr.Dataset({"found": ("layer", [1.5, 2.5], {"long_name": "what I found", "units": "nat"})})}
    )
    more.attrs = dict(tree.attrs)
    text = write_report(more, tmp_path / "more.html").read_text()
    outline = check_whole(text)
    assert [name for name in outline.headings if name in QUESTIONS] == [*QUESTIONS[:3], *QUESTIONS[-2:]]
    assert "The group mine/deep" in outline.headings
    assert '<th scope="row">layer 1</th><td class="n">2.50</td>' in text
