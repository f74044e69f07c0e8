"""Functions, methods and classes of the package have docstrings; those with many parameters say all that they take."""

import ast
import re
from pathlib import Path

import headwise as hw

ROOT = Path(hw.__file__).parent
MANY = 4
"""Parameters from which a function, or a class with an ``__init__``, needs sections."""
OVERRIDES = re.compile(r"See `(\w+\.(\w+))`\.")
"""What a method says that overrides another: that one has the sections."""
SECTION = re.compile(r"^(\w+)\n-{3,}\n((?:(?!\w+\n-{3,}$).*\n?)*)", re.MULTILINE)


def public(body, prefix=""):
    """Name, node and docstring of every public function and method, and of each ``__init__`` that of its class."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            for name, inner, text in public(node.body, f"{prefix}{node.name}."):
                yield name, inner, ast.get_docstring(node) if name.endswith(".__init__") else text
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            public_class = not any(part.startswith("_") for part in prefix.split("."))
            if not node.name.startswith("_") or (node.name == "__init__" and public_class):
                yield prefix + node.name, node, ast.get_docstring(node)


def parameters(node):
    """Names of what a function takes, with ``*`` and ``**`` before the last ones."""
    given = node.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [f"{stars}{one.arg}" for stars, one in (("*", given.vararg), ("**", given.kwarg)) if one is not None]
    return [name for name in names if name not in ("self", "cls")]


def overridden(name, text):
    """The method of another class that has the sections, where the docstring of a method points to it; else None."""
    above = OVERRIDES.search(text or "")
    return above[1] if above and above[1] != name and above[2] == name.rpartition(".")[2] else None


def lacking(name, node, text):
    """What a function should say and does not, in words; a method of a private class needs a docstring only."""
    private_class = name.startswith("_")
    if any(ast.unparse(one) == "overload" for one in node.decorator_list):
        return []
    if private_class or not text:
        return [] if text else ["a docstring"]
    if overridden(name, text):
        return []
    sections = {head: body.splitlines() for head, body in SECTION.findall(f"{text}\n")}
    names = parameters(node)
    wanted = set()
    if len([name for name in names if not name.startswith("*")]) >= MANY:
        wanted.add("Parameters")
        if node.returns is not None and ast.unparse(node.returns) != "None":
            gives = any(isinstance(one, ast.Yield | ast.YieldFrom) for one in ast.walk(node))
            wanted.add("Yields" if gives else "Returns")
        if any(isinstance(one, ast.Raise) for one in ast.walk(node)):
            wanted.add("Raises")
    found = sorted(wanted - sections.keys())
    found += [f"{head} once" for head in sections if len(re.findall(rf"^ *{head}\n *---", text, re.MULTILINE)) > 1]
    if "Parameters" in sections:
        heads = [line.partition(" : ")[0] for line in sections["Parameters"] if line and not line.startswith(" ")]
        said = {name.strip() for head in heads for name in head.split(",")}
        found += [f"the parameter {name}" for name in names if name not in said]
        found += [f"a signature with {name}" for name in sorted(said - {*names})]
    return found


def found_lacking():
    """``module.function lacks ...``, for every function of the package that lacks something."""
    inner = [path for room in ("interventions", "metrics", "studies") for path in (ROOT / room).rglob("*.py")]
    every = [
        (path.relative_to(ROOT), *one)
        for path in sorted([*ROOT.glob("*.py"), *inner])
        for one in public(ast.parse(path.read_text()).body)
    ]
    said = {name for _, name, _, text in every if text and not overridden(name, text)}
    for path, name, node, text in every:
        if (above := overridden(name, text)) and above not in said:
            yield f"{path}: {name} lacks what `{above}` says"
        if sections := lacking(name, node, text):
            yield f"{path}: {name} lacks {', '.join(sections)}"


def test_functions_have_docstrings_and_those_with_many_parameters_have_their_sections():
    assert list(found_lacking()) == []


def seen(source):
    return {name: lacking(name, node, text) for name, node, text in public(ast.parse(source).body)}


def test_a_lacking_section_is_seen():
    said = "What.\n\n    Parameters\n    ----------\n    a, b, c : int\n        Words : more.\n    d : int\n    "
    source = f'def f(a, b, c, d) -> int:\n    """{said}"""\n    raise E\n'
    assert seen(source) == {"f": ["Raises", "Returns"]}
    assert seen(source.replace("raise E", "yield 1")) == {"f": ["Yields"]}
    assert seen(source.replace(", d)", ")")) == {"f": ["a signature with d"]}
    assert seen(source.replace("d) -> int", "d, *e) -> None")) == {"f": ["Raises", "the parameter *e"]}
    assert seen(source.replace(f'"""{said}"""', '"""What."""')) == {"f": ["Parameters", "Raises", "Returns"]}
    twice = said + "\n\n    Returns\n    -------\n    int\n" * 2
    assert "Returns once" in seen(source.replace(said, twice))["f"]
    assert seen(source.replace(f'"""{said}"""', "1")) == {"f": ["a docstring"]}


def test_a_method_may_point_to_the_one_that_it_overrides():
    source = 'class A:\n    def f(self, a, b, c, d):\n        """Do it. See `B.f`."""\n'
    assert seen(source) == {"A.f": []}
    assert seen(source.replace("B.f", "B.g")) == seen(source.replace("B.f", "A.f")) == {"A.f": ["Parameters"]}


def test_a_lacking_section_of_a_class_is_seen():
    source = (
        'class A:\n    """What."""\n    def __init__(self, a, b, c, d):\n        pass\n    def f(self):\n        pass\n'
    )
    assert seen(source) == {"A.__init__": ["Parameters"], "A.f": ["a docstring"]}
    assert seen(source.replace("A:", "_A:")) == {"_A.f": ["a docstring"]}
