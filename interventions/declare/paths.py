"""What: path patching, as a frozen value. Knows no model and no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import DeclarationError, HeadwiseError, choices
from ..base.shape import Shape
from .changes import Change, FromRun, How
from .components import Component
from .edits import Edit
from .sites import Head, Site, as_site

LOGITS = "logits"
AFTER = 2**31
"""The layer number of the place after every layer, where the logits are made."""
SENDERS = (Component.z, Component.attn_out, Component.mlp_out)
RECEIVERS = (Component.q, Component.k, Component.v)


@dataclass(frozen=True, init=False)
class PathPatch(Edit):
    """Patch only the direct paths from a sender to receivers; everything between stays as in the base run.

    The sender takes its value from the run `source`. Every attention head on the way keeps its base value; a receiver
    is set to what this makes of it, and what comes after the receivers runs freely. So a receiver does not depend on
    the other receivers, nor on other interventions before it that the path is composed with: those it does not feel. To
    the logits, a path adds what it brings.

    Parameters
    ----------
    sender : Head, Site or str
        A head (its ``z``), ``Layer(l).attn_out`` or ``Layer(l).mlp_out``, perhaps at some positions.
    receivers : Site, str, or several
        ``q``, ``k`` or ``v`` of heads in later layers, perhaps at some positions, or ``"logits"``.
    source : str
        The run that the sender's value comes from.
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
                f"{start} cannot send: possible are a head such as Head(0, 3), Layer(0).attn_out, Layer(0).mlp_out"
            )
        given = tuple(receivers) if isinstance(receivers, list | tuple | set) else (receivers,)
        several = tuple(as_site(end) if isinstance(end, str) and end != LOGITS else end for end in given)
        for end in several:
            _check_receiver(start, end)
        if not several or len(set(several)) < len(several):
            raise DeclarationError(f"a path needs receivers that differ, got {several}")
        if not isinstance(source, str):
            raise DeclarationError(f"source={source!r}: give the name of a run, such as 'corrupted'")
        if _names_a_site(source):
            raise DeclarationError(
                f"source={source!r} is a site, not the name of a run: several receivers are a list, such as "
                f"[{choices([*map(repr, map(str, several)), repr(source)])}]"
            )
        if not isinstance(through_mlps, bool):
            raise DeclarationError(f"through_mlps={through_mlps!r}: possible are True and False")
        object.__setattr__(self, "sender", start)
        object.__setattr__(self, "receivers", several)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "through_mlps", through_mlps)

    @property
    def site(self) -> Site:
        """The first receiver; the place after every layer for the logits."""
        end = self.receivers[0]
        return end if isinstance(end, Site) else Site(Component.resid_post, AFTER)

    def change(self) -> Change:
        """What the path brings: a receiver is set to it; to the logits, which have other paths too, it is added."""
        return Change(How.ADD if self.site.layer == AFTER else How.SET, FromRun(self.source))

    def taken(self, shape: Shape) -> tuple[Site, ...]:
        """The sender."""
        return (self.sender,)

    def edits(self) -> tuple[PathPatch, ...]:
        """One for each receiver."""
        return tuple(replace(self, receivers=(end,)) for end in self.receivers)


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
    if not isinstance(end, Site) or end.component not in RECEIVERS or end.head is None:
        raise DeclarationError(
            f"{end!r} cannot receive: possible are {choices(RECEIVERS)} of a head, such as Head(1, 2).k, and {LOGITS!r}"
        )
    if end.layer <= start.layer:
        raise DeclarationError(f"no direct path from {start} to {end}: a receiver is in a later layer")
