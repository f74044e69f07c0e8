"""The report: what is in the file, and, where Chromium is installed, how a browser shows it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from planted import planted_model
from transformers import GPT2Config, GPT2LMHeadModel

import headwise as hw
from headwise.errors import ResultError
from headwise.studies import InductionStudy
from headwise.studies.report import write_report

QUESTIONS = [
    "The answer",
    "How well does the model do on repeated sequences?",
    "Which heads are which?",
    "What do they attend to?",
    "What happens without a head?",
    "Is it these heads, or any heads?",
    "Which of q, k, v carries the pattern, which the token?",
    "Do previous-token heads feed the induction heads?",
    "Do the same heads fire on words?",
    "Would gradients have told the same?",
    "What was run, and how to run it again",
]
EVIL = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">'


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


class Outline(HTMLParser):
    """Headings, links, ids and the sources of whatever a page would load."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.levels, self.targets, self.ids, self.sources, self.open = [], [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.append(attrs.get("id"))
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
            self.headings.append("")
            self.open = tag
        if tag == "a":
            self.targets.append(attrs["href"])
        self.sources += [attrs[name] for name in ("src", "srcset", "data") if name in attrs]
        if tag == "link":
            self.sources.append(attrs["href"])

    def handle_endtag(self, tag):
        if tag == self.open:
            self.open = None

    def handle_data(self, data):
        if self.open:
            self.headings[-1] += data


def test_every_question_has_its_section_in_order(report):
    outline = Outline(report.read_text())
    assert [name for name in outline.headings if name in QUESTIONS] == QUESTIONS
    assert outline.levels[0] == 1
    assert outline.levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(outline.levels, outline.levels[1:], strict=False))
    assert {target.removeprefix("#") for target in outline.targets} <= set(outline.ids)


def test_the_file_is_complete_in_itself(report):
    text = report.read_text()
    assert report.stat().st_size < 5e6
    assert set(Outline(text).sources) == {"data:,"}
    assert "default-src 'none'" in text
    assert '<html lang="en">' in text
    assert text.count('role="img" aria-label="') == text.count("<figure>") > 10


def test_every_sentence_of_the_conclusion_is_there(tree, report):
    text = report.read_text().replace("\u00a0", " ")
    for finding in json.loads(tree.attrs["conclusion"]):
        sentence = finding["text"].split("(")[0].replace("'", "&#x27;")
        assert sentence in text, sentence
    assert "What was not shown" in text


def test_it_says_how_to_run_it_again(tree, report):
    text = report.read_text()
    assert "headwise induction --model GPT2LMHeadModel --n 8 --length 10 --seed 0" in text
    assert "draws=20" in text
    assert "The command does not set draws; the Python lines do." in text
    assert tree.attrs["weight_hash"] in text


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


def test_text_of_the_result_is_escaped(tree, tmp_path):
    evil = with_words(tree)
    patterns = evil["patterns"].to_dataset()
    evil["patterns"] = patterns.assign_coords(token=("position", [EVIL] * patterns.sizes["position"]))
    findings = [{"group": "behaviour", "text": EVIL}]
    evil.attrs |= {"title": EVIL, "model": EVIL, "conclusion": json.dumps(findings)}
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


def test_a_place_that_cannot_be_written_is_refused(tree, tmp_path):
    with pytest.raises(ResultError, match="is a folder"):
        write_report(tree, tmp_path)
    kept = tmp_path / "kept.html"
    kept.write_text("before")
    broken = tree.copy()
    broken.attrs = tree.attrs | {"conclusion": "{"}
    with pytest.raises(json.JSONDecodeError):
        write_report(broken, kept)
    assert kept.read_text() == "before"


PLUG = """import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])"""
"""Becomes the program of its arguments, with two pipe ends as file descriptors 3 and 4, where Chromium wants them."""


class Browser:
    """Chromium without a window, driven over a pipe by its devtools protocol."""

    def __init__(self, program, folder):
        self.reply, theirs_out = os.pipe()
        theirs_in, self.send = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PLUG, str(theirs_in), str(theirs_out), program, *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.read, self.number, self.events, self.session = b"", 0, [], {}

    def connect(self):
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.number += 1
        os.write(
            self.send,
            json.dumps({"id": self.number, "method": method, "params": params, **self.session}).encode() + b"\0",
        )
        while True:
            while b"\0" not in self.read:
                assert select.select([self.reply], [], [], 20)[0], f"no answer to {method}"
                arrived = os.read(self.reply, 1 << 20)
                assert arrived, f"Chromium ended before it answered {method}"
                self.read += arrived
            one, self.read = self.read.split(b"\0", 1)
            message = json.loads(one)
            if message.get("id") == self.number:
                return message["result"]
            self.events.append(message)

    def value(self, script):
        return self("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script, seconds=10):
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"not in {seconds} s: {script}"
            time.sleep(0.05)

    def open(self, path, width):
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self("Page.navigate", url=path.as_uri())
        self.wait(
            "document.readyState == 'complete' && Bokeh.documents.length && Bokeh.documents.every(d => d.is_idle)"
        )

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self("Browser.close")
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.send)
        os.close(self.reply)


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed: how a browser shows the report is not checked")
    started = Browser(program, tmp_path / "profile")
    try:
        started.connect()
        yield started
    finally:
        started.close()


HOVERED = """(() => { const found = []; const walk = node => { if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.children || []) { if (child.classList.contains("bk-Tooltip")) found.push(
    (child.shadowRoot || child).textContent); walk(child); } }; walk(document.body); return found.join(" "); })()"""
PLACE = """(() => { document.documentElement.style.scrollBehavior = "auto"; const panel = document.querySelector(
  "#heads .panel"); panel.scrollIntoView({block: "center"}); const box = panel.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + 50]; })()"""


def test_a_browser_shows_it_whole_quietly_and_with_tooltips(browser, report):
    for width in (1280, 390):
        browser.open(Path(report), width)
        assert browser.value("document.documentElement.scrollWidth") <= browser.value("innerWidth") == width
        assert browser.value("document.querySelectorAll('.panel').length") == len(browser.value(CANVASES))
        if width == 1280:
            x, y = browser.value(PLACE)
            for shift in (4, 2, 0):
                browser("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift, y=y)
            browser.wait(f"{HOVERED}.includes('unit')")
            shown = browser.value(HOVERED)
            assert re.search(r"head:\s*L1H\d", shown)
            assert re.search(r"layer:\s*1", shown)
            assert re.search(r"induction score:\s*0\.\d+|induction score:\s*1\.0", shown)
            assert re.search(r"unit:\s*pure number", shown)
    told = [
        event["params"] for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")
    ]
    bad = [one for one in told if one.get("entry", one).get("level", one.get("type")) in ("error", "assert")]
    assert not bad
    assert not [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
    requests = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert {url for url in requests if not url.startswith("data:")} == {Path(report).as_uri()}


CANVASES = """[...document.querySelectorAll(".panel > *")].filter(one => one.firstElementChild &&
  one.firstElementChild.getBoundingClientRect().height > 50).map(() => 1)"""
