"""The data of a plan: which conditions share which passes, on which examples. Pure: imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..base.shape import Group, Shape
from ..declare.circuits import Circuit
from ..declare.edits import Edit
from ..declare.paths import PathPatch
from ..declare.sites import Site
from .cost import Extent
from .passes import ExampleChunk, Pass, at_stage, extent_of
from .reads import Inside, Read, blocks_run, own_point, sizes_in
from .writes import ATTN_IN, Write

ReadSite = tuple[int, str]
"""Layer and point of the model's own forward pass, or ``stream``, whose tensor is read."""


@dataclass(frozen=True)
class Schedule:
    """What will run, in order.

    Attributes
    ----------
    model : str
    shape : Shape
    base : str
    runs : tuple of str
    conditions : tuple of tuples of Edit
    groups : tuple of Group
    writes : tuple of tuples of tuples of Write
        For each group and condition, what is written; nothing where no number depends on it.
    chunks : tuple of ExampleChunk
    columns : int
        Logits that are computed at each scored position: the vocabulary, the few the metrics look at, or 0.
    patterns : bool
        Whether attention patterns are read in every pass.
    budget : int
        Bytes for all tensors, beside the weights: half for what is read of the runs, a quarter for a pass, a quarter
        for its logits.
    overhead : float
        Operations that a layer of a pass costs beside its work.
    speed : float, optional
        Operations a second, where that was measured; gives the estimate of time.
    advice : tuple of str
        Sentences on how it should be measured otherwise.
    pairs : int
        Where it is not 0: prompts, each of which stands in two examples, with its answer and with its distractor.
    reads : tuple of Site or Logits
        What is read in every condition, also in one that changes nothing of it.
    inside : Inside, optional
        What is made of that, and given instead of it.
    """

    model: str
    shape: Shape
    base: str
    runs: tuple[str, ...]
    conditions: tuple[tuple[Edit, ...], ...]
    groups: tuple[Group, ...]
    writes: tuple[tuple[tuple[Write, ...], ...], ...]
    chunks: tuple[ExampleChunk, ...]
    columns: int
    patterns: bool
    budget: int
    overhead: float
    speed: float | None = None
    pairs: int = 0
    advice: tuple[str, ...] = ()
    reads: tuple[Read, ...] = ()
    inside: Inside | None = field(default=None, compare=False)

    @property
    def blocks(self) -> int:
        """How many blocks passes go through."""
        return blocks_run(self.reads, self.shape)

    @property
    def passes(self) -> int:
        """Forward passes with interventions."""
        return sum(len(chunk.passes) for chunk in self.chunks)

    @property
    def steps(self) -> int:
        """All forward passes that yield numbers: those with interventions, and each run as it is."""
        return self.passes + len(self.runs) * len(self.chunks)

    def sizes(self) -> list[tuple[int, ...]]:
        """The sizes of each site that is read, ``(condition, example, ...)``, shorter prompts filled up."""
        by_group = [sizes_in(self.reads, self.shape, group).values() for group in self.groups]
        first = (max(1, len(self.conditions)), sum(len(group.examples) for group in self.groups))
        return [(*first, *map(max, zip(*sizes, strict=True))) for sizes in zip(*by_group, strict=True)]

    def sizes_read(self, group: int) -> dict[str, tuple[int, ...]]:
        """The sizes of what is read, or made of that, of each row of a group, by name."""
        if self.inside is not None:
            scored = len(self.groups[group].scored)
            return {name: (*sizes, scored) for name, sizes in self.inside.sizes.items()}
        return sizes_in(self.reads, self.shape, self.groups[group])

    @property
    def uses_reference(self) -> bool:
        """Whether any edit takes its value from the reference draw."""
        return any(edit.uses_reference for edits in self.conditions for edit in edits)

    def sources(self) -> dict[str, list[Site]]:
        """Run name to the sites that patches take from it."""
        return sources(self.conditions, self.shape)

    def reference_sites(self) -> list[Site]:
        """Sites read from the reference draw."""
        drawn = (edit for edits in self.conditions for edit in edits if edit.uses_reference)
        return [site for edit in drawn for site in edit.taken(self.shape)]

    def scored(self, group: int, start: int) -> list[int]:
        """Positions from `start` on whose logits are read."""
        return [position for position in self.groups[group].scored if position >= start]

    def extent(self, chunk: ExampleChunk, start: int = 0) -> Extent:
        """How much a pass of `chunk` computes."""
        return extent_of(self.groups[chunk.group], chunk.size, start, self.columns, self.patterns, self.shape.called)

    def base_points(self, chunk: ExampleChunk) -> set[ReadSite]:
        """What is kept of the base run of `chunk`."""
        return {point for one in chunk.passes for point in self.points_of(chunk, one)} | {
            own_point(read, self.shape) for read in self.reads
        }

    def points_of(self, chunk: ExampleChunk, one: Pass) -> set[ReadSite]:
        """What a pass takes from the base run."""
        wanted: set[ReadSite] = set()
        for number, (layer, stage) in zip(one.conditions, one.joins, strict=True):
            if layer > self.shape.layers:  # it changes nothing that is read
                continue
            wanted |= {(layer, name) for name in at_stage(self.shape, stage)}
            if one.start:  # keys and values of the positions that are not computed
                wanted |= {(later, "qkv") for later in range(layer + (stage > ATTN_IN), self.blocks)}
            for write in self.writes[chunk.group][number]:
                if write.embedding is not None:
                    wanted |= {(0, "embed"), (0, "pos_embed")} if self.shape.pos_embed else {(0, "embed")}
                if isinstance(write.value, PathPatch):
                    wanted |= _points_of_path(write.value, write, self.shape)
                if isinstance(write.value, Circuit):
                    wanted.add((0, "embed"))
        return wanted


def _points_of_path(edit: PathPatch, write: Write, shape: Shape) -> set[ReadSite]:
    """What a path takes from the base run: its sender, the stream that its receiver reads, and what lies between."""
    wanted = {(edit.sender.layer, str(edit.sender.component))}
    if write.point == "mlp_in":
        wanted.add((write.layer, "stream" if shape.parallel else "resid_mid"))
    elif write.part is not None:
        wanted.add((write.layer, "stream"))
    for layer in range(max(edit.after, 0), write.layer) if edit.through_mlps else ():
        wanted |= {(layer, "mlp_out" if shape.parallel else "resid_mid"), (layer + 1, "stream")}
        wanted |= {(layer, "stream")} if shape.parallel else set()
    return wanted


def sources(conditions: Sequence[Sequence[Edit]], shape: Shape) -> dict[str, list[Site]]:
    """Run name to the sites that patches take from it."""
    wanted: dict[str, list[Site]] = {}
    for edits in conditions:
        for edit in edits:
            if edit.run is not None:
                wanted.setdefault(edit.run, []).extend(edit.taken(shape))
    return wanted
