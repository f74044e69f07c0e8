"""The weights of heads, neurons, embedding and unembedding, read from modules or found by calling them.

Plain functions, as in `traces`.

`block` is a block of the model, or its handle where modules are called.
Matrices are ``(input, output)``, for row vectors.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from .projections import rotary_angles, side_by_side, sides, split_sides, turned
from .rows import call_module, no_tokens
from .structure import is_bare, is_linear

if TYPE_CHECKING:
    from .specs import BlockLayout, CapturedSite, ModelFacts, ModelParts, ReadSite, WeightsRead

FAR = 1e4
"""How far apart the numbers are that a norm is called with, so that what it adds to their variance does not count."""
LARGE = {torch.float16: 2.0**8}
"""What unit vectors are multiplied with, so that the bias of a module does not count beside its weight, by format."""
GAINS = ("norm_1", "q_norm", "k_norm", "attn_norm")


def weights_read(parts: BlockLayout, block: Any) -> list[torch.Tensor | None]:
    """The fields of `HeadWeights`, from the modules of a block: read where they are plain linear layers, else found."""
    paths = parts["paths"]
    linear = {name: operator.attrgetter(paths[name])(block) for name in ("q", "k", "v", "qkv", "out") if name in paths}
    if not all([is_linear(module) for module in linear.values()]):
        return [*matrices_made(parts, block, vector_of(parts, block)), *gains_read(parts, block)]
    matrices = {
        name: module.weight.detach() if parts["transposed"] else module.weight.detach().T
        for name, module in linear.items()
    }
    if parts["layout"] == "apart":
        qkv = [matrices[side] for side in ("q", "k", "v")]
    else:
        all_heads = matrices["qkv"]
        ordered = side_by_side(all_heads, parts["heads"]) if parts["layout"] == "by head" else all_heads
        qkv = list(split_sides(parts, ordered))
    return [*by_head(parts, qkv, matrices["out"]), *gains_read(parts, block)]


def gains_read(parts: BlockLayout, block: Any) -> list[torch.Tensor | None]:
    """What the norms of `GAINS` multiply by, as the table has it; at least float32, in which norms compute."""
    return of_gains(parts, lambda name, size: gain_read(parts, block, name, size))


def of_gains(parts: BlockLayout, gain: Any) -> list[torch.Tensor | None]:
    """The gains of the norms of `GAINS` that there are; ones where nothing stands between the stream and attention.

    Parameters
    ----------
    parts : BlockLayout
    gain : callable
        Takes the name of a norm and how many numbers it takes, and gives its gain.

    Returns
    -------
    list of tensor or None
        Of norms of q and k over all heads at once ``(head, d_head)``.
    """
    heads = {"q_norm": parts["heads"], "k_norm": parts["kv_heads"]}
    found: list[torch.Tensor | None] = []
    for name in GAINS:
        of_head = parts["d_head"] if name in heads else parts["d_model"]
        joint = heads.get(name, 1) if parts["joint_norms"] else 1
        one = gain(name, joint * of_head) if name in parts["paths"] else None
        found.append(one if one is None or joint == 1 else one.reshape(joint, of_head))
    found[0] = torch.ones(parts["d_model"]) if found[0] is None else found[0]
    return found


def gain_read(parts: BlockLayout, block: Any, name: str, size: int) -> torch.Tensor:
    """The gain of a norm: read where that is a plain norm, else found by calling it.

    Parameters
    ----------
    parts : BlockLayout
    block : module
        That the norm's path leads from: a block, or the model.
    name : str
        Of the norm.
    size : int
        Numbers that it takes.

    Returns
    -------
    tensor (size,)
    """
    module = operator.attrgetter(parts["paths"][name])(block)
    weight = getattr(module, "weight", None)
    if not is_bare(module):
        return gain_made(parts, block, name, size, vector_of(parts, block))
    if weight is None:  # as in OLMo
        return torch.ones(size, dtype=torch.float32)
    wide: torch.Tensor = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return wide + parts["gain_offset"]


def vector_of(parts: BlockLayout, block: Any) -> torch.Tensor:
    """A vector of the stream, in the number format and on the device of a block."""
    first = next(block.parameters())
    return torch.zeros(1, parts["d_model"], dtype=first.dtype, device=first.device)


def weights_made(parts: BlockLayout, block: Any, like: torch.Tensor) -> list[torch.Tensor | None]:
    """The same from what the modules make of unit vectors, in the number format of `like`; also inside a trace."""
    return [*matrices_made(parts, block, like), *gains_made(parts, block, like)]


def matrices_made(parts: BlockLayout, block: Any, like: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of `HeadWeights`, from what the modules make of unit vectors."""
    paths, sizes = parts["paths"], (like.shape[-1], parts["heads"] * parts["d_head"])
    large = LARGE.get(like.dtype, 2.0**40)
    with torch.no_grad():
        units, wide = (torch.eye(size, dtype=like.dtype, device=like.device) * large for size in sizes)
        both = zip(sides(parts, block, units), sides(parts, block, -units), strict=True)
        qkv = [half_between(up, down) / large for up, down in both]
        out = half_between(call_module(block, paths["out"], wide), call_module(block, paths["out"], -wide)) / large
    return [one.to(like.dtype) for one in by_head(parts, qkv, out)]


