"""Lines of the family split, and the halves of a split that keep uneven counts."""

import onnx
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, ints, label
from graph.small import graph, initializer, operators, slim_and_verify, weights

LINES: list[Line] = [
    ("Split", ("x", ints(3, 3)), {"axis": 1, "outputs": 2}),
    ("Split", ("x", ints(1, 4, 1)), {"axis": -3, "outputs": 3}),
    ("Split", ("x", ints(4, 2)), {"axis": 1, "outputs": 2, "spatial": ()}),
    ("Split", ("x",), {"axis": 1, "outputs": 4, "num_outputs": 4, "opset": 18, "channels": 7}),
    ("Split", ("x",), {"axis": 1, "outputs": 2, "num_outputs": 2, "opset": 23}),
    ("Split", ("x",), {"axis": 2, "outputs": 4, "num_outputs": 4, "spatial": (7, 5)}),
    ("Split", ("x",), {"axis": 1, "outputs": 3, "opset": 13}),
    ("Split", ("x",), {"axis": -1, "outputs": 2, "opset": 11}),
    ("Split", ("x",), {"axis": 1, "outputs": 2, "split": [2, 4], "opset": 9}),
    ("Split", ("x",), {"axis": 3, "outputs": 2, "split": [1, 5], "opset": 11}),
    ("Split", ("x", ints(1, 1)), {"axis": 0, "outputs": 2, "batch": 2}),
    ("Split", ("x",), {"axis": 1, "outputs": 6, "opset": 12}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


IMAGE = ["N", 3, 6, 6]


def c2f(zero: tuple[int, ...], opset: int = 18, **how: object) -> onnx.ModelProto:
    """Return YOLOv8's C2f: one half passes, the other goes through a convolution; both and the result are joined."""
    constants = {
        "w": weights(8, 3, 1, 1, zero=zero),
        "m": weights(4, 4, 3, 3, zero=(2,), seed=1),
        "v": weights(3, 12, 1, 1, seed=2),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Split", ["a"], ["p", "q"], axis=1, **how),
        node("Conv", ["q", "m"], ["c"], pads=[1, 1, 1, 1]),
        node("Concat", ["p", "q", "c"], ["cat"], axis=1),
        node("Conv", ["cat", "v"], ["y"]),
    ]
    return graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 3, 6, 6]}, opset=opset)


@pytest.mark.parametrize(("opset", "how"), [(11, {}), (12, {"split": [4, 4]}), (13, {}), (18, {"num_outputs": 2})])
def test_the_halves_of_a_chunk_keep_uneven_counts(opset: int, how: dict[str, object]) -> None:
    slimmed = slim_and_verify(c2f(zero=(0, 1, 2, 5), opset=opset, **how))
    assert [row.after for row in slimmed.layers] == [4, 3, 3]
    split = next(item for item in slimmed.model.graph.node if item.op_type == "Split")
    if opset < 13:
        assert next(item.ints for item in split.attribute if item.name == "split") == [1, 3]
    else:
        assert initializer(slimmed.model, split.input[1]).tolist() == [1, 3]
        assert [item.name for item in split.attribute] == ["axis"]


def test_halves_that_keep_even_counts_need_no_sizes() -> None:
    slimmed = slim_and_verify(c2f(zero=(0, 5), num_outputs=2))
    split = next(item for item in slimmed.model.graph.node if item.op_type == "Split")
    assert len(split.input) == 1


def test_a_half_that_nobody_needs_goes_with_its_positions_and_its_size() -> None:
    constants = {"w": weights(9, 3, 1, 1), "sizes": ints(2, 3, 4), "u": weights(2, 2, 1, 1), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Split", ["a", "sizes"], ["p", "q", "r"], axis=1),
        node("Conv", ["p", "u"], ["y"]),
        node("Conv", ["r", "v"], ["z"]),
    ]
    outputs = {"y": ["N", 2, 6, 6], "z": ["N", 2, 6, 6]}
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, outputs))
    assert [row.after for row in slimmed.layers] == [6, 2, 2]
    assert initializer(slimmed.model, "sizes").tolist() == [2, 4]


def test_the_only_half_that_is_left_is_the_input_itself() -> None:
    constants = {"w": weights(8, 3, 1, 1), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Split", ["a"], ["p", "q"], axis=1, num_outputs=2),
        node("Conv", ["q", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert operators(slimmed.model) == ["Conv", "Conv"]
    assert slimmed.removed_channels == 4


@pytest.mark.parametrize("dead", [(4, 5, 6, 7), (0, 4), ()])
def test_what_another_reader_keeps_of_the_input_stays_in_it(dead: tuple[int, ...]) -> None:
    constants = {"w": weights(8, 3, 1, 1), "u": weights(2, 4, 1, 1), "v": weights(2, 4, 1, 1), "t": weights(2, 8, 1, 1)}
    constants["u"][:, 1] = 0
    constants["t"][:, dead] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Split", ["a"], ["p", "q"], axis=1, num_outputs=2),
        node("Conv", ["p", "u"], ["y"]),
        node("Conv", ["a", "t"], ["z"]),
    ]
    outputs = {"y": ["N", 2, 6, 6], "z": ["N", 2, 6, 6]}
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, outputs))
    assert slimmed.removed_channels == {4: 4, 2: 1, 0: 0}[len(dead)]


def test_a_half_of_one_channel_keeps_that_channel() -> None:
    constants = {"w": weights(4, 3, 1, 1), "sizes": ints(1, 3), "u": weights(2, 1, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Split", ["a", "sizes"], ["p", "q"], axis=1),
        node("Conv", ["p", "u"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert slimmed.removed_channels == 3
