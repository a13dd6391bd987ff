"""Lines of the family channelwise."""

import numpy as np
import pytest

from graph.rule_check import Line, check_line, dense, label

NORM = (dense(6), dense(6), dense(6), np.abs(dense(6)) + 0.5)
ZERO_SCALE = (np.array([1, 0, 2, 1, 1, -1], np.float32), *NORM[1:])

LINES: list[Line] = [
    ("BatchNormalization", ("x", *NORM), {}),
    ("BatchNormalization", ("x", *NORM), {"epsilon": 0.1}),
    ("BatchNormalization", ("x", *ZERO_SCALE), {}),
    ("BatchNormalization", ("x", *ZERO_SCALE), {"spatial": ()}),
    ("BatchNormalization", ("x", *NORM), {"opset": 9}),
    ("Identity", ("x",), {}),
    ("Dropout", ("x",), {}),
    ("Dropout", ("x",), {"ratio": 0.3, "opset": 10}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)
