"""A linear layer as a matrix over channels: the arithmetic that Conv, Gemm and MatMul share.

Every input column is ``x_k = weight_k * basis[key_k] + offset_k``. Without padding the basis is the number's function
and a constant is all offset, so it folds into the bias. Under zero padding a nonzero offset is not constant at the
border, so it stays with its function (key: number and shift/scale), and a constant is a multiple of the column of ONE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np

from prune2deploy.graph.fact import ONE, Fact, Numbers, digest

FAR = 1024.0
"""An input whose offset is so many times its multiple does not stand for others: its rounding is theirs many times."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One group of a linear layer.

    Attributes:
        weight: [rows, columns, taps] in the storage precision.
        bias: [rows] float64, zeros where the layer has none.
        padded: whether zero padding can reach an output.
    """

    weight: np.ndarray
    bias: np.ndarray
    padded: bool


@dataclass(frozen=True, eq=False)
class Columns:
    """What the inputs of one group are, by column: ``weight * basis[key] + offset``; weight 0 is a pure constant."""

    key: np.ndarray  # int64
    weight: np.ndarray  # float64
    offset: np.ndarray  # float64


def columns(fact: Fact, padded: bool, numbers: Numbers) -> Columns:
    """Return the columns of inputs with these facts (arrays flattened)."""
    number, scale, shift = (part.ravel() for part in (fact.number, fact.scale, fact.shift))
    constant = scale == 0
    ratio = np.where(constant, 0.0, shift / np.where(constant, 1.0, scale))
    # An offset stays with its function under padding, and where the function would drown in its rounding.
    bound = (ratio != 0) & (padded | (np.abs(ratio) > FAR))
    key = np.where(constant, ONE, number)
    for k in np.flatnonzero(bound).tolist():
        key[k] = numbers.intern(("shifted", int(number[k]), float(ratio[k])))
    weight = np.where(constant & padded, shift, scale)
    offset = np.where(bound | padded, 0.0, shift)
    return Columns(key, weight, offset)


@dataclass(frozen=True, eq=False)
class Merged:
    """The columns of equal inputs added up, in the storage precision: what will be written decides what is zero.

    Attributes:
        key: [classes] the basis function of each class.
        class_of: [columns] the class of each column, -1 for constants.
        weight: [rows, classes, taps].
        nonzero: [rows, classes] whether the row still reads the class.
        constant: [rows] the rows that read nothing.
        shift: [rows] bias and everything constant, float64.
    """

    key: np.ndarray
    class_of: np.ndarray
    weight: np.ndarray
    nonzero: np.ndarray
    constant: np.ndarray
    shift: np.ndarray


def merge(matrix: Matrix, cols: Columns) -> Merged:
    """Return the matrix with its columns of equal inputs added up."""
    active = np.flatnonzero(cols.weight)
    key, inverse = np.unique(cols.key[active], return_inverse=True)
    if len(key) == len(active):  # no aliases: classes are the columns in their own order
        key, inverse = cols.key[active], np.arange(len(active))
    class_of = np.full(len(cols.key), -1, dtype=np.int64)
    class_of[active] = inverse
    weight = matrix.weight if len(active) == len(cols.key) else matrix.weight[:, active]
    scales = cols.weight[active]
    if len(key) < len(active):
        total = np.zeros((len(key), weight.shape[0], weight.shape[2]))
        np.add.at(total, inverse, (weight.astype(np.float64) * scales[None, :, None]).transpose(1, 0, 2))
        if np.abs(total).max(initial=0.0) > np.finfo(matrix.weight.dtype).max:
            alone = np.where(cols.weight != 0, -1 - np.arange(len(cols.key)), cols.key)
            return merge(matrix, Columns(alone, cols.weight, cols.offset))  # the sums overflow: no two are merged
        weight = total.transpose(1, 0, 2).astype(matrix.weight.dtype)
    elif (scales != 1).any():
        weight = (weight.astype(np.float64) * scales[None, :, None]).astype(matrix.weight.dtype)
    nonzero = (weight != 0).any(axis=2)
    shift = matrix.bias + constant_part(matrix.weight, cols.offset)
    return Merged(key, class_of, weight, nonzero, ~nonzero.any(axis=1), shift)


def constant_part(weight: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return what constant inputs ``offset`` [columns] add to every row, float64 [rows]."""
    used = np.flatnonzero(offset)
    return np.asarray(weight[:, used].astype(np.float64).sum(axis=2) @ offset[used])


