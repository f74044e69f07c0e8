"""From the normed stream to what metrics make of its logits. Runs inside a trace: plain functions."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from .activations import pattern_between, split_heads
from .projections import combine, is_readable

if TYPE_CHECKING:
    from .specs import DirectPart, DirectSpec, FrozenNorm, Kernel, LogitsSpec, ModelParts, Points, ReadSite, Tail


def logits_kernels(
    normed: torch.Tensor, unembed: Any, spec: LogitsSpec, examples: int, *, biased: bool = True
) -> dict[str, torch.Tensor]:
    """Compute logits, some rows at a time, and what the kernels make of them.

    Where only the logits of some tokens are wanted, the kernels find them in the order of the tokens. All logits are
    computed for them too, if the last layer is more than its weight or its weight is elsewhere.

    Parameters
    ----------
    normed : tensor (row, scored, d_model)
    unembed : nnsight handle
        The last layer.
    spec : LogitsSpec
    examples : int
        Rows are conditions times examples.
    biased : bool
        Whether the bias of the last layer counts, which is no part's own.

    Returns
    -------
    dict
        Kernel name to values ``(row, scored)``.
    """
    found: dict[str, list[torch.Tensor]] = {kernel["name"]: [] for kernel in spec["kernels"]}
    tokens = spec["tokens"]
    every = tokens is None or not is_readable(spec["apart"], unembed)
    columns = None if every else unembed.weight[tokens]
    bias = getattr(unembed, "bias", None) if columns is not None and biased else None
    nothing = unembed(torch.zeros_like(normed[:1, :1])) if columns is None and not biased else None
    size = spec["rows_of_all"] if every else spec["rows"]
    for start in range(0, normed.shape[0], size):
        part = normed[start : start + size]
        rows = torch.arange(start, start + part.shape[0], device=part.device) % examples
        if columns is None:
            logits = unembed(part) if nothing is None else unembed(part) - nothing
            logits = logits if tokens is None else logits.gather(-1, tokens[rows])
        else:
            logits = (columns[rows] @ part.unsqueeze(-1)).squeeze(-1)
            logits = logits if bias is None else logits + bias[tokens][rows]
        logits = after_unembedding(logits, spec["tail"])
        for kernel in spec["kernels"]:
            given = {name: value[rows] for name, value in kernel["arguments"].items()}
            found[kernel["name"]].append(kernel["function"](logits, **given))
    return {name: torch.cat(values) for name, values in found.items()}


def after_unembedding(logits: torch.Tensor, tail: Tail) -> torch.Tensor:
    """What a model makes of the logits of its unembedding: scaled or capped."""
    if tail is None:
        return logits
    before, capped, after = tail
    logits = logits * before
    return (logits.tanh() if capped else logits) * after


def with_base_logits(spec: LogitsSpec, logits: torch.Tensor | None) -> LogitsSpec:
    """`spec` with logits ``(example, scored, token)`` given to the kernels that compare with the base run."""
    if logits is None:
        return spec
    kernels: list[Kernel] = [
        {**kernel, "arguments": {**kernel["arguments"], "base_logits": logits}}
        if kernel["name"] in spec["compare"]
        else kernel
        for kernel in spec["kernels"]
    ]
    return {**spec, "kernels": kernels}


def frozen_norm(norm: Any, last: torch.Tensor, centred: bool) -> FrozenNorm:
    """The final norm that goes on dividing by what it divides by for the whole stream. At least float32.

    What it multiplies by is found by calling it, up to a factor, and the factor from what it made of the stream.

    Parameters
    ----------
    norm : callable
    last : tensor (example, scored, d_model)
        The stream after the last block.
    centred : bool
        Whether the norm takes the mean away.

    Returns
    -------
    FrozenNorm
    """
    wide = torch.promote_types(last.dtype, torch.float32)
    shift = norm(torch.zeros_like(last[:1, :1])).to(wide)
    signs = 1.0 - 2.0 * (torch.arange(last.shape[-1], device=last.device) % 2)
    middle = signs - signs.mean() if centred else signs
    gain = (norm(signs.to(last.dtype)[None, None]).to(wide) - shift) / middle
    whole = last.to(wide)
    whole = (whole - whole.mean(-1, keepdim=True) if centred else whole) * gain
    normed = norm(last).to(wide) - shift
    scale = (normed * whole).sum(-1, keepdim=True) / (whole * whole).sum(-1, keepdim=True)
    return {"gain": gain, "scale": scale, "shift": shift, "normed": normed}


def heads_alone(
    parts: ModelParts, frozen: FrozenNorm, layer: int, z: torch.Tensor, added: torch.Tensor | None = None
) -> torch.Tensor:
    """What the frozen norm makes of what each head of a layer writes, without the norm's shift.

    Parameters
    ----------
    parts : ModelParts
    frozen : FrozenNorm
    layer : int
    z : tensor (example, scored, head * d_head)
    added : tensor (example, scored, head, d_model), optional
        What is added to what they write.

    Returns
    -------
    tensor (head * example, scored, d_model)
    """
    size, made = parts["d_head"], []
    for head in range(parts["heads"]):
        columns = slice(head * size, (head + 1) * size)
        written = combine(parts, parts["blocks"][layer], z[..., columns], columns).to(frozen["scale"].dtype)
        written = written if added is None else written + added[:, :, head]
        written = written - written.mean(-1, keepdim=True) if parts["centred"] else written
        made.append((written * frozen["gain"] * frozen["scale"]).to(z.dtype))
    return torch.cat(made)


def direct_shares(
    parts: ModelParts, points: Points, out_of: dict[int, Any], spec: DirectSpec, device: Any
) -> torch.Tensor:
    """What each part of the model adds to a linear function of the logits, the final norm frozen.

    The norm divides by what it divides by for the whole stream; then it is linear, and so is everything after it.

    Parameters
    ----------
    parts : ModelParts
    points : Points
        The stream after the last block; and, of the whole model, the stream before the first block, the position
        embedding, and of each block ``z``, ``attn_out`` and ``mlp_out``, ``(example, position, width)``; of parts that
        are looked into, ``mlp_post``, or ``qkv`` and ``rotated``.
    out_of : dict of int to tensor (head, d_head, d_model)
        ``W_O`` of layers.
    spec : DirectSpec
    device : torch.device

    Returns
    -------
    tensor (source + 1, example, scored)
        Embedding, position embedding (where there is one); for each layer its heads and its MLP; the biases; or the
        neurons and keys of the parts that are looked into. And last the function itself. At least float32.
    """
    at, layers = spec["scored"], parts["layers"]
    last = points[(layers - 1, "resid_post")][:, at].to(device)
    wide = torch.promote_types(last.dtype, torch.float32)

    def stream(layer: int, point: str) -> torch.Tensor:
        return points[(layer, point)][:, at].to(device, wide)

    direction, said, bias = _along(parts, last, spec, device)
    if spec["parts"] is not None:
        inside: list[torch.Tensor] = []
        for part in spec["parts"]:
            if part["pattern"] is None:
                post = stream(part["layer"], "mlp_post")
                inside += by_neuron(parts, part, post, direction).unbind(-1)
            else:
                qkv, rotated = (points[(part["layer"], point)].to(device) for point in ("qkv", "rotated"))
                matrix = out_of[part["layer"]][part["head"]].to(device, wide)
                inside += by_key(part, qkv.to(wide), rotated, at, direction @ matrix.T).unbind(-1)
        return torch.stack([*inside, said])
    position = [stream(0, "pos_embed")] if (0, "pos_embed") in points else []
    found = [((stream(0, "resid_pre") - sum(position)) * direction).sum(-1)]
    found += [(one * direction).sum(-1) for one in position]
    for layer in range(layers):
        by_head = torch.einsum("esm,hdm->eshd", direction, out_of[layer].to(device, wide))
        heads = (split_heads(stream(layer, "z"), parts["heads"]) * by_head).sum(-1)
        bias = bias + (stream(layer, "attn_out") * direction).sum(-1) - heads.sum(-1)
        found += [*heads.unbind(-1), (stream(layer, "mlp_out") * direction).sum(-1)]
    return torch.stack([*found, bias.expand_as(found[0]), said])


def shares_of_rows(
    parts: ModelParts,
    points: Points,
    before: Points,
    added: dict[int, torch.Tensor],
    out_of: dict[int, Any],
    spec: DirectSpec,
    device: Any,
) -> torch.Tensor:
    """`direct_shares` of the whole model in the rows of a pass, with what interventions write.

    Parameters
    ----------
    parts : ModelParts
    points : Points
        At the scored positions, ``(row, scored, width)``, after what is written there: the embeddings, each ``z`` and
        ``mlp_out``, and the stream after the last block.
    before : Points
        ``z`` and ``attn_out`` of the base run, ``(example, scored, width)``.
    added : dict of int to tensor (row, scored, head, d_model)
        What is added to what the heads of a layer write.
    out_of : dict of int to tensor (head, d_head, d_model)
        ``W_O`` of layers.
    spec : DirectSpec
        Its answers are of the examples.
    device : torch.device

    Returns
    -------
    tensor (row, source + 1, scored)
        The sources as of `direct_shares`; then what no part wrote; and last the function itself.
    """
    last = points[(parts["layers"] - 1, "resid_post")].to(device)
    wide, times = torch.promote_types(last.dtype, torch.float32), len(last) // len(before[(0, "z")])
    direction, said, bias = _along(parts, last, _of_rows(spec, times), device)
    found = [
        (points[(0, name)].to(device, wide) * direction).sum(-1)
        for name in ("embed", "pos_embed")
        if (0, name) in points
    ]
    for layer in range(parts["layers"]):
        by_head = torch.einsum("esm,hdm->eshd", direction, out_of[layer].to(device, wide))
        heads, own = [
            (split_heads(z.to(device, wide), parts["heads"]) * by_head).sum(-1)
            for z in (points[(layer, "z")], before[(layer, "z")].repeat(times, 1, 1))
        ]
        if layer in added:
            heads = heads + torch.einsum("eshm,esm->esh", added[layer].to(device, wide), direction)
        attended = before[(layer, "attn_out")].repeat(times, 1, 1).to(device, wide)
        bias = bias + (attended * direction).sum(-1) - own.sum(-1)
        found += [*heads.unbind(-1), (points[(layer, "mlp_out")].to(device, wide) * direction).sum(-1)]
    parted = torch.stack([*found, bias.expand_as(found[0])], 1)
    return torch.cat([parted, (said - parted.sum(1))[:, None], said[:, None]], 1)


def shares_in_rows(
    parts: ModelParts,
    places: dict[tuple[ReadSite, int | None], torch.Tensor],
    added: dict[int, torch.Tensor],
    out_of: dict[int, Any],
    spec: DirectSpec,
    times: int,
    device: Any,
) -> torch.Tensor:
    """`direct_shares` of the parts that are looked into, in the rows of a pass, with what interventions write.

    Parameters
    ----------
    parts : ModelParts
    places : dict
        Site and head to what is there after what is written: of the stream after the last block, ``z``, ``mlp_post``
        and ``mlp_out``, ``(row, scored, width)``; of patterns ``(row, head, scored, key)``, of values ``(row, key,
        d_head)``.
    added, out_of, spec, device
        As for `shares_of_rows`.
    times : int
        Conditions: the rows are the examples once for each.

    Returns
    -------
    tensor (row, source + 1, scored)
        The sources as of `direct_shares`, 0 for keys that the prompts do not have; behind the parts of a head, and of a
        layer as a whole, what is written to its output instead; and last the function itself.
    """
    last = places[(parts["layers"] - 1, "resid_post"), None].to(device)
    wide = torch.promote_types(last.dtype, torch.float32)
    direction, said, _ = _along(parts, last, _of_rows(spec, times), device)
    found: list[torch.Tensor] = []
    for part in spec["parts"] or []:
        layer, head = part["layer"], part["head"]
        if head is None:
            shares = by_neuron(parts, part, places[(layer, "mlp_post"), None].to(device, wide), direction)
            whole = None if part["neurons"] is not None else places[(layer, "mlp_out"), None].to(device, wide)
            whole = None if whole is None else (whole * direction).sum(-1)
        else:
            in_head = direction @ out_of[layer][head].to(device, wide).T
            weights = places[(layer, "rotated"), head][:, 0].to(device, wide)
            values = places[(layer, "qkv"), part["key_head"]].to(device, wide)
            shares = weights * torch.einsum("esd,ekd->esk", in_head, values)
            whole = (
                split_heads(places[(layer, "z"), None].to(device, wide), parts["heads"])[:, :, head] * in_head
            ).sum(-1)
            if layer in added:
                whole = whole + (added[layer][:, :, head].to(device, wide) * direction).sum(-1)
        found += shares.unbind(-1)
        if head is not None:
            found += [torch.zeros_like(said)] * (spec["keys"] - shares.shape[-1])
        found += [] if whole is None else [whole - shares.sum(-1)]
    return torch.stack([*found, said], 1)


def _of_rows(spec: DirectSpec, times: int) -> DirectSpec:
    """What is asked of the examples, asked of the rows of a pass, which are the examples so many times."""
    answers, others = (None if one is None else one.repeat(times, 1) for one in (spec["answers"], spec["others"]))
    return {**spec, "answers": answers, "others": others}


def _along(
    parts: ModelParts, last: torch.Tensor, spec: DirectSpec, device: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A function of the logits as one of what is written into the stream, the final norm frozen.

    Parameters
    ----------
    parts : ModelParts
    last : tensor (example, scored, d_model)
        The stream after the last block.
    spec : DirectSpec
    device : torch.device

    Returns
    -------
    tuple of tensors
        The direction that what is written is multiplied with, ``(example, scored, d_model)``; the function itself
        ``(example, scored)``; and what the biases of the norm and the unembedding give of it.
    """
    wide = torch.promote_types(last.dtype, torch.float32)
    frozen = frozen_norm(parts["norm"]._module, last, parts["centred"])
    towards, constant = _direction(parts["unembed"]._module, spec, device, wide)
    direction = frozen["gain"] * frozen["scale"] * towards
    direction = direction - direction.mean(-1, keepdim=True) if parts["centred"] else direction
    said = ((frozen["normed"] + frozen["shift"]) * towards).sum(-1) + constant
    return direction, said, (frozen["shift"] * towards).sum(-1) + constant


