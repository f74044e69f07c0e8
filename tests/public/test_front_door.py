"""``import headwise as hw``: which names it gives, that type checkers see them, and that each one's example runs."""

import ast
import contextlib
import doctest
import html
import inspect
import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import xarray as xr

import headwise as hw
from headwise import studies
from headwise.interventions import FAMILIES
from headwise.studies.cli.main import make_parser

ROOT = Path(hw.__file__).parent
ROOMS = ("interventions", "metrics", "studies")
LISTED = """
load shipped checkpoint_steps Model register Family
Head Neuron Layer Site Component Logits
ZeroAblate MeanAblate ResampleAblate Patch PathPatch Add ProjectOut Scale Knockout Compose Grid Intervention
RepeatedTokens Prompts Chat Batch recurring_prompts
measure plan capture compare_estimates composition_scores describe_heads InductionStudy TextInduction
predict direct_logit_attribution logit_lens difference weighted_value_norms circuit_scores head_circuits neuron_tokens
text_heads
Graph Circuit CircuitStudy EdgePatches edge_scores circuit_sizes circuit_curve edge_inclusion read_mib write_mib
CausalLM RepeatedTokensData TextData MixedData
Sweep StudyCallback TrainerStudyCallback log_spaced over_checkpoints FabricExecutor FormationStudy
effect normalized table summary
write_netcdf open_result Results rerun write_report to_json from_json
metrics plots errors
"""
NAMES = LISTED.split()
DOORS = {"": "headwise", "interventions": "headwise.interventions", "studies": "headwise.studies"}
DEEP = re.compile(r"headwise\.(?:interventions|metrics|studies)(?:\.\w+)+")
"""Where a name lies inside the package, which nobody needs to know."""


def sources():
    return sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])


def test_the_front_door_has_these_names_and_no_others():
    assert sorted(hw.__all__) == sorted(NAMES)
    assert dir(hw) == sorted([*NAMES, "__version__"])


LIST = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
found = {}
for name in sys.argv[1:]:
    package = sys.modules[name]
    if hasattr(package, "__path__"):
        meant = getattr(package, "__all__", None)
        shown = {one for one in dir(package) if not one.startswith("__")}
        rooms = {one for one in shown if f"{name}.{one}" in sys.modules}
        found[name] = sorted(shown ^ {*(rooms if meant is None else meant)})
print(json.dumps(found))
"""
"""Of each package, once everything is imported: what it shows beside what it means to show, which are its modules."""


def test_no_package_shows_what_is_not_meant():
    folders = [path.relative_to(ROOT).with_suffix("").parts for path in sources() if path.name != "__main__.py"]
    modules = [".".join(["headwise", *parts]).removesuffix(".__init__") for parts in folders]
    done = subprocess.run([sys.executable, "-c", LIST, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: odd for name, odd in found.items() if odd} == {}
    assert len(found) > 15


@pytest.mark.parametrize("folder", DOORS)
def test_type_checkers_see_every_name(folder):
    """They read what stands under ``TYPE_CHECKING``, and no ``__getattr__`` that would answer for a misspelt name."""
    package = sys.modules[DOORS[folder]]
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    (choice,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(choice.test) == "TYPE_CHECKING"
    seen = {}
    for node in choice.body:
        for alias in node.names:
            assert alias.asname == alias.name  # what is imported as itself is passed on
            seen[alias.name] = f"{package.__name__}{'.' if node.module else ''}{node.module or ''}"
    assert sorted(seen) == dir(package)
    for name, module in seen.items():
        there = sys.modules.get(f"{module}.{name}") or getattr(__import__(module, fromlist=[name]), name)
        assert getattr(package, name) is there, name
    assert not [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_no_module_takes_the_place_of_a_name():
    """A module that is imported becomes an attribute of its package, where no function may be called like it."""
    for door in (hw, hw.interventions, studies):
        inside = Path(door.__file__).parent
        modules = {path.stem for path in inside.glob("*.py")} | {
            path.parent.name for path in inside.glob("*/__init__.py")
        }
        assert modules & set(door.__all__) <= {"errors", "metrics", "plots"}  # which are meant themselves
    for door in (hw.metrics, hw.plots):
        assert [name for name in door.__all__ if inspect.ismodule(getattr(door, name))] == []


def test_errors_are_in_one_place():
    assert "HeadwiseError" not in dir(hw)
    for name in dir(hw.errors):
        assert issubclass(getattr(hw.errors, name), hw.errors.HeadwiseError | Warning)


def example_of(name):
    return doctest.DocTestParser().get_doctest(inspect.getdoc(getattr(hw, name)) or "", {"hw": hw}, name, None, 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs_as_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example, known, told = example_of(name), dict(FAMILIES), io.StringIO()
    assert example.examples, f"hw.{name} has no example"
    try:
        if name == "StudyCallback":  # the warnings of Lightning are not ours
            warnings.simplefilter("ignore")
        failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=told.write)
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)
    assert not failed, told.getvalue()


def own_parameters(thing):
    with contextlib.suppress(ValueError, TypeError):
        names = list(inspect.signature(thing).parameters)
        return [name for name in names if name not in ("self", "args", "kwargs")]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_what_goes_in_and_what_comes_out(name):
    thing = getattr(hw, name)
    text = inspect.getdoc(thing)
    assert "\nExamples\n--------\n" in text
    if inspect.ismodule(thing) or name in ("Component", "Intervention"):  # are not called
        return
    sections = set(re.findall(r"\n(\w+)\n-{3,}\n", text))
    given = own_parameters(thing)
    made_by_headwise = {"Model", "Batch"}
    if given:
        assert sections & {"Parameters", "Attributes"}, name
        told = text.split("\nParameters\n" if "Parameters" in sections else "\nAttributes\n")[1]
        assert [one for one in given if not re.search(rf"\b{one}\b", told)] == [], name
        assert "Raises" in sections or name in made_by_headwise, name
    assert "Returns" in sections or inspect.isclass(thing), name


def strings(path):
    """Texts in a module that are no docstrings."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    ]


