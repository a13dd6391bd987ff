"""Lines of the family pool."""

from typing import Any

import numpy as np
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, label
from graph.small import analysis_of, copy_of, graph, kept, operators, run, slim_and_verify, weights
from prune2deploy.graph.normal import normalise

LINES: list[Line] = [
    ("MaxPool", ("x",), {"kernel_shape": [3, 3]}),
    ("MaxPool", ("x",), {"kernel_shape": [3, 3], "opset": 9}),
    ("MaxPool", ("x",), {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}),
    ("MaxPool", ("x",), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("MaxPool", ("x",), {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    ("MaxPool", ("x",), {"kernel_shape": [2, 2], "dilations": [2, 2], "pads": [1] * 4, "opset": 22}),
    ("MaxPool", ("x",), {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ("MaxPool", ("x",), {"kernel_shape": [3], "spatial": (7,)}),
    ("MaxPool", ("x",), {"kernel_shape": [2, 2, 3], "spatial": (3, 4, 5), "pads": [0, 1, 1, 0, 0, 1]}),
    ("MaxPool", ("x",), {"kernel_shape": [2, 2], "outputs": 2, "storage_order": 1}),
    # Between its taps there is the whole input, so a window may see nothing but padding.
    (
        "MaxPool",
        ("x",),
        {"kernel_shape": [2, 2], "dilations": [3, 1], "pads": [1, 0, 1, 0], "spatial": (2, 6)}
        | {"opaque": True, "removes": False},
    ),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3]}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "pads": [1] * 4}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1}),
    *(
        (
            "AveragePool",
            ("x",),
            {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": c, "pads": [1, 0, 1, 0]}
            | {"opset": opset, "spatial": (7, 8)},
        )
        for c in (0, 1)
        for opset in (11, 19, 22)
    ),
    ("AveragePool", ("x",), {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "count_include_pad": 1}),
    ("AveragePool", ("x",), {"kernel_shape": [2, 2], "auto_pad": "VALID", "opset": 9}),
    ("AveragePool", ("x",), {"kernel_shape": [2, 2], "dilations": [2, 3], "opset": 19}),
    ("AveragePool", ("x",), {"kernel_shape": [2, 2], "dilations": [2, 2], "pads": [1] * 4, "opset": 19}),
    ("AveragePool", ("x",), {"kernel_shape": [3], "pads": [1, 1], "spatial": (7,), "count_include_pad": 1}),
    ("AveragePool", ("x",), {"kernel_shape": [2, 1, 3], "spatial": (3, 4, 5)}),
    ("LpPool", ("x",), {"kernel_shape": [2, 2]}),
    ("LpPool", ("x",), {"kernel_shape": [3, 3], "p": 1, "opset": 9}),
    ("LpPool", ("x",), {"kernel_shape": [3, 3], "p": 3, "opset": 11, "strides": [2, 2]}),
    ("LpPool", ("x",), {"kernel_shape": [3, 3], "pads": [1] * 4}),
    ("LpPool", ("x",), {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "opset": 22}),
    ("LpPool", ("x",), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1, "spatial": (5, 7)}),
    ("LpPool", ("x",), {"kernel_shape": [2, 2], "dilations": [2, 2], "opset": 22}),
    ("GlobalAveragePool", ("x",), {}),
    ("GlobalAveragePool", ("x",), {"spatial": (5,), "opset": 22}),
    ("GlobalMaxPool", ("x",), {}),
    ("GlobalMaxPool", ("x",), {"spatial": (2, 3, 4), "opset": 22}),
    ("GlobalLpPool", ("x",), {}),
    ("GlobalLpPool", ("x",), {"p": 3, "spatial": (5,), "opset": 9}),
    ("GlobalLpPool", ("x",), {"p": 1, "batch": 2}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


def _pooled(outputs: list[str], read: list[str], *, size: Any) -> Any:
    weight = weights(4, 3, 1, 1, zero=(1,))
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("MaxPool", ["a"], outputs, kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "v"], ["y"]),
    ]
    return graph(nodes, {"w": weight, "v": weights(2, 4, 1, 1, seed=1)}, {"x": ["N", 3, size, size]}, read)


def test_places_of_the_maximum_count_over_all_channels_so_a_reader_keeps_them() -> None:
    assert kept(_pooled(["p", "places"], ["y", "places"], size=8), "a") == [True] * 4
    slim_and_verify(_pooled(["p", "places"], ["y", "places"], size=8))


def test_places_that_nobody_reads_keep_nothing() -> None:
    assert kept(_pooled(["p", "places"], ["y"], size="H"), "a") == [True, False, True, True]


