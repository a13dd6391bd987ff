"""Intervals of values, one per position of the expanded axes, and the Euclidean norm over those axes.

Every operation returns a set that holds all results, computed in float64 and widened outward by more than the rounding.
An infinite end means that nothing is known on that side; the values themselves are taken to be real numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

UNIT = 2.0**-52
TINY = 1e-150
"""Ends that are not 0 are pushed out to this, so that products with any weight of float32 do not vanish."""

Array = np.ndarray
Function = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class Interval:
    """What a value can be: ends shaped like the value with size 1 along collapsed axes, and a bound on the norm.

    ``norm`` bounds, at every collapsed coordinate, the Euclidean norm over the expanded axes. In deep networks it grows
    far more slowly than the ends do, and each end is at most the norm.
    """

    lo: Array
    hi: Array
    norm: float = np.inf

    @property
    def shape(self) -> tuple[int, ...]:
        """The layout: the value's size along expanded axes, 1 along collapsed ones."""
        return self.lo.shape

    @property
    def is_zero(self) -> bool:
        """Whether the value is exactly 0 everywhere."""
        return not (self.lo.any() or self.hi.any())

    @property
    def magnitude(self) -> Array:
        """The largest absolute value, per position."""
        return np.asarray(np.maximum(np.abs(self.lo), np.abs(self.hi)))

    def map(self, move: Function) -> Interval:
        """Return the interval after a movement that takes every position at most once."""
        return Interval(move(self.lo), move(self.hi), self.norm)


def interval(lo: Array, hi: Array, norm: float = np.inf) -> Interval:
    """Return the interval with ends that are numbers, and with ends and norm tightened by each other."""
    lo, hi = np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)
    norm = np.inf if np.isnan(norm) else norm
    magnitude = np.maximum(np.abs(lo), np.abs(hi))
    largest = float(magnitude.max(initial=0.0))
    if 0 < largest < np.inf:  # scaled, lest squares overflow or vanish
        norm = min(
            norm, largest * float(np.linalg.norm((magnitude / largest).ravel())) * (1 + (magnitude.size + 8) * UNIT)
        )
    elif largest == 0:
        norm = 0.0
    return Interval(np.maximum(lo, -norm), np.minimum(hi, norm), norm)


def outward(
    lo: Array, hi: Array, norm: float = np.inf, *, relative: float = 2 * UNIT, slack: Array | float = 0.0
) -> Interval:
    """Return the interval with its ends moved out by the rounding of what computed them.

    Args:
        lo: the lower ends as computed.
        hi: the upper ends.
        norm: the bound on the norm.
        relative: the relative error of the ends.
        slack: their absolute error.
    """
    with np.errstate(invalid="ignore"):
        lo, hi = lo - relative * np.abs(lo) - slack, hi + relative * np.abs(hi) + slack
    lo = np.where((lo != 0) & (np.abs(lo) < TINY), np.where(lo < 0, -TINY, 0.0), lo)
    hi = np.where((hi != 0) & (np.abs(hi) < TINY), np.where(hi > 0, TINY, 0.0), hi)
    return interval(lo, hi, max(norm, TINY) * (1 + 64 * UNIT) if norm else 0.0)


def point(array: Array) -> Interval:
    """Return the interval of a constant."""
    values = np.asarray(array, dtype=np.float64)
    return outward(values, values, relative=0.0)


def zero(layout: tuple[int, ...]) -> Interval:
    """Return the interval of a value that is exactly 0."""
    return Interval(np.zeros(layout), np.zeros(layout), 0.0)


def anything(layout: tuple[int, ...]) -> Interval:
    """Return the interval of a value of which nothing is known."""
    return Interval(np.full(layout, -np.inf), np.full(layout, np.inf), np.inf)


def spread(x: Interval, layout: tuple[int, ...]) -> Interval:
    """Return the interval with collapsed axes expanded; a norm over n equal-bounded positions is sqrt(n) of one's."""
    if x.shape == layout:
        return x
    lo, hi = np.broadcast_to(x.lo, layout), np.broadcast_to(x.hi, layout)
    with np.errstate(invalid="ignore"):
        norm = x.norm * float(np.sqrt(lo.size / max(x.lo.size, 1))) * (1 + 4 * UNIT)
    return interval(lo, hi, norm)


def collapse(x: Interval, axes: tuple[int, ...]) -> Interval:
    """Return the interval with ``axes`` collapsed: the hull of their positions; a norm over fewer axes is no larger."""
    if all(x.shape[axis] == 1 for axis in axes):
        return x
    return interval(x.lo.min(axis=axes, keepdims=True), x.hi.max(axis=axes, keepdims=True), x.norm)


def hull(x: Interval, y: Interval) -> Interval:
    """Return the smallest interval that holds both; of one layout. The norm is that of either, not of a mixture."""
    return interval(np.minimum(x.lo, y.lo), np.maximum(x.hi, y.hi), max(x.norm, y.norm))


def mixture(x: Interval, y: Interval) -> Interval:
    """Return the interval of what takes each element from x or from y; of one layout: the squares of both add up."""
    return interval(np.minimum(x.lo, y.lo), np.maximum(x.hi, y.hi), math.hypot(x.norm, y.norm) * (1 + 4 * UNIT))


def with_zero(x: Interval) -> Interval:
    """Return the hull with 0, which a border of zeros reads."""
    return interval(np.minimum(x.lo, 0.0), np.maximum(x.hi, 0.0), x.norm)


