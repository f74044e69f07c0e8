"""Trains the shipped model ``code-4l``: a GPT-2 of four layers that has read the source of Python's standard library.

Owns: the training, and the scores along the way; `code_text` has the recipe and the data, `code_files` writes the files
of ``models/code-4l``, the rest is `CausalLM`. These may import nothing of the package that measures, so that a model is
never trained with the code that later measures it.

``python -m headwise.studies.training.code_4l`` makes the files again. It keeps what it needs to go on in the folder
``build/code-4l``, and goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, get_scheduler
from transformers.utils import logging as hf_logging

from ...errors import DeclarationError
from .causal_lm import CausalLM
from .code_files import Made, write_files, write_json
from .code_text import FOLDER, SMOKE, CodeData, Recipe, build_tokenizer, corpus, licence_of
from .data import TextData
from .muon import MuonAdam
from .ngrams import KneserNey


@torch.no_grad()
def text_loss(model: GPT2LMHeadModel, windows: np.ndarray[Any, Any], batch: int = 16) -> float:
    """Mean cross-entropy, in nats, of all tokens but the first of some pieces of text ``(piece, position)``."""
    total = 0.0
    for start in range(0, len(windows), batch):
        tokens = torch.from_numpy(windows[start : start + batch]).to(model.device)
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
    return total / windows[:, 1:].size


def random_repeats(vocabulary: int, half: int = 25, prompts: int = 32) -> Tensor:
    """Random distinct tokens, none of them END, that are repeated once: ``(prompt, position)``, always the same."""
    random = np.random.default_rng(9)
    first = np.stack([random.choice(np.arange(1, vocabulary), half, replace=False) for _ in range(prompts)])
    return torch.from_numpy(np.concatenate([first, first], 1))


@torch.no_grad()
def scores(model: GPT2LMHeadModel, tokens: Tensor) -> dict[str, Any]:
    """What the model does with tokens that are repeated once.

    Returns
    -------
    dict
        ``accuracy`` and ``loss`` (nats) in the repeat, from its second token on; the scores ``induction`` (attention
        from a token of the repeat to the one behind its first occurrence) and ``previous_token`` of every head
        ``(layer, head)``, mean over prompts and positions.
    """
    tokens, half = tokens.to(model.device), tokens.shape[1] // 2
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others do not give attention
    out = model(tokens, output_attentions=True, use_cache=False)
    model.set_attn_implementation(implementation)
    logits, wanted = out.logits[:, half:-1].float(), tokens[:, half + 1 :]
    attention = torch.stack(out.attentions)  # (layer, prompt, head, query, key)
    i, k = torch.arange(half, 2 * half), torch.arange(1, 2 * half)
    grids = {"induction": attention[..., i, i - half + 1], "previous_token": attention[..., k, k - 1]}
    return {
        "accuracy": float((logits.argmax(-1) == wanted).float().mean()),
        "loss": float(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())),
    } | {name: grid.mean((1, 3)).cpu().double().numpy().round(4).tolist() for name, grid in grids.items()}


def half_weights(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Copies the weights as float16, without ``lm_head.weight``, which is the token embedding."""
    weights = model.state_dict().items()
    return {name: value.half().cpu().contiguous() for name, value in weights if name != "lm_head.weight"}


