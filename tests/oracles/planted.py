"""Owns the planted circuit: a two-layer GPT-2 whose weights are set by hand, and what it must answer.

Imports torch, numpy and transformers only. One head copies the previous token, one does induction, one copies its own
token where nobody reads it; every other head has zero weights. All predictions below are worked out by hand from the
weights (the derivation is in each docstring), so a tool that disagrees with them is wrong.

How features are coded. Feature ``f`` lives on dimensions ``2f`` and ``2f + 1`` as the antipodal pair ``(+1, -1)``: it
is written by ``_code(f)`` and read by ``_code(f) / 2``. Every residual vector then has mean 0, and LayerNorm is only a
scale ``sqrt(d_model / |x|**2)``, where a feature of value ``a`` adds ``2 a**2`` to ``|x|**2``. Each LayerNorm's gain
undoes its own scale for the norm that stands there on an untouched model: ``|x|**2 = 4`` before layer 0 (tok + pos),
``8`` before layer 1 (tok + pos + prev + junk), ``10`` at the end where the induction head found its token (and + out).

Where the previous token head has none: position 0 can only see itself, so it writes its own token as its "previous"
one. Query ``L`` (which repeats token 0) would then find two matches, keys 0 and 1. The induction head's key therefore
carries ``-KEY_ZERO`` at position 0, so that key 0 is attended to by query 0 alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

PREVIOUS = (0, 3)
INDUCTION = (1, 2)
SELF = (0, 5)
VOCAB = 24
CONTEXT = 24
LENGTH = 10
BOS = VOCAB - 1
LAYERS = 2
HEADS = 10
D_HEAD = 24
D_MODEL = 2 * (4 * VOCAB + CONTEXT)
LOGIT = 20.0
POSITION_SCORE = 64.0
MATCH_SCORE = 480.0
KEY_ZERO = 0.125

TOK = 0
POS = TOK + VOCAB
PREV = POS + CONTEXT
OUT = PREV + VOCAB
JUNK = OUT + VOCAB


def _code(feature: int) -> torch.Tensor:
    """Vector that stands for one feature at value 1, shape (d_model,); half of it reads the feature back."""
    vector = torch.zeros(D_MODEL)
    vector[2 * feature], vector[2 * feature + 1] = 1.0, -1.0
    return vector


def _set_head(model: GPT2LMHeadModel, where: tuple[int, int], **weights: torch.Tensor) -> None:
    """Put ``q``, ``k``, ``v`` (d_model, d_head) and ``o`` (d_head, d_model) of one head where GPT-2 keeps them."""
    layer, head = where
    attention = model.transformer.h[layer].attn
    columns = slice(head * D_HEAD, (head + 1) * D_HEAD)
    for block, name in enumerate("qkv"):
        attention.c_attn.weight[:, block * D_MODEL + columns.start : block * D_MODEL + columns.stop] = weights[name]
    attention.c_proj.weight[columns] = weights["o"]


@torch.no_grad()
def planted_model(attention: str = "sdpa") -> GPT2LMHeadModel:
    """Build the planted model, in eval mode, float32.

    Parameters
    ----------
    attention
        Hugging Face attention implementation, ``"sdpa"`` (its default) or ``"eager"``.
    """
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=1e-12,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    with torch.random.fork_rng():
        model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.zero_()
    body = model.transformer
    for token in range(VOCAB):
        body.wte.weight[token] = _code(TOK + token)
        model.lm_head.weight[token] = LOGIT * _code(OUT + token) / 2
    for position in range(CONTEXT):
        body.wpe.weight[position] = _code(POS + position)
    for norm, squared in ((body.h[0].ln_1, 4), (body.h[1].ln_1, 8), (body.ln_f, 10)):
        norm.weight.fill_(math.sqrt(squared / D_MODEL))
    for block in body.h:
        block.ln_2.weight.fill_(1.0)

    def read(first: int) -> torch.Tensor:
        return torch.stack([_code(first + index) / 2 for index in range(D_HEAD)], dim=1)

    def write(first: int) -> torch.Tensor:
        return torch.stack([_code(first + index) for index in range(D_HEAD)])

    saturate = POSITION_SCORE * math.sqrt(D_HEAD)
    one_back = torch.zeros(D_MODEL, D_HEAD)
    one_back[:, :-1] = read(POS)[:, 1:]
    not_key_zero = KEY_ZERO * (_code(POS) / 2)[:, None]
    _set_head(model, PREVIOUS, q=saturate * one_back, k=read(POS), v=read(TOK), o=write(PREV))
    _set_head(model, SELF, q=saturate * read(POS), k=read(POS), v=read(TOK), o=write(JUNK))
    match = MATCH_SCORE * math.sqrt(D_HEAD) * read(TOK)
    _set_head(model, INDUCTION, q=match, k=read(PREV) - not_key_zero, v=read(TOK), o=write(OUT))
    model.set_attn_implementation(attention)
    return model.eval()


def repeated_prompts(
    n: int, seed: int = 0, length: int = LENGTH, bos: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and corrupted prompts, each (example, 2 * length + bos): same second half, disjoint first halves."""
    rng = np.random.default_rng(seed)
    words = np.stack([rng.permutation(VOCAB - 1)[: 2 * length] for _ in range(n)])
    front = np.full((n, int(bos)), BOS)
    half, other = words[:, :length], words[:, length:]
    clean = np.concatenate([front, half, half], axis=1)
    corrupted = np.concatenate([front, other, half], axis=1)
    return torch.as_tensor(clean), torch.as_tensor(corrupted)


