"""Circuits as JSON files of MIB, the Mechanistic Interpretability Benchmark: read and written. Knows no model.

A file holds ``cfg`` (``n_layers``, ``n_heads``, ``parallel_attn_mlp``, ``d_model``), ``nodes`` and ``edges``: for each
edge of the graph, by a name such as ``a0.h3->a1.h1<k>``, its ``score`` and whether it is ``in_graph``. Each head has a
key and a value of its own there, also where heads share them in the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from ...errors import DeclarationError, ResultError, choices, first_line
from ...interventions.declare.circuits import Circuit, one_score
from ...interventions.declare.codec import read_json
from ...interventions.declare.graph import Graph
from .edges import edges_of

if TYPE_CHECKING:
    from ...interventions.models.model import Model

PARTS = ("cfg", "nodes", "edges")


class MibCircuit(NamedTuple):
    """What a file of MIB holds: the graph, the edges that are in the circuit, and the score ``(edge)`` of each edge."""

    graph: Graph
    circuit: Circuit
    scores: xr.DataArray


def read_mib(path: str | Path) -> MibCircuit:
    """Read a circuit or the scores of edges from a JSON file of MIB.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    MibCircuit
        ``graph``, ``circuit`` and ``scores``; a score that the file does not have is NaN. MIB's scores are high for the
        edges that a circuit keeps: ``Circuit.top(-scores, n, by="signed", better="higher")`` is MIB's signed selection.

    Raises
    ------
    ResultError
        The file cannot be read.
    DeclarationError
        It is not JSON of a circuit, its edges are not those of its graph, or it leaves single neurons out.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = hw.write_mib(f"{folder}/circuit.json", hw.load("words-2l"), hw.Circuit(["m1->logits"]))
    ...     graph, circuit, scores = hw.read_mib(path)
    >>> circuit, float(scores.sum())
    (Circuit(1 edge: m1->logits), 1.0)
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ResultError(f"cannot read {path}: {first_line(error)}") from None
    data = read_json(text)
    if not isinstance(data, Mapping) or not all(isinstance(data.get(part), Mapping) for part in PARTS):
        has = choices(data) if isinstance(data, Mapping) else type(data).__name__
        raise DeclarationError(f"{path} is no circuit of MIB: that has {choices(PARTS)}, this has {has or 'nothing'}")
    cfg, given = data["cfg"], data["edges"]
    try:
        graph = Graph(cfg["n_layers"], cfg["n_heads"], parallel=bool(cfg.get("parallel_attn_mlp", False)))
    except KeyError as error:
        raise DeclarationError(f"{path}: cfg has no {error}; it has {choices(cfg) or 'nothing'}") from None
    names = {str(edge): edge for edge in graph.edges}
    if unknown := [name for name in given if name not in names]:
        raise DeclarationError(f"{path} has edges that {graph!r} has not: {choices(unknown[:3])}")
    if any(isinstance(node, Mapping) and "neurons" in node for node in data["nodes"].values()):
        raise DeclarationError(f"{path} is a circuit of neurons: possible is one of edges")
    facts = {name: given.get(name) for name in names}
    scores = [_score(path, name, fact) for name, fact in facts.items()]
    inside = [names[name] for name, fact in facts.items() if isinstance(fact, Mapping) and fact.get("in_graph")]
    return MibCircuit(graph, Circuit(inside), _scores(graph, scores))


def write_mib(
    path: str | Path, model: Model, circuit: Circuit, scores: xr.DataArray | xr.Dataset | None = None
) -> Path:
    """Write a circuit as a JSON file of MIB.

    Parameters
    ----------
    path : str or Path
    model : Model
        The circuit is one of it.
    circuit : Circuit
        Of all positions; the file does not say its source.
    scores : DataArray (edge), or Dataset with one such variable, optional
        Of each edge, with the coordinates ``sender`` and ``receiver``; as MIB has them, high where an edge belongs to
        the circuit. 1 for edges of the circuit and 0 for others where left out.

    Returns
    -------
    Path

    Raises
    ------
    DeclarationError
        The circuit is not one of the model, a score of an edge is missing or infinite, or such a file cannot say it: a
        circuit at some positions, and heads that share keys and values.
    ResultError
        The file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = hw.write_mib(f"{folder}/circuit.json", hw.load("words-2l"), hw.Circuit(["m1->logits"]))
    ...     len(path.read_text())
    17155
    """
    graph = Graph.of(model)
    graph.check(circuit)
    if graph.kv_heads != graph.heads:
        raise DeclarationError(
            f"files of MIB give each head a key and a value of its own: the {graph.heads} heads of {graph!r} share "
            f"{graph.kv_heads}, so its circuits cannot be written as one"
        )
    if circuit.positions is not None:
        raise DeclarationError(f"files of MIB hold circuits of all positions: {circuit!r} cannot be written as one")
    values = {edge: float(edge in circuit) for edge in graph.edges}
    if scores is not None:
        Circuit.top(scores, 0)  # refuses scores that are not one number for each edge
        array = one_score(scores)
        values = dict(zip(edges_of(array), map(float, array.values), strict=True))
        if missing := [edge for edge in graph.edges if not math.isfinite(values.get(edge, math.nan))]:
            raise DeclarationError(f"no score, or no finite one, of {len(missing)} edges, such as {missing[0]}")
    alive = {*graph.nodes(graph.prune(circuit))}
    cfg = {"n_layers": graph.layers, "n_heads": graph.heads, "parallel_attn_mlp": graph.parallel}
    data: dict[str, Any] = {
        "cfg": cfg | {"d_model": model.shape.d_model},
        "nodes": {node: {"in_graph": node in alive or node == "logits"} for node in (*graph.senders, "logits")},
        "edges": {str(edge): {"score": values[edge], "in_graph": edge in circuit} for edge in graph.edges},
    }
    where = Path(path)
    try:
        where.write_text(json.dumps(data), encoding="utf-8")
    except OSError as error:
        raise ResultError(f"cannot write {path}: {first_line(error)}") from None
    return where


def _score(path: str | Path, name: str, fact: Any) -> float:
    found = fact.get("score") if isinstance(fact, Mapping) else None
    if found is not None and not isinstance(found, int | float):
        raise DeclarationError(f"{path}: the score of {name} is {found!r}, no number")
    return float("nan") if found is None else float(found)


def _scores(graph: Graph, values: list[float]) -> xr.DataArray:
    names = {side: ("edge", [getattr(edge, side) for edge in graph.edges]) for side in ("sender", "receiver")}
    return xr.DataArray(np.array(values), coords=names, dims="edge", name="score", attrs={"units": "1"})
