"""The bound rule of every operator that has one; the elementwise ones are written here.

An operator without a rule has an unbounded difference, unless all that it reads is the same in both graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import sqrt

import numpy as np

from prune2deploy.graph.bounds.curves import (
    CURVES,
    MISH,
    RECIPROCAL,
    RSQRT,
    SQRT,
    SQUARE,
    SWISH,
    Curve,
    apply_curve,
    clip,
    hard_swish,
    piecewise,
)
from prune2deploy.graph.bounds.interval import Interval, interval, meet
from prune2deploy.graph.bounds.linear import batch_normalization, conv, conv_transpose, gemm, matmul
from prune2deploy.graph.bounds.movement import MOVEMENT
from prune2deploy.graph.bounds.ranges import (
    Ranges,
    add,
    constants,
    expanded,
    free,
    mixed,
    multiply,
    ranges,
    subtract,
    to_rank,
    together,
    unchanged,
    unknown,
)
from prune2deploy.graph.bounds.reductions import (
    instance_norm,
    largest_over,
    layer_norm,
    length_over,
    mean_over,
    pool,
    reduction,
    softmax,
    sum_over,
)
from prune2deploy.graph.bounds.step import BoundRule, Found, Step
from prune2deploy.graph.node import FLOATS, Node


def _curve(make: Callable[[Node], Curve]) -> BoundRule:
    return lambda step: [apply_curve(make(step.node), step.ranges(0))]


def _every(step: Step) -> list[Ranges]:
    return [step.ranges(slot) for slot in range(len(step.node.inputs))]


def _sum(step: Step) -> Found:
    return [reduce(add, _every(step))]


def _mean(step: Step) -> Found:
    share = np.full((), 1 / len(step.node.inputs))
    return [multiply(reduce(add, _every(step)), constants(share, share))]


def _subtract(step: Step) -> Found:
    return [subtract(step.ranges(0), step.ranges(1))]


def _multiply(step: Step) -> Found:
    """Products x x and x gate(x) are functions of x alone; told apart, their bound would grow with x."""
    names = [operand.name for operand in step.node.inputs]
    if names[0] == names[1] and step.node.inputs[0].is_value:
        return [apply_curve(SQUARE, step.ranges(0))]
    for gate, value in (names, reversed(names)):
        curve = _gated(step, gate, value)
        if curve is not None:
            return [apply_curve(curve, step.values[value])]
    return [multiply(step.ranges(0), step.ranges(1))]


def _gated(step: Step, gate: str, value: str) -> Curve | None:
    """Return the curve of value * gate, where the gate is Sigmoid, HardSigmoid or Tanh(Softplus) of the value."""
    maker = step.producers.get(gate)
    if maker is None or maker.domain or not maker.inputs:
        return None
    if maker.op_type == "Tanh":
        inner = step.producers.get(maker.inputs[0].name)
        if inner is None or inner.domain or inner.op_type != "Softplus":
            return None
        return MISH if inner.inputs[0].name == value else None
    if maker.inputs[0].name != value:
        return None
    if maker.op_type == "Sigmoid":
        return SWISH
    alpha = float(maker.attribute("alpha", 0.2))
    centred = maker.op_type == "HardSigmoid" and float(maker.attribute("beta", 0.5)) == 0.5 and alpha > 0
    return hard_swish(alpha) if centred else None


def _divide(step: Step) -> Found:
    if step.output.dtype not in FLOATS:
        return None  # of integers: it truncates
    return [multiply(step.ranges(0), apply_curve(RECIPROCAL, step.ranges(1)))]


POWERS: dict[float, Curve] = {
    -1.0: RECIPROCAL,
    -0.5: RSQRT,
    0.5: SQRT,
    1.0: piecewise(1.0),
    2.0: SQUARE,
    3.0: Curve(lambda x: x**3, lambda x: 3 * x * x, derivative_turns=((0.0, 0.0, 0.0),)),
    4.0: Curve(lambda x: x**4, lambda x: 4 * x**3, turns=((0.0, 0.0, 0.0),)),
}


def _power(step: Step) -> Found:
    weights = step.weights(1)
    if weights is None or weights[0].size != 1 or weights[0] is not weights[1]:
        return None
    curve = POWERS.get(float(weights[0].ravel()[0]))
    rank = max(len(step.ranges(0).shape), weights[0].ndim)
    return None if curve is None else [apply_curve(curve, to_rank(step.ranges(0), rank))]


def _clip(step: Step) -> Found:
    bounds = []
    for slot, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        given = step.weights(slot) if step.has(slot) else None
        if step.has(slot) and (given is None or given[0] is not given[1]):
            return None
        bounds.append(float(step.node.attribute(name, default) if given is None else given[0].ravel()[0]))
    if bounds[0] > bounds[1]:
        return None
    return [apply_curve(clip(bounds[0], bounds[1]), step.ranges(0))]


def _prelu(step: Step) -> Found:
    slope = step.weights(1)
    if slope is None or slope[0] is not slope[1]:
        return None
    layout = np.broadcast_shapes(step.ranges(0).shape, slope[0].shape)
    return [apply_curve(piecewise(np.broadcast_to(slope[0], layout)), expanded(step.ranges(0), layout))]


def _extreme(pick: np.ufunc) -> BoundRule:
    """Return the rule of Max or Min: the largest of x' and the largest of x differ by no more than their parts do."""

    def pair(x: Ranges, y: Ranges) -> Ranges:
        x, y = together(x, y)
        reference, changed = (
            interval(pick(a.lo, b.lo), pick(a.hi, b.hi))
            for a, b in ((x.reference, y.reference), (x.changed, y.changed))
        )
        low = np.minimum(x.difference.lo, y.difference.lo)
        return ranges(reference, changed, interval(low, np.maximum(x.difference.hi, y.difference.hi)))

    return lambda step: [reduce(pair, _every(step))]


