"""Lines of the family repeat, and channels that are repeated."""

import numpy as np
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, ints, label
from graph.small import analysis_of, graph, initializer, operators, parse, slim_and_verify, weights

LINES: list[Line] = [
    ("Tile", ("x", ints(1, 2, 1, 1)), {}),
    ("Tile", ("x", ints(1, 1, 2, 3)), {}),
    ("Tile", ("x", ints(2, 3, 1, 2)), {}),
    ("Tile", ("x", ints(1, 2)), {"spatial": (), "opset": 9}),
    ("Tile", ("x", ints(1, 1, 1, 1)), {"batch": 2, "opset": 13}),
    ("Expand", ("x", ints(1, 6, 6, 6)), {"spatial": (1, 1)}),
    ("Expand", ("x", ints(1, 1, 4)), {"spatial": (6, 1)}),
    ("Expand", ("x", ints(2, 1, 6, 6, 6)), {"batch": 2}),
    ("Expand", ("x", ints(3, 1, 1, 1, 1)), {}),
    ("Expand", ("x", ints(2, 6)), {"spatial": (), "batch": 1, "opset": 9}),
]

TESTED_BY_OTHER_MEANS = {"ConstantOfShape"}


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


@pytest.mark.parametrize("op", ["Expand", "Tile"])
def test_a_map_that_becomes_several_channels_is_kept_once(op: str) -> None:
    """A gate of one channel, spread over the channels before they are multiplied; a wider one than is read."""
    constants = {"w": weights(1, 3, 1, 1), "how": ints(1, 4, 1, 1), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node(op, ["a", "how"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6]}))
    assert slimmed.analysis.keep.kept["b", 1].sum() == 1
    assert "Expand" not in operators(slimmed.model)
    assert initializer(slimmed.model, "v").shape == (2, 1, 1, 1)


@pytest.mark.parametrize("read", [(0, 1, 2, 3, 4, 5), (0, 4), (3, 4, 5)])
def test_blocks_of_equal_channels_are_read_once(read: tuple[int, ...]) -> None:
    constants = {"w": weights(3, 3, 1, 1), "how": ints(1, 2, 1, 1), "v": weights(2, 6, 1, 1)}
    constants["v"][:, [k for k in range(6) if k not in read]] = 0
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Tile", ["a", "how"], ["b"]), node("Conv", ["b", "v"], ["y"])]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6]}))
    assert slimmed.analysis.keep.kept["b", 1].sum() == len({k % 3 for k in read})


def test_an_expand_to_a_computed_shape_keeps_the_channels_that_it_may_hold() -> None:
    model = parse(
        "agraph (float[N,3,1,1] x, int64[4] how) => (float[N,2,I,J] y)"
        "{ a = Conv(x, w) b = Expand(a, how) y = Conv(b, v) }",
        w=weights(4, 3, 1, 1, zero=(1,)),
        v=weights(2, 4, 1, 1),
    )
    assert analysis_of(model).keep.removed == 0


def test_an_axis_that_two_values_gain_in_other_places_makes_other_functions() -> None:
    """The difference of all pairs is not zero, though both sides are the same channel."""
    constants = {"w": weights(4, 3, 1, 1), "first": ints(0), "second": ints(1), "how": ints(2, 2, 4, 6, 6)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Unsqueeze", ["a", "first"], ["p"]),
        node("Unsqueeze", ["a", "second"], ["q"]),
        node("Expand", ["p", "how"], ["pe"]),
        node("Expand", ["q", "how"], ["qe"]),
        node("Sub", ["pe", "qe"], ["y"]),
    ]
    model = graph(nodes, constants, {"x": [2, 3, 6, 6]}, {"y": [2, 2, 4, 6, 6]})
    facts = analysis_of(model).known.view.facts
    assert not facts["y"].constant.any()


STATED = {
    "ConstantOfShape": "z = ConstantOfShape (sizes)",
    "ConstantOfShape with a value": "z = ConstantOfShape <value: tensor = float[1] {0.0}> (sizes)",
    "Expand of a constant": "z = Expand (nothing, sizes)",
    "Tile of a constant": "z = Tile (nothing, times)",
}


@pytest.mark.parametrize("how", STATED)
def test_zeros_of_a_size_that_is_computed_are_known(how: str) -> None:
    """The zeros that widen a shortcut, in a batch of any size: what is added to them alone can be dead."""
    model = parse(
        "agraph (float[N,3,6,6] x) => (float[N,2,6,6] y) {"
        "a = Conv(x, w) s = Shape <start: int = 0, end: int = 1> (x) sizes = Concat <axis: int = 0> (s, rest)"
        "times = Concat <axis: int = 0> (s, often)"
        + STATED[how]
        + "c = Concat <axis: int = 1> (a, z) b = Conv(x, u) d = Add(b, c) r = Relu(d) y = Conv(r, v) }",
        **{
            "w": weights(4, 3, 1, 1, zero=(1,)),
            "u": weights(8, 3, 1, 1, seed=1, zero=(1, 4, 6)),
            "rest": ints(4, 6, 6),
            "often": ints(1, 6, 6),
        },
        **{"nothing": np.zeros((1, 4, 1, 1), np.float32), "v": weights(2, 8, 1, 1, seed=2)},
    )
    assert analysis_of(model).known.opaque == {}
    slimmed = slim_and_verify(model)
    live = slimmed.analysis.liveness.live["d"].ravel().tolist()
    assert live == [True, False, True, True, False, True, False, True]
    assert [row.after for row in slimmed.layers][:2] == [3, 5]


def test_a_constant_that_is_tiled_by_a_size_that_is_computed_is_known_by_channel() -> None:
    model = parse(
        "agraph (float[N,3,6,6] x) => (float[N,2,6,6] y) {"
        "a = Conv(x, w) s = Shape <start: int = 0, end: int = 1> (x) times = Concat <axis: int = 0> (s, often)"
        "z = Tile (pair, times) b = Mul(a, z) y = Conv(b, v) }",
        **{"w": weights(4, 3, 1, 1), "often": ints(2, 6, 6), "v": weights(2, 4, 1, 1)},
        pair=np.array([0, 3], np.float32).reshape(1, 2, 1, 1),
    )
    slimmed = slim_and_verify(model)
    assert [slimmed.removed_channels, slimmed.layers[0].after, slimmed.opaque] == [2, 2, {}]


def test_a_value_of_a_size_that_is_computed_is_known() -> None:
    model = parse(
        "agraph (float[N,3,6,6] x) => (float[N,2,6,6] y) {"
        "a = Conv(x, w) s = Shape(a) z = ConstantOfShape <value: tensor = float[1] {2.0}> (s)"
        "b = Mul(a, z) y = Conv(b, v) }",
        w=weights(4, 3, 1, 1, zero=(1,)),
        v=weights(2, 4, 1, 1),
    )
    assert slim_and_verify(model).removed_channels == 1


def test_a_constant_that_is_expanded_is_not_written_down_again() -> None:
    model = parse(
        "agraph (float[N,3,6,6] x) => (float[N,8,6,6] y) {"
        "a = Conv(x, w) s = Shape(a) z = Expand(map, s) y = Concat <axis: int = 1> (a, z) }",
        w=weights(4, 3, 1, 1),
        map=weights(1, 4, 1, 1, seed=1),
    )
    assert not analysis_of(model).changes
    assert operators(slim_and_verify(model).model)[-2:] == ["Expand", "Concat"]
