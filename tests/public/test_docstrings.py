"""Public functions with many parameters say what goes in, what comes out, and which errors they raise."""

import ast
import re
from pathlib import Path

import headwise as hw

ROOT = Path(hw.__file__).parent
MANY = 4
"""Parameters from which a function needs sections."""
OWED = {
    "interventions": 2,
    "interventions.models": 4,
    "interventions.plan": 10,
    "interventions.remote": 7,
    "interventions.run": 10,
    "interventions.traced": 40,
    "studies.app": 2,
    "studies.catalogue": 4,
    "studies.cli": 2,
    "studies.measuring": 3,
    "studies.output": 1,
    "studies.plots": 5,
    "studies.plots.export": 1,
    "studies.plots.parts": 9,
    "studies.report": 1,
    "studies.reproduce": 2,
    "studies.storage": 2,
}
"""Functions of a room that lack a section still. A number may fall, and never grows; other rooms owe nothing."""


def public(body, prefix=""):
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")
            else:
                yield prefix + node.name, node


def lacking(node):
    """Sections that the docstring of a function should have and has not."""
    arguments = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    if len([name for name in arguments if name not in ("self", "cls")]) < MANY:
        return set()
    wanted = {"Parameters"}
    if node.returns is not None and ast.unparse(node.returns) != "None":
        wanted.add("Returns")
    if any(isinstance(one, ast.Raise) for one in ast.walk(node)):
        wanted.add("Raises")
    return wanted - set(re.findall(r"^(\w+)\n-{3,}$", ast.get_docstring(node) or "", re.MULTILINE))


def owed():
    """``{room: what its functions lack, in words}``."""
    found = {}
    inner = [path for room in ("interventions", "metrics", "studies") for path in (ROOT / room).rglob("*.py")]
    for path in sorted([*ROOT.glob("*.py"), *inner]):
        room = ".".join(path.relative_to(ROOT).parent.parts)
        for name, node in public(ast.parse(path.read_text()).body):
            if sections := lacking(node):
                found.setdefault(room, []).append(f"{path.stem}.{name} lacks {', '.join(sorted(sections))}")
    return found


def test_functions_with_many_parameters_have_their_sections():
    found = owed()
    assert {room: lines for room, lines in found.items() if len(lines) > OWED.get(room, 0)} == {}


def test_a_lacking_section_is_seen():
    said = "What.\n\n    Parameters\n    ----------\n    a, b, c, d : int\n    "
    source = f'def f(a, b, c, d) -> int:\n    """{said}"""\n    raise E\n'
    (node,) = ast.parse(source).body
    assert lacking(node) == {"Returns", "Raises"}
    node.args.args.pop()
    assert lacking(node) == set()
