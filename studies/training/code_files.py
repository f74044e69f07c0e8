"""Writes the files of the shipped model ``code-4l``: weights, tokenizer, held-out text, curves, and the card.

Every number of the card is one that is written beside it, in ``training.json`` or a curve file.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from ...interventions.models.checkpoints import CHECKPOINTS
from .code_text import LICENCE, Recipe, sums

Point = dict[str, Any]


class Made(NamedTuple):
    """What a training has made."""

    recipe: Recipe
    model: GPT2LMHeadModel  # with the weights of the last step, as they are rounded
    kept: dict[int, dict[str, Tensor]]  # float16 weights by step; the last is the model's
    tokenizer: PreTrainedTokenizerFast
    read: dict[str, str]  # text by name of file
    held_out: dict[str, str]
    licence: str  # of these files
    curve: list[Point]
    alone: list[Point]  # the curve of the training on text alone
    numbers: dict[str, Any]


def write_json(file: Path, value: Any) -> None:
    """JSON, a list with a line for each entry, written beside and renamed."""
    text = (
        "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list) else json.dumps(value, indent=1)
    )
    beside = file.with_name(f".{file.name}")
    beside.write_text(f"{text}\n", encoding="utf-8")
    beside.replace(file)


def write_files(out: Path, made: Made) -> dict[str, Any]:
    """Puts the files into a folder, each written beside and renamed.

    Returns
    -------
    dict
        What ``training.json`` says.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "recipe": asdict(made.recipe),
        "made_with": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "lightning")},
        "machine": {"threads": made.recipe.threads, "processor": platform.machine()},
        **made.numbers,
    }
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as name:
        folder = Path(name)
        made.model.config.update(dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0))
        made.model.generation_config.update(bos_token_id=0, eos_token_id=0, pad_token_id=0)
        made.model.eval().half().save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        flat = {f"step{step:06d}/{key}": value for step, part in made.kept.items() for key, value in part.items()}
        save_file(flat, folder / CHECKPOINTS, {"steps": json.dumps(sorted(made.kept))})
        (folder / "held_out").mkdir()
        for file, text in made.held_out.items():
            (folder / "held_out" / f"{file.replace('/', '.')}.txt").write_text(text, encoding="utf-8")
        (folder / LICENCE).write_text(made.licence, encoding="utf-8")
        (folder / "read.sha256").write_text(sums(made.read), encoding="utf-8")
        (folder / "held_out.sha256").write_text(sums(made.held_out), encoding="utf-8")
        write_json(folder / "curve.json", made.curve)
        write_json(folder / "curve-text-alone.json", made.alone)
        write_json(folder / "training.json", facts)
        (folder / "README.md").write_text(card(facts, made), encoding="utf-8")
        shutil.rmtree(out / "held_out", ignore_errors=True)
        for file in sorted(folder.iterdir()):
            file.chmod(0o755 if file.is_dir() else 0o644)
            file.replace(out / file.name)
    return facts


def card(facts: dict[str, Any], made: Made) -> str:
    """The model card."""
    return "TODO"
