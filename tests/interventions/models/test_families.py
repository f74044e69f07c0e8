"""Model families against raw hooks: every site and intervention, sweeps, patterns, gradients, costs, self-checks."""

import dataclasses
from itertools import combinations, product
from operator import attrgetter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ModelError
from headwise.interventions import (
    Add,
    Grid,
    Head,
    Knockout,
    Layer,
    MeanAblate,
    Patch,
    PathPatch,
    ResampleAblate,
    Scale,
    ZeroAblate,
    selfcheck,
)
from headwise.interventions.models import family
from headwise.interventions.models.architectures import standard_sizes, windows_everywhere
from headwise.interventions.plan.cost import forward_flops
from headwise.metrics import induction, logit_diff, loss
from headwise.studies import InductionStudy, RepeatedTokens, capture, measure, plan
from headwise.studies.analyses.composition import composition_scores
from tests.interventions.plan.test_cost import counted, grids
from tests.interventions.run.test_planned import asked, check, named
from tests.oracles import planned_cases as cases
from tests.oracles import raw_families
from tests.oracles.raw_paths import Place

TASK = RepeatedTokens(n=3, length=6, seed=3)
NAMES = [*raw_families.MODELS]
ROTARY = [name for name in NAMES if name != "gpt-neo"]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return cases.model(name, "sdpa")


def world(name, metrics=(loss,), base="clean"):
    return cases.World(name, "sdpa", TASK, base, metrics)


def sites(there, whole=True, turn=None):
    """Every component in the first and in the last layer, whole and by head, at all and at some positions.

    With a turn, each at one of these choices of positions: another one in each turn.
    """
    chosen, number = (None, (2, 9), (8,)), 0
    for layer, component in product(sorted({0, there.shape.layers - 1}), there.components):
        if "embed" in component and layer:
            continue
        number += 1
        for at in chosen if turn is None else [chosen[(number + turn) % 3]]:
            if whole or component not in cases.PER_HEAD:
                yield cases.placed(Layer(layer).site(component), at)
            if component in cases.PER_HEAD:
                yield cases.placed(Head(layer, there.heads(component) - 1).site(component), at)


def check_all(there, several):
    check(there, several, named(several))


def test_ablations_and_scalings_equal_raw_hooks(name):
    there = world(name)
    several = [ZeroAblate(site) for site in sites(there)]
    several += [Scale(site, -0.5) for site in sites(there, turn=0)]
    several += [MeanAblate(site) for site in sites(there, turn=1)]
    over = [one for one in sites(there, turn=2) if one.component != "pattern"]
    several += [MeanAblate(site, ("example", "position")) for site in over]
    several += [ResampleAblate(site, seed=2) for site in sites(there, turn=0)]
    check_all(there, several)


@pytest.mark.parametrize(("base", "source"), [("clean", "corrupted"), ("corrupted", "clean")])
def test_patches_equal_raw_hooks(name, base, source):
    there = world(name, (loss, logit_diff), base)
    check_all(there, [Patch(site, source) for site in sites(there, turn=None if base == "clean" else 1)])


def test_additions_equal_raw_hooks(name):
    there, random = world(name), np.random.RandomState(0)
    several = []
    for site in sites(there, whole=False, turn=2):
        narrow = site.component.per_head and site.component != "head_out"
        if site.component != "pattern":
            several.append(Add(site, random.standard_normal(there.shape.d_head if narrow else there.shape.d_model)))
    check_all(there, several)


def test_paths_equal_raw_hooks(name):
    there = world(name)
    last = there.shape.layers - 1
    ends = ["logits", *([Head(last, 0).q, Head(last, 0).k, Head(last, there.heads("v") - 1).v] if last else [])]
    senders = [Head(0, 1).z, Layer(0).attn_out, Layer(0).mlp_out, Head(0, 0).z.at([3, 8])]
    several = [
        PathPatch(sender, end, through_mlps=through) for sender in senders for end in ends for through in (True, False)
    ]
    check_all(there, several)


@pytest.mark.parametrize("name", NAMES)
@given(st.randoms(use_true_random=True))
@settings(max_examples=25)
def test_planned_is_naive(name, random):
    there = cases.world(random, [name])
    several = [cases.condition(random, there) for _ in range(random.choice([1, 4, 8]))]
    check(there, several, asked(random, several), random.random() < 0.5, **cases.layout(random))


