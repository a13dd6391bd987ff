"""What a value can be in two graphs of one structure, and what the difference between the two can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.bounds.interval import (
    Array,
    Interval,
    anything,
    collapse,
    hull,
    interval,
    meet,
    minus,
    mixture,
    plus,
    point,
    spread,
    times,
    with_zero,
    zero,
)


@dataclass(frozen=True, eq=False)
class Ranges:
    """The intervals of one value x: in the reference, x' in the changed graph, and of ``x' - x``; of one layout."""

    reference: Interval
    changed: Interval
    difference: Interval

    @property
    def shape(self) -> tuple[int, ...]:
        """The layout, common to the three intervals."""
        return self.reference.shape

    @property
    def same(self) -> bool:
        """Whether the value is the same in both graphs."""
        return self.difference.is_zero

    def each(self, function: Callable[[Interval], Interval]) -> Ranges:
        """Return the ranges after a movement, or another map that commutes with subtraction."""
        return ranges(*(function(part) for part in (self.reference, self.changed, self.difference)))


def ranges(reference: Interval, changed: Interval, difference: Interval) -> Ranges:
    """Return the ranges, each of the three intervals cut down to what the other two allow.

    The cut of the difference to the width of ``x' - x`` is what rescues the bounded activations.
    """
    if difference.is_zero:
        value = meet(reference, changed)
        return Ranges(value, value, zero(value.shape))
    difference = meet(difference, minus(changed, reference))
    return Ranges(meet(reference, minus(changed, difference)), meet(changed, plus(reference, difference)), difference)


def unchanged(value: Interval) -> Ranges:
    """Return the ranges of a value that is the same in both graphs."""
    return Ranges(value, value, zero(value.shape))


def unknown(layout: tuple[int, ...], *, same: bool) -> Ranges:
    """Return the ranges of a value of which nothing is known, but perhaps that it is the same in both graphs."""
    value = anything(layout)
    return Ranges(value, value, zero(layout) if same else value)


def free(reference: Interval, changed: Interval) -> Ranges:
    """Return the ranges of two values whose difference is bounded by nothing but their own ends."""
    return ranges(reference, changed, minus(changed, reference))


def constants(before: Array, after: Array) -> Ranges:
    """Return the ranges of a constant that is ``before`` in the reference and ``after`` in the changed graph."""
    if before is after or np.array_equal(before, after):
        return unchanged(point(before))
    wide = [np.asarray(array, dtype=np.float64) for array in (before, after)]
    return Ranges(point(before), point(after), minus_points(wide[1], wide[0]))


def minus_points(x: Array, y: Array) -> Interval:
    """Return the interval of the difference of two constants: exactly 0 where they are equal."""
    found, differs = minus(point(x), point(y)), x != y
    return interval(np.where(differs, found.lo, 0.0), np.where(differs, found.hi, 0.0))


def to_rank(x: Ranges, rank: int) -> Ranges:
    """Return the ranges with leading axes of size 1 added."""
    return x if len(x.shape) >= rank else x.each(lambda part: part.map(lambda a: a.reshape(_padded(a.shape, rank))))


def _padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + shape


def expanded(x: Ranges, layout: tuple[int, ...]) -> Ranges:
    """Return the ranges spread over a layout, after the rules of broadcasting."""
    if x.shape == layout:
        return x
    x = to_rank(x, len(layout))
    return Ranges(*(spread(part, layout) for part in (x.reference, x.changed, x.difference)))


def together(*values: Ranges) -> list[Ranges]:
    """Return ranges broadcast to their common layout."""
    layout = np.broadcast_shapes(*(value.shape for value in values))
    return [expanded(value, layout) for value in values]


def collapsed(x: Ranges, axes: tuple[int, ...]) -> Ranges:
    """Return the ranges with axes collapsed."""
    if all(x.shape[axis] == 1 for axis in axes):
        return x
    return x.each(lambda part: collapse(part, axes))


def bordered(x: Ranges) -> Ranges:
    """Return the ranges of a value that may also be read as 0, beyond its border."""
    return Ranges(*(with_zero(part) for part in (x.reference, x.changed, x.difference)))


def either(x: Ranges, y: Ranges) -> Ranges:
    """Return the ranges of a value each of whose vectors over the expanded axes is that of x or that of y, whole.

    It is the same one in both graphs.
    """
    x, y = together(x, y)
    return ranges(hull(x.reference, y.reference), hull(x.changed, y.changed), hull(x.difference, y.difference))


def mixed(x: Ranges, y: Ranges) -> Ranges:
    """Return the ranges of a value each of whose elements is that of x or that of y, the same one in both graphs."""
    x, y = together(x, y)
    return ranges(mixture(x.reference, y.reference), mixture(x.changed, y.changed), mixture(x.difference, y.difference))


def add(x: Ranges, y: Ranges) -> Ranges:
    """Return the ranges of x + y: the difference is the sum of the differences."""
    x, y = together(x, y)
    return ranges(plus(x.reference, y.reference), plus(x.changed, y.changed), plus(x.difference, y.difference))


def subtract(x: Ranges, y: Ranges) -> Ranges:
    """Return the ranges of x - y."""
    return add(x, Ranges(*(interval(-p.hi, -p.lo, p.norm) for p in (y.reference, y.changed, y.difference))))


def multiply(x: Ranges, y: Ranges) -> Ranges:
    """Return the ranges of x y: ``x'y' - xy = dx y' + x dy = dx y + x' dy``; both hold, so their common part does."""
    x, y = together(x, y)
    difference = meet(
        plus(times(x.difference, y.changed), times(x.reference, y.difference)),
        plus(times(x.difference, y.reference), times(x.changed, y.difference)),
    )
    return ranges(times(x.reference, y.reference), times(x.changed, y.changed), difference)
