"""Bounds of the linear operators: Conv, ConvTranspose, Gemm, MatMul, BatchNormalization.

``W'x' - Wx = W'(x' - x) + (W' - W) x``: each term is a linear image of an interval. For a filter that was set to zero
the first term vanishes, and the second is what it can have given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as every

import numpy as np

from prune2deploy.graph.bounds.curves import RSQRT, apply_curve
from prune2deploy.graph.bounds.interval import (
    UNIT,
    Array,
    Function,
    Interval,
    hull,
    largest_singular_value,
    linear,
    outward,
    plus,
    row_norms,
    zero,
)
from prune2deploy.graph.bounds.ranges import (
    Ranges,
    add,
    bordered,
    collapsed,
    constants,
    expanded,
    multiply,
    ranges,
    subtract,
)
from prune2deploy.graph.bounds.step import Found, Step, size_of
from prune2deploy.graph.node import Node

Weights = tuple[Array, Array]
"""A constant in the reference and in the changed graph; one object where they are equal."""


@dataclass(frozen=True, eq=False)
class Window:
    """A convolution's weights as one matrix per group and tap, ``[groups, taps, outputs, inputs]``."""

    weights: Array

    def image(self, x: Interval) -> Interval:
        """Return the interval of what the window gives for inputs ``[1, channels, 1, ...]``, each tap reading its own.

        ``|y| <= sum_t s(W_t) |x_t|`` and ``|y| <= s([W_1 ... W_T]) sqrt(T) max|x_t|``, with s the largest singular
        value: for the norm.
        """
        groups, taps, outputs, inputs = self.weights.shape
        summed, magnitudes = self.weights.sum(axis=1), np.abs(self.weights).sum(axis=1)
        beside = self.weights.transpose(0, 2, 1, 3).reshape(groups, outputs, taps * inputs)
        gain = min(
            sum(largest_singular_value(self.weights[:, tap]) for tap in range(taps)),
            largest_singular_value(beside) * float(np.sqrt(taps)),
        ) * (1 + 1e-12)
        rows = row_norms(self.weights, (3,)).sum(axis=1).reshape(1, -1, *x.shape[2:])

        def through(matrix: Array) -> Function:
            return lambda v: (matrix @ v.reshape(groups, inputs, 1)).reshape(1, groups * outputs, *v.shape[2:])

        return linear(x, through(summed), through(magnitudes), terms=taps * inputs, rows=rows, gain=gain)


def _images(x: Ranges, before: list[Window], after: list[Window], layout: tuple[int, ...]) -> Ranges:
    """Return the ranges of W x for weights that change, with the hull over windows of which each output uses one."""

    def over(windows: list[Window], value: Interval) -> Interval:
        found = [window.image(value) for window in windows] or [zero(layout)]
        result = found[0]
        for other in found[1:]:
            result = hull(result, other)
        return result

    reference = over(before, x.reference)
    if before is after:
        return ranges(reference, over(after, x.changed), over(after, x.difference))
    parts = [
        plus(new.image(x.difference), Window(new.weights - old.weights).image(x.reference))
        for old, new in zip(before, after, strict=True)
    ] or [zero(layout)]
    difference = parts[0]
    for part in parts[1:]:
        difference = hull(difference, part)
    return ranges(reference, over(after, x.changed), difference)


def _with_bias(y: Ranges, step: Step) -> Ranges:
    if not step.has(2):
        return y
    bias = step.ranges(2)
    return add(y, bias.each(lambda part: part.map(lambda a: a.reshape(1, -1, *y.shape[2:]))))


def conv(step: Step) -> Found:
    """Return the ranges of a Conv with constant weights."""
    weights, x = step.weights(1), step.ranges(0)
    if weights is None or weights[0].ndim != len(x.shape) or len(x.shape) < 3:
        return None
    groups = int(step.node.attribute("group", 1))

    def windows(weight: Array) -> list[Window]:
        parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return [Window(parts.transpose(0, 3, 1, 2))]

    channels = weights[0].shape[1] * groups
    x = _channels_only(x, channels)
    if _padded(step.node):
        x = bordered(x)
    before = windows(weights[0])
    after = before if weights[0] is weights[1] else windows(weights[1])
    return [_with_bias(_images(x, before, after, ()), step)]


