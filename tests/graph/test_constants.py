"""Branches, blocks and whole graphs that become constant disappear."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.small import graph, run, slim_and_verify, weights
from prune2deploy.graph.rewrite import Slimmed, remove_dead_channels

IMAGE = ["N", 3, 6, 6]


def operators(slimmed: Slimmed) -> list[str]:
    return [item.op_type for item in slimmed.model.graph.node]


def silent_branch(last: list[onnx.NodeProto], batch: Any = "N", **constants: np.ndarray) -> Slimmed:
    """Slim a live branch ``l`` beside ``d``, one of three layers whose last filters are all zero, behind a Sigmoid."""
    nodes = [
        node("Conv", ["x", "w"], ["l"], pads=[1] * 4, name="live"),
        node("Conv", ["x", "u"], ["d1"], pads=[1] * 4, name="first"),
        node("Relu", ["d1"], ["d2"]),
        node("Conv", ["d2", "z"], ["d3"], pads=[1] * 4, name="silent"),
        node("Sigmoid", ["d3"], ["d"]),
        *last,
    ]
    own = {"w": weights(4, 3, 3, 3), "u": weights(5, 3, 3, 3, seed=1), "z": np.zeros((4, 5, 3, 3), np.float32)}
    shape = [batch, 3, 6, 6]
    return slim_and_verify(graph(nodes, own | constants, {"x": shape}, ["y"]))


@pytest.mark.parametrize("batch", ["N", 2])
def test_a_silent_residual_branch_disappears(batch: Any) -> None:
    found = silent_branch([node("Add", ["l", "d"], ["y"])], batch)
    assert operators(found) == ["Conv", "Add"]
    assert found.removed_layers == ["first", "silent"]


@pytest.mark.parametrize("batch", ["N", 2])
def test_a_silent_branch_of_a_concatenation_that_is_given_out_becomes_a_constant(batch: Any) -> None:
    found = silent_branch([node("Concat", ["l", "d"], ["y"], axis=1)], batch)
    assert found.removed_layers == ["first", "silent"]
    assert operators(found).count("Conv") == 1


@pytest.mark.parametrize("batch", ["N", 2])
def test_a_silent_branch_under_a_padded_reader_becomes_one_constant_channel(batch: Any) -> None:
    last = [node("Concat", ["l", "d"], ["c"], axis=1), node("Conv", ["c", "v"], ["y"], pads=[1] * 4, name="last")]
    found = silent_branch(last, batch, v=weights(2, 8, 3, 3))
    assert found.removed_layers == ["first", "silent"]
    (last_row,) = [row for row in found.layers if row.name == "last"]
    assert last_row.parameters_after == 2 * (4 + 1) * 9


def test_a_silent_block_in_a_chain_takes_all_before_it_along() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="first"),
        node("Conv", ["a", "z", "b"], ["s"], name="silent"),
        node("Relu", ["s"], ["r"]),
        node("Conv", ["r", "v"], ["c"], pads=[1] * 4, name="padded"),
        node("GlobalAveragePool", ["c"], ["p"]),
        node("Add", ["p", "x2"], ["y"]),
    ]
    constants = {
        "w": weights(4, 3, 1, 1),
        "z": np.zeros((5, 4, 1, 1), np.float32),
        "b": np.abs(weights(5)),
        "v": weights(2, 5, 3, 3),
    }
    whole = graph(nodes, constants, {"x": [1, 3, 6, 6], "x2": [1, 2, 1, 1]}, {"y": [1, 2, 1, 1]})
    found = slim_and_verify(whole)
    assert operators(found) == ["Add"]
    assert found.unread_inputs == ["x"]
    assert [value.name for value in found.model.graph.input] == ["x", "x2"]


@pytest.mark.parametrize("batch", ["N", 3])
def test_a_graph_that_gives_a_constant_says_so_and_stays_valid(batch: Any) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("GlobalAveragePool", ["a"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "z", "b"], ["y"]),
    ]
    constants = {"w": weights(4, 3, 1, 1), "z": np.zeros((4, 2), np.float32), "b": np.array([0.5, -2], np.float32)}
    model = graph(nodes, constants, {"x": [batch, 3, 6, 6]}, {"y": [batch, 2]})
    found = slim_and_verify(model)
    assert found.unread_inputs == ["x"]
    assert "Gemm" not in operators(found)
    assert found.report()["macs"] == {"before": 36 * 12 + 8, "after": 0}
    got = run(found.model, {"x": np.zeros((3, 3, 6, 6), np.float32)})["y"]
    np.testing.assert_array_equal(got, np.tile(constants["b"], (3, 1)))


def test_where_the_size_cannot_be_known_a_thin_branch_stays() -> None:
    nodes = [
        node("MaxPool", ["x"], ["m"], kernel_shape=[3, 3], strides=[2, 2]),
        node("Conv", ["m", "w", "b"], ["y"], pads=[1] * 4),
    ]
    constants = {"w": np.zeros((4, 3, 3, 3), np.float32), "b": weights(4)}
    found = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, {"y": ["N", 4, None, None]}))
    assert "Conv" in operators(found)
    assert found.unread_inputs == []


def test_a_second_run_finds_nothing_more() -> None:
    found = silent_branch([node("Concat", ["l", "d"], ["y"], axis=1)])
    again = remove_dead_channels(onnx.load_from_string(found.model.SerializeToString()))
    assert (again.removed_channels, again.removed_layers) == (0, [])
