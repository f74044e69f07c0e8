"""Owns the second opinion on circuits of edges: a forward pass written out in plain torch, each receiver by itself.

Imports torch only, and takes any of transformers' GPT-2, GPT-NeoX (attention and MLP parallel or not) and Llama models,
in eval mode, and token ids (example, position) without padding. Give it float64 weights.

Senders are ``input`` (the token embedding), each head ``a<layer>.h<head>`` (its z times its rows of ``W_O``) and each
MLP ``m<layer>`` (its output, bias included). Receivers are ``a<layer>.h<head><q>``, ``<k>`` and ``<v>`` (where heads
share keys and values, the head of k and v is the key-value head), ``m<layer>`` and ``logits``. A receiver reads the
sum of the senders before it, and of what belongs to nobody: position embeddings, and the output bias of attention in
the layers before it. It puts its own copy of the layer norm over that sum, so norms and their biases are the
receiver's. Value biases are the head's. In a parallel block the MLP reads what the heads of its layer read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Keep = Callable[[str, str], "bool | Tensor"]
"""Whether the edge from a sender to a receiver is kept; a tensor of bool (position, 1) says it by position."""
Score = Callable[[Tensor], Tensor]
"""From logits (example, position, vocabulary) to one number per example, differentiable."""
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Parts:
    """The parts of a model, each as a function of the stream that it reads."""

    def __init__(self, model: Any) -> None:
        self.kind, config = model.config.model_type, model.config
        self.gpt2, self.neox = self.kind == "gpt2", self.kind == "gpt_neox"
        self.body = model.transformer if self.gpt2 else model.gpt_neox if self.neox else model.model
        self.blocks = self.body.h if self.gpt2 else self.body.layers
        self.unembed = model.lm_head if hasattr(model, "lm_head") else model.embed_out
        self.layers, self.heads = len(self.blocks), config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.parallel = self.neox and config.use_parallel_residual
        self.d_head = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def embedding(self, tokens: Tensor) -> Tensor:
        """What the sender ``input`` writes."""
        return (self.body.wte if self.gpt2 else self.body.embed_in if self.neox else self.body.embed_tokens)(tokens)

    def nobody(self, tokens: Tensor, layers: int) -> Tensor:
        """Position embeddings and the output biases of attention of the first so many layers."""
        width = self.unembed.weight.shape[1]
        total = self.unembed.weight.new_zeros(tokens.shape[1], width)
        if self.gpt2:
            total = total + self.body.wpe.weight[: tokens.shape[1]]
        for layer in range(layers):
            bias = self.out(layer).bias
            total = total + (0 if bias is None else bias)
        return total

    def out(self, layer: int) -> Any:
        block = self.blocks[layer]
        return block.attn.c_proj if self.gpt2 else block.attention.dense if self.neox else block.self_attn.o_proj

    def project(self, layer: int, which: str, head: int, stream: Tensor) -> Tensor:
        """q, k or v of one head, rotated where the family does, (example, position, d_head)."""
        block, size = self.blocks[layer], self.d_head
        if self.gpt2:  # columns: q of all heads, then k, then v
            norm, module, at = block.ln_1, block.attn.c_attn, ("qkv".index(which) * self.heads + head) * size
            weight = module.weight[:, at : at + size].T
        elif self.neox:  # rows: q, k and v of head 0, then of head 1
            norm, module = block.input_layernorm, block.attention.query_key_value
            at = (3 * head + "qkv".index(which)) * size
            weight = module.weight[at : at + size]
        else:
            norm, module, at = block.input_layernorm, getattr(block.self_attn, f"{which}_proj"), head * size
            weight = module.weight[at : at + size]
        bias = 0 if module.bias is None else module.bias[at : at + size]
        found = self.normed(norm, stream) @ weight.T + bias
        return found if self.gpt2 or which == "v" else self.rotated(found)

    def normed(self, norm: Any, stream: Tensor) -> Tensor:
        """The layer norm; that of Llama by its formula, since transformers rounds it to float32."""
        if not hasattr(norm, "variance_epsilon"):
            made: Tensor = norm(stream)
            return made
        size = (stream.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return norm.weight * stream / size

    def rotated(self, vectors: Tensor) -> Tensor:
        """By transformers' own cosines and sines; the first part only where rotary embedding is partial."""
        at = torch.arange(vectors.shape[1])[None]
        cos, sin = (part.to(vectors.dtype) for part in self.body.rotary_emb(vectors, at))
        size = cos.shape[-1]
        turned, rest = vectors[..., :size], vectors[..., size:]
        left, right = turned[..., : size // 2], turned[..., size // 2 :]
        return torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, rest], -1)

    def write(self, layer: int, head: int, z: Tensor) -> Tensor:
        """What a head writes into the stream, without bias."""
        weight = self.out(layer).weight if self.gpt2 else self.out(layer).weight.T
        return z @ weight.unflatten(0, (self.heads, -1))[head]

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        block = self.blocks[layer]
        norm = block.ln_2 if self.gpt2 else block.post_attention_layernorm
        return block.mlp(self.normed(norm, stream))

    def logits(self, stream: Tensor) -> Tensor:
        norm = self.body.ln_f if self.gpt2 else self.body.final_layer_norm if self.neox else self.body.norm
        return self.unembed(self.normed(norm, stream))


