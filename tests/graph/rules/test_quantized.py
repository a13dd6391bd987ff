"""Lines of the quantised operators, and of float layers whose weights are stored quantised."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_facts, dense, f32, label, source
from graph.small import copy_of, graph, operators, run, slim_and_verify
from prune2deploy.graph.facts import Known, channel_facts
from prune2deploy.graph.node import Node, tables
from prune2deploy.graph.normal import normalise
from prune2deploy.graph.rewrite import Slimmed
from prune2deploy.graph.rules.quantized import zero_of

Array = np.ndarray
STEP, POINT = f32(0.03), np.uint8(120)
"""Scale and zero point of the inputs ``x8`` and ``z8``."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A constant that is stored quantised, behind a DequantizeLinear; with ``floats`` behind a pair with Quantize."""

    integers: Array
    scale: Any
    zero_point: Any = None
    axis: int = 1
    floats: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.integers.shape

    @property
    def more(self) -> dict[str, int]:
        return {} if np.size(self.scale) == 1 else {"axis": self.axis}

    def make(self, name: str) -> tuple[list[onnx.NodeProto], dict[str, Any]]:
        constants = {f"{name}_scale": np.asarray(self.scale)}
        if self.zero_point is not None:
            constants[f"{name}_zero"] = np.asarray(self.zero_point)
        steps = list(constants)
        made = node("DequantizeLinear", [f"{name}_q", *steps], [name], name=f"{name}_dq", **self.more)
        if not self.floats:
            return [made], constants | {f"{name}_q": self.integers}
        scale, zero = np.asarray(self.scale), np.asarray(self.zero_point)
        if scale.ndim:
            column = [1] * self.integers.ndim
            column[self.axis] = -1
            scale, zero = scale.reshape(column), zero.reshape(column)
        floats = ((self.integers.astype(np.int32) - zero) * scale).astype(np.float32)
        first = node("QuantizeLinear", [f"{name}_f", *steps], [f"{name}_q"], name=f"{name}_ql", **self.more)
        return [first, made], constants | {f"{name}_f": floats}


def build(
    op: str, inputs: tuple[Any, ...], spatial: tuple[int, ...], batch: str | int, attributes: dict[str, Any]
) -> tuple[list[onnx.NodeProto], dict[str, Any], list[Any]]:
    """Return nodes, constants and the graph's input shape: ``x`` and ``z`` are sources of channels of all kinds.

    ``x8`` is ``x`` quantised; ``xd`` dynamically, ``point`` its zero point and ``step`` its scale.
    """
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Any] = {}
    names: list[str] = []

    def add(name: str) -> None:
        if name not in {output for item in nodes for output in item.output}:
            more, values = source(name, 6, spatial, "xz".index(name))
            nodes.extend(more)
            constants.update(values)

    for slot, item in enumerate(inputs):
        if isinstance(item, Kept):
            more, values = item.make(f"k{slot}")
            nodes.extend(more)
            constants.update(values)
            names.append(f"k{slot}")
        elif not isinstance(item, str):
            constants[f"k{slot}"] = np.asarray(item)
            names.append(f"k{slot}")
        else:
            names.append(item)
            if item in ("x", "z", "x8", "z8", "xd"):
                add(item[0])
            if item in ("x8", "z8"):
                constants |= {"q_step": STEP, "q_point": POINT}
                nodes.append(node("QuantizeLinear", [item[0], "q_step", "q_point"], [item]))
            if item == "xd":
                nodes.append(node("DynamicQuantizeLinear", ["x"], ["xd", "step", "point"]))
    made = ["y", "y1", "y2"] if op == "DynamicQuantizeLinear" else ["y"]
    return [*nodes, node(op, names, made, name="op", **attributes)], constants, [batch, 3, *spatial]


def noise(values: Array, random: np.random.Generator) -> Array:
    if np.issubdtype(values.dtype, np.integer):
        return random.integers(0, 100, values.shape).astype(values.dtype)
    return random.standard_normal(values.shape).astype(values.dtype)


