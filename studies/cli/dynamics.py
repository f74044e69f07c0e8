"""``headwise dynamics``: a study over the checkpoints of a training, its file and its report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, ResultError
from .shared import add_command, add_json, fill, print_json, print_table, put, quiet_libraries, say, shown

if TYPE_CHECKING:
    from ..dynamics.formation import FormationStudy
    from ..dynamics.study import Study

METRICS = "induction,previous_token,loss"
EXAMPLES = """  headwise dynamics                                  all of words-2l
  headwise dynamics --steps 0,512,2000 --json
  headwise dynamics --metrics induction,loss --length 40
  headwise dynamics --study mine.json --out results/mine.nc
  headwise dynamics --study formation                how induction forms
  headwise dynamics --model ./runs/checkpoints       .ckpt, checkpoint-100/
  headwise dynamics --model EleutherAI/pythia-70m --steps 1,512 --plan
"""
STUDY = """the file of --study holds what the to_json() of a study writes:
  import headwise as hw
  study = hw.Sweep(hw.RepeatedTokens(n=16, length=20),
                   hw.ZeroAblate("L0H3"), metrics=["loss"])
  with open("mine.json", "w") as file:
      file.write(study.to_json())
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "dynamics",
        run,
        help="a study over the checkpoints of a training",
        description=(
            "Run a study on each checkpoint of a training: by default, attention scores of heads and the loss. "
            "Writes one NetCDF file with a dim step and an HTML report beside it. Stopped or killed, the same command "
            "again goes on where it was. While a model is trained, hw.StudyCallback does it. The study formation "
            "trains small models, with controls and from several seeds, and says when induction appears."
        ),
        examples=f"{EXAMPLES}\n{STUDY}",
    )
    parser.add_argument(
        "--model",
        default="words-2l",
        help="a shipped name, a Hub id with revisions step1000, or a folder with checkpoints (default: %(default)s)",
    )
    parser.add_argument("--steps", default="all", help="such as 0,512,2000 (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--study", metavar="FILE", help="JSON file with a study, see below; or formation")
    what.add_argument("--metrics", metavar="NAMES", help=f"of repeated random tokens, with commas (default: {METRICS})")
    parser.add_argument("--n", type=int, default=32, help="prompts (default: %(default)s)")
    parser.add_argument("--length", type=int, default=25, help="tokens in the half that repeats (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts (default: %(default)s)")
    parser.add_argument("--out", help="NetCDF file to write (default: results/dynamics-MODEL.nc)")
    parser.add_argument("--plan", action="store_true", help="say what a checkpoint would cost, and run nothing")
    parser.add_argument("--fresh", action="store_true", help="run everything again, whatever is there")
    add_json(parser, "print the numbers of each step as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the study on each checkpoint, write the report, print a table."""
    started = time.monotonic()
    from ..dynamics.checkpoints import checkpoints_of, over_checkpoints
    from ..storage.files import check_writable

    quiet_libraries()
    if (formation := _formation(options)) is not None:
        return _run_formation(formation, options, started)
    study, steps = _study(options), _steps(options.steps)
    found = checkpoints_of(options.model, steps)
    if options.plan:
        put(f"{len(found)} checkpoints of {options.model}, steps {min(found)} to {max(found)}; each:\n")
        put(study.plan(found[max(found)]()))  # type: ignore[attr-defined]
        return 0
    out = Path(options.out or f"results/dynamics-{Path(options.model).name or 'model'}.nc")
    if out.suffix != ".nc":
        raise DeclarationError(f"--out {out}: end it in .nc; the report beside it gets the same name in .html")
    out = check_writable(out)
    check_writable(out.with_suffix(".html"))
    say(f"{len(found)} checkpoints of {options.model}")
    result = over_checkpoints(options.model, study, steps, out=out, resume=not options.fresh)
    say("writing the report")
    import numpy as np

    from ..dynamics.series import at_step
    from ..dynamics.study import PREFIX, scalars
    from ..report.report import write_report

    report = write_report(result, out.with_suffix(".html"))
    rows = {int(step): scalars(at_step(result, int(step))) for step in np.asarray(result["step"])}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if options.json:
        table = [
            {"step": step} | {name.removeprefix(PREFIX): row.get(name) for name in names} for step, row in rows.items()
        ]
        print_json({"file": str(out), "report": str(report), "steps": table})
        return 0
    _print(rows, [name.removeprefix(PREFIX) for name in names], names)
    put(f"\n{shown(out)}  results ({out.stat().st_size / 1e6:.1f} MB)")
    put(f"{shown(report)}  report ({report.stat().st_size / 1e6:.1f} MB)")
    put(f"{time.monotonic() - started:.0f} s in all")
    return 0


def _formation(options: argparse.Namespace) -> FormationStudy | None:
    """The formation study, where ``--study`` names it or a file that holds one."""
    from ...interventions.declare.codec import read_json
    from ..dynamics.formation import FormationStudy

    if options.study == "formation":
        return FormationStudy()
    try:
        text = Path(options.study or "").expanduser().read_text()
        found = read_json(text)
    except (OSError, ValueError):
        return None  # which is told where a study is read
    is_one = isinstance(found, dict) and found.get("type") == "FormationStudy"
    return FormationStudy.from_json(text) if is_one else None


def _run_formation(study: FormationStudy, options: argparse.Namespace, started: float) -> int:
    """Train and measure, write the report, print the findings."""
    from ..catalogue.summary import summary
    from ..report.report import write_report
    from ..storage.files import check_writable, write_netcdf

    trained = f"{len(study.trainings)} trainings from {study.seeds} seeds, {study.steps} steps each"
    if options.plan:
        put(f"{trained}, measured at {len(study.at)} of them")
        return 0
    out = Path(options.out or "results/dynamics-formation.nc")
    if out.suffix != ".nc":
        raise DeclarationError(f"--out {out}: end it in .nc; the report beside it gets the same name in .html")
    out = check_writable(out)
    check_writable(out.with_suffix(".html"))
    tree = None if options.fresh else study.shipped()
    if tree is not None:
        say("headwise ships the result of this study; --fresh trains again")
        write_netcdf(tree, out)
    else:
        say(trained)
        tree = study.run(out=out, resume=not options.fresh)
    say("writing the report")
    report = write_report(tree, out.with_suffix(".html"))
    said = summary(tree)
    if options.json:
        print_json({"file": str(out), "report": str(report), "findings": list(said.points)})
        return 0
    for text in said.points:
        put(fill(f"- {text}", "  "))
    put(f"\n{shown(out)}  results ({out.stat().st_size / 1e6:.1f} MB)")
    put(f"{shown(report)}  report ({report.stat().st_size / 1e6:.1f} MB)")
    put(f"{time.monotonic() - started:.0f} s in all")
    return 0


def _study(options: argparse.Namespace) -> Study:
    """The study of ``--study``, or that of ``--metrics`` on repeated random tokens."""
    from ..dynamics.study import study_from_json
    from ..measuring.declared import Sweep
    from ..tasks.tasks import RepeatedTokens

    if options.study is None:
        names = [name.strip() for name in (options.metrics or METRICS).split(",") if name.strip()]
        return Sweep(RepeatedTokens(n=options.n, length=options.length, seed=options.seed), metrics=names)
    path = Path(options.study).expanduser()
    try:
        return study_from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except DeclarationError as error:
        raise DeclarationError(
            f"--study {options.study}: {error}; the file holds what study.to_json() writes"
        ) from error


def _steps(text: str) -> str | list[int]:
    if text.strip() == "all":
        return "all"
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise DeclarationError(f"--steps {text}: give all, or whole numbers with commas, such as 0,512,2000") from None


def _print(rows: dict[int, dict[str, float]], titles: list[str], names: list[str]) -> None:
    """Each step with what is logged of it: the largest score of a head, and the mean of other metrics."""
    from ..catalogue.listing import cell, lined_table

    table = lined_table()
    for title in ("step", *titles):
        table.add_column(cell(title), justify="right")
    for step, row in rows.items():
        table.add_row(str(step), *(f"{row[name]:.3f}" if name in row else "" for name in names))
    print_table(lambda wide: table)
    put("of a score of heads the largest, the mean over prompts")
