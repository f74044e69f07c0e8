"""What crosses from a plan to a trace, and its shapes. Holds names of types only.

A TypedDict is a plain dict at run time, so a trace needs no class of ours: the other modules of this package import
these names for type checkers only, and make dicts as literals. Rows are conditions times examples, condition by
condition; a position is an index in a prompt; a point is the name of a tensor in a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeAlias, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch

ReadSite = tuple[int, str]
"""Layer, and a point that is read of a run: of `Family.points`, ``rotated``, an embedding; ``stream`` of base runs."""
WriteSite = tuple[int, str]
"""Layer, and a point that a planned pass writes at: a key of `JOIN_STAGES` in the plan. Layer ``layers`` is the end."""
Join = tuple[int, str]
"""Layer and stage at which conditions join: one of `STAGES` in the plan."""
Points: TypeAlias = "dict[ReadSite, torch.Tensor]"
"""What was read, ``(example, position, width)`` each."""
Index: TypeAlias = "slice | list[int] | torch.Tensor"
"""Some of the places along an axis."""


Tail: TypeAlias = "tuple[float, bool, float] | None"
"""What becomes of logits: times the first, a hyperbolic tangent or not, times the last; None where nothing does."""


class BlockLayout(TypedDict):
    """Where the weights of heads are in a block."""

    paths: dict[str, str]  # name to the path of a module
    layout: str  # "side by side", "by head" or "apart", see `projections`
    transposed: bool  # whether weights are (input, output)
    centred: bool  # whether norms subtract the mean
    gain_offset: float  # what a norm adds to its weight
    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    joint_norms: bool  # whether norms of q and k run over all heads at once


class CallFacts(TypedDict):
    """What there is to know of blocks that are called."""

    called: bool  # whether they are, instead of being laid open
    gives: int  # how many things a block gives in a tuple; 0 where it gives the stream alone
    factors: dict[str, float]  # what a block multiplies what is at a point by before it adds it, if not 1


class ModelFacts(BlockLayout, CallFacts):
    """What there is to know of a model, beside its outer modules."""

    embeddings: list[tuple[str, str]]  # name and path; read as if in layer 0, before it
    points: list[tuple[str, list[tuple[str, str]]]]  # of a block, in forward order: name, (path, side) of parts
    layers: int
    parallel: bool  # whether the MLP reads what attention reads
    gated: bool  # whether the MLP has a gate
    scalings: list[float]  # by layer
    windows: list[int | None]  # by layer
    cap: float | None  # of attention scores
    kinds: list[str | None]  # by layer: what the rotary embedding is called with, "" for nothing; None: no turning
    neighbours: bool  # whether it turns neighbouring dimensions, not halves
    paired: bool  # whether it gives an angle for each pair of dimensions
    tail: Tail
    apart: bool  # whether the weights are on another machine than the job


class ModelDescription(ModelFacts):
    """A model in plain data, with the paths of its outer modules."""

    blocks: str
    norm: str  # and, behind spaces, what else stands before the unembedding
    unembed: str
    rotary: str | None  # a module, or a table of sines and cosines; None without rotary embedding


class ModelParts(ModelFacts):
    """A model in a trace, with the handles of its outer modules."""

    blocks: Any
    norm: Any
    normed: Any  # the module that gives what the unembedding reads
    unembed: Any
    rotary: Any  # None without rotary embedding
    like: Any  # on a server an activation, which has the number format and the device; else None


class Kernel(TypedDict):
    """A metric: ``function(values, **arguments)``, values being logits or attention patterns."""

    name: str
    function: Callable[..., torch.Tensor]
    arguments: dict[str, torch.Tensor]  # (example, ...), of logits (example, scored, ...)


class LogitsSpec(TypedDict):
    """What is made of logits."""

    kernels: list[Kernel]
    tokens: torch.Tensor | None  # (example, scored, token): their logits only; None for the whole vocabulary
    compare: list[str]  # names of kernels that also take base_logits (example, scored, token)
    rows: int  # that are scored at a time,
    rows_of_all: int  # or where all logits are computed
    apart: bool
    tail: Tail


class ReferenceRead(TypedDict):
    """What was read of the reference draw."""

    alike: Points  # of its prompts that are as long as those of the group
    whole: list[Points]  # of all of its prompts, by their length, where they differ in it and a mean is over all


class RunCache(TypedDict):
    """What was read of the runs before the passes of some examples, and the kernels with their arguments."""

    tokens: torch.Tensor  # (example, position), of the base run
    base: Points
    sources: dict[str, Points]  # by run
    reference: ReferenceRead
    pattern_kernels: list[Kernel]
    logits: LogitsSpec
    base_attended: dict[str, torch.Tensor]  # (example, layer, head) by kernel of patterns


class RunSpec(TypedDict):
    """A run without intervention."""

    name: str
    tokens: torch.Tensor  # (example, position)
    scored: list[int]  # positions
    points: list[ReadSite]
    pattern_kernels: list[Kernel]
    logits: LogitsSpec


class Vector(TypedDict):
    """A deferred value: a vector, in the number format of the base run."""

    kind: Literal["vector"]
    numbers: tuple[float, ...]  # (column,)


class PatternColumns(TypedDict):
    """How a pattern is made of rotated q and k, which lie side by side."""

    q: slice
    k: slice
    d_head: int
    scaling: float
    window: int | None
    cap: float | None
    sinks: slice | None  # columns that hold the numbers beside the scores; None without sinks


class FromRun(TypedDict):
    """A deferred value: what a run has at a site."""

    kind: Literal["run"]
    run: str | None  # None for the reference draw
    site: ReadSite
    columns: slice  # of the tensor there
    pattern: PatternColumns | None  # where the value is a pattern; then no columns
    stop: int  # keys of a pattern that are computed
    positions: Index
    reduce: str  # a value of `Reduce` in the plan
    partners: np.ndarray[Any, Any] | None  # (example,), the other example of each


class EmbeddingWrite(TypedDict):
    """A write to one of the embeddings."""

    embedding: str
    write: TensorWrite


class EmbeddingSum(TypedDict):
    """A deferred value: the stream before layer 0 as the sum of its embeddings, some of them changed."""

    kind: Literal["embeddings"]
    writes: list[EmbeddingWrite]
    positions: Index


class FromPath(TypedDict):
    """A deferred value: what a direct path brings to its receiver."""

    kind: Literal["path"]
    receiver: ReceiverKey
    positions: Index  # from the first position computed on


DeferredValue = Vector | FromRun | EmbeddingSum | FromPath
"""A value that is known only where the runs were read."""
Value: TypeAlias = "torch.Tensor | float | DeferredValue | None"
"""A tensor that broadcasts to ``(example, position, column)``, a factor, what becomes one of them, or zeros (None)."""


class TensorWrite(TypedDict):
    """A write to some of a tensor ``(row, position, column)``; of a pattern, ``(row, head, query, key)``."""

    rows: slice
    positions: Index  # queries of a pattern
    columns: slice  # heads of a pattern
    how: str  # "set", "add", "scale" or "project"
    value: Value


class ScoreMask(TypedDict):
    """Attention scores ``(row, head, query, key)`` that become minus infinity."""

    rows: slice
    heads: slice
    queries: torch.Tensor  # (query,)
    keys: torch.Tensor  # (key,)


class HeadPairs(TypedDict):
    """Heads whose attention is computed again: the head and its condition in the pass, of each pair."""

    conditions: list[int]
    heads: list[int]


ReceiverKey = tuple[int, int, str, int | None]
"""Number of the sender, and layer, point and head of the receiver."""


class PathReceiver(TypedDict):
    """Where a path ends."""

    key: ReceiverKey
    layer: int
    point: str  # "q", "k", "v", "mlp_in", or "stream" of the logits
    columns: slice | None  # of q, k and v side by side; None for an MLP and the logits


class PathSender(TypedDict):
    """Where paths begin."""

    layer: int  # -1 of the embedding
    component: str  # embed, z, attn_out or mlp_out
    columns: slice
    run: str | None  # that its value is from; None for means over the reference draw
    site: ReadSite
    window: slice  # the positions that are computed
    positions: list[int] | None  # that send; None for all
    through_mlps: bool
    receivers: list[PathReceiver]


class CircuitRows(TypedDict):
    """A circuit of edges in some rows of a pass; those of a pass with one are all of circuits."""

    rows: slice
    positions: list[int] | None  # of its receivers; None for all
    kept: torch.Tensor  # (receiver, sender), bool, in the order of the graph of the model
    run: str | None  # that all other edges carry values of; None for means over the reference draw
    sites: list[ReadSite]  # what is taken of it
    carried: Points  # put in where the runs were read


class PassSpec(TypedDict):
    """What a planned pass does, as far as it is known before the runs are read."""

    examples: int
    conditions: int
    layers: int
    first: int  # layer at which the first condition joins
    start: int  # positions start .. stop - 1 are computed; keys and values before start are the base run's
    stop: int
    out: torch.Tensor  # (scored,), the scored positions from start on
    skip: int  # how many scored positions are before start
    joins: dict[Join, int]  # how many conditions join
    ahead: dict[int, int]  # by layer: how many conditions joined before those at stage ``qkv``
    writes: dict[WriteSite, list[TensorWrite]]
    masks: dict[int, list[ScoreMask]]  # by layer
    pairs: dict[int, HeadPairs]  # by layer
    pair_writes: dict[WriteSite, list[TensorWrite]]  # their rows are pairs times examples, and hold one head
    pair_masks: dict[int, list[ScoreMask]]
    senders: list[PathSender]
    circuits: list[CircuitRows]
    blocks: int  # that rows go through; all, unless sites are read and nothing more
    reads: list[CapturedSite]
    inside: InsideSpec | None


class ResolvedPass(PassSpec):
    """A pass whose values are known, but for those of paths; with what is read in it."""

    changes: list[torch.Tensor]  # (example, position, column), of each sender's value
    pattern_kernels: list[Kernel]
    base_attended: dict[str, torch.Tensor]  # (row, layer, head)
    logits: LogitsSpec
    angles: list[Angles]  # by layer; put in where the pass runs
    tokens: torch.Tensor  # (example, position), of the base run


Angles: TypeAlias = "tuple[torch.Tensor, torch.Tensor] | None"
"""Cosines and sines ``(position, rotated dimension)`` of a layer; None where it turns nothing."""


class Change(TypedDict):
    """One write of one condition at a site, for an estimate."""

    condition: int
    positions: Index
    columns: slice  # heads of a pattern
    how: str
    value: Value


class StreamStart(TypedDict):
    """A pass without writes from the stream of a layer on."""

    spec: PassSpec
    layer: int
    site: ReadSite  # the point of the base run that holds the stream


class ChangeGroup(TypedDict):
    """Changes at one site; of the integrated estimate, those that move together."""

    site: WriteSite
    changes: list[Change]
    start: StreamStart | None  # where slopes on their lines are taken from; None for the slope at the base run


class EstimateSpec(TypedDict):
    """What an estimate from gradients does."""

    names: list[str]  # of kernels
    conditions: int
    examples: int
    steps: int | None  # None for the slope at the base run
    sites: list[WriteSite]  # all that are written at
    start: StreamStart | None  # from the first site on; None where nothing is written
    groups: list[ChangeGroup]


class EdgeEstimateSpec(TypedDict):
    """What an estimate of edge scores does."""

    source: str | None  # the run whose values edges carry; None for means over the reference draw
    scored: list[int]  # positions
    runs: list[tuple[ReadSite | None, float]]  # whose slopes are averaged: what moves to the source's value, how far
    drops: bool  # whether the slope through each attention and MLP is dropped in turn
    patterns: bool  # whether patterns are made anew for edges into q and k
    ruled: bool  # whether slopes are those of RelP
    rows: int  # that go through attention at a time where patterns are made anew


class ReferenceSpec(TypedDict):
    """What is read of the reference draw."""

    tokens: torch.Tensor  # (example, position), of the prompts that are as long as those of the group
    whole: list[torch.Tensor]  # (example, position), of all, by their length
    points: list[ReadSite]


class PassJob(TypedDict):
    """A planned pass, and where it starts from."""

    spec: PassSpec
    points: dict[ReadSite, ReadSite]  # what it takes from the base run: its own name, that of the model's own pass


class ChunkSpec(TypedDict):
    """What a server runs of the examples of a chunk."""

    runs: list[RunSpec]  # the base run first
    reference: ReferenceSpec | None
    passes: list[PassJob]
    estimate: NotRequired[EstimateSpec]
    edges: NotRequired[EdgeEstimateSpec]


class PlannedSite(TypedDict):
    """Where a planned pass has a site."""

    name: str
    at: WriteSite | None  # None for embeddings
    columns: slice  # of the tensor there; of a pattern, heads
    scored: bool  # whether that has the scored positions only, and not all that are computed
    added: ReadSite | None  # where `PassSpec.writes` has what is written to it afterwards, at positions from 0 on


class CapturedSite(TypedDict):
    """A site whose values are taken."""

    kind: Literal["whole", "heads", "head_out", "neuron", "logits"]
    site: ReadSite
    columns: slice  # of the tensor there
    pattern: PatternColumns | None  # where the value is a pattern; then no columns
    heads: int  # that the tensor has
    head: int | None  # None for all
    positions: list[int] | None  # None for all
    tokens: list[int] | None  # of logits; None for the whole vocabulary
    planned: NotRequired[PlannedSite]


class FrozenNorm(TypedDict):
    """The final norm as a linear function, ``shift + gain * scale * value``, of a centred value where it centres."""

    gain: torch.Tensor  # (1, 1, d_model), up to a factor
    scale: torch.Tensor  # (example, scored, 1), with that factor: by what the norm divides for the whole stream
    shift: torch.Tensor  # (1, 1, d_model)
    normed: torch.Tensor  # (example, scored, d_model), what it makes of the whole stream, without the shift


class DirectPart(TypedDict):
    """A part of the model whose own parts are looked for: an MLP by its neurons, or a head by its keys."""

    layer: int
    neurons: list[int] | None  # None for all, and the bias that the MLP adds to them; not used of a head
    head: int | None
    key_head: int | None  # that the head reads values of
    pattern: PatternColumns | None  # of a head
    value: slice  # columns of q, k and v side by side that hold its values


class DirectSpec(TypedDict):
    """Whose parts are looked for: a linear function of the logits of some prompts."""

    parts: list[DirectPart] | None  # what is looked into; None for the whole model
    tokens: torch.Tensor  # (example, position)
    scored: list[int]
    answers: torch.Tensor | None  # (example, scored), token ids; None with a direction
    others: torch.Tensor | None  # (example, scored), whose logits are taken away
    direction: torch.Tensor | None  # (d_model,), in the normed stream
    keys: int  # of the longest prompt of all groups, under interventions


class InsideSpec(TypedDict):
    """What is made of the sites that a pass reads, and given instead of their values."""

    kind: str  # "shares", or what the lens reads: "stream" or "heads"
    scored: list[int]
    direct: DirectSpec | None  # of shares; its answers are of the examples of the pass


class RowChange(TypedDict):
    """What is added to a row of a tensor."""

    row: int
    change: torch.Tensor  # (position, width)


class Program(TypedDict):
    """What a server does, beside the function that it runs."""

    parts: ModelDescription
    prompt: torch.Tensor  # (1, position), whose pass gives the fingerprint
    job: Callable[[Any, Any], dict[str, Any]]


class SweepProgram(Program):
    """For `server_jobs.passes` and `server_jobs.estimates`."""

    chunks: list[ChunkSpec]
    positions: bool  # whether values come for each scored position, or their mean
    compares: bool  # whether a kernel compares with the logits of the base run


class CheckProgram(SweepProgram):
    """For `server_jobs.check`; the fields are as for `server_jobs.own_pass`."""

    rows: torch.Tensor
    writes: dict[ReadSite, list[RowChange]]
    scored: list[int]
    wanted: list[ReadSite]
    layers: list[int]
    probe: Callable[[torch.Tensor], torch.Tensor]


class CaptureProgram(Program):
    """For `server_jobs.activations`."""

    sites: list[CapturedSite]
    tokens: list[torch.Tensor]  # (example, position), by group


class SumsProgram(CaptureProgram):
    """For `server_jobs.sums`."""

    weights: list[torch.Tensor]  # (example, position), by group


class DirectProgram(Program):
    """For `server_jobs.direct`."""

    groups: list[DirectSpec]


class LensProgram(Program):
    """For `server_jobs.lenses`."""

    runs: list[RunSpec]
    heads: bool  # whether what each head writes is read, instead of the stream


class WeightsRead(TypedDict):
    """Gives weights where they are, in their own number format, to a function that makes scores of them."""

    ends: Callable[[], list[torch.Tensor]]  # embedding, unembedding (token, d_model); gain of the last norm (d_model,)
    heads: Callable[[int], list[Any]]  # of a layer, the fields of `HeadWeights`
    neurons: Callable[[int], list[Any]]  # of a layer, as `head_weights.neurons_read` gives them
    turned: Callable[[int, int, Any], Any]  # of a layer: queries (row, d_head) as so many positions turn them


class WeightsProgram(Program):
    """For `server_jobs.scores_of_weights`."""

    score: Callable[[WeightsRead], Any]
    vocabulary: int
