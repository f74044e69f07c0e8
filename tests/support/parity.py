"""How far headwise and TransformerLens are apart, as the table of the README that `make bridge` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.table import between_marks

OPEN, CLOSE = "<!-- bridge -->", "<!-- /bridge -->"
Differences = Mapping[str, Mapping[str, float]]
"""Family to what was compared, to the largest difference: beyond 1, as a share of the largest number."""


def table(differences: Differences, versions: str) -> str:
    """The differences in Markdown, a row for each family.

    Raises
    ------
    ValueError
        Something was not compared in each family.
    """
    columns = list(next(iter(differences.values())))
    for family, found in differences.items():
        if set(found) != set(columns):
            raise ValueError(f"{family}: {sorted(set(found) ^ set(columns))} were not compared in each family")
    largest = max(max(found.values()) for found in differences.values())
    rows = [[family, *(f"{found[name]:.0e}" for name in columns)] for family, found in differences.items()]
    lines = [
        f"Random models of each family, {versions}. Shown is the largest difference from TransformerLens (beyond 1, as "
        f"a share of the largest number); the largest of all is {largest:.0e}.",
        "",
        f"| family | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)


def write(path: Path, differences: Differences, versions: str) -> None:
    """Replace what stands between the marks of a README by the table."""
    new = between_marks(path.read_text(), table(differences, versions), (OPEN, CLOSE))
    path.write_text(new)
