"""Data to train causal language models on, for PyTorch Lightning: repeated random tokens, text, and mixtures.

Every sequence is made from the seed and its number alone, so that training that goes on from a checkpoint, with any
number of worker processes, sees what it would have seen. The loaders say how far they are, as Lightning asks them to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import AutoTokenizer, PreTrainedModel

from ...errors import LARGEST_SEED, DeclarationError, whole

VALIDATION = 1
"""Second number of the seed of sequences that validate; those that train have 0."""


class Sequences(Dataset[Tensor]):
    """Sequences of token ids, each made when it is asked for.

    Parameters
    ----------
    size : int
        How many.
    make : callable
        ``make(number) -> array (position,)``.
    """

    def __init__(self, size: int, make: Callable[[int], np.ndarray[Any, Any]]) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Tensor:
        return torch.from_numpy(np.asarray(self.make(number), dtype=np.int64))


class Order(DistributedSampler[Any]):
    """The sequences of this process in an order that the seed and the epoch give; it can begin in the middle of one."""

    def __init__(self, sequences: Sequences, shuffle: bool, seed: int) -> None:
        several = distributed.is_available() and distributed.is_initialized()
        count, rank = (distributed.get_world_size(), distributed.get_rank()) if several else (1, 0)
        super().__init__(sequences, count, rank, shuffle=shuffle, seed=seed)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        yield from list(super().__iter__())[start:]


class Loader(DataLoader[Tensor]):
    """A DataLoader that goes on in the middle of an epoch, where a checkpoint was made there."""

    def __iter__(self) -> Any:
        order = self.sampler
        self.given = order.start // int(self.batch_size or 1) if isinstance(order, Order) else 0
        for batch in super().__iter__():
            self.given += 1
            yield batch
        self.given = 0

    def state_dict(self) -> dict[str, int]:
        """Batches of this epoch that were given."""
        return {"given": getattr(self, "given", 0)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after these batches."""
        if isinstance(self.sampler, Order):
            self.sampler.start = state["given"] * int(self.batch_size or 1)


class SequenceData(L.LightningDataModule):  # type: ignore[misc]
    """What the data modules here share: batches ``(example, position)`` of int64 token ids.

    Parameters
    ----------
    batch_size : int
        Sequences of a batch, on each device.
    size : int
        Sequences of an epoch.
    validation : int
        Sequences to validate on; 0 leaves validation out.
    seed : int
    num_workers : int
        Processes that make sequences; 0 makes them in the process that trains.
    pin_memory : bool
        As in torch's DataLoader.
    """

    def __init__(
        self, batch_size: int, size: int, validation: int, seed: int, num_workers: int, pin_memory: bool
    ) -> None:
        super().__init__()
        self.batch_size = whole(batch_size, "batch_size", low=1)
        self.size = whole(size, "size, the number of sequences of an epoch,", low=1)
        self.validation = whole(validation, "validation, the number of sequences to validate on,")
        self.seed = whole(seed, "a seed", high=LARGEST_SEED)
        self.num_workers, self.pin_memory = whole(num_workers, "num_workers"), pin_memory

    def __getstate__(self) -> dict[str, Any]:
        """What processes that make sequences get: all but the trainer."""
        return vars(self) | {"trainer": None}

    def sequence(self, number: int, validates: bool) -> np.ndarray[Any, Any]:
        """Sequence `number` of those that train, or of those that validate."""
        raise NotImplementedError

    @property
    def positions(self) -> int:
        """Tokens of a sequence."""
        raise NotImplementedError

    def _loader(self, size: int, validates: bool) -> Loader:
        sequences = Sequences(size, partial(self.sequence, validates=validates))
        order = Order(sequences, not validates, self.seed)
        return Loader(
            sequences, self.batch_size, sampler=order, num_workers=self.num_workers, pin_memory=self.pin_memory
        )

    def train_dataloader(self) -> Loader:
        """Batches to train on, in an order that the seed and the epoch give."""
        return self._loader(self.size, False)

    def val_dataloader(self) -> Loader | list[Any]:
        """Batches to validate on, always the same."""
        return self._loader(self.validation, True) if self.validation else []


