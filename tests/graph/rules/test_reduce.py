"""Lines of the family reduce, and what it puts back for channels that a reduction over channels can do without."""

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, ints, label
from graph.small import analysis_of, graph, kept, operators, slim_and_verify

OVER = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
EVERY = [f"Reduce{name}" for name in OVER if name != "LogSum"]

LINES: list[Line] = [
    *((op, ("x", ints(2, 3)), {}) for op in EVERY),
    *((op, ("x", ints(2, 3)), {"keepdims": 0}) for op in EVERY),
    *((op, ("x", ints(-1)), {"keepdims": 0, "batch": 2}) for op in EVERY),
    *((op, ("x", ints(0)), {"keepdims": 0}) for op in EVERY),  # of unknown size
    *((op, ("x", ints(0, -1)), {"batch": 2}) for op in EVERY),
    *((op, ("x",), {"axes": [2, -1], "keepdims": 0, "opset": 11}) for op in EVERY),
    *((op, ("x",), {"axes": [3], "opset": 9}) for op in EVERY),
    ("ReduceSum", ("x", ints(2)), {"opset": 13}),
    ("ReduceMean", ("x",), {"axes": [2, -1], "keepdims": 0, "opset": 13}),
    ("ReduceMax", ("x", ints(3)), {"opset": 20}),
    # A channel that is 0 has no finite logarithm.
    ("ReduceLogSum", ("x", ints(2, 3)), {"opaque": True, "removes": False}),
    # Over channels: what can be put back goes (x: plain, 0, 0.7, as the first, twice that and 0.5, plain).
    *((op, ("x", ints(1)), {"removes": op not in ("ReduceLogSumExp", "ReduceProd")}) for op in EVERY),
    *((op, ("z", ints(1)), {"removes": op not in ("ReduceLogSumExp",)}) for op in EVERY),
    *((op, ("z", ints(-3)), {"keepdims": 0, "removes": op != "ReduceLogSumExp"}) for op in EVERY),
    *((op, ("z", ints(1, 2)), {"keepdims": 0, "removes": op != "ReduceLogSumExp"}) for op in EVERY),
    *((op, ("z", ints(3, 1)), {"batch": 2, "removes": op != "ReduceLogSumExp"}) for op in EVERY),
    *((op, ("z",), {"axes": [1], "opset": 9, "removes": op != "ReduceLogSumExp"}) for op in EVERY),
    *((op, ("z",), {"batch": 2, "spatial": (), "removes": op != "ReduceLogSumExp"}) for op in EVERY),
    ("ReduceSum", ("z", ints(1)), {"spatial": ()}),
    ("ReduceMean", ("x",), {"noop_with_empty_axes": 1}),
    ("ReduceSum", ("x",), {"noop_with_empty_axes": 1}),
    ("ReduceMax", ("x", ints()), {"noop_with_empty_axes": 1}),
    # Runtimes differ in whether this is the magnitude or nothing at all.
    ("ReduceL1", ("x",), {"noop_with_empty_axes": 1, "opaque": True, "removes": False}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


def reduced(op: str, bias: list[float], plain: list[int], *, axes: tuple[int, ...] = (1,), **options: Any) -> Any:
    """Return Conv -> reduction -> Mul with the Conv's own input: channels not in ``plain`` hold their bias."""
    size = options.pop("size", "H")
    weight = np.random.default_rng(0).standard_normal((len(bias), 3, 1, 1)).astype(np.float32)
    weight[[k for k in range(len(bias)) if k not in plain]] = 0
    nodes = [node("Conv", ["x", "w", "b"], ["a"])]
    source = "a"
    if op == "ReduceLogSum":
        nodes.append(node("Relu", ["a"], ["positive"]))
        source = "positive"
    nodes += [node(op, [source, "axes"], ["r"], **options), node("Mul", ["r", "two"], ["y"])]
    constants = {"w": weight, "b": np.array(bias, np.float32), "axes": ints(*axes), "two": np.float32(2)}
    return graph(nodes, constants, {"x": ["N", 3, size, size]}, ["y"])


MIXES = {
    "zeros": ([0.3, 0, 0, 0.1, 0], [0, 3]),
    "constants": ([0.3, 2.5, -1, 0.1, 0], [0, 3]),
    "one is left": ([0.5, 1, 2, 0.7], [2]),
    "above all": ([0, 9, 0.2], [0, 2]),
    "below all": ([0, -9, 0.2], [0, 2]),
    "ones": ([0, 1, 1, 0.2], [0, 3]),
    "none": ([0.1, 0.2, 0.3], [0, 1, 2]),
}
FREE = {
    "zeros": {"Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare", "LogSum"},
    "constants": {"Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare", "LogSum"},
    "one is left": {"Sum", "Mean", "Max", "Min", "L1", "SumSquare", "Prod"},
    "above all": {"Sum", "Mean", "Max", "Min", "L1", "SumSquare"},
    "below all": {"Sum", "Mean", "Max", "Min", "L1", "SumSquare", "LogSum"},
    "ones": {"Sum", "Mean", "Max", "Min", "L1", "SumSquare", "Prod"},
    "none": set(),
}


@pytest.mark.parametrize(("name", "mix"), list(product(OVER, MIXES)))
def test_reduction_over_channels_lets_constants_go_and_puts_them_back(name: str, mix: str) -> None:
    slimmed = slim_and_verify(reduced(f"Reduce{name}", *MIXES[mix]))
    assert (slimmed.analysis.keep.removed > 0) == (name in FREE[mix])


@pytest.mark.parametrize(("name", "size"), list(product(OVER, (4, "H"))))
def test_reduction_over_channels_and_space_needs_to_know_how_many_constants_there_are(name: str, size: Any) -> None:
    bias, plain = MIXES["above all"]
    slimmed = slim_and_verify(reduced(f"Reduce{name}", bias, plain, axes=(1, -1), keepdims=0, size=size))
    free = {"Sum", "Mean", "Max", "Min", "L1", "SumSquare"} if size == 4 else {"Mean", "Max", "Min"}
    assert (slimmed.analysis.keep.removed > 0) == (name in free)


def test_a_mean_over_channels_keeps_the_share_of_those_that_stay() -> None:
    slimmed = slim_and_verify(reduced("ReduceMean", *MIXES["constants"]))
    assert operators(slimmed.model) == ["Conv", "ReduceMean", "Mul", "Add", "Mul"]
    assert kept(reduced("ReduceMean", *MIXES["constants"]), "a") == [True, False, False, True, False]


def test_zeros_leave_a_mean_with_its_factor_only_and_a_sum_with_nothing() -> None:
    assert operators(slim_and_verify(reduced("ReduceMean", *MIXES["zeros"])).model) == [
        "Conv",
        "ReduceMean",
        "Mul",
        "Mul",
    ]
    assert operators(slim_and_verify(reduced("ReduceSum", *MIXES["zeros"])).model) == ["Conv", "ReduceSum", "Mul"]


def test_a_maximum_of_equal_channels_needs_one_of_them() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32)
    weight[2] = weight[0]
    nodes = [node("Conv", ["x", "w"], ["a"]), node("ReduceMax", ["a", "axes"], ["y"])]
    model = graph(nodes, {"w": weight, "axes": ints(1)}, {"x": ["N", 3, "H", "W"]}, ["y"])
    assert kept(model, "a") == [True, True, False, True]
    assert operators(slim_and_verify(model).model) == ["Conv", "ReduceMax"]


def _rounded_up() -> onnx.ModelProto:
    """Return a mean over the channels of a grouped convolution, which keeps equal numbers in its groups."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((8, 3, 1, 1)).astype(np.float32)
    weight[[0, 1, 4]] = 0
    bias = np.array([2, 3, 0, 0, 0, 0, 0, 0], np.float32)
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]),
        node("ReduceMean", ["a", "axes"], ["mean"]),
        node("ReduceMax", ["a", "axes"], ["top"]),
        node("Conv", ["a", "v"], ["c"], group=2),
        node("Add", ["mean", "top"], ["s"]),
        node("Mul", ["c", "s"], ["y"]),
    ]
    constants = {"w": weight, "b": bias, "v": random.standard_normal((2, 4, 1, 1)).astype(np.float32), "axes": ints(1)}
    return graph(nodes, constants, {"x": ["N", 3, 5, 5]}, ["y"])


def test_channels_that_stay_for_another_readers_sake_are_not_reduced() -> None:
    slimmed = slim_and_verify(_rounded_up())
    assert sum(kept(_rounded_up(), "a")) == 6  # three of the second group, so three of the first
    assert operators(slimmed.model).count("Gather") == 2


def test_cbam_drops_its_zero_channels_through_mean_and_max_over_channels() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((6, 3, 1, 1)).astype(np.float32)
    weight[[1, 4]] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("ReduceMean", ["a", "axes"], ["mean"]),
        node("ReduceMax", ["a", "axes"], ["top"]),
        node("Concat", ["mean", "top"], ["both"], axis=1),
        node("Conv", ["both", "k"], ["map"], pads=[1] * 4),
        node("Sigmoid", ["map"], ["gate"]),
        node("Mul", ["a", "gate"], ["m"]),
        node("Conv", ["m", "v"], ["y"]),
    ]
    constants = {"w": weight, "axes": ints(1)} | {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in {"k": (1, 2, 3, 3), "v": (2, 6, 1, 1)}.items()
    }
    model = graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, ["y"])
    assert kept(model, "a") == [True, False, True, True, False, True]
    slim_and_verify(model)


def test_a_reduction_over_two_axes_with_positions_keeps_them_all() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 3, 1, 1)).astype(np.float32)
    weight[2] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "shape"], ["r"]),
        node("ReduceSum", ["r", "axes"], ["y"]),
    ]
    constants = {"w": weight, "shape": ints(0, 2, 3, 16), "axes": ints(1, 2)}
    model = graph(nodes, constants, {"x": ["N", 3, 4, 4]}, ["y"])
    assert kept(model, "a") == [True] * 6
    slim_and_verify(model)


def test_a_reduction_within_groups_of_channels_may_lose_a_place_of_every_group() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 3, 1, 1)).astype(np.float32)
    weight[[1, 4]] = 0
    bias = np.array([0, 0.5, 0, 0, 0, 0], np.float32)
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]),
        node("Reshape", ["a", "shape"], ["r"]),
        node("ReduceMean", ["r", "axes"], ["m"], keepdims=0),
        node("Conv", ["m", "v"], ["y"]),
    ]
    constants = {"w": weight, "b": bias, "shape": ints(0, 2, 3, 16), "axes": ints(2)}
    constants["v"] = np.random.default_rng(1).standard_normal((3, 2, 1)).astype(np.float32)
    model = graph(nodes, constants, {"x": ["N", 3, 4, 4]}, ["y"])
    assert kept(model, "a") == [True, False, True, True, False, True]
    slim_and_verify(model)


def test_computed_axes_are_a_reason_to_decline() -> None:
    nodes = [node("Shape", ["x"], ["s"], start=0, end=1), node("ReduceSum", ["x", "s"], ["y"])]
    model = graph(nodes, {}, {"x": ["N", 3, 4, 4]}, {"y": [None, None, None, None]})
    assert "its axes are computed" in analysis_of(model).known.opaque.values()
