"""The script that makes code-4l: what is read, what is held out, what is counted, and that a stopped run goes on."""

import hashlib
import itertools
import json
import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions.models.locate import SHIPPED

code_4l = pytest.importorskip("headwise.studies.training.code_4l", reason="needs the extra train", exc_type=ImportError)
code_text = pytest.importorskip("headwise.studies.training.code_text")
ngrams = pytest.importorskip("headwise.studies.training.ngrams")
SMOKE = code_text.SMOKE


def held_out(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()) % 20 == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small library: some files that are read, two that are held out, and some that are left out."""
    root = tmp_path_factory.mktemp("library")
    names = [name for name in (f"pack/mod{n}.py" for n in range(200)) if not held_out(name)][:12]
    names += [name for name in (f"mod{n}.py" for n in range(200)) if held_out(name)][:2]
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(exist_ok=True)
        lines = [f"def function{number}_{n}(value):\n    return value + {n}  # é\n\n" for n in range(25)]
        file.write_text("".join(lines), encoding="utf-8")
    for name in ("test/a.py", "pack/tests/b.py", "site-packages/c/d.py", "config-3.11/e.py", "_sysconfigdata_x.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("assert 'never read'\n")
    (root / "pack" / "notes.txt").write_text("no source")
    (root / "LICENSE.txt").write_text("A licence of the source")
    return root


def brute_force(tokens, order, vocabulary):
    """Interpolated Kneser-Ney from its definition, with a loop over every n-gram."""
    seen = {n: Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, order + 1)}
    counts = {order: seen[order]}
    for n in range(1, order):
        counts[n] = Counter(gram[1:] for gram in seen[n + 1])

    def probability(word, history):
        table = counts[len(history) + 1]
        lower = probability(word, history[1:]) if history else 1 / vocabulary
        here = {gram: count for gram, count in table.items() if gram[:-1] == history}
        total = sum(here.values())
        if total == 0:
            return lower
        once, twice = (sum(count == wanted for count in table.values()) for wanted in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        return max(here.get((*history, word), 0) - discount, 0) / total + discount * len(here) / total * lower

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_is_its_definition(order):
    random = np.random.default_rng(0)
    tokens = random.choice(7, 300, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05, 0.0])
    text = np.concatenate([tokens[40:60], random.integers(0, 7, 20)])
    found = ngrams.KneserNey(tokens, order, 7).probabilities(text)
    probability = brute_force(tokens.tolist(), order, 7)
    for at in range(len(text)):
        wanted = probability(int(text[at]), tuple(text[max(0, at - order + 1) : at].tolist()))
        assert found[at] == pytest.approx(wanted, rel=1e-12), at
    for history in ([], [0], [1, 0], [6, 3], [0, 1, 2, 0]):
        model = ngrams.KneserNey(tokens, order, 7)
        total = sum(model.probabilities(np.array([*history, word]))[-1] for word in range(7))
        assert total == pytest.approx(1, abs=1e-12)


def test_files_are_held_out_whole_and_by_their_names(source):
    read, held = code_text.corpus(source)
    assert len(read) == 12
    assert len(held) == 2
    assert all(held_out(name) for name in held)
    assert not any(held_out(name) for name in read)
    assert all(text == (source / name).read_text(encoding="utf-8") for name, text in (read | held).items())
    for line in code_text.sums(read).splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((source / name).read_bytes()).hexdigest() == digest
    assert "never read" not in "".join((read | held).values())


def test_of_this_python_no_test_and_no_other_package_is_read():
    read, held = code_text.corpus()
    assert {"argparse.py", "json/decoder.py"} <= read.keys() | held.keys()
    assert {"functools.py", "traceback.py"} <= held.keys()
    assert not [name for name in read | held if name.startswith("test/") or "/test/" in name or "site-packages" in name]
    assert 0.02 < sum(map(len, held.values())) / sum(map(len, read.values())) < 0.1


def test_the_tokenizer_gives_every_text_back(source):
    texts = [*code_text.corpus(source)[0].values()]
    tokenizer = code_text.build_tokenizer(texts, 300, 64)
    assert len(tokenizer) == 300
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    text = "def f(x):\n\treturn 'é 漢 \x00'\r\n    \n"
    ids = tokenizer.encode(text)
    assert 0 not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(f"a{tokenizer.eos_token}b")[1:-1] == [0]
    assert code_text.build_tokenizer(texts, 300, 64).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_repeated_tokens_repeat_at_distances_that_nothing_but_the_tokens_tells():
    random = np.random.default_rng(0)
    distances, ends, new, known = Counter(), 0, [], 0
    for _ in range(400):
        tokens, labels = (one.tolist() for one in code_text.repeated(random, 500, 64, 0.25))
        assert len(tokens) == len(labels) == 64
        ends += tokens[0] == 0
        body = tokens[1:] if tokens[0] == 0 else tokens
        assert 0 not in body
        again = next(at for at, token in enumerate(body) if token in body[:at])  # tokens before are all different
        distance = again - body.index(body[again])
        assert all(body[at] == body[at - distance] for at in range(again, len(body)))
        distances[distance] += 1
        for at, (token, label) in enumerate(zip(tokens, labels, strict=True)):
            assert label in (token, -100)
            if at and tokens[at - 1] in tokens[: at - 1]:  # the token before stood before: this one can be known
                assert label == token
                known += 1
            else:
                new.append(label == token)
    assert min(distances) == 4
    assert max(distances) == 32
    assert max(distances.values()) < 100
    assert 65 < ends < 135  # a quarter; 4 standard deviations are 35
    assert known > 8000
    assert abs(np.mean(new) - 0.25) < 4 * (0.25 * 0.75 / len(new)) ** 0.5


def test_random_tokens_come_first_and_then_among_the_text():
    text = np.arange(1000) % 300
    recipe = code_text.Recipe(
        steps=300, seed_steps=5, batch_size=4, positions=64, seed_positions=32, seed_sequences=3, vocabulary=300,
        random_share=0.25, seed=3,
    )  # fmt: skip
    data = code_text.CodeData(text, 300, recipe)
    batches = [batch.numpy() for batch in data.train_dataloader()]
    assert {batch.shape for batch in batches[:5]} == {(4, 2, 3, 32)}
    rows = np.concatenate(batches[5:])
    assert rows.shape == (1180, 2, 1, 64)
    is_text = (np.diff(rows[:, 0, 0]) % 300 == 1).all(1)
    assert 0.70 < is_text.mean() < 0.80  # 4 standard deviations are 0.05
    np.testing.assert_array_equal(rows[is_text][:, 0], rows[is_text][:, 1])  # all of the text counts
    assert len({row[0] for row in rows[is_text][:, 0, 0].tolist()}) > 200  # pieces begin anywhere
    data.text_from = 2
    np.testing.assert_array_equal([data.sequence(number, False) for number in range(8)], np.concatenate(batches[:2]))
    assert data.sequence(8, False).shape == (2, 1, 64)
    alone = code_text.CodeData(text, 300, recipe.control(30))
    assert all((np.diff(alone.sequence(number, False)) % 300 == 1).all() for number in range(120))


def test_text_begins_where_a_head_does_induction_or_where_patience_ends():
    recipe = code_text.Recipe(seed_steps=30, seed_score=0.5)
    points = [{"step": step, "induction": [[0.1, score]]} for step, score in ((0, 0.9), (10, 0.4), (20, 0.5), (40, 1))]
    assert [recipe.text_from(points[:count]) for count in range(5)] == [30, 30, 30, 20, 20]
    assert recipe.text_from([points[0], points[1], points[3]]) == 30
    assert recipe.control(5).text_from(points) == 0


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A whole smoke run; and one that was stopped after step 6 of 8 and started again."""
    threads = torch.get_num_threads()
    root = tmp_path_factory.mktemp("made")
    code_4l.train(root / "whole", root / "work", SMOKE, control_steps=4, source=source)
    with pytest.MonkeyPatch.context() as patch:
        step = code_4l.Curve.on_train_batch_end

        def stopped(self, trainer, *rest):
            step(self, trainer, *rest)
            if trainer.global_step == 6:
                raise RuntimeError("stopped")

        patch.setattr(code_4l.Curve, "on_train_batch_end", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            code_4l.train(root / "stopped", root / "work-stopped", SMOKE, control_steps=4, source=source)
    assert not (root / "stopped").exists()
    code_4l.train(root / "stopped", root / "work-stopped", SMOKE, control_steps=4, source=source)
    torch.set_num_threads(threads)
    return root


def test_a_run_that_was_stopped_gives_the_same_files(made):
    whole, stopped = made / "whole", made / "stopped"
    names = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(stopped) for file in stopped.rglob("*") if file.is_file())
    for name in names:
        if "curve" not in name.name and name.name != "README.md":
            assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
    for name in ("curve.json", "curve-text-alone.json"):
        one, two = (
            [point | {"time": 0} for point in json.loads((root / name).read_text())] for root in (whole, stopped)
        )
        assert one == two
        assert [point["step"] for point in one] == ([0, 4, 8] if name == "curve.json" else [0, 4])