def _where(step: Step) -> Found:
    condition = step.ranges(0)
    chosen = mixed(step.ranges(1), step.ranges(2))
    rank = max(len(chosen.shape), len(condition.shape))
    if condition.same:
        return [to_rank(chosen, rank)]
    return [to_rank(free(chosen.reference, chosen.changed), rank)]


def _truth(step: Step) -> Found:
    """A truth value is 0 or 1; it is the same where all that it is made of is the same."""
    layout = np.broadcast_shapes(*(part.shape for part in _every(step)))
    value = Interval(np.zeros(layout), np.ones(layout), sqrt(float(np.prod(layout))))
    return [unchanged(value) if all(part.same for part in _every(step)) else free(value, value)]


NARROW = {"bool": (0.0, 1.0), "int8": (-128.0, 127.0), "uint8": (0.0, 255.0)}
"""All that a type can hold; the wider ones say nothing worth bounding by."""


def _cast(step: Step) -> Found:
    dtype, x = step.node.inputs[0].dtype, step.ranges(0)
    if step.output.dtype not in FLOATS or not (dtype in FLOATS or dtype.startswith(("bool", "int", "uint"))):
        return None
    if dtype not in NARROW:
        return [x]
    low, high = NARROW[dtype]
    every = interval(np.full(x.shape, low), np.full(x.shape, high))
    return [ranges(meet(x.reference, every), meet(x.changed, every), x.difference)]


def _shape(step: Step) -> Found:
    """The shape of a value does not depend on what it holds."""
    return [unknown((1,) * (step.output.rank or 0), same=True)]


RULES: dict[str, BoundRule] = {
    **MOVEMENT,
    **{name: _curve(make) for name, make in CURVES.items()},
    "Add": _sum,
    "And": _truth,
    "AveragePool": pool,
    "BatchNormalization": batch_normalization,
    "Cast": _cast,
    "Clip": _clip,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": _divide,
    "Equal": _truth,
    "Gemm": gemm,
    "GlobalAveragePool": pool,
    "GlobalMaxPool": pool,
    "Greater": _truth,
    "GreaterOrEqual": _truth,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "Less": _truth,
    "LessOrEqual": _truth,
    "LogSoftmax": softmax,
    "MatMul": matmul,
    "Max": _extreme(np.maximum),
    "MaxPool": pool,
    "Mean": _mean,
    "Min": _extreme(np.minimum),
    "Mul": _multiply,
    "Not": _truth,
    "Or": _truth,
    "PRelu": _prelu,
    "Pow": _power,
    "RMSNormalization": layer_norm,
    "ReduceL1": reduction(length_over),
    "ReduceL2": reduction(length_over),
    "ReduceMax": reduction(largest_over),
    "ReduceMean": reduction(mean_over),
    "ReduceMin": reduction(largest_over),
    "ReduceSum": reduction(sum_over),
    "Shape": _shape,
    "Size": _shape,
    "Softmax": softmax,
    "Sub": _subtract,
    "Sum": _sum,
    "Where": _where,
}
"""Operator of the standard domain -> its rule."""
