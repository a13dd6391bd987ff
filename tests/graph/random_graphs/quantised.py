"""Quantised layers of random graphs. Their scales are powers of two, so that what is rounded is computed exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto

from graph.random_graphs.builder import Builder, Value, planted, planted_bias

STEP = 2.0**-4
WEIGHT_STEP = 2.0**-6
KINDS = ((np.uint8, 128), (np.uint8, 0), (np.int8, 0), (np.int8, 7))
"""Types and zero points of quantised values."""


def _scales(builder: Builder, step: float, count: int | None) -> np.ndarray:
    """One scale, or one for each channel."""
    return np.asarray(step) if count is None else step * 2.0 ** -builder.random.integers(0, 2, count)


def stored_weight(builder: Builder, draw: Any, array: np.ndarray, axis: int = 0) -> str:
    """Store a weight in integers behind a DequantizeLinear, with scales per tensor or per output channel (``axis``)."""
    count = array.shape[axis] if builder.opset >= 13 and array.shape[axis] > 1 and draw(st.booleans()) else None
    scales = _scales(builder, WEIGHT_STEP, count)
    column = [-1 if place == axis else 1 for place in range(array.ndim)] if count else ()
    integers = builder.constant(np.clip(np.round(array / scales.reshape(column)), -127, 127), np.int8)
    zeros = np.zeros(scales.shape, np.int8)
    return _converted(builder, "DequantizeLinear", integers, scales, zeros, axis if count else None)


def _converted(
    builder: Builder, op: str, x: str, scales: np.ndarray, zeros: np.ndarray, axis: int | None = None
) -> str:
    extra = {} if axis is None else {"axis": axis}
    return builder.node(op, [x, builder.constant(scales), builder.constant(zeros, zeros.dtype)], **extra)


def _there_and_back(builder: Builder, x: str, scales: np.ndarray, zeros: np.ndarray, axis: int | None = None) -> str:
    y = _converted(builder, "QuantizeLinear", x, scales, zeros, axis)
    return _converted(builder, "DequantizeLinear", y, scales, zeros, axis)


def through_integers(builder: Builder, draw: Any, x: Value) -> Value:
    """QuantizeLinear and DequantizeLinear, with scales per tensor or per channel."""
    if builder.opset < 13 or x.channels == 1 or draw(st.booleans()):
        return requantised(builder, draw, x)
    scales = _scales(builder, STEP, x.channels)
    zeros = np.full(scales.shape, draw(st.sampled_from((0, 128))), dtype=np.uint8)
    return x.to(_there_and_back(builder, x.name, scales, zeros, 1))  # no integer layer can read that


def requantised(builder: Builder, draw: Any, x: Value) -> Value:
    """QuantizeLinear and DequantizeLinear with one scale."""
    kinds = KINDS if builder.opset < 21 else KINDS[:2]  # ONNX Runtime would take int8 for uint8 behind a Slice
    kind, zero = draw(st.sampled_from(kinds))
    point = np.asarray(zero, dtype=kind)
    return x.to(_there_and_back(builder, x.name, np.asarray(STEP), point), exact=True)


def quantised_conv(builder: Builder, draw: Any, x: Value) -> Value:
    """A convolution of quantised values with quantised weights, quantised again; in QDQ form or by QLinearConv."""
    depthwise = draw(st.integers(0, 3)) == 0
    rows, groups = (x.channels, x.channels) if depthwise else (draw(st.integers(1, 6)), 1)
    kernel = draw(st.sampled_from((1, 3)))
    extra: dict[str, Any] = {"pads": [kernel // 2] * 4, "group": groups, "kernel_shape": [kernel] * 2}
    array = planted(builder, draw, rows, (x.channels // groups, kernel, kernel))
    steps = np.round(planted_bias(builder, draw, rows) / (STEP * WEIGHT_STEP))
    zero = draw(st.sampled_from((0, 128, 100)))
    if draw(st.booleans()):
        inputs = [x.name, stored_weight(builder, draw, array), builder.constant(steps * STEP * WEIGHT_STEP)]
        y = builder.node("Conv", inputs, **extra)
        y = builder.node("Relu", [y]) if draw(st.booleans()) else y
        return requantised(builder, draw, x.to(y, channels=rows))
    point = [builder.constant(STEP), builder.constant(zero, np.uint8)]
    weight = builder.constant(np.clip(np.round(array / WEIGHT_STEP), -127, 127), np.int8)
    inputs = [builder.node("QuantizeLinear", [x.name, *point]), *point]
    inputs += [weight, builder.constant(WEIGHT_STEP), builder.constant(0, np.int8), *point]
    y = builder.node("QLinearConv", [*inputs, builder.constant(steps, np.int32)], **extra)
    return x.to(builder.node("DequantizeLinear", [y, *point]), channels=rows, exact=True)


def integer_layer(builder: Builder, draw: Any, x: Value) -> Value:
    """A layer whose input is quantised with a range found at run time: ConvInteger or MatMulInteger."""
    y, scale, point = builder.nodes_out("DynamicQuantizeLinear", [x.name], 3)
    if draw(st.integers(0, 2)) == 0:
        return x.to(builder.node("DequantizeLinear", [y, scale, point]))
    rows = draw(st.integers(1, 5))
    array = planted(builder, draw, rows, (x.channels,) if x.flat else (x.channels, 1, 1))
    integers = np.clip(np.round(array / WEIGHT_STEP), -127, 127)
    op = "MatMulInteger" if x.flat else "ConvInteger"
    inputs = [y, builder.constant(integers.T if x.flat else integers, np.int8), point]
    total = builder.node("Cast", [builder.node(op, inputs)], to=TensorProto.FLOAT)
    factor = builder.node("Mul", [scale, builder.constant(WEIGHT_STEP)])
    return x.to(builder.node("Mul", [total, factor]), channels=rows)


def quantised_dense(builder: Builder, draw: Any, x: Value) -> Value:
    """A product of quantised values with quantised weights: by QLinearMatMul, or MatMul in QDQ form."""
    rows = draw(st.integers(1, 5))
    array = planted(builder, draw, rows, (x.channels,))
    if draw(st.booleans()):
        y = builder.node("MatMul", [x.name, stored_weight(builder, draw, array.T, axis=1)])
        return requantised(builder, draw, x.to(y, channels=rows))
    point = [builder.constant(STEP), builder.constant(128, np.uint8)]
    weight = builder.constant(np.clip(np.round(array.T / WEIGHT_STEP), -127, 127), np.int8)
    inputs = [builder.node("QuantizeLinear", [x.name, *point]), *point]
    inputs += [weight, builder.constant(WEIGHT_STEP), builder.constant(0, np.int8), *point]
    return x.to(
        builder.node("DequantizeLinear", [builder.node("QLinearMatMul", inputs), *point]), channels=rows, exact=True
    )


def quantised_sum(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    """The sum of two quantised values, quantised again."""
    other = draw(st.sampled_from([value for value in values if value.like(x) and value.exact]))
    y = builder.node("Add", [x.name, other.name])
    if draw(st.booleans()):
        y = builder.node("Relu", [y])
    return requantised(builder, draw, x.to(y))
