"""The report of a result: one HTML file that opens with the network off. Reads the result, measures nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError
from ..analyses.estimate_verdicts import NAMES, VERDICTS, verdict
from ..inspection.findings import findings
from ..output.page import Page, bullets, number, paragraphs, table
from ..output.phrases import count, listed
from ..output.progress import Progress
from ..reproduce.recipe import recipe
from ..storage.attributes import json_in, json_or_text, number_in, with_plain_attrs
from ..storage.files import check_writable, write_beside
from ..storage.netcdf import reading
from ..storage.reading import as_tree, open_result
from ..storage.record import KINDS, LOOKS, Record
from ..tasks.chat import prompt_in_words
from . import circuit, formation, generic, inside, measurement, series, text, text_heads
from .assumptions import Ran, assumed, untested
from .changes import metrics_in
from .induction import QUESTION, SECTIONS, Section, compared


def write_report(
    result: xr.DataTree | xr.Dataset | str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report of a result.

    Parameters
    ----------
    result : DataTree, Dataset, str or path
        Of a study, of `measure`, or of anything else: from Python, read with `open_result`, or the file that holds it.
        An induction study gets its own sections, a measurement one for each metric, and every other group one that
        shows what it holds.
    path : str or path, optional
        The HTML file. Left out, the one beside the file that the result was read from.

    Returns
    -------
    Path
        The file, complete: it is written beside its name and renamed.

    Raises
    ------
    ResultError
        It cannot be written, or the result cannot be read.
    DeclarationError
        It is of something else than a result, or of one that no file holds, and no path was given.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, hw.ZeroAblate(hw.Head(0, 3)))
    >>> hw.write_report(ds, "results/loss.html").name
    'loss.html'
    """
    if isinstance(result, str | os.PathLike):
        result = open_result(result, load=True)
    if not isinstance(result, xr.DataTree | xr.Dataset):
        raise DeclarationError(
            f"no report of {type(result).__name__}: possible are a Dataset, a DataTree, and the path of a file"
        )
    source = result.encoding.get("source")
    if path is None and not source:
        raise DeclarationError("this result was not read from a file: say where its report goes, path='report.html'")
    target = check_writable(path if path is not None else Path(str(source)).with_suffix(".html"))
    with reading(Path(source)) if source else nullcontext():
        text = render(result, Path(source or target.with_suffix(".nc")).name)
    return write_beside(target, lambda beside: Path(beside).write_text(text, "utf-8", "replace"))


def render(result: xr.DataTree | xr.Dataset, file: str = "result.nc") -> str:
    """The report as HTML text.

    Parameters
    ----------
    result : DataTree or Dataset
    file : str
        Name of the file that holds the result, for the lines that run it again.
    """
    tree = with_plain_attrs(as_tree(result))
    told = _contents(tree)
    page = Page(told.title)
    _top(page, told)
    page.add('<main id="content" tabindex="-1">')
    _answer(page, told)
    root = tree.to_dataset()
    said = {*told.findings.get("summary", [])}
    with Progress("report", unit="sections") as bar:
        for number, section in enumerate(told.sections):
            bar.update(number, len(told.sections))
            page.add(f'<section id="{section.key}"><h2>{escape(section.question)}</h2>')
            texts = [text for text in told.findings.get(section.key, []) if text not in said]
            page.add(f'<div class="said">{paragraphs(texts)}</div>' if said and texts else "")
            section.fill(page, tree[section.key].to_dataset() if section.key in tree.children else root, tree)
            page.add("</section>")
    _what_was_run(page, tree, file)
    _assumptions(page, tree)
    page.add("</main><footer>Written by headwise. Everything in this file is in this file: it loads nothing.</footer>")
    return page.html()


@dataclass(frozen=True)
class Contents:
    """What a report says, before it is laid out.

    Attributes
    ----------
    title, question, lead : str
    sections : list of Section
    findings : dict of str to list of str
        Key of a section (or ``summary``, or ``limits``) to its sentences.
    """

    title: str
    question: str
    lead: str
    sections: list[Section]
    findings: dict[str, list[str]] = field(default_factory=dict)


