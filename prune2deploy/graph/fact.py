"""Facts: what is proved of every position of a value, and the numbers that name functions.

Each position of a value along its non-uniform axes carries *(number, scale, shift)*: ``x = scale * X[number] + shift``.
A constant has scale 0 (and number `ONE`). A number names a function of the collapsed coordinates, so equal numbers
mean provably equal values at every coordinate and for every network input.

A fact's arrays are shaped like the value, with size 1 along the collapsed axes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

ONE = 0
"""The number of the constant function 1."""

Shape = tuple[int | str | None, ...]
"""Static dimensions as ints, named dynamic ones as strings, unknown ones as None."""


@dataclass(frozen=True, eq=False)
class Fact:
    """What is known of a value's positions: three arrays of one shape, size 1 along collapsed axes."""

    number: np.ndarray  # int64
    scale: np.ndarray  # float64
    shift: np.ndarray  # float64

    @property
    def shape(self) -> tuple[int, ...]:
        """The layout: the value's size along expanded axes, 1 along collapsed ones."""
        return self.number.shape

    @property
    def constant(self) -> np.ndarray:
        """Where the value is one constant; bool, shaped like the fact."""
        return np.asarray(self.scale == 0)

    def map(self, move: Callable[[np.ndarray], np.ndarray]) -> Fact:
        """Return the fact with the same data movement applied to its three arrays."""
        return Fact(move(self.number), move(self.scale), move(self.shift))


class Numbers:
    """Hands out numbers: one for each distinct key, so that equal keys are equal functions."""

    def __init__(self) -> None:
        self._of_key: dict[Hashable, int] = {("one",): ONE}
        self._length: dict[int, float] = {}
        self._undigested: dict[Hashable, tuple[Callable[[int], tuple[bytes, float]], int]] = {}

    def intern(self, key: Hashable) -> int:
        """Return the number of the function with this key."""
        return self._of_key.setdefault(key, len(self._of_key))

    def of_row(
        self,
        mark: int,
        inputs: bytes,
        print_: Hashable,
        shape_of: Callable[[int], tuple[bytes, float]],
        row: int,
    ) -> tuple[int, float]:
        """Return the number of a linear layer's row that reads these inputs, and how many times that function it is.

        ``print_`` is a cheap mark that equal and proportional rows share. Only where another row has it too is
        ``shape_of`` asked for a digest that exactly proportional rows share, and for the row's length in units of it;
        it may be called later, for the sake of a row that is yet to come.
        """
        quick = (mark, inputs, print_)
        known = self._of_key.get(quick)
        if known is None:
            self._undigested[quick] = (shape_of, row)
            return self.intern(quick), 1.0
        if quick in self._undigested:
            first_of, first = self._undigested.pop(quick)
            shape, length = first_of(first)
            self._of_key[(mark, inputs, shape)] = known
            self._length[known] = length
        own, length = shape_of(row)
        return self.scaled((mark, inputs, own), length)

    def scaled(self, key: Hashable, length: float) -> tuple[int, float]:
        """Return the number of a function that is known but for its length, and how many times it is the first such."""
        number = self.intern(key)
        return number, length / self._length.setdefault(number, length)

    def end_rows(self) -> None:
        """Forget what only further calls of `of_row` would need."""
        self._undigested.clear()

    def intern_all(self, keys: Iterable[Hashable]) -> np.ndarray:
        """Return the numbers of many keys, int64."""
        table = self._of_key
        return np.fromiter((table.setdefault(key, len(table)) for key in keys), dtype=np.int64)

    def of_facts(self, signature: Hashable, *facts: Fact, scale: bool = True, shift: bool = True) -> np.ndarray:
        """Return one number per position, keyed by the signature and the facts at that position.

        With ``scale`` (``shift``) off, positions that differ only in it share a number: the operator passes it on.
        The facts must have one shape, which is the shape of the result.
        """
        mark = self.intern(("signature", signature))
        columns: list[list[float]] = []
        for fact in facts:
            columns.append(fact.number.ravel().tolist())
            if scale:
                columns.append(fact.scale.ravel().tolist())
            if shift:
                columns.append(fact.shift.ravel().tolist())
        return self.intern_all((mark, *row) for row in zip(*columns, strict=True)).reshape(facts[0].shape)


