"""What there is to know of a model family: a table of paths and a few facts.

Imports torch, shape, weights, windows and errors. The tables themselves are in `architectures`; `register` adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Literal, NamedTuple, cast

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import DeclarationError, ModelError, choices
from ..base.shape import Shape
from ..traced.head_weights import weights_read
from ..traced.specs import BlockLayout, CallFacts
from ..traced.structure import class_forward, own_forward
from .windows import unlike_kinds

ENDS = ("", "input"), ("", "output")
MODULES = ("out", "attention", "mlp", "norm", "unembed")
"""Modules that every family names, beside those of q, k and v."""
OF_NEURONS = ("pre", "up", "act", "down")
"""Modules in an MLP, without which its neurons are not found; ``up`` where it is gated."""
STATIC = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary embedding that turn a position alike in prompts of any length."""


CALLED = {
    "sizes": (
        [
            "counts by their usual names in the configuration (num_hidden_layers, num_attention_heads, hidden_size);",
            "gated=False for an MLP of two matrices, parallel=True where attention and MLP read the same stream, and",
            "windows= (windows_everywhere or windows_by_layer, imported likewise) where a query sees some keys only;",
            "what else a few models have is in the docstring of hw.Family",
        ],
        'lambda config: standard_sizes(config) | {"gated": True, "parallel": False, "windows": ()}',
    ),
    "scaling": (["what scores are multiplied by: 1 / sqrt(d_head), if not another number"], "standard_scaling"),
}
"""How the table that an error shows has what is called: comments, and code."""


class HeadWeights(NamedTuple):
    """The weights of all heads of a layer, for row vectors (``x @ W``).

    Attributes
    ----------
    W_Q : tensor (head, d_model, d_head)
    W_K, W_V : tensor (key-value head, d_model, d_head)
    W_O : tensor (head, d_head, d_model)
    gain : tensor (d_model,)
        Of the norm which the layer reads through. Gains are float32 at least.
    q_gain, k_gain : tensor (d_head,), optional
        Of norms of q and k, where there are any; ``(head, d_head)`` where they run over all heads at once.
    out_gain : tensor (d_model,), optional
        Of a norm between attention and the stream.
    """

    W_Q: torch.Tensor
    W_K: torch.Tensor
    W_V: torch.Tensor
    W_O: torch.Tensor
    gain: torch.Tensor
    q_gain: torch.Tensor | None = None
    k_gain: torch.Tensor | None = None
    out_gain: torch.Tensor | None = None


def standard_sizes(config: Any) -> dict[str, Any]:
    """Counts by the names that most configurations use, for a gated MLP and attention without windows.

    Where something differs: ``lambda config: standard_sizes(config) | {"gated": False, "parallel": True}``; where a
    query sees a window of keys only, ``| {"windows": windows_everywhere(config)}`` or `windows_by_layer`.
    """
    heads = config.num_attention_heads
    return {
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "d_model": config.hidden_size,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "d_mlp": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "gated": True,
    }


def standard_scaling(config: Any, layer: int) -> float:
    """One over the root of the width of a head."""
    return float(standard_sizes(config)["d_head"] ** -0.5)