def by_neuron(parts: ModelParts, part: DirectPart, post: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The share of each neuron, and where all are wanted of the bias after them.

    The down projection is linear: what a neuron writes along the direction is the slope of the projection there.

    Parameters
    ----------
    parts : ModelParts
    part : DirectPart
    post : tensor (example, scored, neuron)
        What the down projection reads.
    direction : tensor (example, scored, d_model)

    Returns
    -------
    tensor (example, scored, source)
    """
    block = parts["blocks"][part["layer"]]._module
    down = operator.attrgetter(parts["paths"]["down"])(block)
    like = next(down.parameters())
    with torch.enable_grad():
        read = torch.zeros_like(post, dtype=like.dtype, device=like.device, requires_grad=True)
        written = down(read)
        (slope,) = torch.autograd.grad(written, read, direction.to(written))
    shares = post * slope.to(post)
    if part["neurons"] is not None:
        return shares[..., part["neurons"]]
    bias = (written.detach().to(direction) * direction).sum(-1, keepdim=True)
    return torch.cat([shares, bias], -1)


def by_key(
    part: DirectPart, qkv: torch.Tensor, rotated: torch.Tensor, at: list[int], direction: torch.Tensor
) -> torch.Tensor:
    """The share of what a head moves from each key.

    Parameters
    ----------
    part : DirectPart
    qkv, rotated : tensor (example, position, width)
    at : list of int
        Scored positions.
    direction : tensor (example, scored, d_head)
        In the head's values.

    Returns
    -------
    tensor (example, scored, key)
    """
    pattern = part["pattern"]
    assert pattern is not None
    weights = pattern_between(rotated, **pattern)[:, 0, at]
    return weights.to(direction) * torch.einsum("esd,ekd->esk", direction, qkv[..., part["value"]])


def _direction(unembed: Any, spec: DirectSpec, device: Any, wide: torch.dtype) -> tuple[torch.Tensor, Any]:
    """What the normed stream is multiplied with, ``(example, scored, d_model)``, and what is added then."""
    if spec["direction"] is not None:
        return spec["direction"].to(device, wide)[None, None], 0.0
    weight, bias, answers, others = unembed.weight, unembed.bias, spec["answers"], spec["others"]
    towards, constant = weight[answers].to(wide), 0.0 if bias is None else bias[answers].to(wide)
    if others is not None:
        towards = towards - weight[others].to(wide)
        constant = constant if bias is None else constant - bias[others].to(wide)
    return towards.detach(), constant
