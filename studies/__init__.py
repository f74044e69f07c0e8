"""The questions: tasks, measurements and studies. Puts interventions and metrics together, labels, stores, draws.

``import headwise as hw`` gives all of these names but two: ``Summary``, what ``summary`` gives, and ``Agreement``, what
``rerun`` gives. `help(headwise)` says what each is for.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from . import plots as plots
    from .analyses.composition import composition_scores as composition_scores
    from .analyses.heads import describe_heads as describe_heads
    from .analyses.induction import InductionStudy as InductionStudy
    from .catalogue.results import Results as Results
    from .catalogue.summary import Summary as Summary
    from .catalogue.summary import summary as summary
    from .catalogue.table import table as table
    from .circuits.curves import circuit_curve as circuit_curve
    from .circuits.curves import circuit_sizes as circuit_sizes
    from .circuits.edge_scores import edge_scores as edge_scores
    from .circuits.inclusion import edge_inclusion as edge_inclusion
    from .circuits.mib import read_mib as read_mib
    from .circuits.mib import write_mib as write_mib
    from .circuits.study import CircuitStudy as CircuitStudy
    from .dynamics.callback import StudyCallback as StudyCallback
    from .dynamics.checkpoints import over_checkpoints as over_checkpoints
    from .dynamics.formation import FormationStudy as FormationStudy
    from .dynamics.hf_trainer import TrainerStudyCallback as TrainerStudyCallback
    from .dynamics.schedule import log_spaced as log_spaced
    from .inspection.attribution import direct_logit_attribution as direct_logit_attribution
    from .inspection.circuits import circuit_scores as circuit_scores
    from .inspection.circuits import head_circuits as head_circuits
    from .inspection.difference import difference as difference
    from .inspection.lens import logit_lens as logit_lens
    from .inspection.neurons import neuron_tokens as neuron_tokens
    from .inspection.norms import weighted_value_norms as weighted_value_norms
    from .inspection.predict import predict as predict
    from .measuring.capture import capture as capture
    from .measuring.compare import compare_estimates as compare_estimates
    from .measuring.declared import Sweep as Sweep
    from .measuring.effects import effect as effect
    from .measuring.effects import normalized as normalized
    from .measuring.fabric import FabricExecutor as FabricExecutor
    from .measuring.measure import measure as measure
    from .measuring.measure import plan as plan
    from .report.report import write_report as write_report
    from .reproduce.agreement import Agreement as Agreement
    from .reproduce.rerun import rerun as rerun
    from .storage.files import write_netcdf as write_netcdf
    from .storage.reading import open_result as open_result
    from .storage.registry import from_json as from_json
    from .storage.registry import to_json as to_json
    from .tasks.batch import Batch as Batch
    from .tasks.chat import Chat as Chat
    from .tasks.prompts import Prompts as Prompts
    from .tasks.tasks import RepeatedTokens as RepeatedTokens
    from .text.heads import text_heads as text_heads
    from .text.recurring import recurring_prompts as recurring_prompts
    from .text.study import TextInduction as TextInduction
    from .training.causal_lm import CausalLM as CausalLM
    from .training.data import MixedData as MixedData
    from .training.data import RepeatedTokensData as RepeatedTokensData
    from .training.data import TextData as TextData
else:
    __getattr__, __dir__, __all__ = _lazy_names(
        __name__,
        {
            ".": "plots",
            ".analyses.composition": "composition_scores",
            ".analyses.heads": "describe_heads",
            ".analyses.induction": "InductionStudy",
            ".catalogue.results": "Results",
            ".catalogue.summary": "Summary summary",
            ".catalogue.table": "table",
            ".circuits.curves": "circuit_curve circuit_sizes",
            ".circuits.edge_scores": "edge_scores",
            ".circuits.inclusion": "edge_inclusion",
            ".circuits.mib": "read_mib write_mib",
            ".circuits.study": "CircuitStudy",
            ".inspection.attribution": "direct_logit_attribution",
            ".inspection.circuits": "circuit_scores head_circuits",
            ".inspection.difference": "difference",
            ".inspection.lens": "logit_lens",
            ".inspection.neurons": "neuron_tokens",
            ".inspection.norms": "weighted_value_norms",
            ".inspection.predict": "predict",
            ".measuring.capture": "capture",
            ".measuring.compare": "compare_estimates",
            ".measuring.measure": "measure plan",
            ".report.report": "write_report",
            ".reproduce.agreement": "Agreement",
            ".reproduce.rerun": "rerun",
            ".measuring.effects": "effect normalized",
            ".storage.files": "write_netcdf",
            ".storage.reading": "open_result",
            ".storage.registry": "from_json to_json",
            ".dynamics.callback": "StudyCallback",
            ".dynamics.checkpoints": "over_checkpoints",
            ".dynamics.formation": "FormationStudy",
            ".dynamics.hf_trainer": "TrainerStudyCallback",
            ".dynamics.schedule": "log_spaced",
            ".measuring.declared": "Sweep",
            ".measuring.fabric": "FabricExecutor",
            ".text.study": "TextInduction",
            ".training.causal_lm": "CausalLM",
            ".training.data": "MixedData RepeatedTokensData TextData",
            ".tasks.batch": "Batch",
            ".tasks.chat": "Chat",
            ".tasks.prompts": "Prompts",
            ".tasks.tasks": "RepeatedTokens",
            ".text.heads": "text_heads",
            ".text.recurring": "recurring_prompts",
        },
    )
