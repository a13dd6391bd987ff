"""Verify catches what differs, wherever it hides, and knows nothing of the rules."""

import ast
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.helper import make_node as node

import prune2deploy.graph.cases as cases_module
import prune2deploy.graph.verify as verify_module
from graph.small import copy_of, graph, weights
from prune2deploy.errors import InputError, VerifyError
from prune2deploy.graph.verify import verify

IMAGE = ["N", 3, 6, 6]


def padded(**changes: np.ndarray) -> onnx.ModelProto:
    """Return a padded convolution with a bias behind a BatchNormalization-like scale."""
    constants = {"s": weights(3, 1, 1, seed=2), "w": weights(4, 3, 3, 3), "b": weights(4, seed=1)} | changes
    nodes = [node("Mul", ["x", "s"], ["a"]), node("Conv", ["a", "w", "b"], ["y"], pads=[1] * 4)]
    return graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 4, 6, 6]})


def data(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString())


def test_a_graph_agrees_with_itself() -> None:
    result = verify(data(padded()), data(padded()))
    assert [output.difference for output in result.outputs] == [0.0]
    assert result.cases >= 3
    assert result.to_json()["rtol"] == 1e-4


def test_a_graph_agrees_with_itself_up_to_the_order_of_its_sums() -> None:
    order = np.random.default_rng(0).permutation(64)
    w, v = weights(64, 3, 3, 3), weights(8, 64, 3, 3)
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Conv", ["a", "v"], ["y"])]
    models = [
        graph(nodes, {"w": w[o], "v": v[:, o]}, {"x": IMAGE}, {"y": ["N", 8, 2, 2]}) for o in (np.arange(64), order)
    ]
    verify(data(models[0]), data(models[1]))


@pytest.mark.parametrize("channel", range(4))
def test_a_wrong_bias_is_caught(channel: int) -> None:
    bias = weights(4, seed=1)
    bias[channel] += 0.01
    with pytest.raises(VerifyError, match="output 'y' differs by"):
        verify(data(padded()), data(padded(b=bias)))


def test_an_error_on_the_border_alone_is_caught() -> None:
    # A constant channel of 1 under zero padding, once read and once folded into the bias: equal but on the border.
    w = weights(2, 1, 3, 3)
    nodes = [node("Conv", ["x", "zero", "one"], ["a"]), node("Conv", ["a", "w", "b"], ["y"], pads=[1] * 4)]
    zero = {"zero": np.zeros((1, 3, 1, 1), np.float32), "one": np.ones(1, np.float32)}
    right = graph(nodes, zero | {"w": w, "b": np.zeros(2, np.float32)}, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})
    folded = zero | {"w": np.zeros_like(w), "b": w.sum(axis=(1, 2, 3))}
    wrong = graph(nodes, folded, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})
    with pytest.raises(VerifyError):
        verify(data(right), data(wrong))


def test_an_error_in_a_small_channel_beside_a_large_one_is_caught() -> None:
    w = weights(4, 3, 3, 3)
    w[0] *= 300
    w[1] *= 0.5
    wrong = w.copy()
    wrong[1] *= 1.01
    with pytest.raises(VerifyError):
        verify(data(padded(w=w)), data(padded(w=wrong)))


def test_an_error_in_a_small_column_of_a_row_of_boxes_is_caught() -> None:
    scale = np.array([300, 300, 300, 300, 0.5], np.float32)
    nodes = [node("Reshape", ["x", "shape"], ["rows"]), node("Mul", ["rows", "s"], ["y"])]
    wrong = scale * np.array([1, 1, 1, 1, 1.01], np.float32)
    models = [
        graph(nodes, {"shape": np.array([0, 12, 5]), "s": s}, {"x": ["N", 60]}, {"y": ["N", 12, 5]})
        for s in (scale, wrong.astype(np.float32))
    ]
    with pytest.raises(VerifyError):
        verify(data(models[0]), data(models[1]))


def test_an_error_in_one_of_two_outputs_is_caught_and_named() -> None:
    nodes = [node("Relu", ["x"], ["fine"]), node("Mul", ["x", "s"], ["bad"])]
    models = [graph(nodes, {"s": np.float32(s)}, {"x": IMAGE}, {"fine": IMAGE, "bad": IMAGE}) for s in (1.0, 1.001)]
    with pytest.raises(VerifyError, match="'bad'"):
        verify(data(models[0]), data(models[1]))


