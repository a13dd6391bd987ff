"""Random graphs of all rule families, as hypothesis strategies; they shrink to few nodes.

Hypothesis draws the structure, one seeded generator the numbers. Weights are planted with what removal feeds on:
filters of zero, filters that repeat, input columns of zero.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

ACTIVATIONS = ("Relu", "Relu", "LeakyRelu", "Sigmoid", "Clip", "Relu6Plus")
BATCHES = ("N", "N", 1, 2)
DENSE = ("dense",)
PLANTED = ("dense", "rows", "rows", "repeat", "columns", "all", "scaled")


@dataclass(frozen=True)
class Value:
    name: str
    channels: int
    size: int
    flat: bool = False  # [N, channels]

    def like(self, other: "Value") -> bool:
        return (self.channels, self.size, self.flat) == (other.channels, other.size, other.flat)


@dataclass
class Builder:
    """Collects nodes and weights."""

    seed: int
    batch: int | str = "N"
    patterns: tuple[str, ...] = PLANTED
    sharing: bool = True
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    weights: dict[tuple[int, ...], str] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        self.count += 1
        name = f"c{self.count}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def weight(self, draw: Any, array: np.ndarray) -> str:
        """Return a weight's name; now and then that of an earlier weight of this shape, which is then shared."""
        if self.sharing and array.shape in self.weights and draw(st.integers(0, 3)) == 0:
            return self.weights[array.shape]
        self.weights[array.shape] = name = self.constant(array)
        return name

    def node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        self.count += 1
        name = f"v{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op.lower()}{self.count}", **attributes))
        return name

    def shape(self, value: Value) -> list[int | str]:
        return [self.batch, value.channels] if value.flat else [self.batch, value.channels, value.size, value.size]

    def model(self, inputs: list[Value], outputs: list[Value], opset: int = 18) -> onnx.ModelProto:
        infos = [
            [helper.make_tensor_value_info(value.name, TensorProto.FLOAT, self.shape(value)) for value in values]
            for values in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "random", *infos, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model


def planted(builder: Builder, draw: Any, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw weights with whole filters zeroed, filters repeated, or input columns zeroed."""
    weight = builder.random.standard_normal((rows, *shape)) / np.sqrt(max(1, np.prod(shape)))
    pattern = draw(st.sampled_from(builder.patterns))
    chosen = builder.random.random(rows) < 0.5
    if pattern == "rows":
        weight[chosen] = 0
    elif pattern == "all":
        weight[:] = 0
    elif pattern == "repeat":
        weight[chosen] = weight[0]
    elif pattern == "scaled":
        weight[chosen] = 2 * weight[0]
    elif pattern == "columns":
        weight[:, builder.random.random(shape[0]) < 0.5] = 0
    return weight


def planted_bias(builder: Builder, draw: Any, rows: int) -> np.ndarray:
    bias = builder.random.standard_normal(rows)
    if builder.patterns == DENSE:
        return bias
    pattern = draw(st.sampled_from(("dense", "zero", "mixed", "same")))
    if pattern == "zero":
        bias[:] = 0
    elif pattern == "mixed":
        bias[builder.random.random(rows) < 0.6] = 0
    elif pattern == "same":
        bias[:] = bias[0]
    return bias


# --- values of four axes ----------------------------------------------------------------------------------------------


def conv(builder: Builder, draw: Any, x: Value) -> Value:
    form = draw(st.sampled_from(("plain", "plain", "plain", "depthwise", "grouped", "multiplier")))
    kernel = draw(st.sampled_from((1, 3)))
    pad = draw(st.sampled_from((0, kernel // 2))) if x.size >= kernel else kernel // 2
    stride, dilation = draw(st.sampled_from((1, 1, 2))), 1
    if kernel == 3 and x.size >= 5:
        dilation = draw(st.sampled_from((1, 1, 2)))
    groups, rows = 1, draw(st.integers(1, 6))
    if form == "depthwise":
        groups = rows = x.channels
    elif form == "multiplier":
        groups, rows = x.channels, 2 * x.channels
    elif form == "grouped":
        groups = draw(st.sampled_from([n for n in (2, 3, 4) if x.channels % n == 0] or [1]))
        rows = groups * draw(st.integers(1, 3))
    inputs = [x.name, builder.weight(draw, planted(builder, draw, rows, (x.channels // groups, kernel, kernel)))]
    if draw(st.booleans()):
        inputs.append(builder.weight(draw, planted_bias(builder, draw, rows)))
    extra: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "group": groups}
    if draw(st.integers(0, 5)) == 0:
        name = builder.node("Conv", inputs, auto_pad="SAME_UPPER", **extra)
        return Value(name, rows, -(-x.size // stride))
    name = builder.node("Conv", inputs, pads=[pad] * 4, dilations=[dilation] * 2, **extra)
    return Value(name, rows, (x.size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1)


def batchnorm(builder: Builder, draw: Any, x: Value) -> Value:
    arrays = [planted_bias(builder, draw, x.channels) for _ in range(3)]
    var = builder.random.uniform(0.5, 1.5, x.channels)
    names = [builder.constant(array) for array in (*arrays, var)]
    return Value(builder.node("BatchNormalization", [x.name, *names]), x.channels, x.size)


def activation(builder: Builder, draw: Any, x: Value) -> Value:
    op = draw(st.sampled_from(ACTIVATIONS))
    if op == "Clip":
        name = builder.node("Clip", [x.name, builder.constant(0.1), builder.constant(1.0)])
    elif op == "Relu6Plus":
        name = builder.node("Clip", [x.name, "", builder.constant(0.5)])
    else:
        name = builder.node(op, [x.name])
    return Value(name, x.channels, x.size, x.flat)


def passing(builder: Builder, draw: Any, x: Value) -> Value:
    """Append a node that changes nothing, or only the precision."""
    op = draw(st.sampled_from(("Identity", "Dropout", "Cast")))
    if op != "Cast":
        return Value(builder.node(op, [x.name]), x.channels, x.size, x.flat)
    double = builder.node("Cast", [x.name], to=TensorProto.DOUBLE)
    return Value(builder.node("Cast", [double], to=TensorProto.FLOAT), x.channels, x.size, x.flat)


def with_constant(builder: Builder, draw: Any, x: Value) -> Value:
    forms = ((x.channels, 1, 1), (1, x.channels, 1, 1), (1, 1, 1), (), (1, 1, x.size, x.size), (x.size,))
    shape = (x.channels,) if x.flat else draw(st.sampled_from(forms))
    array = builder.random.standard_normal(shape)
    if draw(st.booleans()) and builder.patterns != DENSE:
        array = np.where(builder.random.random(shape) < 0.4, 0.0, array)
    inputs = [x.name, builder.constant(array)]
    if draw(st.booleans()):
        inputs.reverse()
    return Value(builder.node(draw(st.sampled_from(("Add", "Sub", "Mul"))), inputs), x.channels, x.size, x.flat)


def pad(builder: Builder, draw: Any, x: Value) -> Value:
    mode = draw(st.sampled_from(("constant", "constant", "edge", "reflect"))) if x.size > 1 else "constant"
    before, after = (draw(st.integers(0, 2)), draw(st.integers(0, 2))) if mode == "constant" else (0, 0)
    edge = draw(st.sampled_from((0, 0, 1))) if mode == "constant" else 1
    fill = draw(st.sampled_from((0.0, 0.0, 0.75)))
    pads = [0, before, edge, edge, 0, after, edge, edge]
    inputs = [x.name, builder.constant(pads, np.int64), builder.constant(fill)]
    return Value(builder.node("Pad", inputs, mode=mode), x.channels + before + after, x.size + 2 * edge)


def slice_channels(builder: Builder, draw: Any, x: Value) -> Value:
    start = draw(st.integers(0, x.channels - 1))
    end = draw(st.integers(start + 1, x.channels))
    step = draw(st.sampled_from((1, 1, 2, -1)))
    taken = range(start, end, step) if step > 0 else range(end - 1, start - 1, step)
    bounds = (start, end) if step > 0 else (end - 1, start - 1 if start else -(2**31))
    inputs = [x.name, *(builder.constant([n], np.int64) for n in (*bounds, 1, step))]
    return Value(builder.node("Slice", inputs), len(taken), x.size, x.flat)


def slice_space(builder: Builder, draw: Any, x: Value) -> Value:
    inputs = [x.name, *(builder.constant(n, np.int64) for n in ([0, 0], [2**31, 2**31], [2, 3], [2, 2]))]
    return Value(builder.node("Slice", inputs), x.channels, (x.size + 1) // 2)


def pool(builder: Builder, draw: Any, x: Value) -> Value:
    op = draw(st.sampled_from(("MaxPool", "AveragePool")))
    edge = draw(st.sampled_from((0, 1))) if x.size >= 3 else 1
    extra = {"count_include_pad": draw(st.integers(0, 1))} if op == "AveragePool" else {}
    name = builder.node(op, [x.name], kernel_shape=[3, 3], pads=[edge] * 4, strides=[1, 1], **extra)
    return Value(name, x.channels, x.size + 2 * edge - 2)


def gate(builder: Builder, draw: Any, x: Value) -> Value:
    """Squeeze and excitation, or a gate that all channels share."""
    if draw(st.integers(0, 3)) == 0:
        weight = builder.constant(planted(builder, draw, 1, (x.channels, 1, 1)))
        y = builder.node("Sigmoid", [builder.node("Conv", [x.name, weight], kernel_shape=[1, 1])])
        return Value(builder.node("Mul", [x.name, y]), x.channels, x.size)
    hidden = draw(st.integers(1, 3))
    y = builder.node(draw(st.sampled_from(("GlobalAveragePool", "GlobalMaxPool"))), [x.name])
    for rows, columns, op in ((hidden, x.channels, "Relu"), (x.channels, hidden, "Sigmoid")):
        inputs = [y, builder.constant(planted(builder, draw, rows, (columns, 1, 1)))]
        y = builder.node("Conv", [*inputs, builder.constant(planted_bias(builder, draw, rows))], kernel_shape=[1, 1])
        y = builder.node(op, [y])
    return Value(builder.node("Mul", [x.name, y]), x.channels, x.size)


def round_trip(builder: Builder, draw: Any, x: Value) -> Value:
    """Data movement that comes back: transposed there and back, split into two axes and merged, unsqueezed."""
    form = draw(st.sampled_from(("transpose", "unsqueeze", "split", "shuffle", "rows")))
    if form == "transpose":
        y = builder.node("Transpose", [x.name], perm=[0, 2, 3, 1])
        y = builder.node("Relu", [y])
        y = builder.node("Transpose", [y], perm=[0, 3, 1, 2])
    elif form == "unsqueeze":
        y = builder.node("Unsqueeze", [x.name, builder.constant([1], np.int64)])
        y = builder.node("Squeeze", [y, builder.constant([1], np.int64)])
    elif form == "rows":  # a linear layer along another axis than the channels'
        weight = planted(builder, draw, x.size, (x.size,))
        y = builder.node("MatMul", [x.name, builder.constant(weight)])
    else:
        groups = 2 if x.channels % 2 == 0 else 1
        inner = [0, groups, x.channels // groups, x.size, x.size]
        y = builder.node("Reshape", [x.name, builder.constant(inner, np.int64)])
        if form == "shuffle":
            y = builder.node("Transpose", [y], perm=[0, 2, 1, 3, 4])
        y = builder.node("Reshape", [y, builder.constant([0, x.channels, x.size, x.size], np.int64)])
    return Value(y, x.channels, x.size)


def opaque(builder: Builder, draw: Any, x: Value) -> Value:
    return Value(builder.node("Softmax", [x.name], axis=1), x.channels, x.size, x.flat)


# --- joins of two values ----------------------------------------------------------------------------------------------


def binary(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    other = draw(st.sampled_from([value for value in values if value.like(x)]))
    op = draw(st.sampled_from(("Add", "Add", "Sub", "Mul")))
    return Value(builder.node(op, [x.name, other.name]), x.channels, x.size, x.flat)


def concat(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    same = [value for value in values if (value.size, value.flat) == (x.size, x.flat)]
    parts = [x, *draw(st.lists(st.sampled_from(same), min_size=1, max_size=2))]
    name = builder.node("Concat", [value.name for value in parts], axis=1)
    return Value(name, sum(value.channels for value in parts), x.size, x.flat)


def residual(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    """A block whose branch, with or without a norm, comes back to its input."""
    weight = builder.weight(draw, planted(builder, draw, x.channels, (x.channels, 3, 3)))
    branch = Value(builder.node("Conv", [x.name, weight], pads=[1] * 4), x.channels, x.size)
    if draw(st.booleans()):
        branch = batchnorm(builder, draw, branch)
    return Value(builder.node("Relu", [builder.node("Add", [branch.name, x.name])]), x.channels, x.size)


def space_concat(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    """Two maps side by side, brought back to a square."""
    other = draw(st.sampled_from([value for value in values if value.like(x)]))
    y = builder.node("Concat", [x.name, other.name], axis=3)
    name = builder.node("MaxPool", [y], kernel_shape=[1, 2], strides=[1, 2])
    return Value(name, x.channels, x.size)


# --- the head ---------------------------------------------------------------------------------------------------------


def flatten(builder: Builder, draw: Any, x: Value) -> Value:
    form = draw(st.sampled_from(("flatten", "reshape", "mean", "gap", "squeeze")))
    if form == "flatten":
        return Value(builder.node("Flatten", [x.name]), x.channels * x.size**2, 1, True)
    if form == "reshape":
        target = draw(st.sampled_from(([-1, x.channels * x.size**2], [0, x.channels * x.size**2], [0, -1])))
        name = builder.node("Reshape", [x.name, builder.constant(target, np.int64)])
        return Value(name, x.channels * x.size**2, 1, True)
    if form == "mean":
        y = builder.node("ReduceMean", [x.name, builder.constant([2, 3], np.int64)], keepdims=0)
        return Value(y, x.channels, 1, True)
    y = builder.node("GlobalAveragePool", [x.name])
    if form == "gap":
        return Value(builder.node("Flatten", [y]), x.channels, 1, True)
    free = builder.batch == 2 and x.channels > 1 and draw(st.booleans())  # of all axes of size 1
    axes = [] if free else [builder.constant([2, 3], np.int64)]
    return Value(builder.node("Squeeze", [y, *axes]), x.channels, 1, True)


def dense(builder: Builder, draw: Any, x: Value) -> Value:
    rows = draw(st.integers(1, 5))
    weight = planted(builder, draw, rows, (x.channels,))
    form = draw(st.sampled_from(("gemm", "gemm_t", "matmul", "scaled")))
    if form == "matmul":
        return Value(builder.node("MatMul", [x.name, builder.constant(weight.T)]), rows, 1, True)
    inputs = [x.name, builder.constant(weight.T if form == "gemm_t" else weight)]
    if draw(st.booleans()):
        bias = planted_bias(builder, draw, rows)
        shapes: tuple[tuple[int, ...], ...] = ((rows,), (rows,), (1, rows), (1,), ())
        shape = draw(st.sampled_from(shapes))
        inputs.append(builder.constant(np.resize(bias, shape)))
    extra = {"alpha": 0.5, "beta": 2.0} if form == "scaled" else {}
    return Value(builder.node("Gemm", inputs, transB=int(form != "gemm_t"), **extra), rows, 1, True)


MAPS = {
    "conv": conv,
    "batchnorm": batchnorm,
    "activation": activation,
    "passing": passing,
    "with_constant": with_constant,
    "pad": pad,
    "slice_channels": slice_channels,
    "slice_space": slice_space,
    "pool": pool,
    "gate": gate,
    "round_trip": round_trip,
    "opaque": opaque,
}
JOINS = {"binary": binary, "concat": concat, "residual": residual, "space_concat": space_concat}
FLAT = {
    "dense": dense,
    "activation": activation,
    "passing": passing,
    "with_constant": with_constant,
    "slice_channels": slice_channels,
}
FLAT_JOINS = {"binary": binary, "concat": concat}
OFTEN = ("conv",) * 8 + ("batchnorm",) * 2 + ("activation",) * 2 + ("binary",) * 3 + ("concat",) * 2 + ("residual",) * 2
NEEDS_ROOM = frozenset({"round_trip", "pool", "slice_space", "space_concat"})


@st.composite
def models(
    draw: Any, max_steps: int = 12, *, patterns: tuple[str, ...] = PLANTED, sharing: bool = True
) -> onnx.ModelProto:
    """Draw a random graph that ends in one or two outputs."""
    builder = Builder(draw(st.integers(0, 2**16)), draw(st.sampled_from(BATCHES)), patterns, sharing)
    start = Value("input", draw(st.integers(1, 3)), draw(st.sampled_from((4, 5, 6))))
    values = [conv(builder, draw, start)]
    for _ in range(draw(st.integers(1, max_steps))):
        x = draw(st.sampled_from(values[-3:]))
        op = draw(st.sampled_from((*OFTEN, *MAPS, *JOINS)))
        if x.channels > 24 or (op in NEEDS_ROOM and x.size < 2):
            continue
        values.append(JOINS[op](builder, draw, x, values) if op in JOINS else MAPS[op](builder, draw, x))
    if draw(st.booleans()):  # a last reader that lets most of its input go
        values.append(conv(builder, draw, values[-1]))
    outputs = [values[-1]]
    if draw(st.booleans()):
        tail = [flatten(builder, draw, values[-1])]
        for _ in range(draw(st.integers(1, 3))):
            op = draw(st.sampled_from(("dense", "dense", *FLAT, *FLAT_JOINS)))
            x = tail[-1]
            tail.append(FLAT_JOINS[op](builder, draw, x, tail) if op in FLAT_JOINS else FLAT[op](builder, draw, x))
        outputs = [tail[-1]]
        if draw(st.booleans()):
            outputs.append(values[-1])
    return builder.model([start], outputs)