class Curve(L.Callback):  # type: ignore[misc]
    """Measures every few steps, and keeps weights and all that training needs to go on.

    What was measured is part of the checkpoint, so that a run that goes on has every point once.
    """

    def __init__(self, folder: Path, windows: np.ndarray[Any, Any], data: CodeData) -> None:
        self.folder, self.windows, self.data, self.recipe = folder, windows, data, data.recipe
        self.points: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """The points of the curve, as JSON: a checkpoint is read without unpickling objects."""
        return {"points": json.dumps(self.points)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The points so far."""
        self.points = json.loads(state_dict["points"])
        self.data.text_from = self.recipe.text_from(self.points)

    def on_train_start(self, trainer: L.Trainer, pl_module: CausalLM) -> None:
        """The first point: no step done."""
        if not self.points:
            self._measure(trainer, pl_module, None)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: CausalLM, outputs: Any, *given: Any) -> None:
        """A point, weights, and a checkpoint, where the number of steps says so."""
        step, recipe = trainer.global_step, self.recipe
        self.losses.append(outputs["loss"].detach())
        due = step % recipe.every == 0 or step == recipe.steps
        if due:
            self._measure(trainer, pl_module, float(torch.stack(self.losses).mean()))
            self.losses = []
            self.data.text_from = recipe.text_from(self.points)
        if step in {*recipe.kept, recipe.steps, self.data.text_from}:
            save_file(half_weights(pl_module.model), self.folder / f"step{step:06d}.safetensors")
        if due:  # the curve after the weights: it says that they are there
            write_json(self.folder / "curve.json", self.points)
            beside = self.folder / "partial.ckpt"
            trainer.save_checkpoint(beside)
            beside.replace(self.folder / "last.ckpt")

    def _measure(self, trainer: L.Trainer, module: CausalLM, train_loss: float | None) -> None:
        module.eval()
        found = scores(module.model, random_repeats(self.recipe.vocabulary))
        point = {"step": trainer.global_step, "time": round(time.time()), "train_loss": train_loss}
        point |= {"validation_loss": text_loss(module.model, self.windows), "repeat_accuracy": found["accuracy"]}
        point |= {"repeat_loss": found["loss"]} | {name: found[name] for name in ("induction", "previous_token")}
        module.train()
        self.points.append(point)
        best = {name: float(np.max(point[name])) for name in ("induction", "previous_token")}
        print(
            f"step {point['step']:6d}  loss {train_loss if train_loss is not None else float('nan'):.3f}"
            f"  held out {point['validation_loss']:.3f}  repeats {point['repeat_accuracy']:.3f}"
            f"  induction {best['induction']:.2f}  previous token {best['previous_token']:.2f}",
            flush=True,
        )


class CodeLM(CausalLM):
    """`CausalLM` of batches ``(item, 2, sequence, position)`` of tokens and labels, with `MuonAdam`."""

    recipe: Recipe

    def loss(self, batch: Any) -> Tensor:
        """The mean cross-entropy of the labels of a batch, in nats."""
        tokens, labels = (one.flatten(0, 1) for one in batch.unbind(1))
        return super().loss({"input_ids": tokens, "labels": labels})

    def configure_optimizers(self) -> Any:
        """Muon for the matrices in blocks, AdamW for the rest; both rates fall as a cosine."""
        recipe, named = self.recipe, [*self.model.named_parameters()]
        inner = [one for name, one in named if one.ndim == 2 and ".h." in name]
        ends = [one for name, one in named if one.ndim == 2 and ".h." not in name]
        groups = [
            {"params": ends, "weight_decay": recipe.weight_decay},
            {"params": [one for _, one in named if one.ndim == 1], "weight_decay": 0.0},
        ]
        both = MuonAdam(
            torch.optim.AdamW(groups, recipe.learning_rate, (0.9, 0.98)),
            torch.optim.Muon(inner, recipe.muon_rate, recipe.weight_decay),
        )
        schedule = get_scheduler("cosine", both, recipe.warmup, recipe.steps)
        return {"optimizer": both, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def untrained(recipe: Recipe) -> CodeLM:
    """The model before the first step, from torch's global random state."""
    module = CodeLM.tiny(
        recipe.layers, recipe.heads, recipe.width, vocabulary=recipe.vocabulary, context=recipe.positions
    )
    assert isinstance(module, CodeLM)
    module.recipe = recipe
    for weight in module.parameters():
        if weight.ndim == 2:
            weight *= recipe.initial_std / module.model.config.initializer_range
    at, pair = torch.arange(recipe.positions)[:, None], torch.arange(0, recipe.width, 2) / recipe.width
    angles = at * 10_000.0**-pair
    body = module.model.transformer
    body.wpe.weight[:, 0::2], body.wpe.weight[:, 1::2] = angles.sin(), angles.cos()
    body.wpe.weight *= recipe.amplitude
    first = body.h[0].attn.c_attn.weight  # of queries, keys and values side by side
    first[:, recipe.width : 2 * recipe.width] *= recipe.nearness
    first[:, : recipe.width] = first[:, recipe.width : 2 * recipe.width]
    return module


def fit(
    folder: Path, tokens: np.ndarray[Any, Any], windows: np.ndarray[Any, Any], recipe: Recipe
) -> list[dict[str, Any]]:
    """Trains, or goes on with the training that `folder` holds, to the end.

    Parameters
    ----------
    folder : Path
        Gets ``last.ckpt``, ``curve.json``, and ``step006000.safetensors`` of the steps that are kept.
    tokens : array
        Token ids ``(position,)`` of the text to read.
    windows : array
        Pieces of the held-out text ``(piece, position)``.
    recipe : Recipe

    Returns
    -------
    list of dict
        The points of the curve, see `Curve`.

    Raises
    ------
    DeclarationError
        `folder` holds a training of another recipe or other text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    read = hashlib.sha256(tokens.astype("<i8").tobytes() + windows.astype("<i8").tobytes()).hexdigest()
    asked = json.loads(json.dumps({"recipe": asdict(recipe), "tokens": read}))
    kept, curve = folder / "recipe.json", folder / "curve.json"
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) != asked:
        raise DeclarationError(f"{folder} holds a training of another recipe or text: give another one")
    write_json(kept, asked)
    last = folder / "last.ckpt"
    points = json.loads(curve.read_text(encoding="utf-8")) if curve.is_file() and last.is_file() else []
    if points and points[-1]["step"] == recipe.steps:
        return points
    torch.set_num_threads(recipe.threads)
    L.seed_everything(recipe.seed, verbose=False)
    module = untrained(recipe)
    data = CodeData(tokens, recipe.vocabulary, recipe)
    points = Curve(folder, windows, data)
    trainer = L.Trainer(
        max_steps=recipe.steps, max_epochs=-1, accelerator=recipe.device, devices=1, gradient_clip_val=1.0,
        logger=False, default_root_dir=folder, enable_progress_bar=sys.stderr.isatty(), enable_checkpointing=False,
        enable_model_summary=False, callbacks=[points],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=True)
    return points.points


def train(
    out: Path = FOLDER,
    work: Path = Path("build/code-4l"),
    recipe: Recipe | None = None,
    *,
    control_steps: int = 2_000,
    source: Path | None = None,
    files: int | None = None,
) -> dict[str, Any]:
    """Trains the model and its control, and puts the files of the model into a folder.

    Parameters
    ----------
    out : Path
        The folder.
    work : Path
        Where the trainings are kept meanwhile, to go on from there.
    recipe : Recipe, optional
    control_steps : int
        Steps of the training on text alone.
    source : Path, optional
        Folder with the source to read; by default the library of the Python that runs this.
    files : int, optional
        Read only so many files, and hold out as many.

    Returns
    -------
    dict
        What ``training.json`` in `out` says.

    Raises
    ------
    DeclarationError
        `work` holds trainings of another recipe or of other files, or the licence of the source is not found.
    """
    recipe = recipe or Recipe()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    licence_of(source)  # nothing is trained that could not be shipped
    out, work = out.absolute(), work.absolute()
    read, held_out = (dict([*texts.items()][:files]) for texts in corpus(source))
    tokenizer = build_tokenizer([*read.values()], recipe.vocabulary, recipe.positions)
    tokens = TextData([*read.values()], tokenizer, recipe.positions).tokens.ravel()
    windows = TextData([*held_out.values()], tokenizer, recipe.positions).tokens
    counted = {}
    for order in (1, 2, 3, 5):
        probabilities = KneserNey(tokens, order, recipe.vocabulary).probabilities(windows.ravel())
        counted[str(order)] = -float(np.log(probabilities).reshape(windows.shape)[:, 1:].mean())
    print(f"{tokens.size} tokens of {len(read)} files; {windows.size} of {len(held_out)} files held out")
    print("  ".join(f"{order}-gram {loss:.3f}" for order, loss in counted.items()), flush=True)
    curve = fit(work / "main", tokens, windows, recipe)
    print(f"text alone, {control_steps} steps", flush=True)
    alone = fit(work / "text-alone", tokens, windows, recipe.control(control_steps))
    weights = sorted((work / "main").glob("step*.safetensors"))
    kept = {int(file.stem.removeprefix("step")): load_file(file) for file in weights}
    model = untrained(recipe).model
    model.load_state_dict({name: value.float() for name, value in kept[recipe.steps].items()}, strict=False)
    final = {"step": recipe.steps, "validation_loss": text_loss(model.eval(), windows)}
    final |= scores(model, random_repeats(recipe.vocabulary))
    numbers = {
        "text_from": recipe.text_from(curve),
        "final": final,
        "ngram_loss": counted,
        "tokens": {"read": tokens.size, "held_out": windows.size},
    }
    licence = licence_of(source)
    return write_files(out, Made(recipe, model, kept, tokenizer, read, held_out, licence, curve, alone, numbers))


def main(arguments: list[str] | None = None) -> None:
    """Command line: trains, and prints the scores."""
    parser = argparse.ArgumentParser(description="Trains the shipped model code-4l.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the files (default: models/code-4l)")
    parser.add_argument("--work", type=Path, default=Path("build/code-4l"), help="folder to go on from, if stopped")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps")
    parser.add_argument("--control-steps", type=int, default=2_000, help="the same, of the control on text alone")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default=Recipe.device, help="cpu, cuda, ... (default: the best there is)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a small model, to see that it runs")
    chosen = parser.parse_args(arguments)
    recipe = Recipe(seed=chosen.seed, steps=chosen.steps, device=chosen.device)
    if chosen.smoke:
        if chosen.out == FOLDER:
            parser.error("--smoke makes a useless model: give it a folder of its own with --out")
        recipe, chosen.control_steps = SMOKE, 4
    files = 5 if chosen.smoke else None
    found = train(chosen.out, chosen.work, recipe, control_steps=chosen.control_steps, files=files)
    print(json.dumps(found["final"], indent=1))


if __name__ == "__main__":
    main()
