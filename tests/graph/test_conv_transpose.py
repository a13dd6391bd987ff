"""Constants and aliases behind transposed convolutions: their overlap and stride make borders everywhere."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.small import graph, run, slim_and_verify, weights

IMAGE = ["N", 3, 5, 5]


def decoder(bias: list[float], up: np.ndarray, act: str = "Sigmoid", **attributes: Any) -> onnx.ModelProto:
    """Return conv -> activation -> transposed convolution -> conv; only the first two filters are not zero."""
    constants = {
        "w": weights(6, 3, 1, 1, zero=(2, 3, 4, 5)),
        "b": np.array(bias, np.float32),
        "up": up,
        "last": weights(2, up.shape[1] * attributes.get("group", 1), 1, 1, seed=3),
    }
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], name="stem"),
        node(act, ["a"], ["h"]),
        node("ConvTranspose", ["h", "up"], ["u"], name="up", **attributes),
        node("Conv", ["u", "last"], ["y"], name="last"),
    ]
    return graph(nodes, constants, {"x": IMAGE}, ["y"])


FORMS: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((2, 2), {"strides": [2, 2]}),
    ((4, 4), {"strides": [2, 2], "pads": [1] * 4}),
    ((3, 3), {}),
    ((2, 2), {"strides": [3, 3]}),
    ((3, 3), {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}),
    ((1, 1), {"strides": [2, 2]}),
]


@pytest.mark.parametrize(("kernel", "attributes"), FORMS, ids=str)
def test_one_constant_channel_stands_for_all(kernel: tuple[int, int], attributes: dict[str, Any]) -> None:
    model = decoder([0.1, 0.2, 1.0, -1.0, 0.5, 0.0], weights(6, 4, *kernel, seed=1), **attributes)
    slimmed = slim_and_verify(model)
    assert [row.after for row in slimmed.layers] == [3, 4, 2]


def test_a_constant_before_it_varies_from_place_to_place_behind_it() -> None:
    """What the pass must not do: take the plane of a constant for a constant."""
    model = decoder([0.0] * 6, weights(6, 4, 2, 2, seed=1), strides=[2, 2])
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros((6, 3, 1, 1), np.float32), "w"))
    slimmed = slim_and_verify(model)
    plane = run(slimmed.model, {"x": np.zeros((1, 3, 5, 5), np.float32)})["y"][0, 0]
    assert np.ptp(plane) > 0.01


def test_all_constants_fold_where_every_output_sees_its_one_tap() -> None:
    slimmed = slim_and_verify(decoder([0.1, 0.2, 1.0, -1.0, 0.5, 0.0], weights(6, 4, 1, 1, seed=1)))
    assert [row.after for row in slimmed.layers] == [2, 4, 2]


def test_zero_channels_all_go() -> None:
    slimmed = slim_and_verify(decoder([0.1, 0.2, 0, 0, -1, 0], weights(6, 4, 3, 3, seed=1), act="Relu", strides=[2, 2]))
    assert [row.after for row in slimmed.layers] == [2, 4, 2]


def test_an_output_that_reads_nothing_is_its_bias() -> None:
    up = weights(6, 4, 3, 3, seed=1)
    up[:, 2] = 0
    slimmed = slim_and_verify(decoder([0.1, 0.2, 1, 1, 1, 1], up, strides=[2, 2]))
    assert [row.after for row in slimmed.layers] == [3, 3, 2]


def test_an_output_that_reads_constants_alone_is_not_constant() -> None:
    up = weights(6, 4, 2, 2, seed=1)
    up[:2, 2] = 0
    slimmed = slim_and_verify(decoder([0.1, 0.2, 1, 1, 1, 1], up, strides=[2, 2]))
    assert [row.after for row in slimmed.layers] == [3, 4, 2]


def test_a_depthwise_one_goes_with_its_channel() -> None:
    model = decoder([0.1, 0.2, 0, 0, 0, 0], weights(6, 2, 2, 2, seed=1), act="Relu", group=6, strides=[2, 2])
    slimmed = slim_and_verify(model)
    assert [row.after for row in slimmed.layers] == [2, 4, 2]
    assert next(row for row in slimmed.layers if row.name == "up").macs_after == 25 * 4 * 4


def test_a_grouped_one_keeps_equal_numbers_in_its_groups() -> None:
    up = weights(6, 2, 2, 2, seed=1)
    slimmed = slim_and_verify(decoder([0.1, 0.2, 0, 0, 0, 0], up, act="Relu", group=3, strides=[2, 2]))
    assert [row.after for row in slimmed.layers] == [2, 2, 2]
    assert next(row for row in slimmed.layers if row.name == "up").macs_after == 25 * 2 * 2 * 4


def test_work_is_counted_by_input_positions() -> None:
    slimmed = slim_and_verify(decoder([1.0] * 6, weights(6, 4, 3, 3, seed=1), strides=[2, 2]))
    assert next(row for row in slimmed.layers if row.name == "up").macs_before == 25 * 9 * 6 * 4
