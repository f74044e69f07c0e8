"""Sequences of a small artificial language, in which a part repeats or nothing does: `ZipfData`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from ...errors import DeclarationError, whole
from .causal_lm import IGNORED
from .data import SequenceData

SUCCESSORS = 2
"""Tokens that like to follow a token."""
LANGUAGE = 20_220_924
"""Seed of the tables of successors, the same in all trainings."""


class ZipfData(SequenceData):
    """Tokens by Zipf's law with bigrams and skip-bigrams; a sequence is new throughout, or a part repeats to its end.

    Token number ``r`` (from 0) has a probability in proportion to ``(r + 1) ** -exponent``. With probability `bigrams`
    a token is instead one of the two that like to follow the one before, and with probability `skip_bigrams` one of the
    two that the token two before asks for. The tables of successors are the same for every seed.
    Where a part repeats, its length (evenly by its logarithm), and how many tokens stand before it, are drawn anew for
    each sequence, so that neither a fixed distance nor a fixed position leads back to the earlier copy.
    A token can be known where it follows from the one or two before, and, where a part repeats, where the token before
    it has an earlier copy.

    Parameters
    ----------
    length : int
        Tokens of a sequence.
    vocabulary : int
        Token ids are drawn below it.
    period : (int, int), optional
        Shortest and longest part that repeats, in tokens. Left out, nothing repeats.
    lead : int
        Tokens that stand before the part that repeats, at most.
    exponent : float
        Of Zipf's law; 0 makes all tokens as likely.
    bigrams, skip_bigrams : float
        Share of tokens that follow from the one before, and from the one two before.
    scored : float
        Share of the tokens that cannot be known which enter the loss. Below 1 a sequence has two rows,
        ``(2, position)``: tokens, and labels, in which those that do not enter are -100.
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
        lead: int = 0,
        exponent: float = 1.0,
        bigrams: float = 0.3,
        skip_bigrams: float = 0.0,
        scored: float = 1.0,
        batch_size: int = 32,
        size: int = 65_536,
        validation: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, size, validation, seed, num_workers, pin_memory)
        self.length, self.vocabulary = whole(length, "length", low=2), whole(vocabulary, "vocabulary", low=2)
        self.exponent, self.bigrams, self.skip_bigrams = exponent, bigrams, skip_bigrams
        self.scored = scored
        self.period, self.lead = period, whole(lead, "lead", low=0)
        if not (bigrams >= 0 and skip_bigrams >= 0 and bigrams + skip_bigrams <= 1) or not exponent >= 0:
            raise DeclarationError(
                f"bigrams={bigrams}, skip_bigrams={skip_bigrams}, exponent={exponent}: give two shares of together at "
                "most 1, and 0 or more"
            )
        if not 0 <= scored <= 1:
            raise DeclarationError(f"scored={scored}: give the share of unknowable tokens that enter the loss")
        if period is not None and not 1 <= period[0] <= period[1] < length - lead:
            most = f"length={length}" + f" less lead={lead}" * (lead > 0)
            raise DeclarationError(f"period={period}: give two lengths from 1 up to, not including, {most}")

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
    def successors(self) -> list[list[list[int]]]:
        """Tokens that like to follow each token: the next one, and the one after."""
        random = np.random.default_rng((LANGUAGE, self.vocabulary))
        found: list[list[list[int]]] = self._tokens(random.random((2, self.vocabulary, SUCCESSORS))).tolist()
        return found

    def _tokens(self, shares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = np.searchsorted(self.below, shares, side="right")
        kept: np.ndarray[Any, Any] = np.minimum(found, self.vocabulary - 1)
        return kept

    def sequence(self, number: int, validates: bool) -> np.ndarray[Any, Any]:
        """Sequence `number` of those that train, or of those that validate: tokens, with labels where `scored` < 1."""
        tokens, labels = self.labelled(number, validates)
        return tokens if self.scored == 1 else np.stack([tokens, labels])

    def labelled(self, number: int, validates: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Tokens and labels of a sequence, each ``(position,)``."""
        random = np.random.default_rng((LANGUAGE, self.seed, validates, number))  # not the draws that mix data
        lead, fresh = 0, self.length
        if self.period is not None:
            lead = int(random.integers(self.lead + 1))
            fresh = lead + int(np.exp(random.uniform(np.log(self.period[0]), np.log(self.period[1] + 1))))
        tokens = self._tokens(random.random(fresh)).tolist()
        drawn, which = random.random(fresh).tolist(), random.integers(SUCCESSORS, size=fresh).tolist()
        known = [False] * fresh
        for step in range(1, fresh):
            if drawn[step] < self.bigrams:
                tokens[step], known[step] = self.successors[0][tokens[step - 1]][which[step]], True
            elif step > 1 and drawn[step] < self.bigrams + self.skip_bigrams:
                tokens[step], known[step] = self.successors[1][tokens[step - 2]][which[step]], True
        at = np.arange(self.length)
        places = np.where(at < fresh, at, lead + (at - lead) % (fresh - lead))
        found = np.asarray(tokens)[places]
        enter = np.asarray(known)[places] | (at > fresh)
        enter |= random.random(self.length) < self.scored
        return found, np.where(enter, found, IGNORED)