def row_facts(merged: Merged, signature: Hashable, numbers: Numbers) -> Fact:
    """Return the facts of the output rows: constants, and numbers keyed by the merged weights and what they read."""
    rows, classes = merged.nonzero.shape
    number = np.zeros(rows, dtype=np.int64)
    mark = numbers.intern(("linear", signature))
    by_pattern: dict[bytes, list[int]] = {}
    for row, pattern in enumerate(np.packbits(merged.nonzero, axis=1)):
        by_pattern.setdefault(pattern.tobytes(), []).append(row)
    for members in by_pattern.values():
        read = np.flatnonzero(merged.nonzero[members[0]])
        if not len(read):
            continue
        order = read[np.argsort(merged.key[read], kind="stable")]
        inputs = digest(merged.key[order])
        whole = len(order) == classes and (order == np.arange(classes)).all()
        for row in members:
            data = merged.weight[row] if whole else merged.weight[row, order]
            key = hashlib.blake2b(np.ascontiguousarray(data).view(np.uint8).data, digest_size=16).digest()
            number[row] = numbers.intern((mark, inputs, key))
    return Fact(number, np.where(merged.constant, 0.0, 1.0), merged.shift)


def needed_columns(merged: Merged, rows: np.ndarray) -> np.ndarray:
    """Return the classes that any of these rows (bool) reads; bool [classes]."""
    return np.asarray(merged.nonzero[rows & ~merged.constant].any(axis=0))


def fold(matrix: Matrix, cols: Columns, live_columns: np.ndarray, live_rows: np.ndarray) -> Matrix:
    """Return the matrix that reads only live columns and computes the same on live rows.

    A constant goes into the bias, an alias into the live column of its class with the largest multiple. Rows that are
    constant, or that nobody reads, read nothing: they hold their constant, or 0.
    """
    merged = merge(matrix, cols)
    weight = matrix.weight.copy()
    offset = np.where(live_columns, 0.0, cols.offset)
    folded = np.flatnonzero(~live_columns & (cols.weight != 0))
    if len(folded):
        standing_in = _representatives(merged, cols, live_columns)
        for k in folded.tolist():
            r = standing_in.get(int(merged.class_of[k]))
            if r is None:
                continue  # nobody needs the class: its columns cancel in every live row
            ratio = cols.weight[k] / cols.weight[r]
            weight[:, r] = (weight[:, r].astype(np.float64) + ratio * matrix.weight[:, k]).astype(weight.dtype)
            offset[k] -= ratio * cols.offset[r]
    bias = matrix.bias + constant_part(matrix.weight, offset)
    weight[:, ~live_columns] = 0
    idle = merged.constant | ~live_rows
    weight[idle] = 0
    bias[idle] = np.where(merged.constant, merged.shift, 0.0)[idle]
    return replace(matrix, weight=weight, bias=bias)


def _representatives(merged: Merged, cols: Columns, live_columns: np.ndarray) -> dict[int, int]:
    """Return for each class its live column with the largest multiple, if it has a live one."""
    found: dict[int, int] = {}
    candidates = np.flatnonzero(live_columns & (merged.class_of >= 0))
    for k in candidates[np.argsort(-np.abs(cols.weight[candidates]), kind="stable")].tolist():
        found.setdefault(int(merged.class_of[k]), k)
    return found
