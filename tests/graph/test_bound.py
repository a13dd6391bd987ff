"""The bound on what changed weights do: it holds for every input in the box, and single layers attain it."""

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.helper import make_node as node

from graph.random_graphs import PLAIN, models
from graph.small import copy_of, graph, run, weights
from prune2deploy.errors import InputError
from prune2deploy.graph.bound import Bound, output_bound, real_inputs
from prune2deploy.graph.bounds.curves import CURVES, GELU, GELU_TANH, MISH, RSQRT, SWISH, Curve, apply_curve, hard_swish
from prune2deploy.graph.bounds.interval import interval, largest_singular_value
from prune2deploy.graph.bounds.ranges import free, ranges, unknown
from prune2deploy.graph.bounds.rules import POWERS, RULES
from prune2deploy.graph.bounds.step import Step
from prune2deploy.graph.change import measured_change
from prune2deploy.graph.node import tables
from prune2deploy.graph.normal import normalise
from prune2deploy.graph.tolerance import zero_near_dead

SLACK = 3e-5
"""What float32 adds to a difference, relative to the largest output."""


def with_constants(model: onnx.ModelProto, **arrays: Any) -> onnx.ModelProto:
    """Return a copy in which some initializers hold other numbers."""
    changed = copy_of(model)
    for tensor in changed.graph.initializer:
        if tensor.name in arrays:
            old = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(arrays[tensor.name], old.dtype), tensor.name))
    return changed


def feeds_in(model: onnx.ModelProto, low: float, high: float, random: np.random.Generator) -> list[dict[str, Any]]:
    """Return inputs of the box: even, at its corners, and flat."""
    shapes = {
        value.name: [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim] for value in model.graph.input
    }
    makers = (
        lambda shape: random.uniform(low, high, shape),
        lambda shape: random.choice([low, high], shape),
        lambda shape: np.full(shape, low),
        lambda shape: np.full(shape, high),
    )
    return [{name: make(shape).astype(np.float32) for name, shape in shapes.items()} for make in makers]


def check_bound(
    before: onnx.ModelProto, after: onnx.ModelProto, low: float = -1.0, high: float = 1.0, seed: int = 0
) -> dict[str, Bound]:
    """Return the bounds, after holding them against what the two graphs give for inputs of the box."""
    names = [value.name for value in before.graph.input]
    bounds = output_bound(before, after, dict.fromkeys(names, (low, high)))
    for feeds in feeds_in(before, low, high, np.random.default_rng(seed)):
        want, got = run(before, feeds), run(after, feeds)
        for name, bound in bounds.items():
            values = np.asarray(want[name], dtype=np.float64)
            moved = np.abs(np.asarray(got[name], dtype=np.float64) - values)
            slack = SLACK * (np.abs(values).max(initial=0.0) + 1)
            assert moved.max(initial=0.0) <= bound.largest + slack, name
            assert values.min(initial=np.inf) >= bound.lowest - slack, name
            assert values.max(initial=-np.inf) <= bound.highest + slack, name
            if bound.channels is not None:
                axes = (0, *range(2, moved.ndim))
                assert (moved.max(axis=axes) <= bound.channels + slack).all(), name
    return bounds


def shifted(model: onnx.ModelProto, share: float, seed: int) -> onnx.ModelProto:
    """Return a copy with every third weight of float32 moved by a share of its tensor's largest."""
    random = np.random.default_rng(seed)
    arrays = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim > 1:
            step = random.standard_normal(array.shape) * (random.random(array.shape) < 0.3)
            arrays[tensor.name] = array + share * np.abs(array).max(initial=0.0) * step
    return with_constants(model, **arrays)


PROPERTY = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@PROPERTY
@given(models(families=PLAIN), st.sampled_from((1e-6, 1e-2, 0.3)), st.sampled_from(((-1.0, 1.0), (0.0, 3.0))))
def test_no_input_of_the_box_moves_an_output_further(
    model: onnx.ModelProto, share: float, box: tuple[float, float]
) -> None:
    note(onnx.printer.to_text(model))
    bounds = check_bound(model, shifted(model, share, 1), *box)
    assert all(np.isfinite(bound.largest) for bound in bounds.values())


@PROPERTY
@given(models(families=PLAIN), st.sampled_from((1e-3, 0.1, 0.5)))
def test_what_a_tolerance_zeroes_stays_within_the_bound(model: onnx.ModelProto, eps: float) -> None:
    zeroed = zero_near_dead(model, eps)
    bounds = check_bound(model, zeroed.model)
    if not zeroed.layers:
        assert all(bound.largest == 0 for bound in bounds.values())


def test_no_change_has_the_bound_0() -> None:
    constants = {"w": weights(4, 3, 3, 3), "v": weights(32, 4, seed=1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        node("Sigmoid", ["a"], ["b"]),
        node("GlobalAveragePool", ["b"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("Gemm", ["d", "v"], ["y"], transB=1),
    ]
    model = graph(nodes, constants, {"x": ["N", 3, 8, 8]}, ["y"])
    assert check_bound(model, model)["y"].largest == 0


# --- single layers attain it ------------------------------------------------------------------------------------------


def attained(before: onnx.ModelProto, after: onnx.ModelProto, change: np.ndarray, low: float, high: float) -> None:
    """Check that the corner input that the change of one output picks moves it by the bound of its channel."""
    bound = check_bound(before, after, low, high)["y"]
    values = np.asarray(change, dtype=np.float64)
    ends = [np.where(values > 0, high, low), np.where(values > 0, low, high)]
    corner = max(abs(float((values * end).sum())) for end in ends)
    assert bound.channels is not None
    assert corner <= bound.channels[0] <= corner * (1 + 1e-6)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 2.0), (-3.0, 1.0), (1.0, 5.0)])
