"""What a number belongs to: the model in hand, as facts that can be stored, sent and compared. Owns `Identity`.

Two models are the same where every fact agrees: configuration, modules, buffers, weights, tokenizer, family, number
format, and the *fingerprint*, what the model computes on one short fixed prompt. The facts are exact. The fingerprint
is compared up to `TOLERANCE`; it can show that two models differ and never that they are the same, since it cannot see
a window of attention longer than its prompt, an embedding of another token, or a step of training that is lost in
rounding. `identify` reads it; this imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""How far fingerprints of one model may lie apart, by number format: shares of the root mean square of the vector."""
DIGITS = 12


@dataclass(frozen=True)
class Fingerprint:
    """What a model computes on one short prompt.

    Attributes
    ----------
    values : tuple of tuples of tuples of float
        ``(layer + 1, position, 1 + direction)``, see `traces.sketch`: of the residual stream after each block, and of
        the logits.
    """

    values: tuple[tuple[tuple[float, ...], ...], ...]

    @classmethod
    def of(cls, values: Any) -> Fingerprint:
        """From an array, rounded to what is stored."""
        rounded = (
            tuple(tuple(float(f"{number:.{DIGITS}g}") for number in row) for row in vectors)
            for vectors in np.asarray(values, dtype=np.float64).tolist()
        )
        return cls(tuple(rounded))

    def unlike(self, other: Fingerprint, dtype: str) -> str:
        """Where two fingerprints lie farther apart than rounding takes them, in words; empty where they do not."""
        one, two = np.array(self.values), np.array(other.values)
        if one.shape != two.shape:
            return "the fingerprints have other shapes"
        with np.errstate(invalid="ignore"):
            size = np.maximum(np.maximum(np.abs(one[..., :1]), np.abs(two[..., :1])), 1e-30)
            gap = np.where(np.isnan(one) & np.isnan(two) | (one == two), 0.0, np.abs(one - two) / size).max(axis=(1, 2))
        wide = ~(gap <= TOLERANCE.get(dtype, TOLERANCE["float32"]))
        if not wide.any():
            return ""
        at = int(np.argmax(wide))
        where = f"the residual stream after block {at}" if at < len(gap) - 1 else "the logits"
        return f"what it computes on a fixed prompt differs, first in {where}, by {gap[at]:.2g} of its size"


@dataclass(frozen=True)
class Identity:
    """What a number belongs to. A fact that is not known, as in older files, is empty.

    Attributes
    ----------
    family, dtype, attention : str
        ``attention`` is the implementation that transformers uses; it changes rounding only.
    configuration : str
        JSON.
    modules_hash : str
        Of the tree of module classes with their plain attributes, hooks, and code that replaces theirs.
    buffers, weights, tokenizer : str
        Hashes; ``weights`` is `Model.weight_hash`.
    fingerprint : Fingerprint or None
    modules : mapping
        Path of a module to its class and the hash of what is told of it; not stored.
    """

    family: str
    dtype: str
    attention: str
    configuration: str
    modules_hash: str
    buffers: str
    weights: str
    tokenizer: str
    fingerprint: Fingerprint | None
    modules: Mapping[str, str] = field(default_factory=dict, compare=False)

    @cached_property
    def exact(self) -> dict[str, Any]:
        """All facts but the fingerprint, which can be hashed into names."""
        from ..traced.structure import without_names  # which imports torch

        configuration = without_names(self.configuration) if self.configuration else {}
        return {
            "family": self.family,
            "dtype": self.dtype,
            "attention": self.attention,
            "configuration": configuration,
            "modules": self.modules_hash,
            "buffers": self.buffers,
            "weights": self.weights,
            "tokenizer": self.tokenizer,
        }

    def attrs(self) -> dict[str, str]:
        """As attributes of a result."""
        values = {} if self.fingerprint is None else {"fingerprint": json.dumps(self.fingerprint.values)}
        return {
            "model_family": self.family,
            "configuration": self.configuration,
            "weight_hash": self.weights,
            "buffer_hash": self.buffers,
            "module_hash": self.modules_hash,
            "tokenizer_hash": self.tokenizer,
            "dtype": self.dtype,
            "attention": self.attention,
            **values,
        }

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any]) -> Identity:
        """What a result says of the model that it was made with."""
        return cls(
            family=str(attrs.get("model_family", "")),
            dtype=str(attrs.get("dtype", "")),
            attention=str(attrs.get("attention", "")),
            configuration=str(attrs.get("configuration", "")),
            modules_hash=str(attrs.get("module_hash", "")),
            buffers=str(attrs.get("buffer_hash", "")),
            weights=str(attrs.get("weight_hash", "")),
            tokenizer=str(attrs.get("tokenizer_hash", "")),
            fingerprint=stored_fingerprint(attrs.get("fingerprint")),
        )

    def differences(
        self, other: Identity, here: str = "here", there: str = "there", but: Iterable[str] = ()
    ) -> list[str]:
        """How this model differs from another, in words; facts that one of the two does not know are left out.

        Parameters
        ----------
        other : Identity
        here, there : str
            What the two are called, behind their values.
        but : iterable of str
            Facts that do not matter.

        Returns
        -------
        list of str
            A text for each fact that differs; empty where none does.
        """
        found = []
        if "configuration" not in but:
            found += unequal_configurations(self.configuration, other.configuration, here, there)
        if "modules" not in but and _comparable(self.modules_hash, other.modules_hash):
            found += _unequal_modules(self, other, here, there)
        for name in ("family", "dtype", "attention", "buffers", "weights", "tokenizer"):
            one, two = getattr(self, name), getattr(other, name)
            if name not in but and one != two and _comparable(one, two):
                found.append(f"{name} {one} {here}, {two} {there}")
        if "fingerprint" not in but and self.fingerprint is not None and other.fingerprint is not None:
            unlike = self.fingerprint.unlike(other.fingerprint, self.dtype)
            found += [unlike] if unlike else []
        return found

    def unknown(self, other: Identity) -> list[str]:
        """Facts in which it cannot be compared with another: one of them lacks these, or knows them in another way."""
        facts = {"modules": "modules_hash", "buffers": "buffers", "weights": "weights"}
        found = [] if self.configuration and other.configuration else ["configuration"]
        found += [name for name, one in facts.items() if not _comparable(getattr(self, one), getattr(other, one))]
        return found + ([] if self.fingerprint and other.fingerprint else ["fingerprint"])


