"""headwise: declare interventions on a transformer, run them, and get labelled, stored, drawn results.

``import headwise as hw`` gives every name that a user types, and costs nothing: a name is loaded when it is first used.

- models: ``load``, ``shipped``, ``checkpoint_steps``, ``Model``; another family: ``Family``, ``register``
- where: ``Head``, ``Neuron``, ``Layer``, ``Site``, ``Component``, ``Logits``
- what: ``ZeroAblate``, ``MeanAblate``, ``ResampleAblate``, ``Patch``, ``PathPatch``, ``Add``, ``ProjectOut``,
  ``Scale``, ``Knockout``, ``Compose``, ``Intervention``; a labelled family of them: ``Grid``
- edges: ``Graph`` (those of a model), ``Circuit`` (a set of them), ``EdgePatches`` (each alone carries another run),
  ``edge_scores`` (what that changes), ``circuit_sizes``, ``circuit_curve`` (how much circuits keep),
  ``edge_inclusion`` (how sure they are), ``read_mib``, ``write_mib`` (files); all of it, ``CircuitStudy``
- prompts: ``RepeatedTokens``, ``Prompts``, ``Chat``; from text, ``recurring_prompts``; what they draw: ``Batch``
- numbers: ``measure``, ``plan`` (the cost, beforehand), ``capture``, ``predict``, ``direct_logit_attribution``,
  ``logit_lens``, ``difference`` (a vector to steer with), ``weighted_value_norms``, ``compare_estimates``,
  ``composition_scores``, ``circuit_scores``, ``head_circuits``, ``neuron_tokens``, ``describe_heads``,
  ``InductionStudy``, ``TextInduction`` (on text that a model has not read), ``text_heads`` (what heads do there);
  changes: ``effect``, ``normalized``
- training: ``CausalLM``, ``RepeatedTokensData``, ``TextData``, ``MixedData``; a measurement as a value, ``Sweep``; any
  study while a model is trained, ``StudyCallback`` (``TrainerStudyCallback`` for transformers), at ``log_spaced``
  steps, or ``over_checkpoints``; how induction forms, with controls, ``FormationStudy``; on several devices,
  ``FabricExecutor``
- results: ``summary``, ``table``, ``write_netcdf``, ``open_result``, ``Results`` (a folder), ``rerun``,
  ``write_report``; declarations as text: ``to_json``, ``from_json``
- modules: ``metrics``, ``plots``, ``errors``
"""

from typing import TYPE_CHECKING

from .lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from . import errors as errors
    from . import metrics as metrics
    from .interventions import Add as Add
    from .interventions import Circuit as Circuit
    from .interventions import Component as Component
    from .interventions import Compose as Compose
    from .interventions import EdgePatches as EdgePatches
    from .interventions import Family as Family
    from .interventions import Graph as Graph
    from .interventions import Grid as Grid
    from .interventions import Head as Head
    from .interventions import Intervention as Intervention
    from .interventions import Knockout as Knockout
    from .interventions import Layer as Layer
    from .interventions import Logits as Logits
    from .interventions import MeanAblate as MeanAblate
    from .interventions import Neuron as Neuron
    from .interventions import Patch as Patch
    from .interventions import PathPatch as PathPatch
    from .interventions import ProjectOut as ProjectOut
    from .interventions import ResampleAblate as ResampleAblate
    from .interventions import Scale as Scale
    from .interventions import Site as Site
    from .interventions import ZeroAblate as ZeroAblate
    from .interventions import register as register
    from .interventions.load import load as load
    from .interventions.models.checkpoints import checkpoint_steps as checkpoint_steps
    from .interventions.models.locate import shipped as shipped
    from .interventions.models.model import Model as Model
    from .studies import Batch as Batch
    from .studies import CausalLM as CausalLM
    from .studies import Chat as Chat
    from .studies import CircuitStudy as CircuitStudy
    from .studies import FabricExecutor as FabricExecutor
    from .studies import FormationStudy as FormationStudy
    from .studies import InductionStudy as InductionStudy
    from .studies import MixedData as MixedData
    from .studies import Prompts as Prompts
    from .studies import RepeatedTokens as RepeatedTokens
    from .studies import RepeatedTokensData as RepeatedTokensData
    from .studies import Results as Results
    from .studies import StudyCallback as StudyCallback
    from .studies import Sweep as Sweep
    from .studies import TextData as TextData
    from .studies import TextInduction as TextInduction
    from .studies import TrainerStudyCallback as TrainerStudyCallback
    from .studies import capture as capture
    from .studies import circuit_curve as circuit_curve
    from .studies import circuit_scores as circuit_scores
    from .studies import circuit_sizes as circuit_sizes
    from .studies import compare_estimates as compare_estimates
    from .studies import composition_scores as composition_scores
    from .studies import describe_heads as describe_heads
    from .studies import difference as difference
    from .studies import direct_logit_attribution as direct_logit_attribution
    from .studies import edge_inclusion as edge_inclusion
    from .studies import edge_scores as edge_scores
    from .studies import effect as effect
    from .studies import from_json as from_json
    from .studies import head_circuits as head_circuits
    from .studies import log_spaced as log_spaced
    from .studies import logit_lens as logit_lens
    from .studies import measure as measure
    from .studies import neuron_tokens as neuron_tokens
    from .studies import normalized as normalized
    from .studies import open_result as open_result
    from .studies import over_checkpoints as over_checkpoints
    from .studies import plan as plan
    from .studies import plots as plots
    from .studies import predict as predict
    from .studies import read_mib as read_mib
    from .studies import recurring_prompts as recurring_prompts
    from .studies import rerun as rerun
    from .studies import summary as summary
    from .studies import table as table
    from .studies import text_heads as text_heads
    from .studies import to_json as to_json
    from .studies import weighted_value_norms as weighted_value_norms
    from .studies import write_mib as write_mib
    from .studies import write_netcdf as write_netcdf
    from .studies import write_report as write_report
    from .version import __version__ as __version__
else:
    __getattr__, __dir__, __all__ = _lazy_names(
        __name__,
        {
            ".": "errors metrics",
            ".interventions": "Add Circuit Component Compose EdgePatches Family Graph Grid Head Intervention Knockout "
            "Layer Logits MeanAblate Neuron Patch PathPatch ProjectOut ResampleAblate Scale Site ZeroAblate register",
            ".interventions.load": "load",
            ".interventions.models.checkpoints": "checkpoint_steps",
            ".interventions.models.locate": "shipped",
            ".interventions.models.model": "Model",
            ".studies": "Batch CausalLM Chat CircuitStudy FabricExecutor FormationStudy InductionStudy MixedData "
            "Prompts RepeatedTokens RepeatedTokensData Results StudyCallback Sweep TextData TextInduction "
            "TrainerStudyCallback recurring_prompts "
            "capture circuit_curve circuit_scores circuit_sizes compare_estimates composition_scores describe_heads "
            "edge_inclusion edge_scores effect from_json read_mib write_mib "
            "difference direct_logit_attribution head_circuits neuron_tokens predict weighted_value_norms "
            "log_spaced logit_lens measure normalized open_result over_checkpoints plan plots rerun "
            "summary table text_heads to_json write_netcdf write_report",
            ".version": "__version__",
        },
    )