def test_a_corner_of_the_box_attains_the_bound_of_a_convolution(low: float, high: float) -> None:
    weight, bias = weights(4, 3, 3, 3), weights(4, seed=1)
    model = graph([node("Conv", ["x", "w", "b"], ["y"])], {"w": weight, "b": bias}, {"x": [1, 3, 5, 5]}, ["y"])
    changed = weight.copy()
    changed[0] += 1e-3 * weights(3, 3, 3, seed=2)
    attained(model, with_constants(model, w=changed), changed[0].astype(float) - weight[0], low, high)


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_corner_of_the_box_attains_the_bound_of_a_linear_layer(transposed: int) -> None:
    weight = weights(5, 7) if transposed else weights(7, 5)
    model = graph(
        [node("Gemm", ["x", "w"], ["y"], transB=transposed, alpha=0.5)], {"w": weight}, {"x": ["N", 7]}, ["y"]
    )
    changed = weight.copy()
    row = np.index_exp[0] if transposed else np.index_exp[:, 0]
    changed[row] *= 0.5
    attained(model, with_constants(model, w=changed), 0.5 * (changed[row].astype(float) - weight[row]), -2.0, 1.0)


def test_a_changed_bias_moves_the_output_by_just_that() -> None:
    model = graph(
        [node("Conv", ["x", "w", "b"], ["y"])],
        {"w": weights(2, 3, 1, 1), "b": np.array([0.5, 1e-9], np.float32)},
        {"x": [1, 3, 4, 4]},
        ["y"],
    )
    bound = check_bound(model, with_constants(model, b=[0.5, 0.0]))["y"]
    assert bound.channels is not None
    assert bound.channels[0] == 0
    assert bound.channels[1] == pytest.approx(1e-9, rel=1e-6, abs=0)


def test_dead_channels_carry_no_change() -> None:
    """The next layer reads the changed channel with weight 0."""
    first, second = weights(2, 3, 1, 1), weights(2, 2, 1, 1, seed=1)
    second[:, 1] = 0
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("Conv", ["b", "v"], ["y"])]
    model = graph(nodes, {"w": first, "v": second}, {"x": [1, 3, 4, 4]}, ["y"])
    changed = first.copy()
    changed[1] = 0
    assert check_bound(model, with_constants(model, w=changed))["y"].largest == 0


def test_a_sigmoid_caps_what_a_large_change_can_do() -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Sigmoid", ["a"], ["y"])]
    model = graph(nodes, {"w": 1e6 * weights(2, 3, 1, 1)}, {"x": [1, 3, 4, 4]}, ["y"])
    bound = check_bound(model, with_constants(model, w=np.zeros((2, 3, 1, 1))))["y"].largest
    assert 0.5 <= bound <= 1 + 1e-9


def test_products_in_the_reference_of_tiny_numbers_do_not_vanish() -> None:
    """1e-40 times itself is no float32, and 0 in float64 after eight layers; the bound still says: not 0."""
    nodes = [node("Conv", [f"v{k}", "w"], [f"v{k + 1}"]) for k in range(10)]
    nodes.append(node("Conv", ["v10", "u"], ["y"]))
    constants = {"w": np.full((1, 1, 1, 1), 1e-38, np.float32), "u": np.ones((1, 1, 1, 1), np.float32)}
    model = graph(nodes, constants, {"v0": [1, 1, 2, 2]}, ["y"])
    assert output_bound(model, with_constants(model, u=np.zeros((1, 1, 1, 1))), {"v0": (0, 1)})["y"].largest > 0


# --- what has no bound ------------------------------------------------------------------------------------------------


def unknown_operator(*, before: bool) -> onnx.ModelProto:
    """Return Conv and Det in this order, or Det first."""
    if before:
        nodes = [node("Det", ["x"], ["a"]), node("Unsqueeze", ["a", "axes"], ["b"]), node("Conv", ["b", "w"], ["y"])]
        constants = {"axes": np.array([2, 3]), "w": weights(2, 3, 1, 1)}
    else:
        nodes = [node("Conv", ["x", "w"], ["a"]), node("Det", ["a"], ["y"])]
        constants = {"w": weights(2, 3, 1, 1)}
    return graph(nodes, constants, {"x": [1, 3, 4, 4]}, ["y"])


def test_an_operator_without_a_rule_is_named_as_the_end_of_the_bound() -> None:
    model = unknown_operator(before=False)
    model.graph.node[1].name = "where"
    bound = check_bound(model, with_constants(model, w=np.zeros((2, 3, 1, 1))))["y"]
    assert bound.largest == np.inf
    assert bound.unbounded_by == "where (Det)"
    assert bound.to_json() == {"largest": None, "lowest": None, "highest": None, "unbounded_by": "where (Det)"}