def gains_made(parts: BlockLayout, block: Any, like: torch.Tensor) -> list[torch.Tensor | None]:
    """The gains from calls with numbers that are far apart, in the format of `like`; also inside a trace."""
    return of_gains(parts, lambda name, size: gain_made(parts, block, name, size, like))


def gain_made(parts: BlockLayout, block: Any, name: str, size: int, like: torch.Tensor) -> torch.Tensor:
    """The gain of a norm, from calls with numbers that are far apart.

    Parameters
    ----------
    parts : BlockLayout
    block : nnsight handle or module
    name : str
        Of the norm, one of `GAINS`.
    size : int
        Numbers that the norm takes.
    like : tensor
        Gives the number format and the device.

    Returns
    -------
    tensor (size,)
    """
    order = torch.arange(size, device=like.device)
    far = (FAR * ((1 - 2 * (order % 2)) * (1 + order / size) + 0.25)).to(like.dtype)
    path = parts["paths"][name]
    with torch.no_grad():
        made = half_between(call_module(block, path, far[None]), call_module(block, path, -far[None]))
    normed = far.to(made.dtype)
    normed = normed - normed.mean() if parts["centred"] else normed
    gain: torch.Tensor = made[0] * normed.pow(2).mean().sqrt() / normed
    return gain


def ends_read(parts: BlockLayout, paths: list[str], model: Any, vocabulary: int) -> list[torch.Tensor]:
    """Embedding and unembedding, ``(token, d_model)`` each, and the gain of the last norm ``(d_model,)``.

    Parameters
    ----------
    parts : BlockLayout
    paths : list of str
        Of the embedding of tokens.
    model : module
    vocabulary : int
        Tokens.

    Returns
    -------
    list of tensor
    """
    like = vector_of(parts, operator.attrgetter(paths[0])(model))
    unembed = operator.attrgetter(parts["paths"]["unembed"])(model)
    embed = embedding_made(paths, model, vocabulary, like)
    out = unembed.weight.detach() if is_linear(unembed) else matrix_made(parts, model, "unembed", like).T
    return [embed, out, gain_read(parts, model, "norm", parts["d_model"])]


