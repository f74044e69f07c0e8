"""``headwise text``: induction on text that a model has not read, its file and its report."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError
from ..output.phrases import rounded
from .induction import _stem
from .shared import (
    PLAIN_WIDTH,
    add_command,
    add_json,
    add_model,
    fill,
    open_model,
    print_json,
    print_table,
    put,
    quiet_libraries,
    say,
    shown,
)

if TYPE_CHECKING:
    import xarray as xr

    from ...interventions.models.model import Model
    from ..text.price import TextPlan
    from ..text.study import TextInduction

HEAD_CONTROLS = 20
"""Random sets that the heads of each claim are compared with."""
EXAMPLES = """  headwise text                                      held-out files of code-4l
  headwise text --model gpt2 --text notes/ --context 256
  headwise text --model gpt2 --text notes/ --prompts potter.txt
  headwise text --text words.txt --plan              what each stage takes
  headwise text --heads --json
"""
PROMPTS = """the file of --prompts holds one prompt a line, whose last word stands in it
once before:
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
        "--heads",
        action="store_true",
        help="say too what every head does there, in a file and a report beside (8 times N windows, 20 random sets)",
    )
    parser.add_argument("--out", help="NetCDF file to write (default: results/text-MODEL.nc)")
    parser.add_argument("--plan", action="store_true", help="say what each stage would cost, and run nothing")
    parser.add_argument("--fresh", action="store_true", help="run everything again, whatever is there")
    add_json(parser, "print gains, heads and findings as JSON; with --plan the figures of each stage")


def run(options: argparse.Namespace) -> int:
    """Run the study, write the report, print the summary."""
    started = time.monotonic()
    from ..storage.files import check_writable
    from ..text.study import STAGES, TextInduction

    names = ("text", "prompts", "n", "context", "pairs", "controls", "ablation", "seed")
    study = TextInduction(**{name: getattr(options, name) for name in names})
    if options.plan:
        quiet_libraries()
        plan = _plan(study, open_model(options), options)
        if options.json:
            print_json(asdict(plan))
        else:
            put(plan)
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
            say(_plan(study, model, options).line)
        begun.append(name)
        say(f"{stages.index(name) + 1}/{len(stages)} {STAGES[name]}")

    tree = study.run(model, stage, out=out, resume=not options.fresh)
    if not begun:
        say(f"{shown(out)} holds the whole result already; --fresh runs everything again")
    say("writing the report")
    report = write_report(tree, out.with_suffix(".html"))
    if options.json:
        more = {"every_head": _heads(model, options, out)} if options.heads else {}
        print_json({"file": str(out), "report": str(report), **_figures(tree), **more})
        return 0
    _print_summary(tree)
    put(f"\n{shown(out)}  results ({out.stat().st_size / 1e6:.1f} MB)")
    put(f"{shown(report)}  report ({report.stat().st_size / 1e6:.1f} MB)")
    if options.heads:
        every = _heads(model, options, out)
        put()
        for text in every["findings"]:
            put(fill(f"- {text}"))
        put(f"\n{shown(Path(every['file']))}  {shown(Path(every['report']))}")
    put(f"{time.monotonic() - started:.0f} s in all")
    return 0


def _plan(study: TextInduction, model: Model, options: argparse.Namespace) -> TextPlan:
    """What each stage costs, those of --heads too."""
    from ..text.price import price_heads

    plan = study.plan(model)
    return price_heads(plan, model, options.text, **_head_options(options)) if options.heads else plan


def _head_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `text_heads` is given for --heads."""
    return {"n": 8 * options.n, "context": options.context, "seed": options.seed, "controls": HEAD_CONTROLS}


def _figures(tree: xr.DataTree) -> dict[str, Any]:
    """What --json prints of the study: gains in nats, heads, and findings."""
    gains, heads, alone = tree["gains"].to_dataset(), tree["heads"].to_dataset(), tree["ablation"].to_dataset()
    of_head = {name: heads[name] for name in ("role", "successor", "distance_control")}
    of_head |= {"induction": heads["induction"].mean("example"), "alone_gain": alone["alone_gain"]}
    return {
        "gains": {
            str(one): {name: gains[name].sel(gain=one).item() for name in ("mean", "mean_low", "mean_high", "count")}
            for one in gains["gain"].values
        },
        "heads": {
            f"L{layer}H{head}": {name: values.sel(layer=layer, head=head).item() for name, values in of_head.items()}
            for layer in heads["layer"].values
            for head in heads["head"].values
        },
        "findings": json.loads(tree.attrs["conclusion"]),
    }


def _heads(model: Model, options: argparse.Namespace, study: Path) -> dict[str, Any]:
    """What every head does there, beside the file of the study: the file, the report, names of heads, and sentences."""
    from ..report.report import write_report
    from ..report.text_heads import sentences
    from ..storage.files import write_netcdf
    from ..text.heads import text_heads

    say("what every head does there")
    out = study.with_name(f"{study.stem}-heads.nc")
    ds = text_heads(model, options.text, **_head_options(options))
    write_netcdf(ds, out)
    report = write_report(out, out.with_suffix(".html"))
    called = {
        f"L{layer}H{head}": str(ds["called"].sel(layer=layer, head=head).item())
        for layer in ds["layer"].values
        for head in ds["head"].values
    }
    return {"file": str(out), "report": str(report), "called": called, "findings": sentences(ds)["summary"]}


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
        change = rounded(alone.sel(layer=head.layer, head=head.head), "+.2f")
        table.add_row(str(head), cell(str(here["role"].values)), *map(rounded, numbers), change)
    print_table(lambda wide: table, PLAIN_WIDTH)
    put()
    findings = json.loads(tree.attrs["conclusion"])
    for finding in findings:
        if finding["group"] == "summary":
            put(fill(f"- {finding['text']}"))
    limits = sum(finding["group"] == "limits" for finding in findings)
    put(f"\nThe report has curves by distance, candidates and position, and {limits} limits of what was shown.")
