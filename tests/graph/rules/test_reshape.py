"""Lines of the family reshape."""

import pytest

from graph.rule_check import Line, check_line, ints, label

LINES: list[Line] = [
    ("Flatten", ("x",), {}),
    ("Flatten", ("x",), {"axis": -3}),
    ("Flatten", ("x",), {"axis": 2, "batch": 2}),
    ("Flatten", ("x",), {"axis": 0, "batch": 2}),
    ("Flatten", ("x",), {"axis": 2, "opaque": True, "removes": False}),
    ("Reshape", ("x", ints(0, 216)), {}),
    ("Reshape", ("x", ints(0, -1)), {}),
    ("Reshape", ("x", ints(-1, 216)), {}),
    ("Reshape", ("x", ints(0, 2, 3, 6, 6)), {}),
    ("Reshape", ("x", ints(0, 6, -1)), {}),
    ("Reshape", ("x", ints(2, 216)), {"batch": 2}),
    ("Reshape", ("x", ints(0, 3, 12, 6)), {}),
    ("Reshape", ("x", ints(0, 6, 1, 36)), {"opset": 9}),
    ("Reshape", ("x", ints(0, 3, 2)), {"spatial": ()}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)
