"""Owns the second opinion on interventions: plain torch hooks on a Hugging Face GPT-2, no tracing library.

Imports torch and transformers only. Where each component is taken from, per block:

=============  ======================================================================================
``resid_pre``  the block's input
``attn_in``    the input of ``attn.c_attn``
``q k v``      thirds of the output of ``attn.c_attn``, cut into heads
``pattern``    the attention weights that ``attn`` returns under eager attention (read only)
``z``          the input of ``attn.c_proj``, cut into heads
``head_out``   ``z`` of a head times its rows of ``c_proj``'s weight, without the bias (read only)
``attn_out``   the output of ``attn``, bias included
``resid_mid``  the tensor that enters ``ln_2``; the block keeps the same tensor for its skip connection
``mlp_in``     the input of ``mlp.c_fc``
``mlp_pre``    the output of ``mlp.c_fc``
``mlp_post``   the input of ``mlp.c_proj``
``mlp_out``    the output of ``mlp``
``resid_post`` the block's output
=============  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

STREAM = ("resid_pre", "attn_in", "resid_mid", "mlp_in", "resid_post", "attn_out", "mlp_out")
PER_HEAD = ("q", "k", "v", "z")
PER_NEURON = ("mlp_pre", "mlp_post")
EDITABLE = STREAM + PER_HEAD + PER_NEURON
READABLE = (*EDITABLE, "head_out", "pattern")


@dataclass(frozen=True, eq=False)
class Edit:
    """Set one component to a value.

    Parameters
    ----------
    component, layer
        One of `EDITABLE`, and the block's index.
    head
        One head of q, k, v or z, or one neuron; None for all of them, or for a component that has neither.
    positions
        Positions to set; None for all.
    value
        Broadcastable to the slice: (example, position, d_model), with a head (example, position, d_head), or for all
        heads (example, position, head, d_head), where position runs over ``positions``; of a neuron (example,
        position).
    """

    component: str
    layer: int
    head: int | None
    positions: tuple[int, ...] | None
    value: Tensor

    def __post_init__(self) -> None:
        if self.component not in EDITABLE:
            raise ValueError(f"cannot edit {self.component!r}; one of {EDITABLE}")
        if self.head is not None and self.component in STREAM:
            raise ValueError(f"{self.component!r} has no heads and no neurons")


def _select(whole: Tensor, head: int | None, positions: tuple[int, ...] | None) -> Tensor:
    """Positions (kept as an axis) and head (dropped) of (example, position, ...) or (example, position, head, ...)."""
    if positions is not None:
        whole = whole[:, list(positions)]
    return whole if head is None else whole[:, :, head]


def _assign(whole: Tensor, edit: Edit) -> None:
    """Write an edit into (example, position, d_model) or (example, position, head, d_head), in place."""
    rows = range(whole.shape[1]) if edit.positions is None else edit.positions
    value = edit.value.to(whole).expand(_select(whole, edit.head, edit.positions).shape)
    for n, position in enumerate(rows):
        if edit.head is None:
            whole[:, position] = value[:, n]
        else:
            whole[:, position, edit.head] = value[:, n]


def _split(model: GPT2LMHeadModel, flat: Tensor) -> Tensor:
    """(example, position, d_model) into a view (example, position, head, d_head)."""
    return flat.view(*flat.shape[:2], model.config.n_head, -1)


Visit = Callable[[Tensor], None]


def _watch(model: GPT2LMHeadModel, component: str, layer: int, visit: Visit) -> Any:
    """Hook one component: ``visit`` gets a tensor of its own and may change it in place. Returns the hook's handle."""
    block = model.transformer.h[layer]

    def on_input(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        changed = args[0].clone()
        visit(_split(model, changed) if component == "z" else changed)
        return (changed, *args[1:])

    def on_mid(_module: Any, args: tuple[Any, ...]) -> None:
        # No clone: the block adds this very tensor to the MLP's output, so it must be changed where it lies.
        visit(args[0])

    def on_output(_module: Any, _args: tuple[Any, ...], output: Any) -> Any:
        changed = (output[0] if isinstance(output, tuple) else output).clone()
        visit(changed)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def on_qkv(_module: Any, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        parts = [part.clone() for part in output.chunk(3, dim=-1)]
        visit(_split(model, parts["qkv".index(component)]))
        return torch.cat(parts, dim=-1)

    def on_pattern(_module: Any, _args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        visit(output[1])

    hooks: dict[str, Callable[[], Any]] = {
        "resid_pre": lambda: block.register_forward_pre_hook(on_input),
        "attn_in": lambda: block.attn.c_attn.register_forward_pre_hook(on_input),
        "q": lambda: block.attn.c_attn.register_forward_hook(on_qkv),
        "k": lambda: block.attn.c_attn.register_forward_hook(on_qkv),
        "v": lambda: block.attn.c_attn.register_forward_hook(on_qkv),
        "pattern": lambda: block.attn.register_forward_hook(on_pattern),
        "z": lambda: block.attn.c_proj.register_forward_pre_hook(on_input),
        "attn_out": lambda: block.attn.register_forward_hook(on_output),
        "resid_mid": lambda: block.ln_2.register_forward_pre_hook(on_mid),
        "mlp_in": lambda: block.mlp.c_fc.register_forward_pre_hook(on_input),
        "mlp_pre": lambda: block.mlp.c_fc.register_forward_hook(on_output),
        "mlp_post": lambda: block.mlp.c_proj.register_forward_pre_hook(on_input),
        "mlp_out": lambda: block.mlp.register_forward_hook(on_output),
        "resid_post": lambda: block.register_forward_hook(on_output),
    }
    return hooks[component]()


@contextmanager
def _hooked(model: GPT2LMHeadModel, steps: Sequence[tuple[str, int, Visit]]) -> Iterator[None]:
    handles = [_watch(model, *step) for step in steps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _steps(edits: Sequence[Edit]) -> list[tuple[str, int, Visit]]:
    def write(edit: Edit) -> Visit:
        return lambda tensor: _assign(tensor, edit)

    return [(edit.component, edit.layer, write(edit)) for edit in edits]


@torch.no_grad()
def run(model: GPT2LMHeadModel, tokens: Tensor, edits: Sequence[Edit] = ()) -> Tensor:
    """Logits (example, position, vocab) with all edits in one forward pass; edits of one place apply in list order."""
    with _hooked(model, _steps(edits)):
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits


@torch.no_grad()
def activation(
    model: GPT2LMHeadModel, tokens: Tensor, component: str, layer: int, edits: Sequence[Edit] = ()
) -> Tensor:
    """One component of one layer, read in a run that has the given edits (none by default).

    Returns
    -------
    Tensor
        (example, position, d_model) for `STREAM`; (example, position, head, d_head) for `PER_HEAD`; (example, position,
        neuron) for `PER_NEURON`; (example, position, head, d_model) for ``head_out``; (example, head, query, key) for
        ``pattern``.
    """
    if component not in READABLE:
        raise ValueError(f"cannot read {component!r}; one of {READABLE}")
    if component == "head_out":
        z = activation(model, tokens, "z", layer, edits)
        w_o = model.transformer.h[layer].attn.c_proj.weight
        return torch.einsum("ephd,hdm->ephm", z, w_o.reshape(*z.shape[2:], -1))
    seen: list[Tensor] = []
    usual = model.config._attn_implementation
    steps = [*_steps(edits), (component, layer, lambda tensor: seen.append(tensor.clone()))]
    if component == "pattern":
        model.set_attn_implementation("eager")
    try:
        with _hooked(model, steps):
            model(tokens, use_cache=False)
    finally:
        model.set_attn_implementation(usual)
    (only,) = seen
    return only


def zero_edit(component: str, layer: int, head: int | None = None, positions: tuple[int, ...] | None = None) -> Edit:
    """Zeros."""
    return Edit(component, layer, head, positions, torch.zeros(()))


def patch_edit(
    other: Tensor, component: str, layer: int, head: int | None = None, positions: tuple[int, ...] | None = None
) -> Edit:
    """The same place of another run; ``other`` is that run's whole activation, as `activation` gives it."""
    return Edit(component, layer, head, positions, _select(other, head, positions))


def mean_edit(
    reference: Tensor,
    component: str,
    layer: int,
    head: int | None = None,
    positions: tuple[int, ...] | None = None,
    over: tuple[str, ...] = ("example",),
) -> Edit:
    """Mean of the reference over examples, or over examples and all its positions; never over the hidden dimension.

    ``positions`` says where the mean is put; with ``over=("example", "position")`` the mean is still taken over every
    position of the reference.
    """
    if over not in (("example",), ("example", "position")):
        raise ValueError(f"over is ('example',) or ('example', 'position'), not {over!r}")
    mean = reference.mean(dim=0 if over == ("example",) else (0, 1), keepdim=True)
    mean = mean.expand(1, *reference.shape[1:])
    return patch_edit(mean, component, layer, head, positions)


def resample_edit(
    reference: Tensor,
    permutation: Sequence[int],
    component: str,
    layer: int,
    head: int | None = None,
    positions: tuple[int, ...] | None = None,
) -> Edit:
    """Row ``n`` gets the same place of the reference's example ``permutation[n]``."""
    return patch_edit(reference[list(permutation)], component, layer, head, positions)


@torch.no_grad()
def random_gpt2(
    layers: int,
    heads: int,
    d_head: int,
    vocab: int,
    context: int,
    n_inner: int | None = None,
    seed: int = 0,
    scale: float = 0.3,
) -> GPT2LMHeadModel:
    """Random GPT-2 in eval mode, float32, far from linear: weights and biases N(0, scale), gains N(1, scale).

    Embeddings are N(0, 1) and tied to the unembedding, as in GPT-2. The library's own initialisation (0.02, no biases,
    gains of 1) gives nearly uniform attention and a nearly linear MLP, which hides mistakes. Global random state is
    left alone.
    """
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=context,
        n_embd=heads * d_head,
        n_layer=layers,
        n_head=heads,
        n_inner=n_inner,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ".ln_" in name and name.endswith("weight"):
            parameter.copy_(1.0 + scale * noise)
        elif name.endswith(("wte.weight", "wpe.weight")):
            parameter.copy_(noise)
        else:
            parameter.copy_(scale * noise)
    return model.eval()
