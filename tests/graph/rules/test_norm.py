"""Lines of the family norm, and the blocks in which norms stand."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, dense, f32, ints, label
from graph.small import analysis_of, graph, initializer, kept, operators, slim_and_verify

GAPS = np.array([1, 0, 2, 1, 0, -1], f32)
UNIT = (np.array([1, 1, 2, 1, 1, -1], f32), np.zeros(6, f32))
NO = {"removes": False}

LINES: list[Line] = [
    ("InstanceNormalization", ("x", dense(6), dense(6)), {}),
    ("InstanceNormalization", ("z", dense(6), dense(6)), {"opset": 9, "epsilon": 0.1}),
    ("InstanceNormalization", ("x", GAPS, dense(6)), {"spatial": (5,)}),
    ("InstanceNormalization", ("x", *UNIT), {"spatial": (2, 3, 4), "batch": 2, "opset": 22}),
    ("InstanceNormalization", ("x", np.full(6, np.inf, f32), dense(6)), {"opaque": True, "removes": False}),
    # Over the last axis channels stay free; over channels all are read.
    ("LayerNormalization", ("x", dense(6), dense(6)), {}),
    ("LayerNormalization", ("x", dense(6)), {"spatial": (4, 6), "opset": 17, "axis": -1}),
    ("LayerNormalization", ("x", dense(6, 6), dense(6, 6)), {"axis": 2}),
    ("LayerNormalization", ("x", dense(1), dense(1)), {"axis": -2, "batch": 2}),
    ("LayerNormalization", ("x", dense(6, 1, 1)), {"axis": 1, **NO}),
    ("LayerNormalization", ("x", dense(6, 6, 6), dense(6, 1, 6)), {"axis": 1, **NO}),
    ("LayerNormalization", ("x", dense(6), dense(6)), {"spatial": (), **NO}),
    ("LayerNormalization", ("x", GAPS, dense(6)), {"spatial": (), "epsilon": 0.1, **NO}),
    ("LayerNormalization", ("x", GAPS, GAPS), {"axis": 0, "batch": 2, "spatial": (), **NO}),
    ("RMSNormalization", ("x", dense(6)), {"opset": 23}),
    ("RMSNormalization", ("x", dense(6, 1)), {"opset": 23, "axis": 2}),
    ("RMSNormalization", ("x", GAPS), {"opset": 23, "spatial": (), **NO}),
    ("RMSNormalization", ("x", dense(6, 1, 1)), {"opset": 23, "axis": 1, **NO}),
    ("LpNormalization", ("x",), {}),
    ("LpNormalization", ("x",), {"p": 1, "axis": 2, "opset": 9}),
    ("LpNormalization", ("x",), {"axis": 1, **NO}),
    ("LpNormalization", ("x",), {"axis": -3, "p": 1, "opset": 22, **NO}),
    ("LRN", ("x",), {"size": 3, **NO}),
    ("LRN", ("z",), {"size": 5, "alpha": 0.5, "beta": 0.5, "bias": 2.0, **NO}),
    ("LRN", ("z",), {"size": 1, "alpha": 1.0, **NO}),
    ("GroupNormalization", ("x", dense(6), dense(6)), {"num_groups": 2, "opset": 21}),
    ("GroupNormalization", ("x", GAPS, dense(6)), {"num_groups": 3, "opset": 21}),
    ("GroupNormalization", ("z", dense(6), dense(6)), {"num_groups": 6, "opset": 21, "spatial": (5,)}),
    ("GroupNormalization", ("z", dense(6), dense(6)), {"num_groups": 1, "opset": 22, "batch": 2, **NO}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


TESTED_BY_OTHER_MEANS = ("MeanVarianceNormalization",)


def planted(channels: int, *dead: int, inputs: int = 3) -> dict[str, Any]:
    """Return the weights of a pointwise convolution ``w`` with zero rows, and of a reader ``v`` of all its rows."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((channels, inputs, 1, 1)).astype(f32)
    weight[list(dead)] = 0
    return {"w": weight, "v": random.standard_normal((2, channels, 1, 1)).astype(f32)}