class RepeatedTokensData(SequenceData):
    """Random distinct tokens, repeated once: what `headwise.RepeatedTokens` measures on.

    Parameters
    ----------
    length : int
        Half length ``L``: a sequence has ``2L`` tokens.
    vocabulary : int, optional
        Token ids are drawn below it; by default the vocabulary of the model that is trained.
    batch_size, size, validation, seed, num_workers, pin_memory
        See `SequenceData`.

    Raises
    ------
    DeclarationError
        A value is not possible, or there are fewer token ids than a half needs.

    Examples
    --------
    >>> data = hw.RepeatedTokensData(length=4, vocabulary=50, batch_size=2)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.shape, bool((batch[:, :4] == batch[:, 4:]).all())
    (torch.Size([2, 8]), True)
    """

    def __init__(
        self,
        length: int = 32,
        *,
        vocabulary: int | None = None,
        batch_size: int = 32,
        size: int = 65_536,
        validation: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, size, validation, seed, num_workers, pin_memory)
        self.length = whole(length, "length, the half length,", low=1)
        self.vocabulary = vocabulary if vocabulary is None else self._fits(whole(vocabulary, "vocabulary", low=1))

    def _fits(self, vocabulary: int) -> int:
        if vocabulary < self.length:
            raise DeclarationError(f"length={self.length} needs as many different tokens: there are {vocabulary}")
        return vocabulary

    def setup(self, stage: str) -> None:
        """Take the vocabulary of the model that is trained, where none was given."""
        if self.vocabulary is None:
            parts = [] if self.trainer is None else self.trainer.lightning_module.modules()
            sizes = {int(one.config.vocab_size) for one in parts if isinstance(one, PreTrainedModel)}
            if len(sizes) != 1:
                raise DeclarationError(
                    f"vocabulary= is left out, and the module holds models of {len(sizes)} vocabularies"
                )
            self.vocabulary = self._fits(sizes.pop())

    @property
    def positions(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.length

    def sequence(self, number: int, validates: bool) -> np.ndarray[Any, Any]:
        """A half of distinct tokens, twice."""
        random = np.random.default_rng((self.seed, VALIDATION * validates, number))
        half = random.permutation(self.vocabulary or 0)[: self.length]
        return np.concatenate([half, half])


class TextData(SequenceData):
    """Text, cut into sequences of one length.

    Parameters
    ----------
    texts : sequence of str, or path
        Texts; or a text file, or a folder of ``.txt`` files, in the order of their names. Texts are put one after
        the other, each with the end-of-text token behind it where the tokenizer has one.
    tokenizer : tokenizer or str
        A tokenizer of transformers, or the Hub id or folder to read it from.
    length : int
        Tokens of a sequence.
    share : float
        Share of the sequences that validate, taken from the end.
    batch_size, seed, num_workers, pin_memory
        See `SequenceData`. An epoch is all of the text.

    Raises
    ------
    DeclarationError
        A value is not possible, there is no such file, or the text is shorter than a sequence.

    Examples
    --------
    >>> model = hw.load("words-2l")
    >>> data = hw.TextData(["apple banana cherry " * 20], model.tokenizer, length=12, batch_size=2)
    >>> next(iter(data.train_dataloader())).shape
    torch.Size([2, 12])
    """

    def __init__(
        self,
        texts: Sequence[str] | str | os.PathLike[str],
        tokenizer: Any,
        length: int = 128,
        *,
        share: float = 0.0,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.length = whole(length, "length", low=2)
        if not 0 <= share < 1:
            raise DeclarationError(f"share={share}: give the share that validates, from 0 up to, not including, 1")
        tokenizer = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        ids: list[int] = []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for text in _texts(texts):
            ids += [*tokenizer.encode(text, add_special_tokens=False), *end]
        count = len(ids) // self.length
        validation = round(share * count)
        if count - validation < 1:
            raise DeclarationError(f"the text has {len(ids)} tokens: sequences of {self.length} need more")
        super().__init__(batch_size, count - validation, validation, seed, num_workers, pin_memory)
        self.tokens = np.asarray(ids[: count * self.length], dtype=np.int64).reshape(count, self.length)

    @property
    def positions(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def sequence(self, number: int, validates: bool) -> np.ndarray[Any, Any]:
        """Sequence `number` of the text; those that validate stand at its end."""
        found: np.ndarray[Any, Any] = self.tokens[number + (self.size if validates else 0)]
        return found


class MixedData(SequenceData):
    """Sequences of several kinds, each drawn from one of them.

    Parameters
    ----------
    parts : sequence of SequenceData
        Their sequences have one length.
    weights : sequence of float
        How often each is drawn, in any unit.
    batch_size, size, validation, seed, num_workers, pin_memory
        See `SequenceData`.

    Raises
    ------
    DeclarationError
        The parts do not go together, or a value is not possible.

    Examples
    --------
    >>> repeats = [hw.RepeatedTokensData(length=4, vocabulary=50, seed=seed) for seed in (0, 1)]
    >>> data = hw.MixedData(repeats, weights=[3, 1], batch_size=2)
    >>> next(iter(data.train_dataloader())).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        parts: Sequence[SequenceData],
        weights: Sequence[float],
        *,
        batch_size: int = 32,
        size: int = 65_536,
        validation: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, size, validation, seed, num_workers, pin_memory)
        self.parts = tuple(parts)
        if not self.parts or len(weights) != len(self.parts) or min(weights) < 0 or not sum(weights) > 0:
            raise DeclarationError(f"weights={weights!r} of {len(self.parts)} parts: give one for each, 0 or more")
        if len({part.positions for part in self.parts}) > 1:
            lengths = [part.positions for part in self.parts]
            raise DeclarationError(f"the parts have sequences of {lengths} tokens: give them one length")
        self.shares = np.cumsum(np.asarray(weights, dtype=float)) / float(sum(weights))

    def setup(self, stage: str) -> None:
        """Set up the parts."""
        for part in self.parts:
            part.trainer = self.trainer
            part.setup(stage)

    @property
    def positions(self) -> int:
        """Tokens of a sequence."""
        return self.parts[0].positions

    def sequence(self, number: int, validates: bool) -> np.ndarray[Any, Any]:
        """A sequence of the part that the seed draws for this number."""
        random = np.random.default_rng((self.seed, VALIDATION * validates, number))
        part = self.parts[int(np.searchsorted(self.shares, random.random(), side="right"))]
        most = part.validation if validates and part.validation else part.size
        return part.sequence(number % most, validates and bool(part.validation))


def _texts(given: Sequence[str] | str | os.PathLike[str]) -> list[str]:
    """The texts, read where files are named."""
    if not isinstance(given, str | os.PathLike):
        return list(given)
    path = Path(given)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DeclarationError(f"{path}: there is no such text file, nor a folder of .txt files")
    return [file.read_text(encoding="utf-8") for file in files]