def helps(given, path="headwise"):
    """The help of a command and of all its commands."""
    yield path, given.format_help()
    for action in given._actions:
        for name, inner in (action.choices or {}).items() if hasattr(action, "_name_parser_map") else ():
            yield from helps(inner, f"{path} {name}")


def test_no_text_for_users_names_a_place_inside_the_package():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.py")]
    texts = {path.name: path.read_text() for path in [*pages, *(ROOT / "models").rglob("README.md")]}
    texts.pop("architecture.md", None)  # is about these places
    assert {name: one for name, text in texts.items() for one in re.findall(r"headwise\.(?:i|m|s)\w+", text)} == {}
    told = {command: DEEP.findall(text) for command, text in helps(make_parser())}
    assert {"headwise induction", "headwise results ls"} <= set(told)
    assert {command: found for command, found in told.items() if found} == {}
    code = {
        str(path.relative_to(ROOT)): [one for text in strings(path) for one in DEEP.findall(text)] for path in sources()
    }
    assert {name: found for name, found in code.items() if found} == {}
    of_names = {name: DEEP.findall(inspect.getdoc(getattr(hw, name))) for name in NAMES}
    assert {name: found for name, found in of_names.items() if found} == {}


def test_a_report_and_its_recipe_need_the_front_door_alone(words_model, tmp_path):
    task, loss = hw.RepeatedTokens(n=2, length=4), hw.metrics.loss
    heads = hw.Grid(lambda layer, head: hw.ZeroAblate(hw.Head(layer, head)), layer=range(2), head=range(2))
    results = {
        "grid": hw.measure(words_model, task, heads, [loss]),
        "named Head(0, 1)": hw.measure(
            words_model, task, {"Head(0, 1)": hw.Patch("0.1") + hw.Scale("1.1", 0.5)}, [loss]
        ),
        "long": hw.measure(words_model, task, hw.Add(hw.Layer(1).resid_pre, [0.1] * 64), [loss]),
        "patterns": hw.capture(words_model, task, [hw.Head(1, 2).pattern]),
        "study": xr.DataTree(xr.Dataset(attrs={"model": "words-2l", "study": hw.InductionStudy().to_json()})),
    }
    for name, result in results.items():
        text = html.unescape(hw.write_report(result, tmp_path / f"{name}.html").read_text())
        assert "import headwise as hw\n" in text, name
        assert "from headwise" not in text, name
        assert DEEP.findall(text) == [], name
        lines = re.sub(r"'[^']*'", "", text.split("import headwise as hw\n")[1].split("</")[0])
        bare = r"(?<!hw\.)\b(?:Head|Layer|ZeroAblate|RepeatedTokens|InductionStudy|measure|capture)\("
        assert re.findall(bare, lines) == [], name
