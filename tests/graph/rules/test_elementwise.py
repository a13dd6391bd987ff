"""Lines of the family elementwise."""

import numpy as np
import pytest

from graph.rule_check import Line, check_line, dense, f32, label

LINES: list[Line] = [
    ("Add", ("x", "z"), {}),
    ("Sub", ("x", "z"), {}),
    ("Mul", ("x", "z"), {}),
    ("Add", ("x", "x"), {}),
    ("Sub", ("x", "x"), {}),
    ("Mul", ("x", "x"), {}),
    *((op, ("x", dense(6, 1, 1)), {}) for op in ("Add", "Sub", "Mul")),
    *((op, (dense(1, 6, 1, 1), "x"), {}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", f32(2.5)), {}) for op in ("Add", "Sub", "Mul")),
    *((op, (dense(1), "x"), {}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(6)), {}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(6, 1)), {}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(6, 6, 6)), {}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(2, 1, 1, 1)), {"batch": 2}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(6)), {"spatial": ()}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(2, 1, 6, 1, 1)), {"batch": 1}) for op in ("Add", "Sub", "Mul")),
    ("Mul", ("x", np.array([0, 1, 2, 0, 1, 0], f32)[:, None, None]), {}),
    ("Add", ("x", np.full((1, 1, 1), np.nan, f32)), {"opaque": True, "removes": False}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)
