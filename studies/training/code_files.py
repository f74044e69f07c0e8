"""Writes the files of the shipped model ``code-4l``: weights, tokenizer, held-out text, curves, and the card.

Every number of the card is one that is written beside it, in ``training.json`` or a curve file.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from ...interventions.models.checkpoints import CHECKPOINTS
from .code_text import END, LEFT_OUT, LICENCE, Recipe, sums

CARD = Path(__file__).with_name("code_card.md")
"""The card, with names in braces where a number or a table goes."""
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
    parts = {"read": made.read, "held_out": made.held_out}
    facts = {
        "recipe": asdict(made.recipe),
        "made_with": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "lightning")},
        "machine": {"threads": made.recipe.threads, "processor": platform.machine()},
        "files": {"read": len(made.read), "held_out": len(made.held_out)},
        "characters": {part: sum(map(len, texts.values())) for part, texts in parts.items()},
        "sha256": {part: hashlib.sha256(sums(texts).encode()).hexdigest() for part, texts in parts.items()},
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
        for made_file in sorted(folder.iterdir()):
            made_file.chmod(0o755 if made_file.is_dir() else 0o644)
            made_file.replace(out / made_file.name)
    return facts


def card(facts: dict[str, Any], made: Made) -> str:
    """The model card."""
    final = facts["final"]
    recipe, pieces = made.recipe, (made.recipe.steps - facts["text_from"]) * made.recipe.batch_size
    values = {
        **facts["recipe"],
        "passes": pieces * (1 - recipe.random_share) * recipe.positions / facts["tokens"]["read"],
        **{f"{what}_{part}": facts[what][part] for what in ("files", "tokens", "sha256") for part in facts["files"]},
        "characters_read": facts["characters"]["read"] / 1e6,
        "characters_held_out": facts["characters"]["held_out"] / 1e3,
        "head_width": recipe.width // recipe.heads,
        "text_from": facts["text_from"],
        "seed_half": recipe.seed_positions // 2,
        "seed_batch": recipe.batch_size * recipe.seed_sequences,
        "parameters": sum(one.numel() for one in made.model.parameters()),
        "checkpoints": ", ".join(map(str, sorted(made.kept))),
        "end": END,
        "left_out": ", ".join(f"`{name}`" for name in LEFT_OUT),
        "licence": LICENCE,
        "python": facts["made_with"]["python"],
        "versions": ", ".join(f"{name} {number}" for name, number in facts["made_with"].items() if name != "python"),
        "processor": facts["machine"]["processor"],
        "hours": (made.curve[-1]["time"] - made.curve[0]["time"]) / 3600,
        "curve": _rows(made.curve),
        "alone": _rows(made.alone),
        "alone_steps": made.alone[-1]["step"],
        "losses": "".join(f"| {_ngram(order)} | {loss:.3f} |\n" for order, loss in facts["ngram_loss"].items()),
        "loss": final["validation_loss"],
        "accuracy": final["accuracy"],
        "induction": _heads(final["induction"]),
        "previous": _heads(final["previous_token"]),
    }
    return CARD.read_text(encoding="utf-8").format(**values)


def _heads(grid: list[list[float]]) -> str:
    """The four highest values of a grid ``(layer, head)`` with their heads."""
    values = np.asarray(grid)
    best = np.argsort(-values, axis=None, kind="stable")[:4]
    at = [divmod(int(one), values.shape[1]) for one in best]
    return ", ".join(f"L{layer}H{number} {values[layer, number]:.2f}" for layer, number in at)


def _ngram(order: str) -> str:
    names = {"1": "how often a token occurs", "2": "bigram"}
    return names.get(order, f"{order}-gram")


def _rows(points: list[Point]) -> str:
    """Some points of a curve: the first, then each at about 1.5 times the step of the one before, and the last."""
    lines, due = "", 0.0
    for point in points:
        if point["step"] >= due or point is points[-1]:
            best = [np.max(point[name]) for name in ("induction", "previous_token")]
            lines += f"| {point['step']:,} | {point['validation_loss']:.3f} | {point['repeat_accuracy']:.3f} |"
            lines += f" {best[0]:.2f} | {best[1]:.2f} |\n"
            due = max(1.0, 1.5 * point["step"])
    return lines