@pytest.mark.parametrize("name", NAMES)
@given(st.randoms(use_true_random=True))
@settings(max_examples=8)
def test_one_edit_everywhere_is_naive(name, random):
    there = cases.world(random, [name])
    several = cases.family(random, there)
    check(there, several, asked(random, several), random.random() < 0.5, **cases.layout(random))


def test_capture_equals_raw_hooks(name, model):
    tokens = torch.as_tensor(TASK.draw(model).runs["clean"])
    for layer in model.layers:
        for component in world(name).components:
            if "embed" in component and layer:
                continue
            whole = capture(model, TASK, Layer(layer).site(component))[f"L{layer}_{component}"].values
            if component not in cases.PER_HEAD:
                wanted = raw_families.read(model.module, tokens, Place(layer, component)).numpy()
                np.testing.assert_allclose(whole, wanted, atol=1e-5)
                continue
            for head in range(world(name).heads(component)):
                wanted = raw_families.read(model.module, tokens, Place(layer, component, head)).numpy()
                axis = 1 if component == "pattern" else 2
                np.testing.assert_allclose(whole.take(head, axis), wanted, atol=1e-5)
                one = capture(model, TASK, Head(layer, head).site(component))[f"L{layer}H{head}_{component}"].values
                np.testing.assert_allclose(one, wanted, atol=1e-5)


def test_patterns_are_the_models_own_attention_weights(model):
    """From what is captured before the softmax, by hand, and as captured."""
    tokens = torch.as_tensor(TASK.draw(model).runs["clean"])
    query, key = ("q_rot", "k_rot") if model.shape.rotary else ("q", "k")
    places = torch.arange(tokens.shape[1])
    for layer, weights in enumerate(raw_families.own_weights(model.module, tokens)):
        window = model.shape.window(layer) or 1000
        hidden = (places > places[:, None]) | (places[:, None] - places >= window)
        for head in model.heads:
            wanted = weights[:, head].numpy()
            own = [Head(layer, head).site(query), model.read_by(Head(layer, head), key), Head(layer, head).pattern]
            found = capture(model, TASK, own)
            q, k = (torch.as_tensor(found[str(one).replace(" ", "_")].values) for one in own[:2])
            scores = q @ k.transpose(1, 2) * model.scaling(layer)
            made = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            np.testing.assert_allclose(made, wanted, atol=1e-5)
            np.testing.assert_allclose(found[f"L{layer}H{head}_pattern"].values, wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_self_checks_are_silent(name, implementation):
    assert selfcheck.failures(cases.model(name, implementation)) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_no_failure(name, dtype):
    assert selfcheck.failures(hw.load(raw_families.random_model(name), dtype=dtype)) == []


def differences(model):
    """The mean logit difference of each prompt, from logits."""
    batch = TASK.draw(model)
    (group,) = batch.groups()
    facts = batch.facts("clean", group)
    ids = [torch.as_tensor(one)[..., None] for one in (facts.targets, facts.distractors)]

    def score(logits):
        target, distractor = (logits[:, list(group.scored)].gather(-1, one)[..., 0] for one in ids)
        return (target - distractor).mean(-1)

    return score


def test_gradient_estimates_equal_autograd(name, model):
    there = world(name, (logit_diff,))
    tokens, other = (torch.as_tensor(TASK.draw(model).runs[run]) for run in ("clean", "corrupted"))
    score = differences(model)
    several = [Patch(one) for one in sites(there, whole=False, turn=0) if one.component not in ("embed", "pos_embed")]
    base = measure(model, TASK, None, [logit_diff])["baseline_logit_diff"].sel(run="clean").values
    found = measure(model, TASK, named(several), [logit_diff], estimator="gradient")["logit_diff"].values
    for row, edit in enumerate(several):
        place = Place(edit.site.layer, str(edit.site.component), edit.site.head, edit.site.positions)
        old, slope = raw_families.slope(model.module, tokens, score, place)
        wanted = ((raw_families.read(model.module, other, place) - old) * slope).flatten(1).sum(1)
        np.testing.assert_allclose(found[row] - base, wanted.numpy(), atol=1e-5, rtol=1e-4, err_msg=str(edit))


@pytest.mark.parametrize("name", ["llama", "pythia", "qwen3"])
@pytest.mark.parametrize("component", ["k", "q_rot", "k_rot", "pattern", "z", "head_out"])
@pytest.mark.parametrize("kind", [ZeroAblate, Patch])
def test_integrated_estimates_equal_autograd(name, model, component, kind):
    """All heads of a layer, which move together; key-value heads where the component is of those."""
    tokens, other = (torch.as_tensor(TASK.draw(model).runs[run]) for run in ("clean", "corrupted"))
    heads = model.kv_heads if component in raw_families.OF_KEYS else model.heads
    grid = Grid(lambda layer, head: kind(Head(layer, head).site(component)), layer=[0, 1], head=heads)
    found = hw.effect(measure(model, TASK, grid, [logit_diff], estimator="integrated", steps=4), "logit_diff").values
    for layer in (0, 1):
        places = [Place(layer, component, head, None) for head in heads]
        news = [raw_families.read(model.module, other, place) * (kind is Patch) for place in places]
        wanted = raw_families.integrated_estimate(model.module, tokens, differences(model), places, news, steps=4)
        np.testing.assert_allclose(found[layer], torch.stack(wanted).numpy(), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "pythia"])