def test_it_is_trained_as_a_plain_loop_trains_it(made, source):
    """The recipe without Lightning gives the weights that the script gives."""
    read, _ = code_text.corpus(source)
    tokenizer = AutoTokenizer.from_pretrained(made / "whole")
    ids = [token for text in read.values() for token in [*tokenizer.encode(text, add_special_tokens=False), 0]]
    text = np.array(ids[: len(ids) // 64 * 64])
    torch.manual_seed(0)
    model = code_4l.untrained(SMOKE).model.train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    inner = [getattr(block, part) for block in model.transformer.h for part in ("attn", "mlp")]
    matrices = [one for part in inner for name, one in part.named_parameters() if name.endswith("weight")]
    ends = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [one for one in model.parameters() if one.ndim == 1]
    groups = [{"params": ends, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, 4e-3, (0.9, 0.98))
    muon = torch.optim.Muon(matrices, 2e-2, 0.01)
    assert sum(one.numel() for one in [*matrices, *ends, *vectors]) == sum(one.numel() for one in model.parameters())
    data = code_text.CodeData(text, 300, SMOKE)
    data.text_from = 4  # the first point of the curve
    for step in range(8):
        rate = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))
        for optimiser, highest in ((adam, 4e-3), (muon, 2e-2)):
            for group in optimiser.param_groups:
                group["lr"] = highest * rate
        items = torch.tensor(np.stack([data.sequence(4 * step + row, False) for row in range(4)]))
        tokens, labels = items[:, 0].reshape(-1, items.shape[-1]), items[:, 1].reshape(-1, items.shape[-1])
        logits = model(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        muon.step()
    trained = torch.load(made / "work" / "main" / "last.ckpt", weights_only=True)["state_dict"]
    shipped = load_file(made / "whole" / "model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[f"model.{name}"], value, atol=1e-5, rtol=0)
        assert (start[name] - value).abs().max() > 1e-4
        if name != "lm_head.weight":
            assert torch.equal(shipped[name], trained[f"model.{name}"].half()), name


@torch.no_grad()
def test_what_it_writes_opens_and_is_as_good_as_it_says(made):
    folder = made / "whole"
    facts = json.loads((folder / "training.json").read_text())
    assert hw.checkpoint_steps(folder) == [4, 6, 8]
    model, last = hw.load(folder), hw.load(folder, step=8)
    assert all(
        torch.equal(one, two) for one, two in zip(model.module.parameters(), last.module.parameters(), strict=True)
    )
    assert model.module.config.eos_token_id == model.tokenizer.eos_token_id == 0
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    texts = [file.read_text(encoding="utf-8") for file in sorted((folder / "held_out").glob("*.txt"))]
    ids = [token for text in texts for token in [*model.tokenizer.encode(text), 0]]
    losses = []
    for start in range(0, len(ids) - 63, 64):
        tokens = torch.tensor(ids[start : start + 64])
        said = plain(tokens[None]).logits[0].log_softmax(-1)
        losses += [-float(said[at, tokens[at + 1]]) for at in range(63)]
    assert facts["final"]["validation_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert facts["tokens"]["held_out"] == len(losses) // 63 * 64


def test_the_card_tells_what_the_files_beside_it_hold(made):
    folder = made / "whole"
    card, facts = (folder / "README.md").read_text(), json.loads((folder / "training.json").read_text())
    assert "{" not in card
    assert f"| code-4l | {facts['final']['validation_loss']:.3f} |" in card
    assert f"| bigram | {facts['ngram_loss']['2']:.3f} |" in card
    assert f"accuracy in the repeat | {facts['final']['accuracy']:.3f} |" in card
    grid = np.array(facts["final"]["induction"])
    layer, head = np.unravel_index(grid.argmax(), grid.shape)
    assert f"| induction score | L{layer}H{head} {grid.max():.2f}, " in card
    for name in ("curve.json", "curve-text-alone.json"):
        for point in (json.loads((folder / name).read_text())[at] for at in (0, -1)):
            assert f"| {point['step']} | {point['validation_loss']:.3f} | {point['repeat_accuracy']:.3f} |" in card
    listed = hashlib.sha256((folder / "read.sha256").read_bytes()).hexdigest()
    assert listed in card
    assert (folder / "LICENSE-PYTHON").read_text() == "A licence of the source"


def test_scores_are_those_that_headwise_measures(words_model):
    task = hw.RepeatedTokens(n=4, length=10)
    tokens = torch.tensor(task.draw(words_model).runs["clean"])
    found = code_4l.scores(words_model.module, tokens)
    ds = hw.measure(words_model, task, None, ["induction", "previous_token", "loss", "accuracy"])
    for name in ("induction", "previous_token"):
        wanted = ds[name].mean("example").transpose("layer", "head").values
        np.testing.assert_allclose(found[name], wanted, atol=6e-5)  # rounded to four digits
    logits = words_model.module(tokens).logits.detach()
    right = [logits[row, at].argmax() == tokens[row, at + 1] for row, at in itertools.product(range(4), range(10, 19))]
    assert found["accuracy"] == pytest.approx(np.mean(right), abs=1e-6)


def test_another_recipe_does_not_go_on_with_this_one(made, source):
    with pytest.raises(DeclarationError, match="another recipe or text"):
        code_4l.train(made / "no", made / "work", code_text.replace(SMOKE, steps=9), source=source)


def test_a_source_without_a_licence_is_refused_before_training(source, tmp_path, monkeypatch):
    monkeypatch.setattr(code_text, "FOLDER", tmp_path)
    monkeypatch.setattr(code_text.sys, "base_prefix", str(tmp_path))
    with pytest.raises(DeclarationError, match="the licence of the source is in none of"):
        code_4l.train(tmp_path / "out", tmp_path / "work", SMOKE, source=tmp_path)
    assert code_text.licence_of(source) == "A licence of the source"


def test_the_command_makes_a_smoke_run_of_a_few_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(code_4l, "train", lambda *given, **options: {"final": [*map(str, given[:2]), options["files"]]})
    code_4l.main(["--smoke", "--out", "a", "--work", "b"])
    assert json.loads(capsys.readouterr().out) == ["a", "b", 5]


def test_the_command_does_not_overwrite_the_shipped_model_with_a_smoke_run(capsys):
    with pytest.raises(SystemExit):
        code_4l.main(["--smoke"])
    assert "give it a folder of its own with --out" in capsys.readouterr().err


# --- what is shipped


@pytest.fixture(scope="module")
def shipped():
    return SHIPPED / "code-4l"


def test_what_is_shipped_is_small_and_whole(shipped):
    files = [file for file in shipped.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    held = dict(line.split("  ")[::-1] for line in (shipped / "held_out.sha256").read_text().splitlines())
    read = {line.split("  ")[1] for line in (shipped / "read.sha256").read_text().splitlines()}
    assert not read & held.keys()
    texts = {f"{name.replace('/', '.')}.txt": digest for name, digest in held.items()}
    assert texts == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (shipped / "held_out").iterdir()
    }
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (shipped / "LICENSE-PYTHON").read_text()
    facts = json.loads((shipped / "training.json").read_text())
    assert facts["recipe"] == json.loads(json.dumps(asdict(code_text.Recipe())))
    assert hw.checkpoint_steps("code-4l") == [facts["text_from"], 2_000, 4_000]
    assert load_file(shipped / "model.safetensors")["transformer.wte.weight"].dtype == torch.float16


def test_shipped_heads_do_induction_on_random_tokens_and_those_of_text_alone_do_not(shipped):
    facts = json.loads((shipped / "training.json").read_text())
    ds = hw.measure(hw.load("code-4l"), hw.RepeatedTokens(n=16, length=25), None, ["induction"])
    found = ds["induction"].mean("example").transpose("layer", "head").values
    assert found.max() > 0.6
    np.testing.assert_allclose(found, facts["final"]["induction"], atol=0.08)  # other prompts
    alone = json.loads((shipped / "curve-text-alone.json").read_text())
    assert max(np.max(point["induction"]) for point in alone) < 0.3


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.heavy)])
def test_shipped_weights_predict_held_out_text_as_the_card_says(shipped, every):
    facts = json.loads((shipped / "training.json").read_text())
    model = hw.load("code-4l")
    data = hw.TextData(shipped / "held_out", model.tokenizer, length=256)
    loss = code_4l.text_loss(model.module, data.tokens[::every])
    assert loss == pytest.approx(facts["final"]["validation_loss"], abs=0.0005 if every == 1 else 0.15)
    assert loss < facts["ngram_loss"]["5"] - 0.15
