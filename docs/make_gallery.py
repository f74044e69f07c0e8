"""The gallery: every picture, drawn from the results of the shipped model by the very lines that are shown under it.

``python docs/make_gallery.py`` (or ``make gallery``) writes ``docs/gallery.md`` and ``docs/gallery/*.png``; it needs
Chromium, Chrome, Edge or Brave. The result of the study is read from ``results/``, and made where it is not there.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import headwise as hw

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "induction-words-2l.nc"
LARGEST = 1_500_000
"""Bytes of all pictures together."""

model: Any
task: Any
tree: Any


def head_grid() -> Any:
    """One number for each head: here how much of its attention goes to the token after the earlier copy."""
    heads = tree["heads"].to_dataset()
    return hw.plots.head_grid(heads["induction"], limits=(0, 1), title="induction score")


def ranked_heads() -> Any:
    """The highest scores with their 95% intervals over prompts, beside chance and the best head of untrained models."""
    heads = tree["heads"].to_dataset()
    return hw.plots.ranked_heads(heads, "previous_token", top=6, title="previous-token score")


def attention_viewer() -> Any:
    """A head on any prompt. In a page or a notebook, hover on a token to see where it looks; here it is the last."""
    prompt = hw.Prompts(["apple banana cherry dog apple banana cherry"])
    patterns = hw.capture(model, prompt, [hw.Head(1, 2).pattern])
    return hw.plots.attention_viewer(patterns, "L1H2")


def attention_in_text() -> Any:
    """An induction head on Python code that its model has not read: where two tokens of it look."""
    source = "    def startPrefixMapping(self, prefix, uri):\n"
    source += "        self._cont_handler.startPrefixMapping(prefix, uri)\n\n"
    source += "    def endPrefixMapping(self, prefix):\n        self._cont_handler.endPrefixMapping(prefix)\n"
    patterns = hw.capture(hw.load("code-4l"), hw.Prompts([source]), "L1H6.pattern")
    first = hw.plots.attention_in_text(patterns, query=51)
    return (first + hw.plots.attention_in_text(patterns, query=66)).cols(1)


def heads_on_text() -> Any:
    """What each head is called, by what it does on Python code that the model has not read."""
    named = hw.text_heads(hw.load("code-4l"), n=96)
    return hw.plots.heads_on_text(named, title="heads of code-4l on held-out code")


def attention_row() -> Any:
    """The top heads side by side; zooming in one zooms in all. Boxes mark where an induction head must look."""
    patterns = tree["patterns"].to_dataset()
    return hw.plots.attention_row(patterns, by=tree["heads"]["induction"], top=3)


def by_position() -> Any:
    """Loss at each position with its interval, on repeated tokens and on tokens that do not repeat."""
    return hw.plots.by_position(tree["behaviour"].to_dataset(), "loss", title="loss at each position")


def ablation_grids() -> Any:
    """What each head's ablation costs, by three methods on one colour scale."""
    return hw.plots.ablation_grids(tree["ablation"].to_dataset(), "loss")


def zero_against_mean() -> Any:
    """Two ways to ablate a head: on the dashed line they agree; yellow heads write much the same for every prompt."""
    return hw.plots.zero_against_mean(tree["ablation"].to_dataset(), "loss", title="zero against mean ablation")


def ranked_conditions() -> Any:
    """Any conditions, the largest change first, with intervals over prompts: here every head by every method."""
    change = hw.effect(tree["ablation"].to_dataset(), "loss")
    return hw.plots.ranked_conditions(change, top=12, title="ablation")


def sets_against_null() -> Any:
    """Sets of heads ablated together (diamonds) against as many random heads (dots): the null distribution."""
    sets = tree["sets"].to_dataset()
    return hw.plots.sets_against_null(sets, "accuracy")


def qkv_grids() -> Any:
    """q, k or v of one head taken from the corrupted run: 1 is no change, 0 the corrupted run's answer."""
    return hw.plots.qkv_grids(tree["patching"].to_dataset(), "noising")


def qkv_of_set() -> Any:
    """q, k or v of all induction heads together: where they look then, and what the model answers."""
    return hw.plots.qkv_of_set(tree["patching"].to_dataset())


def path_grids() -> Any:
    """The output of a head taken from the corrupted run on its direct paths into the induction heads alone."""
    return hw.plots.path_grids(tree["composition"].to_dataset())


def layer_by_position() -> Any:
    """The residual stream patched at every layer and position."""
    clean, corrupted = "apple banana cherry dog apple banana cherry", "apple banana cherry sun apple banana cherry"
    prompt = hw.Prompts([clean], answers=["dog"], distractors=["sun"], corrupted=[corrupted])
    places = {"layer": model.layers, "position": range(7)}
    stream = hw.Grid(lambda layer, position: hw.Patch(hw.Layer(layer).resid_pre.at(position)), **places)
    patched = hw.measure(model, prompt, stream, [hw.metrics.logit_diff])
    return hw.plots.layer_by_position(hw.effect(patched, "logit_diff"), title="patched from the corrupted run")