def test_an_operator_without_a_rule_keeps_equal_inputs_equal() -> None:
    model = unknown_operator(before=False)
    assert check_bound(model, model)["y"].largest == 0
    model = unknown_operator(before=True)
    assert check_bound(model, model)["y"].largest == 0
    halved = with_constants(model, w=weights(2, 3, 1, 1) / 2)
    assert check_bound(model, halved)["y"].largest == np.inf
    only_bias = with_constants(model, w=weights(2, 3, 1, 1))
    assert check_bound(model, only_bias)["y"].largest == 0


def test_random_operators_have_no_bound() -> None:
    nodes = [node("RandomNormal", [], ["r"], shape=[1, 3, 4, 4]), node("Add", ["x", "r"], ["y"])]
    model = graph(nodes, {}, {"x": [1, 3, 4, 4]}, ["y"])
    assert output_bound(model, model, {"x": (0, 1)})["y"].largest == np.inf


@pytest.mark.parametrize(
    ("given_ranges", "message"),
    [
        ({}, "no range is given for input 'x'"),
        ({"x": (0, 1), "z": (0, 1)}, "there is no input 'z'"),
        ({"x": (1, 0)}, "upside down"),
        ({"x": (0, np.inf)}, "not finite"),
        ({"x": (np.zeros(2), np.ones(2))}, "does not fit"),
    ],
)
def test_a_box_that_does_not_fit_is_refused(given_ranges: Any, message: str) -> None:
    model = graph([node("Relu", ["x"], ["y"])], {}, {"x": ["N", 3, 4, 4]}, ["y"])
    with pytest.raises(InputError, match=message):
        output_bound(model, model, given_ranges)


def test_dropout_in_training_has_no_bound() -> None:
    model = graph(
        [node("Dropout", ["x", "r", "t"], ["y"])],
        {"r": np.float32(0.5), "t": np.array(True)},
        {"x": [1, 3, 4, 4]},
        ["y"],
    )
    assert output_bound(model, model, {"x": (0, 1)})["y"].largest == np.inf


def test_the_measured_change_of_a_linear_layer_is_that_of_its_corners() -> None:
    weight = weights(2, 3, 1, 1)
    model = graph([node("Conv", ["x", "w"], ["y"])], {"w": weight}, {"x": ["N", 3, 4, 4]}, ["y"])
    changed = with_constants(model, w=weight + 0.25)
    low, high = np.array([-9.0, 0.0, -1.0]), np.array([9.0, 2.0, 1.0])
    assert measured_change(model, changed, {"x": (low, high)})["y"].largest == pytest.approx(3.0, rel=1e-5)
    assert output_bound(model, changed, {"x": (low, high)})["y"].largest == pytest.approx(3.0, rel=1e-5)
    assert measured_change(model, model, {"x": (-1, 1)})["y"].largest == 0
    with pytest.raises(InputError, match="ONNX Runtime cannot measure the change"):
        measured_change(model, changed, {"x": (-1, 1)}, shapes={"x": (1, 4, 4, 4)})


def test_a_box_per_channel_is_used_per_channel() -> None:
    weight = np.ones((1, 3, 1, 1), np.float32)
    model = graph([node("Conv", ["x", "w"], ["y"])], {"w": weight}, {"x": ["N", 3, 4, 4]}, ["y"])
    changed = with_constants(model, w=[[[[1]], [[0]], [[1]]]])
    low, high = np.array([-9.0, 0.0, -9.0]), np.array([9.0, 2.0, 9.0])
    assert output_bound(model, changed, {"x": (low, high)})["y"].largest == pytest.approx(2.0)


def test_a_gather_that_repeats_a_channel_counts_it_each_time() -> None:
    """The norm over the channels grows with repetition; the next layer adds them up."""
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Gather", ["a", "i"], ["b"], axis=1),
        node("Conv", ["b", "v"], ["y"]),
    ]
    constants = {"w": weights(2, 3, 1, 1), "i": np.zeros(16, np.int64), "v": np.ones((1, 16, 1, 1), np.float32)}
    model = graph(nodes, constants, {"x": [1, 3, 4, 4]}, ["y"])
    check_bound(model, with_constants(model, w=weights(2, 3, 1, 1) * 1.5))


def test_a_shape_does_not_move() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Shape", ["a"], ["s"]),
        node("Cast", ["s"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    model = graph(nodes, {"w": weights(2, 3, 1, 1)}, {"x": ["N", 3, "H", "W"]}, ["y"])
    changed = with_constants(model, w=weights(2, 3, 1, 1) * 2)
    assert output_bound(model, changed, {"x": (0, 1)})["y"].largest == 0


def test_a_layer_of_no_outputs_has_no_ends() -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Softmax", ["a"], ["y"], axis=-1)]
    model = graph(nodes, {"w": weights(4, 0)}, {"x": ["N", 4]}, {"y": ["N", 0]})
    assert output_bound(model, copy_of(model), {"x": (0, 1)})["y"].largest in (0, None)


def test_graphs_that_branch_have_no_bound() -> None:
    """What the graphs inside If read is not looked at."""
    then, other = (
        onnx.helper.make_graph(
            [node("Identity", [name], [f"{name}_out"])],
            name,
            [],
            [onnx.helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.FLOAT, [1, 2, 4, 4])],
        )
        for name in ("a", "b")
    )
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Greater", ["m", "zero"], ["c"]),
        node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    constants = {"w": weights(2, 3, 1, 1), "zero": np.float32(0)}
    model = graph(nodes, constants, {"x": [1, 3, 4, 4]}, {"y": [1, 2, 4, 4]})
    assert output_bound(model, with_constants(model, w=weights(2, 3, 1, 1) * 2), {"x": (0, 1)})["y"].largest == np.inf


@pytest.mark.parametrize("op", ["Greater", "Less"])
def test_a_choice_that_the_change_can_turn_takes_either_side(op: str) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node(op, ["a", "zero"], ["c"]),
        node("Where", ["c", "one", "a"], ["y"]),
    ]
    constants = {"w": weights(2, 3, 1, 1), "zero": np.float32(0), "one": np.float32(7)}
    model = graph(nodes, constants, {"x": [1, 3, 4, 4]}, ["y"])
    bound = check_bound(model, with_constants(model, w=-weights(2, 3, 1, 1)))["y"]
    assert 7 <= bound.largest < np.inf


