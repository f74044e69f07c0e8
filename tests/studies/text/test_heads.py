"""What heads are called on text: the scores against plain Hugging Face passes, and the names of planted patterns."""

import random

import numpy as np
import pytest
import torch
import xarray as xr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import headwise as hw
from headwise.errors import DeclarationError
from headwise.studies.text import heads
from headwise.studies.text.brackets import relations, structure
from headwise.studies.text.claims import CLAIMS, weights
from headwise.studies.text.windows import windows

END = "<|endoftext|>"


def code(seed):
    """A made-up Python source with blocks within blocks and brackets within brackets."""
    draw = random.Random(seed)
    names = ["alpha", "beta", "gamma", "delta", "x", "y", "total", "value"]

    def expression(depth):
        if depth == 0 or draw.random() < 0.3:
            return draw.choice(names)
        parts = ", ".join(expression(depth - 1) for _ in range(draw.randint(1, 3)))
        return draw.choice([f"{draw.choice(names)}({parts})", f"[{parts}]", f"({draw.choice(names)} + {parts})"])

    def block(depth):
        lines = []
        for _ in range(draw.randint(2, 4)):
            if depth and draw.random() < 0.6:
                lines.append(f"{draw.choice(['if', 'while'])} {expression(1)}:")
                lines += ["    " + line for line in block(depth - 1)]
            else:
                lines.append(f"{draw.choice(names)} = {expression(3)}")
        return lines

    functions = [[f"def {draw.choice(names)}(a, b):", *("    " + line for line in block(3))] for _ in range(8)]
    return "".join(f"{line}\n" for lines in functions for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    for seed in range(14):
        (path / f"file{seed:02}.py").write_text(code(seed))
    (path / "prose.txt").write_text("No brackets count here (not one), since this is no Python. " * 30)
    return path


def random_model(layers, heads):
    """A random GPT-2 with a byte-level tokenizer, trained on such a source."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([code(99)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=END, eos_token=END, bos_token=END)
    torch.manual_seed(0)
    sizes = {"n_layer": layers, "n_head": heads, "n_embd": 4 * heads, "n_positions": 64, "vocab_size": 400}
    config = GPT2Config(**sizes, initializer_range=0.6, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    return hw.load(GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model(folder):
    return random_model(2, 4)


def spans(model, text, start, size):
    """Where the tokens of a window begin and end: by the texts of the tokens, one after the other."""
    pieces = [model.tokenizer.decode([one]) for one in model.tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    ends = np.cumsum([len(one) for one in pieces])
    return (ends - [len(one) for one in pieces])[start : start + size], ends[start : start + size]


def test_scores_are_those_of_plain_passes(model, folder):
    ds = heads.text_heads(model, folder, n=24, check=False, progress=False)
    found = windows(model, folder, None, 24, 0)
    sums = {}
    for tokens, file, start in zip(found.tokens, found.files, found.starts.tolist(), strict=True):
        text = (folder / file).read_text()
        related = relations(structure(text), *spans(model, text, start, 64)) if file.endswith(".py") else None
        patterns = torch.stack(model.module(torch.tensor(tokens)[None], output_attentions=True).attentions)[:, 0]
        for name, weight in weights(tokens, related).items():
            for part, by in zip(("score", "mismatch", "same distance"), weight, strict=False):
                value = np.nan if by is None else (patterns.detach().numpy() * by).sum(axis=(-1, -2)) * weight.queries
                total, queries = sums.get((name, part, file), (0.0, 0))
                sums[name, part, file] = total + value, queries + weight.queries
    assert {file for _, _, file in sums} == {*ds["unit"].values.tolist()}
    for (name, part, file), (total, queries) in sums.items():
        own = ds["score"] if part == "score" else ds["control_score"].sel(control=part)
        expected = total / queries if queries else np.full((2, 4), np.nan)
        np.testing.assert_allclose(own.sel(claim=name, unit=file), np.broadcast_to(expected, (2, 4)), atol=1e-5)
        assert int(ds["queries"].sel(claim=name, unit=file)) == queries
    assert ds.attrs["python_files"] == len({file for file in found.files if file.endswith(".py")})
    assert float(ds["queries"].sel(claim="closing bracket").sum()) > 50
    assert int(ds["queries"].sel(claim="closing bracket", unit="prose.txt")) == 0


def planted(tokens, related):
    """The pattern of each planted head on a window: what it does where it can, and the first token elsewhere."""
    size = len(tokens)
    at = np.arange(size)
    openers = related.openers if related is not None else np.array([], dtype=int)

    def pattern(targets):
        made = np.zeros((size, size))
        for query in range(size):
            made[query, targets.get(query, 0)] = 1.0
        return made

    def pairs(*names):
        return {q: k for name in names for q, k in (getattr(related, name).tolist() if related is not None else ())}

    last_opener = {q: int(openers[openers < q][-1]) for q in range(size) if (openers < q).any()}
    duplicate = {q: k for q in range(size) for k in range(q) if tokens[k] == tokens[q]}
    return {
        "brackets": pattern(pairs("inside", "closing")),
        "last opener": pattern(last_opener),
        "previous": pattern({q: max(q - 1, 0) for q in range(size)}),
        "three back": pattern({q: max(q - 3, 0) for q in range(size)}),
        "uniform": np.tril(np.ones((size, size))) / (1 + at[:, None]),
        "same line": pattern(pairs("same")),
        "opens the block": pattern(pairs("block")),
        "duplicate": pattern(duplicate),
        "successor": pattern({q: k + 1 for q, k in duplicate.items()}),
        "rests": pattern({}),
        "self": pattern({q: q for q in range(size)}),
    }


@pytest.fixture(scope="module")
def called(folder):
    """What `text_heads` says where the attention of a model is the planted one."""
    model = random_model(1, 11)
    found = windows(model, folder, None, 45, 0)
    related, _ = heads._relations(model, folder, found)
    by_window = {row.tobytes(): planted(row, one) for row, one in zip(found.tokens, related, strict=True)}
    names = [*next(iter(by_window.values()))]

    def measure(model, block, what, metrics, **options):
        patterns = torch.tensor(np.array([[by_window[row.tobytes()][name] for name in names] for row in block.tokens]))
        batch = block.draw(model)
        facts = batch.facts("clean", batch.groups()[0])
        values = {one.name: one.kernel(patterns, torch.tensor(one.prepare(facts)["weights"])) for one in metrics}
        return xr.Dataset(
            {name: (("layer", "head", "example"), value.T.numpy()[None]) for name, value in values.items()}
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "measure", measure)
        ds = heads.text_heads(model, folder, n=45, check=False, progress=False)
    return ds.isel(layer=0).assign_coords(head=names)


def test_planted_heads_get_their_names(called):
    assert dict(zip(called["head"].values.tolist(), called["called"].values.tolist(), strict=True)) == {
        "brackets": "nested bracket",
        "last opener": "last bracket",
        "previous": "previous token",
        "three back": "none of these",
        "uniform": "none of these",
        "same line": "same indentation",
        "opens the block": "block opener",
        "duplicate": "duplicate token",
        "successor": "induction",
        "rests": "first token",
        "self": "current token",
    }


def test_a_head_that_matches_brackets_fits_each_claim_about_them(called):
    fits = called["fits"].sel(head="brackets").to_series()
    assert [name for name in CLAIMS if fits[name]] == [
        "closing bracket",
        "nested bracket",
        "inside bracket",
        "first token",
    ]
    assert not called["fits"].sel(claim="nested bracket").drop_sel(head="brackets").any()
    assert (called["difference_low"].sel(claim="nested bracket", head="brackets") > 0.2).all()


def test_each_name_is_by_the_rule(called):
    gap = (called["score"] - called["control_score"]).mean("unit").min("control")
    fits = (gap >= 0.2) & (called["q"] <= 0.05)
    assert (fits == called["fits"]).all()
    rests = [name for name, claim in CLAIMS.items() if claim.resting]
    for head in called["head"].values:
        own = gap.sel(head=head).where(fits.sel(head=head), -1)
        moving = own.drop_sel(claim=rests)
        best = moving if float(moving.max()) > 0 else own
        name = str(best["claim"].values[best.values.argmax()]) if float(best.max()) > 0 else "none of these"
        assert str(called["called"].sel(head=head).values) == name


def test_heads_that_a_claim_fits_are_ablated_against_random_ones(tmp_path):
    words = ["apple", "banana", "cherry", "dog", "cat", "apple", "dog", "banana", "cat", "red", "green"]
    (tmp_path / "words.txt").write_text(" ".join(random.Random(0).choices(words, k=400)))
    model = hw.load("words-2l")
    ds = hw.text_heads(model, tmp_path / "words.txt", context=20, n=16, controls=4, check=False)
    names = ds["ablated"].values.tolist()
    assert names == [name for name in CLAIMS if ds["fits"].sel(claim=name).any()]
    number = names.index("previous token")
    assert str(ds["ablated_heads"].values[number]) == "L0H3"
    found = windows(model, tmp_path / "words.txt", 20, 16, 0)
    what = {"set": hw.MeanAblate("L0H3"), "clean": None}
    losses = hw.measure(model, found, what, "loss", per_position=True)["loss"].values
    recurs = np.array([[any(row[k] == row[q] and row[k + 1] == row[q + 1] for k in range(q)) for q in range(19)]
                       for row in found.tokens])  # fmt: skip
    place = "tokens that followed an earlier occurrence of the token before them"
    for values, own in ((losses[0], ds["loss_without"].isel(ablated=number)), (losses[1], ds["loss_whole"])):
        expected = np.array([row[here].mean() for row, here in zip(values[:, :19], recurs, strict=True)])
        np.testing.assert_allclose(own.sel(place=place), expected, atol=1e-5)
        np.testing.assert_allclose(own.sel(place="every token"), values[:, :19].mean(axis=1), atol=1e-5)
    rise = (ds["loss_without_random"] - ds["loss_whole"]).mean("window").isel(ablated=number).sel(place=place)
    own = float((ds["loss_without"] - ds["loss_whole"]).mean("window").isel(ablated=number).sel(place=place))
    expected = (1 + (rise >= own).sum("draw")) / 5
    np.testing.assert_allclose(ds["p_without"].isel(ablated=number).sel(place=place), expected)
    assert ds["loss_without"].sel(place="closing brackets").isnull().all()


def test_a_result_is_stored_and_listed(model, folder, tmp_path):
    ds = heads.text_heads(model, folder, n=4, check=False, progress=False)
    hw.write_netcdf(ds, tmp_path / "heads.nc")
    back = hw.open_result(tmp_path / "heads.nc", load=True)
    xr.testing.assert_identical(back, ds)
    assert "text_heads" in repr(hw.Results(tmp_path))
    assert ds["unit"].attrs["long_name"] == "file and first token"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 1.5}, "threshold=1.5: possible is a number between 0 and 1"),
        ({"alpha": 0}, "alpha=0: possible is a number between 0 and 1"),
        ({"controls": -1}, "controls"),
        ({"context": 65}, "reads at most 64 tokens"),
        ({"text": "nowhere"}, "there is no such file or folder"),
    ],
)
def test_what_cannot_be_is_refused(model, folder, options, says):
    with pytest.raises(DeclarationError, match=says):
        hw.text_heads(model, **{"text": folder} | options)
