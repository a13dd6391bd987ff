"""Lines of the family mixing: softmax and its kin, running sums, and choices along an axis."""

import numpy as np
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, ints, label
from graph.small import analysis_of, graph, kept, slim_and_verify, weights

NO = {"removes": False}
SOFT = ("Softmax", "LogSoftmax", "Hardmax")
ARG = ("ArgMax", "ArgMin")

LINES: list[Line] = [
    *((op, ("x",), {}) for op in SOFT),
    *((op, ("z",), {"axis": 2, "opset": 13}) for op in SOFT),
    *((op, ("x",), {"axis": -2, "batch": 2}) for op in SOFT),
    *((op, ("x",), {"axis": 0}) for op in SOFT),
    *((op, ("x",), {"axis": 1, **NO}) for op in SOFT),
    *((op, ("z",), {"axis": -1, "spatial": (), **NO}) for op in SOFT),
    # Before opset 13 the axis and all behind it are one.
    *((op, ("x",), {"axis": 2, "opset": 11}) for op in SOFT),
    *((op, ("x",), {"axis": -1, "opset": 12}) for op in SOFT),
    *((op, ("x",), {"opset": 9, **NO}) for op in SOFT),
    *((op, ("z",), {"axis": 0, "opset": 11, "batch": 2, **NO}) for op in SOFT),
    ("CumSum", ("x", ints(2)), {}),
    ("CumSum", ("x", np.int64(-1)), {"exclusive": 1, "reverse": 1}),
    ("CumSum", ("x", ints(0)), {"opset": 11}),
    ("CumSum", ("x", ints(1)), NO),
    ("CumSum", ("z", ints(-3)), {"reverse": 1, **NO}),
    *((op, ("x",), {"axis": 2}) for op in ARG),
    *((op, ("z",), {"axis": -1, "keepdims": 0, "select_last_index": 1}) for op in ARG),
    *((op, ("x",), {"opset": 11}) for op in ARG),
    *((op, ("x",), {"axis": 1, **NO}) for op in ARG),
    *((op, ("z",), {"axis": -3, "keepdims": 0, "opset": 12, **NO}) for op in ARG),
    ("TopK", ("x", ints(2)), {"outputs": 2}),
    ("TopK", ("x", ints(3)), {"outputs": 2, "axis": 2, "largest": 0, "opset": 11}),
    ("TopK", ("x", ints(2)), {"outputs": 2, "axis": -2, "opset": 10}),
    ("TopK", ("x",), {"outputs": 2, "k": 2, "opset": 9}),
    ("TopK", ("x", ints(2)), {"outputs": 2, "axis": 1, **NO}),
    ("TopK", ("z", ints(6)), {"outputs": 2, "axis": 1, "sorted": 0, "spatial": (), **NO}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


def test_a_softmax_over_space_of_a_constant_channel_is_one_share_of_each() -> None:
    nodes = [node("Conv", ["x", "w", "b"], ["a"]), node("Softmax", ["a"], ["y"], axis=3)]
    constants = {"w": weights(2, 3, 1, 1, zero=(1,)), "b": np.array([0, 3.5], np.float32)}
    for width, constant in ((8, True), ("W", False)):
        model = graph(nodes, constants, {"x": ["N", 3, 4, width]}, ["y"])
        fact = analysis_of(model).known.view.facts["y"]
        assert fact.constant.ravel().tolist() == [False, constant]
        assert not constant or fact.shift.ravel()[1] == 0.125


def test_places_of_the_largest_may_be_read_alone() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("TopK", ["a", "k"], ["values", "places"], axis=3),
        node("Gather", ["places", "first"], ["y"], axis=1),
    ]
    constants = {"w": weights(4, 3, 1, 1), "k": ints(2), "first": ints(0, 2)}
    model = graph(nodes, constants, {"x": ["N", 3, 6, 6]}, ["y"])
    assert kept(model, "a") == [True, False, True, False]
    slim_and_verify(model)


@pytest.mark.parametrize(
    ("op", "constants", "reason"),
    [("TopK", {}, "its k is computed"), ("CumSum", {}, "its axis is computed")],
)
def test_computed_parameters_are_a_reason_to_decline(op: str, constants: dict[str, np.ndarray], reason: str) -> None:
    nodes = [
        node("ReduceMax", ["x"], ["most"], keepdims=0),
        node("Cast", ["most"], ["whole"], to=7),
        node("Reshape", ["whole", "one"], ["p"]),
        node(op, ["x", "p"], ["y", "places"] if op == "TopK" else ["y"]),
    ]
    model = graph(nodes, {"one": ints(1)} | constants, {"x": ["N", 3]}, {"y": [None, None]})
    assert reason in analysis_of(model).known.opaque.values()
