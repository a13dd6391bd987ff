"""Lines of the family resize, and sizes that hold the channels."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, f32, ints, label
from graph.small import copy_of, graph, initializer, parse, run, slim_and_verify, weights
from prune2deploy.graph.rewrite import remove_dead_channels


def floats(*values: float) -> np.ndarray:
    return np.array(values, f32)


NO = floats()
DOUBLE = floats(1, 1, 2, 2)
LINEAR = {"mode": "linear"}
CROP = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
WHOLE = floats(0, 0, -0.2, 0, 1, 1, 1.3, 1)

LINES: list[Line] = [
    ("Upsample", ("x", DOUBLE), {"opset": 9}),
    ("Upsample", ("x", floats(1, 1, 2.5, 2)), {"opset": 9, "mode": "linear"}),
    ("Resize", ("x", DOUBLE), {"opset": 10}),
    ("Resize", ("x", floats(1, 1, 0.5, 2)), {"opset": 10, "mode": "linear"}),
    ("Resize", ("x", NO, DOUBLE), {"opset": 11}),
    ("Resize", ("x", NO, floats(1, 1, 1.5, 1.7)), {"opset": 11, "mode": "cubic", "exclude_outside": 1}),
    ("Resize", ("x", NO, NO, ints(2, 6, 12, 9)), {"opset": 11, "batch": 2, "mode": "linear"}),
    (
        "Resize",
        ("x", NO, DOUBLE),
        {"opset": 11, "coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"},
    ),
    (
        "Resize",
        ("x", NO, DOUBLE),
        {
            "opset": 11,
            "coordinate_transformation_mode": "tf_half_pixel_for_nn",
            "nearest_mode": "ceil",
            "opaque": True,
            "removes": False,
        },
    ),
    ("Resize", ("x", "", DOUBLE), {"opset": 13, "coordinate_transformation_mode": "align_corners", **LINEAR}),
    ("Resize", ("x", "", DOUBLE), {"opset": 13, "coordinate_transformation_mode": "pytorch_half_pixel", **LINEAR}),
    ("Resize", ("x", "", DOUBLE), {"opset": 13, "coordinate_transformation_mode": "asymmetric"}),
    ("Resize", ("x", "", "", ints(2, 6, 5, 7)), {"opset": 13, "batch": 2, "mode": "cubic"}),
    ("Resize", ("x", WHOLE, DOUBLE), {"opset": 13, "extrapolation_value": 0.7, **CROP}),
    ("Resize", ("x", WHOLE, "", ints(2, 6, 9, 9)), {"opset": 18, "batch": 2, **CROP}),
    ("Resize", ("x", floats(0, 0, 1, 1), "", ints(9, 9)), {"opset": 18, "axes": [2, 3], **CROP}),
    ("Resize", ("x", "", floats(2, 3)), {"axes": [3, -2], "mode": "linear"}),
    ("Resize", ("x", "", floats(0.5, 0.5)), {"axes": [2, 3], "mode": "linear", "antialias": 1}),
    ("Resize", ("x", "", floats(0.4, 0.5)), {"axes": [2, 3], "mode": "cubic", "antialias": 1}),
    ("Resize", ("x", "", "", ints(6, 9, 12)), {"axes": [1, 2, 3], "mode": "linear"}),
    ("Resize", ("x", "", "", ints(9, 12)), {"axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"}),
    (
        "Resize",
        ("x", "", "", ints(2, 6, 9, 12)),
        {"batch": 2, "keep_aspect_ratio_policy": "not_larger", "opaque": True, "removes": False},
    ),
    ("Resize", ("x", "", floats(1, 2, 1, 1)), {"opaque": True, "removes": False}),
    ("Resize", ("x", "", "", ints(2, 3, 6, 6)), {"batch": 2, "opaque": True, "removes": False}),
    (
        "Resize",
        ("x", "", DOUBLE),
        {"opset": 19, "coordinate_transformation_mode": "half_pixel_symmetric", "mode": "linear"},
    ),
    ("Resize", ("x", "", floats(1, 1, 2)), {"opset": 19, "spatial": (7,), "mode": "linear"}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


def resized(inputs: list[str], constants: dict[str, Any], batch: str | int, height: Any, **how: Any) -> onnx.ModelProto:
    constants = constants | {"w": weights(6, 3, 1, 1, zero=(1, 4)), "v": weights(2, 6, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Resize", inputs, ["b"], **how),
        node("Conv", ["b", "v"], ["y"]),
    ]
    return graph(nodes, constants, {"x": [batch, 3, 6, 6]}, {"y": [batch, 2, height, height]})


def test_the_channel_entry_of_the_sizes_is_rewritten() -> None:
    slimmed = slim_and_verify(resized(["a", "", "", "sizes"], {"sizes": ints(2, 6, 12, 12)}, 2, 12))
    assert slimmed.removed_channels == 2
    assert initializer(slimmed.model, "sizes").tolist() == [2, 4, 12, 12]


def test_the_channel_entry_of_computed_sizes_is_changed_at_run_time() -> None:
    """The sizes are batch and channels, and a height and width that come from outside."""
    model = parse(
        "agraph (float[2,3,6,6] x, int64[2] room) => (float[2,2,H,W] y) <int64[2] front = {2, 6}>"
        '{ a = Conv(x, w) sizes = Concat<axis = 0>(front, room) b = Resize<mode = "linear">(a, , , sizes)'
        "  y = Conv(b, v) }",
        w=weights(6, 3, 1, 1, zero=(1, 4)),
        v=weights(2, 6, 1, 1),
    )
    slimmed = remove_dead_channels(copy_of(model))
    feed = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(f32), "room": ints(9, 13)}
    np.testing.assert_allclose(run(slimmed.model, feed)["y"], run(model, feed)["y"], rtol=1e-4, atol=1e-5)
    assert slimmed.removed_channels == 2


@pytest.mark.parametrize(("outside", "goes"), [(0.0, 2), (0.5, 1)])  # two equal ones are still aliases
def test_a_crop_beyond_the_map_passes_only_the_constant_that_it_fills_in(outside: float, goes: int) -> None:
    constants = {"roi": floats(0, 0, -0.3, -0.3, 1, 1, 1.3, 1.3), "scales": DOUBLE}
    how = CROP | {"extrapolation_value": outside}
    slimmed = slim_and_verify(resized(["a", "roi", "scales"], constants, "N", 12, **how))
    assert slimmed.removed_channels == goes
