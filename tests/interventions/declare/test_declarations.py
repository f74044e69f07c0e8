"""Sites, interventions, grids and their JSON: plain values that say what is wrong with them."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import DeclarationError, MissingPartError, UnknownNameError
from headwise.interventions import (
    Add,
    Component,
    Compose,
    Grid,
    Head,
    Knockout,
    Layer,
    MeanAblate,
    Neuron,
    Patch,
    PathPatch,
    ProjectOut,
    ResampleAblate,
    Scale,
    Site,
    ZeroAblate,
)
from headwise.interventions.declare.codec import from_json, to_json
from headwise.interventions.declare.sites import as_site

NAMES = {
    name: value
    for name, value in globals().items()
    if isinstance(value, type) and value.__module__.startswith("headwise.interventions")
}

labels = st.sampled_from(["S2", "end", "the name", "x-1"])
some = st.sets(st.integers(-5, 40) | labels, min_size=1, max_size=4).map(
    lambda found: tuple(sorted(found, key=lambda one: (isinstance(one, str), one)))
)
positions = st.none() | some
per_head = st.sampled_from([component for component in Component if component.per_head])
whole = st.sampled_from([one for one in Component if not one.per_head and not one.embedding])
sites = st.one_of(
    st.builds(Site, per_head, st.integers(0, 5), st.none() | st.integers(0, 5), positions),
    st.builds(Site, whole, st.integers(0, 5), st.none(), positions),
    st.builds(Site, st.sampled_from(["mlp_pre", "mlp_post"]), st.just(2), st.none(), positions, st.integers(0, 9)),
    st.builds(Site, st.sampled_from(["embed", "pos_embed"]), st.just(0), st.none(), positions),
)
numbers = st.floats(-9, 9)
receivers = st.builds(Site, st.sampled_from("qkv"), st.integers(3, 5), st.integers(0, 5), positions)
edits = st.one_of(
    st.builds(ZeroAblate, sites),
    st.builds(MeanAblate, sites),
    st.builds(MeanAblate, sites.filter(lambda site: site.component != "pattern"), st.just(("example", "position"))),
    st.builds(Add, st.builds(Head, st.integers(0, 5), st.integers(0, 5)), st.lists(numbers, min_size=1, max_size=5)),
    st.builds(
        ProjectOut,
        st.builds(Head, st.integers(0, 5), st.integers(0, 5)),
        st.lists(numbers, min_size=1, max_size=5).filter(any),
    ),
    st.builds(Scale, sites, numbers),
    st.builds(Knockout, st.builds(Head, st.integers(0, 5), st.integers(0, 5)), positions, some),
    st.builds(Knockout, st.builds(Layer, st.integers(0, 5)), some, positions),
    st.builds(PathPatch, st.builds(Head, st.integers(0, 2), st.integers(0, 5)), receivers | st.just("logits")),
    st.builds(ResampleAblate, sites, st.integers(0, 9)),
    st.builds(Patch, sites, st.sampled_from(["clean", "corrupted"])),
)


@given(sites)
def test_a_site_as_text(site):
    assert as_site(str(site)) == site
    assert as_site(str(site).replace(" ", ".", 1)) == site
    assert eval(repr(site), dict(NAMES)) == site


def test_text_stands_for_a_site_wherever_one_is_taken():
    assert ZeroAblate("L1H2") == ZeroAblate("1.2") == ZeroAblate("l1h2.z") == ZeroAblate(Head(1, 2))
    assert Patch("L0.mlp_out") == Patch("L0 mlp_out") == Patch(Layer(0).mlp_out)
    assert Patch("1.2.k at -1, 3") == Patch(Head(1, 2).k.at([3, -1]))
    assert repr(Patch("L1H2.k")) == "Patch(site=Head(1, 2).k, source='corrupted')"
    assert MeanAblate("L1.z at S2, 4") == MeanAblate(Layer(1).z.at(["S2", 4]))
    assert PathPatch("L0H3", ["L1H2.k", "logits"]) == PathPatch(Head(0, 3), [Head(1, 2).k, "logits"])
    assert Knockout("L1", query=3) == Knockout(Layer(1), query=3)
    assert Knockout("L1H2", query="end", key="S2") == Knockout(Head(1, 2), query=("end",), key=["S2"])
    assert Knockout("L1H2.pattern at 3", key=0) == Knockout(Head(1, 2), query=3, key=0)
    assert Head(1, 2).at("S2") == Head(1, 2).z.at(["S2"])
    assert Scale("L1H2.q", 0.5).site == Head(1, 2).q
    assert ZeroAblate("L1N2 at 3") == ZeroAblate("l1n2.mlp_post at 3") == ZeroAblate(Neuron(1, 2).at(3))
    assert Add("L1N2.mlp_pre", 2) == Add(Neuron(1, 2).mlp_pre, [2.0])
    assert Add("L0.resid_pre at -1", [1.0]) == Add(Layer(0).resid_pre.at(-1), [1.0])


def test_a_long_vector_is_not_written_out():
    assert repr(Add(Layer(3).mlp_out, [0.5] * 16)) == "Add(site=Layer(3).mlp_out, vector=<16 numbers of norm 2>)"


@given(edits)
def test_repr_is_the_call_that_makes_it(edit):
    assert eval(repr(edit), dict(NAMES)) == edit


@given(edits)
def test_json_gives_back_an_equal_value(edit):
    back = from_json(to_json(edit))
    assert back == edit
    assert hash(back) == hash(edit)


@given(st.lists(edits, min_size=1, max_size=3))
def test_compose_is_the_same_in_any_order_and_survives_json(parts):
    try:
        both = Compose(*parts)
    except DeclarationError:
        return  # they meet: see test_two_edits_of_one_place
    assert both == Compose(*reversed(parts))
    assert from_json(to_json(both)) == both
    assert eval(repr(both), dict(NAMES)) == both


def test_a_declaration_without_neurons_reads_as_before_there_were_any():
    written = '{"type": "Site", "component": "mlp_out", "layer": 1, "head": null, "positions": null}'
    assert to_json(Layer(1).mlp_out) == written
    assert to_json(Neuron(1, 2)) == '{"type": "Neuron", "layer": 1, "neuron": 2}'
    assert from_json(to_json(Neuron(1, 2).mlp_pre)) == Neuron(1, 2).mlp_pre


def test_names_of_heads():
    assert str(Head(5, 1)) == "L5H1"
    assert repr(Head(5, 1)) == "Head(5, 1)"
    assert Head.parse("5.1") == Head.parse("L5H1") == Head.parse(" l5h1 ") == Head(5, 1)
    assert Head.parse("7.10") == Head(7, 10)
    assert str(Head(1, 2).k.at([3, 1])) == "L1H2 k at 1, 3"
    assert repr(Layer(3).mlp_out.at(range(2, 5))) == "Layer(3).mlp_out.at(range(2, 5))"


def test_a_list_of_interventions_is_summed():
    mlps = [ZeroAblate(Layer(layer).mlp_out) for layer in range(3)]
    assert sum(mlps) == Compose(*mlps)


def test_a_bare_head_at_positions():
    assert Head(1, 2).at([3, 4]) == Head(1, 2).z.at([3, 4])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Head(1, 2).mlp_out,
            "Head(1, 2) has no mlp_out: possible are q, k, v, q_rot, k_rot, pattern, z and head_out",
        ),
        (
            lambda: Layer(1).resid,
            "Layer(1) has no resid: possible are embed, pos_embed, resid_pre, attn_in, q, k, v, q_rot, k_rot, pattern",
        ),
    ],
)
def test_missing_parts_list_those_there_are(make, message):
    with pytest.raises(MissingPartError) as caught:
        make()
    assert message in str(caught.value)
    assert isinstance(caught.value, AttributeError)
    assert not hasattr(Head(0, 0), "mlp_out")


def test_numpy_numbers_are_numbers():
    import numpy as np

    assert Head(np.int64(1), np.int32(2)).z.at(np.int64(3)) == Head(1, 2).z.at(3)
    assert Grid(lambda head: ZeroAblate(Head(0, head)), head=np.arange(3)).axes == (("head", (0, 1, 2)),)


def test_a_head_stands_for_its_z():
    assert ZeroAblate(Head(0, 3)) == ZeroAblate(Head(0, 3).z) == ZeroAblate("0.3") == ZeroAblate("L0H3")
    assert ZeroAblate(Head(0, 3)).site == Site("z", 0, 3)


def test_interventions_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ZeroAblate(Head(0, 3)).site = Head(0, 1).z


def test_plus_composes_and_flattens():
    one, two, three = ZeroAblate(Head(0, 1)), Patch(Head(1, 0).k), MeanAblate(Layer(0).mlp_out)
    assert (one + two) + three == three + (two + one) == Compose(one, two, three)
    assert [edit.site.layer for edit in (two + one).edits()] == [0, 1]


def test_components_are_in_forward_order():
    order = [
        "embed",
        "pos_embed",
        "resid_pre",
        "attn_in",
        "q",
        "k",
        "v",
        "q_rot",
        "k_rot",
        "pattern",
        "z",
        "head_out",
        "attn_out",
        "resid_mid",
        "mlp_in",
        "mlp_pre",
        "mlp_post",
        "mlp_out",
        "resid_post",
    ]
    assert [str(component) for component in Component] == order
    assert [component.order for component in Component] == list(range(19))


def test_grid_has_a_condition_for_each_combination():
    grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=[0, 3])
    assert len(grid) == 4
    assert grid.shape == {"layer": 2, "head": 2}
    assert grid.interventions[1] == ZeroAblate(Head(0, 3))
    assert grid.interventions[2] == ZeroAblate(Head(1, 0))
    assert from_json(to_json(grid)) == grid
    assert repr(grid) == "Grid(layer=2, head=2)"


def test_a_mapping_survives_json():
    named = {"pair": ZeroAblate(Head(0, 3)) + Patch(Head(1, 2).k), "prev": MeanAblate(Head(0, 3))}
    assert from_json(to_json(named)) == named


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Head(-1, 0), "a layer must be 0 or more, got -1"),
        (lambda: Head(0.5, 0), "a layer must be a whole number, got 0.5"),
        (
            lambda: ZeroAblate("five"),
            "cannot read 'five' as a site: write L5H1 or 5.1 (layer 5, head 1), L3N17 (layer 3",
        ),
        (
            lambda: ZeroAblate("L1H2.z@-1"),
            "cannot read 'L1H2.z@-1' as a site: write L5H1 or 5.1 (layer 5, head 1), L3N",
        ),
        (
            lambda: ZeroAblate("L5"),
            "'L5' is a whole layer: name a component of it, such as L3.mlp_out: possible are em",
        ),
        (
            lambda: ZeroAblate("L5 at 3"),
            "cannot read 'L5 at 3' as a site: say which component of layer 5, such as L3.m",
        ),
        (lambda: ZeroAblate("L5H1.mlp_out"), "mlp_out has no heads (head 1 given): heads have q, k, v, q_rot, k_rot"),
        (lambda: ZeroAblate("L5H1.out"), "unknown component 'out': possible are embed, pos_embed, resid_pre, attn_in"),
        (lambda: Patch("L5H1 at 1.5"), "the label of a position is text without commas, and no number, got '1.5'"),
        (lambda: Knockout("L5H1.k", query=1), "L5H1 k: attention is knocked out of a head or a layer"),
        (lambda: PathPatch("L0H1", "L1H2"), "Head(1, 2).z cannot receive: possible are q, k and v of a head"),
        (lambda: Head(0, 0).at("a,b"), "the label of a position is text without commas, and no number, got 'a,b'"),
        (lambda: Head(0, 0).at("a/b"), "the label of a position 'a/b' has a '/': possible are letters"),
        (lambda: Head(0, 0).at(["S", "S"]), "positions must differ, got ('S', 'S')"),
        (lambda: Head.parse("five"), "cannot read 'five' as a head: write L5H1 or 5.1 (layer 5, head 1)"),
        (
            lambda: Site("mlp_out", 0, 3),
            "mlp_out has no heads (head 3 given): heads have q, k, v, q_rot, k_rot, pattern, z and head_out",
        ),
        (lambda: Head(0, 1).site("mlp_out"), "mlp_out has no heads (head 1 given)"),
        (lambda: Head(0, 0).z.at([]), "positions must name at least one position"),
        (lambda: Head(0, 0).z.at([1, 1]), "positions must differ, got (1, 1)"),
        (lambda: Head(0, 0).z.at([0.5]), "positions must be whole numbers"),
        (
            lambda: ZeroAblate(3),
            "expected a site, a head or a neuron, got 3: write Head(5, 1), Neuron(3, 17), Head(5, 1).k",
        ),
        (
            lambda: MeanAblate(Head(0, 0), over="hidden"),
            "over='hidden': possible are 'example' and ('example', 'position')",
        ),
        (lambda: MeanAblate(Head(0, 0), over="position"), "over='position': possible are"),
        (lambda: Compose(), "Compose needs at least one intervention"),
        (lambda: Compose(Head(0, 0)), "Compose takes interventions, got Head(0, 0)"),
        (lambda: Grid(lambda: ZeroAblate(Head(0, 0))), "a grid needs at least one axis, such as layer=model.layers"),
        (lambda: Grid(lambda x: ZeroAblate(Head(0, 0)), x=[]), "axis 'x' of the grid is empty"),
        (lambda: Grid(lambda x: ZeroAblate(Head(0, 0)), x=[1, 1]), "axis 'x' of the grid has equal values"),
        (lambda: Grid(lambda x: ZeroAblate(Head(0, 0)), x=[0.5, float("nan")]), "axis 'x' of the grid has nan"),
        (lambda: Grid(lambda where: ZeroAblate(where), layer=[0]), "by name, layer: this one takes where"),
        (lambda: PathPatch("L0H3", "L1H2.k", "L1H0.k"), "source='L1H0.k' is a site, not the name of a run"),
        (lambda: Grid(lambda run: ZeroAblate(Head(0, 0)), run=["a"]), "a grid axis cannot be called 'run'"),
        (
            lambda: Grid(lambda method: ZeroAblate(Head(0, 0)), method=["a"]),
            "xarray's sel(method=...) means something else",
        ),
        (lambda: Grid(lambda x: Head(0, x), x=[1]), "a grid is made of interventions, got Head(0, 1)"),
        (lambda: from_json("{"), "this is not JSON"),
        (lambda: from_json(None), "this is not JSON"),
        (lambda: from_json("{}"), 'this JSON has no "type"'),
        (lambda: Head(0, 0).z.at(slice(2, 5)), "positions must be whole numbers, such as range(25, 50)"),
        (lambda: Compose([ZeroAblate(Head(0, 0))]), "of a list, write Compose(*list)"),
        (lambda: from_json('{"type": "Head", "layer": 1}'), "JSON of a Head has missing or unknown fields (layer)"),
        (lambda: Head.parse(5), "cannot read 5 as a head"),
        (lambda: Head(0, 0).z.at(2.0), "positions must be whole numbers"),
        (lambda: MeanAblate(Head(0, 0), over=3), "over=3: possible are"),
        (lambda: ResampleAblate(Head(0, 0), seed=-1), "a seed must be 0 or more, got -1"),
        (lambda: ResampleAblate(Head(0, 0), seed=1.7), "a seed must be a whole number, got 1.7"),
        (lambda: Patch(Head(0, 0), source=None), "source=None: give the name of a run, such as 'corrupted'"),
        (lambda: Grid(3, layer=[0]), "a grid takes a function of its axes, such as a lambda, got 3"),
        (lambda: Grid(lambda x: ZeroAblate(Head(0, 0)), x=3), "axis 'x' of the grid needs several values, got 3"),
        (lambda: Grid(lambda x: ZeroAblate(Head(0, 0)), x=[0, "a"]), "takes numbers, or text, got (0, 'a')"),
    ],
)
def test_wrong_declarations_say_what_is_possible(make, message):
    with pytest.raises((DeclarationError, UnknownNameError)) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_component_lists_the_known_ones():
    with pytest.raises(UnknownNameError) as caught:
        Head(0, 0).site("out")
    assert str(caught.value) == (
        "unknown component 'out': possible are embed, pos_embed, resid_pre, attn_in, q, k, v, q_rot, k_rot, "
        "pattern, z, head_out, attn_out, resid_mid, mlp_in, mlp_pre, mlp_post, mlp_out and resid_post"
    )


def test_unknown_type_in_json_is_refused():
    with pytest.raises(UnknownNameError, match="unknown type 'system' in JSON"):
        from_json('{"type": "system", "command": "true"}')


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ZeroAblate(Head(1, 2)), MeanAblate(Head(1, 2))),
        (ZeroAblate(Head(1, 2)), MeanAblate(Layer(1).z)),
        (ZeroAblate(Head(1, 2).k.at([3, 4])), Patch(Head(1, 2).k.at([4, 5]))),
        (ZeroAblate(Layer(0).resid_mid), Patch(Layer(0).resid_mid.at(3))),
        (ZeroAblate(Neuron(0, 3)), Patch(Layer(0).mlp_post.at(3))),
    ],
)
def test_two_edits_of_one_place_are_refused_and_both_named(first, second):
    with pytest.raises(DeclarationError) as caught:
        first + second
    assert repr(first) in str(caught.value)
    assert repr(second) in str(caught.value)


def test_edits_that_do_not_meet_compose():
    assert len((ZeroAblate(Head(1, 2).k) + ZeroAblate(Head(1, 2).v)).edits()) == 2
    assert len((ZeroAblate(Head(1, 2).k.at(3)) + Patch(Head(1, 2).k.at(4))).edits()) == 2
    assert len((ZeroAblate(Head(1, 2)) + ZeroAblate(Head(0, 2))).edits()) == 2
