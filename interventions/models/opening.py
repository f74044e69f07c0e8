"""What a folder or a Hub id says of its model, looked at before anything of it is built or run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session, hf_hub_url
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ...errors import ModelError, first_line
from ..base.memory import shortage
from .family import FAMILIES
from .locate import why

PATIENCE = 5.0
"""Seconds that the Hub has to answer the first question; its library may ask one of its own, for three more."""
MOST = {"num_hidden_layers": 10_000, "num_labels": 1_000_000}
"""More than any model has: each is built, or written down, one by one."""


def check_python() -> None:
    """Refuse a Python without docstrings."""
    if sys.flags.optimize > 1:
        raise ModelError(
            "transformers reads docstrings to make a model, and python -OO (PYTHONOPTIMIZE=2) takes them away: start "
            "Python without it, or with -O"
        )


def options_of(
    name: str, where: str, revision: str | None, trusted: bool, *, tokenizer: bool = True, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Look at what a model declares, and make the arguments with which transformers reads it.

    Parameters
    ----------
    name, where : str
        Name of the model, and the folder or Hub id, as `locate` gives them.
    revision : str, optional
        Of the Hub.
    trusted : bool
        Whether code may run that the model brings.
    tokenizer : bool
        Whether its tokenizer is going to be read.
    dtype : torch.dtype, optional
        Number format of the weights; None where they are not read on this machine.

    Returns
    -------
    dict
        Keyword arguments for ``from_pretrained``.

    Raises
    ------
    ModelError
        It brings code that may not run, or declares more than its weights, or the memory, can hold.
    """
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    silent = None if Path(where).is_dir() else _silence(where)
    if silent is not None:
        options["local_files_only"] = True
    try:
        config: Any = PreTrainedConfig.get_config_dict(where, **options)[0]
        brings = ["auto_map in config.json"] if config.get("auto_map") else []
        if any("/" in str(config.get(key)) for key in ("attn_implementation", "_attn_implementation")):
            brings.append("attention from a repository of kernels in config.json")
        if tokenizer and get_tokenizer_config(where, **options).get("auto_map"):
            brings.append("auto_map in tokenizer_config.json")
    except Exception as error:  # whatever a broken file or a strange answer makes the loaders raise
        never = OSError(f"it cannot be reached ({silent}), and this model was not fetched before")
        raise ModelError(why(name, where, error if silent is None else never)) from error
    if brings and not trusted:
        raise ModelError(
            f"{name} brings code of its own ({' and '.join(brings)}), which headwise does not run: "
            "trust_remote_code=True (--trust-remote-code) runs it, as you, with all that you may do"
        )
    try:
        wrong = _too_large(where, config, dtype)
    except (OverflowError, TypeError) as error:
        raise ModelError(why(name, where, ValueError(f"its configuration has no usable sizes: {error}"))) from error
    if wrong:
        raise ModelError(why(name, where, ValueError(wrong)))
    return {**options, "trust_remote_code": trusted}


def _silence(where: str) -> str | None:
    """Why the Hub does not answer; None where it does, or is not to be asked.

    Asked once, as the loaders try each of many files again and again. An answer that says no is theirs to read.
    """
    if constants.is_offline_mode():
        return None
    try:
        answer = get_session().head(hf_hub_url(where, "config.json"), timeout=PATIENCE)
    except Exception as error:  # of whatever library asks
        return first_line(error, kind=True)
    return f"it answers {answer.status_code}" if answer.status_code >= 500 else None


def _too_large(where: str, config: dict[str, Any], dtype: torch.dtype | None) -> str:
    """What of a configuration is more than there can be, if anything.

    A parameter takes a bit at least, in whatever format; so weights in a folder say how many there can be.
    """
    kind = str(config.get("model_type"))
    known = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}

    def size(key: str, otherwise: float = 0.0) -> float:
        """The largest number that the configuration gives under a key, or under what its class calls that."""
        found = [config.get(one) for one in (key, known.get(key, key))]
        return max([float(one) for one in found if isinstance(one, int | float) and not math.isnan(one)] or [otherwise])

    layers = max([size("num_hidden_layers"), _repeated(config.get("attention_types"))])
    for key, value in (("num_hidden_layers", layers), ("num_labels", size("num_labels"))):
        if value > MOST[key]:
            return f"its configuration declares {key} as {value:,.0f}, and no model has more than {MOST[key]:,}"
    if dtype is None:
        return ""
    width, heads = size("hidden_size", 1), size("num_attention_heads", 1)
    learned = any(kind in one.model_types and "pos_embed" in one.embeddings for one in FAMILIES.values())
    inner = max(size("intermediate_size"), size("n_inner"))
    rows = size("vocab_size") + (size("max_position_embeddings") if learned else 0)
    least = width * (rows + layers * (max(heads * size("head_dim"), width) + inner))
    there = _bytes_of_weights(Path(where))
    if there is not None and least > 8 * there:
        return (
            f"its configuration declares {least:.2g} parameters or more, and the weights beside it are "
            f"{there:,} bytes: they do not belong together"
        )
    short = shortage(least * torch.empty(0, dtype=dtype).element_size())
    return short and f"what its weights hold at least, as {str(dtype).removeprefix('torch.')}, {short}"


def _repeated(types: Any) -> float:
    """Layers that the pattern of GPT-Neo stands for: ``[[kinds, times], ...]``."""
    pairs = types if isinstance(types, list) else []
    times = [one[1] for one in pairs if isinstance(one, list) and len(one) == 2 and isinstance(one[0], list) and one[0]]
    return float(max([one for one in times if isinstance(one, int | float)], default=0))


def _bytes_of_weights(folder: Path) -> int | None:
    """Of the files in a folder; None of a Hub id, or where it holds none, which the loaders say."""
    found = [path.stat().st_size for kind in ("safetensors", "bin") for path in folder.glob(f"*.{kind}")]
    return sum(found) if found else None