def predicted_pattern(layer: int, head: int, length: int = LENGTH, bos: bool = False) -> np.ndarray:
    """Attention (query, key) of one head on a repeated prompt of distinct tokens.

    The previous token head matches position ``i - 1`` by ``POSITION_SCORE`` against 0, SELF matches ``i``: one-hot. The
    induction head scores ``MATCH_SCORE`` where the key's previous token is the query's token, which for a query of the
    second half is key ``i - L + 1`` alone, and nowhere for a query of the first half: that one is uniform over keys
    ``1 .. i``, since key 0 carries ``-KEY_ZERO * MATCH_SCORE = -60``. Zero heads are uniform over ``0 .. i``.
    """
    start = int(bos)
    size = 2 * length + start
    pattern = np.zeros((size, size))
    for i in range(size):
        if i == 0 or (layer, head) == SELF:
            pattern[i, i] = 1.0
        elif (layer, head) == PREVIOUS:
            pattern[i, i - 1] = 1.0
        elif (layer, head) == INDUCTION and i >= length + start:
            pattern[i, i - length + 1] = 1.0
        elif (layer, head) == INDUCTION:
            pattern[i, 1 : i + 1] = 1.0 / i
        else:
            pattern[i, : i + 1] = 1.0 / (i + 1)
    return pattern


def predicted_scores(layer: int, head: int, length: int = LENGTH, bos: bool = False) -> dict[str, float]:
    """Attention scores of one head on a repeated prompt, in closed form from `predicted_pattern` (length >= 3).

    With ``S`` positions, ``s = bos`` and ``H(a, b) = sum(1 / n for n in a .. b)``: the induction head's first-half
    queries ``i = 1 .. L + s - 1`` give ``1 / i`` to each of keys ``1 .. i``, hence ``H(2, L + s - 1)`` on the previous
    token and ``1 + H(1, L + s - 1)`` on itself; the previous token head gives query 1 to key 0 and query 0 to itself.
    """
    start, size = int(bos), 2 * length + int(bos)

    def harmonic(first: int, last: int) -> float:
        return sum(1.0 / n for n in range(first, last + 1))

    scores = dict.fromkeys(("induction", "previous_token", "duplicate_token", "first_token", "self"), 0.0)
    if (layer, head) == PREVIOUS:
        scores |= {"previous_token": 1.0, "first_token": 1.0 / (size - 1), "self": 1.0 / size}
    elif (layer, head) == SELF:
        scores |= {"self": 1.0}
    elif (layer, head) == INDUCTION:
        previous = harmonic(2, length + start - 1) / (size - 1)
        scores |= {"induction": 1.0, "previous_token": previous, "self": (1 + harmonic(1, length + start - 1)) / size}
    else:
        late = harmonic(length + start + 1, size) / length
        early = harmonic(2, size) / (size - 1)
        scores |= {"induction": late, "duplicate_token": late, "previous_token": early, "first_token": early}
        scores |= {"self": harmonic(1, size) / size}
    return scores


def _logit(weight: float, squares: float, residual: float = 8.0) -> float:
    """Logit of a token of which the induction head wrote ``weight``, where ``squares`` sums all written squares.

    The final LayerNorm sees ``|x|**2 = residual + 2 * squares`` and its gain undoes ``|x|**2 = 10``.
    """
    return LOGIT * weight * math.sqrt(10.0 / (residual + 2.0 * squares))


def predicted_logit_diff_clean() -> float:
    """Target minus distractor on an untouched run: the head writes the target with weight 1, ``|x|**2 = 10``: 20."""
    return _logit(1.0, 1.0)


