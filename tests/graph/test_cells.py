"""Channels that are needed in some cells only, by some readers only, or for the sake of a range that all share."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.small import graph, slim_and_verify, weights


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def beside_a_dead_channel(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], **options: int) -> None:
    """Slim and verify a graph of ``x`` [N, 3] with a dead channel beside it, so that something is rewritten."""
    nodes = [*nodes, node("Gemm", ["beside", "dead"], ["d"], transB=1), node("Gemm", ["d", "reads"], ["od"], transB=1)]
    constants = constants | {"dead": weights(4, 3, seed=9, zero=(1,)), "reads": weights(2, 4, seed=8)}
    outputs = [name for one in nodes for name in one.output if name.startswith("o")]
    model = graph(nodes, constants, {"x": ["N", 3], "beside": ["N", 3]}, outputs, **options)
    assert slim_and_verify(model).removed_channels


def test_a_column_that_another_reader_wants_in_one_cell_is_not_read_in_the_others() -> None:
    rows, read = weights(6, 3, seed=1), weights(3, 2, seed=2)
    rows[2], rows[5], read[2] = rows[1], rows[4], -read[1]
    nodes = [
        node("Gemm", ["x", "w"], ["y"], transB=1),
        node("Reshape", ["y", "cells"], ["v"]),
        node("MatMul", ["v", "m"], ["o1"]),
        node("Slice", ["v", "zero", "one", "one"], ["o2"]),
        node("Slice", ["v", "ones", "twos", "both"], ["o3"]),
    ]
    constants = {"w": rows, "m": read, "cells": ints(-1, 2, 3), "zero": ints(0), "one": ints(1)}
    beside_a_dead_channel(nodes, constants | {"ones": ints(1, 1), "twos": ints(2, 2), "both": ints(1, 2)})


@pytest.mark.parametrize("op", ["Sum", "Mean", "L1", "L2", "Max", "Min", "SumSquare"])
def test_a_reduction_leaves_out_what_another_reader_wants_in_one_cell(op: str) -> None:
    first, second = weights(6, 3, seed=1), weights(6, 3, seed=3)
    second[[2, 5]] = first[[2, 5]]
    nodes = [
        node("Gemm", ["x", "w"], ["a"], transB=1),
        node("Gemm", ["x", "u"], ["b"], transB=1),
        node("Sub", ["a", "b"], ["y"]),
        node("Reshape", ["y", "cells"], ["v"]),
        node(f"Reduce{op}", ["v", "two"], ["o1"], keepdims=0),
        node("Slice", ["v", "zero", "one", "one"], ["o2"]),
        node("Slice", ["a", "five", "six", "one"], ["o3"]),
    ]
    constants = {"w": first, "u": second, "cells": ints(-1, 2, 3), "two": ints(2), "zero": ints(0), "one": ints(1)}
    beside_a_dead_channel(nodes, constants | {"five": ints(5), "six": ints(6)})


def test_the_range_of_a_quantised_value_is_that_of_channels_that_are_computed() -> None:
    """A channel that is 0 by cancellation, and kept for a tie's sake, must not hold what is left of it."""
    first, second = weights(4, 3, seed=1) * 0.01, weights(4, 3, seed=3) * 0.01
    first[3] *= 5000
    second[3] = first[3]
    factor = np.random.default_rng(5).integers(-100, 100, (4, 2)).astype(np.int8)
    nodes = [
        node("Gemm", ["x", "w"], ["a"], transB=1),
        node("Gemm", ["x", "u"], ["b"], transB=1),
        node("Sub", ["a", "b"], ["difference"]),
        node("DynamicQuantizeLinear", ["difference"], ["q", "scale", "point"]),
        node("MatMulInteger", ["q", "m", "point"], ["i"]),
        node("Cast", ["i"], ["c"], to=1),
        node("Mul", ["c", "scale"], ["o1"]),
        node("Slice", ["a", "three", "four", "one"], ["o2"]),
        node("Reshape", ["difference", "cells"], ["r"]),
        node("Slice", ["r", "one", "two", "one"], ["s"]),
        node("ReduceSum", ["s", "two"], ["o3"], keepdims=0),
    ]
    constants = {"w": first, "u": second, "m": factor, "cells": ints(-1, 2, 2), "one": ints(1), "two": ints(2)}
    beside_a_dead_channel(nodes, constants | {"three": ints(3), "four": ints(4)})


NOT_FINITE = {
    "ReduceLogSum": (["a", "space"], {"keepdims": 1}),
    "MeanVarianceNormalization": (["a"], {"axes": [2, 3]}),
    "LayerNormalization": (["a", "six"], {"axis": -1, "epsilon": 0.0}),
    "InstanceNormalization": (["a", "four", "four"], {"epsilon": 0.0}),
}


@pytest.mark.parametrize("op", NOT_FINITE)
def test_a_dead_channel_that_stays_for_its_group_becomes_no_nan(op: str) -> None:
    """Zero filters would give log 0 or 0 / 0, which no zero weight behind it silences."""
    names, attributes = NOT_FINITE[op]
    read = weights(2, 2, 1, 1, seed=4)
    read[1, 1] = 0
    nodes = [
        node("Conv", ["image", "w"], ["c"]),
        node("Abs", ["c"], ["a"]),
        node(op, names, ["n"], **attributes),
        node("Conv", ["n", "g"], ["y"], group=2),
        node("Conv", ["image", "dead"], ["d"]),
        node("Conv", ["d", "reads"], ["z"]),
    ]
    constants = {"w": weights(4, 3, 1, 1, seed=1), "g": read, "space": ints(2, 3)}
    constants |= {"six": np.ones(6, np.float32), "four": np.ones(4, np.float32)}
    constants |= {"dead": weights(4, 3, 1, 1, zero=(1,)), "reads": weights(2, 4, 1, 1)}
    used = {name for one in nodes for name in one.input}
    constants = {name: array for name, array in constants.items() if name in used}
    slim_and_verify(graph(nodes, constants, {"image": ["N", 3, 6, 6]}, ["y", "z"]))


def test_a_shrink_below_a_negative_edge_is_not_odd() -> None:
    rows = weights(4, 3, seed=1)
    rows[1] = -rows[0]
    nodes = [
        node("Gemm", ["x", "w"], ["a"], transB=1),
        node("Shrink", ["a"], ["s"], bias=0.5, lambd=-1.0),
        node("MatMul", ["s", "m"], ["o1"]),
    ]
    beside_a_dead_channel(nodes, {"w": rows, "m": weights(4, 2)})


def test_a_quantised_bfloat16_is_rounded_like_any_other() -> None:
    nodes = [
        node("Conv", ["image", "w"], ["a"]),
        node("Cast", ["a"], ["b"], to=onnx.TensorProto.BFLOAT16),
        node("QuantizeLinear", ["b", "scale", "point"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "point"], ["d"]),
        node("Cast", ["d"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    constants = {"w": weights(4, 3, 1, 1, zero=(1,)), "point": np.array(0, np.int8)}
    constants |= {"scale": np.array(0.1, ml_dtypes.bfloat16)}
    slim_and_verify(graph(nodes, constants, {"image": ["N", 3, 4, 4]}, ["y"], opset=21))
