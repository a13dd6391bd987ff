"""Quantised layers of random graphs. Their scales are powers of two, so that what is rounded is computed exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto

from graph.random_graphs.builder import Builder, Value, planted, planted_bias

STEP = 2.0**-4
WEIGHT_STEP = 2.0**-6


def _scales(builder: Builder, step: float, count: int | None) -> np.ndarray:
    """One scale, or one for each channel."""
    return np.asarray(step) if count is None else step * 2.0 ** -builder.random.integers(0, 2, count)


def stored_weight(builder: Builder, draw: Any, array: np.ndarray) -> str:
    """Store a weight in integers behind a DequantizeLinear, with scales per tensor or per output channel."""
    count = len(array) if builder.opset >= 13 and draw(st.booleans()) else None
    scales = _scales(builder, WEIGHT_STEP, count)
    column = scales.reshape(-1, *(1,) * (array.ndim - 1)) if count else scales
    integers = builder.constant(np.clip(np.round(array / column), -127, 127), np.int8)
    return _dequantised(builder, integers, scales, np.zeros(scales.shape, np.int8), 0 if count else None)


def _dequantised(builder: Builder, x: str, scales: np.ndarray, zeros: np.ndarray, axis: int | None) -> str:
    extra = {} if axis is None else {"axis": axis}
    return builder.node("DequantizeLinear", [x, builder.constant(scales), builder.constant(zeros, zeros.dtype)], **extra)


def _quantised(builder: Builder, x: str, scales: np.ndarray, zeros: np.ndarray, axis: int | None) -> str:
    extra = {} if axis is None else {"axis": axis}
    return builder.node("QuantizeLinear", [x, builder.constant(scales), builder.constant(zeros, zeros.dtype)], **extra)


def through_integers(builder: Builder, draw: Any, x: Value) -> Value:
    """QuantizeLinear and DequantizeLinear, with scales per tensor or per channel."""
    count = x.channels if builder.opset >= 13 and draw(st.booleans()) else None
    kind, zero = draw(st.sampled_from(((np.uint8, 128), (np.int8, 0), (np.int8, 7), (np.uint8, 0))))
    scales = _scales(builder, STEP, count)
    zeros, axis = np.full(scales.shape, zero, dtype=kind), 1 if count else None
    y = _quantised(builder, x.name, scales, zeros, axis)
    return x.to(_dequantised(builder, y, scales, zeros, axis), exact=True)


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
        return through_integers(builder, draw, x.to(y, channels=rows))
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
        y = builder.node("MatMul", [x.name, stored_weight(builder, draw, array.T)])
        return through_integers(builder, draw, x.to(y, channels=rows))
    point = [builder.constant(STEP), builder.constant(128, np.uint8)]
    weight = builder.constant(np.clip(np.round(array.T / WEIGHT_STEP), -127, 127), np.int8)
    inputs = [builder.node("QuantizeLinear", [x.name, *point]), *point]
    inputs += [weight, builder.constant(WEIGHT_STEP), builder.constant(0, np.int8), *point]
    return x.to(builder.node("DequantizeLinear", [builder.node("QLinearMatMul", inputs), *point]), channels=rows, exact=True)
