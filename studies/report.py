"""The report of an induction study: one HTML file that opens with the network off. Reads the tree, measures nothing."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import xarray as xr

from .page import Page, bullets, number, paragraphs, table
from .results import check_writable, write_beside
from .sections import SECTIONS, Section


def write_report(tree: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write the report of a result.

    Parameters
    ----------
    tree : DataTree
        From `InductionStudy.run`, or read with `open_tree`. Groups that are missing are left out.
    path : str or path
        The HTML file.

    Returns
    -------
    Path
        The file, complete: it is written beside its name and renamed.
    """
    target = check_writable(path)
    text = render(tree)
    return write_beside(target, lambda beside: Path(beside).write_text(text, encoding="utf-8"))


def render(tree: xr.DataTree) -> str:
    """The report as HTML text."""
    attrs = tree.attrs
    page = Page(str(attrs.get("title", "Induction heads")))
    findings: dict[str, list[str]] = {}
    for finding in json.loads(attrs.get("conclusion", "[]")):
        findings.setdefault(finding["group"], []).append(finding["text"])
    sections = [section for section in SECTIONS if section.key in tree.children]
    _top(page, tree, sections)
    page.add("<main>")
    _answer(page, findings, sections)
    for section in sections:
        page.add(f'<section id="{section.key}"><h2>{escape(section.question)}</h2>')
        page.add(paragraphs(findings.get(section.key, [])))
        section.fill(page, tree[section.key].to_dataset(), tree)
        page.add("</section>")
    _what_was_run(page, tree)
    page.add("</main><footer>Written by headwise. Everything in this file is in this file: it loads nothing.</footer>")
    return page.html()


def _top(page: Page, tree: xr.DataTree, sections: list[Section]) -> None:
    attrs = tree.attrs
    study, shape = _json(attrs, "study"), _json(attrs, "model_shape")
    parts = [f"The induction-head analysis of {attrs.get('model', 'a model')}"]
    if shape:
        parts.append(f"{shape.get('layers')} layers of {shape.get('heads')} heads")
    if study:
        prompts = f"{study.get('n')} prompts in which {study.get('length')} random tokens are repeated once"
        parts.append(f"on {prompts} (seed {study.get('seed')})")
    line = ", ".join(parts) + "."
    page.add(f'<header><h1>{escape(page.title)}</h1><p class="lead">{escape(line)}</p>')
    links = [
        ("answer", "The answer"),
        *((one.key, one.question) for one in sections),
        ("run", "What was run, and how to run it again"),
    ]
    items = "".join(f'<li><a href="#{key}">{escape(name)}</a></li>' for key, name in links)
    page.add(f'<nav aria-label="Contents"><ol>{items}</ol></nav>')
    page.add(
        "<noscript><p><strong>The figures need JavaScript; text and tables do not.</strong></p></noscript></header>"
    )


def _answer(page: Page, findings: dict[str, list[str]], sections: list[Section]) -> None:
    """The summary, what was not shown, and all sentences, folded where there is a summary: sections repeat them."""
    page.add('<section id="answer"><h2>The answer</h2>')
    summary, limits = findings.get("summary", []), findings.get("limits", [])
    if summary:
        page.add(f'<div class="summary">{paragraphs(summary)}</div>')
    else:
        _by_topic(page, findings, sections)
    if limits:
        page.add('<div class="not"><h3>What was not shown</h3>', bullets(limits), "</div>")
    if summary:
        page.add("<details><summary>All sentences, by topic</summary>")
        _by_topic(page, findings, sections)
        page.add("</details>")
    page.add("</section>")


def _by_topic(page: Page, findings: dict[str, list[str]], sections: list[Section]) -> None:
    for section in sections:
        if texts := findings.get(section.key):
            page.add(f'<div class="topic"><h3><a href="#{section.key}">{escape(section.topic)}</a></h3>')
            page.add(bullets(texts), "</div>")


PROVENANCE = {
    "model": "model",
    "model_revision": "revision",
    "model_family": "family",
    "model_shape": "shape",
    "weight_hash": "hash of the weights",
    "tokenizer_hash": "hash of the tokenizer",
    "device": "device",
    "dtype": "number type",
    "executed": "where it ran",
    "platform": "platform",
    "versions": "versions",
    "created": "when",
    "seconds": "seconds in all",
    "study": "study",
    "task": "task",
}


KEPT_PLACES = ("main", "local", "memory", "shipped")
"""Revisions that a model has without being asked for one."""


def _what_was_run(page: Page, tree: xr.DataTree) -> None:
    attrs = tree.attrs
    page.add('<section id="run"><h2>What was run, and how to run it again</h2>')
    rows = [(words, _plain(attrs[key])) for key, words in PROVENANCE.items() if key in attrs]
    if rows:
        page.add(table(("what", "value"), rows, long=(1,)))
    if again := _again(attrs):
        page.add("<h3>How to run it again</h3>", *again)
    seconds = _json(attrs, "seconds_by_stage")
    if seconds:
        names = {key: str(group.attrs.get("long_name", key)) for key, group in tree.children.items()}
        stages = [(names.get(key, key), number(float(value), ".1f")) for key, value in seconds.items()]
        page.add("<h3>Time by stage</h3>", table(("stage", "seconds"), stages))
    page.add("</section>")


def _again(attrs: Mapping[Any, Any]) -> list[str]:
    """The command and the Python lines that repeat the study; nothing where the tree does not say what was run."""
    if "study" not in attrs or "model" not in attrs:
        return []
    from .induction import InductionStudy

    study, model = InductionStudy.from_json(attrs["study"]), str(attrs["model"])
    revision = str(attrs.get("model_revision", "main"))
    hub = {} if revision in KEPT_PLACES else {"--revision": revision}
    options = {"--model": model, **hub, "--n": study.n, "--length": study.length, "--seed": study.seed}
    command = "headwise induction " + " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options.items())
    lines = [
        "import headwise as hw",
        "from headwise.studies import InductionStudy",
        "from headwise.studies.report import write_report",
        "",
        f"model = hw.load({model!r}{f', revision={revision!r}' if hub else ''})",
        f"tree = {study!r}.run(model)",
        'hw.write_netcdf(tree, "induction.nc")',
        'write_report(tree, "induction.html")',
    ]
    default = InductionStudy(n=study.n, length=study.length, seed=study.seed)
    differ = [
        name for name in ("bos", "threshold", "draws", "untrained") if getattr(study, name) != getattr(default, name)
    ]
    notes = [f"The command does not set {', '.join(differ)}; the Python lines do."] if differ else []
    if revision in ("memory", "local"):
        was = "an object in memory" if revision == "memory" else "a local folder"
        notes.append(f"The model was {was}: put the path of a folder with the same weights in the place of its name.")
    blocks = [f"<pre><code>{escape(text)}</code></pre>" for text in (command, "\n".join(lines))]
    return [*blocks, paragraphs(notes)]


def _plain(value: object) -> str:
    """JSON objects as ``name value`` pairs, everything else as it is."""
    try:
        read = json.loads(str(value))
    except json.JSONDecodeError:
        return str(value)
    if not isinstance(read, dict):
        return str(value)
    return ", ".join(f"{name} {json.dumps(one) if not isinstance(one, str) else one}" for name, one in read.items())


def _json(attrs: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """An attribute that holds a JSON object; empty where there is none."""
    read: dict[str, Any] = json.loads(attrs.get(name, "{}"))
    return read
