"""Random models of the families, and the task that they are tested with."""

from headwise.studies import RepeatedTokens
from tests.oracles import raw_families

TASK = RepeatedTokens(n=3, length=6, seed=3)
NAMES = [*raw_families.MODELS]
