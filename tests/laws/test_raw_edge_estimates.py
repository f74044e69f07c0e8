"""`raw_edge_estimates` itself: definitions written another way, rules that change no number, and a linear model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.laws.test_raw_edges import MODELS, close, drawn, linear, score
from tests.oracles import raw_edge_estimates, raw_edges


@pytest.fixture(params=["gpt-2", "grouped", "parallel"])
def module(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().double()


def with_change(model: Any, tokens: torch.Tensor, edge: tuple[str, str], other: Any) -> raw_edges.Run:
    return raw_edges.forward(model, tokens, lambda *one: one != edge, other)


def test_rules_change_no_number_and_other_slopes(module: Any) -> None:
    clean, corrupted = drawn(module), drawn(module, 1)
    ruled = raw_edge_estimates.with_rules(module)
    close(raw_edges.forward(ruled, clean).logits, raw_edges.forward(module, clean).logits)
    plain, relp = (
        raw_edges.estimated_scores(module, clean, corrupted, score),
        raw_edge_estimates.relp_scores(module, clean, corrupted, score),
    )
    assert max(float((plain[edge] - relp[edge]).abs().max()) for edge in plain) > 1e-3


def test_rules_of_relp_make_a_sum_of_shares(module: Any) -> None:
    """Without biases, the slope of an MLP times what it reads is what it gives: nothing is lost or counted twice."""
    parts = raw_edges.Parts(raw_edge_estimates.with_rules(module))
    mlp = parts.blocks[0].mlp
    for each in mlp.modules():
        if getattr(each, "bias", None) is not None:
            each.bias.data.zero_()
    read = torch.randn(3, module.config.hidden_size, dtype=torch.float64, requires_grad=True)
    made = mlp(read)
    towards = torch.randn_like(made)
    (slope,) = torch.autograd.grad((made * towards).sum(), read)
    close((slope * read).sum(-1), (made * towards).sum(-1))


def test_atp_star_of_a_single_change_is_the_slope_without_drops(module: Any) -> None:
    """Edges into the last MLP and the logits have no part behind them: their size is that of EAP, drop by drop."""
    clean, corrupted = drawn(module), drawn(module, 1)
    eap = raw_edges.estimated_scores(module, clean, corrupted, score)
    star = raw_edge_estimates.atp_star_scores(module, clean, corrupted, score)
    last = raw_edges.Parts(module).layers - 1
    for edge, value in star.items():
        if edge[1] in ("logits", f"m{last}"):
            close(value, eap[edge])
        if not edge[1].endswith(("<q>", "<k>")):
            signs = value.sign() * eap[edge].sign()
            assert bool((signs >= 0).all())


def test_the_fixed_pattern_is_that_of_the_changed_run(module: Any) -> None:
    """A head of the last layer that writes to the logits only through a fixed norm: the QK fix is then exact."""
    clean, corrupted = drawn(module), drawn(module, 1)
    parts, last = raw_edges.Parts(module), raw_edges.Parts(module).layers - 1
    with torch.no_grad():
        here, other = (raw_edges.forward(module, tokens).sent for tokens in (clean, corrupted))
    towards = torch.randn_like(here["input"][0])
    run = raw_edges.forward(module, clean)
    for which in "qk":
        edge = ("input", f"a{last}.h0<{which}>")
        group = parts.heads // parts.kv_heads if which == "k" else 1
        written = {f"a{last}.h{head}": towards.expand_as(here["input"]) for head in range(parts.heads)}
        found = raw_edge_estimates.fixed_pattern_score(parts, run, written, edge, other["input"] - here["input"])
        changed = with_change(module, clean, edge, other).sent
        whole = sum((changed[f"a{last}.h{head}"] - here[f"a{last}.h{head}"]) * towards for head in range(group))
        close(found.detach(), whole.sum((1, 2)).detach())


def test_on_a_linear_model_the_edges_into_the_logits_are_exact() -> None:
    model = linear(MODELS["gpt-2"]().double())
    clean, corrupted = drawn(model), drawn(model, 1)

    def first(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 1] - logits[:, -1, 2]

    exact = raw_edges.exact_scores(model, clean, corrupted, first)
    star = raw_edge_estimates.atp_star_scores(model, clean, corrupted, first)
    for edge, value in exact.items():
        if edge[1] == "logits":
            close(star[edge], value)