def meet(x: Interval, y: Interval) -> Interval:
    """Return what two intervals of one value have in common; of one layout."""
    lo, hi = np.maximum(x.lo, y.lo), np.minimum(x.hi, y.hi)
    return interval(np.minimum(lo, hi), np.maximum(lo, hi), min(x.norm, y.norm))


def plus(x: Interval, y: Interval) -> Interval:
    """Return the interval of x + y; of one layout. ``|x + y| <= |x| + |y|`` for the norm."""
    with np.errstate(invalid="ignore"):
        return outward(x.lo + y.lo, x.hi + y.hi, x.norm + y.norm)


def negative(x: Interval) -> Interval:
    """Return the interval of -x."""
    return Interval(-x.hi, -x.lo, x.norm)


def minus(x: Interval, y: Interval) -> Interval:
    """Return the interval of x - y; of one layout."""
    return plus(x, negative(y))


def product(x: Array, y: Array) -> Array:
    """Return x * y with 0 * inf = 0, and without underflow to 0."""
    with np.errstate(all="ignore"):
        result = np.where((x == 0) | (y == 0), 0.0, x * y)
        vanished = (result == 0) & (x != 0) & (y != 0)
        return np.asarray(np.where(vanished, TINY * np.sign(x) * np.sign(y), result))


def times(x: Interval, y: Interval) -> Interval:
    """Return the interval of x * y; of one layout. ``|x y| <= max|x| |y|``, and with x and y swapped, for the norm."""
    corners = np.stack([product(a, b) for a in (x.lo, x.hi) for b in (y.lo, y.hi)])
    lo, hi = corners.min(axis=0), corners.max(axis=0)
    norm = min(scaled(float(a.magnitude.max(initial=0.0)), b.norm) for a, b in ((x, y), (y, x)))
    return outward(lo, hi, norm)


def linear(x: Interval, plain: Function, absolute: Function, *, terms: int, rows: Array, gain: float) -> Interval:
    """Return the interval of W x.

    The ends are ``W m ± |W| r`` for x = m ± r, exact for independent positions; by Cauchy-Schwarz each row is at most
    its own norm times that of x, and the norm at most the largest singular value times that of x.

    Args:
        x: the interval of x.
        plain: v -> W v.
        absolute: v -> abs(W) v.
        terms: the number of terms in each sum.
        rows: the norm of each row, shaped so that it broadcasts against the result.
        gain: a bound on the largest singular value.
    """
    finite = np.isfinite(x.lo) & np.isfinite(x.hi)
    lo, hi = np.where(finite, x.lo, 0.0), np.where(finite, x.hi, 0.0)
    middle, radius = lo / 2 + hi / 2, hi / 2 - lo / 2
    with np.errstate(all="ignore"):
        center, reach = plain(middle), absolute(radius)
        scale = absolute(np.abs(middle) + radius)
        if not finite.all():
            reach = np.where(absolute((~finite).astype(np.float64)) > 0, np.inf, reach)
        slack = (terms + 8) * 2 * UNIT * scale
        # What vanishes by underflow is smaller than TINY, but must not become an exact 0
        touched = absolute((x.magnitude > 0).astype(np.float64)) > 0
        slack = np.where(touched & (scale < TINY), TINY, slack)
        result = outward(center - reach, center + reach, scaled(gain, x.norm), slack=slack)
        limit = product(np.broadcast_to(rows, result.shape), np.array(x.norm)) * (1 + (terms + 8) * UNIT)
        limit = np.where(limit > 0, np.maximum(limit, TINY), 0.0)
    return interval(np.maximum(result.lo, -limit), np.minimum(result.hi, limit), result.norm)


def scaled(gain: float, norm: float) -> float:
    """Return a norm times a gain, with 0 * inf = 0."""
    return float(product(np.array(gain), np.array(norm)))


def row_norms(weights: Array, axes: tuple[int, ...]) -> Array:
    """Return a bound on the Euclidean norm over ``axes``; the sum of magnitudes where squares would vanish."""
    squares = np.sqrt((weights * weights).sum(axis=axes))
    return np.asarray(
        np.where(squares < TINY, np.abs(weights).sum(axis=axes), squares * (1 + (weights.size + 8) * UNIT))
    )


def largest_singular_value(matrices: Array) -> float:
    """Return a bound on the largest singular value of any of a stack of matrices, of shape ``[..., rows, columns]``.

    From the largest eigenvalue of the smaller Gram matrix, or above a size where that is slow ``sqrt(|W|_1 |W|_inf)``.
    """
    rows, columns = matrices.shape[-2:]
    if not matrices.size:
        return 0.0
    magnitude = np.abs(matrices)
    largest = float(magnitude.max())
    if largest == 0 or not np.isfinite(largest):
        return largest
    matrices = matrices / largest  # the squares of tiny weights would vanish
    if min(rows, columns) > 2048:
        sums = np.abs(matrices)
        return largest * float(np.sqrt(sums.sum(axis=-1).max() * sums.sum(axis=-2).max())) * (1 + 1e-9)
    turned = matrices.swapaxes(-1, -2)
    gram = matrices @ turned if rows <= columns else turned @ matrices
    eigenvalue = np.linalg.eigvalsh(gram)[..., -1].max()
    # An eigenvalue's error is at most a few units of the matrix's norm per row; 1e-9 is far more
    return largest * float(np.sqrt(max(float(cast(float, eigenvalue)), 0.0) * (1 + 1e-9)))
