"""``headwise text``: induction on text that a model has not read, its file and its report."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError
from .induction import _stem
from .shared import PLAIN_WIDTH, add_command, add_model, fill, open_model, print_table, put, quiet_libraries, say, shown

if TYPE_CHECKING:
    import xarray as xr

    from ...interventions.models.model import Model

HEAD_CONTROLS = 20
"""Random sets that the heads of each claim are compared with."""
EXAMPLES = """  headwise text                                      the held-out files of code-4l
  headwise text --model gpt2 --text notes/ --context 256
  headwise text --model gpt2 --text notes/ --prompts potter.txt
  headwise text --text words.txt --plan              what each stage would take
"""
PROMPTS = """the file of --prompts holds one prompt in a line, whose last word stands before:
  Harry Potter went home. Then Harry
measured is the first token of what followed that word: " Potter"

the gain is the loss at the first occurrence of a token pair less that at the
second; it also holds what more context gives. The net gain says what the first
occurrence itself is worth: how much the loss at the second rises where the
first is replaced, less how much it rises where another place is
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "text",
        run,
        help="induction on text that a model has not read",
        description=(
            "Find token pairs that recur in text, and say what the second occurrence gains, which heads attend to the "
            "first one's successor, what is left without the induction heads, and where it fails. Writes a NetCDF file "
            "and an HTML report beside it. Stopped or killed, the same command again goes on where it was."
        ),
        examples=f"{EXAMPLES}\n{PROMPTS}",
    )
    add_model(parser)
    parser.set_defaults(model="code-4l")
    parser.add_argument("--text", metavar="PATH", help="file or folder of text (default: held_out of the model)")
    parser.add_argument("--prompts", metavar="FILE", help="prompts of your own too, see below")
    parser.add_argument("--n", type=int, default=32, help="windows of text, at most (default: %(default)s)")
    parser.add_argument("--context", type=int, help="tokens of a window (default: what the model reads)")
    parser.add_argument(
        "--pairs", type=int, default=256, help="occurrences whose first is replaced, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--controls", type=int, default=100, help="random sets of heads, 100 or more (default: %(default)s)"
    )
    parser.add_argument("--ablation", default="mean", help="mean or resample (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default: %(default)s)")
    parser.add_argument(
        "--heads", action="store_true", help="say too what every head does there, in a file and a report beside"
    )
    parser.add_argument("--out", help="NetCDF file to write (default: results/text-MODEL.nc)")
    parser.add_argument("--plan", action="store_true", help="say what each stage would cost, and run nothing")
    parser.add_argument("--fresh", action="store_true", help="run everything again, whatever is there")


def run(options: argparse.Namespace) -> int:
    """Run the study, write the report, print the summary."""
    started = time.monotonic()
    from ..storage.files import check_writable
    from ..text.study import STAGES, TextInduction

    names = ("text", "prompts", "n", "context", "pairs", "controls", "ablation", "seed")
    study = TextInduction(**{name: getattr(options, name) for name in names})
    if options.plan:
        quiet_libraries()
        put(study.plan(open_model(options)))
        return 0
    out = Path(options.out or f"results/text-{_stem(options)}.nc")
    if out.suffix != ".nc":
        raise DeclarationError(f"--out {out}: end it in .nc; the report beside it gets the same name in .html")
    out = check_writable(out)
    check_writable(out.with_suffix(".html"))
    say(f"opening {options.model}")
    from ..report.report import write_report

    quiet_libraries()
    model = open_model(options)
    stages = [name for name in STAGES if name != "prompts" or options.prompts]
    begun: list[str] = []

    def stage(name: str) -> None:
        """Say which stage begins; before the first one, what all will take."""
        if not begun:
            say(study.plan(model).line)
        begun.append(name)
        say(f"{stages.index(name) + 1}/{len(stages)} {STAGES[name]}")

    tree = study.run(model, stage, out=out, resume=not options.fresh)
    if not begun:
        say(f"{shown(out)} holds the whole result already; --fresh runs everything again")
    say("writing the report")
    report = write_report(tree, out.with_suffix(".html"))
    _print_summary(tree)
    put(f"\n{shown(out)}  results ({out.stat().st_size / 1e6:.1f} MB)")
    put(f"{shown(report)}  report ({report.stat().st_size / 1e6:.1f} MB)")
    if options.heads:
        _heads(model, options, out.with_name(f"{out.stem}-heads.nc"))
    put(f"{time.monotonic() - started:.0f} s in all")
    return 0


def _heads(model: Model, options: argparse.Namespace, out: Path) -> None:
    """What every head does there: the file, the report, and the sentences."""
    from ..report.report import write_report
    from ..report.text_heads import sentences
    from ..storage.files import write_netcdf
    from ..text.heads import text_heads

    say("what every head does there")
    ds = text_heads(model, options.text, context=options.context, seed=options.seed, controls=HEAD_CONTROLS)
    write_netcdf(ds, out)
    report = write_report(out, out.with_suffix(".html"))
    put()
    for text in sentences(ds)["summary"]:
        put(fill(f"- {text}"))
    put(f"\n{shown(out)}  {shown(report)}")


def _print_summary(tree: xr.DataTree) -> None:
    """The heads that attend most to first successors as a table, then the conclusion."""
    from rich.table import Table

    from ..analyses.heads import ranked
    from ..catalogue.listing import cell

    heads, alone = tree["heads"].to_dataset(), tree["ablation"]["alone_gain"]
    table = Table(
        title=cell(tree.attrs["title"]),
        caption="attention to the first successor; gain: change in nats when the head alone is ablated",
        box=None,
    )
    for title in ("head", "role on random tokens", "induction", "on text", "same distance", "gain"):
        table.add_column(title, justify="left" if title in ("head", "role on random tokens") else "right")
    for head, value in ranked(heads["successor"], 8):
        here = heads.sel(layer=head.layer, head=head.head)
        numbers = (float(here["induction"].mean()), value, float(here["distance_control"]))
        change = round(float(alone.sel(layer=head.layer, head=head.head)), 2) + 0.0
        table.add_row(str(head), cell(str(here["role"].values)), *(f"{one:.2f}" for one in numbers), f"{change:+.2f}")
    print_table(lambda wide: table, PLAIN_WIDTH)
    put()
    findings = json.loads(tree.attrs["conclusion"])
    for finding in findings:
        if finding["group"] == "summary":
            put(fill(f"- {finding['text']}"))
    limits = sum(finding["group"] == "limits" for finding in findings)
    put(f"\nThe report has curves by distance, candidates and position, and {limits} limits of what was shown.")