def test_a_not_a_number_where_there_was_a_number_is_caught() -> None:
    models = [
        graph([node("Mul", ["x", "s"], ["y"])], {"s": np.float32(s)}, {"x": IMAGE}, {"y": IMAGE}) for s in (1, np.nan)
    ]
    with pytest.raises(VerifyError):
        verify(data(models[0]), data(models[1]))
    assert verify(data(models[1]), data(models[1])).not_numbers == ["y"]
    assert verify(data(models[0]), data(models[0])).not_numbers == []


def test_height_and_width_that_change_places_are_caught() -> None:
    """Both are dynamic: a graph that swaps them gives the same shapes wherever they are equal."""
    shape, swapped = ["N", 3, "H", "W"], ["N", 3, "A", "B"]
    models = [
        graph([node("Transpose", ["x"], ["y"], perm=perm)], {}, {"x": shape}, {"y": swapped})
        for perm in ([0, 1, 2, 3], [0, 1, 3, 2])
    ]
    with pytest.raises(VerifyError):
        verify(data(models[0]), data(models[1]))


def test_a_graph_that_wants_squares_is_verified_on_squares() -> None:
    nodes = [node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), node("Add", ["x", "t"], ["y"])]
    model = graph(nodes, {}, {"x": ["N", 3, "H", "W"]}, {"y": ["N", 3, None, None]})
    verify(data(model), data(model))


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_small_scores_beside_large_boxes_must_be_right(element: int) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    made = []
    for score in (1.0, 0.9):
        scale = np.array([900, 900, score], dtype)[:, None, None]
        made.append(graph([node("Mul", ["x", "s"], ["y"])], {"s": scale}, {"x": IMAGE}, {"y": IMAGE}, element=element))
    with pytest.raises(VerifyError):
        verify(data(made[0]), data(made[1]))


def test_what_only_large_inputs_show_is_caught() -> None:
    tops = [np.float32(top) for top in (200, 1000)]
    models = [graph([node("Clip", ["x", "", "t"], ["y"])], {"t": t}, {"x": IMAGE}, {"y": IMAGE}) for t in tops]
    with pytest.raises(VerifyError, match="large"):
        verify(data(models[0]), data(models[1]))


def test_outputs_that_are_zero_must_stay_zero() -> None:
    nodes = [node("Mul", ["x", "s"], ["y"])]
    models = [graph(nodes, {"s": np.float32(s)}, {"x": IMAGE}, {"y": IMAGE}) for s in (0, 1e-3)]
    with pytest.raises(VerifyError):
        verify(data(models[0]), data(models[1]))


def test_an_error_that_only_a_larger_batch_shows_is_caught() -> None:
    # Takes the first sample's mean in place of each sample's own: right for a batch of 1.
    own = [node("ReduceMean", ["x", "axes"], ["m"]), node("Sub", ["x", "m"], ["y"])]
    first = [
        node("Slice", ["x", "from", "to", "batch"], ["one"]),
        node("ReduceMean", ["one", "axes"], ["m"]),
        node("Sub", ["x", "m"], ["y"]),
    ]
    constants = {"axes": np.array([1, 2, 3])}
    slices = {"from": np.array([0]), "to": np.array([1]), "batch": np.array([0])}
    right = graph(own, constants, {"x": IMAGE}, {"y": IMAGE})
    with pytest.raises(VerifyError, match="batch 3"):
        verify(data(right), data(graph(first, constants | slices, {"x": IMAGE}, {"y": IMAGE})))


def test_an_extra_output_another_shape_or_another_name_is_caught() -> None:
    base = [node("Relu", ["x"], ["y"])]
    right = data(graph(base, {}, {"x": IMAGE}, {"y": IMAGE}))
    extra = graph([*base, node("Neg", ["x"], ["z"])], {}, {"x": IMAGE}, {"y": IMAGE, "z": IMAGE})
    static = graph(base, {}, {"x": [1, 3, 6, 6]}, {"y": [1, 3, 6, 6]})
    renamed = graph([node("Relu", ["x"], ["q"])], {}, {"x": IMAGE}, {"q": IMAGE})
    other_input = graph([node("Relu", ["i"], ["y"])], {}, {"i": IMAGE}, {"y": IMAGE})
    for wrong in (extra, static, renamed, other_input):
        with pytest.raises(VerifyError, match=r"the (inputs|outputs) differ"):
            verify(right, data(wrong))