def test_a_global_lp_pool_of_unknown_size_still_drops_zero_channels() -> None:
    nodes = [node("Conv", ["x", "w", "b"], ["a"]), node("GlobalLpPool", ["a"], ["p"]), node("Conv", ["p", "v"], ["y"])]
    constants = {
        "w": weights(4, 3, 1, 1, zero=(1, 2)),
        "b": np.array([0, 0, 0.7, 0], np.float32),
        "v": weights(2, 4, 1, 1, seed=1),
    }
    model = graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, ["y"])
    assert kept(model, "a") == [True, False, True, True]  # 0.7 times the square root of a size that is not known
    slim_and_verify(model)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_a_pool_over_positions_takes_them_together(op: str) -> None:
    """Channels in space, as in attention over tokens: their places stay, and the axis of channels is pruned."""
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]),
        node(op, ["t"], ["p"], kernel_shape=[2, 2]),
    ]
    model = graph(nodes, {"w": weights(4, 3, 1, 1, zero=(1,))}, {"x": [1, 3, 6, 6]}, ["p"])
    analysis = analysis_of(model)
    assert not analysis.known.opaque
    assert analysis.keep.removed == 0
    assert operators(slim_and_verify(model).model) == ["Conv", "Transpose", op]


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_channels_pass_a_pool_over_positions(op: str) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("MatMul", ["a", "nothing"], ["z"]),
        node("Add", ["a", "z"], ["m"]),
        node(op, ["m"], ["p"], kernel_shape=[2, 2], pads=[0, 1, 1, 0]),
        node("Conv", ["p", "v"], ["y"]),
    ]
    constants = {"w": weights(4, 3, 1, 1, zero=(1,)), "nothing": np.zeros((6, 6), np.float32)}
    constants |= {"v": weights(2, 4, 1, 1, seed=1)}
    model = graph(nodes, constants, {"x": ["N", 3, 6, 6]}, ["y"])
    assert analysis_of(model).known.view.facts["m"].shape == (1, 4, 1, 6)
    slimmed = slim_and_verify(model)
    assert not slimmed.opaque
    assert slimmed.layers[0].after == 3


@pytest.mark.parametrize("opset", [13, 18, 19, 22])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_a_window_that_would_start_in_the_padding_is_not_counted(op: str, opset: int) -> None:
    """Of 5 places, padded and taken two by two, runtimes make 3; onnx says 4 before opset 22."""
    w = weights(4, 3, 1, 1)
    w[1] = w[0]
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]),
        node(op, ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 0], ceil_mode=1),
        node("ReduceSum", ["p", "space"], ["s"]),
        node("Conv", ["s", "v"], ["y"]),
    ]
    constants = {"w": w, "b": np.array([0, 1, 0, 0], np.float32), "space": np.array([2, 3])}
    constants["v"] = weights(2, 4, 1, 1, seed=1)
    model = graph(nodes, constants, {"x": ["N", 3, 5, 5]}, {"y": ["N", 2, 1, 1]}, opset=opset)
    shapes = {tensor.name: tensor.shape for each in normalise(copy_of(model)).nodes for tensor in each.outputs}
    assert shapes["p"] == ["N", 4, 3, 3]
    slim_and_verify(model)


@pytest.mark.parametrize("outputs", [["c"], ["a", "b", "c"]])
@pytest.mark.parametrize("windows", [((3, 1, 2), (3, 1, 3), (2, 1, 2)), ((2, 1, 2), (3, 0, 2), (3, 1, 3))])
def test_pools_behind_one_another_count_their_windows_by_what_is_left(
    windows: tuple[tuple[int, int, int], ...], outputs: list[str]
) -> None:
    """The first that counts fewer than onnx does makes other sizes for the next; an output may be read on."""
    nodes = [
        node("MaxPool", [source], [made], kernel_shape=[k, k], pads=[p] * 4, strides=[s, s], ceil_mode=1)
        for (source, made), (k, p, s) in zip(("xa", "ab", "bc"), windows, strict=True)
    ]
    for size in (6, 8, 12, 13):
        model = graph(nodes, {}, {"x": ["N", 3, size, size]}, outputs)
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")  # as onnx infers them they are wrong
        shapes = {tensor.name: tensor.shape for each in normalise(copy_of(model)).nodes for tensor in each.outputs}
        made = run(model, {"x": np.zeros((1, 3, size, size), np.float32)})
        assert all(shapes[name] == ["N", *array.shape[1:]] for name, array in made.items())


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_what_a_pool_takes_together_stays_where_nothing_of_it_is_live(op: str) -> None:
    """A Concat could leave the pool out, but the Add beside it wants as many channels."""
    v = weights(2, 5, 1, 1)
    v[:, :2] = 0
    nodes = [
        node("Conv", ["x", "w1"], ["u"]),
        node("MatMul", ["u", "m"], ["t"]),
        node("Relu", ["t"], ["r"]),
        node(op, ["r"], ["p"], kernel_shape=[2, 1]),
        *(node("Conv", ["x", "w2"], ["s"]), node("MaxPool", ["s"], ["q"], kernel_shape=[2, 1])),
        node("Concat", ["p", "q"], ["c"], axis=1),
        *(node("Conv", ["x", "w3"], ["d0"]), node("MaxPool", ["d0"], ["d"], kernel_shape=[2, 1])),
        node("Add", ["c", "d"], ["e"]),
        *(node("Conv", ["e", "v"], ["y"]), node("Conv", ["d", "k"], ["z"])),
    ]
    constants = {"w1": weights(2, 3, 1, 1), "m": weights(6, 6), "w2": weights(3, 3, 1, 1, seed=3), "v": v}
    constants |= {"w3": weights(5, 3, 1, 1, seed=4), "k": weights(2, 5, 1, 1)}
    slim_and_verify(graph(nodes, constants, {"x": ["N", 3, "H", 6]}, ["y", "z"]))
