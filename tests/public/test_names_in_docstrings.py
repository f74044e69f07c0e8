"""Names in backticks exist: a reader who follows `module.name` in a docstring finds it."""

import ast
import re
from pathlib import Path

import headwise as hw

ROOT = Path(hw.__file__).parent
NAME = re.compile(r"(?<!`)`([a-zA-Z_]\w*(?:\.\w+)+)`(?!`)")
OUTSIDE = {"torch", "numpy", "concurrent", "DataTree", "config", "lm_head", "lab", "mine"}
"""First words of names that are not ours: libraries, attributes of a user's model, modules of an example."""


def modules():
    """``{dotted name below headwise: its names}``: functions, classes, what is assigned or imported, members."""
    found = {}
    inner = [path for room in ("interventions", "metrics", "studies") for path in (ROOT / room).rglob("*.py")]
    for path in [*ROOT.glob("*.py"), *inner]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names = {part.stem for part in path.parent.glob("*")} if parts[-1] == "__init__" else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.alias):
                names.add((node.asname or node.name).rpartition(".")[2])
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = names
    return found


def exists(name, found):
    """Whether a dotted name is a module, or a name in a module that ends in what comes before it."""
    for cut in range(name.count(".") + 2):
        parts = name.split(".")
        module, rest = ".".join(parts[: len(parts) - cut]), parts[len(parts) - cut :]
        ours = [names for one, names in found.items() if module and f".{one}".endswith(f".{module}")]
        if any(set(rest) <= names for names in ours):
            return True
    classes = {one for names in found.values() for one in names if one[:1].isupper()}
    return name.partition(".")[0] in classes


def strayed(sources, found):
    """``module: name`` of each name in backticks that leads nowhere."""
    stray = []
    for module, source in sources.items():
        for name in NAME.findall(source):
            if name.partition(".")[0] in OUTSIDE:
                continue
            if name.startswith("headwise."):
                there = hasattr(hw, name.split(".")[1]) or exists(name.removeprefix("headwise."), found)
                there = there and (name.count(".") == 1 or exists(name.removeprefix("headwise."), found))
            else:
                there = exists(name, found)
            if not there:
                stray.append(f"{module}: `{name}`")
    return stray


def test_names_in_backticks_exist():
    paths = [path for room in ("interventions", "metrics", "studies") for path in (ROOT / room).rglob("*.py")]
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in [*ROOT.glob("*.py"), *paths]}
    assert not strayed(sources, modules())


def test_a_name_that_is_gone_is_found():
    told = {"here.py": "As `engine.run_plan`, `office.Office`, `engine.look`, `headwise.load` and `headwise.lode` say."}
    assert strayed(told, modules()) == [
        "here.py: `office.Office`",
        "here.py: `engine.look`",
        "here.py: `headwise.lode`",
    ]
