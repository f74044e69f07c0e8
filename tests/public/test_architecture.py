"""The contract of the house: which room may import which, no circle anywhere, and rooms that can be looked over."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import headwise as hw

ROOT = Path(hw.__file__).parent
LAYERS = [
    "__main__",
    "studies.cli",
    "studies.app",
    "studies.report",
    "studies.plots studies.catalogue studies.reproduce",
    "studies.dynamics studies.text studies.circuits",
    "studies.analyses",
    "studies.inspection",
    "studies.measuring",
    "studies.storage",
    "studies.tasks",
    "studies.output studies.training",
    "interventions.begin",
    "interventions.calibration",
    "interventions.load",
    "interventions.remote interventions.selfcheck",
    "interventions.run",
    "interventions.models interventions.plan",
    "interventions.traced interventions.declare",
    "interventions.base metrics",
    "errors version signals lazy",
]
"""From the top to the bottom: a room imports from lower lines only. Rooms on one line do not know each other."""
ALONE = ["interventions.traced"]
"""Ships to servers as source, so it imports nothing of headwise."""
PURE = {
    "interventions.declare": {"torch", "xarray", "nnsight", "transformers", "holoviews"},
    "interventions.plan": {"torch", "xarray", "nnsight", "transformers", "holoviews"},
    "interventions": {"holoviews", "bokeh", "matplotlib", "xarray"},
    "metrics": {"holoviews", "bokeh", "matplotlib", "xarray", "nnsight", "transformers"},
}
"""What a room does not import from outside."""
FRONT_DOORS = {"", "interventions", "studies", "studies.plots", "metrics"}
"""Packages that hand names on; those of `metrics` and `studies.plots` are imported at once, the others at first use."""
BY_NAME = {"interventions.base.contents", "lazy"}
"""Load modules by their names: those that a user's function names, to hash what it depends on; names of packages."""
UPWARDS = {"interventions.models.model": ["predict"]}
"""Names that a module asks the outermost front door for, which may be of a higher room: calling a model predicts."""
MOST = 14
"""Modules in a room."""
CONTEXTS = {"studies.measuring.context": 1}
"""How many ContextVars a module has: the study that a measurement is a part of decides how that is carried out."""


def sources():
    """``{dotted name below headwise: (source, whether it is a package)}``."""
    found = {}
    inner = [path for room in ("interventions", "metrics", "studies") for path in (ROOT / room).rglob("*.py")]
    for path in [*ROOT.glob("*.py"), *inner]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if package else parts)] = (path.read_text(), package)
    return found


def imports(modules):
    """``{module: {module or outside package that it imports}}``: in functions and under TYPE_CHECKING too."""
    found = {}
    for name, (source, package) in modules.items():
        outside, inner = named_in(source, name if package else name.rpartition(".")[0])
        found[name] = outside | {full if full in modules else base for base, full in inner}
        found[name].discard(name)
    return found


