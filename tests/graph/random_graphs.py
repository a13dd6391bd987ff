"""Random graphs of all rule families, as hypothesis strategies; they shrink to few nodes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Clip", "Relu6Plus")


@dataclass(frozen=True)
class Value:
    name: str
    channels: int
    size: int
    flat: bool = False  # [N, channels]


@dataclass
class Builder:
    """Collects nodes and weights; every weight is drawn from one seeded generator, structure from hypothesis."""

    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        self.count += 1
        name = f"c{self.count}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        self.count += 1
        name = f"v{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op.lower()}{self.count}", **attributes))
        return name

    def model(self, inputs: list[Any], outputs: list[Value], opset: int = 18) -> onnx.ModelProto:
        infos = [
            helper.make_tensor_value_info(
                value.name, TensorProto.FLOAT, ["N", value.channels] if value.flat else ["N", value.channels, value.size, value.size]
            )
            for value in outputs
        ]
        graph = helper.make_graph(self.nodes, "random", inputs, infos, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model


def planted(builder: Builder, draw: Any, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw weights with whole filters zeroed, filters repeated, and input columns zeroed."""
    weight = builder.random.standard_normal((rows, *shape)) / np.sqrt(max(1, np.prod(shape)))
    pattern = draw(st.sampled_from(("dense", "rows", "repeat", "columns", "all", "scaled")))
    chosen = builder.random.random(rows) < 0.5
    if pattern == "rows":
        weight[chosen] = 0
    elif pattern == "all":
        weight[:] = 0
    elif pattern == "repeat":
        weight[chosen] = weight[0]
    elif pattern == "scaled":
        weight[chosen] = 2 * weight[0]
    elif pattern == "columns" and len(shape) > 0:
        weight[:, builder.random.random(shape[0]) < 0.5] = 0
    return weight


def planted_bias(builder: Builder, draw: Any, rows: int) -> np.ndarray:
    bias = builder.random.standard_normal(rows)
    pattern = draw(st.sampled_from(("dense", "zero", "mixed", "same")))
    if pattern == "zero":
        bias[:] = 0
    elif pattern == "mixed":
        bias[builder.random.random(rows) < 0.6] = 0
    elif pattern == "same":
        bias[:] = bias[0]
    return bias


