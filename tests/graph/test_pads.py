"""Borders of minus infinity before a MaxPool become its own padding, where that is the same."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node as node

from graph.rule_check import ints
from graph.small import copy_of, graph, slim_and_verify, weights
from prune2deploy.graph.normal import normalise

LOWEST = np.array(-np.inf, np.float32)
POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}


def padded(
    border: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 1, 1),
    value: np.ndarray = LOWEST,
    *,
    opset: int = 18,
    mode: str = "constant",
    axes: tuple[int, ...] = (),
    size: int = 6,
    **pool: Any,
) -> onnx.ModelProto:
    """Return a convolution with dead filters 1 and 2 of 4, a Pad and a MaxPool between it and its reader."""
    constants = {"w": weights(4, 3, 1, 1, zero=(1, 2)), "b": -np.ones(4, np.float32), "v": weights(2, 4, 1, 1)}
    if opset < 11:
        pad = node("Pad", ["a"], ["p"], mode=mode, pads=border, value=float(value))
    else:
        pad = node("Pad", ["a", "pads", "value", *["axes"] * bool(axes)], ["p"], mode=mode)
        constants |= {"pads": ints(*border), "value": value} | ({"axes": ints(*axes)} if axes else {})
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]),
        pad,
        node("MaxPool", ["p"], ["m"], **(POOL | pool)),
        node("Conv", ["m", "v"], ["y"]),
    ]
    return graph(nodes, constants, {"x": ["N", 3, size, size]}, ["y"], opset=opset)


def pads_left(model: onnx.ModelProto) -> int:
    return sum(each.op == "Pad" for each in normalise(copy_of(model)).nodes)


@pytest.mark.parametrize(
    "model",
    [
        padded(),
        padded((0, 0, 1, 2, 0, 0, 2, 0)),
        padded((1, 2), axes=(-1,)),
        padded(opset=9),
        padded(kernel_shape=[5, 5], strides=[1, 1], auto_pad="VALID"),
    ],
)
def test_a_border_of_minus_infinity_is_padding(model: onnx.ModelProto) -> None:
    assert pads_left(model) == 0
    slimmed = slim_and_verify(model)
    assert [row.after for row in slimmed.layers] == [2, 2]
    assert not slimmed.opaque


def test_padding_of_its_own_is_added_to() -> None:
    model = padded((0, 0, 0, 1, 0, 0, 1, 0), pads=[1, 0, 0, 1])
    assert [each.attrs["pads"] for each in normalise(copy_of(model)).nodes if each.op == "MaxPool"] == [[1, 1, 1, 1]]
    slim_and_verify(model)


def bordered(outputs: list[str], *nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Return a convolution ``a`` with a border ``p`` and these nodes."""
    constants = {"w": weights(4, 3, 1, 1), "pads": ints(0, 0, 0, 0, 0, 0, 1, 1), "value": LOWEST}
    first = [node("Conv", ["x", "w"], ["a"]), node("Pad", ["a", "pads", "value"], ["p"])]
    return graph([*first, *nodes], constants, {"x": ["N", 3, 6, 6]}, outputs)


def test_a_border_that_others_read_stays_for_them() -> None:
    model = bordered(["y", "p"], node("MaxPool", ["p"], ["y"], **POOL))
    assert pads_left(model) == 1
    assert [each.inputs[0].name for each in normalise(model).nodes if each.op == "MaxPool"] == ["a"]


def test_a_border_stays_where_places_are_read() -> None:
    model = bordered(
        ["y"],
        node("MaxPool", ["p"], ["m", "i"], **POOL),
        node("Cast", ["i"], ["j"], to=TensorProto.FLOAT),
        node("Add", ["m", "j"], ["y"]),
    )
    assert pads_left(model) == 1
    slim_and_verify(model)


@pytest.mark.parametrize(
    "model",
    [
        padded(value=np.array(-1e30, np.float32)),
        padded(value=np.array(np.inf, np.float32)),
        padded(mode="edge"),
        padded((0, 0, -1, 0, 0, 0, 1, 1)),
        padded((0, 0, 0, 0, 0, 0, 1, 3)),
        padded((1, 0, 0, 0, 0, 0, 1, 1)),
        padded(ceil_mode=1, size=7),
        padded(dilations=[2, 2]),
        padded(auto_pad="SAME_UPPER"),
        padded((0, 0, 2, 0, 0, 0, 1, 1), kernel_shape=[2, 2]),
    ],
)
def test_any_other_border_stays(model: onnx.ModelProto) -> None:
    assert pads_left(model) == 1
    slim_and_verify(model)