def _contents(tree: xr.DataTree) -> Contents:
    attrs, record = tree.attrs, Record.from_attrs(tree.attrs)
    runs = {str(run) for node in tree.subtree if "run" in node.coords for run in np.ravel(node.coords["run"].values)}
    lead = _lead(record, "corrupted" in runs)
    if record.series and "step" in tree.dims:
        said = {"summary": series.summary(tree)}
        title = series.title(record, tree)
        return Contents(title, SERIES_QUESTION, f"{lead} {series.lead(tree)}", series.sections(tree), said)
    if record.study.get("type") == "InductionStudy":
        known = [section for section in SECTIONS if section.key in tree.children]
        other = generic.sections(tree, tuple(section.key for section in known))
        title = str(attrs.get("title", "Induction heads"))
        return Contents(title, QUESTION, lead, known + other, _findings(attrs))
    if record.study.get("type") == "FormationStudy":
        sections = [section for section in formation.SECTIONS if section.key in tree.children]
        return Contents(str(attrs["title"]), formation.QUESTION, _trained(record), sections, _findings(attrs))
    if record.study.get("type") == "TextInduction":
        title = str(attrs.get("title", "Induction on text"))
        sections = [section for section in text.SECTIONS if section.key in tree.children]
        return Contents(title, text.QUESTION, f"{lead} {text.lead(tree)}".strip(), sections, _findings(attrs))
    if record.study.get("type") == "CircuitStudy":
        title = str(attrs.get("title", "A circuit"))
        sections = [section for section in circuit.SECTIONS if section.key in tree.children]
        return Contents(title, circuit.QUESTION, f"{lead} {circuit.lead(tree)}".strip(), sections, _findings(attrs))
    root = tree.to_dataset()
    if record.kind == "text_heads":
        title, said = str(attrs.get("title", "Heads on text")), text_heads.sentences(root)
        return Contents(title, text_heads.QUESTION, f"{lead} {text_heads.lead(attrs)}", [text_heads.SECTION], said)
    if not tree.children and metrics_in(root):
        said = measurement.sentences(root) | {"summary": measurement.summary(root), "limits": measurement.limits(root)}
        title = str(attrs.get("title", measurement.title(root)))
        return Contents(title, measurement.question(root), lead, measurement.sections(root), said)
    if record.kind == "estimates" and {*ESTIMATED} <= {*root.data_vars}:
        section = Section("estimates", "Estimates", "How near do they come?", _estimates)
        asked = "Would gradients have told what was measured?"
        title = str(attrs.get("title", f"Estimates and exact effects of {record.model}"))
        return Contents(title, asked, lead, [section], {"summary": _trusted(root)})
    if record.kind in LOOKS:
        said = {"summary": [f"{one[:1].upper()}{one[1:]}." for one in findings(root)]}
        title = str(attrs.get("title", f"{KINDS[record.kind].capitalize()} of {record.model}"))
        return Contents(title, inside.QUESTIONS[record.kind], lead, inside.sections(record.kind), said)
    sections = generic.sections(tree)
    said = _findings(attrs) or {section.key: generic.says(tree, section) for section in sections}
    kind = "Activations" if record.kind == "capture" else "A result"
    title = str(attrs.get("title", f"{kind} of {record.model}" if record.model else kind))
    return Contents(title, str(attrs.get("question", "")), lead, sections, said)


SHOWN_IDS = 12
"""Token ids of a prompt that a sentence shows."""
SERIES_QUESTION = "What forms while the model is trained, and when?"
ESTIMATED = (
    *("exact", "estimate", "exact_q", "rank_correlation", "sign_agreement"),
    *("strongest_found", "largest_miss", "worst"),
)
"""What `compare_estimates` gives."""