def senders_before(parts: Parts, receiver: str) -> list[str]:
    """The senders that a receiver reads."""
    last = parts.layers if receiver == "logits" else int(receiver.removeprefix("m").removeprefix("a").split(".")[0])
    found = ["input"]
    for layer in range(last):
        found += [f"a{layer}.h{head}" for head in range(parts.heads)] + [f"m{layer}"]
    if receiver.startswith("m") and not parts.parallel:
        found += [f"a{last}.h{head}" for head in range(parts.heads)]
    return found


def receivers(parts: Parts) -> list[str]:
    found = []
    for layer in range(parts.layers):
        found += [f"a{layer}.h{head}<q>" for head in range(parts.heads)]
        found += [f"a{layer}.h{head}<{which}>" for which in "kv" for head in range(parts.kv_heads)]
        found.append(f"m{layer}")
    return [*found, "logits"]


def edges(model: Any) -> list[tuple[str, str]]:
    """Every edge, receiver by receiver."""
    parts = Parts(model)
    return [(sender, receiver) for receiver in receivers(parts) for sender in senders_before(parts, receiver)]


@dataclass
class Run:
    """What a run computed: logits, what each sender wrote, and the stream that each receiver read."""

    logits: Tensor
    sent: dict[str, Tensor]
    read: dict[str, Tensor]


def forward(
    model: Any,
    tokens: Tensor,
    keep: Keep = lambda _sender, _receiver: True,
    other: Mapping[str, Tensor] | None = None,
    fixed: Mapping[str, Tensor] | None = None,
) -> Run:
    """A run in which an edge that is not kept carries what `other` holds of its sender.

    What `fixed` holds of a sender is what it writes, whatever it reads.
    """
    parts, sent, read = Parts(model), {}, {}
    other, fixed = other or {}, fixed or {}

    def stream(receiver: str, biases: int) -> Tensor:
        total = parts.nobody(tokens, biases)
        for sender in senders_before(parts, receiver):
            kept = keep(sender, receiver)
            if isinstance(kept, Tensor):
                total = total + torch.where(kept, sent[sender], other[sender])
            else:
                total = total + (sent[sender] if kept else other[sender])
        read[receiver] = total
        return total

    def send(sender: str, value: Tensor) -> None:
        sent[sender] = fixed.get(sender, value)

    send("input", parts.embedding(tokens))
    for layer in range(parts.layers):
        made = {}
        for which, count in (("q", parts.heads), ("k", parts.kv_heads), ("v", parts.kv_heads)):
            for head in range(count):
                made[which, head] = parts.project(layer, which, head, stream(f"a{layer}.h{head}<{which}>", layer))
        written = {}
        for head in range(parts.heads):
            group = head // (parts.heads // parts.kv_heads)
            scores = made["q", head] @ made["k", group].transpose(1, 2) / parts.d_head**0.5
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            written[f"a{layer}.h{head}"] = parts.write(layer, head, scores.softmax(-1) @ made["v", group])
        if parts.parallel:
            mlp = parts.mlp(layer, stream(f"m{layer}", layer))
        for sender, value in written.items():
            send(sender, value)
        if not parts.parallel:
            mlp = parts.mlp(layer, stream(f"m{layer}", layer + 1))
        send(f"m{layer}", mlp)
    return Run(parts.logits(stream("logits", parts.layers)), sent, read)


def kept_only(circuit: Sequence[tuple[str, str]]) -> Keep:
    inside = set(circuit)
    return lambda sender, receiver: (sender, receiver) in inside


@torch.no_grad()
def measured(
    model: Any, tokens: Tensor, score: Score, circuit: Sequence[tuple[str, str]], other: Mapping[str, Tensor]
) -> Tensor:
    """The score, (example,), of a circuit: edges outside carry what `other` holds of their sender."""
    return score(forward(model, tokens, kept_only(circuit), other).logits)