def test_a_choice_by_element_is_as_long_as_both_sides_together() -> None:
    """Each side turns x, so is no longer than x; the larger element of each makes a vector that is longer."""
    half = np.sqrt(0.5)
    constants = {
        "w": np.array([[half, half], [half, -half]], np.float32),
        "v": np.array([[half, half], [-half, half]], np.float32),
        "sign": np.array([[1, -1]], np.float32),
        "zero": np.float32(0),
        "u": np.ones((2, 1), np.float32),
    }
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["x", "v"], ["b"]),
        node("Mul", ["x", "sign"], ["s"]),
        node("Greater", ["s", "zero"], ["c"]),
        node("Where", ["c", "a", "b"], ["z"]),
        node("MatMul", ["z", "u"], ["y"]),
    ]
    model = graph(nodes, constants, {"x": [1, 2]}, ["y"])
    bound = check_bound(model, with_constants(model, u=np.zeros((2, 1))))["y"].largest
    assert bound == pytest.approx(2 * np.sqrt(2), rel=1e-6)  # x = (1, 1) attains it


CHOICES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("Concat", ["a", "b"], {"axis": 2}),
    ("Pad", ["a", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), np.float32(0.6)], {}),
    (
        "Resize",
        ["a", np.array([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5], np.float32), "", np.array([1, 2, 8, 8], np.int64)],
        {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 0.6},
    ),
]


@pytest.mark.parametrize(("op", "inputs", "attributes"), CHOICES, ids=[choice[0] for choice in CHOICES])
def test_a_choice_by_place_holds_for_the_sum_of_its_channels(
    op: str, inputs: list[Any], attributes: dict[str, Any]
) -> None:
    half = np.sqrt(0.5)
    turn = np.array([[half, half], [half, -half]], np.float32)[:, :, None, None]
    constants: dict[str, Any] = {"w": turn, "v": turn[::-1].copy(), "u": np.ones((1, 2, 1, 1), np.float32)}
    names = []
    for slot, item in enumerate(inputs):
        names.append(item if isinstance(item, str) else f"k{slot}")
        constants |= {} if isinstance(item, str) else {f"k{slot}": item}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["x", "v"], ["b"]),
        node(op, names, ["z"], **attributes),
        node("Conv", ["z", "u"], ["y"]),
    ]
    model = graph(nodes[: 1 if op != "Concat" else 2] + nodes[2:], constants, {"x": [1, 2, 4, 4]}, ["y"])
    check_bound(model, with_constants(model, u=np.zeros((1, 2, 1, 1))))
    check_bound(model, with_constants(model, u=-np.ones((1, 2, 1, 1))))


def deep(layers: int) -> onnx.ModelProto:
    nodes, value = [], "x"
    for layer in range(layers):
        nodes.append(node("Conv", [value, "w0" if layer == 0 else "w"], [f"a{layer}"]))
        nodes.append(node("Concat", [f"a{layer}", f"a{layer}"], [f"b{layer}"], axis=1))
        value = f"b{layer}"
    nodes.append(node("Sigmoid", [value], ["y"]))
    constants = {"w0": 1e3 * weights(4, 4, 1, 1), "w": 1e3 * weights(4, 8, 1, 1)}
    return graph(nodes, constants, {"x": [1, 4, 2, 2]}, ["y"])


@pytest.mark.parametrize(("layers", "reach"), [(100, 1.0), (3, 1e150), (3, 1e300), (3, 1.7e308)])
def test_numbers_beyond_float64_are_infinite_and_raise_nothing(layers: int, reach: float) -> None:
    model = deep(layers)
    changed = with_constants(model, w0=1e3 * weights(4, 4, 1, 1, zero=(0,)))
    assert 0.5 <= output_bound(model, changed, {"x": (-reach, reach)})["y"].largest <= 1 + 1e-9


