"""The counts of a model and how its layers are wired, and how examples are grouped by length. Imports nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Tail = tuple[float, bool, float]
"""What becomes of logits: times the first, through a hyperbolic tangent or not, times the last."""


@dataclass(frozen=True)
class Shape:
    """Counts of a model, and what its layers are like.

    Attributes
    ----------
    layers, heads, d_model, d_head, d_mlp, vocabulary, context : int
        ``heads`` of a layer (those that ask); ``context`` in positions.
    kv_heads : int
        Heads of a layer that hold keys and values: as many as ``heads``, or fewer, each read by as many neighbours.
    gated : bool
        Whether the MLP has a gate: three matrices, not two.
    parallel : bool
        Whether attention and MLP of a layer both read its input, so that there is no stream between them.
    rotary : bool
        Whether q and k are rotated by their position.
    pos_embed : bool
        Whether an embedding of the position is added to that of the token.
    neurons : bool
        Whether it is known where the neurons of an MLP are: ``mlp_pre`` and ``mlp_post``.
    windows : tuple of int or None
        For each layer, how many keys back a query sees, itself among them; None for all. Empty where no layer has one.
    cap : float, optional
        What attention scores are soft-capped at, ``cap * tanh(score / cap)``.
    sinks : bool
        Whether a number of each head stands beside the scores of every query, so that weights sum to less than 1.
    normed_after : bool
        Whether a norm stands between what attention or the MLP makes and the stream.
    joint_norms : bool
        Whether norms of q and k run over all heads at once.
    kinds : tuple of str or None
        For each layer, what the rotary embedding is called with, besides positions: a kind of layer, or nothing (an
        empty text); None where it turns nothing. Empty where all layers turn alike.
    neighbours : bool
        Whether the rotary embedding turns neighbouring dimensions of a head, and not those of its halves.
    paired : bool
        Whether it gives an angle for each pair of dimensions, and not for each dimension.
    tail : tuple of float, bool and float, optional
        What becomes of the logits of the unembedding: times the first, through a hyperbolic tangent or not, times the
        last.
    called : bool
        Whether its own blocks run, read and written where modules take and give; else they are laid open.
    lacks : tuple of (str, str)
        Components that are not found in called blocks, and why.
    read_only : tuple of (str, str)
        Components that can be read in called blocks and not written, and why.
    work : int
        Operations of a called block for each position, the products of attention aside.
    """

    layers: int
    heads: int
    d_model: int
    d_head: int
    d_mlp: int
    vocabulary: int
    context: int
    kv_heads: int = 0
    gated: bool = False
    parallel: bool = False
    rotary: bool = False
    pos_embed: bool = True
    neurons: bool = True
    windows: tuple[int | None, ...] = ()
    cap: float | None = None
    sinks: bool = False
    normed_after: bool = False
    joint_norms: bool = False
    kinds: tuple[str | None, ...] = ()
    neighbours: bool = False
    paired: bool = False
    tail: Tail | None = None
    called: bool = False
    lacks: tuple[tuple[str, str], ...] = ()
    read_only: tuple[tuple[str, str], ...] = ()
    work: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)

    def missing(self, component: str) -> str:
        """Why a model of this shape lacks a component; empty where it has it."""
        if why := dict(self.lacks).get(component):
            return why
        if component == "resid_mid" and self.parallel:
            return "attention and MLP of a layer both read resid_pre"
        if component in ("mlp_pre", "mlp_post") and not self.neurons:
            parts = "pre, up, act and down" if self.gated else "pre, act and down"
            return f"the table of its family does not say where the {parts} of its MLPs are"
        if component == "pos_embed" and not self.pos_embed:
            return "positions enter where q and k are rotated (q_rot, k_rot)"
        if component in ("q_rot", "k_rot") and not self.rotary:
            return f"it has no rotary embedding, and scores are made from {component[0]}"
        return ""

    @property
    def width(self) -> int:
        """Width of q of all heads."""
        return self.heads * self.d_head

    @property
    def kv_width(self) -> int:
        """Width of k, or of v, of all heads."""
        return self.kv_heads * self.d_head

    @property
    def qkv_width(self) -> int:
        """Width of q, k and v of all heads."""
        return self.width + 2 * self.kv_width

    def key_head(self, head: int) -> int:
        """The key-value head that a head reads."""
        return head * self.kv_heads // self.heads

    def readers(self, key_head: int) -> range:
        """The heads that read a key-value head."""
        group = self.heads // self.kv_heads
        return range(key_head * group, (key_head + 1) * group)

    def window(self, layer: int) -> int | None:
        """How many keys back a query of a layer sees, itself among them; None for all."""
        return self.windows[layer] if layer < len(self.windows) else None

    def kind(self, layer: int) -> str | None:
        """What the rotary embedding is called with in a layer; None where it turns nothing."""
        return self.kinds[layer] if layer < len(self.kinds) else ""


@dataclass(frozen=True)
class Group:
    """Examples of equal length, which run together.

    Attributes
    ----------
    examples : tuple of int
        Which examples of the batch.
    length : int
        Their length in tokens.
    scored : tuple of int
        Positions whose logits are read.
    prompt : int
        Tokens of the prompt, within which positions are counted; the rest are those of an answer. The whole length
        when left out.
    labels : tuple of (str, tuple of int)
        Named positions, counted from 0.
    """

    examples: tuple[int, ...]
    length: int
    scored: tuple[int, ...]
    prompt: int = 0
    labels: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", self.prompt or self.length)

    def count_out(self, positions: Iterable[int | str]) -> list[int]:
        """Positions and labels of positions as positions counted from 0."""
        named = dict(self.labels)
        return [at for one in positions for at in (named[one] if isinstance(one, str) else (one % self.prompt,))]
