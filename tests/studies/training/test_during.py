"""Interventions held on a module by plain hooks are those that headwise measures, and gradients flow through them."""

import copy

import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from headwise.studies.training.during import hold, released
from tests.oracles import planned_cases as cases
from tests.support.families import NAMES

TASK = hw.RepeatedTokens(n=3, length=6)


def held_of(model):
    """An intervention of each kind that fits a model, by name."""
    shape = model.shape
    width, narrow = [at % 3 - 0.7 for at in range(shape.d_model)], [at % 2 + 0.5 for at in range(shape.d_head)]
    found = {
        "z": hw.ZeroAblate(hw.Head(0, 1)),
        "k": hw.ZeroAblate(hw.Head(0, 0).k),
        "v somewhere": hw.Scale(hw.Head(0, 0).v.at([2, -3]), 3.0),
        "q": hw.Add(hw.Head(0, 1).q, [20 * one for one in narrow]),
        "stream": hw.Add(hw.Layer(0).resid_pre.at(-3), width),
        "direction": hw.ProjectOut(hw.Head(0, 1).q.at([3, 5]), narrow) + hw.ProjectOut(hw.Layer(0).mlp_out, width),
        "attention": hw.Scale(hw.Layer(0).attn_out, 4.0),
        "mlp": hw.ZeroAblate(hw.Layer(0).mlp_out),
        "after": hw.Add(hw.Layer(0).resid_post, width),
        "words": hw.Scale(hw.Layer(0).embed, 0.3),
        "one key": hw.Knockout(hw.Head(0, 1), key=0),
        "some keys": hw.Knockout(hw.Layer(0), query=range(6, 12), key=[1, 2]),
        "two": hw.ZeroAblate(hw.Head(0, 1)) + hw.Knockout(hw.Head(0, 0), query=7, key=range(7)),
    }
    return found | ({"places": hw.ZeroAblate(hw.Layer(0).pos_embed.at(3))} if shape.pos_embed else {})


def losses(module, tokens):
    with torch.no_grad():
        logits = module(tokens, use_cache=False).logits.double()[:, 6:11]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 7:12].flatten(), reduction="none")
    return each.view(len(tokens), -1).mean(1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_is_what_is_measured(name, implementation):
    model = cases.model(name, implementation)
    what = held_of(model)
    wanted = hw.measure(model, TASK, what, [hw.metrics.loss])
    module = copy.deepcopy(model.module)
    tokens = torch.as_tensor(TASK.draw(model).runs["clean"])
    plain = losses(module, tokens)
    for label, intervention in what.items():
        hooks = hold(module, intervention)
        found = losses(module, tokens)
        torch.testing.assert_close(
            found, torch.as_tensor(wanted["loss"].sel(condition=label).values).double(), atol=2e-5, rtol=0
        )
        assert (found - plain).abs().max() > 1e-5, label
        with released(module):
            assert torch.equal(losses(module, tokens), plain)
        assert torch.equal(losses(module, tokens), found)
        [one.remove() for one in hooks]
    assert torch.equal(losses(module, tokens), plain)


def test_gradients_flow_around_what_is_ablated():
    module = hw.CausalLM.tiny(2, 2, 8, vocabulary=20, during=hw.ZeroAblate(hw.Head(1, 0)))
    module.loss(torch.arange(12).reshape(2, 6)).backward()
    attention = module.model.transformer.h[1].attn
    own = torch.arange(24).reshape(3, 2, 4)[:, 0].flatten()  # columns of q, k and v of head 0
    assert attention.c_proj.weight.grad[:4].abs().max() == 0
    assert attention.c_attn.weight.grad[:, own].abs().max() == 0
    assert attention.c_proj.weight.grad[4:].abs().max() > 0
    assert module.model.transformer.h[0].attn.c_attn.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (hw.Patch(hw.Head(0, 0)), r"Patch\(.*needs another run: held during training can be ZeroAblate, Add, Scale"),
        (hw.MeanAblate(hw.Head(0, 0)), "needs another run"),
        (hw.ZeroAblate(hw.Head(5, 0)), "L5H0 z: .* has layers 0 to 1"),
        (
            hw.Scale(hw.Head(0, 0).pattern, 0.5),
            "held during training can be what is done to embed, pos_embed, resid_pre",
        ),
        ("L0H1", "give an intervention, such as Knockout"),
    ],
)
def test_what_cannot_be_held_is_refused(what, message):
    with pytest.raises(DeclarationError, match=message):
        hw.CausalLM.tiny(2, 2, 8, vocabulary=20, during=what)
