"""Holds an intervention on a module throughout training, with plain hooks through which gradients flow.

For controls: does the circuit form where a head is missing, or cannot attend to what it would attend to? Possible are
interventions that need no other run: `ZeroAblate`, `Add`, `Scale`, `ProjectOut` and `Knockout`, on ``resid_pre q k v z
attn_out mlp_out resid_post`` and the embeddings. Sequences may have any length: positions that one does not have are
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import DeclarationError, choices
from ...interventions.base.shape import Shape
from ...interventions.declare.changes import How
from ...interventions.declare.components import Component
from ...interventions.declare.edits import Edit, Intervention
from ...interventions.declare.steering import Knockout
from ...interventions.models.family import Family, family_of
from ...interventions.plan.validate import check_edit
from ...interventions.traced.rows import projected_out

PLACES = ("embed", "pos_embed", "resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out", "resid_post")
"""Components that a hook can change."""


@dataclass(frozen=True)
class Held:
    """A hook that changes what passes a module, as an edit says.

    Attributes
    ----------
    edit : Edit
    columns : tuple of int, optional
        Numbers of the last axis that belong to the site; None for all.
    shape : Shape
    """

    edit: Edit
    columns: tuple[int, ...] | None
    shape: Shape

    def changed(self, value: Tensor) -> Tensor:
        """What passes, ``(example, position, ...)``, with the edit."""
        rows, columns = torch.zeros(value.shape[1], dtype=torch.bool), torch.zeros(value.shape[-1], dtype=torch.bool)
        rows[_within(self.edit.site.positions, value.shape[1])] = True
        columns[slice(None) if self.columns is None else list(self.columns)] = True
        how, what = self.edit.change()
        made = torch.zeros_like(value)
        if isinstance(what, tuple):
            vector = torch.zeros(value.shape[-1], dtype=value.dtype)
            vector[columns] = torch.tensor(what, dtype=value.dtype)
            vector = vector.to(value.device)
            made = vector.expand_as(value)
            if how is How.ADD:
                made = value + vector
            elif how is How.PROJECT:
                made = projected_out(value, vector)
        elif isinstance(what, float):
            made = value * what
        return torch.where((rows[:, None] & columns).to(value.device), made, value)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change what goes in."""
        if args:
            return (self.changed(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.changed(kwargs["hidden_states"])}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Change what comes out."""
        return (self.changed(output[0]), *output[1:]) if isinstance(output, tuple) else self.changed(output)


@dataclass(frozen=True)
class Masked:
    """A hook that keeps queries of a layer from attending to keys, in the mask that the attention module is given.

    Attributes
    ----------
    edits : tuple of Knockout
        All of one layer.
    shape : Shape
    """

    edits: tuple[Knockout, ...]
    shape: Shape

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the forbidden pairs to the mask."""
        hidden = args[0] if args else kwargs["hidden_states"]
        seen, forbidden = (one.to(hidden.device) for one in _pairs(self.edits, self.shape, hidden.shape[1]))
        lowest, given = torch.finfo(hidden.dtype).min, kwargs.get("attention_mask")
        given = seen[None, None] if given is None else given
        if given.dtype is torch.bool:
            given = torch.zeros_like(given, dtype=hidden.dtype).masked_fill(~given, lowest)
        mask = given.expand(-1, self.shape.heads, -1, -1).masked_fill(forbidden, lowest)
        return args, kwargs | {"attention_mask": mask}


@lru_cache(maxsize=64)
def _pairs(edits: tuple[Knockout, ...], shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Keys that a query of the layer sees, ``(query, key)``, and those that are forbidden, ``(head, query, key)``."""
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = (back >= 0) & (back < (shape.window(edits[0].site.layer) or length))
    forbidden = torch.zeros(shape.heads, length, length, dtype=torch.bool)
    for edit in edits:
        out, queries = torch.zeros(2, length, dtype=torch.bool)
        out[_within(edit.key, length)] = True
        queries[_within(edit.site.positions, length)] = True
        queries &= (seen & ~out).any(-1)  # a query without any key attends as it did
        forbidden[slice(None) if edit.site.head is None else edit.site.head] |= queries[:, None] & out
    return seen, forbidden


def hold(model: PreTrainedModel, intervention: Intervention) -> list[Any]:
    """Hold an intervention on a model, until its hooks are removed.

    Parameters
    ----------
    model : PreTrainedModel
    intervention : Intervention

    Returns
    -------
    list of hook handles
        ``handle.remove()`` takes a hook away.

    Raises
    ------
    DeclarationError
        The intervention needs another run, a component that no hook can change, or a layer or head that the model does
        not have.
    """
    name = type(model).__name__
    if not isinstance(intervention, Intervention):
        raise DeclarationError(f"during={intervention!r}: give an intervention, such as Knockout(Head(1, 2), key=0)")
    family = family_of(model.config, name)
    shape = family.shape(model.config)
    for edit in intervention.edits():
        _check(edit, name, shape, model)
    masked: dict[int, list[Knockout]] = {}  # those of a layer become one mask
    for edit in intervention.edits():
        if isinstance(edit, Knockout):
            masked.setdefault(edit.site.layer, []).append(edit)
    blocks = attrgetter(family.blocks)(model)
    hooks = [
        attrgetter(family.modules["attention"])(blocks[layer]).register_forward_pre_hook(
            Masked(tuple(edits), shape).before, with_kwargs=True
        )
        for layer, edits in masked.items()
    ]
    others = [edit for edit in intervention.edits() if not isinstance(edit, Knockout)]
    return hooks + [_hooked(model, family, shape, edit) for edit in others]


@contextmanager
def released(model: nn.Module) -> Iterator[None]:
    """Meanwhile a model is without what is held on it: hooks of `hold` are taken off, and put back in their order."""
    every = [hooks for one in model.modules() for hooks in (one._forward_hooks, one._forward_pre_hooks)]
    taken = [(hooks, dict(hooks)) for hooks in every if any(map(_is_held, hooks.values()))]
    try:
        for hooks, before in taken:
            for key, hook in before.items():
                if _is_held(hook):
                    del hooks[key]
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)


def _is_held(hook: Callable[..., Any]) -> bool:
    return isinstance(getattr(hook, "__self__", None), Held | Masked)


def _check(edit: Edit, name: str, shape: Shape, model: PreTrainedModel) -> None:
    if not isinstance(edit.change().value, tuple | float | None):
        raise DeclarationError(
            f"{edit!r} needs another run: held during training can be ZeroAblate, Add, Scale, ProjectOut and Knockout"
        )
    keys = edit.key if isinstance(edit, Knockout) else ()
    if labels := [at for at in (*(edit.site.positions or ()), *(keys or ())) if isinstance(at, str)]:
        raise DeclarationError(f"{edit!r}: {choices(labels)} are labels of prompts: during training, count positions")
    check_edit(edit, name, shape, [], [])
    if isinstance(edit, Knockout):
        if model.config._attn_implementation not in ("eager", "sdpa"):
            raise DeclarationError(
                f"{edit!r}: attention is kept from keys where attn_implementation is 'eager' or 'sdpa', here it is "
                f"{model.config._attn_implementation!r}"
            )
        return
    if edit.site.component not in PLACES:
        raise DeclarationError(f"{edit!r}: held during training can be what is done to {choices(PLACES)}")


def _hooked(model: PreTrainedModel, family: Family, shape: Shape, edit: Edit) -> Any:
    """Put the hook of an edit in place."""
    site, paths, component = edit.site, family.modules, str(edit.site.component)
    if site.component.embedding:
        return attrgetter(family.embeddings[component])(model).register_forward_hook(Held(edit, None, shape).after)
    block = attrgetter(family.blocks)(model)[site.layer]
    if component in ("resid_pre", "z"):
        module = block if component == "resid_pre" else attrgetter(paths["out"])(block)
        columns = None if component == "resid_pre" else _columns(site.head, shape.heads, shape.d_head)
        return module.register_forward_pre_hook(Held(edit, columns, shape).before, with_kwargs=True)
    if component in ("q", "k", "v"):
        module = attrgetter(paths[component if family.layout == "apart" else "qkv"])(block)
        return module.register_forward_hook(Held(edit, _side(site.component, site.head, family, shape), shape).after)
    outputs = {
        "resid_post": lambda: block,
        "attn_out": lambda: attrgetter(paths.get("attn_norm", paths["attention"]))(block),
    }
    module = outputs.get(component, lambda: attrgetter(paths.get("mlp_norm", paths["mlp"]))(block))()
    return module.register_forward_hook(Held(edit, None, shape).after)


def _columns(head: int | None, heads: int, d_head: int, first: int = 0) -> tuple[int, ...]:
    """Columns of a head, or of all, where heads lie side by side."""
    some = range(heads) if head is None else (head,)
    return tuple(first + one * d_head + at for one in some for at in range(d_head))


def _side(component: Component, head: int | None, family: Family, shape: Shape) -> tuple[int, ...]:
    """Columns of q, k or v of a head, or of all, in what its module writes."""
    heads = shape.kv_heads if component.of_keys else shape.heads
    if family.layout == "apart":
        return _columns(head, heads, shape.d_head)
    number = ("q", "k", "v").index(str(component))
    if family.layout == "by head":
        some = range(heads) if head is None else (head,)
        return tuple((3 * one + number) * shape.d_head + at for one in some for at in range(shape.d_head))
    return _columns(head, heads, shape.d_head, (0, shape.width, shape.width + shape.kv_width)[number])


def _within(positions: tuple[int | str, ...] | None, length: int) -> Any:
    """Those positions that a sequence has, counted from 0, or all."""
    if positions is None:
        return slice(None)
    return [at % length for at in positions if isinstance(at, int) and -length <= at < length]
