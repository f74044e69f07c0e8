"""`docs/architecture.md`: all that it names exists, and a metric, a task, ... can be added by its rules alone.

The examples of the page are run as they stand there. What comes out is compared with numbers worked out by hand on the
planted model: its induction head writes its target with logit 20, and every other token has logit 0.
"""

import ast
import importlib
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions.declare import codec
from headwise.interventions.models import family
from headwise.interventions.plan import writes
from headwise.studies.cli import main
from headwise.studies.storage import registry
from tests.oracles import planted
from tests.public.test_architecture import LAYERS

ROOT = Path(hw.__file__).parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = re.compile(r"`([\w/]+(?:\.py|/))(?::([\w.]+))?`")
"""A file, with a name in it, or a folder."""
LOGIT, TOKENS, HALF = planted.LOGIT, planted.VOCAB, 10


def packages():
    inner = (path.parent for room in ("interventions", "metrics", "studies") for path in (ROOT / room).rglob("*.py"))
    return {f"{path.relative_to(ROOT)}/" for path in inner}


def in_source(body, name):
    """The node that binds a name in the body of a module or class."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(getattr(one, "id", "") == name for one in targets):
            return node
    return None


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED.findall(PAGE))))
def test_what_the_page_names_exists(path, name):
    assert (ROOT / path).exists(), path
    inner = ast.parse((ROOT / path).read_text()) if name else None
    for part in name.split(".") if name else ():
        inner = in_source(inner.body, part)
        assert inner is not None, f"{path}:{name}"


def test_the_page_has_every_room_and_the_layers_of_the_contract():
    rooms = re.search(r"\| room \|(.*?)\n\n", PAGE, re.DOTALL)[1]
    assert packages() == {path for path, _ in NAMED.findall(rooms) if path.endswith("/")} | {"studies/"}
    assert re.search(r"```layers\n(.*?)```", PAGE, re.DOTALL)[1].splitlines() == LAYERS


def test_a_sweep_passes_each_stop_in_this_order():
    stops = re.findall(r"^\d+\. `([\w/]+\.py):([\w.]+)`", PAGE, re.MULTILINE)
    assert len(stops) > 12
    code = {}
    for path, name in stops:
        found = importlib.import_module(f"headwise.{path.removesuffix('.py').replace('/', '.')}")
        for part in name.split("."):
            found = getattr(found, part)
        code[found.__code__] = f"{path}:{name}"
    code[hw.MeanAblate.change.__code__] = "interventions/declare/edits.py:Edit.change"
    reached = {}
    model, task = hw.load(planted.planted_model()), hw.RepeatedTokens(n=2, length=5, tokens=(0, 20))
    sys.setprofile(lambda frame, event, _: reached.setdefault(code.get(frame.f_code)))
    try:
        hw.measure(model, task, hw.MeanAblate("0.3"))
    finally:
        sys.setprofile(None)
    assert [one for one in reached if one] == [f"{path}:{name}" for path, name in stops]


class ToyConfig(GPT2Config):
    model_type = "toy"


class ToyModel(GPT2LMHeadModel):
    """The planted model, with its blocks in another place."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.decoder = self._modules.pop("transformer")

    @property
    def transformer(self):
        return self._modules.get("decoder", self._modules.get("transformer"))


def toy_module():
    module = planted.planted_model()
    with torch.random.fork_rng():
        toy = ToyModel(
            ToyConfig(**{name: value for name, value in module.config.to_dict().items() if "type" not in name})
        )
    weights = {name.replace("transformer.", "decoder."): value for name, value in module.state_dict().items()}
    toy.load_state_dict(weights)
    return toy.eval()


@pytest.fixture
def toys(monkeypatch):
    """What the examples of the page define, in tables that are put back afterwards."""
    before = [(table, dict(table)) for table in (family.FAMILIES, codec.TABLE, registry.TASKS.maps[0])]
    module = types.ModuleType("toys")
    monkeypatch.setitem(sys.modules, "toys", module)
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/architecture.md", "exec"), module.__dict__)
    yield module
    for table, was in before:
        table.clear()
        table.update(was)


def test_the_blocks_of_a_family_without_a_table_are_called():
    assert repr(hw.load(toy_module())).endswith("; blocks are called: no table describes toy models>")


