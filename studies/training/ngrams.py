"""Language models that count: n-grams with interpolated Kneser-Ney smoothing, to compare a trained model with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Ids = np.ndarray[Any, Any]


class _Order(NamedTuple):
    """The counts of the n-grams of one order; an n-gram is one whole number, its tokens the digits."""

    grams: Ids  # sorted
    counts: Ids
    contexts: Ids  # sorted
    totals: Ids  # counts of all n-grams that begin with a context
    kinds: Ids  # how many different n-grams begin with it
    discount: float


class KneserNey:
    """An n-gram model with interpolated Kneser-Ney smoothing (Chen and Goodman 1999, section 3).

    The highest order has counts; a lower one has, for each n-gram, the number of different tokens seen before it. With
    ``h`` the tokens before ``w``, ``h'`` the same without the first of them and ``D = n1 / (n1 + 2 n2)`` of the order
    (``n1`` and ``n2``: how many n-grams have count 1 and 2; 1/2 where ``n1`` is 0)::

        p(w | h) = max(c(h w) - D, 0) / c(h) + D kinds(h) / c(h) p(w | h')

    and ``p(w | h')`` where ``h`` was not seen. Below the unigrams stands 1 / vocabulary.

    Parameters
    ----------
    tokens : array
        Token ids ``(position,)`` to count.
    order : int
        2 for a bigram model.
    vocabulary : int
        Token ids lie below it; ``vocabulary ** order`` must be below 2 ** 63.
    """

    def __init__(self, tokens: Ids, order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        types = [np.unique(_keys(tokens, n, vocabulary), return_counts=True) for n in range(1, order + 1)]
        self.orders = []
        for n in range(1, order + 1):
            if n == order:
                grams, counts = types[n - 1]
            else:
                grams, counts = np.unique(types[n][0] % vocabulary**n, return_counts=True)
            contexts, starts, kinds = np.unique(grams // vocabulary, return_index=True, return_counts=True)
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            discount = once / (once + 2 * twice) if once else 0.5
            self.orders.append(_Order(grams, counts, contexts, np.add.reduceat(counts, starts), kinds, discount))

    def probabilities(self, tokens: Ids) -> Ids:
        """The probability of each token of a text ``(position,)`` after those before it, as far back as counts go."""
        found = np.full(len(tokens), 1 / self.vocabulary)
        for n, one in enumerate(self.orders, 1):
            grams = _keys(tokens, n, self.vocabulary)
            at, seen = _find(one.contexts, grams // self.vocabulary)
            gram, known = _find(one.grams, grams)
            counts = np.where(known, np.maximum(one.counts[gram] - one.discount, 0), 0)
            total = one.totals[at]
            mixed = counts / total + one.discount * one.kinds[at] / total * found[n - 1 :]
            found[n - 1 :] = np.where(seen, mixed, found[n - 1 :])
        return found


def _keys(tokens: Ids, n: int, vocabulary: int) -> Ids:
    """Every n-gram of a text as a whole number."""
    count = max(len(tokens) - n + 1, 0)
    keys = np.zeros(count, dtype=np.int64)
    for offset in range(n):
        keys = keys * vocabulary + tokens[offset : offset + count]
    return keys


def _find(table: Ids, keys: Ids) -> tuple[Ids, Ids]:
    """Where keys stand in a sorted table, and whether they are there."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys
