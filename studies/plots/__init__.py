"""Pictures of results: each takes a Dataset or DataArray and returns a HoloViews element of the Bokeh backend.

Labels and units are read from attributes, so a dataset that was built by hand draws as well as one that was measured.
Elements combine with ``+`` and ``*`` and take ``.opts``; `save` writes one as HTML that opens without a network.
Layer 0 is at the bottom of every head grid.
"""

from .ablation import ablation_grids, sets_against_null, zero_against_mean
from .attention import attention, attention_row
from .composition import causal_check, composition_matrix, composition_strip
from .estimates import estimate_against_exact
from .heads import head_grid, head_grids, ranked_heads
from .patching import qkv_grids, qkv_of_set
from .positions import by_position
from .save import save
from .viewer import attention_viewer
from .words import words_agreement, words_grid, words_table

__all__ = [
    "ablation_grids",
    "attention",
    "attention_row",
    "attention_viewer",
    "by_position",
    "causal_check",
    "composition_matrix",
    "composition_strip",
    "estimate_against_exact",
    "head_grid",
    "head_grids",
    "qkv_grids",
    "qkv_of_set",
    "ranked_heads",
    "save",
    "sets_against_null",
    "words_agreement",
    "words_grid",
    "words_table",
    "zero_against_mean",
]
