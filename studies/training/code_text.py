"""What the shipped model ``code-4l`` is trained on: which files, in which tokens, in which order.

Owns: `Recipe`, which files are read and which are held out, the tokenizer, and the sequences of training.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ...errors import DeclarationError
from .causal_lm import IGNORED
from .data import Loader, Order, SequenceData, Sequences

Array = np.ndarray[Any, Any]
FOLDER = Path(__file__).parents[2] / "models" / "code-4l"
LICENCE = "LICENSE-PYTHON"

END = "<|endoftext|>"
LEFT_OUT = ("test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "turtledemo",
            "encodings", "ensurepip", "__phello__")  # fmt: skip
"""Folders that are not read: tests, other packages' files, generated tables, and copies of other files."""
HELD_OUT = 20
"""A file is held out where the SHA-256 of its name is a multiple of this number."""


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights depend on besides the source files."""

    seed: int = 0
    steps: int = 4_000
    seed_steps: int = 2_000  # the first steps see repeated random tokens only: at most as many,
    seed_score: float = 0.6  # and no more once the induction score of a head is as high
    seed_positions: int = 64  # of their sequences,
    seed_sequences: int = 2  # of which so many stand for one of text
    random_share: float = 0.125  # of the sequences after them
    new_share: float = 0.1  # of the random tokens that were not seen before: so many are to be predicted all the same
    layers: int = 4
    heads: int = 8
    width: int = 128
    positions: int = 256
    vocabulary: int = 1024  # tokens, END and the 256 bytes among them
    initial_std: float = 0.08  # of matrices and embeddings; GPT-2 has 0.02, which is for wider streams
    amplitude: float = 0.3  # of the sinusoids from which the position embedding starts
    nearness: float = 1.5  # queries of layer 0 start as so many times its keys, so that its heads look close by
    batch_size: int = 16
    learning_rate: float = 4e-3  # of AdamW: embeddings, biases and norms
    muon_rate: float = 2e-2  # of Muon: all other matrices
    warmup: int = 50  # steps
    weight_decay: float = 0.01
    threads: int = 1  # CPU threads; another number gives slightly different weights
    device: str = "auto"  # of Lightning's Trainer
    every: int = 250  # steps from one point of the curve to the next
    kept: tuple[int, ...] = (2_000,)  # weights that ship, besides those of the last step and of the first with text

    def text_from(self, points: Sequence[dict[str, Any]]) -> int:
        """The first step that sees text, given the points of the curve so far (`code_4l.Curve`)."""
        reached = (point["step"] for point in points if point["step"] and np.max(point["induction"]) >= self.seed_score)
        return min(next(reached, self.seed_steps), self.seed_steps)

    def control(self, steps: int) -> Recipe:
        """The same with text alone, for some steps."""
        return replace(self, steps=steps, seed_steps=0, random_share=0.0, kept=())


def corpus(root: Path | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """The source of the standard library (default: of the Python that runs this), and the part that is held out.

    Returns
    -------
    read, held_out : dict
        Text by file name relative to the library's folder. `read` is in an order that the hashes of the names give.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found: dict[str, str] = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        left_out = any(part in LEFT_OUT or part.startswith("config-") for part in name.parts[:-1])
        if not left_out and not name.name.startswith("_sysconfigdata"):  # that one is written when Python is built
            found[name.as_posix()] = path.read_text(encoding="utf-8")
    names = sorted(found, key=_number)
    held_out = {name: found[name] for name in sorted(names) if _number(name) % HELD_OUT == 0}
    return {name: found[name] for name in names if name not in held_out}, held_out


def _number(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def sums(texts: dict[str, str]) -> str:
    """SHA-256 and name of every file, a line each, as ``sha256sum`` writes and reads them."""
    return "".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in sorted(texts.items()))


def licence_of(root: Path | None = None) -> str:
    """The licence of the source: of the Python that runs this, or the one that is shipped already."""
    library = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = [library / "LICENSE.txt", Path(sys.base_prefix) / "LICENSE.txt", FOLDER / LICENCE]
    for file in files:
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise DeclarationError(f"the licence of the source is in none of {', '.join(map(str, files))}")


def build_tokenizer(texts: Sequence[str], vocabulary: int, positions: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on some texts, split as GPT-2 splits them; END is token 0."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END)
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=inputs, model_max_length=positions, **special
    )


def repeated(random: np.random.Generator, vocabulary: int, length: int, new: float) -> tuple[Array, Array]:
    """A block of distinct random tokens that repeats to the end, and which of its tokens are to be predicted.

    The block has 4 to half of `length` tokens, and up to 31 other tokens stand before it, so that the distance back to
    the first occurrence and the position tell nothing. Every fourth sequence, drawn at random, begins with END.

    Parameters
    ----------
    random : Generator
    vocabulary : int
        Token ids are drawn below it.
    length : int
    new : float
        Share of the tokens which cannot be known that are to be predicted too.

    Returns
    -------
    tokens, labels : array (length,)
        Labels are the tokens, and `IGNORED` where none is to be predicted: a token can be known where the one before it
        stood before.
    """
    block = int(np.exp(random.uniform(np.log(min(4, length // 2)), np.log(length // 2 + 1))))
    lead = int(random.integers(0, min(32, length - 2 * block + 1)))
    fresh = 1 + random.permutation(vocabulary - 1)[: lead + block]
    at = np.arange(length)
    tokens = fresh[np.where(at < lead, at, lead + (at - lead) % block)]
    known = at > lead + block
    if random.random() < 0.25:
        tokens, known = np.concatenate([[0], tokens[:-1]]), np.concatenate([[False], known[:-1]])
    return tokens, np.where(known | (random.random(length) < new), tokens, IGNORED)


class CodeData(SequenceData):
    """Repeated random tokens first, then pieces of the text that begin anywhere, with some of the former among them."""

    def __init__(self, tokens: np.ndarray[Any, Any], vocabulary: int, recipe: Recipe) -> None:
        super().__init__(recipe.batch_size, recipe.steps * recipe.batch_size, 0, recipe.seed, 0, False)
        self.tokens, self.vocabulary, self.recipe = tokens, vocabulary, recipe
        self.text_from = recipe.seed_steps

    @property
    def positions(self) -> int:
        """Tokens of a sequence."""
        return self.recipe.positions

    def sequence(self, number: int, validates: bool) -> Array:
        """Tokens and labels ``(2, sequence, position)`` of item `number` of training, in the order they are seen."""
        random, recipe = np.random.default_rng((self.seed, number)), self.recipe
        if number < self.text_from * self.batch_size:
            sizes = [recipe.seed_positions] * recipe.seed_sequences
        elif random.random() < recipe.random_share:
            sizes = [recipe.positions]
        else:
            start = int(random.integers(0, len(self.tokens) - self.positions + 1))
            text = self.tokens[None, start : start + self.positions]
            return np.stack([text, text])
        drawn = [repeated(random, self.vocabulary, size, recipe.new_share) for size in sizes]
        return np.stack(drawn, 1)

    def train_dataloader(self) -> Loader:
        """Batches in order; the loader can go on in the middle."""
        sequences = Sequences(self.size, partial(self.sequence, validates=False))
        return Loader(sequences, self.batch_size, sampler=Order(sequences, False, self.seed))


SMOKE = Recipe(
    steps=8, seed_score=0.0, seed_positions=32, layers=2, heads=2, width=16, positions=64, vocabulary=300,
    batch_size=4, warmup=2, every=4, kept=(6,), device="cpu",
)  # fmt: skip
"""A few steps of a small model, to see that all runs."""