def test_integrated_estimates_of_parts_add_up_to_what_is_exact(name, model):
    errors = []
    exact = hw.effect(measure(model, TASK, ZeroAblate(Layer(1).z), [loss]), "loss").values
    for steps in (2, 64):
        grid = Grid(lambda head: ZeroAblate(Head(1, head)), head=model.heads)
        parts = hw.effect(measure(model, TASK, grid, [loss], estimator="integrated", steps=steps), "loss")
        errors.append(np.abs(parts.sum("head").values - exact).max())
    assert errors[1] < 5e-3
    assert errors[1] < errors[0]
    assert np.abs(exact).max() > 0.1


@pytest.mark.parametrize("metrics", [[loss], [logit_diff], [induction, loss]], ids=str)
def test_the_plan_counts_what_runs(model, metrics):
    task = RepeatedTokens(n=2, length=7)
    for grid in grids(model):
        made = plan(model, task, grid, metrics).cost()
        alone = counted(lambda: measure(model, task, None, metrics, check=False))
        found = counted(lambda grid=grid: measure(model, task, grid, metrics, check=False)) - alone
        sources = forward_flops(model.shape, 2, 14)
        assert found == pytest.approx(made.passes, rel=0.05, abs=0.02 * sources), grid


def test_a_plain_forward_pass_is_counted_right(model):
    tokens = torch.zeros((3, 11), dtype=torch.long)
    with torch.no_grad():
        found = counted(lambda: model.module(tokens, use_cache=False))
    assert found == pytest.approx(forward_flops(model.shape, 3, 11), rel=0.02)


# --- what the weights say, and what is refused --------------------------------------------------------------------


def by_hand(module, layer, head, folded):
    """W_Q, W_K, W_V (d_model, d_head) and W_O (d_head, d_model) of a head, straight from the modules, float64."""
    own, (heads, kv_heads) = raw_families.anatomy(module), raw_families.heads_of(module)
    block = attrgetter(own.blocks)(module)[layer]
    attention = attrgetter(own.attention)(block)
    if own.fused:
        rows = attrgetter(own.fused)(block).weight.detach().double().chunk(heads)[head].chunk(3)
    else:
        sides = [getattr(attention, f"{side}_proj").weight.detach().double() for side in "qkv"]
        shared = head // (heads // kv_heads)
        rows = [sides[0].chunk(heads)[head], *(side.chunk(kv_heads)[shared] for side in sides[1:])]
    q, k, v = (part.T.numpy() for part in rows)
    o = attrgetter(own.out)(block).weight.detach().double().T.chunk(heads)[head].numpy()
    if folded:
        norm = block.ln_1 if own is raw_families.NEO else block.input_layernorm
        gain = norm.weight.detach().double().numpy() + (module.config.model_type == "gemma")
        q, k, v = (gain[:, None] * part for part in (q, k, v))
        if hasattr(norm, "bias"):  # LayerNorm
            q, k, v = (part - part.mean(0) for part in (q, k, v))
            o = o - o.mean(1, keepdims=True)
        if module.config.model_type == "qwen3":
            q, k = q * attention.q_norm.weight.detach().numpy(), k * attention.k_norm.weight.detach().numpy()
    return q, k, v, o


@pytest.mark.parametrize("variant", ["folded", "raw"])
def test_composition_equals_explicit_products(model, variant):
    scores = composition_scores(model, draws=3)["composition"].sel(variant=variant)
    for earlier, later in combinations(model.layers, 2):
        for sender, receiver in np.ndindex(len(model.heads), len(model.heads)):
            _, _, v, o = by_hand(model.module, earlier, sender, variant == "folded")
            q_2, k_2, v_2, o_2 = by_hand(model.module, later, receiver, variant == "folded")
            ov, qk, ov_2 = v @ o, q_2 @ k_2.T, v_2 @ o_2
            for kind, reader in (("q", qk), ("k", qk.T), ("v", ov_2)):
                wanted = np.linalg.norm(ov @ reader) / np.linalg.norm(ov) / np.linalg.norm(reader)
                found = float(scores.sel(kind=kind).values[earlier, sender, later, receiver])
                assert found == pytest.approx(wanted, rel=1e-5)


