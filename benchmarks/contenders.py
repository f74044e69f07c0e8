"""Who takes part. A contender's module is imported when it is its turn, so a missing package leaves out only itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from benchmarks.cases import Job


@dataclass(frozen=True)
class Contender:
    """A way to do the jobs.

    Attributes
    ----------
    name : str
        On the command line and in results.
    title : str
        Head of its column.
    module : str
        Module of this folder.
    package : str
        What must be installed.
    prepare : str
        Function of the module: ``Job -> (places -> array (place, example), or None where it gives no numbers)``. What
        it does is not timed.
    whole : bool
        Whether it always does all conditions, since what it costs is not the sum of its parts.
    """

    name: str
    title: str
    module: str
    package: str
    prepare: str = "prepare"
    whole: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package can be imported here."""
        return find_spec(self.package) is not None

    def left_out(self, case: str) -> str | None:
        """Why it does not do `case`, if it does not."""
        if not self.installed:
            return f"{self.package} is not installed"
        reasons: dict[str, str] = getattr(importlib.import_module(f"benchmarks.{self.module}"), "LEFT_OUT", {})
        return reasons.get(case)

    def ready(self, job: Job) -> Callable[..., Any]:
        """What does the job, with everything loaded."""
        run: Callable[..., Any] = getattr(importlib.import_module(f"benchmarks.{self.module}"), self.prepare)(job)
        return run


CONTENDERS = {
    one.name: one
    for one in (
        Contender("plain", "plain forward passes", "plain", "torch", "prepare_forwards"),
        Contender("headwise", "headwise", "ours", "headwise", whole=True),
        Contender("hooks", "torch hooks by hand", "plain", "torch"),
        Contender("nnsight", "nnsight traces by hand", "traces", "nnsight"),
        Contender("transformer_lens", "TransformerLens", "transformer_lens", "transformer_lens"),
        Contender("pyvene", "pyvene", "pyvene", "pyvene"),
    )
}
YARDSTICK, REFERENCE, OURS = "plain", "hooks", "headwise"