def predicted_logit_diff_k_noised(i: int, length: int = LENGTH) -> float:
    """Keys of the induction head (all positions) from the corrupted run; ``i = L + m`` is the query, no BOS.

    Corrupted keys 1 .. L know a corrupted previous token and key ``L + 1 + n`` knows ``t_n``, so query ``t_m`` finds
    its token only at key ``L + m + 1 > i``: no match, uniform over keys 1 .. i. These hold (clean values)
    ``t_1 .. t_{L-1}`` and ``t_0 .. t_m``: ``t_1 .. t_m`` twice, the other ``L - m`` tokens once. So the squares sum to
    ``(4 m + L - m) / i**2 = (3 i - 2 L) / i**2``. The target ``t_{m+1}`` stands there once, its distractor never:
    ``20 / i * sqrt(10 / (8 + 2 (3 i - 2 L) / i**2))``. Noising the previous token head's z gives the same.
    """
    return _logit(1.0 / i, (3 * i - 2 * length) / i**2)


def predicted_logit_diff_v_noised() -> float:
    """Values of the induction head from the corrupted run.

    Attention is clean, one-hot at ``i + 1 - L``, where the corrupted run holds the distractor: it gets the 20, the
    target 0.
    """
    return -_logit(1.0, 1.0)


def predicted_logit_diff_q_noised() -> float:
    """Queries of the induction head from the corrupted run: they read the token, and the second half is the same."""
    return predicted_logit_diff_clean()


def predicted_logit_diff_ablated() -> float:
    """The induction head's z zeroed: nothing is written to ``out``, so every logit is 0."""
    return 0.0


def predicted_logit_diff_previous_ablated(i: int, length: int = LENGTH) -> float:
    """The previous token head's z zeroed, no BOS.

    ``|x|**2`` is 6 instead of 8 before layer 1, so everything read there is ``sqrt(4 / 3)`` larger. No key matches:
    uniform over keys 1 .. i, which hold the tokens counted in `predicted_logit_diff_k_noised`. The final norm starts
    from 6 as well.
    """
    grown = math.sqrt(4.0 / 3.0)
    return _logit(grown / i, grown**2 * (3 * i - 2 * length) / i**2, residual=6.0)


def predicted_logit_diff_corrupted(i: int) -> float:
    """The corrupted run itself, no BOS.

    No match at second-half queries: uniform over keys 1 .. i, which hold ``c_1 .. c_{L-1}`` and ``t_0 .. t_m``, each
    once: the distractor ``c_{m+1}`` gets ``1 / i``, the target 0, the squares sum to ``1 / i``. (Denoising: clean v put
    here gives `predicted_logit_diff_k_noised`, clean k gives `predicted_logit_diff_v_noised`, clean q changes nothing.)
    """
    return -_logit(1.0 / i, 1.0 / i)


def predicted_loss_clean() -> float:
    """Cross-entropy where the target has logit 20 and the other 23 tokens 0."""
    return math.log1p((VOCAB - 1) * math.exp(-LOGIT))


def predicted_loss_k_noised(i: int, length: int = LENGTH) -> float:
    """Cross-entropy under `predicted_logit_diff_k_noised`: m logits doubled, L - m as the target's, the others 0."""
    one = predicted_logit_diff_k_noised(i, length)
    m = i - length
    return math.log(m * math.exp(2 * one) + (length - m) * math.exp(one) + VOCAB - length) - one


def predicted_loss_v_noised() -> float:
    """Cross-entropy where the distractor has logit 20, the target and the other 22 tokens 0."""
    return math.log(math.exp(LOGIT) + VOCAB - 1)


def predicted_loss_ablated() -> float:
    """All logits equal: log(VOCAB)."""
    return math.log(VOCAB)


def predicted_k_composition() -> float:
    """K-composition of PREVIOUS into INDUCTION; Q, V, and all three of SELF into INDUCTION are exactly 0.

    A reader has squared norm 1/2, a writer 2. ``|M_OV1|**2 = 24 * (1/2) * 2``; up to the match scale, which cancels,
    ``|M_QK2|**2 = 24 * (1/2) * (1/2) (1 + KEY_ZERO**2)`` and ``|M_OV1 @ M_QK2.T|**2 = 24 * (1/2) * (1/2)``. All writers
    and readers are antipodal, so centring changes nothing, and all gains are uniform, so folding does not either.
    """
    return 1.0 / math.sqrt(D_HEAD * (1.0 + KEY_ZERO**2))
