"""Lines of the family sample, and maps that are read where another input says."""

import numpy as np
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, dense, f32, ints, label
from graph.small import graph, initializer, slim_and_verify, weights

GRID = (dense(2, 4, 5, 2) * 0.7).astype(f32)
REGIONS = np.array([[0, 0, 4, 4], [1, 1, 9, 7], [-3, 0, 2, 2]], f32)
ROIS = np.array([[0, 0, 0, 4, 4], [1, 1, 1, 9, 7]], f32)

LINES: list[Line] = [
    ("GridSample", ("x", GRID), {"batch": 2}),
    ("GridSample", ("x", GRID), {"batch": 2, "padding_mode": "border", "mode": "bicubic", "opset": 16}),
    ("GridSample", ("x", GRID), {"batch": 2, "padding_mode": "reflection", "mode": "nearest", "opset": 16}),
    ("GridSample", ("x", GRID), {"batch": 2, "mode": "linear", "align_corners": 1, "opset": 20}),
    ("RoiAlign", ("x", REGIONS, ints(0, 1, 1)), {"batch": 2, "output_height": 3, "output_width": 2}),
    (
        "RoiAlign",
        ("x", REGIONS, ints(0, 1, 0)),
        {"batch": 2, "output_height": 3, "output_width": 2, "mode": "max", "opset": 16},
    ),
    ("MaxRoiPool", ("x", ROIS), {"batch": 2, "pooled_shape": [2, 3]}),
    ("ReverseSequence", ("x", ints(1, 2, 1, 2, 1, 2)), {"batch": 2, "opaque": True, "removes": False}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


def test_a_reversed_sequence_keeps_its_features() -> None:
    constants = {"w": weights(3, 6), "i": ints(3, 5), "v": weights(6, 2)}
    constants["w"][:, [1, 4]] = 0
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("ReverseSequence", ["a", "i"], ["b"], batch_axis=0, time_axis=1),
        node("MatMul", ["b", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": [2, 5, 3]}, {"y": [2, 5, 2]}))
    assert initializer(slimmed.model, "w").shape == (3, 4)


@pytest.mark.parametrize(("padding", "goes"), [("border", 2), ("zeros", 1)])
def test_a_constant_channel_passes_a_grid_without_a_border_of_zeros(padding: str, goes: int) -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=(1, 2)), "b": np.array([0, 0.7, 0.4, 0], f32), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]),
        node("GridSample", ["a", "grid"], ["g"], padding_mode=padding),
        node("Conv", ["g", "v"], ["y"]),
    ]
    inputs = {"x": [2, 3, 6, 6], "grid": [2, 4, 5, 2]}
    slimmed = slim_and_verify(graph(nodes, constants, inputs, {"y": [2, 2, 4, 5]}))
    assert slimmed.removed_channels == goes  # under zeros the larger constant stands for both
