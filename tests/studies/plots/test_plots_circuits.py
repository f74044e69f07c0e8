"""Pictures of what the weights say: eigenvalues of circuits, top pairs, tokens of neurons."""

import holoviews as hv
import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError
from headwise.studies import plots
from tests.support.elements import of_type, option


@pytest.fixture(scope="module")
def circuits(words_model):
    return hw.head_circuits(words_model, "L1H2", tokens=["apple", "dog"], top=3)


def bars(drawn):
    (boxes,) = of_type(drawn, hv.Rectangles)
    return [str(one) for one in boxes["token"]], np.asarray(boxes["value"])


def test_top_pairs_are_bars_from_the_highest_to_the_lowest(circuits):
    for ds, ends in zip(circuits, (("source", "output"), ("query", "key")), strict=True):
        tokens, values = bars(plots.picture(ds))
        high, low = (ds.sel(side=side) for side in ("highest", "lowest"))
        np.testing.assert_array_equal(values, [*high["weight"].values, *low["weight"].values[::-1]])
        assert (np.diff(values) <= 0).all()
        first = [str(high[f"{end}_token"].values[0]) for end in ends]
        assert tokens[0] == " → ".join(first)


def test_tokens_of_a_chosen_one(circuits):
    drawn = plots.picture(circuits.ov, "chosen_output_weight", chosen="dog")
    tokens, values = bars(drawn)
    one = circuits.ov.sel(chosen="dog", side="highest")
    assert tokens[:3] == one["chosen_output_token"].values.tolist()
    np.testing.assert_array_equal(values[:3], one["chosen_output_weight"])
    with pytest.raises(DeclarationError, match="select chosen, apple or dog"):
        plots.picture(circuits.ov, "chosen_output_weight")


def test_eigenvalues_lie_in_the_plane(circuits):
    drawn = plots.picture(circuits.qk, "eigenvalue_imag")
    parts = of_type(drawn, hv.Points)
    real = np.concatenate([np.asarray(one["eigenvalue_real"]) for one in parts])
    assert sorted(real) == sorted(circuits.qk["eigenvalue_real"].values)
    positive = int((circuits.qk["eigenvalue_real"] > 0).sum())
    assert [one.label for one in parts] == [f"positive: {positive} of 8", f"not positive: {8 - positive} of 8"]
    assert option(drawn, "xlabel") == "real part of eigenvalues of the QK circuit"


def test_tokens_of_a_neuron(words_model):
    ds = hw.neuron_tokens(words_model, ["L0N17", "L0N18"], top=2)
    tokens, values = bars(plots.picture(ds, "output_weight", neuron="L0N18"))
    one = ds.sel(neuron="L0N18")
    assert tokens == [*one["output_token"].values[0], *one["output_token"].values[1][::-1]]
    np.testing.assert_array_equal(values, [*one["output_weight"].values[0], *one["output_weight"].values[1][::-1]])
    with pytest.raises(DeclarationError, match="select neuron"):
        plots.token_bars(ds, "output_weight")


def test_what_is_no_weight_of_tokens_is_refused(circuits):
    with pytest.raises(DeclarationError, match="weights of tokens"):
        plots.token_bars(circuits.ov, "singular_value")
