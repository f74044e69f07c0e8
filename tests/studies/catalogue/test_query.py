"""Tables and conditions, with the answers known from data that were built by hand with plain xarray."""

import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import headwise as hw
from headwise.studies.catalogue.conditions import ask, matching
from headwise.studies.catalogue.table import table

LAYERS, HEADS = 3, 2
LOSS = np.array([[1.0, 1.5], [4.0, 1.25], [0.5, np.nan]])
"""Mean over two examples of each head; the run without intervention has 1.0."""


def measurement():
    """As `measure` would give it: loss of three layers of two heads, two examples each."""
    spread = np.array([-0.25, 0.25])
    return xr.Dataset(
        {
            "loss": (("layer", "head", "example"), LOSS[..., None] + spread, {"units": "nat", "long_name": "loss"}),
            "baseline_loss": (("run", "example"), np.array([1.0 + spread, 9.0 + spread]), {"units": "nat"}),
            "loss_effect_low": (("layer", "head"), LOSS - 1.5),
            "loss_effect_high": (("layer", "head"), LOSS - 0.5),
            "role": (("layer", "head"), np.array([["a", "b"], ["a", "c"], ["b", "a"]], dtype=object)),
        },
        coords={"layer": range(LAYERS), "head": range(HEADS), "example": [0, 1], "run": ["clean", "corrupted"]},
        attrs={"base": "clean"},
    )


def study():
    return xr.DataTree.from_dict(
        {"/ablation": measurement(), "/other": xr.Dataset({"score": ("layer", [0.0, 1.0, 2.0])})}
    )


def names(frame):
    return list(frame["name"])