@pytest.mark.parametrize("op", ["LayerNormalization", "ReduceL2", "Softmax", "Mul", "MatMul", "ReduceMean", "Pow"])
def test_squares_and_sums_beyond_float64_raise_nothing(op: str) -> None:
    second: dict[str, Any] = {"LayerNormalization": np.ones(4), "ReduceL2": np.array([1]), "ReduceMean": np.array([1])}
    constants: dict[str, Any] = {"w": weights(4, 4), "two": np.float32(2)}
    names = {"Softmax": ["a"], "Mul": ["a", "x"], "MatMul": ["a", "x"], "Pow": ["a", "two"]}.get(op, ["a", "k"])
    if op in second:
        constants["k"] = second[op].astype(np.float32 if op == "LayerNormalization" else np.int64)
    model = graph([node("MatMul", ["x", "w"], ["a"]), node(op, names, ["y"])], constants, {"x": [4, 4]}, ["y"])
    changed = with_constants(model, w=weights(4, 4, zero=(0,)))
    assert output_bound(model, changed, {"x": (-1e200, 1e200)})["y"].largest > 0


@pytest.mark.parametrize("domain", ["", "own"])
def test_a_gate_of_another_domain_is_no_gate(domain: str) -> None:
    """An operator that is called Softplus elsewhere may compute anything."""
    nodes = [node("Softplus", ["x"], ["s"]), node("Tanh", ["s"], ["g"]), node("Mul", ["x", "g"], ["y"])]
    model = graph(nodes, {}, {"x": [1, 3]}, ["y"])
    model.graph.node[0].domain = domain
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    made = tables(normalise(model)).nodes
    producers = {output.name: one for one in made for output in one.outputs}
    one = np.ones((1, 3))
    values = {"x": free(interval(-one, one), interval(-one, one)), "g": unknown((1, 3), same=False)}
    (found,) = RULES["Mul"](Step(made[2], made[2], values, producers)) or ()
    assert np.isfinite(found.difference.magnitude).all() == (domain == "")


def test_a_factor_that_reads_nothing_is_no_gate() -> None:
    nodes = [node("RandomNormal", [], ["r"], shape=[1, 3, 4, 4]), node("Mul", ["x", "r"], ["y"])]
    model = graph(nodes, {}, {"x": [1, 3, 4, 4]}, ["y"])
    assert output_bound(model, model, {"x": (0, 1)})["y"].largest == np.inf


# --- inputs that are no real numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("element", "most"), [(onnx.TensorProto.UINT8, 255), (onnx.TensorProto.INT8, 128), (onnx.TensorProto.BOOL, 1)]
)
def test_what_a_narrow_type_can_hold_bounds_what_is_cast_from_it(element: int, most: int) -> None:
    nodes = [node("Cast", ["x"], ["f"], to=onnx.TensorProto.FLOAT), node("Conv", ["f", "w"], ["y"])]
    constants = {"w": np.ones((1, 1, 1, 1), np.float32)}
    types = {"x": element, "y": onnx.TensorProto.FLOAT}
    model = graph(nodes, constants, {"x": [1, 1, 4, 4]}, {"y": [1, 1, 4, 4]}, element=types)
    changed = with_constants(model, w=np.zeros((1, 1, 1, 1)))
    assert real_inputs(model) == []
    assert output_bound(model, changed, {})["y"].largest == pytest.approx(most)
    assert 0 < measured_change(model, changed, {})["y"].largest <= most


def test_wide_integers_are_the_same_in_both_graphs_and_otherwise_unknown() -> None:
    nodes = [
        node("Cast", ["i"], ["f"], to=onnx.TensorProto.FLOAT),
        node("MatMul", ["x", "w"], ["y"]),
        node("MatMul", ["f", "w"], ["z"]),
        node("Add", ["x", "f"], ["s"]),
    ]
    types = {"i": onnx.TensorProto.INT64, **dict.fromkeys("xyzs", onnx.TensorProto.FLOAT)}
    shapes = {name: [1, 3] for name in "yzs"}
    model = graph(nodes, {"w": weights(3, 3)}, {"x": [1, 3], "i": [1, 3]}, shapes, element=types)
    changed = with_constants(model, w=weights(3, 3) * 2)
    assert real_inputs(model) == ["x"]
    bounds = output_bound(model, changed, {"x": (-1, 1)})
    assert np.isfinite(bounds["y"].largest)
    assert bounds["z"].largest == np.inf
    assert bounds["s"].largest == 0
    measured = measured_change(model, changed, {"x": (-1, 1)})
    assert measured["y"].largest <= bounds["y"].largest * (1 + 1e-12)
    assert measured["z"].largest > bounds["y"].largest  # not drawn from the box of x
    assert measured["s"].largest == 0


# --- what was measured ------------------------------------------------------------------------------------------------