SHOWN = 3
"""Differences of one kind that are told; the rest is counted."""


def stored_fingerprint(text: object) -> Fingerprint | None:
    """The fingerprint in an attribute of a result or part; None where there is none that can be read."""
    try:
        values = np.array(json.loads(str(text)), dtype=np.float64)
    except (ValueError, TypeError, RecursionError):
        return None
    return Fingerprint.of(values) if values.ndim == 3 else None


def _comparable(one: str, two: str) -> bool:
    """Whether both are known; what a server samples or names is not comparable with what is read whole here."""
    kinds = [text.partition(":")[0] if ":" in text else "" for text in (one, two)]
    return bool(one and two) and kinds[0] == kinds[1]


def unequal_configurations(one: str, two: str, here: str = "here", there: str = "there") -> list[str]:
    """How two configurations differ, in words; an entry that only one has comes with another version of transformers.

    Parameters
    ----------
    one, two : str
        JSON; empty where the configuration is not known, and then nothing differs.
    here, there : str
        What the two are called, behind their values.

    Returns
    -------
    list of str
        One text with the first `SHOWN` entries that differ; empty where none does.
    """
    from ..traced.structure import without_names

    if not one or not two:
        return []
    try:
        first, second = without_names(one), without_names(two)
    except (ValueError, AttributeError, RecursionError):
        return ["configuration that cannot be read"]
    differ = [
        f"{name} {json.dumps(first[name])} {here}, {json.dumps(second[name])} {there}"
        for name in sorted({*first} & {*second})
        if first[name] != second[name]
    ]
    return [f"configuration ({_some(differ)})"] if differ else []


def _unequal_modules(one: Identity, two: Identity, here: str, there: str) -> list[str]:
    if one.modules_hash == two.modules_hash:
        return []
    if not one.modules or not two.modules:
        return [f"modules (hash {one.modules_hash} {here}, {two.modules_hash} {there})"]
    differ = []
    for path in sorted({*one.modules, *two.modules}):
        kinds = [modules.get(path, "nothing").partition(" ") for modules in (one.modules, two.modules)]
        if kinds[0] != kinds[1]:
            both = f"{kinds[0][0]} {here}, {kinds[1][0]} {there}"
            same = f"{kinds[0][0]} with other attributes, hooks or code {there}"
            differ.append(f"{path or 'the model'} is {same if kinds[0][0] == kinds[1][0] else both}")
    return [f"modules ({_some(differ)})"]


def _some(texts: list[str]) -> str:
    more = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {more} more" if more > 0 else "")