def test_the_whole_study_runs(name, tmp_path):
    model = cases.model(name, "sdpa")
    if len(model.layers) < 2:
        pytest.skip("the study is about heads of two layers")
    tree = InductionStudy(n=3, length=6, draws=2).run(model)
    hw.write_netcdf(tree, tmp_path / "study.nc")
    assert tree["heads"]["induction"].shape == (len(model.layers), len(model.heads), 3)


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("llama", Head(0, 2).k, "L0H2 k: LlamaForCausalLM has key-value heads 0 to 1; heads 2 and 3 read key-value he"),
        ("llama", Head(0, 9).v, "L0H9 v: LlamaForCausalLM has key-value heads 0 to 1"),
        ("llama", Head(0, 4).q, "L0H4 q: LlamaForCausalLM has heads 0 to 3"),
        ("gemma", Head(1, 1).k_rot, "L1H1 k_rot: GemmaForCausalLM has key-value head 0 only; heads 0, 1, 2 and 3 read"),
        ("llama", Layer(0).pos_embed, "has no pos_embed: positions enter where q and k are rotated (q_rot, k_rot)"),
        ("pythia", Layer(0).resid_mid, "has no resid_mid: attention and MLP of a layer both read resid_pre"),
        ("gpt-neo", Head(0, 0).q_rot, "has no q_rot: it has no rotary embedding, and scores are made from q"),
    ],
)
def test_what_a_family_lacks_is_refused_in_words(name, site, message):
    for work in (
        lambda model: measure(model, TASK, ZeroAblate(site), [loss]),
        lambda model: capture(model, TASK, site),
    ):
        with pytest.raises(DeclarationError) as caught:
            work(cases.model(name, "sdpa"))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_head_knows_what_it_reads(model):
    for head in model.heads:
        one = Head(0, head)
        assert model.read_by(one, "q") == one.q
        shared = model.read_by(one, "k").head
        assert shared in model.kv_heads
        assert head in model.shape.readers(shared)


def test_a_model_says_that_its_heads_share_keys():
    assert "llama, 3 layers of 4 heads that share 2 of keys and values, float32" in repr(cases.model("llama", "sdpa"))
    assert "gpt_neox, 3 layers of 3 heads, float32" in repr(cases.model("pythia", "sdpa"))


def test_captured_keys_of_a_layer_are_named_by_key_value_head():
    found = capture(cases.model("llama", "sdpa"), TASK, [Layer(0).k, Layer(0).q, Layer(0).k_rot])
    assert found["L0_k"].dims == found["L0_k_rot"].dims == ("example", "position", "kv_head", "d_head")
    assert found["L0_q"].dims == ("example", "position", "head", "d_head")
    assert (found.sizes["kv_head"], found.sizes["head"]) == (2, 4)


def test_a_knockout_that_leaves_a_window_empty_is_refused():
    mistral = cases.model("mistral", "sdpa")
    with pytest.raises(DeclarationError, match="query 9 is left without any key to attend to; a query needs one of 5 "):
        measure(mistral, TASK, Knockout(Head(0, 1), 9, range(4, 12)), [loss])
    measure(mistral, TASK, Knockout(Head(0, 1), 9, range(6, 12)), [loss])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, r"caps its attention scores \(attn_logit_softcapping=50.0\)"),
        ({"final_logit_softcapping": 30.0}, r"caps its logits \(final_logit_softcapping=30.0\)"),
        ({"use_bidirectional_attention": True}, "attends to later tokens too"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, r"depend on the length of the prompt \(rope_type='dynamic'\)"),
    ],
)
def test_attention_that_headwise_does_not_compute_is_refused(change, message):
    module = raw_families.random_model("gemma")
    for key, value in change.items():
        setattr(module.config, key, value)
    with pytest.raises(ModelError, match=message):
        hw.load(module)


def test_a_saved_model_loads_from_its_folder(model, tmp_path):
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    found = hw.load(tmp_path)
    assert (found.family, found.shape, found.weight_hash) == (model.family, model.shape, model.weight_hash)
    both = (measure(one, TASK, ZeroAblate(Head(0, 1)), [loss])["loss"].values for one in (model, found))
    np.testing.assert_allclose(*both, atol=1e-6)


