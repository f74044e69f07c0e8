"""From a pass of a plan to the `PassSpec` that a trace takes. Owns where in a tensor each write goes.

What depends on activations is deferred: `planned_pass.resolve_values` makes it where they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..declare.changes import FromRun, How
from ..declare.circuits import Circuit
from ..declare.components import Component
from ..declare.graph import Graph
from ..declare.paths import PathPatch
from ..models.model import Model
from ..plan.passes import ExampleChunk, Pass, changed_heads, recomputed_heads
from ..plan.plan import Plan
from ..plan.writes import BY_QUERY, OF_KEYS, QKV, STAGES, Keys, Write, positions_in
from ..traced.specs import (
    CircuitRows,
    DirectSpec,
    EmbeddingWrite,
    HeadPairs,
    Index,
    InsideSpec,
    PassSpec,
    PathSender,
    ReceiverKey,
    ScoreMask,
    TensorWrite,
    Value,
    WriteSite,
)
from .activations import columns_of, described_read, pattern_columns, point_of
from .deferred import deferred_value

EMBEDDINGS = ("embed", "pos_embed")


class PassSpecBuilder:
    """Makes the `PassSpec` of one pass on some examples of a chunk.

    Parameters
    ----------
    model : Model
    plan : Plan
    chunk : ExampleChunk
    one : Pass
    drawn : int
        Examples of the reference draw.
    examples : tuple of int
        Start and stop of the examples in their group.
    """

    def __init__(
        self, model: Model, plan: Plan, chunk: ExampleChunk, one: Pass, drawn: int, examples: tuple[int, int]
    ) -> None:
        self.model, self.plan, self.chunk, self.one, self.drawn = model, plan, chunk, one, drawn
        self.span, self.examples = examples, examples[1] - examples[0]
        self.group = plan.groups[chunk.group]
        extent = plan.extent(chunk, one.start)
        self.start, self.stop = extent.start, extent.stop
        self.out = plan.scored(chunk.group, one.start)
        self.writes: dict[WriteSite, list[TensorWrite]] = {}
        self.masks: dict[int, list[ScoreMask]] = {}
        self.pairs: dict[int, HeadPairs] = {}
        self.pair_writes: dict[WriteSite, list[TensorWrite]] = {}
        self.pair_masks: dict[int, list[ScoreMask]] = {}
        self.senders: dict[PathPatch, PathSender] = {}
        self.circuits: list[CircuitRows] = []

    def build(self) -> PassSpec:
        """The whole pass."""
        shape = self.model.shape
        for local, (number, join) in enumerate(zip(self.one.conditions, self.one.joins, strict=True)):
            writes = self.plan.writes[self.chunk.group][number]
            heads = recomputed_heads(writes, join, shape)
            pairs = self.pairs.setdefault(join.layer, {"conditions": [], "heads": []}) if heads else None
            first = len(pairs["heads"]) if pairs is not None else 0
            if pairs is not None:
                pairs["conditions"] += [local] * len(heads)
                pairs["heads"] += heads
            if embedded := [write for write in writes if write.embedding is not None]:
                self._embed(embedded, local)
            for write in writes[len(embedded) :]:
                if pairs is None or write.join != join:
                    self._write(write, local, write.part, False)
                    continue
                for pair, head in enumerate(heads, start=first):
                    if head in changed_heads(write, shape):
                        self._write(write, pair, shape.key_head(head) if write.point in OF_KEYS else head, True)
        return self.frame()

    def write(self, write: Write, unit: int) -> None:
        """Put in one write, for the rows of the `unit`-th condition of the pass."""
        if write.embedding is not None:
            self._embed([write], unit)
        else:
            self._write(write, unit, write.part, False)

    def frame(self) -> PassSpec:
        """The pass with the writes that were put in so far."""
        joins: dict[tuple[int, str], int] = {}
        ahead: dict[int, int] = {}
        for number, (layer, stage) in enumerate(self.one.joins):
            at = (layer, STAGES[stage])
            joins[at] = joins.get(at, 0) + 1
            if stage == QKV:
                ahead.setdefault(layer, number)
        return {
            "examples": self.examples,
            "conditions": len(self.one.conditions),
            "layers": self.model.shape.layers,
            "first": self.one.joins[0].layer,
            "start": self.start,
            "stop": self.stop,
            "out": torch.tensor(self.out, device=self.model.device, dtype=torch.long),
            "skip": len(self.group.scored) - len(self.out),
            "joins": joins,
            "ahead": ahead,
            "writes": self.writes,
            "masks": self.masks,
            "pairs": self.pairs,
            "pair_writes": self.pair_writes,
            "pair_masks": self.pair_masks,
            "senders": list(self.senders.values()),
            "circuits": self.circuits,
            "blocks": self.plan.blocks,
            "reads": [
                described_read(self.model, read, at, self.group, self.plan.inside is not None)
                for at, read in enumerate(self.plan.reads)
            ],
            "inside": self._inside(),
        }

    def _inside(self) -> InsideSpec | None:
        """What is made of what is read, for these examples."""
        inside = self.plan.inside
        if inside is None:
            return None
        direct: DirectSpec | None = inside.asked[self.chunk.group] if inside.asked else None
        if direct is not None:
            answers, others = (
                None if ids is None else ids[slice(*self.span)].to(self.model.device)
                for ids in (direct["answers"], direct["others"])
            )
            direct = {**direct, "answers": answers, "others": others}
        return {"kind": inside.kind, "scored": list(self.group.scored), "direct": direct}

    def _write(self, write: Write, unit: int, part: int | None, alone: bool) -> None:
        """Put in a write to a head, a neuron or all; `unit` counts conditions, or pairs with a head `alone` in rows."""
        if isinstance(write.value, Circuit):
            self._circuit(write, write.value, unit)
            return
        axis = self._axis(write, alone)
        there = {*axis}
        wanted = axis if write.positions is None else [at for at in write.positions if at in there]
        if not wanted:
            return
        rows = slice(unit * self.examples, (unit + 1) * self.examples)
        where = _index([axis.index(at) for at in wanted] if len(wanted) < len(axis) else None)
        parts = slice(0, 1) if alone else slice(None) if part is None else slice(part, part + 1)
        if isinstance(write.value, Keys):
            device = self.model.device
            queries = torch.arange(len(axis), device=device)[where]
            keys = torch.tensor(
                [key for key in write.value.positions if key < self.stop], device=device, dtype=torch.long
            )
            masks = self.pair_masks if alone else self.masks
            masks.setdefault(write.layer, []).append({"rows": rows, "heads": parts, "queries": queries, "keys": keys})
            return
        columns = slice(None)
        if write.point in ("pattern", "mlp_pre", "mlp_post"):
            columns = parts
        elif write.point in ("q", "k", "v", "q_rot", "k_rot", "z") and part is not None and not alone:
            columns = slice(part * self.model.shape.d_head, (part + 1) * self.model.shape.d_head)
        value = self._value(write, part, wanted)
        made: TensorWrite = {
            "rows": rows,
            "positions": where,
            "columns": columns,
            "how": write.how.value,
            "value": value,
        }
        of_heads = write.point == "z" and write.edit.site.component is Component.head_out
        point = "head_out" if of_heads else write.point
        (self.pair_writes if alone else self.writes).setdefault((write.layer, point), []).append(made)
        if self.plan.reads and write.edit.site.component is Component.head_out and write.how is How.ADD:
            head = write.edit.site.head
            heads = slice(None) if head is None else slice(head, head + 1)
            self._add_to_read(write, {**made, "positions": _index(wanted), "columns": heads})

    def _axis(self, write: Write, alone: bool) -> list[int]:
        """The positions along the tensor at the site of a write."""
        layers = self.model.shape.layers
        if write.layer == layers:
            return self.out
        if write.layer == layers - 1 and write.point in BY_QUERY and not self.model.shape.called:
            every = self.plan.patterns and write.point in ("q", "q_rot", "scores", "pattern")
            if not every:
                return self.out
        return list(range(0 if alone and write.point in OF_KEYS else self.start, self.stop))

    def _value(self, write: Write, part: int | None, wanted: list[int]) -> Value:
        """What a write puts in at the wanted positions, as far as it is known here."""
        if isinstance(write.value, PathPatch):
            receiver = self._path(write, write.value)
            return {"kind": "path", "receiver": receiver, "positions": _index([at - self.start for at in wanted])}
        site = write.edit.site
        pattern = pattern_columns(self.model, site.layer, part) if site.component is Component.pattern else None
        columns = columns_of(self.model, site.component, part)
        return deferred_value(
            write.value, point_of(site), columns, pattern, self.stop, _index(wanted), self.span, self.drawn
        )

    def _embed(self, writes: list[Write], unit: int) -> None:
        """The stream before layer 0 as the sum of its embeddings, some of them changed; exact where it is near 0."""
        changed: set[int] = set()
        made: list[EmbeddingWrite] = []
        for write in writes:
            wanted = [at for at in (write.positions or range(self.stop)) if at < self.stop]
            changed.update(wanted)
            into: TensorWrite = {
                "rows": slice(None),
                "positions": _index(wanted),
                "columns": slice(None),
                "how": write.how.value,
                "value": self._value(write, None, wanted),
            }
            made.append({"embedding": str(write.embedding), "write": into})
            self._add_to_read(write, {**into, "rows": slice(unit * self.examples, (unit + 1) * self.examples)})
        wanted = sorted(changed)
        stream: TensorWrite = {
            "rows": slice(unit * self.examples, (unit + 1) * self.examples),
            "positions": _index([at - self.start for at in wanted]),
            "columns": slice(None),
            "how": "set",
            "value": {"kind": "embeddings", "writes": made, "positions": _index(wanted)},
        }
        self.writes.setdefault((0, "stream"), []).append(stream)

    def _add_to_read(self, write: Write, made: TensorWrite) -> None:
        """Note what is written to a site after it was made, for those who read it; positions count from 0."""
        if self.plan.reads:
            site = write.edit.site
            self.writes.setdefault((site.layer, f"{site.component} read"), []).append(made)

    def _circuit(self, write: Write, circuit: Circuit, unit: int) -> None:
        """Put in a circuit, for the rows of the `unit`-th condition."""
        graph, value = Graph.of(self.model), circuit.change().value
        assert isinstance(value, FromRun)
        kept = torch.zeros(len(graph.receivers), len(graph.senders), dtype=torch.bool)
        if places := graph.kept(circuit):
            kept[tuple(torch.tensor(places).T)] = True
        wanted = write.positions
        self.circuits.append(
            {
                "rows": slice(unit * self.examples, (unit + 1) * self.examples),
                "positions": None if wanted is None else [*wanted],
                "kept": kept.to(self.model.device),
                "run": value.run,
                "sites": [point_of(site) for site in circuit.taken(self.model.shape)],
                "carried": {},
            }
        )

    def _path(self, write: Write, path: PathPatch) -> ReceiverKey:
        """Register the path of a write, and give the key under which its receiver will find what it brings."""
        sender = path.sender
        start = replace(path, receivers=("logits",))  # paths that differ in their receivers have one sender
        if start not in self.senders:
            self.senders[start] = {
                "layer": path.after,
                "component": str(sender.component),
                "columns": columns_of(self.model, sender.component, sender.head),
                "run": path.run,
                "site": point_of(sender),
                "window": slice(self.start, self.stop),
                "positions": positions_in(sender, self.group),
                "through_mlps": path.through_mlps,
                "receivers": [],
            }
        receivers = self.senders[start]["receivers"]
        columns = None if write.part is None else columns_of(self.model, write.point, write.part)
        key = (list(self.senders).index(start), write.layer, write.point, write.part)
        if all(key != receiver["key"] for receiver in receivers):
            receivers.append({"key": key, "layer": write.layer, "point": write.point, "columns": columns})
        return key


def _index(positions: list[int] | None) -> Index:
    """A slice where positions follow each other, else the list; None is all."""
    if positions is None:
        return slice(None)
    if positions[-1] - positions[0] + 1 == len(positions):
        return slice(positions[0], positions[-1] + 1)
    return positions