def composition_matrix() -> Any:
    """Composition of every head into every later one, from the weights, above what random weights give."""
    return hw.plots.composition_matrix(tree["composition"].to_dataset(), "k", title="K-composition")


def composition_graph() -> Any:
    """The same as a graph: the previous-token head feeds the keys of the induction heads."""
    scores, roles = tree["composition"].to_dataset(), tree["heads"]["role"]
    return hw.plots.composition_graph(scores, "k", roles=roles, title="K-composition")


def composition_strip() -> Any:
    """All pairs by kind; the band is random weights, the diamond the mean from previous-token to induction heads."""
    return hw.plots.composition_strip(tree["composition"].to_dataset(), title="composition from the weights")


def causal_check() -> Any:
    """Does it matter? The induction score without the previous-token heads, and without as many random heads."""
    return hw.plots.causal_check(tree["composition"].to_dataset(), title="without the previous-token heads")


def direct_and_copying() -> Any:
    """What heads write towards the answer themselves, against how far their weights copy; dots are random sets."""
    return hw.plots.direct_and_copying(tree["attribution"].to_dataset(), title="what heads write, and copy")


def words_grid() -> Any:
    """The right next word of word lists, with the induction heads and without them."""
    return hw.plots.words_grid(tree["words"].to_dataset(), title="the right word")


def words_agreement() -> Any:
    """The same heads fire on words and on random tokens."""
    words, heads = tree["words"].to_dataset(), tree["heads"].to_dataset()
    return hw.plots.words_agreement(words, heads, title="words against random tokens")


def estimate_against_exact() -> Any:
    """How near estimates from gradients come to what was measured, for every head patched; the worst are named."""
    return hw.plots.estimate_against_exact(tree["estimates/patching"].to_dataset())


def predictions() -> Any:
    """What the model says next, with the previous-token head and without it; what it says first is orange in both."""
    what = {"all heads": None, "without L0H3": hw.ZeroAblate("L0H3")}
    said = hw.predict(model, "apple banana cherry apple", what, top=6)
    return hw.plots.predictions(said)


def token_grid() -> Any:
    """The logit lens: the likeliest next token by the stream that leaves each layer, darker where it is likelier."""
    text = "apple banana cherry dog apple banana cherry dog"
    lens = hw.logit_lens(model, text, top=1, positions="all")
    return hw.plots.token_grid(lens)


def attribution() -> Any:
    """What each part adds to the answer's logit above the distractor's, directly: heads, and the others as bars."""
    direct = hw.direct_logit_attribution(model, task)
    return hw.plots.attribution(direct)


def activations() -> Any:
    """What was captured of one prompt, here the neurons of the first layer after the activation function."""
    captured = hw.capture(model, hw.RepeatedTokens(n=1, length=8), hw.Layer(0).mlp_post)
    return hw.plots.activations(captured["L0_mlp_post"])


def token_bars() -> Any:
    """Which key a query wants most and least, where keys come through the previous-token head: from the weights."""
    circuits = hw.head_circuits(model, "L1H2", through={"k": "L0H3"}, top=6)
    return hw.plots.token_bars(circuits.qk)


def eigenvalue_plane() -> Any:
    """Eigenvalues of the OV circuit of an induction head: all are positive, so it raises what it attends to."""
    circuits = hw.head_circuits(model, "L1H2")
    return hw.plots.eigenvalue_plane(circuits.ov)


def over_steps() -> Any:
    """How the circuit of the shipped model forms, at 23 steps of its training; heads that stay low are grey."""
    scores = ["previous_token", "induction", "loss", "in_context_20_45"]
    study = hw.Sweep(hw.RepeatedTokens(n=32, length=25, score="all"), metrics=scores)
    formation = hw.over_checkpoints("words-2l", study, steps="all")
    return hw.plots.over_steps(formation, scores, top=3)


def formation() -> Any:
    """The phase change: induction appears in models that are trained from three seeds, and in no control."""
    formation = hw.FormationStudy().shipped()
    return hw.plots.formation(formation)


def change_points() -> Any:
    """When each part of the circuit appears, in each of three trainings and on average."""
    formation = hw.FormationStudy().shipped()
    return hw.plots.change_points(formation)


def gains_by_bin() -> Any:
    """What second occurrences of token pairs in Python code gain, by distance, with 95% intervals."""
    found = hw.TextInduction(n=16, pairs=96).run(hw.load("code-4l"))
    return hw.plots.gains_by_bin(found["distance"])


def circuit_graph() -> Any:
    """The smallest circuit of the shipped model that keeps 90% of the logit difference, by layer."""
    found = hw.CircuitStudy(task, draws=5).run(model, out="results/circuit-words-2l.nc")
    circuit = hw.from_json(found.attrs["circuit"])
    return hw.plots.circuit_graph(circuit, found["edges"]["score"], graph=hw.Graph.of(model))


