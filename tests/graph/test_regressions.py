"""Graphs that once broke the analysis or the rewrite, each with the behaviour that is right."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.helper import make_node as node

from graph.small import graph, operators, run, slim_and_verify, weights
from prune2deploy.graph.facts import channel_facts
from prune2deploy.graph.node import tables
from prune2deploy.graph.normal import normalise
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


def test_a_shape_that_is_given_out_keeps_all_sizes_whatever_else_is_read_of_it() -> None:
    constants = {"w": weights(4, 3, 3, 3, zero=DEAD), "v": weights(2, 4, 1, 1), "i": np.array([0, 2])}
    nodes = [
        node("Conv", ["x", "w"], ["a"], strides=[2, 2]),
        node("Shape", ["a"], ["s"]),
        node("Gather", ["s", "i"], ["g"]),
        node("Conv", ["a", "v"], ["y"]),
    ]
    outputs = {"y": ["N", 2, None, None], "s": [4], "g": [2]}
    types = {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT, "s": TensorProto.INT64, "g": TensorProto.INT64}
    slim_and_verify(graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, outputs, element=types))


def test_a_weight_that_is_given_out_stays_whole() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1)}
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Conv", ["a", "v"], ["y"])]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6], "w": [4, 3, 1, 1]}))
    assert slimmed.removed_channels == 2


def test_a_weight_that_a_branch_reads_too_stays_whole_there() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1), "zero": np.float32(0)}
    bodies = {
        name: helper.make_graph(
            [node("Conv", ["x", "w"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4, 6, 6])],
        )
        for name in ("then_branch", "else_branch")
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["a", "v"], ["y"]),
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["positive"]),
        node("If", ["positive"], ["z"], **bodies),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6], "z": ["N", 4, 6, 6]}))
    assert slimmed.removed_channels == 2


NAMED = ["N", 4, "H", "W"]  # what exporters call the sizes of an output, after those of the input


def test_an_output_that_is_constant_has_its_own_size_not_the_input_s_of_that_name() -> None:
    constants = {"w": np.zeros((4, 3, 3, 3), np.float32), "b": weights(4)}
    nodes = [node("Conv", ["x", "w", "b"], ["y"], strides=[2, 2])]
    slim_and_verify(graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, {"y": NAMED}))


def test_sizes_read_of_an_output_are_its_own_not_the_input_s_of_that_name() -> None:
    constants = {"w": weights(4, 3, 3, 3), "v": weights(4, 3, 1, 1), "u": weights(4, 4, 1, 1, zero=DEAD)}
    constants |= {"space": np.array([2, 3])}
    nodes = [
        node("Conv", ["x", "w"], ["p"], strides=[2, 2]),
        node("Shape", ["p"], ["shape"]),
        node("Gather", ["shape", "space"], ["sizes"]),
        node("Conv", ["x", "v"], ["q"]),
        node("Resize", ["q", "", "", "sizes"], ["r"], axes=[2, 3]),
        node("Add", ["r", "p"], ["s"]),
        node("Conv", ["s", "u"], ["y"]),
    ]
    slim_and_verify(graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, {"y": ["N", 4, None, None], "p": NAMED}))


@pytest.mark.parametrize("size", [6, "H"])
@pytest.mark.parametrize("between", [[], ["Floor"]])
def test_one_and_a_half_times_a_size_is_computed_in_floats(size: int | str, between: list[str]) -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1), "factor": np.float32(1.5)}
    constants |= {"second": np.array([2])}
    chain = ["size", *(f"size_{op}" for op in ("Cast", "Mul", *between)), "new"]
    ops = [("Cast", {"to": TensorProto.FLOAT}), ("Mul", {}), *((op, {}) for op in between)]
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Shape", ["a"], ["shape"]),
        node("Gather", ["shape", "second"], ["size"]),
        *(
            node(op, [before, "factor"] if op == "Mul" else [before], [after], **attributes)
            for (op, attributes), before, after in zip(ops, chain, chain[1:], strict=False)
        ),
        node("Cast", [chain[-2]], ["new"], to=TensorProto.INT64),
        node("Resize", ["a", "", "", "new"], ["r"], axes=[2]),
        node("Conv", ["r", "v"], ["y"]),
    ]
    slim_and_verify(graph(nodes, constants, {"x": ["N", 3, size, 6]}, {"y": ["N", 2, None, 6]}))


def test_half_of_an_integer_that_is_no_size_is_computed_in_floats() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1), "half": np.float32(0.5)}
    nodes = [
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "half"], ["h"]),
        node("Cast", ["h"], ["r"], to=TensorProto.INT32),
        node("Shape", ["x"], ["s"]),  # sizes are folded only where there are some
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["a", "v"], ["y"]),
    ]
    types = {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT, "i": TensorProto.INT32, "r": TensorProto.INT32}
    outputs = {"y": ["N", 2, 6, 6], "r": [5], "s": [4]}
    slim_and_verify(graph(nodes, constants, {"x": IMAGE, "i": [5]}, outputs, element=types | {"s": TensorProto.INT64}))


def test_the_kept_indices_of_a_shared_weight_are_those_of_each_of_its_versions() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=(1,)), "v": weights(2, 4, 1, 1), "u": weights(2, 4, 1, 1)}
    constants["u"][:, 3] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["x", "w"], ["b"], strides=[2, 2]),
        node("Conv", ["a", "v"], ["y"]),
        node("Conv", ["b", "u"], ["z"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6], "z": ["N", 2, 3, 3]}))
    for tensor in slimmed.model.graph.initializer:
        for axis, indices in slimmed.kept["initializers"].get(tensor.name, {}).items():
            assert tensor.dims[int(axis)] == len(indices), (tensor.name, axis)
    assert slimmed.kept["initializers"]["w"] == {"0": [0, 2, 3]}


def test_an_output_whose_size_only_the_slim_graph_knows_is_no_difference() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1), "i": np.array([2])}
    constants |= {"front": np.array([0] * 6), "last": np.array([0])}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Shape", ["a"], ["shape"]),
        node("Gather", ["shape", "i"], ["size"]),
        node("Concat", ["front", "size", "last"], ["pads"], axis=0),
        node("Conv", ["a", "v"], ["b"]),
        node("Pad", ["b", "pads"], ["y"]),
    ]
    slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": [None] * 4}))


@pytest.mark.parametrize("batch", [2, "N"])
@pytest.mark.parametrize("take", [False, True])
def test_a_shape_of_some_axes_is_not_one_of_all(batch: int | str, take: bool) -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1), "last": np.array(1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Shape", ["a"], ["shape"], start=2),
        *([node("Gather", ["shape", "last"], ["size"])] if take else []),
        node("Cast", ["size" if take else "shape"], ["floats"], to=TensorProto.FLOAT),
        node("ReduceSum", ["floats"], ["sum"], keepdims=0),
        node("Div", ["a", "sum"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    slim_and_verify(graph(nodes, constants, {"x": [batch, 3, 6, 5]}, {"y": [batch, 2, 6, 5]}))


@pytest.mark.parametrize("batch", [1, "N"])
def test_sizes_that_a_branch_computes_are_left_to_it(batch: int | str) -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1), "zero": np.float32(0)}
    constants |= {"factor": np.float32(1.5), "last": np.array(1)}

    def body(name: str) -> onnx.GraphProto:
        nodes = [
            node("Shape", ["x"], [f"{name}_shape"], start=2),
            node("Gather", [f"{name}_shape", "last"], [f"{name}_size"]),
            node("Cast", [f"{name}_size"], [f"{name}_float"], to=TensorProto.FLOAT),
            node("Mul", [f"{name}_float", "factor"], [f"{name}_more"]),
            node("Cast", [f"{name}_more"], [name], to=TensorProto.INT64),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.INT64, [])])

    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["a", "v"], ["y"]),
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["positive"]),
        node("If", ["positive"], ["z"], then_branch=body("big"), else_branch=body("small")),
    ]
    types = {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT, "z": TensorProto.INT64}
    outputs = {"y": [batch, 2, 5, 5], "z": []}
    slim_and_verify(graph(nodes, constants, {"x": [batch, 3, 5, 5]}, outputs, element=types))
