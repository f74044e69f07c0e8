"""What some heads write towards the answer and copy, beside random sets of heads: every number by explicit loops."""

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise import Head
from headwise.metrics import bootstrap_interval
from headwise.studies.analyses.attribution import what_heads_write

TASK = hw.RepeatedTokens(n=6, length=6)
HEADS = [Head(1, 2), Head(1, 0)]


@pytest.fixture(scope="module")
def found(words_model):
    return what_heads_write(words_model, TASK, HEADS, draws=12, seed=3)


def test_heads_and_parts_are_those_of_the_two_functions(found, words_model):
    direct, scores = hw.direct_logit_attribution(words_model, TASK), hw.circuit_scores(words_model)
    rows = dict(zip(direct["source"].values, direct["attribution"].values, strict=True))
    for layer, head in np.ndindex(2, 8):
        np.testing.assert_array_equal(found["attribution"].sel(layer=layer, head=head), rows.pop(f"L{layer}H{head}"))
    for part, values in rows.items():
        np.testing.assert_array_equal(found["other"].sel(part=part), values)
    assert found["part"].values.tolist() == list(rows) == ["embed", "pos_embed", "L0.mlp", "L1.mlp", "bias"]
    np.testing.assert_array_equal(found["copying"], scores["copying"])
    np.testing.assert_array_equal(found["eigenvalue_score"], scores["eigenvalue_score"].sel(circuit="ov"))
    whole = hw.measure(words_model, TASK, None, "logit_diff")["logit_diff"]
    np.testing.assert_allclose(found["whole"], whole, atol=1e-4)


def test_sets_stand_beside_random_ones(found):
    numbers = {"attribution": found["attribution"].values.astype(float).mean(-1), "copying": found["copying"].values}
    p = []
    for of, values in numbers.items():
        own = np.mean([values[1, 2], values[1, 0]])
        assert float(found[f"set_{of}"]) == pytest.approx(own)
        for column, control in enumerate(("same layers", "all layers")):
            names = [str(one) for one in found["control_heads"].sel(control=control).values if one]
            assert len(names) == len({*names}) == 12
            random = []
            for one in names:
                heads = [Head.parse(head) for head in one.split()]
                assert len(heads) == 2
                assert not {*heads} & {*HEADS}
                assert column == 1 or {head.layer for head in heads} == {1}
                random.append(sum(values[head.layer, head.head] for head in heads) / 2)
            np.testing.assert_allclose(found[f"control_{of}"].sel(control=control), random, atol=1e-6)
            p.append((1 + sum(one >= own for one in random)) / 13)
            assert float(found[f"p_{of}"].sel(control=control)) == pytest.approx(p[-1])
    q, least = [0.0] * 4, 1.0
    for rank, at in reversed([*enumerate(np.argsort(p, kind="stable"), 1)]):  # Benjamini-Hochberg by hand
        q[at] = least = min(least, p[at] * 4 / rank)
    np.testing.assert_allclose(found["q"].values.ravel(), q)
    assert found["q"].dims == ("of", "control")
    low, high = bootstrap_interval(found["attribution"].values[1, [2, 0]].astype(float).mean(0))
    assert (float(found["set_attribution_low"]), float(found["set_attribution_high"])) == (low, high)


def test_without_heads_no_set_is_compared_and_the_values_stay(found, words_model):
    alone = what_heads_write(words_model, TASK, [])
    assert {*found} - {*alone} == {name for name in found if "_" in str(name) and name != "eigenvalue_score"} | {
        "heads",
        "q",
    }
    for name in alone:
        xr.testing.assert_identical(alone[name].drop_vars("control", errors="ignore"), found[name])


def test_where_logits_are_no_linear_function_it_says_so(words_model, monkeypatch):
    def refuse(*given):
        raise ValueError("the unembedding is more than a linear layer")

    monkeypatch.setattr(type(words_model.backend), "attribute", refuse)
    left = what_heads_write(words_model, TASK, HEADS)
    assert not left.data_vars
    assert left.attrs["left_out"] == "the unembedding is more than a linear layer"
