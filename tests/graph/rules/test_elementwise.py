"""Lines of the family elementwise: operators of one or more inputs that are broadcast."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, dense, f32, label
from graph.small import analysis_of, graph, initializer, kept, operators, slim_and_verify, weights

MASK = np.array([0, 1, 2, 0, 1, 0], f32)[:, None, None]
LEFT = np.array([1, 1, 1, 0, 0, 0], bool)[:, None, None]
COMPARE = ("Equal", "Greater", "Less")
COMPARE_12 = ("GreaterOrEqual", "LessOrEqual")

LINES: list[Line] = [
    *((op, pair, {}) for op in ("Add", "Sub", "Mul", "Max", "Min") for pair in (("x", "z"), ("x", "x"))),
    *((op, ("x", dense(6, 1, 1)), {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *((op, (dense(1, 6, 1, 1), "x"), {}) for op in ("Add", "Sub", "Mul", "Max", "Min")),
    *((op, ("x", f32(2.5)), {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *((op, (dense(1), "x"), {}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(6)), {}) for op in ("Add", "Sub", "Mul", "Div", "Max")),
    *((op, ("x", dense(6, 1)), {}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(6, 6, 6)), {}) for op in ("Add", "Sub", "Mul", "Div", "Min")),
    *((op, ("x", dense(2, 1, 1, 1)), {"batch": 2}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(6)), {"spatial": ()}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", dense(2, 1, 6, 1, 1)), {"batch": 1}) for op in ("Add", "Sub", "Mul")),
    *((op, ("x", "z"), {"opset": opset, "spatial": ()}) for op in ("Add", "Sub", "Mul") for opset in (9, 13, 14, 23)),
    ("Mul", ("x", MASK), {}),
    ("Add", ("x", np.full((1, 1, 1), np.nan, f32)), {"opaque": True, "removes": False}),
    ("Add", ("x", np.ones((6, 1, 1), np.int32)), {"via": TensorProto.INT32}),
    ("Mul", ("x", np.arange(6, dtype=np.int32)[:, None, None]), {"via": TensorProto.INT32}),
    ("Sub", ("x", "x"), {"via": TensorProto.INT32}),
    ("Div", ("x", np.int32(2)), {"via": TensorProto.INT32}),
    ("Neg", ("x",), {}),
    ("Neg", ("x",), {"opset": 9, "spatial": ()}),
    ("Neg", ("x",), {"via": TensorProto.INT32}),
    ("Div", ("x", "z~"), {}),
    ("Div", (dense(6, 1, 1), "z~"), {}),
    ("Div", ("x~", "x~"), {}),
    ("Pow", ("x~", f32(2.5)), {}),
    ("Pow", ("x~", "z"), {}),
    ("Div", ("x", "z"), {"opaque": True, "removes": False}),
    ("Div", (dense(6, 1, 1), "x"), {"opaque": True, "removes": False}),
    ("Div", ("x", MASK), {"opaque": True, "removes": False}),
    *(("Pow", ("x", f32(p)), {}) for p in (0, 1, 2, 3)),
    ("Pow", ("x", np.array([1, 2, 3, 2, 2, 0], f32)[:, None, None]), {}),
    ("Pow", ("x", np.int64(2)), {"opset": 12}),
    ("Pow", ("x", f32(2)), {"opset": 9}),
    ("Pow", (f32(2), "x"), {}),
    ("Pow", ("x", np.int32(2)), {"via": TensorProto.INT32}),
    ("Mod", ("x", np.int32(2)), {"via": TensorProto.INT32}),
    ("Mod", ("x", f32(0.4)), {"fmod": 1}),
    *(
        (op, inputs, {"opset": opset})
        for op in ("Sum", "Mean")
        for inputs in (("x",), ("x", "z"), ("x", "z", "x"))
        for opset in (9, 18)
    ),
    *(
        (op, inputs, {"opset": opset})
        for op in ("Max", "Min")
        for inputs in (("x",), ("x", "z", dense(6, 1, 1)))
        for opset in (9, 12, 18)
    ),
    *((op, ("x", "z", dense(6, 1, 1)), {}) for op in ("Sum", "Mean")),
    ("Sum", ("x", dense(6, 6, 6), "z", dense(6, 1, 1)), {}),
    *((op, ("x", np.int32(1)), {"via": TensorProto.INT32}) for op in ("Max", "Min")),
    ("PRelu", ("x", dense(1)), {}),
    ("PRelu", ("x", f32(0.2)), {}),
    ("PRelu", ("x", dense(6, 1, 1)), {}),
    ("PRelu", ("x", np.full((6, 1, 1), 0.25, f32)), {"opset": 9}),
    ("PRelu", ("x", np.full((1, 6, 1, 1), 0.25, f32)), {"opset": 16}),
    ("PRelu", ("x", dense(6, 6, 6)), {}),
    ("PRelu", ("x", dense(6)), {"spatial": ()}),
    ("PRelu", ("x", "z"), {"opaque": True, "removes": False}),
    *((op, ("x", f32(0.2)), {"opset": opset}) for op in COMPARE for opset in (11, 18)),
    *((op, ("x", "z"), {"opset": opset}) for op in COMPARE_12 for opset in (12, 18)),
    ("Equal", ("x", np.int64(0)), {"via": TensorProto.INT64}),
    ("Equal", ("x", "z"), {"via": TensorProto.INT32, "opset": 9}),
    *((op, ("x>", "z>"), {}) for op in ("And", "Or", "Xor")),
    *((op, ("x>", LEFT), {"opset": 9}) for op in ("And", "Or", "Xor")),
    ("Where", ("x>", "x", "z"), {}),
    ("Where", ("x>", "x", "x"), {"opset": 9}),
    ("Where", ("x>", "x", f32(0)), {}),
    ("Where", ("x>", f32(1), dense(6, 1, 1)), {}),
    ("Where", (LEFT, "x", "z"), {}),
    ("Where", (~LEFT, "x", "z"), {}),
    ("Where", (dense(6, 6, 6) > 0, "x", "z"), {}),
    ("Where", ("x>", "x", "z"), {"via": TensorProto.INT32}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


IMAGE = ["N", 3, 6, 6]
DEAD = (1, 2)  # of four filters
Nodes = list[onnx.NodeProto]


def conv(source: str, weight: str, result: str) -> onnx.NodeProto:
    return node("Conv", [source, weight], [result])


def network(nodes: Nodes, last: str, image: list[Any] = IMAGE, **constants: Any) -> onnx.ModelProto:
    """Return: convolutions of x -> the nodes -> a convolution of four channels."""
    held = {"w": weights(4, 3, 1, 1, zero=DEAD), "v": weights(2, 4, 1, 1, seed=1)} | constants
    return graph([conv("x", "w", "a"), *nodes, conv(last, "v", "y")], held, {"x": image}, ["y"])


# --- broadcasting -----------------------------------------------------------------------------------------------------


def test_one_function_of_two_coordinates_is_two_functions_of_both() -> None:
    constants = {"w": weights(4, 3), "first": np.array([0]), "second": np.array([1]), "v": weights(4, 2)}
    nodes = [
        node("Gemm", ["x", "w"], ["h"], transB=1),
        node("Unsqueeze", ["h", "first"], ["row"]),
        node("Unsqueeze", ["h", "second"], ["column"]),
        node("Sub", ["row", "column"], ["d"]),  # not 0: the differences of all pairs
        node("MatMul", ["d", "v"], ["y"]),
    ]
    slim_and_verify(graph(nodes, constants, {"x": ["N", 3]}, ["y"]))


def test_a_pooled_value_that_is_added_to_a_zero_map_is_not_the_pooled_value() -> None:
    zero = {"u": np.zeros((4, 3, 1, 1), np.float32)}
    nodes = [
        conv("x", "u", "map"),
        node("GlobalAveragePool", ["a"], ["p"]),
        node("Add", ["p", "map"], ["s"]),
        node("GlobalAveragePool", ["a"], ["q"]),
        node("Concat", ["s", "s"], ["c"], axis=1),
    ]
    model = network(nodes, "s", **zero)
    slim_and_verify(model)
    facts = analysis_of(model).known.view.facts
    assert facts["p"].number.ravel()[0] != facts["s"].number.ravel()[0]


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_a_constant_that_spans_the_channels_alone_gives_them_positions(op: str) -> None:
    constant = np.array([1, 0, 2, 1], np.float32)[:, None, None]
    nodes = [conv("x", "u", "map"), node(op, ["map", "c"], ["s"])]
    model = network(nodes, "s", u=weights(1, 3, 1, 1, seed=2), c=constant)
    slimmed = slim_and_verify(model)
    assert initializer(slimmed.model, "c").size == 1, "the others are multiples of one channel, or differ by constants"
    assert initializer(slimmed.model, "v").shape == (2, 1, 1, 1)


# --- gates ------------------------------------------------------------------------------------------------------------


def test_a_zero_channel_goes_through_silu() -> None:
    slimmed = slim_and_verify(network([node("Sigmoid", ["a"], ["g"]), node("Mul", ["a", "g"], ["s"])], "s"))
    assert slimmed.removed_channels == 2


@pytest.mark.parametrize("op", ["Sigmoid", "HardSigmoid"])
def test_a_zero_channel_goes_through_squeeze_and_excitation(op: str) -> None:
    constants = {"down": weights(3, 4, 1, 1, seed=2, zero=(0,)), "up": weights(4, 3, 1, 1, seed=3)}
    nodes = [
        node("GlobalAveragePool", ["a"], ["p"]),
        conv("p", "down", "d"),
        node("Relu", ["d"], ["r"]),
        conv("r", "up", "u"),
        node(op, ["u"], ["g"]),
        node("Mul", ["a", "g"], ["s"]),
    ]
    slimmed = slim_and_verify(network(nodes, "s", **constants))
    assert [row.after for row in slimmed.layers] == [2, 2, 2, 2]


# --- slopes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (), (4, 1, 1), (1, 4, 1, 1), (1, 1, 1)])
def test_a_slope_shared_by_two_nodes_is_sliced_for_each(shape: tuple[int, ...]) -> None:
    slopes = np.resize(np.array([0.1, 0.2, 0.3, 0.4], np.float32), shape)
    other = weights(2, 4, 1, 1, seed=4)
    other[:, 0] = 0
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD), "u": weights(4, 3, 1, 1), "slope": slopes}
    constants |= {"v": weights(2, 4, 1, 1), "o": other}
    nodes = [
        conv("x", "w", "a"),
        conv("x", "u", "b"),
        node("PRelu", ["a", "slope"], ["p"]),
        node("PRelu", ["b", "slope"], ["q"]),
        conv("p", "v", "y"),
        conv("q", "o", "z"),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, ["y", "z"]))
    assert slimmed.removed_channels == 3
    channels = slopes.size > 1
    sizes = {tensor.name: tensor.dims for tensor in slimmed.model.graph.initializer if tensor.name.startswith("slope")}
    assert sorted(max(dims, default=1) for dims in sizes.values()) == ([2, 3] if channels else [1])


# --- what changes nothing ---------------------------------------------------------------------------------------------


def test_a_mask_that_was_multiplied_in_goes_with_its_zeros() -> None:
    dense_weight, mask = weights(4, 3, 1, 1), np.array([1, 0, 0, 1], np.float32)[:, None, None]
    slimmed = slim_and_verify(network([node("Mul", ["a", "mask"], ["m"])], "m", w=dense_weight, mask=mask))
    assert slimmed.removed_channels == 2
    assert operators(slimmed.model) == ["Conv", "Conv"]


def test_a_mask_with_other_factors_stays() -> None:
    dense_weight, mask = weights(4, 3, 1, 1), np.array([2, 0, 0, 1], np.float32)[:, None, None]
    slimmed = slim_and_verify(network([node("Mul", ["a", "mask"], ["m"])], "m", w=dense_weight, mask=mask))
    assert initializer(slimmed.model, "mask").ravel().tolist() == [2, 1]


@pytest.mark.parametrize(
    ("op", "constant"),
    [("Add", 0), ("Sub", 0), ("Mul", 1), ("Div", 1), ("Pow", 1), ("Sum", 0), ("Max", 0), ("Mean", 0)],
)
@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1, 1)])
def test_an_operand_that_changes_neither_values_nor_shape_goes(
    op: str, constant: float, shape: tuple[int, ...]
) -> None:
    nodes = [node(op, ["a", "c"], ["s"])]
    if len(shape) == 5:
        nodes.append(node("Squeeze", ["s", "axis"], ["t"]))
    model = network(nodes, nodes[-1].output[0], c=np.full(shape, constant, f32), axis=np.array([0]))
    goes = len(shape) < 5 and op not in ("Max", "Mean")
    assert (op not in operators(slim_and_verify(model).model)) == goes


def test_an_operand_that_is_left_out_of_a_graph_output_leaves_an_identity() -> None:
    constants = {"w": weights(4, 3, 1, 1), "u": weights(3, 3, 1, 1, zero=(1,)), "c": f32(0)}
    constants["v"] = weights(2, 3, 1, 1)
    nodes = [conv("x", "w", "a"), node("Add", ["a", "c"], ["y"]), conv("x", "u", "b"), conv("b", "v", "z")]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, ["y", "z"]))
    assert sorted(operators(slimmed.model)) == ["Conv", "Conv", "Conv", "Identity"]


# --- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [IMAGE, [1, 3, 6, 6]])
@pytest.mark.parametrize("op", ["Add", "Sum"])
def test_a_residual_whose_branch_is_dead_is_its_shortcut(op: str, image: list[Any]) -> None:
    nodes = [conv("x", "u", "b"), node("Relu", ["b"], ["c"]), node(op, ["c", "a"], ["s"])]
    slimmed = slim_and_verify(network(nodes, "s", image, u=np.zeros((4, 3, 1, 1), f32)))
    assert operators(slimmed.model) == ["Conv", "Conv"]
    assert slimmed.removed_channels == 2 + 4


@pytest.mark.parametrize("other", ["width", "other width"])
def test_a_dead_branch_goes_where_named_sizes_agree(other: str) -> None:
    inputs = {"p": ["N", 4, "height", "width"], "q": ["N", 4, "height", other]}
    nodes = [node("Mul", ["p", "zero"], ["dead"]), node("Add", ["dead", "q"], ["s"]), conv("s", "v", "y")]
    model = graph(nodes, {"zero": np.zeros((4, 1, 1), f32), "v": weights(2, 4, 1, 1)}, inputs, ["y"])
    assert ("Add" in operators(slim_and_verify(model).model)) == (other != "width")


def test_a_dead_branch_of_three_leaves_two() -> None:
    nodes = [conv("x", "u", "b"), conv("x", "dead", "c"), node("Sum", ["a", "c", "b"], ["s"])]
    constants = {"u": weights(4, 3, 1, 1, seed=2, zero=DEAD), "dead": np.zeros((4, 3, 1, 1), f32)}
    slimmed = slim_and_verify(network(nodes, "s", **constants))
    total = next(item for item in slimmed.model.graph.node if item.op_type == "Sum")
    assert len(total.input) == 2
    assert slimmed.removed_channels == 2 + 2 + 4


@pytest.mark.parametrize("op", ["Mean", "Max", "Min"])
def test_a_branch_of_zeros_still_counts_in_a_mean_and_an_extremum(op: str) -> None:
    nodes = [conv("x", "dead", "c"), node(op, ["a", "c"], ["s"])]
    slimmed = slim_and_verify(network(nodes, "s", dead=np.zeros((4, 3, 1, 1), f32)))
    assert operators(slimmed.model) == ["Conv", op, "Conv"]


@pytest.mark.parametrize("takes", [True, False])
def test_the_side_that_a_constant_condition_never_takes_goes(takes: bool) -> None:
    nodes = [conv("x", "u", "b"), node("Where", ["c", *(["a", "b"] if takes else ["b", "a"])], ["s"])]
    slimmed = slim_and_verify(network(nodes, "s", u=weights(4, 3, 1, 1, seed=2), c=np.full((4, 1, 1), takes)))
    assert operators(slimmed.model) == ["Conv", "Conv"]
    assert slimmed.removed_channels == 2 + 4


def test_a_condition_that_takes_one_side_in_the_live_channels_frees_the_other() -> None:
    condition = np.array([True, False, False, True])[:, None, None]
    reader = weights(2, 4, 1, 1)
    reader[:, [1, 2]] = 0
    nodes = [conv("x", "u", "b"), node("Where", ["c", "a", "b"], ["s"])]
    model = network(nodes, "s", u=weights(4, 3, 1, 1, seed=2), w=weights(4, 3, 1, 1), c=condition, v=reader)
    assert operators(slim_and_verify(model).model) == ["Conv", "Conv"]


def test_a_leaky_relu_written_with_where_passes_a_zero_channel() -> None:
    nodes = [
        node("Greater", ["a", "zero"], ["positive"]),
        node("Mul", ["a", "slope"], ["small"]),
        node("Where", ["positive", "a", "small"], ["s"]),
    ]
    assert slim_and_verify(network(nodes, "s", zero=f32(0), slope=f32(0.1))).removed_channels == 2


# --- what is not known ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("above", "below"), [("a", "a"), ("zero", "a")])
def test_a_quotient_by_what_may_be_zero_is_not_a_constant(above: str, below: str) -> None:
    model = network([node("Div", [above, below], ["s"])], "s", w=weights(4, 3, 1, 1), zero=np.zeros((4, 1, 1), f32))
    assert not analysis_of(model).known.view.facts["s"].constant.any()


def test_a_product_that_leaves_its_integer_type_is_opaque() -> None:
    constants = {"w": np.zeros((4, 3, 1, 1), f32), "b": np.full(4, 20_000.5, f32), "c": np.int32(200_000)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"]),
        node("Cast", ["a"], ["i"], to=TensorProto.INT32),
        node("Add", ["i", "i"], ["j"]),
        node("Mul", ["j", "c"], ["y"]),
    ]
    found = analysis_of(graph(nodes, constants, {"x": IMAGE}, ["y"]))
    assert list(found.known.opaque.values()) == ["a constant is out of range"]


def test_sums_of_the_same_terms_are_multiples_of_one_function() -> None:
    constants = {"w": np.stack([weights(3, 1, 1)] * 4), "u": np.stack([weights(3, 1, 1, seed=5)] * 4)}
    nodes = [conv("x", "u", "b"), node("Mul", ["a", "p"], ["c"]), node("Mul", ["b", "q"], ["d"])]
    nodes.append(node("Add", ["c", "d"], ["s"]))
    constants |= {name: np.array(k, f32)[:, None, None] for name, k in (("p", (1, 2, -1, 1)), ("q", (3, 6, -3, 1)))}
    model = network(nodes, "s", **constants)
    numbers = analysis_of(model).known.view.facts["s"].number.ravel()
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]
    assert sum(kept(model, "s")) == 2
    slim_and_verify(model)


def test_float16_graphs_are_slimmed() -> None:
    half = np.float16
    constants = {"w": weights(4, 3, 1, 1, zero=DEAD).astype(half), "v": weights(2, 4, 1, 1).astype(half)}
    constants |= {"b": np.array([0, 0.3, 0, 0], half), "c": np.array([1, 1, 0, 1], half)[:, None, None]}
    nodes = [node("Conv", ["x", "w", "b"], ["a"]), node("HardSwish", ["a"], ["h"]), node("Mul", ["h", "c"], ["m"])]
    nodes += [node("Add", ["m", "a"], ["s"]), conv("s", "v", "y")]
    model = graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}, element=TensorProto.FLOAT16)
    assert slim_and_verify(model).removed_channels == 2