def check_dead_inputs(op: Node, known: Known, values: dict[str, Array], model: onnx.ModelProto) -> None:
    """What is dead and no constant may hold anything: the live outputs do not change."""
    rule = known.rules[op.index]
    assert rule is not None
    random = np.random.default_rng(5)
    live = [random.random(known.view.of(output).shape) < 0.5 for output in op.outputs]
    demands = rule.live(op, list(live), known.view)
    changed = {}
    for slot in op.value_slots:
        name = op.inputs[slot].name
        fact = known.view.facts[name]
        here = ~fact.constant & (fact.number != zero_of(op.inputs[2], known.view.numbers) if name == "xd" else True)
        if slot in demands:
            wanted = demands[slot].live.copy()
            for choice in demands[slot].choices:
                wanted.flat[choice.positions] = True
            axes = tuple(a for a, size in enumerate(fact.shape) if size == 1 and wanted.shape[a] > 1)
            here &= ~np.broadcast_to(wanted.any(axis=axes, keepdims=True), fact.shape)
        changed[name] = np.where(np.broadcast_to(here, values[name].shape), noise(values[name], random), values[name])
    alone = graph(
        [item for item in model.graph.node if item.output[0] == "y" or item.output[0].startswith("k")],
        {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer if item.name.startswith("k")},
        {name: list(array.shape) for name, array in changed.items()},
        ["y"],
        opset=op.opset,
        element={name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in changed.items()} | {"y": 0},
    )
    want, got = (run(alone, {name: given[name] for name in changed})["y"] for given in (values, changed))
    shown = np.broadcast_to(live[0], want.shape)
    np.testing.assert_allclose(got[shown].astype(np.float64), want[shown].astype(np.float64), rtol=1e-5, atol=1e-5)


def check_quantised(
    op: str,
    *inputs: Any,
    spatial: tuple[int, ...] = (6, 6),
    opset: int = 21,
    removes: bool = True,
    opaque: bool = False,
    batch: str | int = "N",
    **attributes: Any,
) -> Slimmed:
    """Check one operator's rule: its facts, what it calls dead, and the slim graph of it and a reader of half of it."""
    nodes, constants, shape = build(op, inputs, spatial, batch, attributes)
    made = list(nodes[-1].output)
    given = [name for item in nodes[:-1] for name in item.output if not name.startswith("k")]
    model = graph(nodes, constants, {"input": shape}, [*made, *given], opset=opset)
    table = tables(normalise(copy_of(model)))
    known = channel_facts(table)
    op_node = next(item for item in table.nodes if item.outputs[0].name == "y")
    feed = np.random.default_rng(1).standard_normal([2 if isinstance(n, str) else n for n in shape]).astype(np.float32)
    values = run(model, {"input": feed})
    assert (known.rules[op_node.index] is None) == opaque, known.opaque
    check_facts(known, {name: values[name].astype(np.float64) for name in (*made, *given)})
    if not opaque:
        check_dead_inputs(op_node, known, values, model)
    more, reading = reader_of(values["y"], known, attributes)
    whole = graph([*nodes, *more], constants | reading, {"input": shape}, ["out"], opset=opset)
    slimmed = slim_and_verify(whole)
    assert (slimmed.analysis.keep.removed > 0) == (removes and not opaque), [row.after for row in slimmed.layers]
    again = slim_and_verify(slimmed.model)
    assert again.analysis.keep.removed == 0
    kinds = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
    count = [[kind for kind in operators(graph_) if kind in kinds] for graph_ in (whole, slimmed.model)]
    assert sorted(count[0]) == sorted(count[1])
    return slimmed