def digest(*arrays: np.ndarray) -> bytes:
    """Return a 16-byte fingerprint of arrays' bytes, types and shapes; equal fingerprints are taken as equal arrays."""
    hasher = hashlib.blake2b(digest_size=16)
    for array in arrays:
        hasher.update(f"{array.dtype}{array.shape}".encode())
        hasher.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return hasher.digest()


def unknown(numbers: Numbers, rank: int, key: Hashable) -> Fact:
    """Return the fact of a value of which nothing is known: one function of all its coordinates."""
    ones = (1,) * rank
    return Fact(np.full(ones, numbers.intern(key)), np.ones(ones), np.zeros(ones))


def constant(array: np.ndarray) -> Fact:
    """Return the fact of a constant, expanded along every axis of the array."""
    values = np.asarray(array, dtype=np.float64)
    return Fact(np.zeros(values.shape, dtype=np.int64), np.zeros(values.shape), values)


def make(number: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> Fact:
    """Return a fact in normal form: where the scale is 0, the number is `ONE`."""
    return Fact(np.where(scale == 0, ONE, number), np.asarray(scale, dtype=np.float64), np.asarray(shift, np.float64))


def layout_key(shape: Shape, fact: Fact) -> Hashable:
    """Return what a key must hold besides the number wherever an operator looks at single axes."""
    return (shape, fact.shape)


def expand(fact: Fact, axis: int, size: int, shape: Shape, numbers: Numbers) -> Fact:
    """Return the fact with ``axis`` expanded to ``size`` positions; constants stay, functions get one number each."""
    if fact.shape[axis] == size:
        return fact
    mark = ("at", axis, layout_key(shape, fact))
    mark_number = numbers.intern(mark)
    flat = fact.number.ravel().tolist()
    keys = ((mark_number, number, i) for i in range(size) for number in flat)
    stacked = numbers.intern_all(keys).reshape(size, *fact.shape)
    number = np.concatenate(list(stacked), axis=axis)
    return make(number, np.repeat(fact.scale, size, axis), np.repeat(fact.shift, size, axis))


def collapse(fact: Fact, axis: int, shape: Shape, numbers: Numbers) -> Fact:
    """Return the fact with ``axis`` collapsed: a constant where all positions are that one, else a fresh function."""
    if fact.shape[axis] == 1:
        return fact
    mark = numbers.intern(("collapse", axis, layout_key(shape, fact)))
    moved = [np.moveaxis(part, axis, -1) for part in (fact.number, fact.scale, fact.shift)]
    target = moved[0].shape[:-1]
    rows = [part.reshape(-1, part.shape[-1]) for part in moved]
    same = (rows[1] == 0).all(1) & (rows[2] == rows[2][:, :1]).all(1)
    number = np.array(
        [ONE if s else numbers.intern((mark, digest(*(part[i] for part in rows)))) for i, s in enumerate(same)],
        dtype=np.int64,
    )
    parts = (number, np.where(same, 0.0, 1.0), np.where(same, rows[2][:, 0], 0.0))
    return make(*(np.expand_dims(part.reshape(target), axis) for part in parts))


def with_layout(fact: Fact, axes: Sequence[int], sizes: Sequence[int], shape: Shape, numbers: Numbers) -> Fact:
    """Return the fact expanded along exactly ``axes`` (to ``sizes``) and collapsed along all others."""
    for axis in range(len(fact.shape)):
        if axis not in axes:
            fact = collapse(fact, axis, shape, numbers)
    for axis, size in zip(axes, sizes, strict=True):
        fact = expand(fact, axis, size, shape, numbers)
    return fact


def fit_mask(mask: np.ndarray, layout: tuple[int, ...]) -> np.ndarray:
    """Return a mask in another layout of the same value: any over collapsed axes, spread over expanded ones."""
    axes = tuple(a for a, (have, want) in enumerate(zip(mask.shape, layout, strict=True)) if have > 1 and want == 1)
    reduced = mask.any(axis=axes, keepdims=True) if axes else mask
    return np.broadcast_to(reduced, layout).copy()
