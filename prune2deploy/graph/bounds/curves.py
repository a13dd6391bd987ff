"""Functions of one variable with what bounds them on an interval: ends, extremes, and the same of the derivative.

By the mean value theorem ``f(x') - f(x) = s (x' - x)`` with s a slope of f between x and x' (for a function with kinks
a slope of one of its pieces), so the range of the derivative over the hull of both bounds the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import erf, expit, ndtr

from prune2deploy.graph.bounds.interval import Array, Function, Interval, interval, outward, scaled, times
from prune2deploy.graph.bounds.ranges import Ranges, free, ranges
from prune2deploy.graph.node import Node

ROUNDING = 1e-12
"""More than the relative error of any of the functions below, in numpy or SciPy."""

Turns = tuple[tuple[float, float, float], ...]
"""(from, to, value): an interval that touches [from, to] also takes the value."""

INF = float("inf")


@dataclass(frozen=True)
class Curve:
    """A function that is monotone between its turns, and its derivative, of which the same holds.

    ``derivative`` is None for a function with jumps: its difference is bounded by its own ends alone. A ``straight``
    one is made of straight pieces: its slopes are not rounded.
    """

    value: Function
    derivative: Function | None
    turns: Turns = ()
    derivative_turns: Turns = ()
    straight: bool = False


def _range(function: Function, turns: Turns, lo: Array, hi: Array) -> tuple[Array, Array]:
    with np.errstate(all="ignore"):
        ends = [np.asarray(function(lo), dtype=np.float64), np.asarray(function(hi), dtype=np.float64)]
    low = np.minimum(*(np.where(np.isnan(end), -INF, end) for end in ends))
    high = np.maximum(*(np.where(np.isnan(end), INF, end) for end in ends))
    for start, stop, value in turns:
        touched = (lo <= stop) & (hi >= start)
        low = np.where(touched, np.minimum(low, value), low)
        high = np.where(touched, np.maximum(high, value), high)
    return low, high


def _value(curve: Curve, x: Interval) -> Interval:
    """Return the interval of f(x); ``|f(x)| <= |f(0)| + max|slope| |x|`` gives the norm."""
    low, high = _range(curve.value, curve.turns, x.lo, x.hi)
    norm = INF
    if curve.derivative is not None and np.isfinite(x.norm):
        slope = _slopes(curve, np.minimum(x.lo, 0.0), np.maximum(x.hi, 0.0))
        at_zero = _range(curve.value, curve.turns, np.zeros(x.shape), np.zeros(x.shape))
        origin = np.maximum(np.abs(at_zero[0]), np.abs(at_zero[1]))
        norm = scaled(float(slope.magnitude.max(initial=0.0)), x.norm) + interval(-origin, origin).norm
    return outward(low, high, norm, relative=ROUNDING)


def _slopes(curve: Curve, lo: Array, hi: Array) -> Interval:
    assert curve.derivative is not None
    low, high = _range(curve.derivative, curve.derivative_turns, lo, hi)
    return interval(low, high) if curve.straight else outward(low, high, relative=ROUNDING, slack=ROUNDING)


def apply_curve(curve: Curve, x: Ranges) -> Ranges:
    """Return the ranges of f(x)."""
    reference, changed = _value(curve, x.reference), _value(curve, x.changed)
    if x.same:
        return ranges(reference, changed, x.difference)
    if curve.derivative is None:
        return free(reference, changed)
    slopes = _slopes(curve, np.minimum(x.reference.lo, x.changed.lo), np.maximum(x.reference.hi, x.changed.hi))
    return ranges(reference, changed, times(slopes, x.difference))


# --- the functions ----------------------------------------------------------------------------------------------------


def _sigmoid_slope(x: Array) -> Array:
    return np.asarray(expit(x) * expit(-x))


def _times_gate(gate: Function) -> Function:
    """Return x * gate(x) for a gate that vanishes faster than 1 / x at minus infinity."""
    return lambda x: np.where(np.isneginf(x), 0.0, x * gate(x))


def _phi(x: Array) -> Array:
    return np.asarray(np.exp(-x * x / 2) / np.sqrt(2 * np.pi))


def _swish_slope(x: Array) -> Array:
    gate = expit(x)
    return np.asarray(np.where(np.isinf(x), gate, gate + x * _sigmoid_slope(x)))


def piecewise(below: Array | float) -> Curve:
    """Return max(x, 0) + below * min(x, 0): Relu, LeakyRelu, PRelu."""
    return Curve(
        lambda x: np.where(x > 0, x, np.where(x == 0, 0.0, below * x)),
        lambda x: np.where(x > 0, 1.0, below),
        turns=((0.0, 0.0, 0.0),),
        straight=True,
    )


def clip(low: float, high: float) -> Curve:
    """Return min(max(x, low), high)."""
    return Curve(
        lambda x: np.minimum(np.maximum(x, low), high),
        lambda x: ((x >= low) & (x <= high)).astype(np.float64),
        derivative_turns=((low, high, 1.0),),
        straight=True,
    )


def _exponential_below(alpha: float, gain: float = 1.0, width: float = 1.0) -> Curve:
    """Return gain * (x above 0, alpha (exp(x / width) - 1) below): Elu, Selu, Celu."""
    steepest = max(1.0, alpha / width)
    return Curve(
        lambda x: gain * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0) / width)),
        lambda x: gain * np.where(x > 0, 1.0, alpha / width * np.exp(np.minimum(x, 0.0) / width)),
        turns=((0.0, 0.0, 0.0),),
        derivative_turns=((0.0, 0.0, gain * steepest), (0.0, 0.0, gain * min(1.0, alpha / width))),
    )


def _hard_sigmoid(node: Node) -> Curve:
    alpha, beta = float(node.attribute("alpha", 0.2)), float(node.attribute("beta", 0.5))
    if alpha == 0:
        level = min(max(beta, 0.0), 1.0)
        return Curve(lambda x: np.full(x.shape, level), np.zeros_like, straight=True)
    ends = sorted((-beta / alpha, (1 - beta) / alpha))
    return Curve(
        lambda x: np.clip(alpha * x + beta, 0.0, 1.0),
        lambda x: np.where((x >= ends[0] - ROUNDING) & (x <= ends[1] + ROUNDING), alpha, 0.0),
        derivative_turns=((ends[0], ends[1], alpha),),
    )


def hard_swish(alpha: float) -> Curve:
    """Return x * clip(alpha x + 0.5, 0, 1): its slope is 2 alpha x + 0.5 between 0 and 1."""
    edge = 0.5 / alpha
    return Curve(
        _times_gate(lambda x: np.clip(alpha * x + 0.5, 0.0, 1.0)),
        lambda x: np.where(x <= -edge, 0.0, np.where(x >= edge, 1.0, 2 * alpha * x + 0.5)),
        turns=((-edge / 2 - ROUNDING, -edge / 2 + ROUNDING, -edge / 8 * (1 + ROUNDING)),),
        derivative_turns=((-edge, -edge + ROUNDING, -0.5), (edge - ROUNDING, edge, 1.5)),
    )


SIGMOID = Curve(expit, _sigmoid_slope, derivative_turns=((0.0, 0.0, 0.25),))
TANH = Curve(np.tanh, lambda x: 1 - np.tanh(x) ** 2, derivative_turns=((0.0, 0.0, 1.0),))
SWISH = Curve(
    _times_gate(expit),
    _swish_slope,
    turns=((-1.279, -1.278, -0.27846455),),
    derivative_turns=((-2.4, -2.399, -0.0998395), (2.399, 2.4, 1.0998395)),
)
GELU = Curve(
    _times_gate(ndtr),
    lambda x: np.where(np.isinf(x), ndtr(x), ndtr(x) + x * _phi(x)),
    turns=((-0.752, -0.751, -0.1699713),),
    derivative_turns=((-1.4143, -1.4142, -0.1289050), (1.4142, 1.4143, 1.1289050)),
)
GELU_TANH = Curve(
    _times_gate(lambda x: expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    lambda x: np.full(x.shape, 0.5),
    turns=((-0.76, -0.75, -0.170041),),
    derivative_turns=((-INF, INF, -0.13), (-INF, INF, 1.13)),
)
MISH = Curve(
    _times_gate(lambda x: np.tanh(np.logaddexp(0.0, x))),
    lambda x: np.full(x.shape, 0.5),
    turns=((-1.193, -1.192, -0.308844),),
    derivative_turns=((-INF, INF, -0.1132), (-INF, INF, 1.0885)),
)
SQUARE = Curve(np.square, lambda x: 2 * x, turns=((0.0, 0.0, 0.0),))
RECIPROCAL = Curve(
    lambda x: 1 / x,
    lambda x: -1 / (x * x),
    turns=((0.0, 0.0, INF), (0.0, 0.0, -INF)),
    derivative_turns=((0.0, 0.0, -INF),),
)
RSQRT = Curve(
    lambda x: 1 / np.sqrt(x),
    lambda x: -0.5 / (x * np.sqrt(x)),
    turns=((-INF, 0.0, INF), (-INF, 0.0, 0.0)),
    derivative_turns=((-INF, 0.0, -INF), (-INF, 0.0, 0.0)),
)
SQRT = Curve(
    lambda x: np.sqrt(np.maximum(x, 0.0)),
    lambda x: 0.5 / np.sqrt(x),
    derivative_turns=((-INF, 0.0, INF), (-INF, 0.0, 0.0)),
)
_WAVE = Curve(
    lambda x: np.zeros(x.shape),
    lambda x: np.zeros(x.shape),
    turns=((-INF, INF, -1.0), (-INF, INF, 1.0)),
    derivative_turns=((-INF, INF, -1.0), (-INF, INF, 1.0)),
)


def _jumps(function: Function, *turns: tuple[float, float, float]) -> Callable[[Node], Curve]:
    return lambda node: Curve(function, None, turns)


def _always(curve: Curve) -> Callable[[Node], Curve]:
    return lambda node: curve


def _thresholded(node: Node) -> Curve:
    alpha = float(node.attribute("alpha", 1.0))
    return Curve(lambda x: np.where(x > alpha, x, 0.0), None, ((-INF, INF, min(alpha, 0.0)), (-INF, INF, 0.0)))


CURVES: dict[str, Callable[[Node], Curve]] = {
    "Abs": _always(Curve(np.abs, np.sign, turns=((0.0, 0.0, 0.0),), straight=True)),
    "Ceil": _jumps(np.ceil),
    "Celu": lambda node: _exponential_below(alpha := float(node.attribute("alpha", 1.0)), width=alpha),
    "Cos": _always(_WAVE),
    "Elu": lambda node: _exponential_below(float(node.attribute("alpha", 1.0))),
    "Erf": _always(
        Curve(erf, lambda x: 2 / np.sqrt(np.pi) * np.exp(-x * x), derivative_turns=((0.0, 0.0, 1.1283791671),))
    ),
    "Exp": _always(Curve(np.exp, np.exp)),
    "Floor": _jumps(np.floor),
    "Gelu": lambda node: GELU_TANH if node.attribute("approximate", "none") == "tanh" else GELU,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _always(hard_swish(1 / 6)),
    "LeakyRelu": lambda node: piecewise(float(node.attribute("alpha", 0.01))),
    "Log": _always(
        Curve(
            np.log, lambda x: 1 / x, turns=((-INF, 0.0, -INF),), derivative_turns=((-INF, 0.0, INF), (-INF, 0.0, 0.0))
        )
    ),
    "Mish": _always(MISH),
    "Neg": _always(Curve(np.negative, lambda x: np.full(x.shape, -1.0), straight=True)),
    "Reciprocal": _always(RECIPROCAL),
    "Relu": _always(piecewise(0.0)),
    "Round": _jumps(np.round),
    "Selu": lambda node: _exponential_below(
        float(node.attribute("alpha", 1.6732632423543772)), float(node.attribute("gamma", 1.0507009873554805))
    ),
    "Sigmoid": _always(SIGMOID),
    "Sign": _jumps(np.sign),
    "Sin": _always(_WAVE),
    "Softplus": _always(Curve(lambda x: np.logaddexp(0.0, x), expit)),
    "Softsign": _always(
        Curve(
            lambda x: np.where(np.isinf(x), np.sign(x), x / (1 + np.abs(x))),
            lambda x: 1 / (1 + np.abs(x)) ** 2,
            derivative_turns=((0.0, 0.0, 1.0),),
        )
    ),
    "Sqrt": _always(SQRT),
    "Tanh": _always(TANH),
    "ThresholdedRelu": _thresholded,
}
"""Operators of one input and no constant operand."""
