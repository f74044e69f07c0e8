"""Times all-head interventions side by side with other tools: ``make bench``. Writes ``results.json`` and the README.

The yardstick is one plain forward pass of the Hugging Face module for each condition, with nothing read and nothing
changed. Same numbers first: who differs from plain torch hooks ends the run. Then rounds take turns (A B C, A B C),
so a machine that slows down slows all alike, and what is compared are medians. Peak memory is measured once more in a
process of its own for each. Parts of it can be asked for; only a whole run writes ``results.json`` and the README.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network, and no library may wait for it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from benchmarks.cases import CASES, MODELS, make_job
from benchmarks.contenders import CONTENDERS, YARDSTICK
from benchmarks.race import TOLERANCE, operations, peak_memory, race
from benchmarks.table import lines_of, write_readme

HERE = Path(__file__).resolve().parent
PACKAGES = ("headwise", "torch", "transformers", "nnsight", "transformer-lens", "pyvene")


@dataclass(frozen=True)
class Setting:
    """A model with so many prompts: how many rounds, how many conditions of the slow (None: all), which cases."""

    model: str
    prompts: int
    rounds: int
    size: int | None
    cases: tuple[str, ...] = tuple(CASES)
    alone: bool = False
    """Whether memory and operations are measured here."""


QUICK = (Setting("words-2l", 4, 1, None),)
SETTINGS = (
    Setting("words-2l", 4, 7, None),
    Setting("words-2l", 32, 5, None, alone=True),
    Setting("gpt2-small", 1, 3, 8, ("ablation", "qkv", "resid", "edges", "scores"), alone=True),
    Setting("gpt2-small", 4, 3, 8, ("ablation", "scores")),
)
ALONE = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""For a process whose memory is measured: glibc gives back what is freed, so the peak is what was in use at once."""
OPERATIONS = (("ablation", "loss"), ("ablation", "logit_diff"), ("resid", "logit_diff"), ("edges", "logit_diff"))


def main() -> None:
    """Read the command line, run what it asks for, print it, and write it where it is whole."""
    given = _arguments()
    if given.memory:
        if not ALONE.items() <= os.environ.items():
            os.execve(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]], os.environ | ALONE)
        case, name, model = given.memory
        job = make_job(case, model, (given.prompts or [4])[0])
        print(json.dumps({"peak MiB": peak_memory(job, name, given.sample) / 2**20}))
        return
    settings = _settings(given)
    names = [name for name in CONTENDERS if name in given.contenders and CONTENDERS[name].installed]
    for missing in (CONTENDERS[name] for name in given.contenders if name not in names):
        print(f"{missing.title} is left out: {missing.package} is not installed")
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}",
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "tolerance": TOLERANCE,
        "races": [],
        "operations": [],
    }
    for setting in settings:
        for case in setting.cases:
            found = race(make_job(case, setting.model, setting.prompts), names, setting.rounds, setting.size)
            results["races"].append(found)
            print("\n" + "\n".join(lines_of(found)), flush=True)
    if not given.no_memory:
        _add_memory(results["races"], settings)
        for setting in (setting for setting in settings if setting.alone):
            results["operations"] += _operations(setting)
    whole = _whole(settings) and set(names) == set(CONTENDERS) and not given.no_memory
    for path in [path for path in (given.out, HERE / "results.json" if whole else None) if path]:
        path.write_text(json.dumps(results, indent=2) + "\n")
    if whole:
        write_readme(HERE.parent / "README.md", results)
        print("\nwritten to benchmarks/results.json and README.md")
    else:
        print("\nthis was a part of it: benchmarks/results.json and README.md stay as they are")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of words-2l with 4 prompts, no memory")
    parser.add_argument("--full", action="store_true", help="every case in every setting (long)")
    parser.add_argument("--rounds", type=int, help="rounds of every setting")
    parser.add_argument("--sample", type=int, help="conditions of the slow contenders, where they do not do all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--prompts", nargs="+", type=int, help="only settings with these numbers of prompts")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--no-memory", action="store_true", help="neither memory nor operations")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--memory", nargs=3, metavar=("CASE", "CONTENDER", "MODEL"), help="peak memory of one, alone")
    given = parser.parse_args()
    given.no_memory = given.no_memory or given.quick
    return given


def _settings(given: argparse.Namespace) -> tuple[Setting, ...]:
    chosen = []
    for setting in QUICK if given.quick else SETTINGS:
        if setting.model not in given.models or setting.prompts not in (given.prompts or [setting.prompts]):
            continue
        cases = tuple(case for case in (CASES if given.full else setting.cases) if case in given.cases)
        size = setting.size if setting.size is None or given.sample is None else given.sample
        chosen.append(replace(setting, cases=cases, rounds=given.rounds or setting.rounds, size=size))
    return tuple(chosen)


def _whole(settings: Sequence[Setting]) -> bool:
    """Whether everything that a run without options does was done, and as much of it or more."""
    done = {(setting.model, setting.prompts): setting for setting in settings}
    return all(
        (setting.model, setting.prompts) in done
        and set(setting.cases) <= set(done[setting.model, setting.prompts].cases)
        for setting in SETTINGS
    )


def _add_memory(races: Sequence[dict[str, Any]], settings: Sequence[Setting]) -> None:
    """Measure every contender of every race alone, two processes at a time."""
    sizes = {(setting.model, setting.prompts): setting.size for setting in settings if setting.alone}
    wanted = [
        (race, name) for race in races if (race["model"], race["prompts"]) in sizes for name in race["contenders"]
    ]

    def measure(race: dict[str, Any], name: str) -> float:
        command = [sys.executable, "-m", "benchmarks.run", "--memory", race["case"], name, race["model"]]
        command += ["--prompts", str(race["prompts"])]
        if (size := sizes[race["model"], race["prompts"]]) is not None:
            command += ["--sample", str(min(size, 3))]  # each condition takes what the one before it took
        done = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True, env=os.environ | ALONE, check=False
        )
        if done.returncode:
            raise SystemExit(f"{name} failed in a process of its own on {race['case']}: {done.stderr.strip()[-300:]}")
        return float(json.loads(done.stdout.splitlines()[-1])["peak MiB"])

    with ThreadPoolExecutor(max_workers=2) as pool:
        for (race, name), peak in zip(wanted, pool.map(lambda pair: measure(*pair), wanted), strict=True):
            race["contenders"][name]["peak MiB"] = peak
            title = CONTENDERS[name].title
            print(f"peak memory: {race['model']}, {race['prompts']} prompts, {race['case']}, {title}: {peak:.0f} MiB")


def _operations(setting: Setting) -> list[dict[str, Any]]:
    """Floating-point operations of headwise as a share of those of plain forward passes."""
    found = []
    for case, metric in OPERATIONS:
        if case not in setting.cases:
            continue
        job = make_job(case, setting.model, setting.prompts)
        job = replace(job, case=replace(job.case, metric=metric))
        plain = operations(replace(job, places=job.places[:1]), YARDSTICK) * job.passes(job.places)
        ours = operations(job, "headwise")
        what = f"{job.case.words.rpartition(', ')[0]}, {metric.replace('_', ' ')}"
        found.append(
            {
                "model": setting.model,
                "case": case,
                "what": what,
                "prompts": setting.prompts,
                "headwise": ours,
                "plain forward passes": plain,
                "share": ours / plain,
            }
        )
        print(f"operations: {setting.model}, {what}: {ours / plain:.0%} of plain forward passes", flush=True)
    return found


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
