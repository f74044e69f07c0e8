"""Pictures of results: each takes a Dataset or DataArray and returns a HoloViews element of the Bokeh backend.

Labels and units are read from attributes where there are any, so a dataset that was built by hand draws as well as one
that was measured. Elements combine with ``+`` and ``*`` and take ``.opts``. `picture` chooses one by the dims of a
variable; `save` writes one as HTML, PNG or SVG. Layer 0 is at the bottom of every head grid.

What `measure` gives for one metric stands for the change of that metric, where a picture takes one variable and none is
named. A result of `InductionStudy`, or a part such as ``tree["heads"]``, stands for the part that has what is drawn.

In a notebook they show themselves, with no network; ``hv.extension(...)`` has HoloViews show them its way instead.

Examples
--------
>>> import numpy as np, xarray as xr
>>> scores = xr.DataArray(np.eye(2), dims=("layer", "head"), name="score")
>>> picture = hw.plots.head_grid(scores, title="a score of each head")
>>> hw.plots.save(picture, "scores.html").name
'scores.html'
"""

from .ablation import ablation_grids, sets_against_null, zero_against_mean
from .attention import attention, attention_row
from .attention_viewer import attention_viewer
from .choice.auto import picture
from .circuits.curves import circuit_curve, edge_inclusion
from .circuits.graph import circuit_graph
from .circuits.heads import kept_by_heads
from .composition import causal_check, composition_matrix, composition_strip
from .composition_graph import composition_graph
from .curves import along, by_position, gains_by_bin, ranked_conditions
from .direct import direct_and_copying
from .estimates import estimate_against_exact
from .export.notebook import show_in_notebooks as _show_in_notebooks
from .export.save import save
from .formation import change_points, formation
from .grids import grid, layer_by_position
from .heads import head_grid, head_grids, ranked_heads
from .inspection.activations import activations
from .inspection.attribution import attribution
from .inspection.circuits import eigenvalue_plane, token_bars
from .inspection.predictions import predictions, token_grid
from .patching import path_grids, qkv_grids, qkv_of_set
from .steps import head_grid_over_steps, over_steps
from .text.heads import heads_on_text
from .text.pattern import attention_in_text
from .word_lists import words_agreement, words_grid, words_table

__all__ = [
    "ablation_grids",
    "activations",
    "along",
    "attention",
    "attention_in_text",
    "attention_row",
    "attention_viewer",
    "attribution",
    "by_position",
    "causal_check",
    "change_points",
    "circuit_curve",
    "circuit_graph",
    "composition_graph",
    "composition_matrix",
    "composition_strip",
    "direct_and_copying",
    "edge_inclusion",
    "eigenvalue_plane",
    "estimate_against_exact",
    "formation",
    "gains_by_bin",
    "grid",
    "head_grid",
    "head_grid_over_steps",
    "head_grids",
    "heads_on_text",
    "kept_by_heads",
    "layer_by_position",
    "over_steps",
    "path_grids",
    "picture",
    "predictions",
    "qkv_grids",
    "qkv_of_set",
    "ranked_conditions",
    "ranked_heads",
    "save",
    "sets_against_null",
    "token_bars",
    "token_grid",
    "words_agreement",
    "words_grid",
    "words_table",
    "zero_against_mean",
]

_show_in_notebooks()


def __dir__() -> list[str]:
    return __all__
