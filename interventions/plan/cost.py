"""What a pass costs: floating-point operations of its matrix products, and bytes. Imports no torch.

A multiplication and an addition are two operations, as torch's FlopCounterMode counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..base.shape import Shape
from .writes import ATTN_IN, ATTN_OUT, MLP_IN, MLP_OUT, MLP_PRE, QKV

DEFAULT_BUDGET = 512 * 2**20
"""Bytes for all tensors on a CPU, a quarter of them for a pass; more is not faster there."""
OVERHEAD = 3e7
"""Operations that a layer of a pass costs beside its work, in a pass of its own; a rough estimate for a CPU."""
BYTES = 4
RESIDENT = 12
"""Tensors of width ``d_model`` that a layer holds for each row and position, beside two of width ``d_mlp``."""


@dataclass(frozen=True)
class Extent:
    """How much of a pass is computed.

    Attributes
    ----------
    examples : int
    start, stop : int
        Positions that are computed; keys before `start` come from the base run.
    scored : int
        Positions whose logits are read.
    columns : int
        Logits that are computed at each: the vocabulary, the few that the metrics look at, or 0.
    patterns : bool
        Whether every attention pattern is read.
    """

    examples: int
    start: int
    stop: int
    scored: int
    columns: int
    patterns: bool = False


def block_flops(shape: Shape, rows: int, queries: int, stop: int) -> int:
    """Operations of a whole block on `rows` rows of `queries` positions that attend to `stop` keys.

    Parameters
    ----------
    shape : Shape
    rows : int
    queries : int
        Positions of each row.
    stop : int
        Keys that they attend to.

    Returns
    -------
    int
        Floating-point operations.
    """
    if shape.called:
        return rows * queries * shape.work + attention_flops(shape, rows, queries, stop)
    project = 2 * rows * queries * shape.d_model * shape.qkv_width
    return project + attention_flops(shape, rows, queries, stop) + write_flops(shape, rows, queries)


def attention_flops(shape: Shape, rows: int, queries: int, keys: int, heads: int | None = None) -> int:
    """Operations of scores and their sum over values.

    Parameters
    ----------
    shape : Shape
    rows : int
    queries, keys : int
        Positions of each row.
    heads : int, optional
        All heads where left out.

    Returns
    -------
    int
        Floating-point operations.
    """
    return 4 * rows * (shape.heads if heads is None else heads) * queries * keys * shape.d_head


def write_flops(shape: Shape, rows: int, queries: int) -> int:
    """Operations from ``z`` to the end of the block."""
    return 2 * rows * queries * shape.d_model * shape.width + mlp_flops(shape, rows, queries)


def mlp_flops(shape: Shape, rows: int, queries: int) -> int:
    """Operations of an MLP."""
    return (6 if shape.gated else 4) * rows * queries * shape.d_model * shape.d_mlp


def down_flops(shape: Shape, rows: int, queries: int) -> int:
    """Operations of the last matrix of an MLP."""
    return 2 * rows * queries * shape.d_model * shape.d_mlp


def logits_flops(shape: Shape, rows: int, scored: int, columns: int) -> int:
    """Operations of the unembedding.

    Parameters
    ----------
    shape : Shape
    rows : int
    scored : int
        Positions of each row.
    columns : int
        Logits of each position.

    Returns
    -------
    int
        Floating-point operations.
    """
    return 2 * rows * scored * shape.d_model * columns


def forward_flops(
    shape: Shape,
    rows: int,
    length: int,
    scored: int | None = None,
    columns: int | None = None,
    blocks: int | None = None,
) -> int:
    """Operations of a plain forward pass; of one with logits at `scored` positions, `columns` of each.

    Parameters
    ----------
    shape : Shape
    rows : int
    length : int
        Positions of each row.
    scored : int, optional
        Positions with logits; all where left out.
    columns : int, optional
        Logits of each; the vocabulary where left out.
    blocks : int, optional
        That it goes through; all where left out.

    Returns
    -------
    int
        Floating-point operations.
    """
    scored, columns = length if scored is None else scored, shape.vocabulary if columns is None else columns
    through = shape.layers if blocks is None else blocks
    return through * block_flops(shape, rows, length, length) + logits_flops(shape, rows, scored, columns)


def pass_flops(
    shape: Shape,
    extent: Extent,
    joins: Sequence[tuple[int, int]],
    heads: Sequence[tuple[int, int]],
    blocks: int | None = None,
) -> int:
    """Operations of a planned pass.

    Parameters
    ----------
    shape : Shape
    extent : Extent
    joins : sequence of (layer, stage)
        Where each condition joins, see `writes.STAGES`.
    heads : sequence of (layer, int)
        How many heads' attention is computed again there, for conditions that join at ``q k v pattern``.
    blocks : int, optional
        That passes go through whole; where left out all, the last one as far as logits and patterns need it.

    Returns
    -------
    int
        Floating-point operations.
    """
    n, window = extent.examples, extent.stop - extent.start
    if shape.called:  # whole blocks, from the layer at which its rows join
        through = shape.layers if blocks is None else blocks
        each = [max(0, through - layer) for layer, _ in joins]
        ends = n * sum(layer <= shape.layers for layer, _ in joins)
        block = block_flops(shape, n, window, extent.stop)
        return sum(each) * block + logits_flops(shape, ends, extent.scored, extent.columns)
    total, through = 0, ATTN_IN if shape.parallel else MLP_IN
    for layer, count in heads:
        queries = extent.scored if layer == shape.layers - 1 else window
        total += attention_flops(shape, n, queries, extent.stop, count)
    for layer in range(shape.layers if blocks is None else blocks):
        last = layer == shape.layers - 1
        queries = extent.scored if last else window
        rows = n * sum(join < (layer, QKV) for join in joins)
        attend = window if extent.patterns else queries
        total += 2 * rows * shape.d_model * (2 * shape.kv_width * window + shape.width * attend)
        total += attention_flops(shape, rows, attend, extent.stop)
        if not (last and not extent.columns and blocks is None):
            total += 2 * n * sum(join < (layer, ATTN_OUT) for join in joins) * queries * shape.d_model * shape.width
            whole = sum(join < (layer, through) or join == (layer, MLP_IN) for join in joins)
            total += mlp_flops(shape, n * whole, queries)
            total += down_flops(shape, n * sum((layer, MLP_PRE) <= join < (layer, MLP_OUT) for join in joins), queries)
    return total + logits_flops(shape, n * len(joins), extent.scored, extent.columns)


def circuit_flops(shape: Shape, extent: Extent) -> int:
    """Operations of the streams that the receivers of a circuit read, of one condition."""
    senders, total = 1, 0
    reading = shape.heads + 2 * shape.kv_heads
    for _ in range(shape.layers):
        total += reading * senders + (senders if shape.parallel else senders + shape.heads)
        senders += shape.heads + 1
    return 2 * extent.examples * (extent.stop - extent.start) * shape.d_model * (total + senders)


def circuit_bytes(shape: Shape, extent: Extent) -> int:
    """Bytes that a row holds of what senders write, and of the streams that receivers of a layer read (float32)."""
    senders = 1 + shape.layers * (shape.heads + 1)
    held = senders + 3 * (shape.heads + 2 * shape.kv_heads)
    return BYTES * (extent.stop - extent.start) * shape.d_model * held


def row_bytes(shape: Shape, extent: Extent, explicit: bool = False) -> int:
    """Bytes that a row holds at once in a planned pass (float32), its logits aside; `explicit`: with patterns made."""
    window = extent.stop - extent.start
    held = window * (RESIDENT * shape.d_model + (3 if shape.gated else 2) * shape.d_mlp)
    keys = 2 * extent.start * shape.heads * shape.d_head
    patterns = 3 * shape.heads * window * extent.stop if extent.patterns or explicit else 0
    return BYTES * (held + keys + patterns)


def logits_bytes(shape: Shape, extent: Extent) -> int:
    """Bytes of the logits of a row and of what a metric makes of them (float32)."""
    return BYTES * 3 * extent.scored * max(extent.columns, 1)


def cache_bytes(shape: Shape, length: int, points: Sequence[tuple[int, str]]) -> int:
    """Bytes of what is kept of one example of the base run (float32)."""
    widths = {"qkv": shape.qkv_width, "rotated": shape.width + shape.kv_width, "z": shape.width}
    widths |= dict.fromkeys(("mlp_pre", "mlp_up", "mlp_post"), shape.d_mlp)
    return BYTES * length * sum(widths.get(name, shape.d_model) for _, name in points)
