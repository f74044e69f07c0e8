"""Trains the shipped model ``words-2l``: a GPT-2 of two layers that continues repeated words.

Owns: the tokenizer, the training data, the recipe, and what is special in the training that makes the files of
``models/words-2l``; the rest is `CausalLM`. May import nothing of the package that measures, so that a model is never
trained with the code that later measures it.

``python -m headwise.studies.training.words_2l`` makes the files again, from a seed, in some minutes on two
cores; nothing is pickled. Checked on x86-64 with torch 2.13 and two threads: the checkpoints of steps 0, 8 and 16 come
out as they are shipped, to the last bit. Another CPU or version of torch adds up in another order: slightly other ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from ...errors import DeclarationError
from ...interventions.models.checkpoints import CHECKPOINTS
from .causal_lm import CausalLM

FOLDER = Path(__file__).parents[2] / "models" / "words-2l"
SPECIAL = ("<bos>", "<unk>")
KEPT_STEPS = (0, 8, 16, 32, 64, 128, 192, 256, 320, 384, 416, 432, 448, 464, 480, 496, 512, 544, 576, 640, 768, 1024)


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights depend on besides the word list.

    A head is "first" if its index is below ``first_heads`` of its layer. First heads start with larger weights; the
    other heads of layer 1 start to learn at `join_step` only (in trials without this most became induction heads too).
    """

    seed: int = 0
    steps: int = 2000
    threads: int = 2  # CPU threads; another number gives slightly different weights
    width: int = 64
    heads: int = 8
    inner: int = 128
    positions: int = 128
    first_heads: tuple[int, int] = (2, 3)  # of layer 0 and of layer 1
    first_scale: float = 4.0  # times the default standard deviation 0.02, for W_V and W_O of the first heads
    other_scale: float = 0.05  # the same for the other heads
    query_scale: float = 6.0  # the same for W_Q = W_K of all heads
    word_std: float = 0.05
    position_size: float = 0.3  # amplitude of the sinusoidal start of the position embedding
    join_step: int = 700
    learning_rate: float = 4e-3
    warmup: int = 50  # steps
    decay_from: float = 0.6  # fraction of the steps after which the learning rate falls linearly to 5%
    weight_decay: float = 0.01
    adam_eps: tuple[float, float] = (3e-4, 1e-4)  # before and from join_step; large ones keep small heads small
    tokens: int = 4096  # per batch
    length: int = 64  # tokens per sequence; from join_step on every second batch has `positions` instead
    new_weight: float = 0.2  # share of the unpredictable positions that enter the loss
    tiled: float = 0.7  # share of sequences that are one repeated block; the rest copies pieces of itself
    min_block: int = 10  # words
    subject: int = 45  # words per subject: neighbours in the word list
    subject_sequences: float = 0.7  # share of the sequences that have a subject
    subject_words: float = 0.5  # share of the fresh words of such a sequence that is of its subject
    bos: float = 0.2  # share of the sequences with <bos> in front


