"""Lines of the family concat, and inputs of one channel, constants and empty ones."""

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, dense, f32, label
from graph.small import graph, kept, operators, slim_and_verify, weights

LINES: list[Line] = [
    ("Concat", ("x", "z"), {"axis": 1}),
    ("Concat", ("x", "z"), {"axis": -3}),
    ("Concat", ("x", "z"), {"axis": 2}),
    ("Concat", ("x", "x"), {"axis": 3}),
    ("Concat", ("x", "z"), {"axis": 0}),
    ("Concat", ("x", "z", "x"), {"axis": 1, "spatial": ()}),
    ("Concat", ("x", dense(2, 3, 6, 6)), {"axis": 1, "batch": 2, "removes": True}),
    ("Concat", ("x", np.full((2, 6, 1, 6), 0.7, f32)), {"axis": 2, "batch": 2, "removes": True}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


def joined(
    inputs: list[str], constants: dict[str, np.ndarray], read: list[int], batch: str | int = "N"
) -> onnx.ModelProto:
    """Return: convolutions ``a`` (3 channels) and ``b`` (1 channel), joined with others, of which some are read."""
    constants = constants | {"wa": weights(3, 3, 1, 1), "wb": weights(1, 3, 1, 1, seed=1)}
    total = {"a": 3, "b": 1, "x": 3} | {name: array.shape[1] for name, array in constants.items()}
    width = sum(total[name] for name in inputs)
    constants["v"] = weights(2, width, 1, 1, seed=2)
    constants["v"][:, [k for k in range(width) if k not in read]] = 0
    nodes = [
        node("Conv", ["x", "wa"], ["a"]),
        node("Conv", ["x", "wb"], ["b"]),
        node("Concat", inputs, ["c"], axis=1),
        node("Conv", ["c", "v"], ["y"]),
    ]
    used = {*inputs, "c", "y"}
    nodes = [item for item in nodes if item.output[0] in used]
    read_names = {name for item in nodes for name in item.input}
    constants = {name: array for name, array in constants.items() if name in read_names}
    return graph(nodes, constants, {"x": [batch, 3, 6, 6]}, {"y": [batch, 2, 6, 6]})


def test_an_input_of_one_channel_goes_when_nobody_reads_it() -> None:
    slimmed = slim_and_verify(joined(["a", "b", "x"], {}, read=[0, 1, 4, 5, 6]))
    assert [row.after for row in slimmed.layers] == [2, 0, 2]


def test_what_is_left_of_a_single_input_needs_no_concat() -> None:
    slimmed = slim_and_verify(joined(["b", "a"], {}, read=[1, 3]))
    assert operators(slimmed.model) == ["Conv", "Conv"]


def test_an_input_of_one_channel_stays_when_somebody_reads_it() -> None:
    slimmed = slim_and_verify(joined(["b", "a"], {}, read=[0, 2]))
    assert [row.after for row in slimmed.layers] == [1, 1, 2]


def test_only_the_channels_of_the_image_that_are_read_are_joined() -> None:
    model = joined(["a", "x"], {}, read=[0, 4])
    assert kept(model, "c") == [True, False, False, False, True, False]
    slimmed = slim_and_verify(model)
    assert operators(slimmed.model) == ["Conv", "Gather", "Concat", "Conv"]


@pytest.mark.parametrize("read", [[0, 3], [0, 1, 2, 3, 4], [0, 2]])
def test_a_map_of_coordinates_is_joined_with_channels(read: list[int]) -> None:
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 6), np.linspace(-1, 1, 6)))[None].astype(f32)
    model = joined(["a", "grid"], {"grid": grid}, read, batch=1)
    slimmed = slim_and_verify(model)
    assert not slimmed.opaque
    assert kept(model, "c") == [place in read for place in range(5)]


def test_an_empty_input_is_nothing() -> None:
    slimmed = slim_and_verify(joined(["a", "none", "b"], {"none": np.zeros((1, 0, 6, 6), f32)}, [0, 3], batch=1))
    assert [row.after for row in slimmed.layers] == [1, 1, 2]
    assert "none" not in {item.name for item in slimmed.model.graph.initializer}


def test_two_equal_maps_are_aliases_and_others_are_not() -> None:
    grid = dense(1, 3, 6, 6)
    grid[:, 1] = grid[:, 0]
    slimmed = slim_and_verify(joined(["a", "grid"], {"grid": grid}, list(range(6)), batch=1))
    assert slimmed.analysis.keep.kept["c", 1].sum() == 5
