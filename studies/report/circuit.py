"""The report of the study of a circuit: what it keeps, its graph and edges, sets of heads, and how sure it is."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ...interventions.declare.circuits import Circuit
from ...interventions.declare.graph import Graph
from .. import plots
from ..circuits.edges import edges_of
from ..circuits.findings import metric_in_words, score_in_words
from ..output.page import Page, folded, number, table
from ..output.phrases import count
from ..storage.attributes import json_in
from .induction import Section

AREAS = (
    "CPR is the area under the curve of the signed selection, better where it is higher; CMD that between the curve of "
    "the absolute selection and 1, better where it is lower; log share: over the log of the share; 95% intervals, "
    "and the means of random circuits: of any edges, drawn one by one, and of connected ones."
)
QUESTION = "Which edges does the behaviour rest on, and how much of it do they keep by themselves?"
UNSURE, SHOWN = 30, 20
"""Edges of the figure of those that are least sure, and of the table that is open."""


def lead(tree: xr.DataTree) -> str:
    """What circuits were compared with, in a sentence."""
    ds, edges = tree["curve"].to_dataset(), tree.attrs.get("graph_edges", "?")
    source = json_in(tree.attrs, "study", dict).get("source", "corrupted")
    outside = "means over the reference prompts" if source == "mean" else f"the values of the {source} run"
    name = str(ds["whole"].attrs.get("long_name", "metric")).removesuffix(" of the whole model").partition(",")[0]
    whole, empty = (float(ds[one].mean()) for one in ("whole", "empty"))
    return (
        f"The model has {edges} edges; those outside of a circuit carry {outside}. The {name} is {whole:.2f} in the "
        f"whole model and {empty:.2f} without any edge: 1 and 0 of the behaviour."
    )


def graph_of(tree: xr.DataTree) -> Graph | None:
    """The graph of the model; None where the result does not hold one."""
    held = json_in(tree.attrs, "graph", dict)
    return Graph(**held) if {*held} == {"layers", "heads", "kv_heads", "parallel"} else None


def circuit_of(ds: xr.Dataset) -> Circuit:
    """The circuit whose edges a part holds."""
    return Circuit(edges_of(ds))


def _circuit(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    circuit = circuit_of(ds)
    if circuit:
        scores = ds["score"]
        page.figure(
            plots.circuit_graph(circuit, scores, graph=graph_of(tree)),
            "The circuit, from the input at the bottom to the logits at the top: each edge runs upwards. An edge is as "
            f"wide as its score is far from 0, and dashed where {_against(scores)}; its colour says what reads it, and "
            "nothing of its sign. Hover for its name and score.",
        )
    else:
        page.add("<p>The circuit has no edge.</p>")
    rows = [
        (words, *(number(float(ds[f"{name}{end}"]), ".3f") for end in ("", "_low", "_high")))
        for name, words in (
            ("faithfulness", "the circuit"),
            ("complement", "all edges outside of it"),
            ("on_others", "the circuit, on other prompts"),
        )
        if name in ds
    ]
    for words, value in (("mean", ds["random"].mean()), ("highest", ds["random"].max())) if ds.sizes["draw"] else ():
        rows.append((f"random connected edges, {words}", number(float(value), ".3f"), number(np.nan), number(np.nan)))
    head = ("what is kept", "share", "from", "to")
    page.add(table(head, rows, caption="Shares of the behaviour, with 95% intervals over prompts."))
    page.add(*_edge_tables(ds, tree))


def _against(scores: xr.DataArray) -> str:
    """When an edge works against the behaviour, in words."""
    sign = {"higher": "above 0", "lower": "below 0"}.get(str(scores.attrs.get("better")))
    return f"it works against the behaviour (a score {sign})" if sign else "that is above 0"


def _edge_tables(ds: xr.Dataset, tree: xr.DataTree) -> list[str]:
    """The edges of the circuit, the strongest first; many are folded."""
    often = {}
    if "inclusion" in tree.children:
        held = tree["inclusion"].to_dataset()
        often = dict(zip(edges_of(held), held["inclusion"].values, strict=True))
    rows, edges = [], edges_of(ds)
    for at in np.argsort(-np.abs(ds["score"].values), kind="stable"):
        again = number(100 * float(often.get(edges[at], np.nan)), ".0f")
        rows.append((str(edges[at]), number(float(ds["score"].values[at]), "+.3f"), again))
    head = ("edge", "score", "again, %")
    said = score_in_words(ds["score"], metric_in_words(tree))
    caption = f"{said}{' Again: in how many circuits of prompts drawn again the edge is.' if often else ''}"
    if len(rows) <= SHOWN:
        return [table(head, rows, caption=caption)]
    return [
        table(head, rows[:SHOWN], caption=f"The {SHOWN} strongest edges. {caption}"),
        folded(f"All {count(len(rows), 'edge')}", table(head, rows)),
    ]


def _curve(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    drawn = tree["random"].to_dataset()
    random = drawn.sel(kind="connected edges")
    page.figure(
        plots.circuit_curve(ds, random)
        + plots.circuit_curve(tree["numbers"].to_dataset(), by_edges(random), title="by number of edges"),
        "How much circuits of growing size keep, with 95% intervals. Blue, solid: of the edges without which the "
        "metric gets worst (signed); orange, dashed: of those that change it most either way (absolute); grey: random "
        "connected circuits. 0 is no edge at all, 1 the whole model. Left at MIB's shares, right by number of edges.",
    )
    rows = []
    for name, words in (
        ("cpr", "CPR"),
        ("cmd", "CMD"),
        ("cpr_log", "CPR, log share"),
        ("cmd_log", "CMD, log share"),
    ):
        values = (number(float(ds[f"{name}{end}"]), ".3f") for end in ("", "_low", "_high"))
        beside = (number(float(drawn[name].sel(kind=kind).mean()), ".3f") for kind in drawn["kind"].values)
        rows.append((words, *values, *beside))
    head = ("area", "value", "from", "to", *(str(kind).removesuffix(" edges") for kind in drawn["kind"].values))
    page.add(table(head, rows, caption=AREAS))
    page.add(folded("Values at each share", _values(ds)))


def by_edges(ds: xr.Dataset) -> xr.Dataset:
    """What was measured at shares of all edges, by numbers of edges above 0, each once."""
    numbers = ds["edges"].values
    first = [at for at, number in enumerate(numbers) if number > 0 and number not in numbers[:at]]
    return ds.isel(share=first).swap_dims(share="edges")


def _values(ds: xr.Dataset) -> str:
    rows = []
    for at in range(ds.sizes["share"]):
        one = ds.isel(share=at)
        row = [f"{100 * float(one['share']):g}%", str(int(one["edges"]))]
        for selection in ds["selection"].values:
            here = one.sel(selection=selection)
            row += [str(int(here["left"])), number(float(here["faithfulness"]), ".3f")]
        rows.append(row)
    head = ["share", "edges", *(f"{one}: {what}" for one in ds["selection"].values for what in ("left", "kept"))]
    return table(head, rows, caption="left: edges after pruning.")


def _nodes(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    page.figure(
        plots.kept_by_heads(ds),
        "How much sets of heads keep, with all MLPs and all edges between them: heads taken in by score, and taken out "
        "one by one from the set that is found so. Grey: random sets of as many heads. Dotted: the share to be kept.",
    )
    rows = []
    for name in ds["set"].values:
        one = ds.sel(set=name)
        values = [number(float(one[key]), ".3f") for key in ("faithfulness", "complement")]
        random = [number(float(one["random"].max()), ".3f"), number(float(one["p"]), ".3f")]
        rows.append((str(name), str(one["heads"].values), *values, *random))
    head = ("way", "heads", "kept", "kept by the others", "highest random", "p")
    page.add(table(head, rows, caption="The smallest sets that were found.", long=(1,)))
    lost, heads = ds["lost"].transpose("layer", "head").values, ds.sizes["head"]
    order = np.argsort(-lost.ravel(), kind="stable")
    alone = [(f"a{at // heads}.h{at % heads}", number(lost.ravel()[at], "+.3f")) for at in order]
    page.add(folded(f"All {len(alone)} heads", table(("head", "lost without it"), alone)))


def _inclusion(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    often = ds["inclusion"].values
    between = np.flatnonzero((often > 0) & (often < 1))
    unsure = ds.isel(edge=between[np.argsort(np.abs(often[between] - 0.5), kind="stable")[:UNSURE]])
    always, never = (int((often == end).sum()) for end in (1, 0))
    page.add(
        f"<p>Of {count(ds.sizes['edge'], 'edge')}, {always} are in every circuit from prompts that were drawn again, "
        f"and {never} in none.</p>"
    )
    if unsure.sizes["edge"]:
        page.figure(
            plots.edge_inclusion(unsure, title=_of_others(unsure.sizes["edge"], len(between))),
            "The edges that are least sure: how often each is among those of a circuit of as many edges, where prompts "
            "are drawn again with replacement. Blue: edges of the circuit; orange: others.",
        )


def _of_others(shown: int, others: int) -> str:
    """How many edges that are in some of the circuits are shown."""
    return f"all {count(others, 'other edge')}" if shown == others else f"{shown} of {count(others, 'other edge')}"


SECTIONS = (
    Section("circuit", "The circuit", "Which edges are in it?", _circuit),
    Section("curve", "Curve", "How much do circuits of growing size keep?", _curve),
    Section("nodes", "Heads", "Which heads suffice?", _nodes),
    Section("inclusion", "Stability", "Are these edges the same for other prompts?", _inclusion),
)
