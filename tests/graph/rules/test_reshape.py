"""Lines of the family reshape, and shapes of which little is known."""

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, ints, label
from graph.small import analysis_of, graph, initializer, operators, parse, slim_and_verify, weights
from prune2deploy.graph.fact import Shape
from prune2deploy.graph.rules.reshape import MOST_POSITIONS, blocks

LINES: list[Line] = [
    ("Flatten", ("x",), {}),
    ("Flatten", ("x",), {"axis": -3}),
    ("Flatten", ("x",), {"axis": 2, "batch": 2}),
    ("Flatten", ("x",), {"axis": 0, "batch": 2}),
    ("Flatten", ("x",), {"axis": 2, "removes": False}),
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


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (("N", 6, "H", "W"), ("N", 6, None), [((0,), (0,)), ((1,), (1,)), ((2, 3), (2,))]),
        (("N", 6, "H", "W"), (None, 6, "L"), None),
        (("N", 6, "H", "W"), ("N", 2, 3, None), [((0,), (0,)), ((1,), (1, 2)), ((2, 3), (3,))]),
        (("N", "H", "W", 6), (None, 6), [((0, 1, 2), (0,)), ((3,), (1,))]),
        (("N", "H", "W", 6), (None, 4, 4, 6), [((0, 1, 2), (0, 1, 2)), ((3,), (3,))]),
        (("N", "L", 6), ("N", None, 2, 3), [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]),
        (("N", 6, None), ("N", 6), None),
        ((None, 6), (None, 2, 3), [((0,), (0,)), ((1,), (1, 2))]),
        ((None, 6), (2, None, 3), [((0, 1), (0, 1, 2))]),
    ],
)
def test_blocks_are_matched_from_both_ends(
    before: Shape, after: Shape, found: list[tuple[tuple[int, ...], tuple[int, ...]]] | None
) -> None:
    got = blocks(before, after)
    if found is None:  # all in one block, if any
        assert got is None or [(block.into, block.out) for block in got][-1][0] == tuple(range(len(before)))
    else:
        assert got is not None
        assert [(block.into, block.out) for block in got] == found


def test_a_detection_head_of_open_height_and_width() -> None:
    constants = {
        "w": weights(6, 3, 1, 1, zero=(1, 4)),
        "shape": ints(0, 6, -1),
        "v": weights(6, 2),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "shape"], ["b"]),
        node("Transpose", ["b"], ["c"], perm=[0, 2, 1]),
        node("MatMul", ["c", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, {"y": ["N", None, 2]}))
    assert slimmed.removed_channels == 2
    assert initializer(slimmed.model, "shape").tolist() == [0, 4, -1]


def test_flatten_after_pruning_keeps_an_open_batch() -> None:
    for shape in (ints(0, 144), ints(-1, 144), ints(0, -1)):
        constants = {"w": weights(4, 3, 1, 1, zero=(0, 2)), "shape": shape, "m": weights(144, 3)}
        nodes = [
            node("Conv", ["x", "w"], ["a"]),
            node("Reshape", ["a", "shape"], ["b"]),
            node("Gemm", ["b", "m"], ["y"]),
        ]
        slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 3]}))
        assert slimmed.removed_channels == 2
        assert initializer(slimmed.model, "shape").tolist() == [shape[0], 72]


def test_a_shape_that_is_computed_is_written_down() -> None:
    """As exporters write ``x.view(x.size(0), -1)``."""
    constants = {"w": weights(4, 3, 1, 1, zero=(0, 2)), "zero": np.array(0), "at": ints(0), "rest": ints(-1)}
    constants["m"] = weights(144, 3)
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Shape", ["a"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Unsqueeze", ["n", "at"], ["n1"]),
        node("Concat", ["n1", "rest"], ["shape"], axis=0),
        node("Reshape", ["a", "shape"], ["b"]),
        node("Gemm", ["b", "m"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 3]}))
    assert slimmed.removed_channels == 2
    assert operators(slimmed.model) == ["Conv", "Reshape", "Gemm"]


def test_a_shape_that_only_the_user_knows_keeps_the_channels() -> None:
    model = parse(
        "agraph (float[N,3,6,6] x, int64[4] shape) => (float[N,4,I,J] y)"
        "{ a = Conv(x, w) b = Reshape(a, shape) y = Relu(b) }",
        w=weights(4, 3, 1, 1, zero=(0, 2)),
    )
    analysis = analysis_of(model)
    assert analysis.keep.removed == 0


