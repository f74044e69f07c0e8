"""The questions of the report, each with its figures and tables. Reads the tree, measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from .. import plots
from ..measuring.effects import effect
from ..output.page import Page, folded, number, table
from ..plots.parts.style import head_name
from ..storage.attributes import json_in
from ..storage.record import Record
from .changes import Array


@dataclass(frozen=True)
class Section:
    """A question of the report.

    Attributes
    ----------
    key : str
        Group of the tree that answers it, and anchor of the section.
    topic : str
        In a word or two.
    question : str
    fill : callable
        ``(page, dataset, tree)``: appends figures and tables.
    """

    key: str
    topic: str
    question: str
    fill: Callable[[Page, xr.Dataset, xr.DataTree], None]


def _behaviour(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    page.figure(
        plots.by_position(ds, "loss", title="loss") + plots.by_position(ds, "accuracy", title="accuracy"),
        "Loss and accuracy at each position, mean over prompts with its 95% interval. A model that repeats falls to a"
        " low loss right of the dashed line in the clean run (solid blue), and not in the corrupted run (dashed "
        "orange), whose first half is other tokens.",
    )


def _heads(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    shown = {"induction": "induction", "previous_token": "previous token", "duplicate_token": "duplicate token"}
    page.figure(
        hv.Layout([plots.head_grid(ds[name], limits=(0, 1), title=title) for name, title in shown.items()]),
        "One cell for each head, layer 0 at the bottom: how much of its attention goes to the token after the earlier"
        " copy (induction), to the previous token, to the earlier copy itself (duplicate). 1 is all of it.",
    )
    page.figure(
        hv.Layout([plots.ranked_heads(ds, name, title=shown[name]) for name in ("induction", "previous_token")]),
        "The heads with the highest scores, with 95% intervals over prompts. A head takes a role right of the "
        "threshold; the dotted line is the best head of all untrained models, the dashed line is uniform attention.",
    )
    _heads_table(page, ds, tree)


def _heads_table(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    scores = [name for name in ("induction", "previous_token", "duplicate_token", "first_token", "self") if name in ds]
    means = {name: ds[name].mean("example").transpose("layer", "head").values for name in scores}
    role = ds["role"].transpose("layer", "head").values
    cost = None
    if "ablation" in tree.children:
        cost = effect(tree["ablation"].to_dataset(), "loss").mean("example")
    head = ["head", "role", *(name.replace("_", " ") for name in scores)]
    head += [f"loss, {method}" for method in ("zero", "mean")] if cost is not None else []
    rows = []
    for layer, number_in_layer in np.ndindex(role.shape):
        at = {"layer": int(ds["layer"][layer]), "head": int(ds["head"][number_in_layer])}
        row = [head_name(**at), str(role[layer, number_in_layer])]
        row += [number(float(means[name][layer, number_in_layer])) for name in scores]
        if cost is not None:
            row += [number(float(cost.sel(at, drop=True).sel(ablation=method)), "+.2f") for method in ("zero", "mean")]
        rows.append(row)
    order = {"induction": 0, "previous-token": 1, "duplicate-token": 2}
    named = sorted((row for row in rows if row[1] in order), key=lambda row: order[row[1]])
    note = "Scores are attention shares from 0 to 1; loss is the change in nats when that head alone is ablated."
    if named:
        page.add(table(head, named, caption=f"Heads with a role. {note}"))
    page.add(folded(f"All {len(rows)} heads", table(head, rows, caption=note)))


def _patterns(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    page.figure(
        plots.attention_row(ds),
        "The highest-scoring heads on one short repeated prompt: each row is a query token, dark blue is all of its "
        "attention. Boxes mark where an induction head must look (the token after the earlier copy), or a "
        "previous-token head (one to the left); the title says how much of the head's attention is there.",
    )


def _ablation(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    page.figure(
        plots.ablation_grids(ds, "loss"),
        "Change of the loss on the repeated half when one head is ablated, by method, on one scale. Orange: the model "
        "is worse without the head; blue: it is better.",
    )
    page.figure(
        plots.zero_against_mean(ds, "loss"),
        "Each head under zero ablation against mean ablation. On the dashed line the two agree. A head far from it "
        "whose output is much the same for every prompt (yellow) acts like a bias.",
    )


def _sets(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    if "set" not in ds.dims:
        page.add("<p>No head has the role of an induction or a previous-token head, so there is no set to ablate.</p>")
        return
    page.figure(
        plots.sets_against_null(ds, "accuracy"),
        "Change of accuracy when a set of heads is ablated together (diamond, with its 95% interval) and when as many"
        " other heads are, drawn from the same layers (grey) or from all (blue). The further the diamond is left of "
        "all dots, the less any heads would do.",
    )
    page.add(_sets_table(ds))


def _sets_table(ds: xr.Dataset) -> str:
    change = effect(ds, "accuracy").mean("example")
    head = ["set", "heads", "ablation", "change of accuracy", "95% interval"]
    head += [f"p, {control} (sets)" for control in ds["control"].values]
    rows = []
    for name in ds["set"].values:
        for method in ds["ablation"].values:
            here = ds.sel(set=name, ablation=method)
            ends = [float(here[f"accuracy_effect_{end}"]) for end in ("low", "high")]
            p = [
                f"{float(here['p_accuracy'].sel(control=control)):.3f} ({int(here['draws'].sel(control=control))})"
                for control in ds["control"].values
            ]
            value = number(float(change.sel(set=name, ablation=method)), "+.3f")
            between = " to ".join(number(end, "+.3f") for end in ends)
            rows.append([name, here["heads"].item(), method, value, between, *p])
    note = "p: (1 + random sets that cost at least as much) / (1 + random sets); how many were drawn is in brackets."
    return folded("Every set under every ablation, as a table", table(head, rows, caption=note, long=(1,)))


def _patching(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    if "set_normalized" in ds:
        page.figure(
            plots.qkv_of_set(ds),
            "All induction heads get q, k or v from the corrupted run. The circuit predicts: q changes nothing, k "
            "breaks the attention and with it the answer, v leaves the attention and turns the answer into the "
            "distractor (below 0).",
        )
    for direction, caption in PATCHED.items():
        ratio = ds[f"{direction}_normalized"]
        if np.isfinite(ratio).any():
            clean = float(ds["baseline_logit_diff"].sel(run="clean").mean())
            why = why_not(tree.attrs, clean, ratio.values) if direction == "denoising" else ""
            page.figure(plots.qkv_grids(ds, direction), f"{caption} {why}".strip())
        else:
            page.add(f"<p>No picture of {direction}: the logit difference cannot be normalized, see above.</p>")


PATCHED = {
    "noising": "Noising: q, k or v of one head is taken from the corrupted run, the rest stays clean. 1 is no change, "
    "0 the corrupted run's answer. Blue heads are necessary.",
    "denoising": "Denoising: q, k or v of one head is taken from the clean run, the rest stays corrupted. 0 is no "
    "change, 1 the clean run's answer. Orange heads are sufficient: one alone restores it. Blue ones turn the answer "
    "to the distractor.",
}
ANSWER, RESTORED, TURNED = 1.0, 0.5, 0.1
"""Logits from which a run has an answer; share of it from which a head restores it, and share below 0 from which one
turns it to the distractor."""


def why_not(attrs: Mapping[Any, Any], clean: float, share: Array) -> str:
    """Why denoising restores nothing, where the first half is replaced; nothing where it restores, or there is no why.

    Parameters
    ----------
    attrs : mapping
        Of the result.
    clean : float
        Logit difference of the clean run.
    share : array
        Normalized answers after denoising.

    Returns
    -------
    str
    """
    task = Record.from_attrs(attrs).task
    first = task.get("type") == "RepeatedTokens" and task.get("corrupt", "first") == "first"
    turned = np.nanmax(share) < RESTORED and np.nanmin(share) < -TURNED
    if not (first and turned and clean > ANSWER):
        return ""
    return (
        "No patch restores the answer here: the first half of the corrupted run is other tokens, so the token to copy "
        "stands nowhere in it. A head that finds the match again copies what stands there instead: restoring the match "
        "copies the distractor."
    )


def _composition(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    if not np.isfinite(ds["composition"]).any():
        page.add("<p>The model has one layer: no head can read what another wrote.</p>")
        return
    roles = [head for members in json_in(tree.attrs, "heads", dict).values() for head in members]
    marked = "; the diamond is the mean from previous-token to induction heads" if "pair_mean" in ds else ""
    page.figure(
        plots.composition_strip(ds, title="composition from the weights"),
        "Every pair of heads by kind of composition, from the weights alone. The grey band is random weights, two "
        f"deviations to each side{marked}. Of many pairs, an even choice and the highest are drawn.",
    )
    role = tree["heads"].to_dataset().get("role") if "heads" in tree.children else None
    page.figure(
        plots.composition_matrix(ds, "k", heads=roles, title="K-composition")
        + plots.composition_graph(ds, "k", title="K-composition, the strongest pairs", roles=role),
        "K-composition of earlier heads (columns) into later ones (rows): orange pairs have more than random weights. "
        "In a large model the heads with a role and the strongest others are drawn. Beside it the strongest pairs as a "
        "graph, layer 0 at the bottom: the wider the edge, the further above random weights.",
    )
    if "path_logit_diff" in ds:
        page.figure(
            plots.path_grids(ds),
            "Change of the logit difference when the output of one head is taken from the corrupted run on its direct "
            "paths into k, q or v of the induction heads alone. Blue heads are necessary there. Drawn are the layers "
            "of the previous-token heads.",
        )
    if "strongest_logit_diff" in ds:
        page.add(_paths_table(ds))
    if "ablated_induction" in ds:
        page.figure(
            plots.causal_check(ds, title="without the previous-token heads"),
            "Induction score of the induction heads when the previous-token heads are ablated (diamond), and when as "
            "many random heads of those layers are (grey). The blue line is the score before.",
        )
    else:
        page.add("<p>There is no pair of a previous-token head and a later induction head to check.</p>")


def _paths_table(ds: xr.Dataset) -> str:
    """Every path from a previous-token head, and those of the strongest pairs."""
    before, rows = ds["path_baseline"].sel(run="clean"), []

    def row(what: list[str], score: float, after: xr.DataArray, ends: list[float], p: float) -> None:
        """Add a path: from and into what, and what it carries."""
        change = number(float((after - before).mean()), "+.2f")
        interval = " to ".join(number(end, "+.2f") for end in ends)
        rows.append([*what, number(score), number(float(after.mean()), "+.2f"), change, interval, number(p, ".3f")])

    for name in ds["sender"].values[ds["is_sender"].values == 1] if "path_logit_diff" in ds else ():
        for path in ds["path"].values:
            here = ds.sel(sender=name, path=path)
            ends = [float(here[f"path_effect_{end}"]) for end in ("low", "high")]
            into = f"{path} of the induction heads"
            row([name, into], np.nan, here["path_logit_diff"], ends, float(here["p_path"]))
    for kind in ds["kind"].values:
        here = ds.sel(kind=kind)
        ends = [float(here[f"strongest_effect_{end}"]) for end in ("low", "high")]
        sender, _, receiver = str(here["strongest_pair"].values).partition(" to ")
        score = float(here["strongest_score"])
        row([sender, f"{kind} of {receiver}"], score, here["strongest_logit_diff"], ends, np.nan)
    head = ["from", "into", "composition", "logit difference", "change", "95% interval", "p"]
    note = (
        "Each with the output of the head at the left taken from the corrupted run on this path alone; in logits. The "
        "last are the pairs with the highest composition of each kind. p: (1 + other heads of the layer that lower the "
        "logit difference as much) / (1 + other heads of the layer)."
    )
    return folded("Every path, as a table", table(head, rows, caption=note))


def _attribution(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    if "attribution" not in ds:
        return
    page.figure(
        plots.head_grid(ds["attribution"], centre=0.0, title="added directly")
        + plots.head_grid(ds["copying"], limits=(0, 1), title="copying"),
        "What each head adds to the logit of the answer minus that of the distractor by itself, not by way of later "
        "parts (orange: towards the answer); and how far its weights copy: the share of positive eigenvalues of its OV "
        "circuit, about half where weights are random.",
    )
    page.figure(
        plots.direct_and_copying(ds, title="what heads write, and copy"),
        "Every head by both numbers. Induction heads are orange, the diamond is their mean; the small dots are means "
        "of random sets of as many other heads, of the same layers (grey) and from all (blue).",
    )
    direct, parts = ds["attribution"].mean("example"), ds["other"].mean("example")
    rows = [
        [
            head_name(int(layer), int(head)),
            number(float(direct.sel(layer=layer, head=head)), "+.2f"),
            number(float(ds["copying"].sel(layer=layer, head=head))),
            number(float(ds["eigenvalue_score"].sel(layer=layer, head=head)), "+.2f"),
        ]
        for layer in ds["layer"].values
        for head in ds["head"].values
    ]
    none = number(float("nan"))
    rows += [[str(part), number(float(parts.sel(part=part)), "+.2f"), none, none] for part in ds["part"].values]
    note = (
        "Added directly, in logits, mean over prompts: all of it together is the logit difference. Copying: share of "
        "positive eigenvalues of the OV circuit; eigenvalue score: their sum over the sum of their absolute values."
    )
    titles = ["from", "added directly", "copying", "eigenvalue score"]
    page.add(folded("Every head and part, as a table", table(titles, rows, caption=note)))


def _words(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    if "prob" not in ds:
        return
    page.figure(
        plots.words_grid(ds, title="the right word")
        + plots.words_agreement(ds, tree["heads"].to_dataset(), title="words against random tokens"),
        "Probability of the right next word for each list, with all heads (blue) and with the induction heads ablated: "
        "a long grey line is an answer that needs them. Beside it each head twice: attention to the token after the "
        "earlier copy on word lists (up) against random tokens (right). Heads in the upper right fire on both; dashed "
        "lines are uniform attention.",
    )
    words = plots.words_table(ds)
    texts, numbers = [dim.name for dim in words.kdims], [dim.name for dim in words.vdims]
    columns = [list(map(str, words[name])) for name in texts]
    columns += [[number(float(one), ".0f" if name == "rank" else ".3f") for one in words[name]] for name in numbers]
    names = [{"prob": "probability", "answer": "right word"}.get(name, name) for name in (*texts, *numbers)]
    note = "Each list, the word that must come next, and its probability; rank 0 is the model's first choice."
    page.add(folded(f"All {len(ds['prompt'])} lists", table(names, list(zip(*columns, strict=True)), caption=note)))


def _estimates(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    compared(page, {name: node.to_dataset() for name, node in tree["estimates"].children.items()})


def compared(page: Page, sweeps: dict[str, xr.Dataset]) -> None:
    """Estimates beside what was measured: a figure for each sweep, and how well each estimator does as a table."""
    rows = []
    for name, sweep in sweeps.items():
        what = COMPARED.get(name, str(sweep["exact"].attrs.get("long_name", name)).removesuffix(", exact"))
        how = "." if name in [*sweeps][1:] else f", as estimated from gradients (up) and as measured (right). {AGAINST}"
        page.figure(plots.estimate_against_exact(sweep), f"{what[:1].upper()}{what[1:]}{how}")
        unit = str(sweep["exact"].attrs.get("units", ""))
        for estimator in sweep["estimator"].values:
            here = sweep.sel(estimator=estimator)
            rows.append([name, str(estimator)])
            rows[-1] += [
                number(float(here[fact])) for fact in ("rank_correlation", "sign_agreement", "strongest_found")
            ]
            rows[-1] += [number(float(here["largest_miss"])), unit, ", ".join(map(str, here["worst"].values[:3]))]
    head = ["sweep", "estimator", "rank correlation", "signs right", "strongest found", "largest miss", "unit", "worst"]
    note = (
        "How well each estimator does. Signs: share of the effects beyond noise; strongest: share of the strongest "
        "effects that are among as many strongest estimates."
    )
    page.add(folded("The estimators as a table", table(head, rows, caption=note)))


COMPARED = {
    "ablation": "Every head zero- and mean-ablated: change of the loss",
    "patching": "q, k or v of every head taken from the corrupted run: change of the logit difference",
}
AGAINST = (
    "On the dashed line the estimate is right; on the horizontal line through 0 it sees nothing. Gradient is the slope "
    "at the run itself. Integrated is the mean slope on the way, on which all heads of a layer move together, so that "
    "it shares out what they do jointly. The worst misses are named."
)


QUESTION = "Which heads continue what repeats, by which mechanism, and does the model need them?"
"""What an induction study asks."""
SECTIONS = (
    Section("behaviour", "Repeating", "How well does the model do on repeated sequences?", _behaviour),
    Section("heads", "Heads", "Which heads are which?", _heads),
    Section("patterns", "Attention", "What do they attend to?", _patterns),
    Section("ablation", "Single heads", "What happens without a head?", _ablation),
    Section("sets", "Sets of heads", "Is it these heads, or any heads?", _sets),
    Section(
        "patching", "Queries, keys and values", "Which of q, k, v carries the pattern, which the token?", _patching
    ),
    Section("composition", "Composition", "Do previous-token heads feed the induction heads?", _composition),
    Section("attribution", "Direct effect", "Do the induction heads write the answer themselves?", _attribution),
    Section("words", "Words", "Do the same heads fire on words?", _words),
    Section("estimates", "Estimates", "Would gradients have told the same?", _estimates),
)
