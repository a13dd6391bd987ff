"""Lines of the family select, and what a selection leaves of its input."""

import numpy as np
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, f32, ints, label
from graph.small import analysis_of, graph, initializer, operators, parse, slim_and_verify, weights

LINES: list[Line] = [
    ("Pad", ("x", ints(0, 2, 0, 0, 0, 1, 0, 0)), {}),
    ("Pad", ("x", ints(0, 2, 0, 0, 0, 0, 0, 0), f32(0.7)), {}),
    ("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 0, 1)), {}),
    ("Pad", ("x", ints(0, 0, 1, 1, 0, 0, 1, 1), f32(0.7)), {}),
    ("Pad", ("x", ints(0, 1, 1, 1, 0, 1, 1, 1), f32(0.7)), {}),
    ("Pad", ("x", ints(0, 0, -1, 1, 0, 0, 0, -2)), {}),
    ("Pad", ("x", ints(1, 2, 0, 1), "", ints(1, -1)), {}),
    ("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 2, 1)), {"mode": "reflect"}),
    ("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 2, 1)), {"mode": "edge"}),
    ("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 2, 1)), {"mode": "wrap", "opset": 19}),
    ("Pad", ("x", ints(0, 1, 0, 0, 0, 0, 0, 0)), {"mode": "edge", "opaque": True, "removes": False}),
    ("Pad", ("x", ints(0, -1, 0, 0, 0, 0, 0, 0)), {"opaque": True, "removes": False}),
    ("Pad", ("x",), {"pads": [0, 1, 1, 0, 0, 2, 0, 1], "value": 0.7, "opset": 9}),
    ("Slice", ("x", ints(1), ints(5), ints(1)), {}),
    ("Slice", ("x", ints(0), ints(6), ints(1), ints(2)), {}),
    ("Slice", ("x", ints(-1), ints(-(2**31)), ints(1), ints(-1)), {}),
    ("Slice", ("x", ints(4), ints(0), ints(-3), ints(-2)), {}),
    ("Slice", ("x", ints(0, 1), ints(2**31, 5), ints(2, 3), ints(2, 3)), {}),
    ("Slice", ("x", ints(5, 0), ints(0, 2**31), ints(3, 1), ints(-2, 3)), {}),
    ("Slice", ("x", ints(0, 1, 0), ints(2**31, 5, 4)), {}),
    ("Slice", ("x",), {"starts": [1, 0], "ends": [-1, 3], "axes": [1, 3], "opset": 9}),
    ("Slice", ("x", ints(2), ints(3), ints(1)), {}),
    ("Slice", ("x",), {"starts": [0], "ends": [6], "axes": [1], "opset": 9}),
    ("Gather", ("x", ints(0, 3, 5)), {"axis": 1}),
    ("Gather", ("x", ints(5, -2, 0, 0, 3)), {"axis": 1}),
    ("Gather", ("x", ints(5, 4, 3, 2, 1, 0)), {"axis": -3}),
    ("Gather", ("x", np.int32(3)), {"axis": 1}),
    ("Gather", ("x", np.array([[0, 3], [1, -1], [4, 4]])), {"axis": 1}),
    ("Gather", ("x", np.array([[3]])), {"axis": 1}),
    ("Gather", ("x", np.array([1, 0], np.int32)), {"axis": 2}),
    ("Gather", ("x", np.int64(-1)), {"axis": 3}),
    ("Gather", ("x", np.array([[0, 1], [2, 3]])), {"axis": -1}),
    ("Gather", ("x", ints(1, 1, 0)), {"axis": 0, "batch": 2}),
    ("Gather", ("x", ints(2, 2, 4)), {"axis": 1, "spatial": (), "opset": 9}),
    ("Gather", ("x", ints(2, 3, 4, 5)), {"axis": 1, "spatial": (7,), "opset": 21}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


IMAGE = ["N", 3, 6, 6]


def selected(indices: np.ndarray, zero: tuple[int, ...] = (), read: tuple[int, ...] = ()) -> tuple[list, dict]:
    """Return the nodes and constants of: a convolution of 6 channels, a Gather, a convolution that reads some."""
    constants = {"w": weights(6, 3, 1, 1, zero=zero), "i": indices, "v": weights(2, indices.size, 1, 1, seed=1)}
    constants["v"][:, [k for k in range(indices.size) if k not in read]] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Gather", ["a", "i"], ["g"], axis=1),
        node("Conv", ["g", "v"], ["y"]),
    ]
    return nodes, constants


def test_a_channel_that_is_taken_twice_is_an_alias_and_is_taken_once() -> None:
    nodes, constants = selected(ints(4, 1, 4, -2), read=(0, 1, 2, 3))
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert [row.after for row in slimmed.layers] == [2, 2]
    assert initializer(slimmed.model, "i").tolist() == [1, 0]


def test_a_selection_of_all_that_is_left_in_order_goes() -> None:
    nodes, constants = selected(ints(0, 5, 2), read=(1,))
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert operators(slimmed.model) == ["Conv", "Conv"]


def test_a_scalar_index_is_renumbered_and_stays_a_scalar() -> None:
    constants = {"w": weights(6, 3, 1, 1, zero=(1, 2)), "i": np.array(3, np.int32), "u": weights(2, 6, 1, 1)}
    constants["u"][:, 5] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Gather", ["a", "i"], ["y"], axis=1),
        node("Conv", ["a", "u"], ["z"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 6, 6], "z": ["N", 2, 6, 6]}))
    index = initializer(slimmed.model, "i")
    assert (index.shape, index.dtype, int(index)) == ((), np.int32, 1)
    assert slimmed.removed_channels == 3


def test_computed_indices_along_a_map_leave_the_channels_alone() -> None:
    constants = {"w": weights(6, 3, 1, zero=(1, 2)), "one": ints(1), "k": ints(2), "v": weights(6, 2)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("ReduceMean", ["x", "mean"], ["m"], keepdims=0),
        node("TopK", ["m", "k"], ["values", "i"]),
        node("Gather", ["a", "i"], ["g"], axis=2),
        node("Transpose", ["g"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["t", "v"], ["y"]),
    ]
    constants["mean"] = ints(0, 1)
    del constants["one"]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 7]}, {"y": ["N", 2, 2]}))
    assert slimmed.removed_channels == 2


