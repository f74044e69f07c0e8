"""Small models, ways to change them, and measurements that see the change."""

import warnings

import pytest
import torch

import headwise as hw
from headwise.interventions import Head, Patch, ZeroAblate
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure
from tests.oracles import raw_families, raw_hooks

TASK = RepeatedTokens(n=4, length=6)
WHAT = {"zero": ZeroAblate(Head(1, 0)), "patch": Patch(Head(0, 1).k)}


def gpt2(**more):
    module = raw_hooks.random_gpt2(2, 2, 6, 40, 20, seed=3)
    for name, value in more.items():
        setattr(module.config, name, value)
    return type(module)._from_config(module.config).eval(), module.state_dict()


def of_configuration(family, **more):
    """A small model of random weights, which do not depend on the configuration."""
    if family == "gpt2":
        module, weights = gpt2(**more)
        module.load_state_dict(weights)
        return module
    return raw_families.random_model(family, **more)


def losses(module, **options):
    return measure(hw.load(module), TASK, WHAT, [loss], **options)["loss"].values


class Halt(Exception):
    """Stands for whatever ends a process."""


def stopped_or_done(module, out, finished, **options):
    """Measure into `out`, to the end or until some passes are done."""

    def halt(done, total):
        if not finished and done > total // 2:
            raise Halt

    try:
        measure(hw.load(module), TASK, WHAT, [loss], out=out, progress=halt, batch_size=4, **options)
    except Halt:
        assert list(out.with_name("out.nc.parts").glob("*.nc"))


def late(value, factor):
    """Times a factor from position 8 on, where the prompt of the fingerprint has ended."""
    return torch.cat([value[:, :8], value[:, 8:] * factor], 1)


def through_data(module):
    module.transformer.h[1].mlp.c_fc.weight.data[0, 0] += 0.5


def adapted(module, names, **more):
    """LoRA on some modules, with random numbers in both of its factors."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out=True, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(module, config)


def deep():
    module = raw_hooks.random_gpt2(6, 2, 6, 40, 20, seed=3)
    return module


def uneven(block, given, made):
    return made * torch.linspace(1, 2, made.shape[-1])
