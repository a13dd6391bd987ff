"""Bounds of pools, reductions, softmax and norms."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np

from prune2deploy.graph.bounds.interval import Interval, collapse, interval, outward, scaled
from prune2deploy.graph.bounds.ranges import Ranges, add, bordered, collapsed, constants, multiply, ranges, unchanged
from prune2deploy.graph.bounds.step import BoundRule, Found, Step, axis_of, size_of

Reduce = Callable[[Step, Ranges, tuple[int, ...]], Ranges | None]


def pool(step: Step) -> Found:
    """Each output is the largest of its window, or a mean over it: the difference is no more than the largest there."""
    if sum(bool(output.name) for output in step.node.outputs) > 1:
        return None
    x = step.ranges(0)
    x = collapsed(x, tuple(range(2, len(x.shape))))
    if step.node.op_type == "GlobalMaxPool":
        return [_without_norm(x)]
    if step.node.op_type == "MaxPool":  # the squares of the largest of T sum to at most T times the largest sum
        spread_out = sqrt(np.prod(step.node.attribute("kernel_shape"))) * (1 + 1e-12)
        return [x.each(lambda part: interval(part.lo, part.hi, scaled(spread_out, part.norm)))]
    return [bordered(x) if step.node.attribute("count_include_pad", 0) else x]


def _without_norm(x: Ranges) -> Ranges:
    """Return the ranges with norms from the ends: the largest of each channel come from different places."""
    return x.each(lambda part: interval(part.lo, part.hi))


def _reduced(step: Step) -> tuple[int, ...] | None:
    rank = len(step.ranges(0).shape)
    axes = step.integers(1, "axes")
    if axes is None and step.has(1):
        return None
    if not axes:
        return () if step.node.attribute("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(int(axis) % rank for axis in axes))


def reduction(reduce_: Reduce) -> BoundRule:
    """Return the rule of a reduction over axes that are an attribute or a constant input."""

    def rule(step: Step) -> Found:
        axes = _reduced(step)
        if axes is None:
            return None
        found = step.ranges(0) if not axes else reduce_(step, step.ranges(0), axes)
        if found is None:
            return None
        if not step.node.attribute("keepdims", 1):
            found = found.each(lambda part: part.map(lambda a: a.squeeze(axis=axes)))
        return [found]

    return rule


def _count(step: Step, axes: tuple[int, ...]) -> int | None:
    sizes = [size_of(step.shape(), axis) for axis in axes]
    return None if None in sizes else int(np.prod([size or 0 for size in sizes]))


def mean_over(step: Step, x: Ranges, axes: tuple[int, ...]) -> Ranges:
    """Return the ranges of a mean: that of equal intervals is the interval."""

    def mean(part: Interval) -> Interval:
        return outward(
            part.lo.mean(axis=axes, keepdims=True),
            part.hi.mean(axis=axes, keepdims=True),
            part.norm,
            relative=0.0,
            slack=_rounding(part, axes),
        )

    return x.each(mean)


def _rounding(part: Interval, axes: tuple[int, ...]) -> np.ndarray:
    largest = part.magnitude.sum(axis=axes, keepdims=True)
    return np.where(np.isfinite(largest), largest, 0.0) * (part.lo.size + 8) * 2.0**-52


def sum_over(step: Step, x: Ranges, axes: tuple[int, ...]) -> Ranges | None:
    """Return the ranges of a sum: the mean times the count, where that is static."""
    count = _count(step, axes)
    if count is None:
        return None
    factor = np.full((1,) * len(x.shape), float(count))
    return multiply(mean_over(step, x, axes), constants(factor, factor))


def largest_over(step: Step, x: Ranges, axes: tuple[int, ...]) -> Ranges:
    """Return the ranges of ReduceMax or ReduceMin: neither moves by more than what it picks from."""
    ends = (np.max, np.max) if step.node.op_type == "ReduceMax" else (np.min, np.min)
    value = [
        interval(ends[0](part.lo, axis=axes, keepdims=True), ends[1](part.hi, axis=axes, keepdims=True))
        for part in (x.reference, x.changed)
    ]
    moved = _without_norm(collapsed(Ranges(x.difference, x.difference, x.difference), axes))
    return ranges(value[0], value[1], moved.difference)


def length_over(step: Step, x: Ranges, axes: tuple[int, ...]) -> Ranges | None:
    """L1 and L2: ``| |x'| - |x| | <= |x' - x|``, and the length is at most that of the magnitudes."""
    count = _count(step, axes)
    if count is None:
        return None
    order = 1 if step.node.op_type == "ReduceL1" else 2

    def longest(part: Interval) -> np.ndarray:
        size = int(np.prod([part.shape[axis] for axis in axes]))
        whole = (part.magnitude**order).sum(axis=axes, keepdims=True) * (count / size)
        return np.asarray(whole ** (1 / order) * (1 + (count + 16) * 2.0**-50))

    def value(part: Interval) -> Interval:
        return interval(np.zeros_like(longest(part)), longest(part))

    reach = longest(x.difference)
    return ranges(value(x.reference), value(x.changed), outward(-reach, reach))


# --- softmax and norms ------------------------------------------------------------------------------------------------


def softmax(step: Step) -> Found:
    """Return the ranges of a Softmax, or of a LogSoftmax.

    Along the way from x to x', ``ds_i = s_i (1 - s_i) (dx_i - a mean of the other dx)``, which is at most a quarter of
    the span of dx over the axis; and ``log s_i = x_i - log sum exp x``, where the last moves within the ends of dx.
    """
    x = step.ranges(0)
    axis = axis_of(step, -1 if step.node.opset >= 13 else 1)
    axes = (axis,) if step.node.opset >= 13 else tuple(range(axis, len(x.shape)))
    over = collapse(x.difference, axes)
    if step.node.op_type == "LogSoftmax":
        value = Interval(np.full(x.shape, -np.inf), np.zeros(x.shape))
        low, high = x.difference.lo - over.hi, x.difference.hi - over.lo
        return [ranges(value, value, interval(*_outward(low, high)))]
    span = np.broadcast_to((over.hi - over.lo) / 4 * (1 + 1e-12), x.shape)
    value = interval(np.zeros(x.shape), np.ones(x.shape))
    return [ranges(value, value, interval(-span, span))]


def _outward(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = outward(low, high, relative=1e-12)
    return found.lo, found.hi


def _normalised(x: Ranges, axes: tuple[int, ...], count: int, eps: float, layout: tuple[int, ...]) -> Ranges:
    """Return the ranges of ``(x - mean) / sqrt(var + eps)`` over ``count`` positions, or ``x / sqrt(mean x² + eps)``.

    The squares of the result sum to at most ``count``, so none is above ``sqrt(count)``. Its derivative is
    ``(I - 1 1ᵀ/n - y yᵀ/n) / s``, with s >= sqrt(eps), of norm at most ``1 / sqrt(eps)``; so
    ``|dy| <= |dx| / sqrt(eps)``.
    """
    most = np.full(layout, sqrt(count) * (1 + 1e-12))
    value = interval(-most, most)
    if x.same:
        return unchanged(value)
    size = int(np.prod([x.shape[axis] for axis in axes]))
    squares = (x.difference.magnitude**2).sum(axis=axes, keepdims=True) * (count / size)
    with np.errstate(divide="ignore"):
        reach = np.sqrt(squares) / np.sqrt(eps) * (1 + (count + 16) * 2.0**-50)
    reach = np.broadcast_to(np.where(np.isnan(reach), np.inf, reach), layout)
    return ranges(value, value, outward(-reach, reach))


def layer_norm(step: Step) -> Found:
    """Return the ranges of a LayerNormalization or RMSNormalization."""
    if sum(bool(output.name) for output in step.node.outputs) > 1:
        return None
    x, shape = step.ranges(0), step.shape()
    axes = tuple(range(axis_of(step, -1), len(x.shape)))
    count = _count(step, axes)
    if count is None or shape is None:
        return None
    y = _normalised(x, axes, count, float(step.node.attribute("epsilon", 1e-5)), x.shape)
    y = multiply(y, step.ranges(1))
    return [add(y, step.ranges(2)) if step.has(2) else y]


def instance_norm(step: Step) -> Found:
    """Return the ranges of an InstanceNormalization over maps of static size."""
    x = step.ranges(0)
    axes = tuple(range(2, len(x.shape)))
    count = _count(step, axes)
    if count is None or len(x.shape) < 3:
        return None
    x = collapsed(x, axes)
    y = _normalised(x, axes, count, float(step.node.attribute("epsilon", 1e-5)), x.shape)
    scale, bias = (
        step.ranges(slot).each(lambda part: part.map(lambda a: a.reshape(1, -1, *(1,) * len(axes)))) for slot in (1, 2)
    )
    return [add(multiply(y, scale), bias)]
