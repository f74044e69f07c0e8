"""Result files with one thing changed."""

import headwise as hw
from headwise.interventions import Add, Grid, Head, Layer, MeanAblate, Patch, ResampleAblate, ZeroAblate
from headwise.metrics import accuracy, induction, kl, logit_diff, loss, self_attention
from headwise.studies import Prompts, RepeatedTokens, capture, compare_estimates, measure

TASK = RepeatedTokens(n=3, length=6)
TEXT = Prompts(
    ["apple banana cherry apple", "red green red"],
    answers=["banana", "green"],
    distractors=["cherry", "blue"],
    corrupted=["cherry banana apple cherry", "blue green blue"],
)


def every_head(model, make):
    return Grid(lambda layer, head: make(Head(layer, head)), layer=model.layers, head=model.heads)


def qkv(model):
    return Grid(lambda component, head: Patch(Head(1, head).site(component)), component=["q", "v"], head=model.heads)


MEASURED = {
    "baseline": lambda model: measure(model, TASK, None, [loss, induction]),
    "one": lambda model: measure(model, TASK, ZeroAblate(Head(0, 3)), [kl, self_attention]),
    "names": lambda model: measure(
        model, TASK, {"a": MeanAblate(Head(0, 3)), "b": Add(Layer(1).resid_pre.at(-1), [0.1] * 64)}, [loss, accuracy]
    ),
    "heads": lambda model: measure(model, TASK, every_head(model, ResampleAblate), [loss], per_position=True),
    "qkv": lambda model: measure(model, TASK, qkv(model), [logit_diff], base="corrupted"),
    "positions": lambda model: measure(
        model, TASK, Grid(lambda position: Patch(Layer(1).resid_pre.at(position)), position=range(12)), [logit_diff]
    ),
    "integrated": lambda model: measure(
        model, TASK, every_head(model, ZeroAblate), [loss], estimator="integrated", steps=3
    ),
    "gradient": lambda model: measure(model, TASK, every_head(model, ZeroAblate), [loss], estimator="gradient"),
    "text": lambda model: measure(model, TEXT, every_head(model, ZeroAblate), [loss, logit_diff]),
    "captured": lambda model: capture(model, TASK, [Head(1, 2).pattern, Layer(0).mlp_out], run="corrupted"),
    "estimates": lambda model: compare_estimates(model, TASK, every_head(model, ZeroAblate), loss, steps=2),
}


def changed(path, target, change):
    """A copy of a file, changed."""
    tree = hw.open_result(path, load=True)
    change(tree)
    return hw.write_netcdf(tree, target)


def own(words):
    """A measurement's attributes, changed."""

    def change(tree):
        for name, value in words.items():
            if value is None:
                del tree.attrs[name]
            else:
                tree.attrs[name] = value

    return change