def circuit_curve() -> Any:
    """What circuits of growing size keep, at the shares of all edges that MIB has; grey: random connected circuits."""
    found = hw.CircuitStudy(task, draws=5).run(model, out="results/circuit-words-2l.nc")
    random = found["random"].to_dataset().sel(kind="connected edges")
    return hw.plots.circuit_curve(found["curve"].to_dataset(), random)


def edge_inclusion() -> Any:
    """How sure the edges of a circuit are: how often each is chosen where the prompts, here eight, are drawn again."""
    few = hw.edge_scores(model, hw.RepeatedTokens(n=8, length=8), "logit_diff")
    return hw.plots.edge_inclusion(hw.edge_inclusion(few["score"], n=20))


def kept_by_heads() -> Any:
    """Which heads suffice, with all MLPs: taken in by score, taken out greedily, and random sets of as many."""
    found = hw.CircuitStudy(task, draws=5).run(model, out="results/circuit-words-2l.nc")
    return hw.plots.kept_by_heads(found["nodes"].to_dataset())


def chosen() -> Any:
    """No name to remember: `picture` chooses by the dims of a variable, of any dataset."""
    return hw.plots.picture(tree, "ablation/loss", ablation="mean")


PICTURES: tuple[Callable[[], Any], ...] = (
    head_grid,
    ranked_heads,
    attention_viewer,
    attention_in_text,
    heads_on_text,
    attention_row,
    by_position,
    ablation_grids,
    zero_against_mean,
    ranked_conditions,
    sets_against_null,
    qkv_grids,
    qkv_of_set,
    path_grids,
    layer_by_position,
    composition_matrix,
    composition_graph,
    composition_strip,
    causal_check,
    direct_and_copying,
    words_grid,
    words_agreement,
    estimate_against_exact,
    predictions,
    token_grid,
    attribution,
    activations,
    token_bars,
    eigenvalue_plane,
    over_steps,
    formation,
    change_points,
    gains_by_bin,
    circuit_graph,
    circuit_curve,
    edge_inclusion,
    kept_by_heads,
    chosen,
)
INTRODUCTION = """# Gallery

Every picture that headwise draws, from the results of the model that ships with it (`make induction`, half a minute).
Under each are the lines that drew it: `make gallery` runs them and writes this page.

All return [HoloViews](https://holoviews.org) elements: `+` puts them side by side, `*` on top of each other,
`.opts(...)` changes how they look, and in a notebook or a saved page hovering shows the numbers.
`hw.plots.save(picture, "name.html")` writes one that opens with no network; `.png` and `.svg` are drawn by Chromium,
Chrome, Edge or Brave. They take any xarray dataset with the right dims, also one made by hand; labels and units are
read from its attributes where it has any.

```python
import headwise as hw

model, task = hw.load("words-2l"), hw.RepeatedTokens(n=32, length=25)
tree = hw.open_result("results/induction-words-2l.nc")
```
"""


def lines(function: Callable[[], Any]) -> str:
    """The body of a function as it would stand in a script."""
    source = textwrap.dedent(inspect.getsource(function)).split('"""', 2)[2].strip("\n")
    return re.sub("^return ", "", textwrap.dedent(source), flags=re.MULTILINE)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for function in PICTURES:
        caption = " ".join(str(function.__doc__).split()).replace("``", "`")
        title = "picture" if function is chosen else function.__name__
        image = f"![{title}](gallery/{function.__name__}.png)"
        parts.append(f"## {title}\n\n{caption}\n\n{image}\n\n```python\n{lines(function)}\n```\n")
    return "\n".join(parts)


def prepare(result: Any = None) -> None:
    """Give the pictures what they are drawn from: the model, the task, and a result of the study."""
    global model, task, tree
    model, task = hw.load("words-2l"), hw.RepeatedTokens(n=32, length=25)
    if result is None:
        if not RESULT.is_file():
            hw.write_netcdf(hw.InductionStudy().run(model), RESULT)
        result = hw.open_result(RESULT)
    tree = result


def fewer_colours(path: Path) -> None:
    """Make a PNG a third as large, with a palette of its own colours."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main() -> None:
    """Draw everything and write the page."""
    started, size = time.monotonic(), 0
    prepare()
    for function in PICTURES:
        path = hw.plots.save(function(), HERE / "gallery" / f"{function.__name__}.png")
        fewer_colours(path)
        size += path.stat().st_size
        print(f"{function.__name__:24} {path.stat().st_size / 1000:6.0f} kB", flush=True)
    (HERE / "gallery.md").write_text(page(), encoding="utf-8")
    print(f"{len(PICTURES)} pictures, {size / 1e6:.2f} MB, {time.monotonic() - started:.0f} s: {HERE / 'gallery.md'}")
    if size > LARGEST:
        sys.exit(f"the pictures are larger than {LARGEST / 1e6} MB together")


if __name__ == "__main__":
    main()
