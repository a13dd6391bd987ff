"""Shape and Size: arithmetic on sizes is folded, and what is left of it keeps nothing but the axes that it reads."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.small import graph, slim_and_verify, weights

TESTED_BY_OTHER_MEANS = ("Shape", "Size")
DEAD = weights(6, 3, 1, 1, zero=(1, 4))


def slimmed(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], out: list[Any], size: Any = 4, opset: int = 18
) -> Any:
    first = [node("Conv", ["x", "w"], ["a"])]
    return slim_and_verify(
        graph([*first, *nodes], {"w": DEAD} | constants, {"x": ["N", 3, size, size]}, {"y": out}, opset=opset)
    )


@pytest.mark.parametrize("opset", [9, 13, 18])
def test_flattening_by_the_size_of_the_batch_keeps_nothing(opset: int) -> None:
    nodes = [
        node("Shape", ["a"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Unsqueeze", ["n"], ["n1"], axes=[0]) if opset < 13 else node("Unsqueeze", ["n", "axes"], ["n1"]),
        node("Concat", ["n1", "minus"], ["target"], axis=0),
        node("Reshape", ["a", "target"], ["flat"]),
        node("MatMul", ["flat", "m"], ["y"]),
    ]
    constants = {"zero": np.int64(0), "minus": np.array([-1]), "m": weights(96, 2)}
    found = slimmed(nodes, constants if opset < 13 else constants | {"axes": np.array([0])}, ["N", 2], opset=opset)
    assert [(row.before, row.after) for row in found.layers] == [(6, 4), (2, 2)]
    assert not found.opaque


def test_a_shape_of_static_sizes_is_folded() -> None:
    nodes = [
        node("Shape", ["a"], ["s"], start=1),
        node("Cast", ["s"], ["f"], to=1),
        node("ReduceSum", ["f"], ["t"], keepdims=0),
    ]
    nodes += [node("Div", ["a", "t"], ["b"]), node("Conv", ["b", "v"], ["y"])]
    found = slimmed(nodes, {"v": weights(2, 6, 1, 1)}, ["N", 2, 4, 4])
    assert found.layers[0].after == 4
    assert "Shape" not in [item.op_type for item in found.model.graph.node]


@pytest.mark.parametrize("take", ["gather", "slice", "start"])
def test_an_axis_whose_size_is_not_read_is_free(take: str) -> None:
    """Height and width are dynamic and not those of the input: the Shape stays, and the channels go."""
    taking = {
        "gather": [node("Shape", ["p"], ["s"]), node("Gather", ["s", "two"], ["hw"])],
        "slice": [node("Shape", ["p"], ["s"]), node("Slice", ["s", "from", "to"], ["hw"])],
        "start": [node("Shape", ["p"], ["hw"], start=2)],
    }[take]
    nodes = [
        node("MaxPool", ["a"], ["p"], kernel_shape=[3, 3], strides=[2, 2]),
        *taking,
        node("Concat", ["nc", "hw"], ["target"], axis=0),
        node("Conv", ["a", "v"], ["b"], kernel_shape=[1, 1]),
        node("Resize", ["b", "", "", "target"], ["c"], mode="nearest"),
        node("Conv", ["p", "v"], ["q"]),
        node("Add", ["c", "q"], ["y"]),
    ]
    constants = {"two": np.array([2, 3]), "from": np.array([2]), "to": np.array([4]), "v": weights(2, 6, 1, 1)}
    constants["nc"] = np.array([1, 2])
    used = {name for item in nodes for name in item.input}
    whole = graph(
        [node("Conv", ["x", "w"], ["a"]), *nodes],
        {"w": DEAD} | {name: array for name, array in constants.items() if name in used},
        {"x": [1, 3, "H", "W"]},
        {"y": [1, 2, None, None]},
    )
    found = slim_and_verify(whole)
    assert [row.after for row in found.layers] == [4, 2, 2]


def test_an_axis_whose_size_is_read_keeps_its_channels() -> None:
    nodes = [
        node("MaxPool", ["a"], ["p"], kernel_shape=[3, 3], strides=[2, 2]),
        node("Shape", ["p"], ["s"]),
        node("Cast", ["s"], ["f"], to=1),
        node("ReduceSum", ["f"], ["t"], keepdims=0),
        node("Conv", ["p", "v"], ["q"]),
        node("Add", ["q", "t"], ["y"]),
    ]
    whole = graph(
        [node("Conv", ["x", "w"], ["a"]), *nodes],
        {"w": DEAD, "v": weights(2, 6, 1, 1)},
        {"x": [1, 3, "H", "W"]},
        {"y": [1, 2, None, None]},
    )
    assert [row.after for row in slim_and_verify(whole).layers] == [6, 2]