OVER_CHANNELS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], int]] = {
    "LayerNormalization": (
        [
            node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]),
            node("LayerNormalization", ["t", "g", "b"], ["l"]),
            node("Transpose", ["l"], ["n"], perm=[0, 3, 1, 2]),
        ],
        {"g": dense(6), "b": dense(6)},
        18,
    ),
    "GroupNormalization": (
        [node("GroupNormalization", ["a", "g", "b"], ["n"], num_groups=2)],
        {"g": dense(6), "b": dense(6)},
        21,
    ),
    "Softmax": ([node("Softmax", ["a"], ["n"], axis=1)], {}, 18),
    "LogSoftmax": ([node("LogSoftmax", ["a"], ["n"], axis=1)], {}, 12),
    "LRN": ([node("LRN", ["a"], ["n"], size=3)], {}, 18),
    "LpNormalization": ([node("LpNormalization", ["a"], ["n"], axis=1)], {}, 18),
    "CumSum": ([node("CumSum", ["a", "one"], ["n"])], {"one": np.int64(1)}, 18),
    "mean and variance by hand": (
        [
            node("ReduceMean", ["a", "one"], ["m"]),
            node("Sub", ["a", "m"], ["d"]),
            node("Mul", ["d", "d"], ["d2"]),
            node("ReduceMean", ["d2", "one"], ["var"]),
            node("Add", ["var", "eps"], ["safe"]),
            node("Sqrt", ["safe"], ["std"]),
            node("Div", ["d", "std"], ["n"]),
        ],
        {"one": ints(1), "eps": f32(1e-3)},
        18,
    ),
}


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_dead_channels_under_a_norm_over_channels_are_kept(name: str) -> None:
    nodes, constants, opset = OVER_CHANNELS[name]
    whole = [node("Conv", ["x", "w"], ["a"]), *nodes, node("Conv", ["n", "v"], ["y"])]
    model = graph(whole, planted(6, 1, 4) | constants, {"x": ["N", 3, 5, 5]}, ["y"], opset=opset)
    assert kept(model, "a") == [True] * 6
    slim_and_verify(model)


ACTIVATIONS = {
    "Gelu": [node("Gelu", ["h"], ["e"])],
    "SiLU": [node("Sigmoid", ["h"], ["s"]), node("Mul", ["h", "s"], ["e"])],
}


def convnext(expansion: int, *dead: int, activation: str = "SiLU") -> onnx.ModelProto:
    """Return one ConvNeXt block after a stem; ``dead`` hidden units are zeroed."""
    random = np.random.default_rng(0)
    width = 4
    hidden = random.standard_normal((width, expansion)).astype(f32)
    hidden[:, list(dead)] = 0
    bias = random.standard_normal(expansion).astype(f32)
    bias[list(dead)] = 0
    nodes = [
        node("Conv", ["x", "stem"], ["a"]),
        node("Conv", ["a", "dw"], ["d"], group=width, pads=[3] * 4),
        node("Transpose", ["d"], ["t"], perm=[0, 2, 3, 1]),
        node("LayerNormalization", ["t", "g", "b"], ["l"]),
        node("MatMul", ["l", "up"], ["u"]),
        node("Add", ["u", "up_b"], ["h"]),
        *ACTIVATIONS[activation],
        node("MatMul", ["e", "down"], ["o"]),
        node("Mul", ["o", "layer_scale"], ["f"]),
        node("Transpose", ["f"], ["r"], perm=[0, 3, 1, 2]),
        node("Add", ["a", "r"], ["y"]),
    ]
    constants = {"stem": planted(width)["w"], "dw": dense(width, 1, 7, 7), "g": dense(width), "b": dense(width)}
    constants |= {"up": hidden, "up_b": bias, "down": dense(expansion, width), "layer_scale": dense(width)}
    return graph(nodes, constants, {"x": ["N", 3, 8, 8]}, ["y"], opset=20)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_convnext_block_slims_its_hidden_width(activation: str) -> None:
    model = convnext(8, 1, 2, 6, activation=activation)
    slimmed = slim_and_verify(model)
    assert initializer(slimmed.model, "up").shape == (4, 5)
    assert initializer(slimmed.model, "down").shape == (5, 4)
    assert kept(model, "l", axis=3) == [True] * 4


def test_a_norm_without_scale_on_a_channel_is_its_bias_for_the_reader() -> None:
    """The channel itself stays, for the others' mean; the reader's column folds into its bias."""
    nodes = [node("LayerNormalization", ["x", "g", "b"], ["n"]), node("MatMul", ["n", "v"], ["y"])]
    constants = {"g": GAPS, "b": dense(6), "v": dense(6, 2)}
    model = graph(nodes, constants, {"x": ["N", 6]}, ["y"])
    fact = analysis_of(model).known.view.facts["n"]
    assert fact.constant.tolist() == [[False, True, False, False, True, False]]
    np.testing.assert_allclose(fact.shift[fact.constant], constants["b"][[1, 4]])


def test_statistics_that_are_used_are_a_reason_to_decline() -> None:
    nodes = [node("LayerNormalization", ["x", "g"], ["n", "mean"]), node("Mul", ["n", "mean"], ["y"])]
    model = graph(nodes, {"g": GAPS}, {"x": ["N", 6]}, ["y"])
    assert list(analysis_of(model).known.opaque.values()) == ["its statistics are used"]


def test_instance_norm_gives_its_bias_for_zero_and_an_unknown_for_any_other_constant() -> None:
    constants = planted(4, 1, 2) | {"wb": np.array([0, 0, 0.7, 0], f32), "g": dense(4), "b": dense(4)}
    nodes = [node("Conv", ["x", "w", "wb"], ["a"]), node("InstanceNormalization", ["a", "g", "b"], ["n"])]
    model = graph([*nodes, node("Conv", ["n", "v"], ["y"])], constants, {"x": ["N", 3, 6, 6]}, ["y"])
    assert kept(model, "a") == [True, False, True, True]
    slimmed = slim_and_verify(model)
    np.testing.assert_array_equal(initializer(slimmed.model, "g"), constants["g"][[0, 2, 3]])