def test_a_zero_that_copies_a_size_that_shrinks_is_written_out() -> None:
    """The third entry copies 4 channels' worth of another axis, which stays as it is."""
    constants = {"w": weights(6, 3, 1, 1, zero=(1,)), "shape": ints(2, 0, 6, 6), "v": weights(2, 6, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "shape"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": [2, 3, 6, 6]}, {"y": [2, 2, 6, 6]}))
    assert slimmed.removed_channels == 1


def test_heads_of_an_attention_with_an_open_length_keep_a_rectangle() -> None:
    constants = {"w": weights(3, 6), "heads": ints(0, -1, 2, 3), "v": weights(3, 2), "flat": ints(0, -1, 4)}
    constants["v"][1] = 0  # the second of three in each head is not read
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Reshape", ["a", "heads"], ["b"]),
        node("MatMul", ["b", "v"], ["c"]),
        node("Reshape", ["c", "flat"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", "L", 3]}, {"y": ["N", "L", 4]}))
    assert initializer(slimmed.model, "w").shape == (3, 4)
    assert initializer(slimmed.model, "heads").tolist() == [0, -1, 2, 2]


def flattened(channels: int, size: int) -> onnx.ModelProto:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Flatten", ["a"], ["f"]), node("Relu", ["f"], ["y"])]
    constants = {"w": weights(channels, 3, 1, 1, zero=(1,))}
    return graph(nodes, constants, {"x": ["N", 3, size, size]}, {"y": ["N", channels * size**2]})


def test_a_map_of_a_hundred_thousand_places_is_flattened() -> None:
    fact = analysis_of(flattened(2, 224)).known.view.facts["f"]
    assert fact.shape == (1, 2 * 224**2)
    assert fact.constant.ravel().tolist() == [False] * 224**2 + [True] * 224**2


def test_a_map_of_millions_of_places_is_not_taken_apart() -> None:
    analysis = analysis_of(flattened(2, 1024))
    (reason,) = analysis.known.opaque.values()
    assert reason == "it merges channels with space into 2,097,152 positions, more than 1,048,576"
    assert analysis.known.view.facts["f"].shape == (1, 1)
    assert MOST_POSITIONS == 2**20


def test_a_large_map_whose_channels_stay_apart_is_no_matter() -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Reshape", ["a", "shape"], ["y"])]
    constants = {"w": weights(2, 3, 1, 1, zero=(1,)), "shape": ints(0, 2, -1)}
    analysis = analysis_of(graph(nodes, constants, {"x": ["N", 3, 2048, 2048]}, ["y"]))
    assert analysis.known.view.facts["y"].shape == (1, 2, 1)


def with_heads(
    w: np.ndarray, v: np.ndarray, *, inside: list[onnx.NodeProto], batch: str | int = "N"
) -> onnx.ModelProto:
    """Return three heads of four channels that are taken into the batch, nodes from ``h`` to ``t``, and back."""
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "apart"], ["h"]),
        *inside,
        node("Reshape", ["t", "together"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    constants = {"w": w, "v": v, "apart": ints(-1, 4, 36), "together": ints(-1, 12, 6, 6)}
    return graph(nodes, constants, {"x": [batch, 3, 6, 6]}, {"y": [batch, 2, 6, 6]})


ATTENTION = [
    node("Transpose", ["h"], ["q"], perm=[0, 2, 1]),
    node("MatMul", ["q", "h"], ["s"]),
    node("Softmax", ["s"], ["p"], axis=-1),
    node("MatMul", ["h", "p"], ["t"]),
]


@pytest.mark.parametrize("inside", [[node("Relu", ["h"], ["t"])], ATTENTION], ids=["relu", "attention"])
def test_a_place_that_is_dead_in_every_head_leaves_the_batch_as_it_is(inside: list[onnx.NodeProto]) -> None:
    slimmed = slim_and_verify(with_heads(weights(12, 3, 1, 1, zero=(1, 5, 9)), weights(2, 12, 1, 1), inside=inside))
    assert not slimmed.opaque
    assert slimmed.layers[0].after == 9
    assert initializer(slimmed.model, "apart").tolist() == [-1, 3, 36]
    assert initializer(slimmed.model, "together").tolist() == [-1, 9, 6, 6]


@pytest.mark.parametrize("zero", [(1, 5), (0, 1, 2, 3), (1, 6, 11)])
def test_a_place_that_lives_in_one_head_stays_in_all(zero: tuple[int, ...]) -> None:
    slimmed = slim_and_verify(with_heads(weights(12, 3, 1, 1, zero=zero), weights(2, 12, 1, 1), inside=ATTENTION))
    assert not slimmed.opaque
    assert slimmed.layers[0].after == 12


def test_heads_are_told_apart_where_they_come_back() -> None:
    """Equal places of one head are equal in every head, and those of two heads are not."""
    w, v = weights(12, 3, 1, 1), weights(2, 12, 1, 1)
    w[[2, 6, 10]] = w[[1, 5, 9]]
    model = with_heads(w, v, inside=[node("Relu", ["h"], ["t"])])
    number = analysis_of(model).known.view.facts["b"].number.ravel()
    assert len(set(number.tolist())) == 9
    assert (number[[1, 5, 9]] == number[[2, 6, 10]]).all()
    assert slim_and_verify(model).layers[0].after == 9


def test_what_one_head_alone_reads_is_read_of_all() -> None:
    v = weights(2, 12, 1, 1)
    v[:, [0, 2, 3, 4, 6, 7, 8, 10, 11]] = 0  # of place 1
    v[:, [1, 5]] = 0
    slimmed = slim_and_verify(with_heads(weights(12, 3, 1, 1), v, inside=[node("Relu", ["h"], ["t"])]))
    assert slimmed.layers[0].after == 3


@pytest.mark.parametrize("zero", [(1, 5, 9), (0, 1, 2, 3), (1, 6, 11)])
@pytest.mark.parametrize(
    "shape", [(-1, 36), (-1, 6), (-1, 12, 36), (-1, 1, 4, 36), (-1, 2, 2, 36), (-1, 6, 2, 36), (-1, 432)]
)
def test_channels_in_any_part_of_a_batch_of_any_size_are_no_obstacle(
    shape: tuple[int, ...], zero: tuple[int, ...]
) -> None:
    model = with_heads(weights(12, 3, 1, 1, zero=zero), weights(2, 12, 1, 1), inside=[node("Relu", ["h"], ["t"])])
    model.graph.initializer[[each.name for each in model.graph.initializer].index("apart")].CopyFrom(
        onnx.numpy_helper.from_array(ints(*shape), "apart")
    )
    assert not slim_and_verify(model).opaque
