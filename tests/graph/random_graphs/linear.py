"""Linear layers of random graphs: convolutions of all kinds, dense layers, attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from graph.random_graphs.builder import Builder, Value, planted, planted_bias
from graph.random_graphs.quantised import stored_weight


def bias(builder: Builder, draw: Any, rows: int) -> list[str]:
    """Draw a bias or none."""
    return [builder.weight(draw, planted_bias(builder, draw, rows))] if draw(st.booleans()) else []


def weight(builder: Builder, draw: Any, array: np.ndarray) -> str:
    """Return a weight's name: one in floats, or now and then one in integers."""
    if builder.integers and builder.opset >= 10 and draw(st.integers(0, 9)) == 9:
        return stored_weight(builder, draw, array)
    return builder.weight(draw, array)


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
        groups, rows = grouped(draw, x.channels)
    array = planted(builder, draw, rows, (x.channels // groups, kernel, kernel))
    inputs = [x.name, weight(builder, draw, array), *bias(builder, draw, rows)]
    extra: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "group": groups}
    if draw(st.integers(0, 5)) == 0:
        return x.to(
            builder.node("Conv", inputs, auto_pad="SAME_UPPER", **extra), channels=rows, size=-(-x.size // stride)
        )
    name = builder.node("Conv", inputs, pads=[pad] * 4, dilations=[dilation] * 2, **extra)
    return x.to(name, channels=rows, size=(x.size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1)


def grouped(draw: Any, channels: int) -> tuple[int, int]:
    """Draw a number of groups, and of outputs."""
    groups = draw(st.sampled_from([n for n in (2, 3, 4) if channels % n == 0] or [1]))
    return groups, groups * draw(st.integers(1, 3))


def conv_transpose(builder: Builder, draw: Any, x: Value) -> Value:
    form = draw(st.sampled_from(("plain", "plain", "depthwise", "grouped")))
    groups, rows = 1, draw(st.integers(1, 5))
    if form == "depthwise":
        groups = rows = x.channels
    elif form == "grouped":
        groups, rows = grouped(draw, x.channels)
    kernel, stride, pad, more = draw(
        st.sampled_from(((2, 2, 0, 0), (3, 1, 1, 0), (3, 2, 1, 1), (1, 1, 0, 0), (3, 2, 1, 0)))
    )
    array = planted(builder, draw, rows, (x.channels // groups, kernel, kernel))
    array = array.reshape(groups, rows // groups, x.channels // groups, kernel, kernel).swapaxes(1, 2)
    array = array.reshape(x.channels, rows // groups, kernel, kernel)
    inputs = [x.name, builder.weight(draw, array), *bias(builder, draw, rows)]
    extra: dict[str, Any] = {"group": groups, "kernel_shape": [kernel] * 2, "strides": [stride] * 2}
    name = builder.node("ConvTranspose", inputs, pads=[pad] * 4, output_padding=[more] * 2, **extra)
    return x.to(name, channels=rows, size=stride * (x.size - 1) + more + kernel - 2 * pad)


def conv_1d(builder: Builder, draw: Any, x: Value) -> Value:
    """A convolution along all places in a row; at times a pool after it."""
    rows = draw(st.integers(1, 5))
    array = planted(builder, draw, rows, (x.channels, 3))
    row = builder.reshape(x.name, 0, x.channels, x.size**2)
    y = builder.node("Conv", [row, builder.weight(draw, array), *bias(builder, draw, rows)], pads=[1, 1])
    if draw(st.booleans()):
        y = builder.node("MaxPool", [y], kernel_shape=[3], pads=[1, 1])
    return x.to(builder.reshape(y, 0, rows, x.size, x.size), channels=rows)


def conv_3d(builder: Builder, draw: Any, x: Value) -> Value:
    rows = draw(st.integers(1, 5))
    array = planted(builder, draw, rows, (x.channels, 1, 3, 3))
    y = builder.unsqueeze(x.name, 2)
    y = builder.node("Conv", [y, builder.weight(draw, array), *bias(builder, draw, rows)], pads=[0, 1, 1] * 2)
    if draw(st.booleans()):
        y = builder.node("AveragePool", [y], kernel_shape=[1, 3, 3], pads=[0, 1, 1] * 2)
    return x.to(builder.squeeze(y, 2), channels=rows)


def tokens(builder: Builder, draw: Any, x: Value) -> Value:
    """A linear layer on channels that lie last."""
    rows = draw(st.integers(1, 6))
    y = builder.transpose(x.name, 0, 2, 3, 1)
    y = builder.node("MatMul", [y, builder.constant(planted(builder, draw, rows, (x.channels,)).T)])
    if draw(st.booleans()):
        y = builder.node("Add", [y, builder.constant(planted_bias(builder, draw, rows))])
    return x.to(builder.transpose(y, 0, 3, 1, 2), channels=rows)


def attention(builder: Builder, draw: Any, x: Value) -> Value:
    """Attention over all places, with one or two heads."""
    heads, width, rows = draw(st.sampled_from((1, 2))), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    inner, places = heads * width, x.size**2
    rowed = builder.transpose(builder.reshape(x.name, 0, x.channels, places), 0, 2, 1)
    parts = []
    for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)):
        y = builder.node("MatMul", [rowed, builder.constant(planted(builder, draw, inner, (x.channels,)).T)])
        if draw(st.booleans()):
            y = builder.node("Add", [y, builder.constant(planted_bias(builder, draw, inner))])
        parts.append(builder.transpose(builder.reshape(y, 0, places, heads, width), *order))
    query, key, value = parts
    scores = builder.node("Mul", [builder.node("MatMul", [query, key]), builder.constant(0.3 / width)])
    mixed = builder.node("MatMul", [builder.node("Softmax", [scores], axis=3), value])
    y = builder.reshape(builder.transpose(mixed, 0, 2, 1, 3), 0, places, inner)
    y = builder.node("MatMul", [y, builder.constant(planted(builder, draw, rows, (inner,)).T)])
    return x.to(builder.reshape(builder.transpose(y, 0, 2, 1), 0, rows, x.size, x.size), channels=rows)


def gate(builder: Builder, draw: Any, x: Value) -> Value:
    """Squeeze and excitation, or a gate that all channels share."""
    if draw(st.integers(0, 3)) == 0:
        array = builder.constant(planted(builder, draw, 1, (x.channels, 1, 1)))
        y = builder.node("Sigmoid", [builder.node("Conv", [x.name, array], kernel_shape=[1, 1])])
        return x.to(builder.node("Mul", [x.name, y]))
    y = builder.node(draw(st.sampled_from(("GlobalAveragePool", "GlobalMaxPool"))), [x.name])
    hidden = draw(st.integers(1, 3))
    for rows, into, op in ((hidden, x.channels, "Relu"), (x.channels, hidden, draw(st.sampled_from(GATES)))):
        array = builder.constant(planted(builder, draw, rows, (into, 1, 1)))
        y = builder.node(op, [builder.node("Conv", [y, array, *bias(builder, draw, rows)])])
    return x.to(builder.node("Mul", [x.name, y]))


GATES = ("Sigmoid", "HardSigmoid")


def rows_product(builder: Builder, draw: Any, x: Value) -> Value:
    """A linear layer along another axis than the channels'."""
    return x.to(builder.node("MatMul", [x.name, builder.constant(planted(builder, draw, x.size, (x.size,)))]))


def dense(builder: Builder, draw: Any, x: Value) -> Value:
    rows = draw(st.integers(1, 5))
    array = planted(builder, draw, rows, (x.channels,))
    form = draw(st.sampled_from(("gemm", "gemm_t", "matmul", "scaled")))
    if form == "matmul":
        return x.to(builder.node("MatMul", [x.name, builder.constant(array.T)]), channels=rows)
    inputs = [x.name, builder.constant(array.T if form == "gemm_t" else array)]
    if draw(st.booleans()) or builder.opset < 11:
        shapes: tuple[tuple[int, ...], ...] = ((rows,), (rows,), (1, rows), (1,), ())
        inputs.append(builder.constant(np.resize(planted_bias(builder, draw, rows), draw(st.sampled_from(shapes)))))
    extra = {"alpha": 0.5, "beta": 2.0} if form == "scaled" else {}
    return x.to(builder.node("Gemm", inputs, transB=int(form != "gemm_t"), **extra), channels=rows)


def residual(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    """A block whose branch, with or without a norm, comes back to its input."""
    array = builder.weight(draw, planted(builder, draw, x.channels, (x.channels, 3, 3)))
    branch = builder.node("Conv", [x.name, array], pads=[1] * 4)
    if draw(st.booleans()):
        arrays = [planted_bias(builder, draw, x.channels) for _ in range(3)]
        statistics = [*arrays, builder.random.uniform(0.5, 1.5, x.channels)]
        branch = builder.node("BatchNormalization", [branch, *(builder.constant(part) for part in statistics)])
    return x.to(builder.node("Relu", [builder.node("Add", [branch, x.name])]))


def product(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    """The product of two computed matrices, on every channel."""
    other = draw(st.sampled_from([value for value in values if value.like(x)]))
    mixed = builder.node("Softmax", [other.name], axis=3)
    return x.to(builder.node("MatMul", [x.name, mixed] if draw(st.booleans()) else [mixed, x.name]))