def test_a_graph_that_the_checker_or_the_runtime_refuses_is_caught() -> None:
    right = padded()
    invalid = copy_of(right)
    invalid.graph.node[1].input[0] = "nowhere"
    with pytest.raises(VerifyError, match=r"not a valid ONNX graph|refuses"):
        verify(data(right), data(invalid))
    mismatched = copy_of(right)
    mismatched.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights(4, 5, 3, 3), "w"))
    with pytest.raises(VerifyError, match=r"ONNX Runtime|not a valid"):
        verify(data(right), data(mismatched))


def test_real_samples_are_run_and_must_be_complete() -> None:
    model = padded()
    samples = {"x": np.random.default_rng(0).standard_normal((5, 3, 6, 6)).astype(np.float32)}
    assert verify(data(model), data(model), samples=samples).cases == verify(data(model), data(model)).cases + 1
    with pytest.raises(InputError, match="lack the input 'x'"):
        verify(data(model), data(model), samples={})


def test_an_error_that_only_real_samples_show_is_caught() -> None:
    bounds = [
        graph([node("Clip", ["x", "", "top"], ["y"])], {"top": np.float32(t)}, {"x": IMAGE}, {"y": IMAGE})
        for t in (900, 990)
    ]
    verify(data(bounds[0]), data(bounds[1]))
    with pytest.raises(VerifyError, match="real samples"):
        verify(data(bounds[0]), data(bounds[1]), samples={"x": np.full((1, 3, 6, 6), 950, np.float32)})


def test_verify_knows_nothing_of_the_analysis() -> None:
    own = {"verify": {"prune2deploy.errors", "prune2deploy.graph.float32", "prune2deploy.graph.cases"}}
    own["cases"] = {"prune2deploy.errors"}
    for module in (verify_module, cases_module):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        imported = {name.name for item in ast.walk(tree) if isinstance(item, ast.Import) for name in item.names}
        imported |= {item.module or "" for item in ast.walk(tree) if isinstance(item, ast.ImportFrom)}
        expected = own[module.__name__.rpartition(".")[2]]
        assert {name for name in imported if name.startswith("prune2deploy")} == expected


def wavering(gain: float, slope: float = 1.0) -> tuple[bytes, bytes]:
    """Return two graphs that add up the same products in another order, the sine of which shows it the larger the gain.

    ``slope``: the second one's function differs by this factor.
    """
    weight = weights(64, 8)
    order = np.random.default_rng(1).permutation(64)
    made = []
    for first, used, factor in ((np.arange(64), weight, 1.0), (order, weight[order], slope)):
        nodes = [
            node("Gather", ["x", "order"], ["g"], axis=1),
            node("MatMul", ["g", "w"], ["m"]),
            node("Mul", ["m", "gain"], ["a"]),
            node("Sin", ["a"], ["b"]),
            node("Mul", ["b", "factor"], ["y"]),
        ]
        constants = {"order": first, "w": used, "gain": np.float32(gain), "factor": np.float32(factor)}
        made.append(data(graph(nodes, constants, {"x": ["N", 64]}, {"y": ["N", 8]})))
    return made[0], made[1]


def test_what_a_last_place_in_the_weights_moves_too_is_rounding_and_is_named() -> None:
    found = verify(*wavering(100.0))
    assert found.agrees
    assert "random, batch 3" in found.ill_conditioned
    assert verify(*wavering(1.0)).ill_conditioned == ["large, batch 1", "large, batch 3"]
    assert verify(*wavering(0.01)).ill_conditioned == []


def test_on_usual_inputs_no_more_than_a_hundredth_is_put_down_to_rounding() -> None:
    with pytest.raises(VerifyError, match="differs"):
        verify(*wavering(1e5))
    with pytest.raises(VerifyError, match="differs"):
        verify(*wavering(1.0, slope=1.002))


def test_a_reference_that_amplifies_rounding_without_bound_proves_nothing_and_is_refused() -> None:
    made = []
    for seed in (0, 9):
        nodes = [
            node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
            node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
            node("Mul", ["n", "k"], ["a"]),
            node("Sin", ["a"], ["y"]),
        ]
        constants = {name: np.abs(weights(4, seed=place)) + 0.5 for place, name in enumerate("sbmv", 2)}
        constants |= {"w": weights(4, 3, 3, 3, seed=seed), "k": np.float32(1e8)}
        made.append(data(graph(nodes, constants, {"x": IMAGE}, ["y"])))
    with pytest.raises(VerifyError, match="differs"):
        verify(made[0], made[1])


