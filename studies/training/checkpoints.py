"""Checkpoints of a model in training, all in one compact file. Owns reading them; needs no Lightning."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, GPT2LMHeadModel

from ...errors import ModelError, UnknownNameError
from ...interventions.models.opening import options_of
from ...interventions.models.turns import making

CHECKPOINTS = "checkpoints.safetensors"


def checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps whose weights the checkpoint file in `folder` holds, in ascending order."""
    folder = Path(folder)
    if not (folder / CHECKPOINTS).is_file():
        raise ModelError(f"there is no {CHECKPOINTS} in {folder.name}: `make model` writes one")
    with safe_open(folder / CHECKPOINTS, "pt") as file:
        return [int(s) for s in json.loads(file.metadata()["steps"])]


def load_checkpoint(folder: str | Path, step: int) -> GPT2LMHeadModel:
    """The model as it was after `step` optimiser steps (float32, evaluation mode, eager attention)."""
    folder = Path(folder)
    if step not in (steps := checkpoint_steps(folder)):
        raise UnknownNameError(f"there is no checkpoint of step {step}: there are {steps}")
    prefix = f"step{step:06d}/"
    with safe_open(folder / CHECKPOINTS, "pt") as file:
        weights = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
    options = options_of(folder.name, str(folder), None, False, tokenizer=False, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager", **options)
    with making():
        model = GPT2LMHeadModel(config)
    model.load_state_dict(weights, strict=False)  # lm_head.weight is tied to the word embedding
    return model.eval()