@dataclass(frozen=True)
class Family:
    """A model family. Paths lead from the model, those within a block from the block.

    Attributes
    ----------
    name : str
    model_types : tuple of str
        Values of ``config.model_type`` that it covers.
    blocks : str
        Path of the list of blocks.
    embeddings : mapping
        ``embed`` and, where the model adds one, ``pos_embed``.
    modules : mapping
        Of a block: ``q k v`` or one ``qkv`` (what projects), ``out`` (reads all heads side by side), ``attention`` (its
        output is added to the stream), ``mlp``, and where there are such norms ``norm_1`` (read by attention),
        ``norm_2`` (read by the MLP), ``attn_norm`` and ``mlp_norm`` (between what attention or the MLP gives and the
        stream), ``q_norm k_norm`` (of each head, before rotation); where a number of each head stands beside its
        scores, ``sinks`` (a parameter). Of an MLP ``down(act(pre(x)))``, or with a gate ``down(act(pre(x)) * up(x))``,
        these too; without them its neurons are not found. Of the model: ``norm`` (the last), ``unembed``, and where q
        and k are rotated ``rotary``, which gives cosines and sines of positions, or is a table of sines and cosines
        beside each other; the first half of what turns goes with the second half, if `sizes` does not say otherwise.
    layout : {"apart", "side by side", "by head"}
        Whether q, k and v have modules of their own; or one that writes q of all heads, then k, then v; or one that
        writes q, k and v of one head after the other.
    transposed : bool
        Whether weights are ``(input, output)``, as in GPT-2.
    centred : bool
        Whether norms remove the mean (LayerNorm) or not (RMSNorm).
    gain_offset : float
        What norms add to their weight before they multiply by it.
    sizes : callable
        ``config -> dict`` with what `Shape` takes; what the paths say by themselves is left out. What few models have,
        and is nothing where it is left out: ``cap`` (scores become ``cap * tanh(scores / cap)``), ``tail`` (logits
        times a number, through a hyperbolic tangent or not, times a number), ``joint_norms`` (q_norm and k_norm run
        over all heads at once), ``kinds`` (by layer, what ``rotary`` is called with besides positions; None where it
        turns nothing), ``neighbours`` (neighbouring dimensions turn together), ``paired`` (one angle for each pair).
    scaling : callable
        ``(config, layer) -> float``, the factor of the attention scores.

    Raises
    ------
    DeclarationError
        A path is missing, or `layout` is none of these.

    Examples
    --------
    >>> family = hw.load("words-2l").family
    >>> isinstance(family, hw.Family), family.blocks, family.modules["mlp"]
    (True, 'transformer.h', 'mlp')
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    embeddings: Mapping[str, str]
    modules: Mapping[str, str]
    layout: Literal["apart", "side by side", "by head"] = "apart"
    transposed: bool = False
    centred: bool = False
    gain_offset: float = 0.0
    sizes: Callable[[Any], dict[str, Any]] = standard_sizes
    scaling: Callable[[Any, int], float] = standard_scaling

    def __post_init__(self) -> None:
        projections = ("q", "k", "v") if self.layout == "apart" else ("qkv",)
        missing = [name for name in (*MODULES, *projections) if name not in self.modules]
        if self.layout not in ("apart", "side by side", "by head"):
            raise DeclarationError(
                f"layout={self.layout!r} of {self.name}: possible are 'apart', 'side by side' and 'by head'"
            )
        if missing or "embed" not in self.embeddings:
            raise DeclarationError(f"the table of {self.name} lacks {choices(missing or ['embed'])}")

    @staticmethod
    def template(model: Any) -> str:
        """Code that makes a family known, as Llama is: change what differs in ``print(model)``, and run it.

        Parameters
        ----------
        model : str or PreTrainedModel
            A model of the family, or its ``model_type`` as its configuration has it.

        Returns
        -------
        str
            Python.

        Raises
        ------
        DeclarationError
            `model` is neither.

        Examples
        --------
        >>> print(hw.Family.template("opt").splitlines()[5])
            model_types=('opt',),
        """
        kind = model if isinstance(model, str) else getattr(getattr(model, "config", None), "model_type", None)
        if not isinstance(kind, str):
            raise DeclarationError(
                f"template of {model!r}: give a model of transformers, or its model_type, such as 'opt'"
            )
        return _table(kind)

    def shape(self, config: Any, module: Any = None) -> Shape:
        """The counts of a model with this configuration, and what its layers are like; as `module` is, where given."""
        rotary, pos_embed = "rotary" in self.modules, "pos_embed" in self.embeddings
        try:
            sizes = self.sizes(config)
        except AttributeError as error:
            raise ModelError(f"sizes of the family {self.name} do not fit its configuration: {error}") from error
        named = [self.modules.get(name) for name in OF_NEURONS if name != "up" or sizes.get("gated")]
        block = None if module is None else attrgetter(self.blocks)(module)[0]
        neurons = all(path is not None and (block is None or _has(block, path)) for path in named)
        normed = "attn_norm" in self.modules or "mlp_norm" in self.modules
        sizes |= {"rotary": rotary, "pos_embed": pos_embed, "neurons": neurons}
        return Shape(**sizes, normed_after=normed, sinks="sinks" in self.modules)

    def points(self, shape: Shape) -> list[tuple[str, list[tuple[str, str]]]]:
        """Where what a block makes is found, in forward order: name, and modules with a side of each."""
        projections = [self.modules[name] for name in (("q", "k", "v") if self.layout == "apart" else ("qkv",))]
        neurons = [("mlp_pre", "pre", "output"), ("mlp_up", "up", "output"), ("mlp_post", "down", "input")]
        attention, mlp = self.modules["attention"], self.modules["mlp"]

        def read_by(norm: str, part: str) -> tuple[str, str]:
            """Where the stream enters, which a part reads through a norm, or itself."""
            return self.modules.get(norm, part), "input"

        found = [
            ("resid_pre", [ENDS[0]]),
            ("attn_in", [(self.modules["norm_1"], "output") if "norm_1" in self.modules else (attention, "input")]),
            ("qkv", [(path, "output") for path in projections]),
            ("z", [(self.modules["out"], "input")]),
            ("attn_out", [(self.modules.get("attn_norm", attention), "output")]),
            *([] if shape.parallel else [("resid_mid", [read_by("norm_2", mlp)])]),
            ("mlp_in", [(mlp, "input")]),
            *((name, [(self.modules[part], side)]) for name, part, side in neurons if _has_part(shape, part)),
            ("mlp_out", [(self.modules.get("mlp_norm", mlp), "output")]),
            ("resid_post", [ENDS[1]]),
        ]
        return found

    @property
    def why_called(self) -> str:
        """Why the blocks of a model are called; empty where they are laid open."""
        return ""

    def calls(self) -> CallFacts:
        """What a trace has to know of blocks that are called."""
        return {"called": False, "gives": 0, "factors": {}}

    def layout_of(self, shape: Shape) -> BlockLayout:
        """What `head_weights` and `projections` have to know of a block, in plain words."""
        return {
            "paths": dict(self.modules),
            "layout": self.layout,
            "transposed": self.transposed,
            "centred": self.centred,
            "gain_offset": self.gain_offset,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "d_head": shape.d_head,
            "d_model": shape.d_model,
            "joint_norms": shape.joint_norms,
        }

    def head_weights(self, model: Any, layer: int, shape: Shape) -> HeadWeights:
        """Weights of the heads of a layer."""
        block = attrgetter(self.blocks)(model)[layer]
        return HeadWeights(*cast(Any, weights_read(self.layout_of(shape), block)))


FAMILIES: dict[str, Family] = {}
"""Name to family, of those that are known."""


def register(family: Family) -> Family:
    """Make a family known to `load`; one that is known already under this name is replaced.

    Before the first sweep, capture or composition on a model, a self-check compares what its table leads to with the
    model's own forward pass.

    Parameters
    ----------
    family : Family

    Returns
    -------
    Family
        The same.

    Raises
    ------
    DeclarationError
        It is no `Family`.

    Examples
    --------
    A family that is like another but for some facts:

    >>> from dataclasses import replace
    >>> from headwise.interventions import FAMILIES
    >>> olmo = hw.register(replace(FAMILIES["llama"], name="my-olmo", model_types=("my-olmo",), centred=True))
    >>> olmo.name in FAMILIES
    True
    """
    if not isinstance(family, Family):
        raise DeclarationError(f"a family is registered as a Family, got {family!r}")
    FAMILIES[family.name] = family
    return family


def family_of(config: Any, name: str) -> Family:
    """The family of a Hugging Face configuration.

    Raises
    ------
    ModelError
        Its attention is none that headwise computes, or its family is not known; the text says how to add it.
    """
    found = _known(config)
    if why := unlike_tables(config, found):
        raise ModelError(f"{name} {why}")
    if found is not None:
        return found
    known = choices(model_type for family in FAMILIES.values() for model_type in family.model_types)
    raise ModelError(
        f"{name} is a {config.model_type} model: headwise knows {known}; another family is a table of its parts, "
        f"and print(hw.Family.template({config.model_type!r})) shows one to start from"
    )


def _known(config: Any) -> Family | None:
    """The family whose table names the kind of a model."""
    return next((family for family in FAMILIES.values() if config.model_type in family.model_types), None)


def unlike_tables(config: Any, family: Family | None) -> str:
    """What of a configuration the table of its family does not state, so that it is not right; empty where nothing."""
    for flag, fact in (("attn_logit_softcapping", "cap"), ("final_logit_softcapping", "tail")):
        if getattr(config, flag, None) and not (family and family.sizes(config).get(fact)):
            what = "attention scores" if flag.startswith("attn") else "logits"
            return f"caps its {what} ({flag}={getattr(config, flag)}), which headwise does not do"
    if getattr(config, "use_bidirectional_attention", None):
        return "attends to later tokens too: headwise computes causal attention"
    if why := unlike_kinds(config):
        return why
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [rotary, *(one for one in rotary.values() if isinstance(one, dict))]
    for one in kinds:
        if one.get("rope_type", "default") not in STATIC:
            return (
                f"turns q and k by angles that depend on the length of the prompt (rope_type={one['rope_type']!r}): "
                f"possible are {choices(STATIC)}"
            )
    return ""


def quantisation(config: Any) -> dict[str, Any]:
    """How the weights of a model are quantised; empty where they are not."""
    found = getattr(config, "quantization_config", None) or {}
    facts = dict(found if isinstance(found, dict) else found.to_dict())
    return {key: getattr(value, "value", value) for key, value in facts.items()}


def check_quantised(module: Any, name: str, own: bool) -> None:
    """Refuse quantised weights that headwise cannot measure on without a change of them, or of what they give.

    Parameters
    ----------
    module : PreTrainedModel
    name : str
    own : bool
        Whether headwise itself has read it from a file, and may tell its modules how to compute.

    Raises
    ------
    ModelError
        What a prompt gives depends on the others of its batch; or the first pass packs weights in another way, which
        is undone, with other numbers, when they are read (bitsandbytes 0.50 on processors with AVX512-BF16).
    """
    facts = quantisation(module.config)
    if facts.get("load_in_8bit") and (threshold := facts.get("llm_int8_threshold")):
        raise ModelError(
            f"{name} picks columns by the largest activation in a batch (llm_int8_threshold={threshold:g} of "
            "bitsandbytes), so that each prompt depends on the others: load it with BitsAndBytesConfig("
            "load_in_8bit=True, llm_int8_threshold=0.0)"
        )
    packing = [one for one in module.modules() if getattr(one, "support_avx512bf16_for_cpu", False)]
    if packing and not own and next(module.parameters()).device.type == "cpu":
        raise ModelError(
            f"{name} packs its 4-bit weights in its first pass on this processor, and then reading them changes them: "
            "load it anew and, before it runs, set support_avx512bf16_for_cpu = False in its Linear4bit modules; or "
            "save it to a folder before it runs and give that to load, which does so"
        )
    for one in packing if own else ():
        one.support_avx512bf16_for_cpu = False


def why_called(config: Any) -> str:
    """Why the blocks of a model are called, in a few words; empty where a table describes it."""
    found = _known(config)
    if why := unlike_tables(config, found):
        return f"it {why.partition(', which')[0].partition(': ')[0]}"
    if quantised := quantisation(config):
        return f"its weights are quantised ({quantised['quant_method']})"
    if found is None:
        return f"no table describes {config.model_type} models"
    for flag in ("clip_qkv", "qk_layernorm"):
        if getattr(config, flag, None) and "q_norm" not in found.modules:
            return f"it changes q and k behind their projections ({flag}={getattr(config, flag)})"
    return ""


def replaced_in(family: Family, module: Any) -> str:
    """What stands in the place of the code of blocks or attention, which laid-open blocks would pass by; else empty."""
    for block in attrgetter(family.blocks)(module):
        for part, words in ((block, "its blocks"), (attrgetter(family.modules["attention"])(block), "its attention")):
            if "_hf_hook" in vars(part):  # of accelerate, which moves tensors
                continue
            if own_forward(part) is not None or class_forward(type(part)) is not None:
                return f"{words} have another forward than that of their class"
    if registered_attention(module.config) is not None:
        return f"its attention is a function that was registered as {module.config._attn_implementation!r}"
    return ""


def registered_attention(config: Any) -> Callable[..., Any] | None:
    """The function of attention that somebody registered and a model uses; None where it is one of transformers."""
    name = str(config._attn_implementation)
    function = ALL_ATTENTION_FUNCTIONS.get(name) if name in ALL_ATTENTION_FUNCTIONS.valid_keys() else None
    of_library = function is None or getattr(function, "__module__", "").startswith("transformers.")
    return None if of_library else function


def check_fits(family: Family, model: Any, name: str) -> None:
    """Refuse a model that lacks a module its family names."""
    if family.why_called:
        return
    of_model = {"blocks": family.blocks, **family.embeddings}
    of_model |= {part: path for part, path in family.modules.items() if part in ("norm", "unembed", "rotary")}
    for part, path in of_model.items():
        _find(model, path, f"{family.name} has {part} at {path!r}, where {name} has nothing")
    blocks = attrgetter(family.blocks)(model)
    for part, path in family.modules.items():
        if part not in of_model and part not in OF_NEURONS:
            _find(blocks[0], path, f"{family.name} has {part} of a block at {path!r}, where {name} has nothing")


def _has_part(shape: Shape, part: str) -> bool:
    """Whether the MLPs of a model have a module of `OF_NEURONS`."""
    return shape.neurons and (part != "up" or shape.gated)


def _has(root: Any, path: str) -> bool:
    try:
        attrgetter(path)(root)
    except AttributeError:
        return False
    return True


def _find(root: Any, path: str, otherwise: str) -> None:
    if not _has(root, path):
        raise ModelError(f"{otherwise}: its table does not fit (print the model to see its modules)")


def _table(model_type: str) -> str:
    """Code that registers a family as the table of Llama has it."""
    like = FAMILIES["llama"]
    lines = [
        "import headwise as hw",
        "from headwise.interventions import standard_scaling, standard_sizes",
        "",
        "hw.register(hw.Family(",
        f"    name={model_type!r},",
        f"    model_types=({model_type!r},),",
    ]
    for field in fields(Family):
        value = getattr(like, field.name)
        if field.name in ("name", "model_types"):
            continue
        if isinstance(value, Mapping):
            lines += [f"    {field.name}={{", *(f"        {key!r}: {path!r}," for key, path in value.items()), "    },"]
        else:
            more, shown = CALLED.get(field.name, ([], repr(value)))
            lines += [*(f"    # {line}" for line in more), f"    {field.name}={shown},"]
    return "\n".join([*lines, "))"])