def group_norm(*dead: int, groups: int = 3, channels: int = 6) -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("GroupNormalization", ["a", "g", "b"], ["n"], num_groups=groups),
        node("Relu", ["n"], ["r"]),
        node("Conv", ["r", "v"], ["y"]),
    ]
    constants = planted(channels, *dead) | {"g": dense(channels), "b": dense(channels, seed=8)}
    constants["v"][:, list(dead)] = 0 if len(dead) > 2 else constants["v"][:, list(dead)]
    return graph(nodes, constants, {"x": ["N", 3, 5, 5]}, ["y"], opset=21)


def test_group_norm_loses_whole_groups_only() -> None:
    model = group_norm(2, 3)
    slimmed = slim_and_verify(model)
    assert kept(model, "a") == [True, True, False, False, True, True]
    norm = next(item for item in slimmed.model.graph.node if item.op_type == "GroupNormalization")
    assert onnx.helper.get_node_attr_value(norm, "num_groups") == 2
    assert initializer(slimmed.model, "g").shape == (4,)


@pytest.mark.parametrize("dead", [(1, 2), (0,), (0, 3, 4)])
def test_group_norm_keeps_a_group_with_one_live_channel(dead: tuple[int, ...]) -> None:
    assert kept(group_norm(*dead), "a") == [True] * 6
    slim_and_verify(group_norm(*dead))


def exported_group_norm(size: int | str, *dead: int) -> onnx.ModelProto:
    """Return what exporters write for GroupNorm: Reshape, InstanceNormalization over groups, Reshape, Mul, Add."""
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "by_group"], ["i"]),
        node("InstanceNormalization", ["i", "ones", "zeros"], ["j"]),
        node("Reshape", ["j", "by_channel"], ["k"]),
        node("Mul", ["k", "g"], ["m"]),
        node("Add", ["m", "b"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("Conv", ["r", "v"], ["y"]),
    ]
    constants = planted(6, *dead) | {"g": dense(6, 1, 1), "b": dense(6, 1, 1, seed=8)}
    constants |= {"ones": np.ones(3, f32), "zeros": np.zeros(3, f32), "by_group": ints(0, 3, -1)}
    if isinstance(size, str):
        nodes.insert(1, node("Shape", ["a"], ["by_channel"]))
    else:
        constants["by_channel"] = ints(0, 6, size, size)
    return graph(nodes, constants, {"x": ["N", 3, size, size]}, ["y"])


def test_exported_group_norm_loses_whole_groups_only() -> None:
    assert kept(exported_group_norm(5, 2, 3), "a") == [True, True, False, False, True, True]
    slimmed = slim_and_verify(exported_group_norm(5, 2, 3))
    assert initializer(slimmed.model, "ones").shape == (2,)
    assert kept(exported_group_norm(5, 1, 2), "a") == [True] * 6
    slim_and_verify(exported_group_norm(5, 1, 2))


def test_exported_group_norm_of_unknown_size_loses_whole_groups_only() -> None:
    model = exported_group_norm("H", 2, 3)
    assert kept(model, "a") == [True, True, False, False, True, True]
    slim_and_verify(model)
    assert all(kept(exported_group_norm("H", 1, 2), "a"))
    slim_and_verify(exported_group_norm("H", 1, 2))


def test_mean_variance_normalisation_by_channel_leaves_channels_free() -> None:
    nodes = [
        node("Conv", ["x", "w", "wb"], ["a"]),
        node("MeanVarianceNormalization", ["a"], ["n"], axes=[0, 2, 3]),
        node("Conv", ["n", "v"], ["y"]),
    ]
    constants = planted(4) | {"wb": np.zeros(4, f32)}
    constants["v"][:, [0, 2]] = 0
    model = graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6]}, opset=9)
    assert kept(model, "a") == [False, True, False, True]
    slim_and_verify(model)


def test_mean_variance_normalisation_over_channels_reads_them_all() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("MeanVarianceNormalization", ["a"], ["n"], axes=[1, 2, -1]),
        node("Conv", ["n", "v"], ["y"]),
    ]
    constants = planted(4, 1)
    constants["v"][:, [0]] = 0
    model = graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6]}, opset=9)
    assert kept(model, "a") == [True] * 4
    slim_and_verify(model)


def test_nothing_is_removed_twice() -> None:
    for model in (convnext(8, 1, 2), group_norm(2, 3), exported_group_norm(5, 2, 3)):
        once = slim_and_verify(model)
        assert slim_and_verify(once.model).analysis.keep.removed == 0
        assert operators(once.model) == operators(slim_and_verify(once.model).model)
