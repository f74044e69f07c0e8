"""The app in a real headless Chromium that clicks through it."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from urllib.parse import quote

import numpy as np
import pytest

import headwise as hw
from headwise.interventions import Head, Layer
from headwise.metrics import prefix_matching, previous_token
from headwise.studies import Prompts, RepeatedTokens, capture, measure
from headwise.studies.app import firing, head_facts
from headwise.studies.app.folder import Folder
from tests.support import browser
from tests.support.app import (
    FIGURES,
    SWEEP,
    Page,
    in_this_process,
    named,
    needs_browser,
)


@pytest.fixture(scope="module")
def chromium():
    if browser.found() is None:
        pytest.skip("no Chromium is installed")
    with browser.Browser() as one:
        yield one


@pytest.fixture
def page(chromium, served):
    """A page in a tab of its own; afterwards, nothing may have left the machine or gone wrong."""
    tab = chromium.tab()
    yield Page(tab, served)
    own = (served, served.replace("http", "ws"), "data:", f"blob:{served}", "about:")
    assert [one for one in tab.requests if not one.startswith(own)] == []
    assert tab.errors == []
    tab.close()


@needs_browser
def test_a_click_on_a_head_shows_its_pattern_from_the_file(page, tree):
    stored = tree["patterns"].to_dataset()
    wanted = tree["heads"]["induction"].mean("example")
    best = Head(*np.unravel_index(int(wanted.values.argmax()), wanted.shape))
    page.open().head(str(best))
    page.shows("grid", wanted)
    name = next(str(one) for one in stored["shown"].values if str(one) != str(best))
    head = Head.parse(name)
    page.click("grid", head.layer, head.head)
    page.head(name)
    page.attends("pattern", name, stored["pattern"].sel(shown=name).transpose("query", "key"))
    page.tab.wait(f"marked('grid').join() == '{head.layer},{head.head}'")
    page.tab.wait(f"location.search.includes('head={name}')")
    page.says("From the file.")
    page.says("Change of loss (nat) without it")
    change = hw.effect(tree["ablation"].to_dataset(), "loss").sel(layer=head.layer, head=head.head, ablation="zero")
    assert f"{change.mean():+.3f}" in page.tab.evaluate("deep('td').map(one => one.textContent)")


@needs_browser
def test_the_pattern_of_any_other_head_is_computed(page, tree, words_model):
    shown = {str(name) for name in tree["patterns"]["shown"].values}
    head = next(Head(0, one) for one in words_model.heads if str(Head(0, one)) not in shown)
    page.open()
    page.click("grid", head.layer, head.head)
    page.says("Computed now, on the prompt of the file.")
    captured = capture(words_model, RepeatedTokens(n=1, length=8), [head.pattern])[f"{head}_pattern"].isel(example=0)
    page.attends("pattern", str(head), captured)
    page.choose("Attention on", "prompt 2 of the study")
    page.says("Computed now, on a prompt that was measured.")
    captured = capture(words_model, RepeatedTokens(n=4, length=8), [head.pattern])[f"{head}_pattern"].isel(example=1)
    page.attends("pattern", str(head), captured)
    page.tab.wait("location.search.includes('pattern=1')")


@pytest.mark.heavy
@needs_browser
def test_another_variable_and_another_label_change_the_grid(page, tree):
    ds = tree["ablation"].to_dataset()
    page.open()
    page.choose("Variable", named(tree, "ablation/loss").label)
    page.tab.wait("box('Ablation')")
    page.shows("grid", hw.effect(ds, "loss").sel(ablation="zero").mean("example"))
    page.choose("Ablation", "mean")
    page.tab.wait("location.search.includes('at.ablation=mean')")
    page.shows("grid", hw.effect(ds, "loss").sel(ablation="mean").mean("example"))
    page.choose("Show", "value")
    page.tab.wait("location.search.includes('show=value')")
    page.shows("grid", ds["loss"].sel(ablation="mean").mean("example"))


@needs_browser
def test_a_typed_prompt_fires_the_heads(page, words_model):
    text = "lion tiger bear lion tiger"
    page.open().prompt(text)
    page.tab.wait("!!inside('fires')")
    measured = measure(words_model, Prompts((text,)), None, [prefix_matching, previous_token])
    wanted = {name: measured[name].isel(example=0) for name in ("prefix_matching", "previous_token")}
    page.shows("fires", wanted["prefix_matching"])
    page.click("fires", 0, 3)
    page.head("L0H3")
    captured = capture(words_model, Prompts((text,)), [Head(0, 3).pattern])["L0H3_pattern"].isel(example=0)
    page.attends("live", "L0H3", captured)
    for part in ("fires", "grid"):
        page.tab.wait(f"marked('{part}').join() == '0,3'")
    assert set(page.tab.evaluate("axisOf('live')")) == set(text.split())
    page.choose("Show attention to", "the token before")
    page.tab.wait("location.search.includes('fires=previous_token')")
    page.shows("fires", wanted["previous_token"])
    page.choose("Show attention to", "one token")
    page.choose("Token", "1: tiger")
    page.tab.wait("location.search.includes('token=1')")
    whole = capture(words_model, Prompts((text,)), [Layer(layer).pattern for layer in words_model.layers])
    largest = np.stack([whole[f"L{layer}_pattern"][0, :, 2:, 1].max("query") for layer in words_model.layers])
    page.shows("fires", largest)


@needs_browser
def test_the_next_tokens_with_the_picked_head_and_without_it(page, words_model):
    text = "apple banana cherry apple"
    page.open("?head=L0H3").prompt(text)

    def says(place, condition, what):
        said = hw.predict(words_model, text, what, top=8).isel(example=0)
        wanted = dict(zip(said["token"].values.tolist(), said["prob"].values.tolist(), strict=True))
        page.tab.wait(f"likely().length > {place} && near(likely()[{place}][1], {json.dumps(wanted)})", str(wanted))
        assert page.tab.evaluate(f"likely()[{place}][0]") == condition

    page.tab.wait("!!inside('fires')")
    says(0, "as it is", None)
    says(1, "without L0H3", hw.ZeroAblate("L0H3"))
    page.click("fires", 1, 2)
    says(1, "without L1H2", hw.ZeroAblate("L1H2"))
    page.fill("Next token, without", "L0H3, L1.mlp_out")
    says(1, "without L0H3, L1.mlp_out", hw.ZeroAblate("L0H3") + hw.ZeroAblate("L1.mlp_out"))
    page.tab.wait("location.search.includes('without=L0H3')")
    page.fill("Next token, without", "L7H1")
    page.says("L7H1")
    page.tab.wait("likely().length == 0")
    page.fill("Next token, without", "")
    says(1, "without L1H2", hw.ZeroAblate("L1H2"))


@needs_browser
def test_what_comes_later_does_not_move_the_grid(chromium, folder, tree, monkeypatch):
    names = {str(name) for name in tree["patterns"]["shown"].values}
    other = next(head for head in range(8) if f"L0H{head}" not in names)
    held = {name: threading.Event() for name in ("likely", "fire_study")}

    def later(name, real):
        return lambda *arguments: held[name].wait(60) and real(*arguments)

    for name in held:
        monkeypatch.setattr(firing, name, later(name, getattr(firing, name)))
    with in_this_process(folder) as (_, url):
        page = Page(chromium.tab(), url)
        page.tab.size(390, 800, touch=True)
        place = "inside('fires').canvas_view.el.getBoundingClientRect().top + scrollY"
        page.open("?prompt=apple%20banana%20apple").tab.wait("!!inside('fires') && !!inside('pattern')")
        before = page.tab.wait(place)
        held["likely"].set()
        page.tab.wait("likely().length == 2")
        assert page.tab.evaluate(place) == before
        page.click("fires", 0, other)
        page.says("Computing the patterns")
        page.tab.wait(f"titleOf('live').startsWith('L0H{other}')")
        before = page.tab.evaluate(place)
        held["fire_study"].set()
        page.says("Computed now")
        page.tab.wait(f"titleOf('pattern').startsWith('L0H{other}')")
        assert abs(page.tab.evaluate(place) - before) < 30  # a line of words more or less
        page.tab.close()


@needs_browser
def test_prompts_that_cannot_be_run_are_answered_in_words(page):
    page.open().prompt("apple xyzzy apple")
    page.says("'xyzzy' is not in the vocabulary of words-2l")
    page.prompt("apple")
    page.says("this prompt is one token")
    page.prompt("apple " * 200)
    page.says("at most")
    page.prompt("   ")
    page.says("type a prompt first")
    page.prompt("apple banana cherry")
    page.says("No token of this prompt comes back")
    page.prompt("apple banana apple")
    page.tab.wait("!!inside('live')")


@needs_browser
def test_a_link_opens_what_it_names(page, words_model):
    text = "sun moon sun"
    page.open(
        f"?result={quote(SWEEP)}&variable=accuracy&show=value&head=L0H5&prompt={quote(text)}&fires=previous_token"
    )
    page.head("L0H5")
    page.tab.wait("marked('grid').join() == '0,5'")
    assert page.tab.evaluate("box('Result set').value") == SWEEP
    page.tab.wait("!!inside('live')")
    assert page.tab.evaluate("box('Prompt').value") == text
    measured = measure(words_model, Prompts((text,)), None, [previous_token])["previous_token"]
    page.shows("fires", measured.isel(example=0))


@needs_browser
def test_a_link_to_what_is_not_there_still_opens(page):
    page.open("?result=../secret.nc&variable=nothing&head=L9H9&pattern=99&at.example=77")
    page.says("There is no")
    page.head("L1")


@needs_browser
def test_a_measurement_is_shown_too_with_the_prompts_it_was_measured_on(page, folder, words_model):
    page.open(f"?result={quote(SWEEP)}&head=L1H1")
    page.head("L1H1")
    ds = Folder(folder).open(SWEEP).to_dataset()
    page.shows("grid", hw.effect(ds, "loss").mean("example"))
    captured = capture(words_model, RepeatedTokens(n=4, length=8), [Head(1, 1).pattern])["L1H1_pattern"].isel(example=0)
    page.attends("pattern", "L1H1", captured)
    page.says("This file holds no composition scores.")


@pytest.mark.heavy
@needs_browser
def test_tabs_do_not_share_what_is_chosen(page, chromium, served):
    page.open("?head=L0H1").head("L0H1")
    other = Page(chromium.tab(), served).open("?head=L1H0")
    other.head("L1H0")
    other.click("grid", 0, 6)
    other.head("L0H6")
    page.click("grid", 0, 2)
    page.head("L0H2")
    assert "L0H6" in other.tab.evaluate("words()")
    other.tab.close()


@needs_browser
def test_everything_can_be_reached_with_the_keyboard(page):
    page.open()
    reached = []
    for _ in range(40):
        page.tab.press("Tab")
        reached.append(
            page.tab.evaluate(
                "(() => { let one = document.activeElement; while (one.shadowRoot && one.shadowRoot.activeElement)"
                " one = one.shadowRoot.activeElement; const label = one.getRootNode().querySelector('label');"
                " return one.tagName == 'BUTTON' ? one.textContent.trim() : label ? label.textContent.trim() : ''; })()"
            )
        )
    assert {"Result set", "Variable", "Example", "Head", "Attention on", "Prompt", "Run"} <= set(reached)
    assert any(one.startswith("L0H") for one in reached)  # partners
    before = page.tab.evaluate("box('Head').value")
    page.tab.evaluate("box('Head').focus()")
    page.tab.press("ArrowDown")
    page.tab.wait(f"box('Head').value != {json.dumps(before)}")
    page.head(page.tab.evaluate("box('Head').selectedOptions[0].textContent"))


@pytest.mark.heavy
@needs_browser
def test_a_partner_is_one_click_away_and_back_goes_back(page, tree):
    page.open("?head=L1H2").head("L1H2")
    best = head_facts.partners(tree, Head(1, 2))["from", "k"][0].head
    page.tab.evaluate(f"deep('button').find(one => one.textContent.startsWith('{best}')).click()")
    page.head(str(best))
    page.tab.wait(f"location.search.includes('head={best}')")
    page.tab.evaluate("history.back()")
    page.tab.wait("typeof deep == 'undefined' && Bokeh.documents.length && Bokeh.documents[0].is_idle")
    page.tab.evaluate(FIGURES)
    page.head("L1H2")


@needs_browser
def test_bad_files_are_named_with_their_reasons(page):
    page.open()
    page.says("3 files cannot be shown")
    page.says("<b>noise.nc")


@needs_browser
@pytest.mark.parametrize("width", [375, pytest.param(1280, marks=pytest.mark.heavy)])
def test_nothing_is_wider_than_the_window(page, width):
    page.tab.size(width, 800, touch=width < 600)
    page.open("?prompt=apple%20banana%20apple%20banana").tab.wait("!!inside('live')")
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
def test_an_empty_folder_says_what_to_do(chromium, tmp_path):
    (tmp_path / "results").mkdir()
    with in_this_process(tmp_path / "results") as (_, served):
        session = Page(chromium.tab(), served).open()
        session.says("There is no result in results yet.")
        assert session.tab.errors == []
        session.tab.close()


@pytest.mark.heavy
@needs_browser
def test_sessions_go_with_their_tabs(chromium, folder, monkeypatch):
    from headwise.studies.app import session as pages

    kept = []

    class Watched(pages.Session):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(weakref.ref(self))

    monkeypatch.setattr(pages, "Session", Watched)
    with in_this_process(folder, unused=4000) as (server, url):
        session = Page(chromium.tab(), url).open()
        assert len(server.get_sessions("/")) == len(kept) == 1
        session.click("grid", 0, 4)
        session.head("L0H4")
        session.tab.close()
        other = chromium.tab()
        other.open("about:blank")
        asked = time.monotonic()
        while (server.get_sessions("/") or kept[0]() is not None) and time.monotonic() - asked < 60:
            gc.collect()
            other.evaluate("new Promise(done => setTimeout(done, 50))")
        assert server.get_sessions("/") == []
        assert kept[0]() is None
        other.close()
