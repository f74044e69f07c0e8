"""A saved model that workers can open."""

import pytest

import headwise as hw
from tests.oracles import raw_hooks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that workers can open."""
    where = tmp_path_factory.mktemp("models") / "small"
    model = hw.load(raw_hooks.random_gpt2(2, 4, 8, 60, 40, seed=3))
    model.module.save_pretrained(where)
    model.tokenizer.save_pretrained(where)
    return where
