"""Sequences of a small artificial language, in which a part repeats or nothing does: `ZipfData`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from ...errors import DeclarationError, whole
from .data import VALIDATION, SequenceData

SUCCESSORS = 2
"""Tokens that like to follow a token."""
LANGUAGE = 20_220_924
"""Seed of the table of successors, the same in all trainings."""


class ZipfData(SequenceData):
    """Tokens by Zipf's law with bigrams; a sequence is new throughout, or its first tokens repeat to its end.

    Token number ``r`` (from 0) has a probability in proportion to ``(r + 1) ** -exponent``. With probability `bigrams`
    a token is instead one of the two that like to follow the one before. The table of successors is the same for
    every seed. Where a part repeats, its length is drawn anew for each sequence, so that no fixed distance leads back
    to the earlier copy.

    Parameters
    ----------
    length : int
        Tokens of a sequence.
    vocabulary : int
        Token ids are drawn below it.
    period : (int, int), optional
        Shortest and longest part that repeats, in tokens. Left out, nothing repeats.
    exponent : float
        Of Zipf's law; 0 makes all tokens as likely.
    bigrams : float
        Share of tokens that follow from the one before.
    batch_size, size, validation, seed, num_workers, pin_memory
        See `SequenceData`.

    Raises
    ------
    DeclarationError
        A value is not possible.

    Examples
    --------
    >>> from headwise.studies.training.repeats import ZipfData
    >>> tokens = ZipfData(12, vocabulary=20, period=(4, 4)).sequence(0, validates=False)
    >>> bool((tokens[4:] == tokens[:-4]).all())
    True
    """

    def __init__(
        self,
        length: int,
        *,
        vocabulary: int,
        period: tuple[int, int] | None = None,
        exponent: float = 1.0,
        bigrams: float = 0.3,
        batch_size: int = 32,
        size: int = 65_536,
        validation: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, size, validation, seed, num_workers, pin_memory)
        self.length, self.vocabulary = whole(length, "length", low=2), whole(vocabulary, "vocabulary", low=2)
        if not 0 <= bigrams <= 1 or not exponent >= 0:
            raise DeclarationError(f"bigrams={bigrams}, exponent={exponent}: give a share from 0 to 1, and 0 or more")
        self.exponent, self.bigrams, self.period = exponent, bigrams, period
        if period is not None and not 1 <= period[0] <= period[1] < length:
            raise DeclarationError(f"period={period}: give two lengths from 1 up to, not including, length={length}")

    @property
    def positions(self) -> int:
        """Tokens of a sequence."""
        return self.length

    @cached_property
    def below(self) -> np.ndarray[Any, Any]:
        """Probability of each token or one with a smaller id."""
        weights = np.arange(1, self.vocabulary + 1) ** -float(self.exponent)
        found: np.ndarray[Any, Any] = np.cumsum(weights) / weights.sum()
        return found

    @cached_property
    def successors(self) -> list[list[int]]:
        """Tokens that like to follow each token."""
        random = np.random.default_rng((LANGUAGE, self.vocabulary))
        drawn = self._tokens(random.random((self.vocabulary, SUCCESSORS)))
        found: list[list[int]] = drawn.tolist()
        return found

    def _tokens(self, shares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = np.searchsorted(self.below, shares, side="right")
        kept: np.ndarray[Any, Any] = np.minimum(found, self.vocabulary - 1)
        return kept

    def sequence(self, number: int, validates: bool) -> np.ndarray[Any, Any]:
        """Sequence `number` of those that train, or of those that validate."""
        random = np.random.default_rng((self.seed, VALIDATION * validates, number))
        fresh = self.length
        if self.period is not None:
            fresh = int(random.integers(self.period[0], self.period[1] + 1))
        tokens = self._tokens(random.random(fresh)).tolist()
        follows, which = (random.random(fresh) < self.bigrams).tolist(), random.integers(SUCCESSORS, size=fresh)
        for at in range(1, fresh):
            if follows[at]:
                tokens[at] = self.successors[tokens[at - 1]][which[at]]
        return np.resize(np.asarray(tokens), self.length)