def reader_of(values: Array, known: Known, attributes: dict[str, Any]) -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """Return a linear reader of some of the operator's positions along its first expanded axis."""
    fact, rank = known.view.facts["y"], values.ndim
    axis = next((a for a, size in enumerate(fact.shape) if size > 1), rank - 1)
    size = values.shape[axis]
    weight = np.random.default_rng(3).standard_normal((size, 2)).astype(np.float32)
    weight[size // 2 :] = 0
    nodes, constants = [], {"reader": weight}
    name = "y"
    if values.dtype == np.int32:
        nodes.append(node("Cast", [name], ["y_float"], to=onnx.TensorProto.FLOAT))
    elif np.issubdtype(values.dtype, np.integer):
        constants |= {"unit": f32(0.05), "origin": values.dtype.type(3)}
        nodes.append(node("DequantizeLinear", [name, "unit", "origin"], ["y_float"]))
    if nodes:
        name = "y_float"
    order = [a for a in range(rank) if a != axis] + [axis]
    nodes += [node("Transpose", [name], ["turned"], perm=order), node("MatMul", ["turned", "reader"], ["out"])]
    return nodes, constants


def small_integers(*shape: int, seed: int = 7, kind: type = np.int8) -> Array:
    """Weights with a zero row, and a row that repeats."""
    info = np.iinfo(kind)
    array = np.random.default_rng(seed).integers(max(info.min, -100), 100, shape).astype(kind)
    array[1], array[3] = 0, array[0]
    return array


def steps(count: int, seed: int = 2) -> Array:
    return np.random.default_rng(seed).uniform(0.01, 0.03, count).astype(np.float32)


def biases(count: int) -> Array:
    return np.random.default_rng(4).integers(-3000, 3000, count).astype(np.int32)


def with_zero(array: Array, zero: int | Array, axis: int = 0) -> Array:
    """Return unsigned weights whose zero row is at the zero point."""
    column = [1] * array.ndim
    column[axis] = -1
    points = np.broadcast_to(np.reshape(zero, column if np.ndim(zero) else ()), array.shape)
    return np.clip(array.astype(np.int32) + points, 0, 255).astype(np.uint8)


SQUARE = small_integers(6, 6, 3, 3)
MATRIX = small_integers(6, 6)
BY_CHANNEL = np.array([0.03, 0.05, 0.02, 0.03, 0.04, 0.07], dtype=f32)
POINTS = np.array([3, 4, 5, 3, 0, 9], dtype=np.uint8)
Y = (f32(0.2), np.uint8(100))
QX = ("x8", STEP, POINT)

LINES: list[Line] = [
    ("QuantizeLinear", ("x", STEP), {"opset": 10}),
    ("QuantizeLinear", ("x", STEP, POINT), {"opset": 10, "batch": 2}),
    ("QuantizeLinear", ("x", STEP, np.int8(-3)), {"opset": 13}),
    ("QuantizeLinear", ("x", STEP, np.int8(-3)), {"opset": 19, "saturate": 1}),
    ("QuantizeLinear", ("x", STEP, np.int16(7)), {"opset": 21}),
    ("QuantizeLinear", ("x", STEP), {"opset": 21, "output_dtype": 2}),
    ("QuantizeLinear", ("x", STEP, POINT), {"opset": 23}),
    ("QuantizeLinear", ("x", BY_CHANNEL, POINTS), {"opset": 13}),
    ("QuantizeLinear", ("x", BY_CHANNEL, POINTS), {"opset": 21, "axis": -3}),
    ("QuantizeLinear", ("x", BY_CHANNEL), {"opset": 13, "axis": 2, "spatial": (6, 4), "batch": 2}),
    ("QuantizeLinear", ("x", f32([0.03]), np.uint8([4])), {"opset": 13}),
    (
        "QuantizeLinear",
        ("x", dense(2, 3, 6, 6) ** 2 + f32(0.1)),
        {"opaque": True, "block_size": 2, "batch": 2, "axis": 1},
    ),
    ("DequantizeLinear", ("x8", STEP, POINT), {"opset": 10}),
    ("DequantizeLinear", ("x8", STEP), {"opset": 13}),
    ("DequantizeLinear", ("x8", f32(0.5), np.uint8(7)), {"opset": 23}),
    ("DequantizeLinear", ("x8", BY_CHANNEL, POINTS), {"opset": 19}),
    ("DequantizeLinear", ("x8", BY_CHANNEL, POINTS), {"opset": 21, "axis": -3}),
    ("DequantizeLinear", ("xd", "step", "point"), {"opaque": True}),
    ("DynamicQuantizeLinear", ("x",), {"opset": 11, "removes": False}),
    ("DynamicQuantizeLinear", ("x",), {"spatial": (), "removes": False}),
    ("QLinearConv", (*QX, SQUARE, f32(0.02), np.int8(0), *Y), {}),
    ("QLinearConv", (*QX, SQUARE, f32(0.02), np.int8(0), *Y, biases(6)), {"pads": [1] * 4, "opset": 10}),
    ("QLinearConv", (*QX, SQUARE, steps(6), np.zeros(6, np.int8), *Y, biases(6)), {"strides": [2, 1]}),
    ("QLinearConv", (*QX, with_zero(SQUARE, 9), f32(0.02), np.uint8(9), *Y), {"auto_pad": "SAME_UPPER"}),
    ("QLinearConv", (*QX, small_integers(6, 1, 3, 3), steps(6), np.zeros(6, np.int8), *Y), {"group": 6}),
    ("QLinearConv", (*QX, small_integers(4, 3, 3, 3), steps(4), np.zeros(4, np.int8), *Y, biases(4)), {"group": 2}),
    ("QLinearMatMul", (*QX, MATRIX.T.copy(), f32(0.02), np.int8(0), *Y), {"spatial": (), "opset": 10}),
    ("QLinearMatMul", (*QX, with_zero(MATRIX, 9).T.copy(), f32(0.02), np.uint8(9), *Y), {"spatial": ()}),
    ("QLinearMatMul", (*QX, MATRIX.T.copy(), steps(6), np.zeros(6, np.int8), *Y), {"spatial": ()}),
    ("QLinearMatMul", (with_zero(MATRIX, 9), f32(0.02), np.uint8(9), *QX, *Y), {}),
    ("ConvInteger", ("x8", with_zero(SQUARE, 9), POINT, np.uint8(9)), {"opset": 10}),
    ("ConvInteger", ("x8", with_zero(SQUARE, 0), POINT), {"pads": [1] * 4}),
    ("ConvInteger", ("xd", with_zero(SQUARE, 9), "point", np.uint8(9)), {"pads": [1] * 4}),
    ("MatMulInteger", ("x8", MATRIX.T.copy(), POINT), {"spatial": (), "opset": 10}),
    ("MatMulInteger", ("xd", MATRIX.T.copy(), "point", np.int8(0)), {"spatial": ()}),
    ("MatMulInteger", ("xd", MATRIX.T.copy(), "point", np.zeros(6, np.int8)), {"spatial": ()}),
    ("MatMulInteger", (with_zero(MATRIX, 9), "x8", np.uint8(9), POINT), {}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    op, inputs, options = line
    check_quantised(op, *inputs, **options)


INT32_BIAS = Kept(biases(6), f32(0.0006))
ROWS = {"scale": steps(6), "zero_point": np.zeros(6, np.int8), "axis": 0}

STORED_LINES: list[Line] = [
    ("Conv", ("x", Kept(SQUARE, f32(0.02), np.int8(0))), {"opset": 13}),
    ("Conv", ("x", Kept(SQUARE, **ROWS)), {"pads": [1] * 4}),
    ("Conv", ("x", Kept(SQUARE, **ROWS), Kept(biases(6), steps(6), None, 0)), {}),
    ("Conv", ("x", Kept(SQUARE, f32(0.02)), INT32_BIAS), {"pads": [1] * 4, "opset": 10}),
    ("Conv", ("x", Kept(with_zero(SQUARE, 9), f32(0.02), np.uint8(9)), dense(6)), {}),
    ("Conv", ("x", Kept(SQUARE, floats=True, **ROWS), dense(6)), {"pads": [1] * 4}),
    ("Conv", ("x", Kept(SQUARE, f32(0.02), np.int8(0), floats=True), INT32_BIAS), {"opset": 19}),
    ("Conv", ("x", Kept(small_integers(6, 1, 3, 3), **ROWS), INT32_BIAS), {"group": 6, "pads": [1] * 4}),
    ("Conv", ("x", Kept(small_integers(4, 3, 3, 3), steps(4), None, 0), dense(4)), {"group": 2}),
    ("Conv", ("x", Kept(SQUARE, steps(6), None, 1), dense(6)), {}),
    ("ConvTranspose", ("x", Kept(SQUARE.swapaxes(0, 1).copy(), steps(6), None, 1), dense(6)), {"strides": [2, 2]}),
    ("ConvTranspose", ("x", Kept(SQUARE.swapaxes(0, 1).copy(), f32(0.02)), INT32_BIAS), {"strides": [2, 2]}),
    ("Gemm", ("x", Kept(MATRIX, **ROWS), INT32_BIAS), {"spatial": (), "transB": 1}),
    ("Gemm", ("x", Kept(MATRIX.T.copy(), steps(6), None, 1), dense(6)), {"spatial": ()}),
    ("Gemm", ("x", Kept(MATRIX, f32(0.02))), {"spatial": (), "transB": 1, "alpha": 0.5, "opaque": True}),
    ("MatMul", ("x", Kept(MATRIX.T.copy(), steps(6), np.zeros(6, np.int8), 1)), {"spatial": ()}),
    ("MatMul", ("x", Kept(MATRIX.T.copy(), f32(0.02), np.int8(0), floats=True)), {"spatial": ()}),
    ("MatMul", ("x", Kept(MATRIX.T.copy(), steps(6), None, 0)), {"spatial": ()}),
    ("Add", ("x", Kept(biases(6).reshape(6, 1, 1), f32(0.001))), {}),
    ("Add", ("x", Kept(biases(6).reshape(6, 1, 1), steps(6), None, 0)), {}),
    ("Mul", ("x", Kept(small_integers(6, 1, 1), f32(0.01), np.int8(0), floats=True)), {}),
]


@pytest.mark.parametrize("line", STORED_LINES, ids=label)
def test_stored_constants(line: Line) -> None:
    op, inputs, options = line
    check_quantised(op, *inputs, **options)


# --- traps ------------------------------------------------------------------------------------------------------------


def initializers(model: onnx.ModelProto) -> dict[str, Array]:
    return {item.name: np.asarray(onnx.numpy_helper.to_array(item)) for item in model.graph.initializer}


def of_type(slimmed: Slimmed, op_type: str) -> list[onnx.NodeProto]:
    return [item for item in slimmed.model.graph.node if item.op_type == op_type]


def behind_source(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], source_weight: Array, source_bias: Array, opset: int = 19
) -> onnx.ModelProto:
    """Return a graph: input [N, 3, 6, 6] -> a 1x1 convolution ``x`` -> ``xq`` -> ``xf``, quantised, -> nodes -> y."""
    first = [
        node("Conv", ["input", "x_w", "x_b"], ["x"]),
        node("QuantizeLinear", ["x", "x_step", "x_zero"], ["xq"]),
        node("DequantizeLinear", ["xq", "x_step", "x_zero"], ["xf"]),
    ]
    more = {"x_w": source_weight, "x_b": source_bias, "x_step": STEP, "x_zero": POINT}
    return graph([*first, *nodes], more | constants, {"input": ["N", 3, 6, 6]}, ["y"], opset=opset)


@pytest.mark.parametrize("floats", [False, True])
def test_quantised_weights_are_not_folded_into_floats(floats: bool) -> None:
    more, constants = Kept(SQUARE, floats=floats, **ROWS).make("w")
    layers = [
        *more,
        node("Conv", ["xf", "w"], ["h"]),
        node("Neg", ["one"], ["folded"]),
        node("Add", ["h", "folded"], ["y"]),
    ]
    model = behind_source(layers, constants | {"one": f32(1)}, dense(6, 3, 1, 1), dense(6))
    slim = slim_and_verify(model).model
    assert [kind for kind in operators(model) if kind != "Neg"] == operators(slim)
    assert initializers(slim)["w_f" if floats else "w_q"].dtype == (f32 if floats else np.int8)


def test_zeros_leave_with_the_scales_and_the_bias_of_their_rows() -> None:
    weight = dense(6, 3, 1, 1)
    weight[[1, 4]] = 0
    first, constants = Kept(small_integers(6, 6, 3, 3), **ROWS).make("w")
    second, more = Kept(biases(6), steps(6), None, 0).make("b")
    third, last = Kept(small_integers(4, 6, 1, 1), f32(0.02)).make("v")
    bias = more["b_q"]
    bias[1] = 0  # row 1 of the weights is zero too
    layers = [node("Conv", ["xf", "w", "b"], ["h"], pads=[1] * 4), node("Conv", ["h", "v"], ["y"])]
    model = behind_source([*first, *second, *third, *layers], constants | more | last, weight, np.zeros(6, f32))
    slim = slim_and_verify(model).model
    kept = initializers(slim)
    assert kept["w_q"].shape == (5, 4, 3, 3)
    np.testing.assert_array_equal(kept["w_scale"], np.delete(constants["w_scale"], 1))
    np.testing.assert_array_equal(kept["b_q"], np.delete(bias, 1))
    assert kept["v_q"].shape == (4, 5, 1, 1)


def test_a_shared_weight_is_stored_twice_where_its_readers_differ() -> None:
    first, constants = Kept(small_integers(4, 6, 1, 1), f32(0.02), np.int8(0)).make("w")
    weight = dense(6, 3, 1, 1)
    weight[2] = 0
    other = dense(6, 3, 1, 1, seed=9)
    other[[0, 5]] = 0
    layers = [
        node("Conv", ["xf", "w"], ["a"]),
        node("Conv", ["input", "z_w"], ["z"]),
        node("Conv", ["z", "w"], ["b"]),
        node("Concat", ["a", "b"], ["y"], axis=1),
    ]
    model = behind_source([*first, *layers], constants | {"z_w": other}, weight, np.zeros(6, f32))
    slimmed = slim_and_verify(model)
    shapes = sorted(a.shape for a in initializers(slimmed.model).values() if a.dtype == np.int8 and a.ndim == 4)
    assert shapes == [(4, 4, 1, 1), (4, 5, 1, 1)]
    assert len(of_type(slimmed, "DequantizeLinear")) == 3


def test_equal_inputs_of_quantised_weights_stay() -> None:
    weight = dense(6, 3, 1, 1)
    weight[3] = weight[0]
    first, constants = Kept(small_integers(4, 6, 1, 1), f32(0.02)).make("w")
    model = behind_source([*first, node("Conv", ["xf", "w"], ["y"])], constants, weight, np.zeros(6, f32))
    assert slim_and_verify(model).removed_channels == 0


@pytest.mark.parametrize(("pads", "taken"), [([0] * 4, True), ([1] * 4, False)])
def test_a_constant_goes_into_an_integer_bias_but_not_under_padding(pads: list[int], taken: bool) -> None:
    weight, bias = dense(6, 3, 1, 1), np.zeros(6, f32)
    weight[2], bias[2] = 0, 0.75  # 25 steps
    integers = small_integers(4, 6, 3, 3)
    first, constants = Kept(integers, f32(0.02)).make("w")
    second, more = Kept(biases(4), f32(0.02) * STEP).make("b")
    layers = [node("Conv", ["xf", "w", "b"], ["y"], pads=pads)]
    model = behind_source([*first, *second, *layers], constants | more, weight, bias)
    slim = slim_and_verify(model).model
    assert (initializers(slim)["w_q"].shape[1] == 5) == taken
    if taken:
        want = more["b_q"] + 25 * integers[:, 2].astype(np.int32).sum(axis=(1, 2))
        np.testing.assert_array_equal(initializers(slim)["b_q"], want)


def test_a_constant_that_is_no_whole_number_of_steps_stays_out_of_an_integer_bias() -> None:
    weight, bias = dense(6, 3, 1, 1), np.zeros(6, f32)
    weight[2], bias[2] = 0, 0.75
    first, constants = Kept(small_integers(4, 6, 1, 1), f32(0.02)).make("w")
    second, more = Kept(biases(4), f32(0.0011)).make("b")
    layers = [*first, *second, node("Conv", ["xf", "w", "b"], ["y"])]
    assert slim_and_verify(behind_source(layers, constants | more, weight, bias)).removed_channels == 0


def test_columns_that_are_kept_and_dead_hold_the_zero_point() -> None:
    weight = dense(6, 3, 1, 1)
    weight[[1, 2, 4]] = 0
    first, constants = Kept(with_zero(small_integers(4, 6, 1, 1), 9), f32(0.02), np.uint8(9)).make("w")
    model = behind_source([*first, node("Conv", ["xf", "w"], ["y"])], constants, weight, np.zeros(6, f32))
    slimmed = slim_and_verify(model, round_to=4)
    integers = initializers(slimmed.model)["w_q"]
    assert integers.shape[1] == 4
    assert sorted((integers == 9).all(axis=(0, 2, 3)).tolist()) == [False, False, False, True]


@pytest.mark.parametrize(("zero", "gone"), [(0.0, True), (0.75, False)])
def test_a_qlinearconv_pads_with_the_zero_point(zero: float, gone: bool) -> None:
    weight, bias = dense(6, 3, 1, 1), np.zeros(6, f32)
    weight[2], bias[2] = 0, zero
    names = ["xq", "x_step", "x_zero", "w", "w_step", "w_zero", "y_step", "y_zero"]
    constants = {"w": SQUARE, "w_step": f32(0.02), "w_zero": np.int8(0), "y_step": Y[0], "y_zero": Y[1]}
    layers = [
        node("QLinearConv", names, ["h"], pads=[1] * 4),
        node("DequantizeLinear", ["h", "y_step", "y_zero"], ["y"]),
    ]
    slim = slim_and_verify(behind_source(layers, constants, weight, bias)).model
    assert (initializers(slim)["w"].shape[1] == 5) == gone


def test_a_constant_in_the_middle_between_two_integers_may_be_rounded_either_way() -> None:
    def constants(bias: float) -> int:
        model = behind_source([node("Relu", ["xf"], ["y"])], {}, np.zeros((6, 3, 1, 1), f32), np.full(6, bias, f32))
        known = channel_facts(tables(normalise(copy_of(model))))
        return int(known.view.facts["xq"].constant.sum())

    assert constants(10 * float(STEP)) == 6
    assert constants(10.5 * float(STEP)) == 0
    assert constants(10.5004 * float(STEP)) == 0  # dividing and multiplying by the reciprocal need not agree


@pytest.mark.parametrize(("constant", "gone"), [(0.0, True), (7.5, False)])
def test_only_zeros_are_free_in_a_dynamic_range(constant: float, gone: bool) -> None:
    weight, bias = dense(6, 3, 1, 1), np.zeros(6, f32)
    weight[2], bias[2] = 0, constant
    layers = [
        node("DynamicQuantizeLinear", ["x"], ["q", "step", "zero"]),
        node("ConvInteger", ["q", "w", "zero", "w_zero"], ["sums"], pads=[1] * 4),
        node("Cast", ["sums"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["floats", "step"], ["y"]),
    ]
    constants = {"w": with_zero(SQUARE, 9), "w_zero": np.uint8(9)}
    slim = slim_and_verify(behind_source(layers, constants, weight, bias)).model
    assert (initializers(slim)["w"].shape[1] == 5) == gone


def test_scales_by_column_that_a_computed_scale_multiplies_leave_with_their_columns() -> None:
    weight = small_integers(6, 6).T.copy()
    layers = [
        node("GlobalAveragePool", ["xf"], ["pooled"]),
        node("Flatten", ["pooled"], ["flat"]),
        node("DynamicQuantizeLinear", ["flat"], ["q", "step", "zero"]),
        node("Mul", ["step", "w_step"], ["steps"]),
        node("MatMulInteger", ["q", "w", "zero"], ["sums"]),
        node("Cast", ["sums"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["floats", "steps"], ["h"]),
        node("Gemm", ["h", "v"], ["y"]),
    ]
    constants = {"w": weight, "w_step": steps(6), "v": dense(6, 2)}
    slim = slim_and_verify(behind_source(layers, constants, dense(6, 3, 1, 1), np.zeros(6, f32))).model
    assert initializers(slim)["w"].shape == (6, 4), "a zero column goes, and one that repeats"
    assert initializers(slim)["w_step"].shape == (4,)


def test_a_transposed_weight_is_stored_transposed() -> None:
    first, constants = Kept(small_integers(6, 6), **ROWS).make("w")
    layers = [
        *first,
        node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        node("GlobalAveragePool", ["xf"], ["pooled"]),
        node("Flatten", ["pooled"], ["flat"]),
        node("MatMul", ["flat", "turned"], ["h"]),
        node("Gemm", ["h", "v"], ["y"]),
    ]
    model = behind_source(layers, constants | {"v": dense(6, 2)}, dense(6, 3, 1, 1), np.zeros(6, f32))
    slimmed = slim_and_verify(model)
    assert "Transpose" not in operators(slimmed.model)
    reader = of_type(slimmed, "DequantizeLinear")[-1]
    assert initializers(slimmed.model)[reader.input[0]].shape == (6, 5)
    assert initializers(slimmed.model)[reader.input[1]].shape == (5,)


def test_what_stands_between_the_pair_passes_integers() -> None:
    weight = dense(6, 3, 1, 1)
    weight[[1, 4]] = 0
    first, constants = Kept(small_integers(4, 12, 1, 1), f32(0.02)).make("w")
    layers = [
        *first,
        node("MaxPool", ["xq"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Concat", ["pooled", "pooled"], ["both"], axis=1),
        node("DequantizeLinear", ["both", "x_step", "x_zero"], ["floats"]),
        node("Conv", ["floats", "w"], ["y"]),
    ]
    slimmed = slim_and_verify(behind_source(layers, constants, weight, np.zeros(6, f32)))
    assert initializers(slimmed.model)["w_q"].shape == (4, 8, 1, 1)
    assert not slimmed.opaque
