"""The results as tables for the README, between two marks that nothing else is written between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, MODELS
from benchmarks.contenders import CONTENDERS, OURS, YARDSTICK

OPEN, CLOSE = "<!-- bench -->", "<!-- /bench -->"


def write_readme(path: Path, results: Mapping[str, Any]) -> None:
    """Replace what stands between the marks of the README by the tables."""
    path.write_text(between_marks(path.read_text(), tables(results)))


def between_marks(text: str, new: str, marks: tuple[str, str] = (OPEN, CLOSE)) -> str:
    """`text` with `new` between the marks instead of what was there."""
    before, opened, rest = text.partition(marks[0])
    _, closed, after = rest.partition(marks[1])
    if not opened or not closed:
        raise SystemExit(f"the README lacks {marks[0]} and {marks[1]}: the tables are written between them")
    return f"{before}{marks[0]}\n{new.strip()}\n{marks[1]}{after}"


def tables(results: Mapping[str, Any]) -> str:
    """Ratios, memory and operations in Markdown, with what a reader must know to read them."""
    races = results["races"]
    rounds = sorted({race["rounds"] for race in races})
    threads = f"{results['threads']} thread{'s' if results['threads'] > 1 else ''}"
    lines = [
        f"{results['machine']}, {threads}; {_versions(results['versions'])}. Prompts of "
        f"{races[0]['tokens of a prompt']} tokens. All contenders of a row gave the same numbers before any was timed "
        f"(the largest difference was {_largest(races):.0e}). Shown is the median of {' or '.join(map(str, rounds))} "
        "rounds that take turns, divided by that of one plain forward pass for each condition (its seconds are given): "
        "**below 1 is faster than the bare model**. Behind the plus stands what each call of headwise takes to read "
        "which model it is, whatever it measures.",
        "",
        *_grid(races, _time),
    ]
    if any(_has_peak(race) for race in races):
        lines += ["", "Peak memory beyond the loaded model, in MiB, each in a process of its own:", ""]
        lines += _grid([race for race in races if _has_peak(race)], _peak)
    return "\n".join([*lines, "", *_notes(results)])


def _has_peak(race: Mapping[str, Any]) -> bool:
    return any("peak MiB" in one for one in race["contenders"].values())


def _time(race: Mapping[str, Any], name: str) -> str:
    one = race["contenders"].get(name)
    if one is None:
        return ""
    if name == OURS and race.get("identity"):
        apart, telling = apart_from_identity(race)
        return f"{apart:.2f} (+ {telling:.2f})"
    if name != YARDSTICK:
        return f"{one['ratio']:.2f}"
    seconds = one["median seconds"]
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def apart_from_identity(race: Mapping[str, Any]) -> tuple[float, float]:
    """What headwise takes without telling which model it is, and what that takes, in the plain passes of the race."""
    plain, whole = (race["contenders"][name]["median seconds"] for name in (YARDSTICK, OURS))
    telling = race["identity"]["median seconds"]
    return (whole - telling) / plain, telling / plain


def _peak(race: Mapping[str, Any], name: str) -> str:
    value = race["contenders"].get(name, {}).get("peak MiB")
    return "" if value is None else f"{value:.0f}"


def _grid(races: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any], str], str]) -> list[str]:
    names = [name for name in CONTENDERS if any(name in race["contenders"] for race in races)]
    rows = [["model", "prompts", "what", "passes", *(CONTENDERS[name].title for name in names)]]
    rows.append(["---", "---:", "---", "---:", *["---:"] * len(names)])
    for race in races:
        facts = [race["model"], str(race["prompts"]), CASES[race["case"]].words, str(race["forward passes"])]
        rows.append([*facts, *(cell(race, name) for name in names)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _notes(results: Mapping[str, Any]) -> list[str]:
    races = results["races"]
    models = [model for model in MODELS if any(race["model"] == model for race in races)]
    notes = [f"{model}: {MODELS[model]}" for model in models]
    scaled = {
        (race["model"], one["measured on"].split()[0])
        for race in races
        for one in race["contenders"].values()
        if one["measured on"].split()[0] != one["measured on"].split()[-1]
    }
    notes += [
        f"on {model}, all but headwise were timed on {count} conditions drawn with a seed, and scaled to the whole"
        for model, count in sorted(scaled)
    ]
    for model in models:
        counted = [one for one in results.get("operations", []) if one["model"] == model]
        shares = "; ".join(f"{one['share']:.0%} ({one['what']})" for one in counted)
        notes += [f"floating-point operations of headwise on {model}, of plain forward passes: {shares}"] * bool(shares)
    notes.append("headwise computes logits at the scored positions, all others at every position")
    reasons = {
        f"{CONTENDERS[name].title} is left out of {CASES[race['case']].words}: {why}"
        for race in races
        for name, why in race["left out"].items()
    }
    return [f"- {note}." for note in [*notes, *sorted(reasons)]]


def _largest(races: Sequence[Mapping[str, Any]]) -> float:
    return max(one["largest difference"] or 0.0 for race in races for one in race["contenders"].values())


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def lines_of(race: Mapping[str, Any]) -> list[str]:
    """A race for the terminal."""
    head = f"{race['model']}, {race['prompts']} prompts: {race['what']} ({race['forward passes']} forward passes)"
    lines = [head]
    for name, one in race["contenders"].items():
        extra = "" if one["largest difference"] is None else f"  differs by {one['largest difference']:.1g}"
        against = "  -  " if one["ratio"] is None else f"{one['ratio']:5.2f}"
        lines.append(f"  {CONTENDERS[name].title:<24}{one['median seconds']:9.3f} s  {against}{extra}")
    return lines + [f"  {CONTENDERS[name].title:<24}left out: {why}" for name, why in race["left out"].items()]
