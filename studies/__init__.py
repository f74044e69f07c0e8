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
    from .analyses.composition import composition_scores
    from .analyses.heads import describe_heads
    from .analyses.induction import InductionStudy
    from .catalogue.results import Results
    from .catalogue.summary import Summary, summary
    from .catalogue.table import table
    from .measuring.capture import capture
    from .measuring.compare import compare_estimates
    from .measuring.effects import effect, normalized
    from .measuring.measure import measure, plan
    from .report.report import write_report
    from .reproduce.agreement import Agreement
    from .reproduce.rerun import rerun
    from .storage.files import open_tree, write_netcdf
    from .storage.reading import open_result
    from .tasks.batch import Batch
    from .tasks.tasks import Prompts, RepeatedTokens

_WHERE = {
    "Agreement": ".reproduce.agreement",
    "InductionStudy": ".analyses.induction",
    "Results": ".catalogue.results",
    "capture": ".measuring.capture",
    "measure": ".measuring.measure",
    "plan": ".measuring.measure",
    "effect": ".measuring.effects",
    "normalized": ".measuring.effects",
    "open_tree": ".storage.files",
    "rerun": ".reproduce.rerun",
    "open_result": ".storage.reading",
    "Summary": ".catalogue.summary",
    "summary": ".catalogue.summary",
    "table": ".catalogue.table",
    "write_netcdf": ".storage.files",
    "write_report": ".report.report",
    "Batch": ".tasks.batch",
    "compare_estimates": ".measuring.compare",
    "composition_scores": ".analyses.composition",
    "describe_heads": ".analyses.heads",
    "Prompts": ".tasks.tasks",
    "RepeatedTokens": ".tasks.tasks",
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
