"""Traps that broke other tools: each is one regression test."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.helper import make_node as node

from graph.small import graph, initializer, kept, operators, run, slim_and_verify, weights
from prune2deploy.graph.explain import explain
from prune2deploy.graph.model import load_model
from prune2deploy.graph.rewrite import remove_dead_channels
from prune2deploy.graph.verify import verify

IMAGE = ["N", 3, 6, 6]
DEAD = (1, 2)  # of four filters


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# --- shared initializers ----------------------------------------------------------------------------------------------


def test_a_weight_shared_by_two_convolutions_is_cloned_when_one_of_them_keeps_it_whole() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1)}
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Conv", ["a", "v"], ["y"]), node("Conv", ["x2", "w"], ["whole"])]
    outputs = {"y": ["N", 2, 6, 6], "whole": ["N", 4, 6, 6]}
    for order in ((0, 1, 2), (2, 0, 1)):
        model = graph([nodes[i] for i in order], constants, {"x": IMAGE, "x2": IMAGE}, outputs)
        slimmed = slim_and_verify(model)
        names = [tensor.name for tensor in slimmed.model.graph.initializer]
        assert len(names) == len(set(names))
        assert slimmed.removed_channels == 2


def test_a_weight_shared_by_two_convolutions_is_cloned_when_they_keep_different_rows() -> None:
    constants = {"w": weights(4, 3, 1, 1), "v": weights(2, 4, 1, 1), "u": weights(2, 4, 1, 1, seed=1)}
    constants["v"][:, 0] = 0
    constants["u"][:, [1, 2]] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["a", "v"], ["y"]),
        node("Conv", ["x2", "w"], ["b"]),
        node("Conv", ["b", "u"], ["z"]),
    ]
    outputs = {"y": ["N", 2, 6, 6], "z": ["N", 2, 6, 6]}
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE, "x2": IMAGE}, outputs))
    assert slimmed.removed_channels == 3


def test_a_weight_shared_by_two_convolutions_stays_shared_when_they_agree() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["x2", "w"], ["b"]),
        node("Add", ["a", "b"], ["s"]),
        node("Conv", ["s", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE, "x2": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert len(slimmed.model.graph.initializer) == 2


def test_a_shape_shared_by_two_reshapes_is_cloned_when_only_one_shrinks() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "shape": ints(0, 144), "m": weights(144, 3)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "shape"], ["flat"]),
        node("Gemm", ["flat", "m"], ["y"]),
        node("Reshape", ["x2", "shape"], ["z"]),
    ]
    outputs = {"y": ["N", 3], "z": ["N", 144]}
    for order in ((0, 1, 2, 3), (3, 0, 1, 2)):
        inputs = {"x": IMAGE, "x2": ["N", 4, 6, 6]}
        slimmed = slim_and_verify(graph([nodes[i] for i in order], constants, inputs, outputs))
        assert slimmed.removed_channels == 2


def test_pads_shared_by_two_shortcuts_are_cloned_when_only_one_changes() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=(0,)), "pads": ints(0, 1, 0, 0, 0, 1, 0, 0), "v": weights(2, 6, 1, 1)}
    constants["v"][:, 0] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Pad", ["a", "pads"], ["p"]),
        node("Conv", ["p", "v"], ["y"]),
        node("Pad", ["x2", "pads"], ["z"]),
    ]
    outputs = {"y": ["N", 2, 6, 6], "z": ["N", 6, 6, 6]}
    slim_and_verify(graph(nodes, constants, {"x": IMAGE, "x2": ["N", 4, 6, 6]}, outputs))


def test_one_convolution_used_twice_on_one_path() -> None:
    square = weights(4, 4, 1, 1, zero=DEAD)
    nodes = [
        node("Conv", ["x", "first"], ["a"]),
        node("Conv", ["a", "w"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "w"], ["d"]),
        node("Conv", ["d", "last"], ["y"]),
    ]
    constants = {"first": weights(4, 3, 1, 1, seed=1), "w": square, "last": weights(2, 4, 1, 1, seed=2)}
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    widths = [row.after for row in slimmed.layers]
    assert widths == [4, 2, 2, 2]


def test_an_initializer_that_a_subgraph_reads_keeps_its_size_there() -> None:
    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    then = helper.make_graph([node("Conv", ["x2", "w"], ["t"])], "then", [], [info("t")])
    other = helper.make_graph([node("Identity", ["x2"], ["e"])], "else", [], [info("e")])
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["a", "v"], ["y"]),
        node("ReduceSum", ["x2"], ["sum"], keepdims=0),
        node("Cast", ["sum"], ["which"], to=TensorProto.BOOL),
        node("If", ["which"], ["z"], then_branch=then, else_branch=other),
    ]
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1)}
    outputs = {"y": ["N", 2, 6, 6], "z": ["N", None, 6, 6]}
    assert slim_and_verify(graph(nodes, constants, {"x": IMAGE, "x2": IMAGE}, outputs)).removed_channels == 2


def test_a_value_that_a_subgraph_reads_is_live_and_may_be_bypassed() -> None:
    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    then = helper.make_graph([node("Relu", ["s"], ["t"])], "then", [], [info("t")])
    other = helper.make_graph([node("Identity", ["s"], ["e"])], "else", [], [info("e")])
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["x", "dead"], ["b"]),
        node("Add", ["a", "b"], ["s"]),
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Cast", ["sum"], ["which"], to=TensorProto.BOOL),
        node("If", ["which"], ["z"], then_branch=then, else_branch=other),
    ]
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "dead": np.zeros((4, 3, 1, 1), np.float32)}
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"z": ["N", 4, 6, 6]}))
    assert "Add" not in operators(slimmed.model)
    assert initializer(slimmed.model, "w").shape[0] == 4


# --- f(0) is not 0, and borders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Sigmoid", "Clip"])
@pytest.mark.parametrize("pad", [0, 1])
def test_a_zero_channel_behind_an_activation_with_f0_not_0_keeps_its_part(kind: str, pad: int) -> None:
    bounds = ["low", "high"] if kind == "Clip" else []
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 3, 3)}
    constants |= {"low": np.float32(0.1), "high": np.float32(6)} if bounds else {}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node(kind, ["a", *bounds], ["r"]),
        node("Conv", ["r", "v"], ["y"], pads=[pad] * 4),
    ]
    size = 4 + 2 * pad
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, size, size]}))
    assert slimmed.removed_channels == (1 if pad else 2), "under padding one constant channel stays"


def test_the_border_of_a_padded_convolution_is_right_where_a_constant_was_folded() -> None:
    constants = {
        "w": weights(4, 3, 1, 1, zero=DEAD),
        "b": np.array([0, 1, -3, 0], np.float32),
        "v": weights(2, 4, 3, 3),
    }
    nodes = [node("Conv", ["x", "w", "b"], ["a"]), node("Conv", ["a", "v"], ["y"], pads=[1] * 4)]
    model = graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})
    slimmed = slim_and_verify(model)
    feeds = {"x": np.zeros((1, 3, 6, 6), np.float32)}
    want, got = run(model, feeds)["y"], run(slimmed.model, feeds)["y"]
    assert np.abs(want[0, 0, 0, 0] - want[0, 0, 3, 3]) > 0.1, "the border differs from the inside"
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert slimmed.removed_channels == 1


@pytest.mark.parametrize("op", ["Softmax", "LayerNormalization", "LpNormalization", "LRN"])
def test_a_statistic_over_channels_keeps_them_all_and_is_named(op: str) -> None:
    extra = {
        "Softmax": {"axis": 1},
        "LayerNormalization": {"axis": 1},
        "LpNormalization": {"axis": 1},
        "LRN": {"size": 3},
    }
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1)}
    scale = {"scale": weights(4, 6, 6)} if op == "LayerNormalization" else {}
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="first"),
        node(op, ["a", *scale], ["s"], name="mix", **extra[op]),
        node("Conv", ["s", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants | scale, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert (slimmed.removed_channels, slimmed.opaque) == (0, {})
    (kept,) = explain(slimmed.analysis)[0].kept
    assert (kept.channels, kept.details["node"]) == (list(DEAD), "mix")


def test_a_mean_over_channels_lets_them_go_and_keeps_its_denominator() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "axes": ints(1)}
    nodes = [node("Conv", ["x", "w"], ["a"]), node("ReduceMean", ["a", "axes"], ["y"])]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 1, 6, 6]}))
    assert (slimmed.removed_channels, slimmed.opaque) == (2, {})


# --- groups, broadcasts, shapes ---------------------------------------------------------------------------------------


def test_a_grouped_convolution_keeps_equal_counts_per_group() -> None:
    constants = {"w": weights(8, 3, 1, 1, zero=(1, 2, 3, 7)), "g": weights(4, 4, 3, 3), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["a", "g"], ["b"], group=2),
        node("Conv", ["b", "v"], ["y"]),
    ]
    model = graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 4, 4]})
    assert slim_and_verify(model).removed_channels == 2
    mask = np.reshape(kept(model, "a"), (2, 4))
    assert mask.sum(axis=1).tolist() == [3, 3]


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_a_map_that_is_broadcast_over_the_channels_is_no_channel(op: str) -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "w1": weights(1, 3, 1, 1, seed=3), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["x", "w1"], ["map"]),
        node(op, ["a", "map"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert initializer(slimmed.model, "w1").shape == (1, 3, 1, 1)
    assert slimmed.removed_channels >= (2 if op == "Mul" else 0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (1, 1, 1, 1), (1, 1, 6), (6,)])
@pytest.mark.parametrize("op", ["Add", "Mul", "Sub"])
def test_a_scalar_or_a_row_is_not_sliced(op: str, shape: tuple[int, ...]) -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1), "c": np.full(shape, 0.5, np.float32)}
    constants["c"].ravel()[-1] = 0.75
    constants["v"][:, 2] = 0
    nodes = [node("Conv", ["x", "w"], ["a"]), node(op, ["a", "c"], ["b"]), node("Conv", ["b", "v"], ["y"])]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert slimmed.removed_channels >= 1
    assert all(
        initializer(slimmed.model, t.name).shape == shape for t in slimmed.model.graph.initializer if t.name == "c"
    )


@pytest.mark.parametrize("target", [(0, 144), (-1, 144), (0, -1)])
def test_a_baked_shape_is_rewritten_and_the_batch_stays_dynamic(target: tuple[int, ...]) -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "shape": ints(*target), "m": weights(144, 3)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "shape"], ["flat"]),
        node("Gemm", ["flat", "m"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 3]}))
    assert initializer(slimmed.model, "m").shape == (72, 3)
    batch = slimmed.model.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "N"


# --- real detectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nanodet_m_320", "ultraface_rfb_320", "yolox_nano"])
def test_a_real_detector_slims_loads_and_verifies(name: str, data_dir: Path) -> None:
    path = data_dir / "onnx" / f"{name}.onnx"
    slimmed = remove_dead_channels(load_model(path))
    verify(path, slimmed.model.SerializeToString())