def test_graphs_without_convolutions_are_measured_in_float64() -> None:
    weight = weights(8, 8)
    nodes = [node("Gemm", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("Gemm", ["b", "w"], ["y"])]
    model = graph(nodes, {"w": weight}, {"x": ["N", 8]}, ["y"])
    changed = weight.copy()
    changed[0, 0] += 1e-7
    found = measured_change(model, with_constants(model, w=changed), {"x": (-3, 3)})["y"]
    assert found.computed_in == "float64"
    assert 0 < found.largest <= output_bound(model, with_constants(model, w=changed), {"x": (-3, 3)})["y"].largest


@pytest.mark.parametrize(
    ("element", "computed_in"),
    [
        (onnx.TensorProto.FLOAT, "float32"),
        (onnx.TensorProto.BFLOAT16, "float32"),
        (onnx.TensorProto.DOUBLE, "float32"),
        (onnx.TensorProto.FLOAT16, "float16"),
    ],
)
def test_convolutions_are_measured_with_their_rounding(element: int, computed_in: str) -> None:
    """The bound may lie below what rounding moves; how much that is, is said."""
    weight = weights(4, 64, 3, 3)
    weight[0, 0, 0, 0] = 1e-9
    constants = {"w": weight.astype(onnx.helper.tensor_dtype_to_np_dtype(element))}
    model = graph([node("Conv", ["x", "w"], ["y"])], constants, {"x": [1, 64, 8, 8]}, ["y"], opset=22, element=element)
    weight[0, 0, 0, 0] = 0
    changed = with_constants(model, w=weight)
    found = measured_change(model, changed, {"x": (-3, 3)})["y"]
    assert found.computed_in == computed_in
    bound = output_bound(model, changed, {"x": (-3, 3)})["y"].largest
    assert bound < 1e-6
    if computed_in == "float32":
        assert found.rounding > bound
        assert found.largest <= bound + 8 * found.rounding


def divided() -> onnx.ModelProto:
    nodes = [node("Mul", ["x", "w"], ["a"]), node("Div", ["a", "a"], ["y"])]
    return graph(nodes, {"w": np.full((1, 4), 1e-9, np.float32)}, {"x": [1, 4]}, ["y"])


def test_what_only_one_graph_has_as_no_number_is_an_infinite_change() -> None:
    model = divided()
    changed = with_constants(model, w=np.zeros((1, 4)))
    for pair in ((model, changed), (changed, model)):
        found = measured_change(*pair, {"x": (1, 2)})["y"]
        assert found.largest == np.inf
        assert found.to_json()["measured"] is None


def test_where_neither_graph_has_a_number_nothing_was_measured() -> None:
    model = with_constants(divided(), w=np.zeros((1, 4)))
    found = measured_change(model, model, {"x": (1, 2)})["y"]
    assert np.isnan(found.largest)
    assert found.to_json() == {"measured": None, "rounding": None, "computed_in": "float64"}


def test_graphs_of_different_structure_are_refused() -> None:
    one = graph([node("Relu", ["x"], ["y"])], {}, {"x": [1, 3]}, ["y"])
    other = graph([node("Sigmoid", ["x"], ["y"])], {}, {"x": [1, 3]}, ["y"])
    with pytest.raises(InputError, match="differ in more than weights"):
        output_bound(one, other, {"x": (0, 1)})


# --- each operator ----------------------------------------------------------------------------------------------------

K = np.linspace(-1.5, 1.5, 6, dtype=np.float32)
POSITIVE = np.linspace(0.5, 2.0, 6, dtype=np.float32)
I64 = np.int64

LINES: list[tuple[str, list[Any], dict[str, Any], int]] = [
    *((name, ["x"], {}, 20) for name in sorted(CURVES) if name not in ("Log", "Sqrt", "Reciprocal", "Celu")),
    ("Celu", ["x"], {"alpha": 0.5}, 18),
    ("Gelu", ["x"], {"approximate": "tanh"}, 20),
    ("Elu", ["x"], {"alpha": 2.5}, 18),
    ("HardSigmoid", ["x"], {"alpha": 0.5, "beta": 0.3}, 18),
    ("LeakyRelu", ["x"], {"alpha": -0.5}, 18),
    ("ThresholdedRelu", ["x"], {"alpha": -0.5}, 18),
    *((name, ["p"], {}, 18) for name in ("Log", "Sqrt", "Reciprocal")),
    ("Add", ["x", "z"], {}, 18),
    ("Add", ["x", K[:, None, None]], {}, 18),
    ("Sub", ["x", "z"], {}, 18),
    ("Sub", [K[:, None, None], "x"], {}, 18),
    ("Mul", ["x", "z"], {}, 18),
    ("Mul", ["x", "x"], {}, 18),
    ("Mul", ["x", K[:, None, None]], {}, 18),
    ("Div", ["x", "p"], {}, 18),
    ("Div", ["x", POSITIVE[:, None, None]], {}, 18),
    ("Max", ["x", "z", np.float32(0.3)], {}, 18),
    ("Min", ["x", "z"], {}, 18),
    ("Mean", ["x", "z", "x"], {}, 18),
    ("Sum", ["x", "z"], {}, 18),
    ("Pow", ["x", np.float32(2)], {}, 18),
    ("Pow", ["x", np.float32(3)], {}, 18),
    ("Pow", ["p", np.float32(-0.5)], {}, 18),
    ("Clip", ["x", np.float32(-0.2), np.float32(0.4)], {}, 18),
    ("Clip", ["x"], {"min": -0.2, "max": 0.4}, 9),
    ("PRelu", ["x", K[:, None, None]], {}, 18),
    ("MaxPool", ["x"], {"kernel_shape": [3, 3], "pads": [1] * 4}, 18),
    ("AveragePool", ["x"], {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}, 18),
    ("AveragePool", ["x"], {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}, 18),
    ("GlobalAveragePool", ["x"], {}, 18),
    ("GlobalMaxPool", ["x"], {}, 18),
    *(
        (name, ["x", np.array(axes, I64)], {"keepdims": keep}, 18)
        for name in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2")
        for axes in ([1], [2, 3], [-3, -1])
        for keep in (0, 1)
    ),
    ("ReduceMean", ["x"], {"axes": [2, 3]}, 13),
    ("ReduceSum", ["x"], {"axes": [1]}, 11),
    ("Softmax", ["x"], {"axis": 1}, 18),
    ("Softmax", ["x"], {"axis": -1}, 13),
    ("Softmax", ["x"], {"axis": 1}, 11),
    ("LogSoftmax", ["x"], {"axis": 1}, 18),
    ("LayerNormalization", ["x", np.linspace(0.5, 1, 5, dtype=np.float32)], {"axis": -1}, 18),
    ("InstanceNormalization", ["x", K, K], {}, 18),
    ("BatchNormalization", ["x", K, K, K, POSITIVE], {}, 18),
    ("Transpose", ["x"], {"perm": [0, 2, 3, 1]}, 18),
    ("Reshape", ["x", np.array([2, 2, 3, 5, 5], I64)], {}, 18),
    ("Reshape", ["x", np.array([2, -1], I64)], {}, 18),
    ("Reshape", ["x", np.array([25, 12], I64)], {}, 18),
    ("Flatten", ["x"], {"axis": 2}, 18),
    ("Concat", ["x", "z"], {"axis": 1}, 18),
    ("Concat", ["x", "z", "x"], {"axis": 3}, 18),
    ("Split", ["x", np.array([2, 4], I64)], {"axis": 1}, 18),
    ("Split", ["x"], {"axis": 1, "split": [1, 5]}, 11),
    ("Slice", ["x", np.array([4], I64), np.array([-(2**31)], I64), np.array([1], I64), np.array([-2], I64)], {}, 18),
    ("Slice", ["x"], {"starts": [1, 0], "ends": [4, 3], "axes": [1, 2]}, 9),
    ("Gather", ["x", np.array([3, 0, 0, -1], I64)], {"axis": 1}, 18),
    ("Gather", ["x", np.array([[1, 0]], I64)], {"axis": 2}, 18),
    ("Pad", ["x", np.array([0, 1, 1, 1, 0, 2, 0, 1], I64), np.float32(0.7)], {}, 18),
    ("Pad", ["x", np.array([0, 0, 1, 1, 0, 0, 0, 1], I64)], {"mode": "reflect"}, 18),
    ("Pad", ["x"], {"pads": [0, 1, 0, 0, 0, 0, 0, 0], "value": 1.0}, 9),
    ("Expand", ["x", np.array([2, 2, 6, 5, 5], I64)], {}, 18),
    ("Tile", ["x", np.array([1, 2, 1, 2], I64)], {}, 18),
    ("DepthToSpace", ["d"], {"blocksize": 2}, 18),
    ("Resize", ["x", "", np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, 18),
    ("Resize", ["x", "", np.array([1, 1, 1.7, 2], np.float32)], {"mode": "linear"}, 18),
    (
        "Resize",
        ["x", "", "", np.array([2, 6, 8, 9], I64)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        18,
    ),
    ("Resize", ["x", np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, 10),
    ("Upsample", ["x", np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}, 9),
    ("MatMul", ["x", weights(5, 4, seed=7)], {}, 18),
    ("MatMul", [weights(4, 5, seed=7), "x"], {}, 18),
    ("MatMul", ["x", "z"], {}, 18),
    ("MatMul", ["x", weights(6, 5, 4, seed=7)], {}, 18),
    ("ConvTranspose", ["x", weights(6, 2, 3, 3, seed=3)], {"strides": [2, 2], "pads": [1] * 4, "group": 2}, 18),
    (
        "ConvTranspose",
        ["x", weights(6, 4, 2, 2, seed=3), weights(4, seed=4)],
        {"strides": [3, 2], "output_padding": [1, 1]},
        18,
    ),
    ("Conv", ["x", weights(6, 2, 3, 3, seed=3), K], {"group": 3, "pads": [1] * 4, "dilations": [1, 1]}, 18),
    ("Conv", ["x", weights(12, 1, 3, 3, seed=3)], {"group": 6, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, 18),
    ("Where", [np.array([True, False] * 3)[:, None, None], "x", "z"], {}, 18),
    ("Cast", ["x"], {"to": onnx.TensorProto.DOUBLE}, 18),
    ("Squeeze", ["g", np.array([2, 3], I64)], {}, 18),
    ("Squeeze", ["g"], {}, 13),
    ("Unsqueeze", ["x", np.array([-1, 0], I64)], {}, 18),
    ("Dropout", ["x"], {}, 18),
    ("Identity", ["x"], {}, 18),
]


def single(op: str, inputs: list[Any], attributes: dict[str, Any], opset: int) -> onnx.ModelProto:
    """Return sources and one operator: x and z of six channels, p = |x| + 0.2, d of eight, g of one place."""
    nodes = [node("Conv", ["input", "wx", "bx"], ["x"]), node("Conv", ["input", "wz"], ["z"])]
    constants: dict[str, Any] = {"wx": weights(6, 3, 1, 1), "bx": K / 2, "wz": weights(6, 3, 1, 1, seed=1)}
    nodes += [node("Abs", ["x"], ["x_abs"]), node("Add", ["x_abs", "fifth"], ["p"])]
    constants["fifth"] = np.float32(0.2)
    nodes += [node("Conv", ["input", "wd"], ["d"]), node("GlobalAveragePool", ["x"], ["g"])]
    constants["wd"] = weights(8, 3, 1, 1, seed=2)
    names = []
    for slot, item in enumerate(inputs):
        if not isinstance(item, str):
            constants[f"k{slot}"] = item
            item = f"k{slot}"
        names.append(item)
    outputs = ["y", "y2"] if op == "Split" else ["y"]
    nodes.append(node(op, names, outputs, **attributes))
    used = {name for one in nodes for name in one.input}
    outputs += [name for name in ("p", "d", "g", "z") if name not in used]
    return graph(nodes, constants, {"input": [2, 3, 5, 5]}, ["y"] if op != "Split" else ["y", "y2"], opset=opset)


@pytest.mark.parametrize("share", [1e-3, 0.5])
@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "opset"), LINES, ids=[f"{line[0]}-{i}" for i, line in enumerate(LINES)]
)
def test_the_bound_of_each_operator_holds_and_is_finite(
    op: str, inputs: list[Any], attributes: dict[str, Any], opset: int, share: float
) -> None:
    model = single(op, inputs, attributes, opset)
    wx, wz = weights(6, 3, 1, 1), weights(6, 3, 1, 1, seed=1)
    changed = with_constants(
        model,
        wx=wx + share * weights(6, 3, 1, 1, seed=8, zero=(1, 2)),
        wz=wz + share * weights(6, 3, 1, 1, seed=9, zero=(2, 3)),
        wd=weights(8, 3, 1, 1, seed=2) * (1 - share),
    )
    for bound in check_bound(model, changed).values():
        assert np.isfinite(bound.largest)
        assert bound.largest > 0


def test_every_rule_has_a_line() -> None:
    logical = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Shape", "Size"}
    moved = {"GatherElements", "GatherND", "SpaceToDepth"}
    other = {"Gemm", "RMSNormalization"}
    assert set(RULES) - {line[0] for line in LINES} == logical | moved | other


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid", "Mish"])
def test_a_gate_of_its_own_value_has_a_slope_near_1(gate: str) -> None:
    """Told apart, x and sigmoid(x) would give |x| / 4 + 1."""
    tail = (
        [node("Softplus", ["a"], ["s"]), node("Tanh", ["s"], ["g"])] if gate == "Mish" else [node(gate, ["a"], ["g"])]
    )
    nodes = [node("Conv", ["x", "w"], ["a"]), *tail, node("Mul", ["a", "g"], ["y"])]
    model = graph(nodes, {"w": 100 * weights(2, 3, 1, 1)}, {"x": [1, 3, 4, 4]}, ["y"])
    changed = with_constants(model, w=100 * weights(2, 3, 1, 1) * 1.001)
    plain = graph(nodes[:1], {"w": 100 * weights(2, 3, 1, 1)}, {"x": [1, 3, 4, 4]}, ["a"])
    before = check_bound(plain, with_constants(plain, w=100 * weights(2, 3, 1, 1) * 1.001))["a"].largest
    assert check_bound(model, changed)["y"].largest <= 1.51 * before


ALL_CURVES: dict[str, Curve] = {
    "swish": SWISH, "gelu": GELU, "gelu tanh": GELU_TANH, "mish": MISH, "rsqrt": RSQRT, "hard swish": hard_swish(0.25),
    **{f"power {power}": curve for power, curve in POWERS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_CURVES)
def test_the_constants_of_each_curve_hold_where_they_are_sampled(name: str) -> None:
    """Ends, extremes and slopes of functions whose constants are written down, on a grid of intervals."""
    curve = ALL_CURVES[name]
    at = np.linspace(0.05 if name in ("rsqrt", "power -1.0", "power -0.5", "power 0.5") else -12, 12, 6001)
    values = curve.value(at)
    for width in (1, 7, 60, 900, 5999):
        lo, hi = at[:-width], at[width:]
        step = interval(hi - lo, hi - lo)
        found = apply_curve(curve, ranges(interval(lo, lo), interval(hi, hi), step))
        assert (found.difference.lo <= values[width:] - values[:-width]).all()
        assert (found.difference.hi >= values[width:] - values[:-width]).all()
        both = apply_curve(curve, ranges(interval(lo, hi), interval(lo, hi), interval(lo - hi, hi - lo)))
        for shift in (0, width // 3, width // 2, width):
            inside = values[shift : len(values) - width + shift]
            assert (both.reference.lo <= inside).all()
            assert (both.reference.hi >= inside).all()
        if curve.derivative is not None and width == 60:  # slopes, against steps inside the interval
            slopes = np.diff(values) / np.diff(at)
            moved = apply_curve(
                curve,
                ranges(interval(lo, hi), interval(lo, hi), interval(np.full_like(lo, 1e-9), np.full_like(lo, 1e-9))),
            )
            assert (moved.difference.lo <= slopes[: len(lo)] * 1e-9 + 1e-18).all()
            assert (moved.difference.hi >= slopes[: len(lo)] * 1e-9 - 1e-18).all()


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (3, 5, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e100])
def test_the_largest_singular_value_is_not_underrated(shape: tuple[int, ...], scale: float) -> None:
    matrices = np.random.default_rng(0).standard_normal(shape) * scale
    exact = np.linalg.svd(matrices / scale, compute_uv=False).max() * scale
    assert exact * (1 - 1e-12) <= largest_singular_value(matrices) <= exact * (1 + 1e-6)
