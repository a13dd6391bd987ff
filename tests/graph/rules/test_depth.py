"""Lines of the family depth, and pixel shuffles: whole blocks of channels go, however they are written."""

import numpy as np
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, ints, label
from graph.small import graph, kept, operators, slim_and_verify, weights

LINES: list[Line] = [
    ("DepthToSpace", ("x",), {"blocksize": 2, "channels": 8, "mode": "DCR"}),
    ("DepthToSpace", ("x",), {"blocksize": 2, "channels": 12, "mode": "CRD", "batch": 2}),
    ("DepthToSpace", ("x",), {"blocksize": 3, "channels": 18, "opset": 9}),
    ("SpaceToDepth", ("x",), {"blocksize": 2}),
    ("SpaceToDepth", ("x",), {"blocksize": 3, "batch": 2, "opset": 9}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


def test_a_pixel_shuffle_into_one_channel_keeps_its_whole_block() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=(1, 2)), "v": weights(2, 1, 3, 3)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("DepthToSpace", ["a"], ["b"], blocksize=2),
        node("Conv", ["b", "v"], ["y"]),
    ]
    assert (
        slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 10, 10]})).removed_channels == 0
    )


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_a_pixel_shuffle_loses_an_output_only_with_all_of_its_block(mode: str) -> None:
    """Of three outputs of 2 x 2 channels, one has a dead block, one is not read, and one lost a single channel."""
    blocks = np.arange(12).reshape(3, 4) if mode == "CRD" else np.arange(12).reshape(4, 3).T
    constants = {"w": weights(12, 3, 1, 1, zero=(*blocks[0], blocks[2, 1])), "v": weights(2, 3, 1, 1)}
    constants["v"][:, 1] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("DepthToSpace", ["a"], ["b"], blocksize=2, mode=mode),
        node("Conv", ["b", "v"], ["y"]),
    ]
    model = graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 12, 12]})
    slimmed = slim_and_verify(model)
    assert np.flatnonzero(kept(model, "a")).tolist() == sorted(blocks[2].tolist())
    assert slimmed.removed_channels == 8


def test_constants_that_differ_within_a_block_are_no_constant() -> None:
    constants = {
        "w": np.zeros((8, 3, 1, 1), np.float32),
        "b": np.array([1, 1, 1, 1, 1, 1, 2, 1], np.float32),
        "v": weights(2, 2, 1, 1),
    }
    constants["w"][0] = 1
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]),
        node("DepthToSpace", ["a"], ["d"], blocksize=2, mode="CRD"),
        node("Conv", ["d", "v"], ["y"]),
    ]
    model = graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 12, 12]})
    assert slim_and_verify(model).removed_channels == 0


@pytest.mark.parametrize("batch", ["N", 1])
def test_a_pixel_shuffle_written_as_a_reshape_of_six_axes_loses_whole_blocks(batch: str | int) -> None:
    constants = {
        "w": weights(12, 3, 1, 1, zero=(0, 1, 2, 3, 9)),
        "split": ints(-1, 3, 2, 2, 6, 6),
        "merge": ints(-1, 3, 12, 12),
        "v": weights(2, 3, 1, 1),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "split"], ["b"]),
        node("Transpose", ["b"], ["c"], perm=[0, 1, 4, 2, 5, 3]),
        node("Reshape", ["c", "merge"], ["d"]),
        node("Conv", ["d", "v"], ["y"]),
    ]
    model = graph(nodes, constants, {"x": [batch, 3, 6, 6]}, {"y": [batch, 2, 12, 12]})
    slimmed = slim_and_verify(model)
    assert slimmed.removed_channels == 4
    assert "Gather" not in operators(slimmed.model)


def test_space_to_depth_of_the_image_itself_is_whole() -> None:
    constants = {"w": weights(4, 12, 1, 1, zero=(1,)), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("SpaceToDepth", ["x"], ["a"], blocksize=2),
        node("Conv", ["a", "w"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    assert slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 3, 3]})).removed_channels == 1
