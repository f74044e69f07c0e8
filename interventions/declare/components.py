"""The parts of a layer: `Component`, the field's names in forward order. Imports errors only."""

from __future__ import annotations

from enum import StrEnum

from ...errors import UnknownNameError, choices


class Component(StrEnum):
    """The parts of a layer, in the order in which a forward pass makes them.

    Shapes are for one layer; ``head`` is dropped when a site names one head. Where several heads share a key-value
    head, the heads of ``k v k_rot`` are the key-value heads, and those of all others the heads that ask. ``q`` and
    ``k`` are what the projections write, before any norm of theirs and before any rotary embedding; ``q_rot`` and
    ``k_rot`` are what comes of them after both, and what scores are made from. Models without rotary embedding have
    no ``q_rot`` and ``k_rot``, those with one have no ``pos_embed``, and where attention and MLP of a layer both read
    its input (as in Pythia) there is no ``resid_mid``. In MLPs with a gate, ``mlp_pre`` is what the gate's projection
    writes, and ``mlp_post`` is what the activation function makes of that, times what the up projection writes.

    ==============  =============================================  =====================================
    component       what it is                                     shape
    ==============  =============================================  =====================================
    ``embed``       token embedding, before layer 0                ``(example, position, d_model)``
    ``pos_embed``   position embedding, before layer 0             ``(example, position, d_model)``
    ``resid_pre``   residual stream that enters the layer          ``(example, position, d_model)``
    ``attn_in``     the normed stream that ``q k v`` are made of   ``(example, position, d_model)``
    ``q k v``       what the projections write, before the split   ``(example, position, head, d_head)``
    ``q_rot k_rot`` q and k rotated by their position              ``(example, position, head, d_head)``
    ``pattern``     attention weights after the softmax            ``(example, head, query, key)``
    ``z``           head output before ``W_O``                     ``(example, position, head, d_head)``
    ``head_out``    ``z @ W_O``, the head's write, without bias    ``(example, position, head, d_model)``
    ``attn_out``    what attention adds to the residual stream     ``(example, position, d_model)``
    ``resid_mid``   residual stream between attention and MLP      ``(example, position, d_model)``
    ``mlp_in``      the normed stream that the MLP reads           ``(example, position, d_model)``
    ``mlp_pre``     its neurons before the activation function     ``(example, position, neuron)``
    ``mlp_post``    its neurons, which the down projection reads   ``(example, position, neuron)``
    ``mlp_out``     what the MLP adds to the residual stream       ``(example, position, d_model)``
    ``resid_post``  residual stream that leaves the layer          ``(example, position, d_model)``
    ==============  =============================================  =====================================

    Examples
    --------
    >>> hw.Component.z == "z"
    True
    >>> [str(component) for component in hw.Component if component.per_head]
    ['q', 'k', 'v', 'q_rot', 'k_rot', 'pattern', 'z', 'head_out']
    """

    embed = "embed"
    pos_embed = "pos_embed"
    resid_pre = "resid_pre"
    attn_in = "attn_in"
    q = "q"
    k = "k"
    v = "v"
    q_rot = "q_rot"
    k_rot = "k_rot"
    pattern = "pattern"
    z = "z"
    head_out = "head_out"
    attn_out = "attn_out"
    resid_mid = "resid_mid"
    mlp_in = "mlp_in"
    mlp_pre = "mlp_pre"
    mlp_post = "mlp_post"
    mlp_out = "mlp_out"
    resid_post = "resid_post"

    @property
    def per_head(self) -> bool:
        """Whether the component is split by head."""
        return self in _PER_HEAD

    @property
    def per_neuron(self) -> bool:
        """Whether the component is split by neuron."""
        return self in (Component.mlp_pre, Component.mlp_post)

    @property
    def of_keys(self) -> bool:
        """Whether its heads are the key-value heads."""
        return self in (Component.k, Component.v, Component.k_rot)

    @property
    def embedding(self) -> bool:
        """Whether it is found before the first layer only."""
        return self in (Component.embed, Component.pos_embed)

    @property
    def point(self) -> str:
        """The point of a layer whose tensor holds it.

        ``qkv`` for ``q k v``, ``rotated`` for ``q_rot k_rot pattern``, ``z`` for ``head_out``.
        """
        return _FOUND_AT.get(self, str(self))

    @property
    def order(self) -> int:
        """Place in the forward order within a layer."""
        return _ORDER[self]


_ORDER = {component: place for place, component in enumerate(Component)}
_PER_HEAD = frozenset(map(Component, ("q", "k", "v", "q_rot", "k_rot", "pattern", "z", "head_out")))

_FOUND_AT = dict.fromkeys("qkv", "qkv") | dict.fromkeys(("q_rot", "k_rot", "pattern"), "rotated") | {"head_out": "z"}


def as_component(name: str) -> Component:
    """`name` as a `Component`, or an error that lists them."""
    try:
        return Component(name)
    except ValueError:
        raise UnknownNameError(f"unknown component {name!r}: possible are {choices(Component)}") from None
