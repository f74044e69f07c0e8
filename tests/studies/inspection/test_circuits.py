"""Circuits of heads against whole matrices of tokens by tokens, in every family."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from headwise.studies.inspection.circuits import ENDS, OWN
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


def dense_of(matrix):
    """Entries less the mean of their row."""
    return matrix - matrix.mean(1, keepdims=True)


def check_circuit(ds, matrix, kind, top, chosen):
    ends, (rank, z) = ENDS[kind], OWN[kind]
    size, d_head = len(matrix), ds.sizes["index"]
    values = raw_circuits.nonzero_eigenvalues(matrix, d_head)
    made = ds["eigenvalue_real"].values + 1j * ds["eigenvalue_imag"].values
    np.testing.assert_allclose(np.abs(made), np.abs(values), rtol=1e-6, atol=1e-7 * np.abs(values).max())
    np.testing.assert_allclose(np.sort_complex(made.round(4)), np.sort_complex(values.round(4)), atol=2e-4)
    assert float(ds["eigenvalue_score"]) == pytest.approx(values.sum().real / np.abs(values).sum(), abs=1e-6)
    singular = np.linalg.svd(matrix, compute_uv=False)[:d_head]
    np.testing.assert_allclose(ds["singular_value"], singular, rtol=1e-6, atol=1e-7 * singular[0])
    entries, own = dense_of(matrix), np.diag(matrix)
    assert float(ds[rank]) == pytest.approx(((matrix < own[:, None]).sum(1) / (size - 1)).mean(), abs=1e-6)
    assert float(ds[z]) == pytest.approx((np.diag(entries) / entries.std(1)).mean(), rel=1e-6)
    for side, order in (("highest", np.argsort(-entries.ravel())), ("lowest", np.argsort(entries.ravel()))):
        rows, columns = np.unravel_index(order[:top], entries.shape)
        here = ds.sel(side=side)
        np.testing.assert_allclose(here["weight"], entries[rows, columns], rtol=1e-6)
        np.testing.assert_array_equal(here[f"{ends[0]}_id"], rows)
        np.testing.assert_array_equal(here[f"{ends[1]}_id"], columns)
        sign = -1 if side == "highest" else 1
        for at, token in enumerate(chosen):
            best = np.argsort(sign * entries[token])[:top]
            of_token = here.isel(chosen=at)
            np.testing.assert_array_equal(of_token[f"chosen_{ends[1]}_id"], best)
            np.testing.assert_allclose(of_token[f"chosen_{ends[1]}_weight"], entries[token, best], rtol=1e-6)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", ["gpt2", *FEW])
def test_circuits_of_a_head_are_whole_matrices(name, folded):
    module = module_of(name)
    model = hw.load(module)
    layer, head = model.layers[-1], model.heads[-1]
    ov, qk = hw.head_circuits(model, hw.Head(layer, head), tokens=[3, 17], top=4, folded=folded)
    matrix = raw_circuits.ov(module, layer, head, folded)
    check_circuit(ov, matrix, "ov", 4, [3, 17])
    share = (raw_circuits.nonzero_eigenvalues(matrix, model.shape.d_head).real > 0).mean()
    assert float(ov["copying"]) == pytest.approx(share)
    check_circuit(qk, raw_circuits.qk(module, layer, head, folded), "qk", 4, [3, 17])


@pytest.mark.parametrize("name", ["gpt2", *(one for one in FEW if one != "neox without biases")])
def test_circuits_through_earlier_heads_are_whole_matrices(name):
    module = module_of(name)
    model = hw.load(module)
    if len(model.layers) == 1:
        pytest.skip("one layer")
    layer = model.layers[-1]
    ov, qk = hw.head_circuits(model, hw.Head(layer, 1), through={"q": "L0H0", "k": "0.1", "v": hw.Head(0, 0)}, top=3)
    check_circuit(ov, raw_circuits.ov(module, layer, 1, True, (0, 0)), "ov", 3, [])
    check_circuit(qk, raw_circuits.qk(module, layer, 1, True, by_key=(0, 1), by_query=(0, 0)), "qk", 3, [])
    assert (qk.attrs["through_q"], qk.attrs["through_k"], ov.attrs["through_v"]) == ("L0H0", "L0H1", "L0H0")


@pytest.mark.parametrize(
    "name", ["llama", "pythia", "gemma3", "gpt-oss", pytest.param("llama 3", marks=pytest.mark.heavy)]
)
def test_keys_at_a_distance_are_turned_as_the_model_turns_them(name):
    module = raw_families.random_model(name)
    model = hw.load(module)
    distance, size = 3, model.shape.d_head
    kind = ["full_attention"] if name == "gemma3" else []
    cos, sin = module.base_model.rotary_emb(torch.zeros(1, 1, 24), torch.arange(distance + 1)[None], *kind)
    if name == "gpt-oss":
        cos, sin = (torch.cat([one, one], -1) for one in (cos, sin))
    turned = cos.shape[-1]
    swap = np.zeros((size, size))  # for row vectors: (first, second) -> (-second, first)
    half = turned // 2
    swap[half:turned, :half], swap[:half, half:turned] = -np.eye(half), np.eye(half)
    turn = np.eye(size)
    turn[:turned] *= cos[0, distance].double().numpy()[:, None]
    turn += swap * np.pad(sin[0, distance].double().numpy(), (0, size - turned))
    _, qk = hw.head_circuits(model, hw.Head(1, 1), distance=distance, top=3)
    check_circuit(qk, raw_circuits.qk(module, 1, 1, True, turn=turn), "qk", 3, [])


def test_neighbours_are_turned_in_gptj():
    module = raw_families.random_model("gptj")
    turn = np.eye(8)
    for pair in range(2):
        angle, at = 3 / 10000 ** (2 * pair / 4), slice(2 * pair, 2 * pair + 2)
        turn[at, at] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    _, qk = hw.head_circuits(hw.load(module), hw.Head(1, 1), distance=3, top=3)
    check_circuit(qk, raw_circuits.qk(module, 1, 1, True, turn=turn), "qk", 3, [])


def test_an_induction_head_matches_by_the_token_before_its_key(words_model):
    _, alone = hw.head_circuits(words_model, "L1H2")
    ov, through = hw.head_circuits(words_model, "L1H2", through={"k": "L0H3"}, tokens=["apple"])
    assert float(through["prefix_matching"]) > 0.99 > float(alone["prefix_matching"])
    assert float(ov["copying"]) == 1
    assert (
        ov["source_token"].sel(side="highest", rank=0).item() == ov["output_token"].sel(side="highest", rank=0).item()
    )
    apple = through.sel(chosen="apple", side="highest", rank=0)
    assert int(apple["chosen_id"]) == words_model.encode("apple")[0]
    assert apple["chosen_key_token"].item() == "apple"


@pytest.mark.parametrize(
    ("given", "more", "says"),
    [
        ("L1H8", {}, "has heads 0 to 7"),
        ("L2H0", {}, "has layers 0 to 1"),
        ("one", {}, "cannot read 'one' as a head"),
        (7, {}, "7 is no head"),
        ("L1H2", {"through": "L1H0"}, "keys of L1H2 read heads of earlier layers only"),
        ("L1H2", {"through": {"z": "L0H0"}}, "possible are q, k and v"),
        ("L1H2", {"distance": 1}, "does not rotate q and k"),
        ("L1H2", {"top": 0}, "top"),
        ("L1H2", {"tokens": ["nosuchword"]}, "not in the vocabulary"),
        ("L1H2", {"tokens": ["apple banana"]}, "is 2 tokens of words-2l: 'apple' 'banana'"),
        ("L1H2", {"tokens": [100000]}, "has 0 to 856"),
    ],
)
def test_what_cannot_be_is_refused(words_model, given, more, says):
    with pytest.raises(DeclarationError, match=says):
        hw.head_circuits(words_model, given, **more)


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
