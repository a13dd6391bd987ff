"""Lines of the family axes, and movement of other types."""

import numpy as np
import pytest

from graph.rule_check import Line, check_line, ints, label
from graph.small import analysis_of, parse, slim_and_verify

LINES: list[Line] = [
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


@pytest.mark.parametrize("kind", ["int64", "int32", "bool"])
def test_integers_and_truths_are_moved_like_floats(kind: str) -> None:
    """Movement of a type on which nothing is computed: no operator is opaque, and the graph stays right."""
    values = np.arange(12).reshape(2, 2, 3) % 5 - (kind != "bool") * 2
    model = parse(
        f"agraph ({kind}[2,1,3] x) => ({kind}[2,3,3,1] y)"
        "<int64[3] how = {1, 4, 1}, int64[2] sizes = {3, 3}, int64[3] i = {2, 0, 2}, int64[1] last = {-1}>"
        "{ a = Tile(x, how) b = Concat<axis = 1>(a, k) p, q = Split<axis = 1>(b, sizes)"
        "  c = Gather<axis = 1>(q, i) d = Transpose<perm = [1, 0, 2]>(c) e = Transpose<perm = [1, 0, 2]>(d)"
        "  y = Unsqueeze(e, last) }",
        k=values.astype(kind),
    )
    assert analysis_of(model).known.opaque == {}
    slimmed = slim_and_verify(model)
    assert slimmed.analysis.keep.kept["b", 1].tolist() == [False, False, False, True, False, True]
