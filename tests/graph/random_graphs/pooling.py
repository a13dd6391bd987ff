"""Operators of random graphs that put elements together: pools, reductions, softmax, those that choose."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto

from graph.random_graphs.builder import Builder, Value
from graph.random_graphs.elementwise import domain


def pool(builder: Builder, draw: Any, x: Value) -> Value:
    op = draw(st.sampled_from(("MaxPool", "AveragePool") * 2 + (("LpPool",) if builder.opset < 22 else ())))
    edge = draw(st.sampled_from((0, 1))) if x.size >= 3 else 1
    extra: dict[str, Any] = {"count_include_pad": draw(st.integers(0, 1))} if op == "AveragePool" else {}
    if op == "LpPool":  # without this its derivative at 0 is infinite
        name = builder.node(op, [domain(builder, x.name, "positive")], kernel_shape=[3, 3], pads=[edge] * 4, p=2)
        return x.to(name, size=x.size + 2 * edge - 2)
    if builder.opset >= 10 and draw(st.integers(0, 3)) == 0:
        name = builder.node(op, [x.name], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, **extra)
        return x.to(name, size=(x.size + 1) // 2)
    y, pads = x.name, [edge] * 4
    if op == "MaxPool" and edge and draw(st.integers(0, 2)) == 0:
        y, pads = builder.pad(x.name, [0, 0, *pads[:2]] * 2, "constant", -np.inf), [0] * 4
    name = builder.node(op, [y], kernel_shape=[3, 3], pads=pads, strides=[1, 1], **extra)
    return x.to(name, size=x.size + 2 * edge - 2)


def global_pool(builder: Builder, draw: Any, x: Value) -> Value:
    ops = ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
    op = draw(st.sampled_from(ops if builder.opset < 22 else ops[:2]))  # ONNX Runtime has no newer one
    y = domain(builder, x.name, "positive") if op == "GlobalLpPool" else x.name
    return x.to(builder.node(op, [y]), size=1)


REDUCED_IN = {
    "ReduceMean": "",
    "ReduceSum": "",
    "ReduceMax": "",
    "ReduceMin": "",
    "ReduceL1": "",
    "ReduceL2": "positive",
    "ReduceSumSquare": "unit",
    "ReduceLogSum": "positive",
    "ReduceLogSumExp": "unit",
    "ReduceProd": "",
}
"""Reductions, and into which domain their input is brought."""


def _reduced(builder: Builder, draw: Any, x: Value, axes: list[int], keepdims: int) -> str:
    op = draw(st.sampled_from(list(REDUCED_IN)))
    y = domain(builder, x.name, REDUCED_IN[op])
    if op == "ReduceProd":  # of many factors near 1
        y = builder.node("Mul", [builder.node("Sigmoid", [y]), builder.constant(0.4)])
        y = builder.node("Add", [y, builder.constant(0.8)])
    return builder.reduce(op, y, axes, keepdims)


def reduce_space(builder: Builder, draw: Any, x: Value) -> Value:
    axes = draw(st.sampled_from(([2, 3], [-1, -2] if builder.opset >= 11 else [2, 3])))
    if draw(st.booleans()):
        return x.to(_reduced(builder, draw, x, axes, 1), size=1)
    return x.to(builder.unsqueeze(_reduced(builder, draw, x, axes, 0), 2, 3), size=1)


def reduce_channels(builder: Builder, draw: Any, x: Value) -> Value:
    if draw(st.booleans()):
        return x.to(_reduced(builder, draw, x, [1], 1), channels=1)
    return x.to(builder.unsqueeze(_reduced(builder, draw, x, [1], 0), 1), channels=1)


def softmax(builder: Builder, draw: Any, x: Value) -> Value:
    axes = (1, 1, -1) if x.flat else (1, 1, 2, 3)
    op = draw(st.sampled_from(("Softmax", "Softmax", "LogSoftmax", *(("Hardmax",) if x.exact else ()))))
    return x.to(builder.node(op, [x.name], axis=draw(st.sampled_from(axes))))


def cumsum(builder: Builder, draw: Any, x: Value) -> Value:
    axis = builder.constant(1 if x.flat else draw(st.sampled_from((1, 2, 3))), "int64")
    how = {"reverse": draw(st.integers(0, 1)), "exclusive": draw(st.integers(0, 1))}
    return x.to(builder.node("CumSum", [x.name, axis], **how))


def topk(builder: Builder, draw: Any, x: Value) -> Value:
    """The largest or smallest few; over channels, or over places of each row."""
    k = draw(st.integers(1, x.channels))
    inputs, extra = ([x.name], {"k": k}) if builder.opset < 10 else ([x.name, builder.ints(k)], {})
    if builder.opset >= 11:
        extra["largest"] = draw(st.integers(0, 1))
    values, indices = builder.nodes_out("TopK", inputs, 2, axis=1, **extra)
    if x.exact and draw(st.integers(0, 2)) == 0:
        return x.to(builder.node("Cast", [indices], to=TensorProto.FLOAT), channels=k)
    return x.to(values, channels=k, exact=x.exact)


def arg(builder: Builder, draw: Any, x: Value) -> Value:
    """Return which channel is the largest, as an integer; the end of a graph."""
    op = draw(st.sampled_from(("ArgMax", "ArgMin")))
    return x.to(builder.node(op, [x.name], axis=1, keepdims=1), channels=1, element=TensorProto.INT64)