def build_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Builds the tokenizer: ``<bos>`` is 0, ``<unk>`` 1, then a token per word (default: of the shipped word list)."""
    words = (FOLDER / "words.txt").read_text(encoding="utf-8").split() if words is None else words
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *words))}, unk_token=SPECIAL[1]))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    special = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "unk_token": SPECIAL[1]}
    inputs = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **special)
    lost = [w for i, w in enumerate(words, len(SPECIAL)) if tokenizer(w)["input_ids"] != [i]]
    if lost:
        raise DeclarationError(f"These words occur twice or are no single token: {lost[:5]}. Remove them.")
    return tokenizer


def build_model(vocab: int, recipe: Recipe) -> GPT2LMHeadModel:
    """Builds the untrained model for `vocab` tokens from PyTorch's global random state."""
    d, h = recipe.width, recipe.heads
    config = GPT2Config(
        vocab_size=vocab, n_positions=recipe.positions, n_embd=d, n_layer=2, n_head=h,
        n_inner=recipe.inner, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    angle = torch.arange(recipe.positions)[:, None] * 100.0 ** (-torch.arange(d // 2) / (d // 2))
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0.0, recipe.word_std)
        model.transformer.wpe.weight.copy_(recipe.position_size * torch.cat([angle.sin(), angle.cos()], 1))
        for block, first in zip(model.transformer.h, recipe.first_heads, strict=True):
            scale = torch.where(torch.arange(d) < first * (d // h), recipe.first_scale, recipe.other_scale)
            block.attn.c_proj.weight.mul_(scale[:, None])
            qkv = block.attn.c_attn.weight  # [width, 3 * width]: queries, keys, values
            qkv[:, 2 * d :].mul_(scale)
            qkv[:, :d].mul_(recipe.query_scale)
            qkv[:, d : 2 * d] = qkv[:, :d]  # a query meets its own key first: it attends to equal words and positions
    return model


def make_batch(rng: np.random.Generator, n: int, length: int, vocab: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Draws `n` sequences of random words that repeat after random distances.

    Parameters
    ----------
    rng : Generator
    n, length : int
        Sequences, and words of each.
    vocab : int
        Token ids lie below it.
    recipe : Recipe

    Returns
    -------
    tokens, predictable
        Both ``[n, length]``. ``predictable[b, t]``: this pair of neighbours (t - 1, t) occurred before in the sequence.
    """
    low, steps = len(SPECIAL), np.arange(length)[None]
    fresh = rng.integers(low, vocab, (n, length))
    start = low + recipe.subject * rng.integers(0, (vocab - low) // recipe.subject, (n, 1))
    mine = (rng.random((n, 1)) < recipe.subject_sequences) & (rng.random((n, length)) < recipe.subject_words)
    fresh = np.where(mine, start + rng.integers(0, recipe.subject, (n, length)), fresh)
    # One block, repeated to the end, after up to 15 other words. `source` is the position a word is copied from.
    block = rng.integers(recipe.min_block, length // 2 + 1, (n, 1))
    lead = rng.integers(0, np.minimum(length - 2 * block + 1, 16)) * rng.integers(0, 2, (n, 1))
    source = np.where(steps >= lead + block, lead + (steps - lead) % block, steps)
    # Or: runs of fresh words (1 to 7) and copies (2 to 13 words) of what stood at a random earlier place.
    pieces = np.tile(steps, (n, 1))
    left, pointer, copying = rng.integers(2, 20, n), np.zeros(n, np.int64), np.zeros(n, np.bool_)
    for t in range(length):
        new = left == 0
        copy = rng.random(n) < 0.75
        left = np.where(new, np.where(copy, rng.integers(2, 14, n), rng.integers(1, 8, n)), left)
        pointer = np.where(new, rng.integers(0, max(t - 1, 1), n), pointer)
        copying = np.where(new, copy, copying)
        pieces[:, t] = np.where(copying, pieces[np.arange(n), np.minimum(pointer, length - 1)], t)
        pointer, left = pointer + 1, left - 1
    source = np.where(rng.random((n, 1)) < recipe.tiled, source, pieces)
    tokens = np.take_along_axis(fresh, source, 1)
    bos = rng.random(n) < recipe.bos
    tokens[bos, 1:] = tokens[bos, :-1]
    tokens[bos, 0] = 0
    same = (tokens[:, :, None] == tokens[:, None, :]) & np.tri(length, k=-1, dtype=np.bool_)
    predictable = np.pad((same[:, :-1, :-1] & same[:, 1:, 1:]).any(2), ((0, 0), (1, 0)))
    return torch.from_numpy(tokens), torch.from_numpy(predictable)


class RepeatData(L.LightningDataModule):  # type: ignore[misc]
    """Batch number `step` as ``(tokens, counted)``, both ``[batch, length]``; `counted` words enter the loss."""

    def __init__(self, vocab: int, recipe: Recipe) -> None:
        super().__init__()
        self.vocab, self.recipe = vocab, recipe

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        r = self.recipe
        length = r.positions if step >= r.join_step and step % 2 == 0 else r.length
        rng = np.random.default_rng((r.seed, step))
        tokens, predictable = make_batch(rng, r.tokens // length, length, self.vocab, r)
        return tokens, predictable | torch.from_numpy(rng.random(tokens.shape) < r.new_weight)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Loads the batches in order."""
        return DataLoader(self, batch_size=None)


@torch.no_grad()
def measure(model: GPT2LMHeadModel, half: int = 25, prompts: int = 64) -> dict[str, float]:
    """Measures repeat accuracy and the top previous-token (layer 0) and induction score (layer 1), all from 0 to 1."""
    rng, ids = np.random.default_rng(9), np.arange(len(SPECIAL), model.config.vocab_size)
    first = torch.tensor(np.stack([rng.choice(ids, half, replace=False) for _ in range(prompts)]))
    tokens = torch.cat([first, first], 1)
    out = model(tokens, output_attentions=True)
    hits = out.logits[:, half:-1].argmax(-1) == tokens[:, half + 1 :]
    i, k = torch.arange(half, 2 * half), torch.arange(1, 2 * half)
    previous = out.attentions[0][:, :, k, k - 1].mean((0, 2)).max()
    induction = out.attentions[1][:, :, i, i - half + 1].mean((0, 2)).max()
    return {"repeat": hits.double().mean().item(), "previous": previous.item(), "induction": induction.item()}


def half_weights(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Copies the weights as float16, without ``lm_head.weight``, which is the word embedding."""
    return {k: v.half() for k, v in model.state_dict().items() if k != "lm_head.weight"}


class RepeatTask(CausalLM):
    """Next-word training of the model; keeps float16 copies of the weights at the planned steps in ``kept``."""

    def __init__(self, model: GPT2LMHeadModel, recipe: Recipe) -> None:
        super().__init__(model, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.recipe, self.waiting = recipe, True  # waiting: the other heads do not learn yet
        self.kept: dict[int, dict[str, Tensor]] = {}
        late = torch.arange(recipe.width) >= recipe.first_heads[1] * (recipe.width // recipe.heads)
        inp, out = model.transformer.h[1].attn.c_attn, model.transformer.h[1].attn.c_proj
        for weight, mask in ((inp.weight, late.repeat(3)), (inp.bias, late.repeat(3)), (out.weight, late[:, None])):
            weight.register_hook(lambda grad, mask=mask: grad.masked_fill(mask, 0.0) if self.waiting else grad)

    def loss(self, batch: Any) -> Tensor:
        """Cross-entropy (nats) of the counted words; logits of no other are computed."""
        tokens, counted = batch
        hidden = self.model.transformer(tokens).last_hidden_state[:, :-1][counted[:, 1:]]  # [counted words, width]
        return nn.functional.cross_entropy(self.model.lm_head(hidden), tokens[:, 1:][counted[:, 1:]])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keeps the weights if the number of steps done is planned, and sets what changes when all heads learn."""
        self.waiting = self.global_step < self.recipe.join_step
        if self.global_step in KEPT_STEPS:
            self.kept[self.global_step] = half_weights(self.model)
        for group in self.trainer.optimizers[0].param_groups:
            group["eps"] = self.recipe.adam_eps[0 if self.waiting else 1]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shows the scores at every 50th step."""
        if self.global_step % 50 == 0:
            self.log_dict(measure(self.model), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate rises, stays and falls linearly."""
        r = self.recipe
        adam = torch.optim.AdamW(self.parameters(), self.learning_rate, self.betas, weight_decay=self.weight_decay)
        x, y = [0, r.warmup, r.decay_from * r.steps, r.steps], [0.02, 1.0, 1.0, 0.05]
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: float(np.interp(step, x, y)))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(out_folder: Path = FOLDER, recipe: Recipe | None = None, progress: bool = True) -> dict[str, float]:
    """Trains the model and puts its files into `out_folder`, each written beside and renamed. Returns the scores."""
    recipe = recipe or Recipe()
    tokenizer = build_tokenizer()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(recipe.threads)
    out_folder = out_folder.absolute()
    out_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out_folder) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.seed_everything(recipe.seed, verbose=False)
        model = build_model(len(tokenizer), recipe)
        task = RepeatTask(model, recipe)
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, deterministic=True, gradient_clip_val=1.0, logger=False,
            default_root_dir=name, enable_progress_bar=progress, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, datamodule=RepeatData(len(tokenizer), recipe))
        task.kept[recipe.steps] = half_weights(model)
        model.load_state_dict(task.kept[recipe.steps], strict=False)  # so the shipped weights equal the last checkpoint
        model.eval().save_pretrained(partial := Path(name))
        tokenizer.save_pretrained(partial)
        flat = {f"step{step:06d}/{key}": value for step, part in task.kept.items() for key, value in part.items()}
        save_file(flat, partial / CHECKPOINTS, {"steps": json.dumps(sorted(task.kept))})
        (partial / "words.txt").write_bytes((FOLDER / "words.txt").read_bytes())
        for file in sorted(p for p in partial.iterdir() if p.is_file()):
            file.chmod(0o644)
            file.replace(out_folder / file.name)
    return measure(model)


def main(arguments: list[str] | None = None) -> None:
    """Command line: trains and prints the scores."""
    parser = argparse.ArgumentParser(description="Trains the shipped model words-2l.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the files (default: models/words-2l)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    chosen = parser.parse_args(arguments)
    for name, value in train(chosen.out, Recipe(steps=chosen.steps, seed=chosen.seed)).items():
        print(f"{name} {value:.3f}")


if __name__ == "__main__":
    main()
