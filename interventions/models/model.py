"""The handle of a model that runs here: counts, tokenizer, weights of heads. `load` makes it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from nnsight.modeling.transformers import TransformersModel
from transformers import PreTrainedModel

from ...errors import DeclarationError, ModelError
from ...lazy import front_door
from ..base.shape import Shape
from ..declare.components import Component
from ..declare.sites import Head, Site
from ..traced.structure import weight_hash
from . import architectures  # noqa: F401  registers the families
from .checkpoints import revision_and_step
from .family import Family, HeadWeights
from .turns import turn_of


@dataclass
class Memory:
    """What a handle remembers of its model between calls, see `begin`.

    Attributes
    ----------
    identity : Identity or None
        Of the last call.
    device : str
        Kind of device of a server.
    call : Call or None
        The call that is going on.
    ledger : Ledger or None
        Where jobs for a server are written down meanwhile.
    quiet : bool
        Whether nothing is shown meanwhile of how such jobs are doing.
    checked : Identity or None
        The model that passed the self-check.
    inner : Identity or None
        The model that passed the self-check of what attention and MLPs read, and of neurons.
    longest : int
        Tokens of the longest prompt on which it was seen to be read right.
    vocabulary : tuple of int and str
        Size of the tokenizer, and the hash of its vocabulary at that size.
    words : dict of int to dict of int to str
        For a size of the tokenizer, the text of tokens that were asked for.
    """

    identity: Any = None
    device: str = ""
    call: Any = None
    ledger: Any = None
    quiet: bool = False
    checked: Any = None
    inner: Any = None
    longest: int = 0
    vocabulary: tuple[int, str] = (-1, "")
    words: dict[int, dict[int, str]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A causal language model that headwise can intervene on. Made by `load`.

    Several threads may use it: calls on one module take turns, through whatever handles. A thread that calls or
    trains the module without headwise is not stopped, and may change the numbers of a call that runs at that moment.

    Attributes
    ----------
    name : str
    revision : str
        Hub revision; ``local`` for a folder, ``memory`` for a module, ``shipped`` for a model of the package.
    family : Family
    shape : Shape
        Counts, and what a layer is like.
    tokenizer : PreTrainedTokenizerFast
    traced : nnsight model
    source : str, optional
        What `load` opens it from again: a shipped name, a Hub id or the path of a folder; None for a module in memory.
    trusted : bool
        Whether `load` was allowed to run code that the model brings.
    step : int, optional
        Of its training, where `load` was asked for one or the revision names one.
    backend_type : callable
        Makes the `Backend` of the handle.

    Examples
    --------
    >>> model = hw.load("words-2l")
    >>> model.layers, model.heads, model.shape.d_model
    (range(0, 2), range(0, 8), 64)
    >>> model.encode("apple banana")
    [2, 3]
    """

    name: str
    revision: str
    family: Family
    shape: Shape
    tokenizer: Any
    traced: TransformersModel
    source: str | None = None
    trusted: bool = False
    step: int | None = None
    backend_type: Callable[[Any], Any] = field(kw_only=True)
    _memory: Memory = field(default_factory=Memory, init=False)
    remote: ClassVar[bool] = False
    """Whether it runs on a server, which has the weights."""

    def __call__(self, prompts: Any, what: Any = None, **options: Any) -> Any:
        """The most likely next tokens: `headwise.predict` of this model, with all that it takes.

        Examples
        --------
        >>> hw.load("words-2l")("apple banana cherry apple", top=1)["token"].item()
        'banana'
        """
        return front_door("predict")(self, prompts, what, **options)

    @property
    def backend(self) -> Any:
        """What carries out passes on the model: a `Backend`, see `headwise.interventions.run.backend`."""
        return self.backend_type(self)

    @property
    def layers(self) -> range:
        """Indices of the layers."""
        return range(self.shape.layers)

    @property
    def heads(self) -> range:
        """Indices of the heads of a layer."""
        return range(self.shape.heads)

    @property
    def kv_heads(self) -> range:
        """Indices of the key-value heads of a layer: those of ``k``, ``v`` and ``k_rot``."""
        return range(self.shape.kv_heads)

    @property
    def neurons(self) -> range:
        """Indices of the neurons of a layer."""
        return range(self.shape.d_mlp)

    def read_by(self, head: Head, component: str) -> Site:
        """The site of `component` that a head reads: of its key-value head for ``k v k_rot``, else its own.

        Where several heads share a key-value head, a change of it changes all of them.
        """
        own = head.site(component)
        return replace(own, head=self.shape.key_head(head.head)) if own.component.of_keys else own

    @property
    def module(self) -> PreTrainedModel:
        """The Hugging Face module."""
        return self.traced._module

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(next(self.module.parameters()).device)

    @property
    def place(self) -> str:
        """Where it runs, for results."""
        return str(self.device)

    @property
    def has_gradients(self) -> bool:
        """Whether estimates from gradients can be had of it."""
        return True

    @property
    def executed(self) -> str:
        """``local``, or the server that runs it."""
        return "local"

    @property
    def dtype(self) -> str:
        """Number format of the weights, such as ``float32``."""
        return str(next(self.module.parameters()).dtype).removeprefix("torch.")

    @property
    def weight_hash(self) -> str:
        """SHA-256 over names, shapes and bytes of all weights, read anew (first 16 hexadecimal digits)."""
        return weight_hash(self.module)

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 over the vocabulary (first 16 hexadecimal digits)."""
        size, known = self._memory.vocabulary
        if size != len(self.tokenizer):
            pairs = sorted(self.tokenizer.get_vocab().items(), key=lambda pair: pair[1])
            size, known = len(self.tokenizer), hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
            self._memory.vocabulary = size, known
        return known

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def token_text(self, ids: Sequence[int]) -> list[str]:
        """Each token as text, for labels."""
        known = self._memory.words.setdefault(len(self.tokenizer), {})
        for token in set(ids) - known.keys():
            known[token] = self.tokenizer.decode([int(token)])
        return [known[token] for token in ids]

    @property
    def sites(self) -> tuple[Component, ...]:
        """The components of a layer that can be read and written, in forward order, and the embeddings.

        Where blocks are laid open all that the model has; where they are called (``print(model)`` says so), those
        that are found where modules take and give. What is asked of others is refused with a reason.

        Examples
        --------
        >>> [str(component) for component in hw.load("words-2l").sites][:6]
        ['embed', 'pos_embed', 'resid_pre', 'attn_in', 'q', 'k']
        """
        return tuple(one for one in Component if not self.shape.missing(one) and one not in dict(self.shape.read_only))

    def check_laid_open(self, what: str) -> None:
        """Refuse what needs blocks that are laid open.

        Raises
        ------
        ModelError
            Those of this model are called.
        """
        if self.shape.called:
            raise ModelError(
                f"{what} needs blocks that are laid open, and those of {self.name} are called: {self.family.why_called}"
            )

    def check_sums(self, what: str) -> None:
        """Refuse what takes the logits for a sum over heads and neurons, where they are none (`why_no_sums`).

        Raises
        ------
        ModelError
            Blocks are called, or a norm, a cap or a factor stands between.
        """
        self.check_laid_open(what)
        if why := self.why_no_sums:
            raise ModelError(f"{what} of {self.name}: {why}; ablate or patch head_out, attn_out and mlp_out instead")

    @property
    def why_no_sums(self) -> str:
        """Why logits are no sum over heads and neurons, the last norm taken as it is; empty where they are."""
        if self.shape.normed_after:
            return "what heads and neurons write goes through a norm before it is added to the stream"
        if self.shape.tail is not None:
            return "the model caps or scales the logits that the unembedding gives"
        return ""

    def head_weights(self, layer: int) -> HeadWeights:
        """Weights of the heads of a layer, for row vectors: ``q = normed @ W_Q[head]``.

        In every family they have these shapes, however the model keeps them (GPT-2 has q, k and v in one matrix,
        GPT-NeoX head by head, Llama in three); where the layer is no plain linear one, they are found by calling it.
        Where heads share keys and values (``model.kv_heads``), `Shape.key_head` says which a head reads. The numbers
        are those of the model, in its own number format and on its device: no norm is folded in, and biases and
        rotation are not in them. `metrics.factors` folds norms in.

        Parameters
        ----------
        layer : int

        Returns
        -------
        HeadWeights
            ``W_Q (head, d_model, d_head)``, ``W_K`` and ``W_V (key-value head, d_model, d_head)``, ``W_O (head, d_head,
            d_model)``; ``gain (d_model,)`` of the norm before them, with the 1 that Gemma adds; ``q_gain`` and ``k_gain
            (d_head,)``, None but in families that norm q and k; ``out_gain (d_model,)``, None but where a norm stands
            between attention and the stream.

        Raises
        ------
        ModelError
            The model runs on a server, which has the weights. `composition_scores`, `circuit_scores`,
            `head_circuits` and `neuron_tokens` compute there, and only their numbers come back.

        Examples
        --------
        >>> weights = hw.load("words-2l").head_weights(1)
        >>> weights.W_Q.shape, weights.W_O.shape
        (torch.Size([8, 64, 8]), torch.Size([8, 8, 64]))
        """
        if layer not in self.layers:
            raise DeclarationError(f"layer {layer!r}: {self.name} has layers 0 to {self.shape.layers - 1}")
        self.check_laid_open("head_weights")
        with turn_of(self.module):
            return self.family.head_weights(self.module, layer, self.shape)

    def scaling(self, layer: int) -> float:
        """Factor of the attention scores in `layer`."""
        return self.family.scaling(self.module.config, layer)

    def __repr__(self) -> str:
        own = self.shape.kv_heads == self.shape.heads
        shared = "" if own else f" that share {self.shape.kv_heads} of keys and values"
        what = revision_and_step(self.revision, self.step)
        return (
            f"<Model {self.name} ({what}): {self.family.name}, {self.shape.layers} layers of "
            f"{self.shape.heads} heads{shared}, {self.dtype} on {self.device}, runs here{self._way}>"
        )

    @property
    def _way(self) -> str:
        """Why blocks are called, where they are."""
        return f"; blocks are called: {self.family.why_called}" if self.shape.called else ""