@pytest.mark.parametrize(
    ("result", "variable"), [(measurement(), "loss"), (study(), "ablation/loss"), (study(), "loss")]
)
def test_a_row_for_each_cell_with_effect_and_interval(result, variable):
    frame = table(result, variable)
    assert list(frame.columns) == [
        "name", "layer", "head", "value", "effect", "effect_low", "effect_high", "role",
    ]  # fmt: skip
    assert names(frame) == ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"]
    np.testing.assert_array_equal(frame["value"], LOSS.ravel())
    np.testing.assert_array_equal(frame["effect"], LOSS.ravel() - 1.0)
    np.testing.assert_array_equal(frame["effect_low"], LOSS.ravel() - 1.5)
    np.testing.assert_array_equal(frame["effect_high"], LOSS.ravel() - 0.5)
    assert list(frame["role"]) == ["a", "b", "a", "c", "b", "a"]
    assert frame.attrs == {"variable": "loss", "units": "nat", "long_name": "loss"}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("effect > 0.25", ["L0H1", "L1H0"]),
        ("effect > 0.25 and layer >= 1", ["L1H0"]),
        ("effect >= 0.5 or role == 'c'", ["L0H1", "L1H0", "L1H1"]),
        ("not effect > 0.25", ["L0H0", "L1H1", "L2H0", "L2H1"]),
        ("layer in (0, 2) and head not in [1]", ["L0H0", "L2H0"]),
        ("role in {'b', 'c'}", ["L0H1", "L1H1", "L2H0"]),
        ("'L1' in name", ["L1H0", "L1H1"]),
        ("'2' not in name", ["L0H0", "L0H1", "L1H0", "L1H1"]),
        ("1 <= layer < 2", ["L1H0", "L1H1"]),
        ("layer + head == 2", ["L1H1", "L2H0"]),
        ("-effect * 2 > 0.5", ["L2H0"]),
        ("effect ** 2 >= 0.25 and effect / 2 < 1", ["L0H1", "L2H0"]),
        ("layer % 2 == 0 and layer // 2 == 1", ["L2H0", "L2H1"]),
        ("effect == effect", ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0"]),
        ("effect != effect", ["L2H1"]),
        ("1 / (layer - 1) > 0 and layer < 2", ["L1H0", "L1H1"]),
        ("role < 'b'", ["L0H0", "L1H0", "L2H1"]),
        ("True", ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"]),
        ("1 > 2", []),
        ("(effect > 0.25\n and layer >= 1)", ["L1H0"]),
        ("  layer == 0  ", ["L0H0", "L0H1"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("result", [measurement(), study()], ids=["dataset", "tree"])
def test_conditions(result, where, expected):
    assert names(table(result, "loss", where=where)) == expected


def test_sorting_and_the_first_few():
    assert names(table(measurement(), "loss", sort="-effect", top=3)) == ["L1H0", "L0H1", "L1H1"]
    assert names(table(measurement(), "loss", sort="effect"))[-1] == "L2H1"  # missing comes last, both ways
    assert names(table(measurement(), "loss", sort="-effect"))[-1] == "L2H1"
    assert names(table(measurement(), "loss", sort=["-head", "-layer"], top=2)) == ["L2H1", "L1H1"]
    assert names(table(measurement(), "loss", sort="role, -value", top=3)) == ["L1H0", "L0H0", "L2H1"]
    assert list(table(measurement(), "loss", sort="-effect", top=2).index) == [0, 1]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("effekt > 1", "character 1: there is no column 'effekt'"),
        ("layer > 0 and abs(effect) > 1", "character 15: a call is not allowed"),
        ("effect.real > 1", "character 1: an attribute is not allowed"),
        ("effect[0] > 1", "character 1: a subscript is not allowed"),
        ("__import__('os').system('true')", "character 1: a call is not allowed"),
        ("name.__class__ == 1", "character 1: an attribute is not allowed"),
        ("__class__ > 1", "there is no column '__class__'"),
        ("@layer > 1", "invalid syntax"),
        ("(lambda: 1)() > 0", "a call is not allowed"),
        ("[x for x in name]", "an expression of the kind ListComp is not allowed"),
        ("(layer := 2) > 1", "an assignment is not allowed"),
        ("f'{layer}' == '1'", "an expression of the kind JoinedStr is not allowed"),
        ("effect if layer else 1", "an if is not allowed"),
        ("layer", "is no condition but a number"),
        ("'text'", "is no condition but a text"),
        ("layer and effect > 1", "character 1: a condition must stand here, not a number"),
        ("not layer", "character 5: a condition must stand here, not a number"),
        ("effect > 1 & layer > 2", "write and, or"),
        ("name > 3", "character 8: a text cannot be compared with a number"),
        ("name + 1 == 2", "character 1: a number must stand here, not a text"),
        ("'a' * 10 == name", "a number must stand here, not a text"),
        ("layer is 1", "write == or !="),
        ("layer in 3", "in takes a list"),
        ("layer in (role, 1)", "a list holds numbers and text, no columns"),
        ("layer in (1, 'a')", "a number cannot be compared with a text"),
        ("layer == (1, 2)", "a list outside of in is not allowed"),
        ("layer == None", "None is not allowed"),
        ("layer == 1j", "1j is not allowed"),
        ("layer < " + "9" * 400, "this number is too large"),
        ("(layer > 0) > 0", "a truth cannot be compared with a number"),
        ("(layer > 0) < True", "values of kind truth have no order"),
        ("effect >", "invalid syntax"),
        ("effect > 1; layer > 1", "invalid syntax"),
        ("import os", "invalid syntax"),
        ("layer > 1" + " and layer > 1" * 200, "characters: at most 2000 are read"),
        ("-" * 1900 + "1 > 0", "where="),
        ("(" * 900 + "1" + ")" * 900, "where="),
        ("layer == '\x00'", "where="),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_place_and_columns(where, message):
    with pytest.raises(hw.errors.DeclarationError) as refused:
        table(measurement(), "loss", where=where)
    text = str(refused.value)
    assert message in text
    assert "\n" not in text
    if "character" in text and "at most" not in text:
        assert "columns name, layer, head, value, effect, effect_low, effect_high and role" in text


def test_powers_of_constants_end_at_once():
    assert len(table(measurement(), "loss", where="9 ** 9 ** 9 ** 9 > layer")) == LAYERS * HEADS


ATOMS = st.sampled_from(["layer", "head", "effect", "2", "0.5", "-1"])


SUMS = st.recursive(
    ATOMS, lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: f"({' '.join(parts)})")
)


@given(SUMS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), ATOMS)
def test_numbers_are_what_pandas_computes(left, sign, right):
    frame = table(measurement(), "loss").astype({"layer": float, "head": float})
    text = f"{left} {sign} {right}"
    expected = np.broadcast_to(eval(text, {}, {name: frame[name] for name in ("layer", "head", "effect")}), len(frame))
    np.testing.assert_array_equal(matching(frame, text), expected)


@given(st.text(max_size=40))
def test_no_text_does_more_than_be_refused(text):
    try:
        found = ask(table(measurement(), "loss"), where=text)
    except hw.errors.DeclarationError:
        return
    assert len(found) <= LAYERS * HEADS


def test_columns_of_every_kind():
    frame = pd.DataFrame(
        {
            "when": pd.to_datetime(["2026-01-01", "2026-06-01"]),
            "whole": pd.array([1, None], dtype="Int64"),
            "done": [True, False],
            "word": ["a", None],
            "any": ["a", 1],
        }
    )
    kept = {
        "when >= '2026-02-01'": [1], "when < '2026-02-01'": [0], "whole < 2": [0], "whole != 1": [1], "done": [0],
        "not done": [1], "done == False": [1], "word == 'a'": [0], "any == 1": [1], "any in ('a', 2)": [0],
    }  # fmt: skip
    for where, expected in kept.items():
        assert list(np.flatnonzero(matching(frame, where))) == expected, where
    for where, message in {"when > 'soon'": "'soon' is no date", "any < 2": "have no order"}.items():
        with pytest.raises(hw.errors.DeclarationError, match=message):
            matching(frame, where)


def test_unknown_names_say_what_there_is():
    with pytest.raises(hw.errors.UnknownNameError, match="'lost': did you mean loss"):
        table(measurement(), "lost")
    with pytest.raises(hw.errors.UnknownNameError, match="'ablation/los': did you mean ablation/loss"):
        table(study(), "ablation/los")
    with pytest.raises(hw.errors.UnknownNameError, match="sort='effekt': there are the columns name, layer"):
        table(measurement(), "loss", sort="effekt")
    with pytest.raises(hw.errors.DeclarationError, match="top, the number of rows, must be 1 or more, got 0"):
        table(measurement(), "loss", top=0)
    two = xr.DataTree.from_dict({"/a": measurement(), "/b": measurement()})
    with pytest.raises(hw.errors.UnknownNameError, match="'loss' is in several groups: say a/loss or b/loss"):
        table(two, "loss")


def test_a_variable_without_labels_or_baseline():
    frame = table(xr.Dataset({"score": (("a", "b"), [[1, 2], [3, 4]])}), "score", where="a == 1")
    assert frame.to_dict("list") == {"a": [1, 1], "b": [0, 1], "value": [3, 4]}
    assert table(xr.Dataset({"one": 2.5}), "one").to_dict("list") == {"value": [2.5]}
    text = table(xr.Dataset({"said": ("example", np.array(["x", "y"], dtype=object))}), "said")
    assert list(text["value"]) == ["x", "y"]


def test_dims_keep_their_names_where_a_column_has_the_same():
    ds = xr.Dataset({"score": (("value", "name"), [[1.0, 2.0]])}, coords={"value": [7], "name": ["p", "q"]})
    assert table(ds, "score").to_dict("list") == {"value": [7, 7], "name": ["p", "q"], "score_value": [1.0, 2.0]}


def test_heads_of_pairs_are_named():
    dims = ("sender_layer", "sender_head", "receiver_layer", "receiver_head")
    ds = xr.Dataset({"composition": (dims, np.arange(16.0).reshape(2, 2, 2, 2))})
    (row,) = table(ds, "composition", where="sender == 'L0H1' and receiver == 'L1H0'").to_dict("records")
    assert row["value"] == 6.0


def test_chance_and_q_stand_beside_their_score():
    ds = xr.Dataset(
        {
            "induction": (("layer", "head", "example"), np.ones((1, 2, 4))),
            "chance_induction": ("example", [0.0, 0.5, 0.5, 1.0]),
            "q_induction": (("layer", "head"), [[0.01, 0.9]]),
            "untrained_induction": (("seed", "layer", "head"), np.zeros((3, 1, 2))),
        }
    )
    frame = table(ds, "induction")
    assert list(frame.columns) == ["name", "layer", "head", "value", "chance", "q"]
    assert list(frame["chance"]) == [0.5, 0.5]
    assert list(frame["q"]) == [0.01, 0.9]


def test_missing_examples_are_left_out_of_the_mean():
    ds = xr.Dataset({"loss": (("head", "example"), [[1.0, math.nan], [math.nan, math.nan]])})
    frame = table(ds, "loss")
    assert frame["value"][0] == 1.0
    assert math.isnan(frame["value"][1])