def _estimates(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    compared(page, {str(ds["exact"].attrs.get("metric", "")): ds})


def _trusted(ds: xr.Dataset) -> list[str]:
    """What each estimator tells, in a sentence."""
    found = {str(name): verdict(ds.sel(estimator=name)) for name in ds["estimator"].values}
    each = [f"{NAMES.get(name, name)} {VERDICTS[told]}" for name, told in found.items()]
    return [f"On {count(ds['exact'].size, 'condition')}, {'; '.join(each)}."]


def _trained(record: Record) -> str:
    """What was trained, in a sentence; nothing where the result does not say."""
    names = ("layers", "heads", "width", "vocabulary", "steps", "seeds", "trainings")
    if not {*names} <= {*record.study}:
        return ""
    layers, heads, width, vocabulary, steps, seeds, trainings = (record.study[name] for name in names)
    return (
        f"A GPT-2 of {count(layers, 'layer')} with {count(heads, 'head')} each and {width} dimensions, default "
        f"initialisation, {vocabulary} tokens, trained for {steps} steps from {count(seeds, 'seed')}: "
        f"{listed(trainings)}."
    )


def _findings(attrs: Mapping[Any, Any]) -> dict[str, list[str]]:
    """The sentences that a study stored, by section."""
    found: dict[str, list[str]] = {}
    for finding in json_in(attrs, "conclusion", list):
        if isinstance(finding, dict) and {"group", "text"} <= {*finding}:
            found.setdefault(str(finding["group"]), []).append(str(finding["text"]))
    return found


CORRUPTIONS = {
    "first": "the first half is other tokens",
    "second": "the second half is other tokens",
    "cue": "every second token of the first half is another",
}
"""What `RepeatedTokens(corrupt=...)` replaces in the corrupted run."""


def _lead(record: Record, corrupted: bool) -> str:
    """On what it was done, in a sentence; nothing where the result does not say."""
    shape, task = record.shape, record.task
    parts = [f"On {record.model}"] if record.model else []
    if shape:
        layers, heads = (number_in(shape, name) or 0 for name in ("layers", "heads"))
        parts.append(f"{count(int(layers), 'layer')} of {count(int(heads), 'head')}")
    if task.get("type") == "RepeatedTokens" and {"n", "length", "seed"} <= {*task}:
        drawn = f"{count(task['n'], 'prompt')} in which {task['length']} random tokens are repeated once"
        parts.append(f"with {drawn} (seed {task['seed']})")
        if corrupted and (corruption := CORRUPTIONS.get(str(task.get("corrupt", "first")))):
            return f"{', '.join(parts)}. In the corrupted run, {corruption}."
    elif task.get("type") == "Prompts" and isinstance(prompts := task.get("prompts"), list) and prompts:
        kind, such = prompt_in_words(prompts[0])
        such = _cut(such) if kind == "token ids" else f"“{such}”"
        parts.append(f"with {count(len(prompts), 'prompt')} of {kind}, such as {such}")
    return f"{', '.join(parts)}." if parts else ""


def _cut(ids: str) -> str:
    """The first of a prompt's token ids."""
    first = ids.split()
    return ids if len(first) <= SHOWN_IDS else f"{' '.join(first[:SHOWN_IDS])} …"


def _top(page: Page, told: Contents) -> None:
    page.add(f"<header><h1>{escape(page.title)}</h1>")
    page.add(f'<p class="question">{escape(told.question)}</p>' if told.question else "")
    page.add(f'<p class="lead">{escape(told.lead)}</p>' if told.lead else "")
    links = [
        ("answer", "The answer"),
        *((one.key, one.question) for one in told.sections),
        ("run", "What was run, and how to run it again"),
        ("assumptions", ASSUMPTIONS),
    ]
    items = "".join(f'<li><a href="#{key}">{escape(name)}</a></li>' for key, name in links)
    page.add(f'<nav aria-label="Contents"><ol>{items}</ol></nav>')
    page.add(
        "<noscript><p><strong>The figures need JavaScript; text and tables do not.</strong></p></noscript></header>"
    )


def _answer(page: Page, told: Contents) -> None:
    """The summary, or else all sentences by topic, and what was not shown."""
    page.add('<section id="answer"><h2>The answer</h2><div class="short">')
    summary, limits = told.findings.get("summary", []), told.findings.get("limits", [])
    page.add(f'<div class="summary">{paragraphs(summary)}</div>' if summary else f"<div>{_by_topic(told)}</div>")
    if limits:
        page.add('<div class="not"><h3>What was not shown</h3>', bullets(limits), "</div>")
    page.add("</div></section>")


def _by_topic(told: Contents) -> str:
    topics = ((section, told.findings.get(section.key)) for section in told.sections)
    return "".join(
        f'<div class="topic"><h3><a href="#{section.key}">{escape(section.topic)}</a></h3>{bullets(texts)}</div>'
        for section, texts in topics
        if texts
    )


ASSUMPTIONS = "Assumptions, and what was not tested"
PROVENANCE = {
    "model": "model",
    "model_revision": "revision",
    "step": "step of training",
    "model_family": "family",
    "model_shape": "shape",
    "weight_hash": "hash of the weights",
    "buffer_hash": "hash of the buffers",
    "module_hash": "hash of the modules",
    "tokenizer_hash": "hash of the tokenizer",
    "configuration": "configuration",
    "attention": "implementation of attention",
    "device": "device",
    "dtype": "number type",
    "executed": "where it ran",
    "platform": "platform",
    "versions": "versions",
    "created": "when",
    "seconds": "seconds in all",
    "study": "study",
    "task": "task",
    "base": "run that was intervened on",
    "direction": "direction of patching",
    "metrics": "metrics",
    "estimator": "estimator",
}
LONGEST = 600
"""Characters of a fact that the table shows."""


def _what_was_run(page: Page, tree: xr.DataTree, file: str) -> None:
    attrs = tree.attrs
    page.add('<section id="run"><h2>What was run, and how to run it again</h2>')
    rows = [(words, _as_text(attrs[key])) for key, words in PROVENANCE.items() if key in attrs]
    if rows:
        page.add(table(("what", "value"), rows, long=(1,)))
    else:
        page.add("<p>The result does not say what was run: it carries none of the attributes that headwise writes.</p>")
    if again := recipe(attrs, tree.to_dataset(), file):
        page.add("<h3>How to run it again</h3>")
        both = (("On the command line:", again.command), ("In Python:", again.python))
        for words, text in (one for one in both if one[1]):
            page.add(f'<p>{words}</p><pre tabindex="0"><code>{escape(text)}</code></pre>')
        page.add(paragraphs(again.notes))
    seconds = json_in(attrs, "seconds_by_stage", dict)
    if seconds:
        names = {key: str(group.attrs.get("long_name", key)) for key, group in tree.children.items()}
        stages = [(names.get(key, key), number(number_in(seconds, key) or 0.0, ".1f")) for key in seconds]
        page.add("<h3>Time by stage</h3>", table(("stage", "seconds"), stages))
    page.add("</section>")


def _assumptions(page: Page, tree: xr.DataTree) -> None:
    """What the result takes for granted and what was not tested, as far as it says what was run."""
    ran = Ran.of(tree)
    page.add(f'<section id="assumptions"><h2>{ASSUMPTIONS}</h2>')
    if not ran.says:
        page.add("<p>The result does not say what was run, so nothing can be said of what that assumes.</p>")
    for words, texts in (("Assumed", assumed(ran)), ("Not tested", untested(ran))):
        page.add(f"<h3>{words}</h3>{bullets(texts)}" if texts else "")
    page.add("</section>")


def _as_text(value: object) -> str:
    """JSON objects as ``name value`` pairs, everything else as it is."""
    read = json_or_text(value)
    if isinstance(read, dict):
        pairs = (f"{name} {json.dumps(one) if not isinstance(one, str) else one}" for name, one in read.items())
        text = ", ".join(pairs)
    else:
        text = ", ".join(map(str, read)) if isinstance(read, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … (the rest is in the file)"
