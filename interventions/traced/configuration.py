"""The configuration of a model as text, and what of it numbers may depend on. A leaf; goes to servers too."""

from __future__ import annotations

import json
from typing import Any

NOT_NUMBERS = (
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "attn_implementation",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Entries of a configuration that no number depends on, or that an identity states by themselves."""


def configuration_of(config: Any) -> str:
    """A configuration as JSON text, without the place it was read from."""
    found = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "_commit_hash")}
    return json.dumps(
        found, sort_keys=True, default=lambda one: sorted(map(str, one)) if isinstance(one, set) else str(one)
    )


def without_names(configuration: str) -> dict[str, Any]:
    """The entries of a configuration that numbers may depend on."""
    return {key: value for key, value in json.loads(configuration).items() if key not in NOT_NUMBERS}
