"""Lines of the family movement."""

import numpy as np
import pytest

from graph.rule_check import Line, check_line, dense, f32, ints, label

LINES: list[Line] = [
    ("Concat", ("x", "z"), {"axis": 1}),
    ("Concat", ("x", "z"), {"axis": -3}),
    ("Concat", ("x", "z"), {"axis": 2}),
    ("Concat", ("x", "x"), {"axis": 3}),
    ("Concat", ("x", "z"), {"axis": 0}),
    ("Concat", ("x", "z", "x"), {"axis": 1, "spatial": ()}),
    ("Concat", ("x", dense(2, 3, 6, 6)), {"axis": 1, "batch": 2, "opaque": True, "removes": False}),
    ("Concat", ("x", np.full((2, 6, 1, 6), 0.7, f32)), {"axis": 2, "batch": 2, "opaque": True, "removes": False}),
    ("Pad", ("x", ints(0, 2, 0, 0, 0, 1, 0, 0)), {}),
    ("Pad", ("x", ints(0, 2, 0, 0, 0, 0, 0, 0), f32(0.7)), {}),
    ("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 0, 1)), {}),
    ("Pad", ("x", ints(0, 0, 1, 1, 0, 0, 1, 1), f32(0.7)), {}),
    ("Pad", ("x", ints(0, 1, 1, 1, 0, 1, 1, 1), f32(0.7)), {}),
    ("Pad", ("x", ints(0, 0, -1, 1, 0, 0, 0, -2)), {}),
    ("Pad", ("x", ints(1, 2, 0, 1), "", ints(1, -1)), {}),
    ("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 2, 1)), {"mode": "reflect"}),
    ("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 2, 1)), {"mode": "edge"}),
    ("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 2, 1)), {"mode": "wrap", "opset": 19}),
    ("Pad", ("x", ints(0, 1, 0, 0, 0, 0, 0, 0)), {"mode": "edge", "opaque": True, "removes": False}),
    ("Pad", ("x", ints(0, -1, 0, 0, 0, 0, 0, 0)), {"opaque": True, "removes": False}),
    ("Pad", ("x",), {"pads": [0, 1, 1, 0, 0, 2, 0, 1], "value": 0.7, "opset": 9}),
    ("Slice", ("x", ints(1), ints(5), ints(1)), {}),
    ("Slice", ("x", ints(0), ints(6), ints(1), ints(2)), {}),
    ("Slice", ("x", ints(-1), ints(-(2**31)), ints(1), ints(-1)), {}),
    ("Slice", ("x", ints(4), ints(0), ints(-3), ints(-2)), {}),
    ("Slice", ("x", ints(0, 1), ints(2**31, 5), ints(2, 3), ints(2, 3)), {}),
    ("Slice", ("x", ints(5, 0), ints(0, 2**31), ints(3, 1), ints(-2, 3)), {}),
    ("Slice", ("x", ints(0, 1, 0), ints(2**31, 5, 4)), {}),
    ("Slice", ("x",), {"starts": [1, 0], "ends": [-1, 3], "axes": [1, 3], "opset": 9}),
    ("Slice", ("x", ints(2), ints(3), ints(1)), {}),
    ("Transpose", ("x",), {"perm": [0, 2, 3, 1]}),
    ("Transpose", ("x",), {"perm": [1, 0, 3, 2]}),
    ("Transpose", ("x",), {}),
    ("Squeeze", ("x", ints(2)), {"spatial": (1, 6)}),
    ("Squeeze", ("x", ints(-1, 2)), {"spatial": (1, 1)}),
    ("Squeeze", ("x",), {"spatial": (1, 1), "batch": 2}),
    ("Squeeze", ("x",), {"axes": [3], "spatial": (6, 1), "opset": 11}),
    ("Unsqueeze", ("x", ints(0, -1)), {}),
    ("Unsqueeze", ("x", ints(2)), {"spatial": ()}),
    ("Unsqueeze", ("x",), {"axes": [1], "opset": 11}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)
