"""The report of a study of induction on text: what is gained, by which heads, and where it fails."""

from __future__ import annotations

from functools import partial

import xarray as xr

from .. import plots
from ..analyses.heads import ranked
from ..output.page import Page, folded, number, table
from ..output.phrases import count
from .induction import Section

QUESTION = "Does the model use it that a token pair stood in the text before, and which heads does that rest on?"
SHOWN = 12
"""Occurrences and prompts of a table."""
BIN_CAPTION = (
    "The gain (blue) and the net gain (orange) by {}, with 95% intervals; hover shows how many occurrences there are. "
    "The gain is the loss at the first occurrence less that at the second; the net gain is what the first occurrence "
    "itself is worth{}."
)


def lead(tree: xr.DataTree) -> str:
    """On what text, in a sentence."""
    held = tree["windows"].to_dataset()
    n, size = held["tokens"].shape
    files = count(len({*map(str, held["file"].values)}), "file")
    return f"{n} of the {int(held.attrs['possible'])} windows of {size} tokens that the text has, from {files}."


def _gains(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    names = [str(name).replace("_", " ") for name in ds["gain"].values]
    page.figure(
        plots.ranked_conditions(ds.assign_coords(gain=names), "mean", title="Gains of second occurrences"),
        "Gain: loss at the first occurrence less loss at the second. Causal gain: how much the loss at the second "
        "rises where the first is replaced by another pair of tokens; elsewhere: where another place is. Net gain: the "
        "difference of these two. Second occurrences with one candidate, 95% intervals.",
    )
    rows = []
    for at, name in enumerate(names):
        one = ds.isel(gain=at)
        values = (number(float(one[f"mean{end}"]), "+.3f") for end in ("", "_low", "_high"))
        rows.append([name, *values, str(int(one["count"]))])
    head = ["gain", "nats", "from", "to", "occurrences"]
    page.add(folded("Values", table(head, rows, caption="Means over occurrences, 95% intervals.")))
    page.add(folded("Some second occurrences", _examples(tree)))


def _examples(tree: xr.DataTree) -> str:
    """The occurrences whose first was replaced that gain most and least."""
    found, after = tree["occurrences"].to_dataset(), tree["replaced"].to_dataset()
    order = after.sortby("net_gain", ascending=False)
    rows = []
    for at in [*range(min(SHOWN // 2, order.sizes["row"])), *range(-min(SHOWN // 2, order.sizes["row"]), 0)]:
        one = order.isel(row=at)
        here = found.isel(occurrence=int(one["occurrence"]))
        words = f"{str(here['cue'].values)!r} {str(here['token'].values)!r}"
        numbers = [str(int(here[name])) for name in ("first", "second", "candidates")]
        both = (number(float(value), "+.2f") for value in (here["gain"], one["net_gain"]))
        rows.append([str(here["file"].values), words, *numbers, *both])
    head = ["file", "pair", "first", "second", "candidates", "gain", "net gain"]
    return table(
        head, rows, caption="Those with the largest and the smallest net gain; positions are of the later token."
    )


def _heads(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    limits = (0.0, float(max(ds[name].max() for name in ("successor", "distance_control"))))
    page.figure(
        plots.head_grid(ds["successor"], limits=limits, title="text: first successor")
        + plots.head_grid(ds["distance_control"], limits=limits, title="text: same distance elsewhere")
        + plots.head_grid(ds["induction"], title="random tokens: induction score"),
        "Mean attention of each head from the token before a second occurrence to the first occurrence's successor; "
        "over the same distances from other queries, to tokens that follow no copy of them; and the induction score on "
        "repeated random tokens. Layer 0 is at the bottom.",
    )
    page.figure(
        plots.words_agreement(ds, ds, name="successor", where="text"),
        "Each head's attention to first successors on the text against its induction score on repeated random tokens. "
        "Dashed: uniform attention.",
    )
    rows = []
    for head, value in ranked(ds["successor"]):
        here = ds.sel(layer=head.layer, head=head.head)
        ends = [float(here[f"successor_{end}"]) for end in ("low", "high")]
        beside = [float(here["distance_control"]), float(here["induction"].mean())]
        rows.append([str(head), str(here["role"].values), *map(number, [value, *ends, *beside])])
    titles = ["head", "role on random tokens", "on text", "from", "to", "same distance", "on random tokens"]
    page.add(folded(f"All {len(rows)} heads", table(titles, rows, caption="Attention from 0 to 1, 95% intervals.")))


def _ablation(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    if "set" in ds.dims:
        for name, words in (
            ("gain", "gain of second occurrences"),
            ("loss_second", "loss at second occurrences"),
            ("loss_first", "loss at first occurrences"),
        ):
            page.figure(
                plots.sets_against_null(ds, name),
                f"Change of the {words} without the induction heads (diamond, with its 95% interval) and without as "
                "many random other heads (dots), in nats.",
            )
    else:
        page.add("<p>No head is an induction head on random tokens, so there is no set to ablate.</p>")
    page.figure(
        plots.head_grid(ds["alone_gain"], title="gain, one head ablated")
        + plots.head_grid(ds["alone_loss_first"], title="loss at first occurrences"),
        "Change in nats when one head is ablated alone. Negative on the left: the gain is smaller without the head. "
        "Positive on the right: the head matters where nothing has recurred, too.",
    )


def _bins(page: Page, ds: xr.Dataset, tree: xr.DataTree, *, words: str, more: str) -> None:
    page.figure(plots.gains_by_bin(ds), BIN_CAPTION.format(words, more))
    names = ["gain", "net_gain"]
    rows = []
    for at in range(ds.sizes["bin"]):
        row, one = [str(ds["bin"].values[at])], ds.isel(bin=at)
        for name in names:
            row += [number(float(one[f"{name}{end}"]), "+.2f") for end in ("", "_low", "_high")]
            row.append(str(int(one[f"count_{name}"])))
        rows.append(row)
    head = [
        words,
        *(f"{name.replace('_', ' ')}{end}" for name in names for end in ("", ", from", ", to", ", occurrences")),
    ]
    page.add(folded("Values", table(head, rows, caption="In nats, 95% intervals; – where there are too few to tell.")))


def _prompts(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    rows = []
    for at in range(ds.sizes["prompt"]):
        one = ds.isel(prompt=at)
        said = [str(one["prompt"].values), repr(str(one["answer"].values)), number(float(one["prob"]), ".3f")]
        rows.append([*said, *(number(float(one[name]), "+.2f") for name in ("gain", "causal_gain"))])
    head = ["prompt", "answer", "probability", "gain", "first occurrence replaced"]
    page.add(table(head, rows[:SHOWN], caption="Gains in nats.", long=(0,)))
    if len(rows) > SHOWN:
        page.add(folded(f"All {len(rows)} prompts", table(head, rows, long=(0,))))


ONE = ", of pairs with one candidate"
SECTIONS = (
    Section("gains", "What is gained", "What does a second occurrence gain?", _gains),
    Section("heads", "Heads", "Which heads attend to the first one's successor?", _heads),
    Section("ablation", "Ablation", "What is left without the induction heads?", _ablation),
    Section(
        "distance",
        "Distance",
        "Does it fail where the first occurrence is far away?",
        partial(_bins, words="tokens from the first occurrence", more=ONE),
    ),
    Section(
        "candidates",
        "Candidates",
        "Does it fail where several tokens have followed?",
        partial(_bins, words="number of different tokens that followed before", more=", the right one among them"),
    ),
    Section(
        "position",
        "Position",
        "Does it fail near the end of the context?",
        partial(_bins, words="position in the window", more=ONE),
    ),
    Section("prompts", "Prompts", "And on prompts of your own?", _prompts),
)
