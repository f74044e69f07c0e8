"""Installs a wheel in a fresh environment and runs the tests of what is shipped by value there, away from the clone.

``python tests/support/wheel.py WHEEL``. A server gets code as source and workers get it by name, so where headwise lies
matters: nothing of the clone but its tests may be importable.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
TESTS = (
    "interventions/remote",
    *(f"studies/measuring/test_{name}.py" for name in ("workers", "workers_lost", "workers_lie")),
)
WHERE = "import headwise; print(headwise.__file__)"


def main(wheel, *more):
    with tempfile.TemporaryDirectory(prefix="headwise-wheel-") as name:
        folder = Path(name).resolve()
        python, away = environment(folder / "venv", wheel), folder / "away"
        shutil.copytree(CLONE / "tests", away / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(CLONE / "pyproject.toml", away)  # how pytest is set
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        given = {"cwd": away, "env": clean | {"PYTHONDONTWRITEBYTECODE": "1"}}
        found = subprocess.run(
            [python, "-c", WHERE], check=True, capture_output=True, text=True, **given
        ).stdout.strip()
        print("headwise is", found, flush=True)
        if not Path(found).is_relative_to(folder / "venv"):
            raise SystemExit("this is not what the wheel installed")
        tests = [f"tests/{test}" for test in TESTS]
        return subprocess.run([python, "-m", "pytest", *tests, *more], cwd=away, env=clean, check=False).returncode


def environment(where, wheel):
    """A new environment with the wheel and what its tests need; its Python."""
    print("setting up", where, flush=True)
    venv.create(where, with_pip=True)
    python = where / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", CLONE / "constraints.txt"]
    subprocess.run([*pip, f"{Path(wheel).resolve()}[dev]"], check=True)
    return python


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