def _padded(node: Node) -> bool:
    return max(node.attribute("pads", [0]), default=0) > 0 or "SAME" in str(node.attribute("auto_pad", ""))


def _channels_only(x: Ranges, channels: int) -> Ranges:
    rank = len(x.shape)
    x = collapsed(x, (0, *range(2, rank)))
    return expanded(x, (1, channels, *(1,) * (rank - 2)))


def conv_transpose(step: Step) -> Found:
    """Return the ranges of a ConvTranspose with constant weights.

    An output reads only the taps of its phase, those with equal ``k * dilation mod stride``, and fewer at the border.
    """
    weights, x = step.weights(1), step.ranges(0)
    if weights is None or weights[0].ndim != len(x.shape) or len(x.shape) < 3:
        return None
    groups, kernel = int(step.node.attribute("group", 1)), weights[0].shape[2:]
    strides = list(step.node.attribute("strides", [1] * len(kernel)))
    dilations = list(step.node.attribute("dilations", [1] * len(kernel)))
    phases = list(_phases(kernel, strides, dilations))
    idle = len(phases) < int(np.prod(strides))

    def windows(weight: Array) -> list[Window]:
        inputs, outputs = weight.shape[:2]
        parts = weight.reshape(groups, inputs // groups, outputs, -1).transpose(0, 3, 2, 1)
        found = [Window(parts[:, taps]) for taps in phases]
        return [*found, Window(np.zeros_like(parts[:, :1]))] if idle else found

    x = bordered(_channels_only(x, weights[0].shape[0]))
    before = windows(weights[0])
    after = before if weights[0] is weights[1] else windows(weights[1])
    return [_with_bias(_images(x, before, after, ()), step)]


def _phases(kernel: tuple[int, ...], strides: list[int], dilations: list[int]) -> Iterator[list[int]]:
    taps = np.arange(int(np.prod(kernel))).reshape(kernel)
    residues = [np.arange(k) * d % s for k, s, d in zip(kernel, strides, dilations, strict=True)]
    for phase in every(*(sorted(set(residue.tolist())) for residue in residues)):
        chosen = [np.flatnonzero(residue == at) for residue, at in zip(residues, phase, strict=True)]
        yield taps[np.ix_(*chosen)].ravel().tolist()


def batch_normalization(step: Step) -> Found:
    """Return the ranges of a BatchNormalization at inference: x a + (bias - mean a), a = scale / sqrt(var + eps)."""
    if int(step.node.attribute("training_mode", 0)) or sum(bool(output.name) for output in step.node.outputs) > 1:
        return None
    x = step.ranges(0)
    rank = len(x.shape)
    if rank < 2:
        return None
    scale, bias, mean, var = (_per_channel(step.ranges(slot), rank) for slot in range(1, 5))
    eps = np.full((1,) * rank, float(step.node.attribute("epsilon", 1e-5)))
    gain = multiply(scale, apply_curve(RSQRT, add(var, constants(eps, eps))))
    return [add(multiply(x, gain), subtract(bias, multiply(mean, gain)))]


def _per_channel(x: Ranges, rank: int) -> Ranges:
    return x.each(lambda part: part.map(lambda a: a.reshape(1, -1, *(1,) * (rank - 2))))


# --- matrices ---------------------------------------------------------------------------------------------------------


def matmul(step: Step) -> Found:
    """Return the ranges of a MatMul."""
    found = _product(_side(step, 0), _side(step, 1), _inner(step, (-1, -2)))
    return None if found is None else [found]


def gemm(step: Step) -> Found:
    """Return the ranges of a Gemm: ``alpha A B + beta C``."""
    turned = [bool(step.node.attribute(name, 0)) for name in ("transA", "transB")]
    sides = [_turned(_side(step, slot)) if turn else _side(step, slot) for slot, turn in enumerate(turned)]
    inner = _inner(step, (-2 if turned[0] else -1, -1 if turned[1] else -2))
    found = _product(sides[0], sides[1], inner)
    if found is None:
        return None
    found = _multiple(found, float(step.node.attribute("alpha", 1.0)))
    if step.has(2):
        found = add(found, _multiple(step.ranges(2), float(step.node.attribute("beta", 1.0))))
    return [found]


def _multiple(x: Ranges, factor: float) -> Ranges:
    array = np.full((1,) * len(x.shape), factor)
    return x if factor == 1 else multiply(x, constants(array, array))


def _side(step: Step, slot: int) -> Ranges | Weights:
    weights = step.weights(slot)
    return step.ranges(slot) if weights is None else weights


def _turned(side: Ranges | Weights) -> Ranges | Weights:
    if isinstance(side, Ranges):
        return side.each(lambda part: part.map(lambda a: a.swapaxes(-1, -2)))
    before = side[0].swapaxes(-1, -2)
    return before, (before if side[0] is side[1] else side[1].swapaxes(-1, -2))


def _inner(step: Step, axes: tuple[int, int]) -> int | None:
    """Return the size of the axis that a product sums over, where it is static."""
    for slot, axis in enumerate(axes):
        shape = step.shape(slot)
        if shape:
            size = size_of(shape, axis % len(shape) if len(shape) > 1 else 0)
            if size is not None:
                return size
    return None


def _product(left: Ranges | Weights, right: Ranges | Weights, inner: int | None) -> Ranges | None:
    if inner is None:
        return None
    if isinstance(left, Ranges) and not isinstance(right, Ranges) and right[0].ndim == 2:
        return _through(_inner_expanded(left, -1, inner), right, left_hand=False)
    if isinstance(right, Ranges) and not isinstance(left, Ranges) and left[0].ndim == 2 and len(right.shape) > 1:
        return _through(_inner_expanded(right, -2, inner), left, left_hand=True)
    x, y = (side if isinstance(side, Ranges) else constants(*side) for side in (left, right))
    if min(len(x.shape), len(y.shape)) < 2:
        return None
    x, y = _inner_expanded(x, -1, inner), _inner_expanded(y, -2, inner)
    difference = plus(_matrices(x.difference, y.changed), _matrices(x.reference, y.difference))
    return ranges(_matrices(x.reference, y.reference), _matrices(x.changed, y.changed), difference)


def _inner_expanded(x: Ranges, axis: int, size: int) -> Ranges:
    layout = list(x.shape)
    layout[axis] = size
    return expanded(x, tuple(layout))


def _through(x: Ranges, weights: Weights, *, left_hand: bool) -> Ranges:
    """Return the ranges of x W, or of W x: the norm of a row or column of W bounds each, as in `linear`."""

    def image(value: Interval, weight: Array) -> Interval:
        def through(matrix: Array) -> Function:
            return lambda v: matrix @ v if left_hand else v @ matrix

        norms = row_norms(weight, (1 if left_hand else 0,))
        return linear(
            value,
            through(weight),
            through(np.abs(weight)),
            terms=weight.shape[1 if left_hand else 0],
            rows=norms[:, None] if left_hand else norms,
            gain=largest_singular_value(weight),
        )

    before, after = weights
    difference = image(x.difference, after)
    if before is not after:
        difference = plus(difference, image(x.reference, after - before))
    return ranges(image(x.reference, before), image(x.changed, after), difference)


def _matrices(x: Interval, y: Interval) -> Interval:
    """Return the interval of x y: for x = m ± r and y = n ± s it is m n ± (|m| s + r |n| + r s)."""
    layout = (*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
    ends = [x.lo, x.hi, y.lo, y.hi]
    finite = all(np.isfinite(end).all() for end in ends)
    if x.is_zero or y.is_zero:
        return zero(layout)
    norm = x.norm * y.norm
    if not finite:
        return outward(np.full(layout, -np.inf), np.full(layout, np.inf), norm)
    m, r = x.lo / 2 + x.hi / 2, x.hi / 2 - x.lo / 2
    n, s = y.lo / 2 + y.hi / 2, y.hi / 2 - y.lo / 2
    with np.errstate(all="ignore"):
        reach = np.abs(m) @ s + r @ np.abs(n) + r @ s
        scale = (np.abs(m) + r) @ (np.abs(n) + s)
        slack = (4 * x.shape[-1] + 16) * UNIT * scale + np.finfo(np.float64).tiny
        return outward(m @ n - reach, m @ n + reach, norm, slack=slack)
