"""The formation study: change points, order and controls of simulated trainings, and the numbers of tiny real ones."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ResultError, UnknownNameError
from headwise.studies.dynamics.formation_look import Look
from headwise.studies.reproduce.recipe import recipe
from headwise.studies.training.during import hold
from headwise.studies.training.repeats import ZipfData
from tests.support import formation

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Lightning are not ours
TINY = {"heads": 2, "width": 8, "vocabulary": 16, "context": 16, "lead": 2, "batch": 2, "n": 2, "length": 4}
TINY |= {"period": (3, 6)}


@pytest.fixture(scope="module")
def simulated():
    return formation.result()


def test_change_points_order_and_fall_are_those_that_were_put_in(simulated):
    changes = simulated["changes"].to_dataset().sel(training="main")
    for name, step in formation.CHANGES.items():
        for seed in range(3):
            found = changes.sel(curve=name, seed=seed)
            assert float(found["change_step"]) == pytest.approx(step * 1.1**seed, rel=0.05)
            assert float(found["change_low"]) <= float(found["change_step"]) <= float(found["change_high"])
        here = changes.sel(curve=name)
        assert float(here["mean_step"]) == pytest.approx(step * 1.1, rel=0.05)
        logs = np.log(here["change_step"].values)
        half = 4.302653 * logs.std(ddof=1) / np.sqrt(3)  # Student's t of two degrees of freedom
        assert float(here["mean_low"]) == pytest.approx(np.exp(logs.mean() - half), rel=1e-5)
        assert float(here["mean_high"]) == pytest.approx(np.exp(logs.mean() + half), rel=1e-5)
    before = changes.sel(curve="previous_token")
    assert float(before["ratio"]) == pytest.approx(0.5, rel=0.05)
    assert float(before["ratio_high"]) < 1
    loss = changes.sel(curve="repeat_loss")
    assert float(loss["ratio"]) == pytest.approx(1, rel=0.03)
    assert loss["share_of_change"].values == pytest.approx(0.8, abs=0.06)
    assert float(changes["appeared"].sel(curve="in_context_new")) == 0
    assert simulated["curves"]["best_previous_token"].sel(training="main").values.tolist() == ["L0H1"] * 3
    assert simulated["curves"]["best_behind"].sel(training="main").values.tolist() == ["L1H0"] * 3
    assert simulated["curves"]["distance_behind"].sel(training="main").values.tolist() == [formation.DISTANCE] * 3
    assert float(changes["appeared"].sel(curve="induction")) == 0


def test_curves_are_what_their_words_say(simulated):
    measured, study, curves = formation.measured(), formation.STUDY, simulated["curves"].to_dataset()
    for step, seed, example in ((0, 0, 0), (25, 1, 3), (-1, 2, 2)):
        at = {"training": 0, "seed": seed, "step": step}
        here, made = measured.isel(at | {"example": example}), curves.isel(at)
        early = np.mean([float(here["held_out_loss"][0, query]) for query in range(study.period[0] - 1)])
        late = np.mean(
            [float(here["held_out_loss"][0, query]) for query in range(study.context - 9, study.context - 1)]
        )
        assert float(made["in_context"][example]) == pytest.approx(late - early, abs=1e-5)
        loss = np.mean([float(here["loss"][query]) for query in range(12, 23)])
        assert float(made["repeat_loss"][example]) == pytest.approx(loss, abs=1e-5)
        assert float(made["behind"][example]) == pytest.approx(float(here["behind"][1, 0, 1]), abs=1e-6)
        assert float(made["k_of_previous"]) == pytest.approx(float(here["composition"][1, 1, 0]), abs=1e-6)


def test_its_sentences_are_written_from_the_numbers(simulated):
    said = {}
    for one in json.loads(simulated.attrs["conclusion"]):
        said.setdefault(one["group"], []).append(one["text"])
    step = float(simulated["changes"]["mean_step"].sel(training="main", curve="behind"))
    text = " ".join(said["summary"])
    assert f"Induction appears in 3 of 3 trainings, at step {step:.0f} (95% over seeds:" in text
    assert "How many places behind the earlier copy that head looks, by training: 2 (in 3). At 1 stands" in text
    assert "The previous-token head of layer 0 comes before induction: in 3 of 3 trainings with both it" in text
    assert "No duplicate-token head appears in layer 0, in the same training" in text
    assert "With one layer, induction appears in none of 3 trainings" in text
    assert "knocked out throughout training in every head of layer 0, induction appears in none of 3" in text
    assert "Intervals over 3 seeds say little" in said["limits"][0]
    assert any(text.startswith("50% of the tokens follow from the one two before") for text in said["limits"])
    assert any(
        text.startswith("In-context-learning score where nothing repeats: no change point") for text in said["changes"]
    )


def test_a_training_is_measured_as_it_is_trained(tmp_path):
    study = hw.FormationStudy(**TINY, steps=6, measured=6, seeds=1, trainings=("main", "knockout in layer 0"))
    tree = study.run(progress=False, out=tmp_path / "a.nc")
    module = hw.CausalLM.tiny(2, 2, 8, vocabulary=16, context=16, seed=0).model.eval()
    tokens = torch.as_tensor(study.task.draw(hw.load(module)).runs["clean"])
    module.set_attn_implementation("eager")
    for training in study.trainings:
        hooks = hold(module, study.held(training, 16)) if training != "main" else []
        with torch.no_grad():
            out = module(tokens, output_attentions=True)
        [hook.remove() for hook in hooks]
        at = {"training": training, "seed": 0, "step": 0}
        queries = torch.arange(1, 8)
        for layer in range(2):
            previous = out.attentions[layer][:, :, queries, queries - 1].mean((0, 2))
            found = tree["heads"]["previous_token"].sel(at | {"layer": layer}).values
            np.testing.assert_allclose(found, previous, atol=1e-5)
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        for place, first, last in (("behind", 4, 8), ("back", 0, 8)):
            for distance in range(1, 5):
                each = []
                for query in range(first, last):
                    key = query - 4 + distance if place == "behind" else query - distance
                    if 0 <= key <= query:
                        each.append(out.attentions[1][:, :, query, key].mean(0))
                found = tree["heads"][place].sel(at | {"layer": 1, "distance": distance}).values
                np.testing.assert_allclose(found, torch.stack(each).mean(0), atol=1e-5)
        np.testing.assert_allclose(tree["behaviour"]["loss"].sel(at).values[:-1], loss.view(2, -1).mean(0), atol=1e-5)
    blind = tree["heads"]["previous_token"].sel(training="knockout in layer 0", layer=0)
    assert float(np.abs(blind).max()) == 0
    assert float(tree["heads"]["previous_token"].sel(training="main", layer=0).min()) > 0
    moved = tree["behaviour"]["loss"].sel(training="main", seed=0, position=2)
    assert float(abs(moved.sel(step=6) - moved.sel(step=0))) > 1e-4
    again = study.run(progress=False, out=tmp_path / "a.nc")
    assert again.attrs["created"] == tree.attrs["created"]
    assert hw.open_result(tmp_path / "a.nc")["curves"].equals(again["curves"])


def test_the_look_of_held_out_sequences_is_the_loss_of_each_part():
    study = hw.FormationStudy(**TINY, steps=6, measured=6, seeds=1)
    model = hw.load(hw.CausalLM.tiny(1, 2, 8, vocabulary=16, context=16, seed=1).model.eval())
    found = Look(study, "one layer", print).run(model, False)["held_out_loss"]
    for part, data in zip(("repeats", "new"), study.data(0).parts, strict=True):
        for example in range(2):
            tokens = torch.as_tensor(data.labelled(example, validates=True)[0])[None]
            with torch.no_grad():
                logits = model.module(tokens).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
            np.testing.assert_allclose(found.sel(part=part, example=example).values[:-1], loss, atol=1e-5)


def test_the_language_has_its_frequencies_bigrams_and_repeats():
    data = ZipfData(200, vocabulary=10, exponent=1.0, bigrams=0.0, seed=3)
    tokens = np.concatenate([data.sequence(number, False) for number in range(60)])
    weights = 1 / np.arange(1, 11)
    np.testing.assert_allclose(np.bincount(tokens, minlength=10) / len(tokens), weights / weights.sum(), atol=0.02)
    data = ZipfData(200, vocabulary=50, exponent=0.0, bigrams=0.6, seed=3)
    rows = [data.sequence(number, False) for number in range(60)]
    follow = np.mean([row[at + 1] in data.successors[0][row[at]] for row in rows for at in range(199)])
    assert follow == pytest.approx(0.6 + 0.4 * 2 / 50, abs=0.02)
    data = ZipfData(200, vocabulary=50, exponent=0.0, bigrams=0.0, skip_bigrams=0.6, seed=3)
    rows = [data.sequence(number, False) for number in range(60)]
    follow = np.mean([row[at + 2] in data.successors[1][row[at]] for row in rows for at in range(198)])
    assert follow == pytest.approx(0.6 + 0.4 * 2 / 50, abs=0.02)
    data = ZipfData(40, vocabulary=50, exponent=0.0, bigrams=0.0, period=(5, 9), seed=3)
    periods = []
    for number in range(100):
        row = data.sequence(number, False)
        periods.append(next(one for one in range(5, 10) if (row[one:] == row[:-one]).all()))
    assert {*periods} == {5, 6, 7, 8, 9}
    assert not np.array_equal(data.sequence(0, False), data.sequence(0, True))
    data = ZipfData(40, vocabulary=10_000, exponent=0.0, bigrams=0.0, period=(5, 9), lead=3, seed=3)
    begins = set()
    for number in range(300):
        row = data.sequence(number, False).tolist()
        period = next(one for one in range(5, 10) if row[-one:] == row[-2 * one : -one])
        begins.add((next(at for at in range(40) if row.count(row[at]) > 1), period))
    assert begins == {(lead, period) for lead in range(4) for period in range(5, 10)}


def test_labels_are_those_of_tokens_that_can_be_known():
    data = ZipfData(30, vocabulary=10_000, exponent=0.0, bigrams=0.0, skip_bigrams=0.5, scored=0.0, seed=3)
    for number in range(20):
        tokens, labels = data.sequence(number, False)
        for at in range(30):
            known = at > 1 and tokens[at] in data.successors[1][tokens[at - 2]]
            assert labels[at] == (tokens[at] if known else -100)
    data = ZipfData(30, vocabulary=1_000_000, exponent=0.0, bigrams=0.0, period=(3, 9), lead=4, scored=0.0, seed=3)
    for number in range(20):
        tokens, labels = (row.tolist() for row in data.sequence(number, False))
        known = [at > 0 and tokens[at - 1] in tokens[: at - 1] for at in range(30)]
        assert [label != -100 for label in labels] == known
    some = ZipfData(3000, vocabulary=50, bigrams=0.0, scored=0.3).sequence(0, False)[1]
    assert (some != -100).mean() == pytest.approx(0.3, abs=0.03)


def test_lengths_do_not_depend_on_the_kind_that_is_drawn():
    study = hw.FormationStudy(repeats=0.5, period=(4, 12), lead=8, vocabulary=5000, steps=20)
    data, periods = study.data(0), []
    for number in range(300):
        row = data.sequence(number, False)[0].tolist()
        periods += [one for one in range(2, 17) if row[-16:] == row[-16 - one : -one]][:1]
    assert 120 < len(periods) < 180
    assert {*periods} == {*range(4, 13)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trainings": ("main", "two layers")}, "there is no training 'two layers': possible are main, one layer"),
        ({"trainings": ()}, "name one at least"),
        ({"layers": 1}, "of one layer there is the training 'one layer'"),
        ({"length": 30}, "length can be 2 to 16"),
        ({"period": (8, 40), "lead": 8}, "from 2 up to 16, three quarters of the context of 32 less lead=8"),
        ({"repeats": 1.5}, "share of sequences in which a part repeats"),
        ({"bigrams": -0.1}, "give two shares"),
        ({"bigrams": 0.6, "skip_bigrams": 0.5}, "of together at most 1"),
        ({"steps": 0}, "steps"),
        ({"width": 31}, "multiple"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"muon_rate": 0}, "muon_rate=0: give a number above 0, or None"),
        ({"scored": 2}, "scored=2: give the share of unknowable tokens"),
    ],
)
def test_what_is_not_possible_is_refused_before_training(given, message):
    with pytest.raises(DeclarationError, match=message):
        hw.FormationStudy(**given)


def test_it_is_text_and_back():
    study = hw.FormationStudy(**TINY, steps=6, measured=6, trainings=("main",))
    assert hw.FormationStudy.from_json(study.to_json()) == study
    with pytest.raises(UnknownNameError, match="unknown type 'Sweep'"):
        hw.FormationStudy.from_json('{"type": "Sweep"}')


def test_a_file_is_run_again_and_says_how(tmp_path):
    study = hw.FormationStudy(**TINY, steps=4, measured=6, seeds=1, trainings=("one layer",))
    tree = study.run(progress=False, out=tmp_path / "a.nc")
    found = hw.rerun(tmp_path / "a.nc")
    assert (found.agrees, found.largest, found.notes) == (True, 0.0, ())
    told = recipe(tree.attrs, tree.to_dataset(), "a.nc")
    assert told.command == "headwise rerun a.nc"
    line = next(line for line in told.python.splitlines() if line.startswith("tree"))
    assert line.endswith('.run(out="again.nc")')
    assert eval(line.removeprefix("tree = ").removesuffix('.run(out="again.nc")'), {"hw": hw}) == study
    with pytest.raises(DeclarationError, match="trains its own models: it takes no model"):
        hw.rerun(tmp_path / "a.nc", model="words-2l")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"steps": 10_000, "seeds": 11},
            "asks for 11 trainings, 10000 steps each, up to .* floating-point operations: that is done",
        ),
        ({"width": 2_000_000}, "asks for 1 trainings, 4 steps each, up to"),
        ({"heads": 3}, "cannot be repeated: width=8 is no multiple of heads=3"),
        ({"batch": None}, "cannot be repeated: "),
    ],
)
def test_a_file_that_asks_for_much_work_or_nonsense_is_not_run_again(tmp_path, monkeypatch, more, message):
    study = hw.FormationStudy(**TINY, steps=4, measured=6, seeds=1, trainings=("one layer",))
    monkeypatch.setattr(hw.FormationStudy, "run", None)
    text = json.dumps(json.loads(study.to_json()) | more)
    tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs={"schema_version": "1", "study": text})})
    hw.write_netcdf(tree, tmp_path / "a.nc")
    with pytest.raises(ResultError, match=message):
        hw.rerun(tmp_path / "a.nc")


def test_the_shipped_result_opens_reports_and_holds_what_training_again_gives(tmp_path):
    study = hw.FormationStudy()
    tree = study.shipped()
    assert tree is not None
    assert hw.FormationStudy(seeds=2).shipped() is None
    assert tree["heads"]["induction"].sizes["seed"] == study.seeds >= 3
    assert [*tree["changes"]["training"].values] == [*study.trainings]
    page = hw.write_report(tree, tmp_path / "a.html").read_text()
    assert json.loads(tree.attrs["conclusion"])[0]["text"] in page
    module = hw.CausalLM.tiny(
        study.layers, study.heads, study.width, vocabulary=study.vocabulary, context=study.context, seed=1
    ).model
    matrices = [one for block in module.transformer.h for one in block.parameters() if one.ndim == 2]
    body = module.transformer
    vectors = [one for one in module.parameters() if one.ndim == 1]
    groups = [{"params": [body.wte.weight, body.wpe.weight], "weight_decay": 0.01}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    muon = torch.optim.Muon(matrices, weight_decay=0.01)
    tokens = torch.as_tensor(study.task.draw(hw.load(module)).runs["clean"])
    last = [step for step in study.at if step <= 12][-1]
    batches = iter(study.data(1).train_dataloader())
    for step in range(last + 1):
        if step in study.at:
            with torch.no_grad():
                out = module.eval()(tokens).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            found = tree["behaviour"]["loss"].sel(training="main", seed=1, step=step).values[:-1]
            np.testing.assert_allclose(found, loss.view(len(tokens), -1).mean(0), atol=2e-3)
        batch, labels = next(batches).unbind(1)
        for one, rate in ((adam, study.learning_rate), (muon, study.muon_rate)):
            for group in one.param_groups:
                group["lr"] = rate * min(1, step / study.warmup)
        out = module.train()(batch).logits[:, :-1]
        module.zero_grad()
        torch.nn.functional.cross_entropy(out.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        muon.step()