def test_all_toys_in_one_measurement(toys):
    """`SetTo` makes the induction head write token 3 everywhere, which is right at one of the 9 scored positions."""
    model, task = hw.load(toy_module()), toys.Counting(HALF)
    assert model.family.name == "toy"
    head = hw.Head(*planted.INDUCTION)
    set_to = toys.SetTo(head, [float(index == 3) for index in range(planted.D_HEAD)])
    ds = hw.measure(model, task, {"3": set_to, "0": hw.ZeroAblate(head)}, [toys.margin], per_position=True)
    right, wrong = LOGIT - LOGIT / TOKENS, -LOGIT / TOKENS
    scored = slice(HALF, 2 * HALF - 1)
    values = ds["margin"].isel(position=scored, example=0)
    assert values.sel(condition="3").values.tolist() == pytest.approx(
        [right if at == 2 else wrong for at in range(9)], abs=1e-3
    )
    assert values.sel(condition="0").values.tolist() == pytest.approx([0.0] * 9, abs=1e-3)
    baseline = ds["baseline_margin"].sel(run="clean").isel(position=scored, example=0)
    assert baseline.values.tolist() == pytest.approx([right] * 9, abs=1e-3)
    assert ds["margin"].attrs["long_name"] == toys.card.long_name
    assert hw.from_json(ds.attrs["task"]) == task
    assert hw.from_json(ds.attrs["interventions"])["3"] == set_to
    assert "2 conditions (condition 2) of ZeroAblate and SetTo on the clean run" in str(hw.summary(ds))
    mean = hw.measure(model, task, set_to, toys.margin)
    assert mean["margin"].item() == pytest.approx(LOGIT / 9 - LOGIT / TOKENS, abs=1e-3)


def test_an_own_intervention_composes_and_is_checked(toys):
    model, task, head = hw.load(toy_module()), toys.Counting(HALF), hw.Head(*planted.INDUCTION)
    with pytest.raises(DeclarationError, match=f"takes {planted.D_HEAD} numbers, got 2"):
        hw.measure(model, task, toys.SetTo(head, [1, 2]), toys.margin)
    with pytest.raises(DeclarationError, match="two edits of one place"):
        toys.SetTo(head, [1] * planted.D_HEAD) + hw.ZeroAblate(head)
    zeros = toys.SetTo(head, [0] * planted.D_HEAD)
    both = hw.measure(model, task, zeros + hw.ZeroAblate(hw.Head(*planted.SELF)), hw.metrics.loss)
    assert both["loss"].item() == pytest.approx(math.log(TOKENS), abs=1e-4)  # all logits are equal
    estimate = hw.measure(model, task, zeros, toys.margin, estimator="integrated", steps=64)
    assert estimate["margin"].item() == pytest.approx(0.0, abs=0.05)


def test_a_component_without_a_stage_is_read_only(monkeypatch):
    monkeypatch.delitem(writes.JOIN_STAGES, "mlp_out")
    model, task = hw.load(planted.planted_model()), hw.RepeatedTokens(n=2, length=5, tokens=(0, 20))
    with pytest.raises(DeclarationError, match="mlp_out can be read, and no pass writes to it"):
        hw.measure(model, task, hw.ZeroAblate(hw.Layer(0).mlp_out))


def test_a_picture_and_a_study(toys):
    effects = toys.last_layer(hw.load(toy_module()), toys.Counting(HALF))
    harm = math.log(TOKENS) - planted.predicted_loss_clean()
    head = planted.INDUCTION[1]
    assert effects.values.tolist() == pytest.approx(
        [harm if at == head else 0.0 for at in range(planted.HEADS)], abs=1e-4
    )
    counts = toys.histogram(effects).dimension_values(1)
    assert [int(counts[0]), int(counts[-1]), int(counts.sum())] == [planted.HEADS - 1, 1, planted.HEADS]


def test_a_command(toys, monkeypatch, capsys):
    monkeypatch.setattr(main, "COMMANDS", (*main.COMMANDS, toys))
    assert main.main(["layers"]) == 0
    assert capsys.readouterr().out == "2\n"
    with pytest.raises(SystemExit):
        main.main(["--help"])
    assert "how many layers" in capsys.readouterr().out
