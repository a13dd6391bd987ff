"""Lines of the family channelwise."""

import numpy as np
import pytest
from onnx import TensorProto

from graph.rule_check import Line, check_line, dense, f32, label

NORM = (dense(6), dense(6), dense(6), np.abs(dense(6)) + 0.5)
ZERO_SCALE = (np.array([1, 0, 2, 1, 1, -1], np.float32), *NORM[1:])

LINES: list[Line] = [
    ("BatchNormalization", ("x", *NORM), {}),
    ("BatchNormalization", ("x", *NORM), {"epsilon": 0.1}),
    ("BatchNormalization", ("x", *ZERO_SCALE), {}),
    ("BatchNormalization", ("x", *ZERO_SCALE), {"spatial": ()}),
    ("BatchNormalization", ("x", *NORM), {"opset": 9}),
    ("Relu", ("x",), {}),
    ("Relu", ("x",), {"spatial": ()}),
    ("LeakyRelu", ("x",), {}),
    ("LeakyRelu", ("x",), {"alpha": 0.3}),
    ("LeakyRelu", ("x",), {"alpha": -0.3}),
    ("Clip", ("x", f32(0.1), f32(0.6)), {}),
    ("Clip", ("x", "", f32(0.5)), {}),
    ("Clip", ("x", f32(0)), {}),
    ("Clip", ("x",), {"min": 0.1, "max": 0.6, "opset": 9}),
    ("Clip", ("x",), {"max": 0.6, "opset": 10}),
    ("Sigmoid", ("x",), {}),
    ("Identity", ("x",), {}),
    ("Dropout", ("x",), {}),
    ("Dropout", ("x",), {"ratio": 0.3, "opset": 10}),
    ("Cast", ("x",), {"to": TensorProto.FLOAT}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)
