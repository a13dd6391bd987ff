"""A linear layer as a matrix over channels: the arithmetic that all operators with constant weights share.

Every input column is ``x_k = weight_k * basis[key_k] + offset_k``. Without padding the basis is the number's function
and a constant is all offset, so it folds into the bias. Under zero padding a nonzero offset is not constant at the
border, so it stays with its function (key: number and shift/scale), and a constant is a multiple of the column of ONE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from prune2deploy.graph.fact import ONE, Fact, Numbers, digest

FAR = 1024.0
"""An input whose offset is so many times its multiple does not stand for others: its rounding is theirs many times."""

BLOCK = 2**20
"""Weights are looked at so many elements at a time: what is worked out of them on the way stays small."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One group of a linear layer.

    Attributes:
        weight: [rows, columns, taps] in the storage precision.
        bias: [rows] float64, zeros where the layer has none.
    """

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True, eq=False)
class Columns:
    """What the inputs of one group are, by column: ``weight * basis[key] + offset``; weight 0 is a pure constant."""

    key: np.ndarray  # int64
    weight: np.ndarray  # float64
    offset: np.ndarray  # float64

    def part(self, first: int, size: int) -> Columns:
        """Return some consecutive columns."""
        span = slice(first, first + size)
        return Columns(self.key[span], self.weight[span], self.offset[span])


def columns(fact: Fact, padded: bool, numbers: Numbers) -> Columns:
    """Return the columns of inputs with these facts (arrays flattened); ``padded``: zero padding can be seen."""
    number, scale, shift = (part.ravel() for part in (fact.number, fact.scale, fact.shift))
    if not shift.any():  # then nothing is constant but zero, and no offset has to stay with its function
        return Columns(number, scale, shift)
    constant = scale == 0
    ratio = _steady(np.where(constant, 0.0, shift / np.where(constant, 1.0, scale)))
    # An offset stays with its function under padding, and where the function would drown in its rounding.
    bound = (ratio != 0) & (padded | (np.abs(ratio) > FAR))
    key = np.where(constant, ONE, number)
    for k in np.flatnonzero(bound).tolist():
        key[k] = numbers.intern(("shifted", int(number[k]), float(ratio[k])))
    weight = np.where(constant & padded, shift, scale)
    offset = np.where(bound | padded, 0.0, shift)
    return Columns(key, weight, offset)


def _steady(ratio: np.ndarray) -> np.ndarray:
    """Return ratios to 48 bits: multiples of one function are told apart by the rounding of their own two parts."""
    mantissa, exponent = np.frexp(ratio)
    return np.asarray(np.ldexp(np.round(mantissa * 2.0**48), exponent - 48))


@dataclass(frozen=True, eq=False)
class Classes:
    """The columns sorted into classes of equal inputs.

    Attributes:
        key: [classes] the basis function of each class.
        class_of: [columns] the class of each column, -1 for constants.
        first: [classes] the first column of each class.
        members: [classes] the number of columns of each class.
    """

    key: np.ndarray
    class_of: np.ndarray
    first: np.ndarray
    members: np.ndarray


def classes_of(cols: Columns, *, apart: bool = False) -> Classes:
    """Return the classes of columns; ``apart``, each column has its own."""
    active = np.flatnonzero(cols.weight)
    key, first = cols.key[active], np.arange(len(active))  # classes are the columns in their own order,
    inverse, members = first, np.ones(len(active), dtype=np.int64)
    ordered = np.sort(key)
    if not apart and (ordered[1:] == ordered[:-1]).any():  # or, where there are aliases, in that of their keys
        key, first, inverse, members = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    class_of = np.full(len(cols.key), -1, dtype=np.int64)
    class_of[active] = inverse
    return Classes(key, class_of, active[first], members)


def merge(weight: np.ndarray, cols: Columns, classes: Classes) -> np.ndarray | None:
    """Return weights [rows, columns, taps] with the columns of each class added up; None where a sum overflows.

    The sums are in the storage precision: what will be written decides what is zero.
    """
    scales = cols.weight[classes.first]
    merged = weight if len(scales) == len(cols.key) else np.take(weight, classes.first, axis=1)
    if (scales != 1).any():
        with np.errstate(over="ignore"):
            merged = (merged * scales[None, :, None]).astype(weight.dtype)
    for shared in np.flatnonzero(classes.members > 1).tolist():
        total = np.zeros(merged[:, 0].shape)
        for k in np.flatnonzero(classes.class_of == shared).tolist():
            total += weight[:, k].astype(np.float64) * cols.weight[k]
        if np.abs(total).max(initial=0.0) > _largest(weight.dtype):
            return None
        merged[:, shared] = total
    return merged


def _largest(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def constant_part(weight: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return what constant inputs ``offset`` [columns] add to every row, float64 [rows]; a few rows at a time."""
    used = np.flatnonzero(offset)
    total = np.zeros(len(weight))
    if not len(used):
        return total
    few = len(used) < weight.shape[1] // 2
    values = offset[used] if few else offset
    height = max(1, BLOCK // max(1, weight[0].size))
    for first in range(0, len(weight), height):
        block = weight[first : first + height]
        chosen = np.take(block, used, axis=1) if few else block
        total[first : first + height] = chosen.sum(axis=2, dtype=np.float64) @ values
    return total


def nonzero_taps(weight: np.ndarray) -> np.ndarray:
    """Return where any tap of weights [rows, columns, taps] is not zero; bool [rows, columns]."""
    nonzero = weight != 0
    if weight.shape[2] == 1:
        return np.asarray(nonzero[:, :, 0])
    if weight.shape[2] > 255:  # a sum of bytes could come round to 0
        return np.asarray(nonzero.any(axis=2))
    return np.asarray(np.einsum("rct->rc", nonzero.view(np.uint8)) != 0)  # four times as fast as any()


@dataclass(frozen=True, eq=False)
class Reads:
    """What the rows of a matrix read; all that later steps need of the merged weights.

    Attributes:
        class_of: [columns] the class of each column, -1 for constants.
        bits: [rows, classes / 8] which classes a row reads, packed.
        members: [classes] the number of columns of each class.
        constant: [rows] the rows that read nothing.
        shift: [rows] bias and everything constant, float64.
    """

    class_of: np.ndarray
    bits: np.ndarray
    members: np.ndarray
    constant: np.ndarray
    shift: np.ndarray

    def needed(self, rows: np.ndarray) -> np.ndarray:
        """Return the classes that any of these rows (bool) reads; bool [classes]."""
        bits = np.bitwise_or.reduce(self.bits[rows], axis=0)
        return np.unpackbits(bits, count=len(self.members)).astype(bool)


def read_rows(
    matrix: Matrix, cols: Columns, signature: Hashable, numbers: Numbers
) -> tuple[Reads, np.ndarray, np.ndarray]:
    """Return what the rows read, their numbers, keyed by the merged weights and what they read, and their scales."""
    classes = classes_of(cols)
    scanned = _scan(matrix.weight, cols, classes)
    if scanned is None:  # a sum could not be written: no two columns are merged
        classes = classes_of(cols, apart=True)
        scanned = _scan(matrix.weight, cols, classes)
    assert scanned is not None
    bits, prints = scanned
    constant = np.asarray(~bits.any(axis=1))
    shift = matrix.bias + constant_part(matrix.weight, cols.offset)
    number, scale = np.zeros(len(constant), dtype=np.int64), np.where(constant, 0.0, 1.0)
    mark = numbers.intern(("linear", signature))
    shape_of = partial(row_shape, matrix, cols, classes)
    for pattern, rows in _by_pattern(bits, ~constant).items():
        read = np.flatnonzero(np.unpackbits(np.frombuffer(pattern, dtype=np.uint8), count=len(classes.key)))
        inputs = digest(np.sort(classes.key[read]))
        for row in rows:
            number[row], scale[row] = numbers.of_row(mark, inputs, prints[row], shape_of, row)
    return Reads(classes.class_of, bits, classes.members, constant, shift), number, scale


def _scan(weight: np.ndarray, cols: Columns, classes: Classes) -> tuple[np.ndarray, list[Hashable]] | None:
    """Return which classes each row reads (packed) and the rows' fingerprints, a few rows at a time."""
    height = max(1, BLOCK // max(1, weight[0].size))
    bits: list[np.ndarray] = []
    prints: list[Hashable] = []
    for first in range(0, len(weight), height):
        merged = merge(weight[first : first + height], cols, classes)
        if merged is None:
            return None
        bits.append(np.packbits(nonzero_taps(merged), axis=1))
        prints += _fingerprints(merged)
    return np.concatenate(bits), prints


def _by_pattern(bits: np.ndarray, rows: np.ndarray) -> dict[bytes, list[int]]:
    """Return the rows (bool) by what they read."""
    found: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(rows).tolist():
        found.setdefault(bits[row].tobytes(), []).append(row)
    return found


def _fingerprints(weight: np.ndarray) -> Iterable[Hashable]:
    """Return for each row of [rows, columns, taps] a quick mark that proportional rows share, in any order of columns.

    Two sums over a row in units of its largest weight, to ten digits.
    """
    rows = np.abs(weight.reshape(len(weight), -1)).astype(np.float64)
    unit = rows.max(axis=1, initial=0.0)
    unit[unit == 0] = 1
    sums = (rows.sum(axis=1) / unit, np.einsum("rc,rc->r", rows, rows) / unit**2)
    parts = [np.frexp(part) for part in sums]
    marks = [np.rint(np.ldexp(mantissa, 33)) for mantissa, _ in parts] + [exponent for _, exponent in parts]
    return zip(*(column.tolist() for column in marks), strict=True)


def row_shape(matrix: Matrix, cols: Columns, classes: Classes, row: int) -> tuple[bytes, float]:
    """Return a digest that exactly proportional rows share, whatever their columns' order, and the row's first weight.

    The quotients of numbers of 24 bits are told apart by the 53 of their float64 quotient; float64 weights, whose
    quotients would not be, are taken as they are.
    """
    merged = merge(matrix.weight[row : row + 1], cols, classes)
    assert merged is not None, "it was merged before"
    read = np.flatnonzero(nonzero_taps(merged)[0])
    order = read[np.argsort(classes.key[read], kind="stable")]
    shape, length = unit_row(np.take(merged[0], order, axis=0))
    return hashlib.sha256(classes.key[order].tobytes() + shape.tobytes()).digest(), length


def unit_row(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights in units of the first that is not zero, float64, and that one; of float64 weights, themselves."""
    values = (
        weight.astype(np.float64) + 0.0
    )  # -0.0 becomes 0.0: a zero column that is left out elsewhere must not count
    places = np.flatnonzero(values)
    if weight.dtype == np.float64 or not len(places):
        return values, 1.0
    length = float(values.flat[places[0]])
    return values / length, length


@dataclass(frozen=True, eq=False)
class Folded:
    """The kept part of a matrix; ``same`` where its weights are the old ones."""

    weight: np.ndarray
    bias: np.ndarray
    same: bool


@dataclass(frozen=True, eq=False)
class Fate:
    """What becomes of one side of a matrix: which indices stay, in order, and which (bool, of all) are live."""

    kept: np.ndarray
    live: np.ndarray


def fold(matrix: Matrix, cols: Columns, reads: Reads, rows: Fate, inputs: Fate) -> Folded:
    """Return the kept part of a matrix that reads only live columns and computes the same on live rows.

    A constant goes into the bias, an alias into the live column of its class with the largest multiple. Rows that are
    constant, or that nobody reads, read nothing: they hold their constant, or 0.
    """
    idle = (reads.constant | ~rows.live)[rows.kept]
    moved = np.flatnonzero(~inputs.live & (cols.weight != 0))
    kept_rows = matrix.weight if len(rows.kept) == len(matrix.weight) else np.take(matrix.weight, rows.kept, axis=0)
    whole = kept_rows is matrix.weight and len(inputs.kept) == len(cols.key)
    same = whole and not len(moved) and bool(inputs.live.all()) and not idle.any()
    weight = kept_rows if same else np.take(kept_rows, inputs.kept, axis=1)
    offset = np.where(inputs.live, 0.0, cols.offset)
    place = np.full(len(cols.key), -1, dtype=np.int64)
    place[inputs.kept] = np.arange(len(inputs.kept))
    standing_in = _representatives(reads, cols, inputs.live) if len(moved) else {}
    added: dict[int, np.ndarray] = {}
    for k in moved.tolist():
        r = standing_in.get(int(reads.class_of[k]))
        if r is None:
            continue  # nobody needs the class: its columns cancel in every live row
        ratio = cols.weight[k] / cols.weight[r]
        offset[k] -= ratio * cols.offset[r]
        added[r] = added.get(r, 0.0) + ratio * kept_rows[:, k].astype(np.float64)
    for r, more in added.items():
        weight[:, place[r]] = weight[:, place[r]] + more
    bias = matrix.bias[rows.kept] + constant_part(kept_rows, offset)
    if not same:
        weight[:, ~inputs.live[inputs.kept]] = 0
        weight[idle] = 0
    bias[idle] = np.where(reads.constant, reads.shift, 0.0)[rows.kept][idle]
    return Folded(weight, bias, same)


def _representatives(reads: Reads, cols: Columns, live_columns: np.ndarray) -> dict[int, int]:
    """Return for each class its live column with the largest multiple, if it has a live one."""
    found: dict[int, int] = {}
    candidates = np.flatnonzero(live_columns & (reads.class_of >= 0))
    for k in candidates[np.argsort(-np.abs(cols.weight[candidates]), kind="stable")].tolist():
        found.setdefault(int(reads.class_of[k]), k)
    return found
