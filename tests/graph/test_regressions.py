"""Graphs that once broke the analysis or the rewrite, each with the behaviour that is right."""

import numpy as np
import pytest
from onnx import TensorProto
from onnx.helper import make_node as node

from graph.small import graph, operators, run, slim_and_verify, weights
from prune2deploy.graph.facts import channel_facts
from prune2deploy.graph.model import normalise
from prune2deploy.graph.node import tables
from prune2deploy.graph.rewrite import remove_dead_channels

IMAGE = ["N", 3, 6, 6]
DEAD = (1, 2)  # of four filters


def test_a_squeeze_without_axes_leaves_a_channel_axis_that_became_one() -> None:
    constants = {"w": weights(4, 3, 6, 6, zero=(1, 2, 3)), "m": weights(4, 3)}
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Squeeze", ["a"], ["s"]), node("Gemm", ["s", "m"], ["y"])]
    slim_and_verify(graph(nodes, constants, {"x": [2, 3, 6, 6]}, {"y": [2, 3]}))


def test_the_other_axes_of_a_matmul_whose_input_nobody_needs_keep_their_size() -> None:
    constants = {"w": weights(4, 3, 1, 1), "c": weights(4, 1, 1), "m": np.zeros((6, 2), np.float32)}
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Add", ["a", "c"], ["b"]), node("MatMul", ["b", "m"], ["y"])]
    slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 4, 6, 2]}))


def test_the_other_axes_of_a_convolution_whose_input_nobody_needs_keep_their_size() -> None:
    constants = {"w": weights(4, 3, 1, 1), "v": np.zeros((2, 6, 1, 1), np.float32)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]),
        node("Conv", ["t", "v"], ["y"]),
    ]
    slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 4]}))


def test_a_product_of_two_differences_that_cancel_is_zero() -> None:
    first, second = weights(2, 3, 1, 1), weights(2, 3, 1, 1, seed=1)
    constants = {"p": first, "p2": first.copy(), "q": second, "q2": second.copy()}
    constants |= {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1)}
    nodes = [
        *(node("Conv", ["x", name], [f"x{name}"]) for name in ("p", "p2", "q", "q2")),
        node("Sub", ["xp", "xp2"], ["a"]),  # 0, but each side of it may be gone
        node("Sub", ["xq", "xq2"], ["b"]),
        node("Mul", ["a", "b"], ["y"]),
        node("Softmax", ["xp2"], ["s"]),
        node("Softmax", ["xq2"], ["t"]),
        node("Conv", ["x", "w"], ["c"]),  # something to remove
        node("Conv", ["c", "v"], ["z"]),
    ]
    slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {name: ["N", 2, 6, 6] for name in "ystz"}))


def test_aliases_whose_sum_overflows_half_precision_are_not_merged() -> None:
    half = np.float16
    constants = {"w": np.stack([weights(3, 1, 1)] * 2).astype(half), "v": np.full((1, 2, 1, 1), 40000, half)}
    constants["s"] = half(1e-3)
    nodes = [node("Mul", ["x", "s"], ["small"]), node("Conv", ["small", "w"], ["a"]), node("Conv", ["a", "v"], ["y"])]
    model = graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 1, 6, 6]}, element=TensorProto.FLOAT16)
    slim_and_verify(model)


def test_a_dropout_in_training_mode_is_opaque() -> None:
    constants = {"w": weights(4, 3, 1, 1), "ratio": np.float32(0.5), "training": np.array(True)}
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Dropout", ["a", "ratio", "training"], ["y"])]
    table = tables(normalise(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 4, 6, 6]})))
    rules = {n.op_type: rule for n, rule in zip(table.nodes, channel_facts(table).rules, strict=True)}
    assert rules["Dropout"] is None


def test_a_constant_passes_a_cast_to_bfloat16_rounded() -> None:
    bias = np.array([0, 0.3, 0, 0], np.float32)
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "b": bias, "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]),
        node("Cast", ["a"], ["h"], to=TensorProto.BFLOAT16),
        node("Cast", ["h"], ["f"], to=TensorProto.FLOAT),
        node("Conv", ["f", "v"], ["y"]),
    ]
    model = graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})
    feeds = {"x": np.zeros((1, 3, 6, 6), np.float32)}
    slim = remove_dead_channels(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})).model
    np.testing.assert_allclose(run(slim, feeds)["y"], run(model, feeds)["y"], rtol=1e-5)


@pytest.mark.parametrize("op", ["RandomNormalLike", "RandomNormal"])
def test_a_random_operator_is_not_folded_into_a_constant(op: str) -> None:
    constants = {"c": weights(3, 1, 1), "k": weights(3, 1, 1)}
    source = node(op, ["c"], ["r"]) if op == "RandomNormalLike" else node(op, [], ["r"], shape=[3, 1, 1])
    nodes = [source, node("Relu", ["k"], ["k2"]), node("Mul", ["x", "k2"], ["z"]), node("Add", ["z", "r"], ["y"])]
    slim = remove_dead_channels(graph(nodes, constants, {"x": IMAGE}, {"y": IMAGE})).model
    assert op in operators(slim)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_a_graph_whose_inferred_sizes_contradict_its_weights_stays_as_it_is(op: str) -> None:
    # Before opset 22 onnx infers 3x3 here, where ONNX Runtime gives 2x2: the last window would lie in the padding.
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "m": weights(16, 3)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node(op, ["a"], ["p"], kernel_shape=[3, 3], strides=[3, 3], pads=[1] * 4, ceil_mode=1),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "m"], ["y"]),
    ]
    slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 5, 5]}, {"y": ["N", 3]}, opset=11))


def test_bfloat16_layers_are_slimmed_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    import ml_dtypes

    brief = ml_dtypes.bfloat16
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD).astype(brief), "v": weights(2, 4, 1, 1).astype(brief)}
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Conv", ["a", "v"], ["y"])]
    inputs, outputs = {"x": IMAGE}, {"y": ["N", 2, 6, 6]}
    model = graph(nodes, constants, inputs, outputs, opset=22, element=TensorProto.BFLOAT16)
    slimmed = remove_dead_channels(model)
    assert (slimmed.removed_channels, slimmed.opaque) == (2, {})
    assert {tensor.data_type for tensor in slimmed.model.graph.initializer} == {TensorProto.BFLOAT16}
    assert capfd.readouterr().out == ""
