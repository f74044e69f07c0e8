"""`raw_paths` itself, estimates from gradients: exact where the score is linear, complete where it is curved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import raw_hooks
from tests.oracles.raw_paths import (
    Place,
    gradient_estimate,
    integrated_estimate,
    read,
    run,
    write,
)
from tests.support.raw_places import SCALED, SHAPES, close, draw, place, without_mlps

DIFFERENTIATED = (*SCALED, "head_out", "pattern", "embed", "pos_embed")


def last_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def curved(logits: Tensor) -> Tensor:
    """A score of every position that is not linear in the logits."""
    return logits.log_softmax(-1)[..., 2].sum(1)


def test_the_estimate_is_exact_where_the_score_is_linear_with_its_sign(model: Any) -> None:
    model = without_mlps(model)
    model.transformer.ln_f = torch.nn.Identity()
    tokens, last = draw(model), model.config.n_layer - 1
    read_out = model.lm_head.weight[3] - model.lm_head.weight[5]
    clean, size = last_logit(model(tokens).logits), tokens.shape[1]
    for component in ("z", "head_out", "attn_out", "resid_mid", "mlp_out", "resid_post", "v", "pattern"):
        where = place(component, last, None)
        old = read(model, tokens, where)
        new = torch.randn(old.shape, dtype=torch.float64)
        estimate = gradient_estimate(model, tokens, last_logit, where, new)
        close(estimate, last_logit(write(model, tokens, where, new)) - clean)
        assert estimate.abs().min() > 1e-4
        early = Place(last, component, where.head, (0, 2))  # the score is read at the last position, which sees
        unseen = gradient_estimate(model, tokens, last_logit, early, 1.0)  # earlier ones through v alone
        assert (unseen.abs().max() > 1e-4) == (component == "v")
    end = Place(last, "resid_post", None, (size - 1,))
    old = read(model, tokens, end)
    step = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)  # new - old = step * read_out, per example
    estimate = gradient_estimate(model, tokens, last_logit, end, old + step[:, None, None] * read_out)
    close(estimate, step * read_out.pow(2).sum())
    close(gradient_estimate(model, tokens, last_logit, end, 0.0), -(old[:, 0] @ read_out))


@pytest.mark.parametrize("component", DIFFERENTIATED)
def test_the_estimate_is_the_slope_at_the_base_run(model: Any, component: str) -> None:
    tokens, where, small = draw(model), place(component), 1e-5
    old = read(model, tokens, where)
    direction = torch.randn(old.shape, dtype=torch.float64)
    up, down = (curved(write(model, tokens, where, old + sign * small * direction)) for sign in (1, -1))
    estimate = gradient_estimate(model, tokens, curved, where, old + direction)
    close(estimate, (up - down) / (2 * small), 1e-6)
    assert estimate.abs().min() > 1e-4
    close(gradient_estimate(model, tokens, curved, where, old), 0, 0)
    rows = [gradient_estimate(model, tokens[[n]], curved, where, (old + direction)[[n]]) for n in range(3)]
    close(torch.cat(rows), estimate)  # an example's estimate is its own
    model.requires_grad_(True)
    close(gradient_estimate(model, tokens, curved, where, old + direction), estimate)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_patterns_slope_is_that_of_eager_attentions_own_weights(model: Any) -> None:
    model.set_attn_implementation("eager")
    model.requires_grad_(True)
    tokens = draw(model)
    output = model(tokens, output_attentions=True)
    slope = torch.autograd.grad(curved(output.logits).sum(), output.attentions[1])[0][:, 1]
    old = output.attentions[1][:, 1]
    new = torch.randn(old.shape, dtype=torch.float64)
    wanted = ((new - old) * slope).sum((1, 2))
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        close(gradient_estimate(model, tokens, curved, Place(1, "pattern", 1), new), wanted)


@pytest.mark.parametrize("component", DIFFERENTIATED)
def test_the_integrated_estimate_is_complete(model: Any, component: str) -> None:
    tokens, source = draw(model), draw(model, 1)
    whole = place(component, positions=None)
    news = read(model, source, whole)
    if component == "pos_embed":  # the same in every run
        news = news.flip(1)
    clean = curved(model(tokens).logits)
    (one,) = integrated_estimate(model, tokens, curved, [place(component)], [news[:, [4, 2]]], 100)
    effect = curved(write(model, tokens, place(component), news[:, [4, 2]])) - clean
    close(one, effect, 1e-3)
    assert effect.abs().max() > 1e-2
    # Two places that move together share the effect of both, and one step is the slope half way.
    places = [place(component), place(component, positions=(5,))]
    parts = [news[:, [4, 2]], news[:, [5]]]
    shares = integrated_estimate(model, tokens, curved, places, parts, 100)
    both = run(model, tokens, [(p, lambda _old, new=new: new) for p, new in zip(places, parts, strict=True)])
    close(sum(shares), curved(both) - clean, 1e-3)
    single = gradient_estimate(model, tokens, curved, place(component), news[:, [4, 2]])
    assert (single - effect).abs().max() > 1e-3


def test_integrated_steps_are_taken_at_their_middle() -> None:
    # One dimension of the final residual, squared by the score: f(x) = x**2, f' = 2 x, exact at the middle of a step.
    model = raw_hooks.random_gpt2(**SHAPES["2x3"]).requires_grad_(False).double()
    model.transformer.ln_f = torch.nn.Identity()
    model.lm_head = torch.nn.Identity()
    tokens, where = draw(model), Place(1, "resid_post", None, (3,))
    old = read(model, tokens, where)[:, 0, 0]

    def power(exponent: int) -> Any:
        return lambda logits: logits[:, 3, 0] ** exponent

    new = torch.zeros(3, 1, model.config.n_embd, dtype=torch.float64)
    new[..., 0] = 4.0
    move = 4.0 - old
    for steps in (1, 2, 5):
        (estimate,) = integrated_estimate(model, tokens, power(2), [where], [new], steps)
        close(estimate, 16 - old**2)
        points = [old + (n + 0.5) / steps * move for n in range(steps)]
        (estimate,) = integrated_estimate(model, tokens, power(3), [where], [new], steps)
        close(estimate, move * sum(3 * x**2 for x in points) / steps)
    close(gradient_estimate(model, tokens, power(2), where, new), 2 * old * move)


def test_integrated_heads_move_together_from_the_base_run(model: Any) -> None:
    tokens, source = draw(model), draw(model, 1)
    places = [Place(1, "z", 0), Place(1, "z", 1, (1, 4))]
    news = [read(model, source, p) for p in places]
    olds = [read(model, tokens, p) for p in places]
    shares = integrated_estimate(model, tokens, curved, places, news, 1)
    half = [(p, lambda _old, x=(new + old) / 2: x) for p, new, old in zip(places, news, olds, strict=True)]
    for n, (p, new, old) in enumerate(zip(places, news, olds, strict=True)):
        ends = []
        for sign in (1, -1):
            nudged = (new + old) / 2 + sign * 1e-5 * (new - old)
            ends.append(curved(run(model, tokens, [*half, (p, lambda _old, x=nudged: x)])))
        close(shares[n], (ends[0] - ends[1]) / 2e-5, 1e-6)
