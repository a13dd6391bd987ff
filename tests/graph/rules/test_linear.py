"""Lines of the family linear."""

import numpy as np
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, dense, f32, label, planted
from graph.small import graph, slim_and_verify, weights

SQUARE = planted(6, 6, 3, 3)


def columns_planted(*shape: int) -> np.ndarray:
    """Weights of a transposed convolution with an output that reads nothing, and one that repeats."""
    array = dense(*shape)
    if shape[1] > 3:
        array[:, 1], array[:, 3] = 0, array[:, 0]
    else:
        array[:, 1] = 0
    return array


LINES: list[Line] = [
    ("Conv", ("x", SQUARE), {}),
    ("Conv", ("x", SQUARE, dense(6)), {"pads": [1] * 4}),
    ("Conv", ("x", SQUARE, dense(6)), {"strides": [2, 1]}),
    ("Conv", ("x", SQUARE), {"dilations": [2, 2]}),
    ("Conv", ("x", SQUARE), {"pads": [0, 1, 2, 0]}),
    ("Conv", ("x", SQUARE), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", ("x", SQUARE), {"auto_pad": "SAME_LOWER"}),
    ("Conv", ("x", SQUARE), {"auto_pad": "VALID"}),
    ("Conv", ("x", planted(4, 3, 3, 3), dense(4)), {"group": 2}),
    ("Conv", ("x", planted(4, 3, 3, 3)), {"group": 2, "pads": [1] * 4}),
    ("Conv", ("x", planted(6, 2, 1, 1)), {"group": 3}),
    ("Conv", ("x", planted(6, 1, 3, 3), dense(6)), {"group": 6}),
    ("Conv", ("x", planted(6, 1, 3, 3)), {"group": 6, "pads": [1] * 4}),
    ("Conv", ("x", planted(12, 1, 3, 3), dense(12)), {"group": 6}),
    ("Conv", ("x", planted(12, 1, 3, 3)), {"group": 6, "pads": [1] * 4}),
    ("Conv", ("x", planted(5, 6, 3)), {"spatial": (7,), "pads": [1, 1]}),
    ("Conv", ("x", planted(5, 6, 2, 2, 2), dense(5)), {"spatial": (3, 4, 3)}),
    ("Conv", ("x", planted(5, 6, 1, 1), dense(5)), {"batch": 2}),
    ("Conv", ("x", np.full((2, 6, 1, 1), np.inf, f32)), {"opaque": True, "removes": False}),
    ("Gemm", ("x", dense(6, 4)), {"spatial": ()}),
    ("Gemm", ("x", planted(4, 6), dense(4)), {"spatial": (), "transB": 1}),
    ("Gemm", ("x", planted(4, 6), dense(1, 4)), {"spatial": (), "transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", ("x", planted(4, 6), dense(1)), {"spatial": (), "transB": 1}),
    ("Gemm", ("x", planted(4, 6), f32(0.3)), {"spatial": (), "transB": 1}),
    ("Gemm", ("x", planted(4, 6)), {"spatial": (), "transB": 1, "alpha": -2.0}),
    ("Gemm", ("x", dense(2, 4)), {"spatial": (), "transA": 1, "batch": 2}),
    ("Gemm", ("x", planted(4, 2), dense(4)), {"spatial": (), "transA": 1, "transB": 1, "batch": 2, "alpha": 0.5}),
    (
        "Gemm",
        ("x", planted(4, 6), dense(2, 4)),
        {"spatial": (), "transB": 1, "batch": 2, "opaque": True, "removes": False},
    ),
    ("Gemm", ("x", planted(6, 6), "x"), {"spatial": (), "transB": 1, "opaque": True, "removes": False}),
    ("Gemm", (planted(5, 6), "x"), {"spatial": (), "transB": 1}),
    ("Gemm", (planted(5, 6), "x", dense(5, 1)), {"spatial": (), "transB": 1, "alpha": 0.5, "beta": -1.0}),
    ("Gemm", (planted(6, 5), "x", f32(0.5)), {"spatial": (), "transA": 1, "transB": 1}),
    ("Gemm", (planted(5, 2), "x"), {"spatial": (), "batch": 2}),
    ("Gemm", (planted(5, 2).T, "x", dense(1, 1)), {"spatial": (), "batch": 2, "transA": 1}),
    (
        "Gemm",
        (planted(5, 6), "x", dense(2)),
        {"spatial": (), "transB": 1, "batch": 2, "opaque": True, "removes": False},
    ),
    ("MatMul", ("x", planted(4, 6).T), {"spatial": ()}),
    ("MatMul", ("x", dense(6, 4)), {}),
    ("MatMul", ("x", np.zeros((6, 4), f32)), {}),
    ("MatMul", ("x", dense(6)), {"removes": False}),
    ("MatMul", ("x", planted(4, 6).T[None, None]), {"spatial": ()}),
    ("MatMul", ("x", dense(1, 6, 4)), {}),
    ("MatMul", ("x", dense(6, 6, 4)), {"opaque": True, "removes": False}),
    ("MatMul", (dense(5, 6), "x"), {}),
    ("MatMul", (dense(6), "x"), {"spatial": (4,)}),
    ("MatMul", (dense(1, 5, 6), "x"), {"spatial": (4,)}),
    ("MatMul", (dense(5, 2), "x"), {"spatial": (), "batch": 2}),
    ("MatMul", (dense(4, 6), "x"), {"spatial": (4,)}),
    ("ConvTranspose", ("x", planted(6, 5, 3, 3)), {}),
    ("ConvTranspose", ("x", planted(6, 5, 3, 3), dense(5)), {"strides": [2, 2]}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 3, 3), dense(5)), {"strides": [2, 1], "pads": [1] * 4}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 2, 2), dense(5)), {"strides": [2, 2]}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 2, 2)), {"strides": [3, 3], "output_padding": [1, 2]}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 3, 3)), {"strides": [2, 2], "output_shape": [12, 13]}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 3, 3)), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 3, 3)), {"dilations": [2, 2], "opset": 11}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 1, 1), dense(5)), {}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 1, 1), dense(5)), {"strides": [2, 2]}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 1, 1), dense(5)), {"output_padding": [0, 0], "pads": [1, 0, 0, 0]}),
    ("ConvTranspose", ("x", columns_planted(6, 2, 3, 3), dense(4)), {"group": 2, "strides": [2, 2]}),
    ("ConvTranspose", ("x", planted(6, 2, 1, 1), dense(6)), {"group": 3}),
    ("ConvTranspose", ("x", planted(6, 1, 3, 3), dense(6)), {"group": 6, "pads": [1] * 4}),
    ("ConvTranspose", ("x", planted(6, 2, 3, 3), dense(12)), {"group": 6}),
    ("ConvTranspose", ("x", columns_planted(6, 5, 3)), {"spatial": (7,), "strides": [2]}),
    ("ConvTranspose", ("x", columns_planted(6, 4, 2, 2, 2), dense(4)), {"spatial": (3, 4, 3), "batch": 2}),
    ("ConvTranspose", ("x", np.full((6, 2, 1, 1), np.inf, f32)), {"opaque": True, "removes": False}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


@pytest.mark.parametrize(("kernel", "left"), [(1, 3), (3, 4)])
def test_same_padding_puts_nothing_around_a_kernel_of_one_tap(kernel: int, left: int) -> None:
    """So a nonzero constant folds into the bias whole, where a larger kernel needs one constant channel."""
    constants = {"w": weights(6, 3, 1, 1, zero=(1, 2, 4)), "b": np.arange(1, 7, dtype=np.float32)}
    constants |= {"v": weights(2, 6, kernel, kernel, seed=1)}
    nodes = [node("Conv", ["x", "w", "b"], ["a"]), node("Conv", ["a", "v"], ["y"], auto_pad="SAME_UPPER")]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, ["y"]))
    assert [row.after for row in slimmed.layers] == [left, 2]


def test_what_a_depthwise_row_makes_of_a_constant_is_in_its_bias() -> None:
    """Channel 1 is constant on one side of a sum and stays for the other's sake; its row reads nothing any more."""
    constants = {"w": weights(4, 3, 1, 1, zero=(1, 2)), "b": np.full(4, 3, f32), "u": weights(4, 3, 2, 2, zero=(2,))}
    constants |= {"v": weights(4, 1, 2, 2, seed=1), "c": weights(4, seed=2), "last": weights(2, 4, 1, 1, seed=3)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]),
        node("Conv", ["a", "v", "c"], ["d"], group=4),
        node("Conv", ["x", "u"], ["e"]),
        node("Add", ["d", "e"], ["s"]),
        node("Relu", ["s"], ["r"]),
        node("Conv", ["r", "last"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, ["y"]))
    assert [row.after for row in slimmed.layers] == [3, 3, 3, 2]