@torch.no_grad()
def exact_scores(model: Any, tokens: Tensor, corrupted: Tensor, score: Score) -> dict[tuple[str, str], Tensor]:
    """Score where one edge carries the corrupted run's value and all after it is made anew, minus the clean score."""
    other, clean = forward(model, corrupted).sent, score(forward(model, tokens).logits)
    found = {}
    for edge in edges(model):
        found[edge] = score(forward(model, tokens, lambda *here, edge=edge: here != edge, other).logits) - clean
    return found


def estimated_scores(
    model: Any,
    tokens: Tensor,
    corrupted: Tensor,
    score: Score,
    shares: Sequence[float] = (1.0,),
    at: str = "inputs",
) -> dict[tuple[str, str], Tensor]:
    """EAP and EAP-IG: what the sender's value changes by, times the gradient at the receiver, summed over positions.

    The gradient is the mean over runs, one for each share ``s``. With ``at="inputs"``, ``input`` writes
    ``corrupted + s * (clean - corrupted)`` in a run and the rest follows: EAP is the one run with ``s = 1``. With
    ``at="activations"``, there are such runs for ``input``, for all heads of each layer together and for each MLP, and
    the gradient is the mean over all of them.
    """
    with torch.no_grad():
        clean, dirty = forward(model, tokens).sent, forward(model, corrupted).sent
    parts = Parts(model)
    moved = [["input"]]
    if at == "activations":
        for layer in range(parts.layers):
            moved += [[f"a{layer}.h{head}" for head in range(parts.heads)], [f"m{layer}"]]
    runs = [(senders, share) for senders in moved for share in shares]
    slopes = {receiver: 0.0 for receiver in receivers(parts)}
    for senders, share in runs:
        fixed = {name: (dirty[name] + share * (clean[name] - dirty[name])).requires_grad_() for name in senders}
        run = forward(model, tokens, fixed=fixed)
        names = [name for name in run.read if run.read[name].requires_grad]
        found = torch.autograd.grad(score(run.logits).sum(), [run.read[name] for name in names], allow_unused=True)
        for name, slope in zip(names, found, strict=True):
            slopes[name] = slopes[name] + (0.0 if slope is None else slope.detach() / len(runs))
    return {
        (sender, receiver): ((dirty[sender] - clean[sender]) * slopes[receiver]).sum((1, 2))
        for sender, receiver in edges(model)
    }


def pruned(model: Any, circuit: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Edges on a way from the input to the logits, where a head passes on what any of its q, k and v reads.

    The ways are walked from both ends, so nothing is removed step by step.
    """
    parts = Parts(model)
    group = parts.heads // parts.kv_heads

    def fed(receiver: str) -> set[str]:
        """The senders that read by this receiver."""
        if not receiver.endswith(">"):
            return {receiver}
        layer, head, which = receiver[1:].split(".")[0], int(receiver.split("h")[1].split("<")[0]), receiver[-2]
        heads = [head] if which == "q" else range(head * group, (head + 1) * group)
        return {f"a{layer}.h{one}" for one in heads}

    from_input, to_logits = {"input"}, {"logits"}
    for _ in range(2 * parts.layers + 2):
        from_input |= {one for sender, receiver in circuit if sender in from_input for one in fed(receiver)}
        to_logits |= {sender for sender, receiver in circuit if fed(receiver) & to_logits}
    return {(s, r) for s, r in circuit if s in from_input and s in to_logits and fed(r) & to_logits}


def top(scores: Mapping[tuple[str, str], float], n: int, absolute: bool) -> list[tuple[str, str]]:
    """The n edges that lower the score most, or that change it most."""
    order = sorted(scores, key=lambda edge: -abs(scores[edge]) if absolute else scores[edge])
    return order[:n]


def areas(shares: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """CPR and CMD: sums of trapezoids."""
    cpr = cmd = 0.0
    points = list(zip(shares, faithfulness, strict=True))
    for (x0, y0), (x1, y1) in pairwise(points):
        cpr += (x1 - x0) * (y0 + y1) / 2
        cmd += (x1 - x0) * (abs(1 - y0) + abs(1 - y1)) / 2
    return cpr, cmd


def faithfulness(
    model: Any,
    tokens: Tensor,
    corrupted: Tensor,
    score: Score,
    scores: Mapping[tuple[str, str], float],
    absolute: bool,
    shares: Sequence[float] = SHARES,
) -> list[float]:
    """Of the pruned circuit of ``int(share * edges)`` edges, for each share."""
    with torch.no_grad():
        other = forward(model, corrupted).sent
    whole = measured(model, tokens, score, edges(model), other).mean()
    empty = measured(model, tokens, score, [], other).mean()
    found = []
    for share in shares:
        circuit = pruned(model, top(scores, int(share * len(scores)), absolute))
        found.append(float((measured(model, tokens, score, list(circuit), other).mean() - empty) / (whole - empty)))
    return found
