"""Where, what and how: sites, interventions, grids, and the engine that runs them. Knows no metric and no picture.

``import headwise as hw`` gives the names of declarations, ``Family`` and ``register``. Only here are ``FAMILIES``, the
model families that are known, and what the table of a new one may use: ``standard_sizes``, ``standard_scaling``,
``windows_by_layer``, ``windows_everywhere``.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from .declare.circuits import Circuit as Circuit
    from .declare.components import Component as Component
    from .declare.edges import EdgePatches as EdgePatches
    from .declare.edits import Compose as Compose
    from .declare.edits import Intervention as Intervention
    from .declare.edits import MeanAblate as MeanAblate
    from .declare.edits import Patch as Patch
    from .declare.edits import ResampleAblate as ResampleAblate
    from .declare.edits import ZeroAblate as ZeroAblate
    from .declare.graph import Graph as Graph
    from .declare.grid import Grid as Grid
    from .declare.paths import PathPatch as PathPatch
    from .declare.sites import Head as Head
    from .declare.sites import Layer as Layer
    from .declare.sites import Logits as Logits
    from .declare.sites import Neuron as Neuron
    from .declare.sites import Site as Site
    from .declare.steering import Add as Add
    from .declare.steering import Knockout as Knockout
    from .declare.steering import ProjectOut as ProjectOut
    from .declare.steering import Scale as Scale
    from .models.architectures import FAMILIES as FAMILIES
    from .models.architectures import Family as Family
    from .models.architectures import register as register
    from .models.architectures import standard_scaling as standard_scaling
    from .models.architectures import standard_sizes as standard_sizes
    from .models.architectures import windows_by_layer as windows_by_layer
    from .models.architectures import windows_everywhere as windows_everywhere
else:
    __getattr__, __dir__, __all__ = _lazy_names(
        __name__,
        {
            ".declare.circuits": "Circuit",
            ".declare.edges": "EdgePatches",
            ".declare.components": "Component",
            ".declare.edits": "Compose Intervention MeanAblate Patch ResampleAblate ZeroAblate",
            ".declare.graph": "Graph",
            ".declare.grid": "Grid",
            ".declare.paths": "PathPatch",
            ".declare.sites": "Head Layer Logits Neuron Site",
            ".declare.steering": "Add Knockout ProjectOut Scale",
            ".models.architectures": "FAMILIES Family register standard_scaling standard_sizes windows_by_layer "
            "windows_everywhere",
        },
    )
