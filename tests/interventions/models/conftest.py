"""A folder with a saved model, and a model of each family."""

import pytest

from tests.oracles import planned_cases as cases
from tests.oracles import raw_hooks
from tests.support.families import FEW


@pytest.fixture
def folder(tmp_path, words_model):
    """A local GPT-2 with a tokenizer, as the Hub would give it."""
    raw_hooks.random_gpt2(2, 2, 8, words_model.shape.vocabulary, 20).save_pretrained(tmp_path / "mine")
    words_model.tokenizer.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture(params=FEW)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return cases.model(name, "sdpa")