@pytest.fixture
def stranger(monkeypatch):
    """A model of a family that nobody knows, built as Llama is."""
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    module = raw_families.random_model("llama")
    module.config.model_type = "stranger"
    return module


def test_an_unknown_family_shows_the_table_to_add_and_it_works(stranger):
    with pytest.raises(
        ModelError, match="LlamaForCausalLM is a stranger model: headwise knows gpt2, gpt_neo"
    ) as caught:
        hw.load(stranger)
    code = str(caught.value).split("\n\n", 1)[1]
    exec(code, {})
    model = hw.load(stranger)
    assert model.family.name == "stranger"
    assert selfcheck.failures(model) == []


def test_what_is_shown_makes_another_family_work_once_what_differs_is_changed(monkeypatch):
    """Phi: other paths, LayerNorm, an MLP without gate beside attention, and biases."""
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    rope = {**raw_families.ROPE, "partial_rotary_factor": 0.5}
    module = raw_families.random_weights("Phi", raw_families._llama_like(2, 3, 3, rope_parameters=rope))
    with pytest.raises(ModelError, match="PhiForCausalLM is a phi model") as caught:
        hw.load(module)
    code = str(caught.value).split("\n\n", 1)[1]
    exec(code, {})
    with pytest.raises(ModelError, match=r"phi has norm at 'model.norm', where PhiForCausalLM has nothing"):
        hw.load(module)
    for old, new in [
        ("'self_attn.o_proj'", "'self_attn.dense'"),
        ("'norm_2': 'post_attention_layernorm'", "'norm_2': 'input_layernorm'"),
        ("'model.norm'", "'model.final_layernorm'"),
        ("centred=False", "centred=True"),
        ('"gated": True', '"gated": False'),
        ('"parallel": False', '"parallel": True'),
    ]:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(code, {})
    model = hw.load(module)
    assert (model.shape.gated, model.shape.parallel, model.shape.windows) == (False, True, ())
    assert selfcheck.failures(model) == []


def test_counts_that_a_configuration_does_not_have_are_named(stranger):
    """Under other names than the usual ones."""
    llama = family.FAMILIES["llama"]
    wrong = {"sizes": lambda config: {"layers": config.n_layer}}
    family.register(dataclasses.replace(llama, name="stranger", model_types=("stranger",), **wrong))
    with pytest.raises(ModelError, match=r"sizes of the family stranger do not fit its configuration: .* 'n_layer'"):
        hw.load(stranger)


def test_every_field_of_a_family_is_in_what_is_shown(stranger):
    with pytest.raises(ModelError) as caught:
        hw.load(stranger)
    for field in dataclasses.fields(family.Family):
        assert f"\n    {field.name}=" in str(caught.value)
    assert "# what scores are multiplied by: 1 / sqrt(d_head)" in str(caught.value)


PHI = {"out": "self_attn.dense", "norm_2": "input_layernorm", "norm": "model.final_layernorm"}


@pytest.mark.parametrize(
    ("kind", "config", "modules", "facts"),
    [
        (
            "Phi",
            {"rope_parameters": {**raw_families.ROPE, "partial_rotary_factor": 0.5}},
            PHI,
            {"gated": False, "parallel": True},
        ),
        ("Starcoder2", {"num_key_value_heads": 1, "sliding_window": 6}, {}, {"gated": False}),
    ],
)
def test_a_family_of_ones_own(kind, config, modules, facts, monkeypatch):
    """Two that are not known: one norm for attention and MLP side by side; heads that share keys, and a window."""
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    module = raw_families.random_weights(kind, raw_families._llama_like(2, 3, 3, **config))
    llama, name = family.FAMILIES["llama"], module.config.model_type
    table = {
        "centred": True,
        "sizes": lambda config: standard_sizes(config) | facts | {"windows": windows_everywhere(config)},
    }
    family.register(
        dataclasses.replace(llama, name=name, model_types=(name,), modules={**llama.modules, **modules}, **table)
    )
    model = hw.load(module)
    assert selfcheck.failures(model) == []