def test_an_error_beside_a_channel_that_proves_nothing_is_caught() -> None:
    """On large inputs alone: one channel amplifies rounding, in the other the graphs differ."""

    def build(half: bool, not_a_number: bool) -> bytes:
        nodes = [
            node("Conv", ["x", "w", "b"], ["c"]),
            node("Relu", ["c"], ["r"]),
            node("Split", ["r"], ["r0", "r1"], axis=1, num_outputs=2),
            node("Mul", ["r0", "gain"], ["g"]),
            node("Sin", ["g"], ["s"]),
            node("Neg", ["r0"], ["below"]),
            node("Sqrt", ["below"], ["root"]),
            node("Add", ["s", "root"], ["broken"]),
            node("Mul", ["r1", "factor"], ["f"]),
            node("Concat", ["broken" if not_a_number else "s", "f"], ["y"], axis=1),
        ]
        used = nodes if not_a_number else [one for one in nodes if one.output[0] not in ("below", "root", "broken")]
        constants = {"w": weights(2, 3, 1, 1), "b": np.full(2, -60, np.float32), "gain": np.float32(1e6)}
        constants |= {"factor": np.float32(0.5 if half else 1)}
        return data(graph(used, constants, {"x": ["N", 3, 8, 8]}, ["y"]))

    for half, not_a_number in ((True, False), (True, True), (False, True)):
        with pytest.raises(VerifyError, match="large"):
            verify(build(False, False), build(half, not_a_number))


def test_a_channel_of_maps_that_end_in_channels_is_not_hidden_by_the_others() -> None:
    rows = weights(4, 3, 1, 1)
    rows[0] *= 1000
    rows[1] *= 0.01
    lost = rows.copy()
    lost[1] = 0
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Transpose", ["c"], ["y"], perm=[0, 2, 3, 1])]
    made = [data(graph(nodes, {"w": array}, {"x": ["N", 3, 8, 8]}, ["y"])) for array in (rows, lost)]
    with pytest.raises(VerifyError, match="differs"):
        verify(made[0], made[1])


def test_sizes_that_rounding_can_move_end_in_one_line() -> None:
    """Weights that are factors of sizes are moved by a last place too: 128 becomes 127.99."""
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Shape", ["c"], ["s"], start=2),
        node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "two"], ["g"]),
        node("Floor", ["g"], ["h"]),
        node("Cast", ["h"], ["i"], to=TensorProto.INT64),
        node("Concat", ["front", "i"], ["sizes"], axis=0),
        node("Resize", ["c", "", "", "sizes"], ["y"], mode="nearest"),
    ]
    constants = {"two": np.array([2, 2], np.float32), "front": np.array([1, 2])}
    made = [
        data(graph(nodes, constants | {"w": factor * weights(2, 3, 1, 1)}, {"x": [1, 3, 8, 8]}, ["y"]))
        for factor in (np.float32(1), np.float32(1.01))
    ]
    with pytest.raises(VerifyError, match="differs"):
        verify(made[0], made[1])


def test_what_is_left_of_a_difference_of_equals_may_be_nothing() -> None:
    """The mean of x, x and x is x but for its last place, which another graph need not leave."""
    nodes = [node("Mean", ["x", "x", "x"], ["m"]), node("Sub", ["m", "x"], ["y"])]
    made = [data(graph(nodes, {}, {"x": IMAGE}, {"y": IMAGE}))]
    made.append(data(graph([node("Sub", ["x", "x"], ["y"])], {}, {"x": IMAGE}, {"y": IMAGE})))
    assert verify(made[0], made[1]).ill_conditioned
    made.append(
        data(
            graph(
                [node("Sub", ["x", "x"], ["z"]), node("Add", ["z", "tiny"], ["y"])],
                {"tiny": np.float32(1e-3)},
                {"x": IMAGE},
                {"y": IMAGE},
            )
        )
    )
    with pytest.raises(VerifyError, match="differs"):
        verify(made[0], made[2])


def test_a_constant_that_large_inputs_round_is_no_difference() -> None:
    """x + c - x is c but for the last places of x, and moving weights moves none of them."""
    add = [node("Conv", ["x", "w"], ["v"]), node("Add", ["v", "c"], ["a"]), node("Sub", ["a", "v"], ["y"])]
    zero = [node("Sub", ["v", "v"], ["z"]), node("Add", ["z", "c"], ["y"])]
    shapes = {"x": ["N", 1, 6, 6]}, {"y": ["N", 2, 6, 6]}
    constants = {"w": weights(2, 1, 1, 1) + 3, "c": np.full((1, 1, 1), 0.0456, np.float32)}
    made = [data(graph(nodes, constants, *shapes)) for nodes in (add, [add[0], *zero])]
    assert verify(made[0], made[1]).ill_conditioned == ["large, batch 1", "large, batch 3"]
    made.append(data(graph([add[0], *zero], constants | {"c": constants["c"] * np.float32(1.01)}, *shapes)))
    with pytest.raises(VerifyError, match="differs"):
        verify(made[0], made[2])


