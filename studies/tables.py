"""The table of everything that is stored as JSON beside results: interventions, tasks. Owns no behaviour."""

from __future__ import annotations

from ..interventions.codec import TABLE, Table
from .tasks import Prompts, RepeatedTokens

TASKS: Table = {**TABLE, "RepeatedTokens": RepeatedTokens, "Prompts": Prompts}
"""Type name to maker for tasks and interventions."""