def test_heads_that_share_keys_in_one_fused_matrix(monkeypatch):
    """Phi-3: q of all heads, then k and v of fewer."""
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    module = raw_families.random_weights("Phi3", raw_families._llama_like(2, 4, 2))
    llama = family.FAMILIES["llama"]
    modules = {name: path for name, path in llama.modules.items() if name not in ("q", "k", "v")}
    table = {"modules": {**modules, "qkv": "self_attn.qkv_proj"}, "layout": "side by side"}
    family.register(dataclasses.replace(llama, name="phi3", model_types=("phi3",), **table))
    model = hw.load(module)
    assert selfcheck.failures(model) == []
    found, block = model.head_weights(1), module.model.layers[1]
    rows = block.self_attn.qkv_proj.weight.detach()
    for matrix, start, heads in ((found.W_Q, 0, 4), (found.W_K, 24, 2), (found.W_V, 36, 2)):
        assert matrix.shape == (heads, 24, 6)
        for head in range(heads):
            torch.testing.assert_close(matrix[head], rows[start + 6 * head : start + 6 * head + 6].T)
    assert composition_scores(model, draws=3)["composition"].shape == (3, 2, 2, 4, 2, 4)


def test_a_norm_without_weight_has_a_gain_of_one(monkeypatch):
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    llama = family.FAMILIES["llama"]
    family.register(dataclasses.replace(llama, name="olmo", model_types=("olmo",), centred=True))
    model = hw.load(raw_families.random_weights("Olmo", raw_families._llama_like(2, 4, 2)))
    assert selfcheck.failures(model) == []
    assert model.head_weights(0).gain.tolist() == [1.0] * 24
    family.register(dataclasses.replace(llama, name="olmo", model_types=("olmo",)))
    failed = selfcheck.failures(hw.load(model.module))
    assert any("gain of norm_1" in one for one in failed), failed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "model.blocks"}, "stranger has blocks at 'model.blocks', where LlamaForCausalLM has nothing"),
        ({"modules": {"q": "self_attn.wq"}}, "stranger has q of a block at 'self_attn.wq', where LlamaForCausalLM has"),
        ({"embeddings": {}}, "the table of stranger lacks embed"),
        ({"layout": "by head"}, "the table of stranger lacks qkv"),
        ({"layout": "apart, by head"}, "possible are 'apart', 'side by side' and 'by head'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(stranger, change, message):
    llama = family.FAMILIES["llama"]
    if "modules" in change:
        change = {"modules": {**llama.modules, **change["modules"]}}

    def attempt():
        family.register(dataclasses.replace(llama, name="stranger", model_types=("stranger",), **change))
        hw.load(stranger)

    with pytest.raises(HeadwiseError) as caught:
        attempt()
    assert message in str(caught.value)
    with pytest.raises(DeclarationError, match="a family is registered as a Family, got 'stranger'"):
        family.register("stranger")


def test_a_window_that_is_not_what_the_table_says_is_found():
    for size, seen in ((5, "identity"), (11, "windows")):
        model = hw.load(raw_families.random_model("mistral", sliding_window=size))
        assert selfcheck.failures(model) == []
        wrong = dataclasses.replace(model.shape, windows=(size + 1,) * 3)
        failed = selfcheck.failures(dataclasses.replace(model, shape=wrong))
        assert any(one.startswith(seen) for one in failed), failed


def test_a_model_that_is_not_what_its_table_says_is_found():
    """Each fact that the tables state, stated wrong."""
    for name, change in {
        "pythia": {"layout": "side by side"},
        "gemma": {"gain_offset": 0.0},
        "llama": {"scaling": lambda config, layer: 1.0},
        "qwen3": {"modules": dict(family.FAMILIES["llama"].modules)},
        "mistral": {"modules": {k: v for k, v in family.FAMILIES["llama"].modules.items() if k != "rotary"}},
    }.items():
        model = cases.model(name, "sdpa")
        wrong = dataclasses.replace(model, family=dataclasses.replace(model.family, **change))
        assert selfcheck.failures(wrong) != [], name


@pytest.mark.parametrize(
    ("name", "change", "norm"),
    [
        ("gemma", {"gain_offset": 0.0}, "norm_1"),
        ("llama", {"gain_offset": 1.0}, "norm_1"),
        ("llama", {"centred": True}, "norm_1"),
        ("pythia", {"centred": False}, "norm_1"),
        ("qwen3", {"gain_offset": 0.5}, "q_norm"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gain_that_is_not_what_the_table_says_is_found(name, change, norm, dtype):
    model = hw.load(raw_families.random_model(name), dtype=dtype)
    wrong = dataclasses.replace(model, family=dataclasses.replace(model.family, **change))
    failed = selfcheck.failures(wrong)
    assert any(one.startswith(f"parts (gain of {norm} of layer 0 is off by") for one in failed), failed