@pytest.mark.parametrize("wrong", [2e-4, 1.5e-4, 0.0])
def test_a_small_output_that_large_inputs_alone_reach_is_compared(wrong: float) -> None:
    made = []
    for height in (3e-4, wrong):
        nodes = [
            node("Conv", ["x", "w"], ["a"]),
            node("Sub", ["a", "far"], ["b"]),
            node("Clip", ["b", "low", "high"], ["c"]),
            node("Mul", ["c", "height"], ["y"]),
        ]
        constants = {name: np.float32(value) for name, value in (("far", 30), ("low", 0), ("high", 1))}
        constants |= {"w": weights(2, 3, 1, 1), "height": np.float32(height)}
        made.append(data(graph(nodes, constants, {"x": ["N", 3, 8, 8]}, ["y"])))
    with pytest.raises(VerifyError, match="differs"):
        verify(made[0], made[1])


def test_an_output_that_is_nothing_but_rounding_is_no_difference() -> None:
    """The mean of what a norm made has no value of its own: it is 0 but for the order of additions."""
    made = []
    for order in (np.arange(25), np.random.default_rng(0).permutation(25)):
        nodes = [
            node("Mul", ["x", "zero"], ["a"]),
            node("Add", ["a", "b"], ["c"]),
            node("Gather", ["c", "order"], ["g"], axis=1),
            node("LayerNormalization", ["g", "one"], ["n"]),
            node("ReduceMean", ["n", "axes"], ["y"], keepdims=1),
        ]
        constants = {"zero": np.zeros(25, np.float32), "b": weights(25), "order": order, "axes": np.array([1])}
        constants |= {"one": np.ones(25, np.float32)}
        made.append(data(graph(nodes, constants, {"x": ["N", 25]}, {"y": ["N", 1]})))
    assert verify(made[0], made[1]).ill_conditioned


def test_what_the_runtime_makes_of_successive_roundings_is_no_difference() -> None:
    """It joins two pairs of QuantizeLinear and DequantizeLinear of one scale into one of another scale."""
    made = []
    for height in (1.25, 1.3125):
        nodes = [
            node("Mul", ["x", "zero"], ["m"]),
            node("Add", ["m", "height"], ["a"]),
            node("QuantizeLinear", ["a", "scale", "seven"], ["q"]),
            node("DequantizeLinear", ["q", "scale", "seven"], ["b"]),
            node("QuantizeLinear", ["b", "scale", "none"], ["p"]),
            node("DequantizeLinear", ["p", "scale", "none"], ["y"]),
        ]
        constants = {"zero": np.zeros(4, np.float32), "height": np.float32(height), "scale": np.float32(0.0625)}
        constants |= {"seven": np.int8(7), "none": np.int8(0)}
        made.append(data(graph(nodes, constants, {"x": ["N", 4]}, {"y": ["N", 4]})))
    nodes = [node("Mul", ["x", "zero"], ["m"]), node("Add", ["m", "height"], ["y"])]
    constants = {"zero": np.zeros(4, np.float32), "height": np.float32(1.25)}
    made.append(data(graph(nodes, constants, {"x": ["N", 4]}, {"y": ["N", 4]})))
    assert verify(made[0], made[2]).ill_conditioned
    for others in ((0, 1), (1, 2)):
        with pytest.raises(VerifyError, match="differs"):
            verify(*(made[place] for place in others))


@pytest.mark.parametrize("element", [TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_types_without_kernels_are_compared_in_float32(element: int) -> None:
    made = []
    for slope in (1.0, 1.001):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
        weight = (slope * weights(2, 3, 3, 3)).astype(dtype)
        nodes = [node("Conv", ["x", "w"], ["y"])]
        made.append(graph(nodes, {"w": weight}, {"x": IMAGE}, {"y": ["N", 2, 4, 4]}, opset=22, element=element))
    assert verify(data(made[0]), data(made[0])).computed_in == "float32"
    if element == TensorProto.DOUBLE:  # a thousandth is less than bfloat16 can tell
        with pytest.raises(VerifyError, match="differs"):
            verify(data(made[0]), data(made[1]))
