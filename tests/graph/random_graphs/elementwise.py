"""Elementwise operators of random graphs; where one jumps, it is used so that its result does not, or exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto

from graph.random_graphs.builder import Builder, Value, constant_shape, planted_bias, planted_constant

SMOOTH: dict[str, tuple[int, str, dict[str, Any]]] = {
    "Relu": (9, "", {}),
    "LeakyRelu": (9, "", {"alpha": 0.2}),
    "Sigmoid": (9, "", {}),
    "Tanh": (9, "", {}),
    "HardSigmoid": (9, "", {}),
    "HardSwish": (14, "", {}),
    "Mish": (18, "", {}),
    "Gelu": (20, "", {"approximate": "tanh"}),
    "Elu": (9, "", {}),
    "Selu": (9, "", {}),
    "Celu": (12, "", {"alpha": 0.5}),
    "Softplus": (9, "", {}),
    "Softsign": (9, "", {}),
    "Erf": (9, "", {}),
    "Abs": (9, "", {}),
    "Neg": (9, "", {}),
    "Shrink": (9, "", {"lambd": 0.3, "bias": 0.3}),
    "ThresholdedRelu": (10, "", {"alpha": 0.0}),
    "Sin": (9, "", {}),
    "Cos": (9, "", {}),
    "Atan": (9, "", {}),
    "Asinh": (9, "", {}),
    "Exp": (9, "unit", {}),
    "Tan": (9, "unit", {}),
    "Sinh": (9, "unit", {}),
    "Cosh": (9, "unit", {}),
    "Asin": (9, "part", {}),
    "Acos": (9, "part", {}),
    "Atanh": (9, "part", {}),
    "Log": (9, "positive", {}),
    "Sqrt": (9, "positive", {}),
    "Reciprocal": (9, "positive", {}),
    "Acosh": (9, "above one", {}),
}
"""Continuous functions: since which operator set, into which domain its input is brought, and attributes."""

STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "Floor": (9, {}),
    "Ceil": (9, {}),
    "Round": (11, {}),
    "Sign": (9, {}),
    "Shrink": (9, {"lambd": 0.3, "bias": 0.1}),
    "ThresholdedRelu": (10, {"alpha": 0.3}),
}
"""Functions that jump."""

TWO_SIDED = ("Greater", "Less", "GreaterOrEqual", "LessOrEqual")


def domain(builder: Builder, x: str, kind: str) -> str:
    """Bring a value into the domain of a function."""
    if kind in ("unit", "part"):
        y = builder.node("Tanh", [x])
        return y if kind == "unit" else builder.node("Mul", [y, builder.constant(0.9)])
    if kind in ("positive", "above one"):
        return builder.node("Add", [builder.node("Abs", [x]), builder.constant(0.5 if kind == "positive" else 1.5)])
    return x


def activation(builder: Builder, draw: Any, x: Value) -> Value:
    form = draw(st.sampled_from(("Relu", "Relu", "any", "any", "any", "Clip", "Clip above")))
    if form == "Relu":
        return x.to(builder.node("Relu", [x.name]))
    if form == "Clip":
        return x.to(builder.clip(x.name, 0.1, 1.0))
    if form == "Clip above":
        return x.to(builder.clip(x.name, None, 0.5))
    op = draw(st.sampled_from([name for name, (since, _, _) in SMOOTH.items() if builder.opset >= since]))
    _, kind, attributes = SMOOTH[op]
    return x.to(builder.node(op, [domain(builder, x.name, kind)], **attributes))


def prelu(builder: Builder, draw: Any, x: Value) -> Value:
    shared = draw(st.booleans())
    slopes = np.resize(planted_bias(builder, draw, x.channels), 1 if shared else x.channels)
    if draw(st.integers(0, 3)) == 0:
        slopes[:] = draw(st.sampled_from((0.0, 1.0, 0.25)))
    if not x.flat and not (shared and draw(st.booleans())):
        slopes = slopes.reshape(-1, 1, 1)
    return x.to(builder.node("PRelu", [x.name, builder.constant(slopes)]))


def exact_steps(builder: Builder, draw: Any, x: Value) -> Value:
    """A function that jumps, or a comparison taken as a number."""
    if draw(st.integers(0, 2)) == 0:
        return x.to(builder.node("Cast", [comparison(builder, draw, x)], to=TensorProto.FLOAT))
    op = draw(st.sampled_from([name for name, (since, _) in STEPS.items() if builder.opset >= since]))
    return x.to(builder.node(op, [x.name], **STEPS[op][1]))


def comparison(builder: Builder, draw: Any, x: Value) -> str:
    ops = TWO_SIDED if builder.opset >= 12 else TWO_SIDED[:2]
    op = draw(st.sampled_from((*ops, "Equal") if builder.opset >= 11 else ops))
    edges = np.round(planted_constant(builder, draw, constant_shape(draw, x)) * 4) / 4
    return builder.node(op, [x.name, builder.constant(edges)])


def choice(builder: Builder, draw: Any, x: Value) -> Value:
    """A comparison whose two sides meet where it flips, with logic in between; or a choice that is fixed."""
    form = draw(st.sampled_from(("max", "ramp", "logic", "fixed", "fixed")))
    shape = constant_shape(draw, x)
    edge = planted_constant(builder, draw, shape)
    if form == "fixed":
        mask = builder.constant(builder.random.random(shape) < 0.5, np.bool_)
        other = builder.constant(planted_constant(builder, draw, constant_shape(draw, x)))
        sides = [x.name, other] if draw(st.booleans()) else [other, x.name]
        return x.to(builder.node("Where", [mask, *sides]))
    low = builder.constant(edge)
    over = builder.node("Greater", [x.name, low])
    if form == "max":
        return x.to(builder.node("Where", [over, x.name, low]))
    if form == "ramp":
        return x.to(
            builder.node(
                "Mul", [builder.node("Cast", [over], to=TensorProto.FLOAT), builder.node("Sub", [x.name, low])]
            )
        )
    high = builder.constant(edge + 1)
    below = builder.node("Not", [builder.node("Greater", [x.name, high])])
    between = builder.node("And", [over, below])
    clipped = builder.node("Min", [builder.node("Max", [x.name, low]), high])
    if draw(st.booleans()):
        outside = builder.node(
            draw(st.sampled_from(("Or", "Xor"))), [builder.node("Not", [over]), builder.node("Not", [below])]
        )
        return x.to(builder.node("Where", [outside, clipped, x.name]))
    return x.to(builder.node("Where", [between, x.name, clipped]))


CONSTANT_OPS = ("Add", "Add", "Sub", "Mul", "Mul", "Div", "Min", "Max", "Sum", "Mean", "Pow")


def with_constant(builder: Builder, draw: Any, x: Value) -> Value:
    op = draw(st.sampled_from(CONSTANT_OPS))
    array = planted_constant(builder, draw, constant_shape(draw, x))
    y = x.name
    constant_first = draw(st.booleans())
    if op == "Div" and constant_first:
        y = domain(builder, y, "positive")
    elif op == "Div":
        array = np.where(np.abs(array) < 0.5, draw(st.sampled_from((1.0, 2.0))), array)
    elif op == "Pow" and constant_first:
        y, array = domain(builder, y, "unit"), np.abs(array) + 0.5
    elif op == "Pow":
        y, array = domain(builder, y, "positive"), np.clip(np.round(array * 2) / 2, -1, 2)
    inputs = [builder.constant(array), y] if constant_first else [y, builder.constant(array)]
    return x.to(builder.node(op, inputs))


BINARY_OPS = ("Add", "Add", "Add", "Sub", "Mul", "Min", "Max", "Sum", "Mean", "Div", "Pow", "Where")


def combined(builder: Builder, draw: Any, x: Value, a: str, b: str) -> Value:
    op = draw(st.sampled_from(BINARY_OPS))
    if op == "Where":
        return x.to(builder.node("Where", [builder.node("Less", [a, b]), a, b]))
    if op == "Div":
        b = domain(builder, b, "positive")
    elif op == "Pow":
        a, b = domain(builder, a, "positive"), domain(builder, b, "unit")
    more = [b] * draw(st.integers(0, 1)) if op in ("Sum", "Mean", "Max", "Min") else []
    return x.to(builder.node(op, [a, b, *more]))


def binary(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    other = draw(st.sampled_from([value for value in values if value.like(x)]))
    return combined(builder, draw, x, x.name, other.name)


def broadcast(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    """Two values of which one is the same for all channels, or for all places."""
    other = draw(st.sampled_from([value for value in values if value.like(x)]))
    if draw(st.booleans()):
        small = builder.reduce(draw(st.sampled_from(("ReduceMean", "ReduceMax"))), other.name, [1])
    else:
        small = builder.node("GlobalAveragePool", [other.name])
    return combined(builder, draw, x, *((x.name, small) if draw(st.booleans()) else (small, x.name)))


def precision(builder: Builder, draw: Any, x: Value) -> Value:
    """Some work in double precision; in half precision where that is exact."""
    half = x.exact and draw(st.booleans())
    y = builder.node("Cast", [x.name], to=TensorProto.FLOAT16 if half else TensorProto.DOUBLE)
    op = draw(st.sampled_from(("", "Relu", "Add", "Mul")))
    if op == "Relu":
        y = builder.node("Relu", [y])
    elif op:
        array = np.round(planted_constant(builder, draw, (x.channels,) if x.flat else (x.channels, 1, 1)))
        y = builder.node(op, [y, builder.constant(np.clip(array, -2, 2), np.float16 if half else np.float64)])
    return x.to(builder.node("Cast", [y], to=TensorProto.FLOAT))


def passing(builder: Builder, draw: Any, x: Value) -> Value:
    return x.to(builder.node(draw(st.sampled_from(("Identity", "Dropout"))), [x.name]))
