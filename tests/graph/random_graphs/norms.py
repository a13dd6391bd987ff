"""Norms of random graphs; their epsilons are large, so that none magnifies the rounding of what hardly varies."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from graph.random_graphs.builder import Builder, Value, planted_bias
from graph.random_graphs.elementwise import domain

EPSILON = 0.05


def _affine(builder: Builder, draw: Any, channels: int) -> list[str]:
    return [builder.constant(planted_bias(builder, draw, channels)) for _ in range(2)]


def batchnorm(builder: Builder, draw: Any, x: Value) -> Value:
    arrays = [planted_bias(builder, draw, x.channels) for _ in range(3)]
    arrays.append(builder.random.uniform(0.5, 1.5, x.channels))
    return x.to(builder.node("BatchNormalization", [x.name, *(builder.constant(array) for array in arrays)]))


def instance_norm(builder: Builder, draw: Any, x: Value) -> Value:
    inputs = [x.name, *_affine(builder, draw, x.channels)]
    return x.to(builder.node("InstanceNormalization", inputs, epsilon=EPSILON))


def group_norm(builder: Builder, draw: Any, x: Value) -> Value:
    """As an operator, or as exporters write it before there was one: a reshape and an InstanceNormalization."""
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4) if x.channels % n == 0]))
    if builder.opset >= 21 and draw(st.booleans()):
        inputs = [x.name, *_affine(builder, draw, x.channels)]
        return x.to(builder.node("GroupNormalization", inputs, num_groups=groups, epsilon=EPSILON))
    y = builder.reshape(x.name, 0, groups, -1)
    ones, zeros = builder.constant(np.ones(groups)), builder.constant(np.zeros(groups))
    y = builder.node("InstanceNormalization", [y, ones, zeros], epsilon=EPSILON)
    y = builder.reshape(y, 0, x.channels, x.size, x.size)
    scale, shift = (builder.constant(planted_bias(builder, draw, x.channels).reshape(-1, 1, 1)) for _ in range(2))
    return x.to(builder.node("Add", [builder.node("Mul", [y, scale]), shift]))


def layer_norm(builder: Builder, draw: Any, x: Value) -> Value:
    """LayerNormalization or RMSNormalization over channels that lie last, or over places."""
    rms = builder.opset >= 23 and draw(st.booleans())
    op = "RMSNormalization" if rms else "LayerNormalization"
    over_channels = x.flat or draw(st.booleans())
    size = x.channels if over_channels else x.size
    inputs = _affine(builder, draw, size)[: 1 if rms else draw(st.integers(1, 2))]
    turned = over_channels and not x.flat
    y = builder.transpose(x.name, 0, 2, 3, 1) if turned else x.name
    y = builder.node(op, [y, *inputs], axis=-1, epsilon=EPSILON)
    return x.to(builder.transpose(y, 0, 3, 1, 2) if turned else y)


def layer_norm_by_parts(builder: Builder, draw: Any, x: Value) -> Value:
    """LayerNormalization as exporters write it before there was an operator.

    A ramp first: a constant less its own mean is nothing but rounding.
    """
    axis = -1 if x.flat else draw(st.sampled_from((1, -1)))
    size = x.size if axis == -1 and not x.flat else x.channels
    ramp = builder.random.uniform(-1, 1, size).reshape((-1, 1, 1) if axis == 1 else -1)
    y = builder.node("Add", [x.name, builder.constant(ramp)])
    centred = builder.node("Sub", [y, builder.reduce("ReduceMean", y, [axis])])
    squares = builder.node("Pow", [centred, builder.constant(2.0)])
    spread = builder.node("Add", [builder.reduce("ReduceMean", squares, [axis]), builder.constant(EPSILON)])
    return x.to(builder.node("Div", [centred, builder.node("Sqrt", [spread])]))


def lp_norm(builder: Builder, draw: Any, x: Value) -> Value:
    y = domain(builder, x.name, "positive")
    axis = 1 if x.flat else draw(st.sampled_from((1, 1, 3)))
    return x.to(builder.node("LpNormalization", [y], axis=axis, p=draw(st.sampled_from((1, 2)))))


def lrn(builder: Builder, draw: Any, x: Value) -> Value:
    """ONNX Runtime adds squares and takes them away again, so that a large channel rounds the ones behind it."""
    y = builder.node("Tanh", [x.name])
    return x.to(builder.node("LRN", [y], size=draw(st.sampled_from((1, 3, 5))), alpha=0.3, beta=0.75, bias=1.0))


def mean_variance_norm(builder: Builder, draw: Any, x: Value) -> Value:
    """MeanVarianceNormalization has no epsilon to speak of; a ramp over the places keeps the variance away from 0."""
    ramp = builder.random.uniform(-1, 1, (x.size, x.size)) * 2
    y = builder.node("Add", [builder.node("Tanh", [x.name]), builder.constant(ramp)])
    axes = draw(st.sampled_from(([0, 2, 3], [2, 3], [1, 2, 3])))
    return x.to(builder.node("MeanVarianceNormalization", [y], axes=axes))
