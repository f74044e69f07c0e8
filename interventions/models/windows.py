"""Windows of attention: what a configuration says of them, and whether a model is like that. Imports errors.

How a configuration is read is a matter of the model's class, so each family names one of two ways, or none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from ...errors import ModelError, choices

Windows = tuple[int | None, ...]
KINDS = ("full_attention", "sliding_attention")
MAKES = "create_sliding_window_causal_mask"
"""What a file of transformers imports whose models make masks with a window."""


def windows_everywhere(config: Any) -> Windows:
    """``sliding_window`` keys in every layer, whatever ``layer_types`` says: Mistral, Starcoder2, Phi-3."""
    size = getattr(config, "sliding_window", None)
    return () if size is None else (size,) * config.num_hidden_layers


def windows_by_layer(config: Any) -> Windows:
    """``sliding_window`` keys in those layers that ``layer_types`` calls sliding: Qwen2, Qwen3.

    Raises
    ------
    ModelError
        Such a layer has a window without a size.
    """
    size, kinds = getattr(config, "sliding_window", None), list(getattr(config, "layer_types", None) or ())
    if "sliding_attention" not in kinds:
        return ()
    if size is None:
        raise ModelError(
            f"layer {kinds.index('sliding_attention')} of a {config.model_type} model has 'sliding_attention', and its "
            "configuration does not say how wide (sliding_window, and in Qwen models use_sliding_window)"
        )
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def unlike_kinds(config: Any) -> str:
    """What layers attend in a way that headwise does not compute; empty where none does."""
    kinds = list(getattr(config, "layer_types", None) or ())
    for layer, kind in enumerate(kinds):
        if kind not in KINDS:
            return f"has {kind!r} in layer {layer} (layer_types): headwise computes {choices(KINDS)}"
    return ""


def unlike(module: Any, blocks: str, attention: str, windows: Sequence[int | None], context: int) -> list[str]:
    """Compare the windows of a table with those that the modules of a model have; without a pass, so for any size.

    A layer's attention has a ``sliding_window`` of its own where layers differ. Else the configuration's holds in every
    layer, if the model's file makes masks with a window at all; a file that does not may have other ways of its own.

    Parameters
    ----------
    module : PreTrainedModel
    blocks : str
        Path of the list of blocks in the module.
    attention : str
        Path of the attention in a block.
    windows : sequence of int or None
        The table: keys that a query of a layer sees, by layer; None for all, and so for layers beyond its end.
    context : int
        Positions that the model reads at most; a window that is not smaller hides nothing.

    Returns
    -------
    list of str
        A text for each layer that differs; empty where none does.
    """
    stated = getattr(module.config, "sliding_window", None) or None  # 0: Qwen2-MoE without windows
    makes = any(hasattr(sys.modules.get(kind.__module__), MAKES) for kind in type(module).__mro__)
    found = []
    for layer, block in enumerate(attrgetter(blocks)(module)):
        mine = windows[layer] if layer < len(windows) else None
        part = attrgetter(attention)(block)
        if hasattr(part, "sliding_window"):
            theirs = part.sliding_window if getattr(part, "is_sliding", True) else None
        elif makes:
            theirs = stated
        elif mine is not None and mine == stated:
            theirs = None
        else:
            continue
        if _within(mine, context) != _within(theirs, context):
            found.append(f"layer {layer} of the table has {_words(mine)}, where the model has {_words(theirs)}")
    return found


def _within(size: int | None, context: int) -> int | None:
    """A window that hides something, else None."""
    return None if size is None or size >= context else size


def _words(size: int | None) -> str:
    return "no window" if size is None else f"a window of {size}"