def ends_made(
    parts: BlockLayout, paths: list[str], model: Any, vocabulary: int, like: torch.Tensor
) -> list[torch.Tensor]:
    """The same from calls, in the number format of `like`; also inside a trace.

    Parameters
    ----------
    parts, paths, vocabulary
        As for `ends_read`.
    model : nnsight handle or module
    like : tensor
        Gives the number format and the device.

    Returns
    -------
    list of tensor
    """
    embed, out = embedding_made(paths, model, vocabulary, like), matrix_made(parts, model, "unembed", like).T
    return [embed, out, gain_made(parts, model, "norm", parts["d_model"], like)]


def embedding_made(paths: list[str], model: Any, vocabulary: int, like: torch.Tensor) -> torch.Tensor:
    """What the embedding makes of each token, with the factor that some families multiply by.

    Parameters
    ----------
    paths : list of str
        Of the embedding.
    model : nnsight handle or module
    vocabulary : int
        Tokens.
    like : tensor
        Gives the device.

    Returns
    -------
    tensor (token, d_model)
    """
    with torch.no_grad():
        return call_module(model, paths[0], torch.arange(vocabulary, device=like.device)[None])[0]


def neurons_read(parts: ModelFacts, block: Any) -> list[torch.Tensor | None]:
    """What neurons read and write.

    Parameters
    ----------
    parts : ModelFacts
    block : module

    Returns
    -------
    list of tensor
        Of ``pre`` and ``up`` ``(d_model, neuron)``, the latter None where the MLP has no gate; of ``down`` ``(neuron,
        d_model)``; and the gain of the norm that they read through.
    """
    names = ("pre", "up", "down") if parts["gated"] else ("pre", "down")
    linear = {name: operator.attrgetter(parts["paths"][name])(block) for name in names}
    gain = torch.ones(parts["d_model"])
    if "norm_2" in parts["paths"]:
        gain = gain_read(parts, block, "norm_2", parts["d_model"])
    if not all([is_linear(module) for module in linear.values()]):
        return [*neurons_made(parts, block, vector_of(parts, block))[:3], gain]
    weights = {name: module.weight.detach() for name, module in linear.items()}
    found = {name: one if parts["transposed"] else one.T for name, one in weights.items()}
    return [found["pre"], found.get("up"), found["down"], gain]


def neurons_made(parts: ModelFacts, block: Any, like: torch.Tensor) -> list[torch.Tensor | None]:
    """The same from calls, in the number format of `like`; also inside a trace."""
    pre = matrix_made(parts, block, "pre", like)
    up = matrix_made(parts, block, "up", like) if parts["gated"] else None
    down = matrix_made(parts, block, "down", like, pre.shape[1])
    gain = torch.ones(parts["d_model"])
    if "norm_2" in parts["paths"]:
        gain = gain_made(parts, block, "norm_2", parts["d_model"], like)
    return [pre, up, down, gain]


