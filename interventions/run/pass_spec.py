"""From a pass of a plan to the job that `forward.run` takes. Owns where in a tensor each write goes.

What depends on activations is left open, for `fill.filled` to put in where they are.
"""

from __future__ import annotations

from typing import Any

import torch

from ..declare.components import Component
from ..declare.paths import PathPatch
from ..declare.steering import Knockout
from ..models.model import Model
from ..plan.passes import ExampleChunk, Pass, heads_of, heads_redone
from ..plan.plan import Plan
from ..plan.writes import BY_QUERY, HOW, OF_KEYS, STAGES, Write, keys_in, positions_in
from ..traced import activations
from .activations import point_of
from .cache import RunCache
from .deferred import open_value

EMBEDDINGS = ("embed", "pos_embed")


class PassSpec:
    """Makes the job of one pass on some examples of a chunk.

    Parameters
    ----------
    model : Model
    plan : Plan
    chunk : Chunk
    one : Pass
    known : Known
        Of these examples only.
    examples : tuple of int
        Start and stop of the examples in their group.
    """

    def __init__(
        self, model: Model, plan: Plan, chunk: ExampleChunk, one: Pass, known: RunCache, examples: tuple[int, int]
    ) -> None:
        self.model, self.plan, self.chunk, self.one, self.known = model, plan, chunk, one, known
        self.span, self.examples = examples, examples[1] - examples[0]
        self.group = plan.groups[chunk.group]
        extent = plan.extent(chunk, one.start)
        self.start, self.stop = extent.start, extent.stop
        self.out = plan.scored(chunk.group, one.start)
        self.writes: dict[tuple[int, str], list[Any]] = {}
        self.pair_writes: dict[tuple[int, str], list[Any]] = {}
        self.pairs: dict[int, tuple[list[int], list[int]]] = {}
        self.senders: dict[Any, list[Any]] = {}

    def make(self) -> dict[str, Any]:
        """The dict that `fill.filled` takes."""
        for local, (number, entry) in enumerate(zip(self.one.conditions, self.one.entries, strict=True)):
            writes = self.plan.writes[self.chunk.group][number]
            redone = heads_redone(writes, entry, self.model.shape)
            conditions, heads = self.pairs.setdefault(entry[0], ([], [])) if redone else ([], [])
            first = len(heads)
            conditions += [local] * len(redone)
            heads += redone
            embedded = [write for write in writes if write.how == "embed"]
            if embedded:
                self._embed(embedded, local)
            for write in writes[len(embedded) :]:
                value = self._path(write) if isinstance(write.edit, PathPatch) else None
                if redone and (write.layer, STAGES[write.place]) == entry:
                    for pair, head in enumerate(redone, start=first):
                        if head in heads_of(write, self.model.shape):
                            own = self.model.shape.key_head(head) if write.place in OF_KEYS else head
                            self._write(self.pair_writes, write, pair, own, value, True)
                else:
                    self._write(self.writes, write, local, write.head, value, False)
        return self.frame()

    def write(self, write: Write, unit: int) -> None:
        """Put in one write, for the rows of the `unit`-th condition of the pass."""
        if write.how == "embed":
            self._embed([write], unit)
        else:
            self._write(self.writes, write, unit, write.head, None, False)

    def frame(self) -> dict[str, Any]:
        """The dict without any writes, unless `make` has put them in."""
        joins: dict[tuple[int, int], int] = {}
        ahead: dict[int, int] = {}
        for number, (layer, stage) in enumerate(self.one.entries):
            joins[(layer, stage)] = joins.get((layer, stage), 0) + 1
            if stage == 1:
                ahead.setdefault(layer, number)
        return {
            "examples": self.examples,
            "conditions": len(self.one.conditions),
            "layers": self.model.shape.layers,
            "first": self.one.entries[0][0],
            "start": self.start,
            "stop": self.stop,
            "out": torch.tensor(self.out, device=self.model.device, dtype=torch.long),
            "skip": len(self.group.scored) - len(self.out),
            "joins": joins,
            "ahead": ahead,
            "writes": self.writes,
            "pairs": self.pairs,
            "pair_writes": self.pair_writes,
            "senders": list(self.senders.values()),
        }

    def _write(
        self,
        table: dict[tuple[int, str], list[Any]],
        write: Write,
        unit: int,
        head: int | None,
        value: Any,
        alone: bool,
    ) -> None:
        """Put a write into `table`; `unit` counts conditions or pairs, and a pair has its head alone."""
        axis = self._axis(write, alone)
        there = {*axis}
        wanted = axis if write.positions is None else [at for at in write.positions if at in there]
        if not wanted:
            return
        rows = slice(unit * self.examples, (unit + 1) * self.examples)
        where = _index([axis.index(at) for at in wanted] if len(wanted) < len(axis) else None)
        some = slice(0, 1) if alone else slice(None) if head is None else slice(head, head + 1)
        entries = table.setdefault((write.layer, write.place), [])
        if write.how == "mask":
            assert isinstance(write.edit, Knockout)
            keys = [key for key in keys_in(write.edit, self.group.length) if key < self.stop]
            queries = torch.arange(len(axis), device=self.model.device)[where]
            entries.append((rows, queries, some, torch.tensor(keys, device=self.model.device, dtype=torch.long)))
            return
        if value is not None:
            value = (value, _index([at - self.start for at in wanted]))
        else:
            value = self._value(write, head, wanted)
        if write.place == "pattern":
            entries.append((rows, where, some, write.how, value))
            return
        width = self.model.shape.d_head
        per_head = write.place in ("q", "k", "v", "q_rot", "k_rot", "z") and head is not None and not alone
        cols = slice(head * width, (head + 1) * width) if per_head and head is not None else slice(None)
        entries.append((rows, where, cols, write.how, value))

    def _axis(self, write: Write, alone: bool) -> list[int]:
        """The positions along the tensor at a place."""
        layers = self.model.shape.layers
        if write.layer == layers:
            return self.out
        if write.layer == layers - 1 and write.place in BY_QUERY:
            whole = self.known.watch and write.place in ("q", "q_rot", "scores", "pattern")
            if not whole:
                return self.out
        return list(range(0 if alone and write.place in OF_KEYS else self.start, self.stop))

    def _value(self, write: Write, head: int | None, wanted: list[int]) -> Any:
        """What the edit of a write puts in at the wanted positions, as far as it is known here."""
        shape, site = self.model.shape, write.edit.site
        sizes = (shape.heads, shape.d_head, shape.kv_heads)
        columns: Any = activations.columns(site.component, head, *sizes)
        if site.component is Component.pattern:
            q = activations.columns("q_rot", head, *sizes)
            k = activations.columns("k_rot", None if head is None else shape.key_head(head), *sizes)
            columns = (q, k, shape.d_head, self.model.scaling(site.layer), shape.window(site.layer), self.stop)
        return open_value(write.edit, point_of(site), columns, _index(wanted), self.span, self.known.drawn)

    def _embed(self, writes: list[Write], unit: int) -> None:
        """The stream before layer 0 as the sum of its embeddings, some of them changed; exact where it is near 0."""
        changed: set[int] = set()
        parts = []
        for write in writes:
            wanted = [at for at in (write.positions or range(self.stop)) if at < self.stop]
            changed.update(wanted)
            value, part = self._value(write, None, wanted), str(write.edit.site.component)
            parts.append((part, _index(wanted), HOW.get(type(write.edit), "set"), value))
        wanted = sorted(changed)
        where = _index([at - self.start for at in wanted])
        rows = slice(unit * self.examples, (unit + 1) * self.examples)
        entry = (rows, where, slice(None), "set", {"embedded": parts, "positions": _index(wanted)})
        self.writes.setdefault((0, "stream"), []).append(entry)

    def _path(self, write: Write) -> Any:
        """Register the path of a write, and give the key under which its receiver will find what it brings."""
        edit = write.edit
        assert isinstance(edit, PathPatch)
        shape, sender = self.model.shape, edit.sender
        columns = activations.columns(sender.component, sender.head, shape.heads, shape.d_head, shape.kv_heads)
        chain = (sender, edit.source, edit.through_mlps)
        if chain not in self.senders:
            window, sent = slice(self.start, self.stop), positions_in(sender, self.group.length)
            change = (edit.source, point_of(sender), window, sent)
            self.senders[chain] = [sender.layer, str(sender.component), columns, change, edit.through_mlps, []]
        receivers = self.senders[chain][-1]
        part = None
        if write.head is not None:
            part = activations.columns(write.place, write.head, shape.heads, shape.d_head, shape.kv_heads)
        key = (list(self.senders).index(chain), write.layer, write.place, write.head)
        if all(key != known for known, *_ in receivers):
            receivers.append((key, write.layer, part))
        return key


def _index(positions: list[int] | None) -> Any:
    """A slice where positions follow each other, else the list; None is all."""
    if positions is None:
        return slice(None)
    if positions[-1] - positions[0] + 1 == len(positions):
        return slice(positions[0], positions[-1] + 1)
    return positions
