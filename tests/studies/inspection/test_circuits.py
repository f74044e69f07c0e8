"""Circuits of heads against whole matrices of tokens by tokens, in every family."""

import numpy as np
import pytest

import headwise as hw
from tests.oracles import raw_circuits, raw_families
from tests.oracles.planted import INDUCTION
from tests.oracles.raw_hooks import random_gpt2
from tests.support.families import FEW


def module_of(name):
    return random_gpt2(3, 4, 8, 40, 30) if name == "gpt2" else raw_families.random_model(name)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", ["gpt2", *FEW])
def test_scores_of_every_head_are_those_of_whole_matrices(name, folded):
    module = module_of(name)
    model = hw.load(module)
    ds = hw.circuit_scores(model, folded=folded)
    assert ds["eigenvalue_score"].dims == ("circuit", "layer", "head")
    for layer in model.layers:
        for head in model.heads:
            matrices = {fn.__name__: fn(module, layer, head, folded) for fn in (raw_circuits.ov, raw_circuits.qk)}
            found = {kind: raw_circuits.nonzero_eigenvalues(one, model.shape.d_head) for kind, one in matrices.items()}
            here = ds.sel(layer=layer, head=head)
            assert float(here["copying"]) == pytest.approx((found["ov"].real > 0).mean())
            for kind, matrix in matrices.items():  # the eigenvalues of a matrix sum to its trace
                wanted = np.trace(matrix) / np.abs(found[kind]).sum()
                assert float(here["eigenvalue_score"].sel(circuit=kind)) == pytest.approx(wanted, abs=1e-6)


def test_the_planted_induction_head_copies_and_heads_without_weights_have_no_scores(planted):
    ds = hw.circuit_scores(planted)
    assert float(ds["copying"].sel(layer=INDUCTION[0], head=INDUCTION[1])) == 1
    empty = [(layer, head) for layer in planted.layers for head in planted.heads if weightless(planted, layer, head)]
    assert empty
    for layer, head in empty:
        assert ds.sel(layer=layer, head=head).to_array().isnull().all()


def weightless(model, layer, head):
    return float(model.head_weights(layer).W_O[head].abs().sum()) == 0


def test_the_induction_heads_of_the_shipped_model_copy(words_model):
    ds = hw.circuit_scores(words_model)
    matrix = raw_circuits.ov(words_model.module, 1, 2, True)
    assert np.median(np.diag(matrix)) > np.quantile(matrix, 0.99)  # tokens raise themselves
    assert float(ds["copying"].sel(layer=1, head=2)) == 1
    assert ds.attrs["folded"] == 1
    assert ds["copying"].attrs["units"] == "1"
