"""Lines of the family linear."""

import numpy as np
import pytest

from graph.rule_check import Line, check_line, dense, f32, label, planted

SQUARE = planted(6, 6, 3, 3)

LINES: list[Line] = [
    ("Conv", ("x", SQUARE), {}),
    ("Conv", ("x", SQUARE, dense(6)), {"pads": [1] * 4}),
    ("Conv", ("x", SQUARE, dense(6)), {"strides": [2, 1]}),
    ("Conv", ("x", SQUARE), {"dilations": [2, 2]}),
    ("Conv", ("x", SQUARE), {"pads": [0, 1, 2, 0]}),
    ("Conv", ("x", SQUARE), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", ("x", SQUARE), {"auto_pad": "SAME_LOWER"}),
    ("Conv", ("x", SQUARE), {"auto_pad": "VALID"}),
    ("Conv", ("x", planted(4, 3, 3, 3), dense(4)), {"group": 2}),
    ("Conv", ("x", planted(4, 3, 3, 3)), {"group": 2, "pads": [1] * 4}),
    ("Conv", ("x", planted(6, 2, 1, 1)), {"group": 3}),
    ("Conv", ("x", planted(6, 1, 3, 3), dense(6)), {"group": 6}),
    ("Conv", ("x", planted(6, 1, 3, 3)), {"group": 6, "pads": [1] * 4}),
    ("Conv", ("x", planted(12, 1, 3, 3), dense(12)), {"group": 6}),
    ("Conv", ("x", planted(12, 1, 3, 3)), {"group": 6, "pads": [1] * 4}),
    ("Conv", ("x", planted(5, 6, 3)), {"spatial": (7,), "pads": [1, 1]}),
    ("Conv", ("x", planted(5, 6, 2, 2, 2), dense(5)), {"spatial": (3, 4, 3)}),
    ("Conv", ("x", planted(5, 6, 1, 1), dense(5)), {"batch": 2}),
    ("Conv", ("x", np.full((2, 6, 1, 1), np.inf, f32)), {"opaque": True, "removes": False}),
    ("Gemm", ("x", dense(6, 4)), {"spatial": ()}),
    ("Gemm", ("x", planted(4, 6), dense(4)), {"spatial": (), "transB": 1}),
    ("Gemm", ("x", planted(4, 6), dense(1, 4)), {"spatial": (), "transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", ("x", planted(4, 6), dense(1)), {"spatial": (), "transB": 1}),
    ("Gemm", ("x", planted(4, 6), f32(0.3)), {"spatial": (), "transB": 1}),
    ("Gemm", ("x", planted(4, 6)), {"spatial": (), "transB": 1, "alpha": -2.0}),
    ("Gemm", ("x", dense(2, 4)), {"spatial": (), "transA": 1, "batch": 2, "opaque": True, "removes": False}),
    ("MatMul", ("x", planted(4, 6).T), {"spatial": ()}),
    ("MatMul", ("x", dense(6, 4)), {}),
    ("MatMul", ("x", np.zeros((6, 4), f32)), {}),
    ("MatMul", (dense(5, 6), "x"), {}),
    ("MatMul", (dense(5, 2), "x"), {"spatial": (), "batch": 2}),
    ("MatMul", (dense(4, 6), "x"), {"spatial": (4,)}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)