def conv(builder: Builder, draw: Any, x: Value) -> Value:
    form = draw(st.sampled_from(("plain", "plain", "depthwise", "grouped", "multiplier")))
    kernel = draw(st.sampled_from((1, 3)))
    pad = draw(st.sampled_from((0, kernel // 2))) if x.size >= kernel else kernel // 2
    stride = draw(st.sampled_from((1, 1, 2)))
    groups, rows = 1, draw(st.integers(1, 6))
    if form == "depthwise":
        groups = rows = x.channels
    elif form == "multiplier":
        groups, rows = x.channels, 2 * x.channels
    elif form == "grouped" and x.channels % 2 == 0:
        groups, rows = 2, 2 * draw(st.integers(1, 3))
    weight = planted(builder, draw, rows, (x.channels // groups, kernel, kernel))
    inputs = [x.name, builder.constant(weight)]
    if draw(st.booleans()):
        inputs.append(builder.constant(planted_bias(builder, draw, rows)))
    name = builder.node("Conv", inputs, kernel_shape=[kernel] * 2, pads=[pad] * 4, strides=[stride] * 2, group=groups)
    return Value(name, rows, (x.size + 2 * pad - kernel) // stride + 1)


def batchnorm(builder: Builder, draw: Any, x: Value) -> Value:
    scale = planted_bias(builder, draw, x.channels)
    arrays = [scale, planted_bias(builder, draw, x.channels), planted_bias(builder, draw, x.channels)]
    var = builder.random.uniform(0.5, 1.5, x.channels)
    return Value(
        builder.node("BatchNormalization", [x.name, *(builder.constant(a) for a in (*arrays, var))]), x.channels, x.size
    )


def activation(builder: Builder, draw: Any, x: Value) -> Value:
    op = draw(st.sampled_from(ACTIVATIONS))
    if op == "Clip":
        name = builder.node("Clip", [x.name, builder.constant(0.1), builder.constant(1.0)])
    elif op == "Relu6Plus":
        name = builder.node("Clip", [x.name, "", builder.constant(0.5)])
    else:
        name = builder.node(op, [x.name])
    return Value(name, x.channels, x.size, x.flat)


def binary(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    same = [v for v in values if (v.channels, v.size, v.flat) == (x.channels, x.size, x.flat)]
    other = draw(st.sampled_from(same))
    return Value(
        builder.node(draw(st.sampled_from(("Add", "Sub", "Mul"))), [x.name, other.name]), x.channels, x.size, x.flat
    )


def with_constant(builder: Builder, draw: Any, x: Value) -> Value:
    shape = draw(st.sampled_from(((x.channels, 1, 1), (1, x.channels, 1, 1), (1, 1, 1), (), (1, 1, x.size, x.size))))
    shape = (x.channels,) if x.flat else shape
    array = builder.random.standard_normal(shape)
    if draw(st.booleans()) and array.size:
        array = np.where(builder.random.random(shape) < 0.4, 0.0, array)
    inputs = [x.name, builder.constant(array)]
    if draw(st.booleans()):
        inputs.reverse()
    return Value(builder.node(draw(st.sampled_from(("Add", "Sub", "Mul"))), inputs), x.channels, x.size, x.flat)


def concat(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    same = [v for v in values if (v.size, v.flat) == (x.size, x.flat)]
    others = draw(st.lists(st.sampled_from(same), min_size=1, max_size=2))
    parts = [x, *others]
    name = builder.node("Concat", [v.name for v in parts], axis=1)
    return Value(name, sum(v.channels for v in parts), x.size, x.flat)


def pad(builder: Builder, draw: Any, x: Value) -> Value:
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    edge = draw(st.sampled_from((0, 0, 1)))
    fill = draw(st.sampled_from((0.0, 0.0, 0.75)))
    pads = [0, before, edge, edge, 0, after, edge, edge]
    inputs = [x.name, builder.constant(pads, np.int64), builder.constant(fill)]
    return Value(builder.node("Pad", inputs), x.channels + before + after, x.size + 2 * edge)


def slice_channels(builder: Builder, draw: Any, x: Value) -> Value:
    start = draw(st.integers(0, x.channels - 1))
    end = draw(st.integers(start + 1, x.channels))
    step = draw(st.sampled_from((1, 1, 2)))
    inputs = [x.name, *(builder.constant([n], np.int64) for n in (start, end, 1, step))]
    return Value(builder.node("Slice", inputs), len(range(start, end, step)), x.size, x.flat)


def slice_space(builder: Builder, draw: Any, x: Value) -> Value:
    inputs = [x.name, *(builder.constant(n, np.int64) for n in ([0, 0], [2**31, 2**31], [2, 3], [2, 2]))]
    return Value(builder.node("Slice", inputs), x.channels, (x.size + 1) // 2)


def pool(builder: Builder, draw: Any, x: Value) -> Value:
    op = draw(st.sampled_from(("MaxPool", "AveragePool")))
    edge = draw(st.sampled_from((0, 1)))
    if x.size < 3:
        edge = 1
    extra = {"count_include_pad": draw(st.integers(0, 1))} if op == "AveragePool" else {}
    name = builder.node(op, [x.name], kernel_shape=[3, 3], pads=[edge] * 4, strides=[1, 1], **extra)
    return Value(name, x.channels, x.size + 2 * edge - 2)


def gate(builder: Builder, draw: Any, x: Value) -> Value:
    """Squeeze and excitation."""
    hidden = draw(st.integers(1, 3))
    y = builder.node(draw(st.sampled_from(("GlobalAveragePool", "GlobalMaxPool"))), [x.name])
    for rows, columns, op in ((hidden, x.channels, "Relu"), (x.channels, hidden, "Sigmoid")):
        inputs = [y, builder.constant(planted(builder, draw, rows, (columns, 1, 1)))]
        y = builder.node("Conv", [*inputs, builder.constant(planted_bias(builder, draw, rows))], kernel_shape=[1, 1])
        y = builder.node(op, [y])
    return Value(builder.node("Mul", [x.name, y]), x.channels, x.size)


def round_trip(builder: Builder, draw: Any, x: Value) -> Value:
    """Data movement that comes back: transposed there and back, split into two axes and merged, unsqueezed."""
    form = draw(st.sampled_from(("transpose", "unsqueeze", "split", "shuffle")))
    if form == "transpose":
        y = builder.node("Transpose", [x.name], perm=[0, 2, 3, 1])
        y = builder.node("Relu", [y])
        y = builder.node("Transpose", [y], perm=[0, 3, 1, 2])
    elif form == "unsqueeze":
        y = builder.node("Unsqueeze", [x.name, builder.constant([1], np.int64)])
        y = builder.node("Squeeze", [y, builder.constant([1], np.int64)])
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


def flatten(builder: Builder, draw: Any, x: Value) -> Value:
    form = draw(st.sampled_from(("flatten", "reshape", "mean", "gap")))
    if form == "flatten":
        return Value(builder.node("Flatten", [x.name]), x.channels * x.size**2, 1, True)
    if form == "reshape":
        target = draw(st.sampled_from(([-1, x.channels * x.size**2], [0, x.channels * x.size**2], [0, -1])))
        return Value(builder.node("Reshape", [x.name, builder.constant(target, np.int64)]), x.channels * x.size**2, 1, True)
    if form == "mean":
        y = builder.node("ReduceMean", [x.name, builder.constant([2, 3], np.int64)], keepdims=0)
        return Value(y, x.channels, 1, True)
    return Value(builder.node("Flatten", [builder.node("GlobalAveragePool", [x.name])]), x.channels, 1, True)


def dense(builder: Builder, draw: Any, x: Value) -> Value:
    rows = draw(st.integers(1, 5))
    weight = planted(builder, draw, rows, (x.channels,))
    form = draw(st.sampled_from(("gemm", "gemm_t", "matmul", "scaled")))
    if form == "matmul":
        return Value(builder.node("MatMul", [x.name, builder.constant(weight.T)]), rows, 1, True)
    inputs = [x.name, builder.constant(weight.T if form == "gemm_t" else weight)]
    if draw(st.booleans()):
        inputs.append(builder.constant(planted_bias(builder, draw, rows)))
    extra = {"alpha": 0.5, "beta": 2.0} if form == "scaled" else {}
    return Value(builder.node("Gemm", inputs, transB=int(form != "gemm_t"), **extra), rows, 1, True)


MAPS = {
    "conv": conv,
    "batchnorm": batchnorm,
    "activation": activation,
    "with_constant": with_constant,
    "pad": pad,
    "slice_channels": slice_channels,
    "slice_space": slice_space,
    "pool": pool,
    "gate": gate,
    "round_trip": round_trip,
    "opaque": opaque,
}
JOINS = {"binary": binary, "concat": concat}
FLAT = {"dense": dense, "activation": activation, "with_constant": with_constant, "slice_channels": slice_channels}
WEIGHTS = ("conv",) * 6 + ("batchnorm",) * 2 + ("activation",) * 2 + ("binary",) * 4 + ("concat",) * 2


@st.composite
def models(draw: Any, max_steps: int = 12) -> onnx.ModelProto:
    """Draw a random graph that ends in one or two outputs."""
    builder = Builder(draw(st.integers(0, 2**16)))
    channels, size = draw(st.integers(1, 3)), draw(st.sampled_from((4, 5, 6)))
    start = Value("input", channels, size)
    values = [conv(builder, draw, start)]
    for _ in range(draw(st.integers(1, max_steps))):
        x = draw(st.sampled_from(values[-3:]))
        op = draw(st.sampled_from((*WEIGHTS, *MAPS, *JOINS)))
        if x.channels > 24 or (op in ("round_trip", "pool", "slice_space") and x.size < 2):
            continue
        values.append(JOINS[op](builder, draw, x, values) if op in JOINS else MAPS[op](builder, draw, x))
    outputs = [values[-1]]
    if draw(st.booleans()):
        tail = [flatten(builder, draw, values[-1])]
        for _ in range(draw(st.integers(1, 3))):
            op = draw(st.sampled_from((*FLAT, *JOINS)))
            x = tail[-1]
            tail.append(JOINS[op](builder, draw, x, tail) if op in JOINS else FLAT[op](builder, draw, x))
        outputs = [tail[-1]]
        if draw(st.booleans()):
            outputs.append(values[-1])
    dimensions = ["N", channels, size, size]
    return builder.model([helper.make_tensor_value_info("input", TensorProto.FLOAT, dimensions)], outputs)
