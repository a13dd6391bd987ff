"""Lines of the family pool."""

import pytest

from graph.rule_check import Line, check_line, ints, label

LINES: list[Line] = [
    ("MaxPool", ("x",), {"kernel_shape": [3, 3]}),
    ("MaxPool", ("x",), {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}),
    ("MaxPool", ("x",), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("MaxPool", ("x",), {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    ("MaxPool", ("x",), {"kernel_shape": [3], "spatial": (7,)}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3]}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "pads": [1] * 4}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "count_include_pad": 1}),
    ("AveragePool", ("x",), {"kernel_shape": [2, 2], "auto_pad": "VALID", "opset": 9}),
    ("GlobalAveragePool", ("x",), {}),
    ("GlobalMaxPool", ("x",), {}),
    ("ReduceMean", ("x", ints(2, 3)), {}),
    ("ReduceMean", ("x", ints(-1)), {"keepdims": 0}),
    ("ReduceMean", ("x", ints(3, 2)), {"keepdims": 0}),
    ("ReduceMean", ("x",), {"axes": [2, -1], "keepdims": 0, "opset": 13}),
    ("ReduceMean", ("x",), {"axes": [3], "opset": 9}),
    ("ReduceMean", ("x",), {"noop_with_empty_axes": 1}),
    ("ReduceMean", ("x", ints(0)), {"keepdims": 0}),
    ("ReduceMean", ("x", ints(1)), {"opaque": True, "removes": False}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)