def test_a_slice_with_computed_bounds_passes_the_channels_on() -> None:
    model = parse(
        "agraph (float[N,3,7] x, int64[1] end, int64[1] other) => (float[N,6,L] y)"
        "<int64[1] s = {0}, int64[1] axes = {2}>"
        "{ a = Conv(x, w) c = Slice(a, s, end, axes) d = Slice(a, s, end, axes) e = Slice(a, s, other, axes)"
        "  y = Sum(c, d, e) }",
        w=weights(6, 3, 1, zero=(1, 2)),
    )
    facts = analysis_of(model).known.view.facts
    assert facts["c"].constant.ravel().tolist() == [False, True, True, False, False, False]
    assert (facts["c"].number == facts["d"].number).all()
    assert (facts["c"].number != facts["e"].number).ravel().tolist() == [True, False, False, True, True, True]


def test_a_slice_of_opset_9_has_no_steps() -> None:
    constants = {"w": weights(6, 3, 1, 1, zero=()), "v": weights(2, 6, 1, 1), "u": weights(2, 6, 1, 1)}
    constants["v"][:, [1, 3, 5]] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Slice", ["a"], ["s"], starts=[0], ends=[6], axes=[1]),
        node("Relu", ["s"], ["r"]),
        node("Conv", ["r", "v"], ["y"]),
        node("Conv", ["a", "u"], ["z"]),
    ]
    outputs = {"y": ["N", 2, 6, 6], "z": ["N", 2, 6, 6]}
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, outputs, opset=9))
    assert slimmed.analysis.keep.kept["s", 1].sum() == 3


def test_a_table_of_channels_loses_what_only_cells_read_that_are_gone() -> None:
    """Rows and columns go on their own: what is left of a cell is where both are."""
    constants = {"table": np.array([[0, 1, 2], [3, 4, 5]]), "w": weights(6, 3, 1, 1)}
    constants |= {"from": ints(0, 0), "to": ints(1, 2), "axes": ints(1, 2)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Gather", ["a", "table"], ["g"], axis=1),
        node("Relu", ["g"], ["r"]),
        node("Slice", ["r", "from", "to", "axes"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 4, 4]}, ["y"]))
    assert [row.after for row in slimmed.layers] == [2]