@cache
def named_in(source, inside):
    """What a module of the package `inside` imports: packages from outside; of ours, the module and what is taken."""
    outside, inner = set(), set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            outside |= {f"outside:{alias.name.partition('.')[0]}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outside.add(f"outside:{node.module.partition('.')[0]}")
        elif isinstance(node, ast.ImportFrom):
            parts = inside.split(".") if inside else []
            base = ".".join([*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]).strip(".")
            inner |= {(base, f"{base}.{alias.name}".strip(".")) for alias in node.names}
    return outside, inner


parsed = cache(ast.parse)


def room_of(name):
    """The room on a line of `LAYERS` that a module is in; empty for front doors, which only pass names on."""
    rooms = [room for line in LAYERS for room in line.split() if name == room or name.startswith(f"{room}.")]
    return max(rooms, key=len, default="")


def breaches(modules):
    """Every import that the contract forbids, in words."""
    line_of = {room: number for number, line in enumerate(LAYERS) for room in line.split()}
    found = []
    for name, targets in imports(modules).items():
        if name in FRONT_DOORS:
            continue
        here = room_of(name)
        if not here:
            found.append(f"{name} is in no room")
            continue
        for target in sorted(targets):
            there = room_of(target)
            if target.startswith("outside:"):
                if target == "outside:headwise":
                    found.append(f"{name} imports headwise by its name: imports are relative")
                for room, banned in PURE.items():
                    if name.startswith(f"{room}.") and target.removeprefix("outside:") in banned:
                        found.append(f"{name} imports {target.removeprefix('outside:')}")
            elif target in FRONT_DOORS and not there:
                found.append(f"{name} imports the front door {target or 'headwise'!r}")
            elif here in ALONE and there != here:
                found.append(f"{name} imports {target}, and is shipped without it")
            elif there != here and line_of[there] <= line_of[here]:
                found.append(f"{name} imports {target}, which is not below it")
        if name not in BY_NAME:
            found += [f"{name} loads by name" for _ in loaded_by_name(modules[name][0])]
    return found


@cache
def loaded_by_name(source):
    """Calls of `import_module` and `__import__` with a name of ours or one that is not written out."""
    found = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                given = node.args[0] if node.args else None
                outside = isinstance(given, ast.Constant) and not re.match(r"\.|headwise", str(given.value))
                if not outside:
                    found.append(node)
    return found


def circles(edges):
    """Sets of nodes that reach each other."""
    reach = {node: set(targets) for node, targets in edges.items()}
    changed = True
    while changed:
        changed = False
        for targets in reach.values():
            more = set().union(*(reach.get(target, set()) for target in targets)) - targets
            if more:
                targets |= more
                changed = True
    inside = [node for node in reach if node in reach[node]]
    return {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in inside}


def between(modules):
    """Imports between modules of ours; a front door passes names on, and is no stop on the way."""
    return {
        name: {target for target in targets if target in modules and target not in FRONT_DOORS}
        for name, targets in imports(modules).items()
        if name not in FRONT_DOORS
    }


def packages(modules):
    """Imports between folders."""
    found = {}
    for name, targets in between(modules).items():
        folder = name if modules[name][1] else name.rpartition(".")[0]
        others = {target if modules[target][1] else target.rpartition(".")[0] for target in targets}
        found.setdefault(folder, set()).update(other for other in others if other and other != folder)
    return found


def test_rooms_import_downwards_only():
    assert breaches(sources()) == []


def test_there_is_no_circle_of_modules_and_none_of_folders():
    assert circles(between(sources())) == set()
    assert circles(packages(sources())) == set()


def test_a_room_can_be_looked_over():
    count = {}
    for name, (_, package) in sources().items():
        if not package:
            count[name.rpartition(".")[0]] = count.get(name.rpartition(".")[0], 0) + 1
    assert {folder: number for folder, number in count.items() if number > MOST} == {}


def test_what_steers_a_call_from_afar_is_in_one_place():
    made = {
        name: re.findall(r"\b(?:ContextVar(?:\[.*\])?|threading\.local)\(", source)
        for name, (source, _) in sources().items()
    }
    assert {name: len(calls) for name, calls in made.items() if calls} == CONTEXTS


def asked_of_the_front_door(source):
    """What a module asks `front_door` for, as it is written."""
    found = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "front_door":
            found += [one.value if isinstance(one, ast.Constant) else ast.unparse(one) for one in node.args]
    return found


def test_names_of_higher_rooms_are_asked_for_in_one_place():
    made = {name: asked_of_the_front_door(source) for name, (source, _) in sources().items()}
    assert {name: asked for name, asked in made.items() if asked} == UPWARDS
    seen = [name for name, (source, _) in sources().items() if "front_door" in source]
    assert sorted(seen) == sorted(["lazy", *UPWARDS])


def test_each_package_says_what_it_is():
    for name, (source, package) in sources().items():
        if package:
            assert ast.get_docstring(parsed(source)), name


@pytest.mark.parametrize(
    ("where", "line", "says"),
    [
        ("interventions.declare.sites", "from .edits import Compose", "circle"),
        ("interventions.declare.sites", "def later():\n    from .edits import Compose", "circle"),
        ("interventions.declare.sites", "if TYPE_CHECKING:\n    from .edits import Compose", "circle"),
        ("interventions.plan.cost", "if TYPE_CHECKING:\n    from ..run import engine", "not below"),
        ("interventions.models.model", "import_module('.load', 'headwise.interventions')", "by name"),
        ("interventions.models.model", "__import__('headwise.interventions.load')", "by name"),
        ("interventions.traced.rows", "from ...errors import HeadwiseError", "shipped"),
        ("interventions.declare.sites", "import torch", "imports torch"),
        ("studies.tasks.tasks", "from headwise.errors import choices", "relative"),
    ],
)
def test_the_contract_sees(where, line, says):
    modules = sources()
    source, package = modules[where]
    modules[where] = (f"{source}\n{line}\n", package)
    if says == "circle":
        assert circles(between(modules)) != set()
    else:
        assert any(says in one for one in breaches(modules))
