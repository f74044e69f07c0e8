"""Random models of the families, and the task that they are tested with."""

import pytest

from headwise.studies import RepeatedTokens
from tests.oracles import raw_families, raw_variants

TASK = RepeatedTokens(n=3, length=6, seed=3)
VARIANTS = [*raw_variants.MODELS]
NAMES = [*raw_families.MODELS, *VARIANTS]
OFTEN = ("pythia", "llama", "gpt-neo", "qwen3", "gemma", "gemma2", "gpt-oss")
FEW = [pytest.param(name, marks=() if name in OFTEN else pytest.mark.heavy) for name in NAMES]
"""One model of each kind of block in `make test`; the others, which differ in sizes and windows, are heavy."""