def matrix_made(parts: BlockLayout, block: Any, name: str, like: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """The matrix of a module, ``(input, output)``, from what it makes of unit vectors.

    Parameters
    ----------
    parts : BlockLayout
    block : nnsight handle or module
    name : str
        Of the module.
    like : tensor
        Gives the number format and the device.
    size : int, optional
        Numbers that it takes, where they are not ``d_model``.

    Returns
    -------
    tensor (input, output)
    """
    path, large = parts["paths"][name], LARGE.get(like.dtype, 2.0**40)
    with torch.no_grad():
        units = torch.eye(size or parts["d_model"], dtype=like.dtype, device=like.device) * large
        made = half_between(call_module(block, path, units), call_module(block, path, -units)) / large
    return made.to(like.dtype)


def half_between(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Half the difference of what a module makes of something and of its opposite: without bias, at least float32."""
    wide = torch.promote_types(up.dtype, torch.float32)
    return (up.to(wide) - down.to(wide)) / 2


def by_head(parts: BlockLayout, qkv: list[torch.Tensor], out: torch.Tensor) -> list[torch.Tensor]:
    """Matrices with a head as their first axis."""
    d_head = parts["d_head"]
    return [*(one.reshape(len(one), -1, d_head).transpose(0, 1) for one in qkv), out.reshape(-1, d_head, out.shape[1])]


def output_weights(root: Any, parts: ModelParts, sites: list[CapturedSite]) -> dict[ReadSite, Any]:
    """``W_O``, ``(head, d_head, d_model)``, of the layer of each site that is what heads write."""
    wanted = sorted({site["site"] for site in sites if site["kind"] == "head_out"})
    return {(layer, point): weights_of(root, parts, layer)[3] for layer, point in wanted}


def score_weights(root: Any, parts: ModelParts, vocabulary: int, score: Any) -> Any:
    """What ``score(read)`` gives. Nothing is read that it does not ask for.

    Parameters
    ----------
    root, parts
        As for `server_jobs.run_unmodified`.
    vocabulary : int
        Tokens.
    score : callable
        Takes a `WeightsRead`.

    Returns
    -------
    array
        Float64.
    """
    read: WeightsRead = {
        "ends": lambda: ends_of(root, parts, vocabulary),
        "heads": lambda layer: weights_of(root, parts, layer),
        "neurons": lambda layer: neurons_of(root, parts, layer),
        "turned": lambda layer, distance, query: turned_by(root, parts, layer, distance, query),
    }
    return score(read)


def weights_of(root: Any, parts: ModelParts, layer: int) -> list[torch.Tensor | None]:
    """The fields of `HeadWeights` of a layer, read; or what its modules make of unit vectors, where they cannot be."""
    block = parts["blocks"][layer]
    if not parts["apart"]:
        return weights_read(parts, block._module)
    like = parts["like"]
    with torch.no_grad(), root.trace(no_tokens(like.device), use_cache=False):
        made = weights_made(parts, block, like)
    return made


def ends_of(root: Any, parts: ModelParts, vocabulary: int) -> list[torch.Tensor]:
    """Embedding and unembedding ``(token, d_model)``, and the gain of the last norm; read, or found by calls."""
    paths = [path for name, path in parts["embeddings"] if name == "embed"]
    if not parts["apart"]:
        return ends_read(parts, paths, root._module, vocabulary)
    like = parts["like"]
    with torch.no_grad(), root.trace(no_tokens(like.device), use_cache=False):
        made = ends_made(parts, paths, root, vocabulary, like)
    return made


def neurons_of(root: Any, parts: ModelParts, layer: int) -> list[torch.Tensor | None]:
    """What the neurons of a layer read and write, as `neurons_read` gives it; or found by calls."""
    block = parts["blocks"][layer]
    if not parts["apart"]:
        return neurons_read(parts, block._module)
    like = parts["like"]
    with torch.no_grad(), root.trace(no_tokens(like.device), use_cache=False):
        made = neurons_made(parts, block, like)
    return made


def turned_by(root: Any, parts: ModelParts, layer: int, distance: int, query: torch.Tensor) -> torch.Tensor:
    """Queries ``(row, d_head)`` as their rotation has them against keys so many positions before that do not turn.

    Parameters
    ----------
    root, parts
        As for `server_jobs.run_unmodified`.
    layer, distance : int
    query : tensor (row, d_head)

    Returns
    -------
    tensor (row, d_head)
    """
    rotary = parts["rotary"]
    if rotary is None:
        return query
    if parts["apart"]:
        with torch.no_grad(), root.trace(no_tokens(parts["like"].device), use_cache=False):
            made = rotary_angles(parts, parts["like"], distance + 1)[layer]
    else:
        here: Any = {**parts, "rotary": getattr(rotary, "_module", rotary)}
        with torch.no_grad():
            made = rotary_angles(here, vector_of(parts, root._module), distance + 1)[layer]
    if made is None:
        return query
    cos, sin = (one.to(query) for one in (made[0][distance] / made[0][0], made[1][distance] / made[0][0]))
    return turned(query, cos, sin, parts["neighbours"])  # some kinds stretch all vectors alike, which is left out
