"""The questions: tasks, measurements and studies. Puts interventions and metrics together, labels, stores, draws.

- ``RepeatedTokens``, ``Prompts``: tasks, that is which prompts and what counts as right
- ``measure(model, task, what, metrics)``: what interventions do
- ``plan(model, task, what, metrics)``: what that would cost, explained before it runs
- ``capture(model, task, sites)``: activations and patterns
- ``effect(ds, name)``, ``normalized(ds, name)``: changes, derived from a measurement
- ``compare_estimates(model, task, what, metric)``: how near estimates from gradients come to what is exact
- ``composition_scores(model)``: q-, k- and v-composition between every pair of heads
- ``InductionStudy(...).run(model)``: the whole induction-head analysis; ``describe_heads(model, task)``: its first part
- ``write_netcdf(result, path)``, ``open_tree(path)``: results on disk; ``write_report(result, path)``: one HTML file
- ``Results(folder)``: a folder of results as a table, with queries; ``open_result(path)``: one of them, as plain xarray
- ``summary(result)``: what one says, in short; ``table(result, variable)``: a variable as a DataFrame
- ``rerun(path)``: whether what is stored comes out again
- ``plots``: pictures of all of these

Names are resolved when they are first used, so that importing a task does not import torch or HoloViews;
``help(measure)`` says the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import plots
    from .activations import capture
    from .again import rerun
    from .agreement import Agreement
    from .batch import Batch
    from .catalogue.cells import table
    from .catalogue.folder import Results
    from .catalogue.reading import open_result
    from .catalogue.summary import Summary, summary
    from .composition import composition_scores
    from .estimates import compare_estimates
    from .heads import describe_heads
    from .induction import InductionStudy
    from .measurement import measure, plan
    from .report.writing import write_report
    from .results import effect, normalized, open_tree, write_netcdf
    from .tasks import Prompts, RepeatedTokens

_WHERE = {
    "Agreement": ".agreement",
    "InductionStudy": ".induction",
    "Results": ".catalogue.folder",
    "capture": ".activations",
    "measure": ".measurement",
    "plan": ".measurement",
    "effect": ".results",
    "normalized": ".results",
    "open_tree": ".results",
    "rerun": ".again",
    "open_result": ".catalogue.reading",
    "Summary": ".catalogue.summary",
    "summary": ".catalogue.summary",
    "table": ".catalogue.cells",
    "write_netcdf": ".results",
    "write_report": ".report.writing",
    "Batch": ".batch",
    "compare_estimates": ".estimates",
    "composition_scores": ".composition",
    "describe_heads": ".heads",
    "Prompts": ".tasks",
    "RepeatedTokens": ".tasks",
}

__all__ = [
    "Agreement",
    "Batch",
    "InductionStudy",
    "Prompts",
    "RepeatedTokens",
    "Results",
    "Summary",
    "capture",
    "compare_estimates",
    "composition_scores",
    "describe_heads",
    "effect",
    "measure",
    "normalized",
    "open_result",
    "open_tree",
    "plan",
    "plots",
    "rerun",
    "summary",
    "table",
    "write_netcdf",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "plots":
        return import_module(".plots", __name__)
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
