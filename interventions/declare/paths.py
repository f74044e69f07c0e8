"""What: path patching, as a frozen value. Knows no model and no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import DeclarationError, HeadwiseError, choices
from ..base.shape import Shape
from .changes import Change, How, from_source
from .components import Component
from .edits import Edit
from .sites import Head, Site, as_site

LOGITS = "logits"
AFTER = 2**31
"""The layer number of the place after every layer, where the logits are made."""
SENDERS = (Component.embed, Component.z, Component.attn_out, Component.mlp_out)
RECEIVERS = (Component.q, Component.k, Component.v)
"""Receivers of heads; ``mlp_in`` is one of a whole layer."""
BEFORE_MLP = (Component.z, Component.attn_out)
"""Senders that the MLP of their own layer reads, where it follows attention."""


@dataclass(frozen=True, init=False)
class PathPatch(Edit):
    """Patch only the direct paths from a sender to receivers; everything between stays as in the base run.

    The sender takes its value from the run `source`. Every attention head on the way keeps its base value; a receiver
    is set to what this makes of it, and what comes after the receivers runs freely. So a receiver does not depend on
    the other receivers, nor on other interventions before it that the path is composed with: those it does not feel. To
    the logits, a path adds what it brings. With ``through_mlps=False``, one sender and one receiver are an edge of the
    model: see `EdgePatches` for all of them.

    Parameters
    ----------
    sender : Head, Site or str
        A head (its ``z``), ``Layer(l).attn_out``, ``Layer(l).mlp_out`` or ``Layer(0).embed``, the token embedding;
        perhaps at some positions.
    receivers : Site, str, or several
        ``q``, ``k`` or ``v`` of heads, or ``Layer(l).mlp_in``, in later layers, perhaps at some positions, or
        ``"logits"``. Heads and ``attn_out`` send to ``mlp_in`` of their own layer too, where the MLP reads what
        attention wrote. A receiver has its own norm over the stream.
    source : str
        The run that the sender's value comes from; ``"mean"`` for means over the reference draw of the task, one for
        each position.
    through_mlps : bool
        Whether MLPs between sender and receiver see the change and pass it on (free), or keep their base value
        (frozen).

    Raises
    ------
    DeclarationError
        The sender cannot send, a receiver cannot receive or is not in a later layer, or an option is not possible.

    Examples
    --------
    >>> hw.PathPatch(hw.Head(0, 3), hw.Head(1, 2).k)
    PathPatch(sender=Head(0, 3).z, receivers=(Head(1, 2).k,), source='corrupted', through_mlps=True)
    >>> direct = hw.PathPatch(hw.Head(0, 3), "logits", through_mlps=False)

    References
    ----------
    Wang et al. (2023), "Interpretability in the Wild"; Goldowsky-Dill et al. (2023), "Localizing Model Behavior with
    Path Patching".
    """

    sender: Site
    receivers: tuple[Site | str, ...]
    source: str = "corrupted"
    through_mlps: bool = True

    def __init__(
        self,
        sender: Site | Head | str,
        receivers: Site | str | Sequence[Site | str],
        source: str = "corrupted",
        through_mlps: bool = True,
    ) -> None:
        start = as_site(sender)
        if start.component not in SENDERS or (start.component.per_head and start.head is None):
            raise DeclarationError(
                f"{start} cannot send: possible are a head such as Head(0, 3), Layer(0).attn_out, Layer(0).mlp_out, "
                "Layer(0).embed"
            )
        given = tuple(receivers) if isinstance(receivers, list | tuple | set) else (receivers,)
        several = tuple(as_site(end) if isinstance(end, str) and end != LOGITS else end for end in given)
        for end in several:
            _check_receiver(start, end)
        if not several or len(set(several)) < len(several):
            raise DeclarationError(f"a path needs receivers that differ, got {several}")
        check_source(source)
        if _names_a_site(source):
            raise DeclarationError(
                f"source={source!r} is a site, not the name of a run: several receivers are a list, such as "
                f"[{choices([*map(repr, map(str, several)), repr(source)])}]"
            )
        if not isinstance(through_mlps, bool):
            raise DeclarationError(f"through_mlps={through_mlps!r}: possible are True and False")
        self._fill(start, several, source, through_mlps)

    @classmethod
    def of_edge(cls, sender: Site, receiver: Site | str, source: str) -> PathPatch:
        """The path along one edge that is known to be one, through nothing between; quick to make.

        Parameters
        ----------
        sender : Site
        receiver : Site or "logits"
        source : str
            A name that was checked.

        Returns
        -------
        PathPatch
        """
        made = cls.__new__(cls)
        made._fill(sender, (receiver,), source, False)
        return made

    def _fill(self, sender: Site, receivers: tuple[Site | str, ...], source: str, through_mlps: bool) -> None:
        object.__setattr__(self, "sender", sender)
        object.__setattr__(self, "receivers", receivers)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "through_mlps", through_mlps)

    @property
    def after(self) -> int:
        """The layer whose end the sender's value reaches first; -1 of the embedding, which enters before layer 0."""
        return -1 if self.sender.component is Component.embed else self.sender.layer

    @property
    def site(self) -> Site:
        """The first receiver; the place after every layer for the logits."""
        end = self.receivers[0]
        return end if isinstance(end, Site) else Site(Component.resid_post, AFTER)

    def change(self) -> Change:
        """What the path brings: a receiver is set to it; to the logits, which have other paths too, it is added."""
        return Change(How.ADD if self.site.layer == AFTER else How.SET, from_source(self.source))

    def taken(self, shape: Shape) -> tuple[Site, ...]:
        """The sender."""
        return (self.sender,)

    def edits(self) -> tuple[PathPatch, ...]:
        """One for each receiver."""
        if len(self.receivers) == 1:
            return (self,)
        return tuple(replace(self, receivers=(end,)) for end in self.receivers)


def check_source(source: object) -> str:
    """The name of a run that values come from, or an error."""
    if not isinstance(source, str):
        raise DeclarationError(f"source={source!r}: give the name of a run, such as 'corrupted'")
    return source


def _names_a_site(text: str) -> bool:
    """Whether text is that of a site, such as ``L1H0.k``."""
    try:
        as_site(text)
    except HeadwiseError:
        return False
    return True


def _check_receiver(start: Site, end: Site | str) -> None:
    if end == LOGITS:
        return
    of_head = isinstance(end, Site) and end.component in RECEIVERS and end.head is not None
    if not isinstance(end, Site) or not (of_head or end.component is Component.mlp_in):
        raise DeclarationError(
            f"{end!r} cannot receive: possible are {choices(RECEIVERS)} of a head, such as Head(1, 2).k, mlp_in of a "
            f"layer, such as Layer(1).mlp_in, and {LOGITS!r}"
        )
    own = start.component is Component.embed or (end.component is Component.mlp_in and start.component in BEFORE_MLP)
    if end.layer < start.layer + (not own):
        raise DeclarationError(f"no direct path from {start} to {end}: a receiver is in a later layer")
