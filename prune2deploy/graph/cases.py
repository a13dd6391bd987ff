"""Inputs to run graphs on that are to be compared: random, border-heavy, constant, large, and real ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prune2deploy.errors import InputError

DYNAMIC_SIZES = ((1, 32), (3, 64))
"""What dynamic axes are set to: the first axis, and the others."""
MOST_ELEMENTS = 2**30
"""Of an input that is made up; larger ones are taken for a mistake."""
STEP = 32
"""By how much the sizes of dynamic axes differ: a multiple that most strides divide."""
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs to run both graphs on: how they were made, and what they are called in messages."""

    label: str
    title: str
    feeds: Feeds


def made_cases(
    inputs: Mapping[str, tuple[str, tuple[Any, ...]]],
    samples: Mapping[str, np.ndarray] | None,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    *,
    apart: bool,
    far: bool,
) -> Iterator[Case]:
    """Yield the inputs to run graphs on: made up by type and shape, then real ones if given.

    Args:
        inputs: type (as ONNX Runtime writes it) and shape by name.
        samples: real inputs by name.
        shapes: whole shapes of inputs whose dynamic axes cannot be of the sizes that others get.
        seed: of the random inputs.
        apart: whether dynamic axes of other names get other sizes.
        far: whether inputs beyond the usual are made too.

    Raises:
        InputError: if inputs cannot be made up, or what is given does not fit them.
    """
    random = np.random.default_rng(seed)
    dynamic = any(not isinstance(size, int) for _, shape in inputs.values() for size in shape)
    unknown = [name for name in shapes if name not in inputs]
    if unknown:
        raise InputError(f"there is no input '{unknown[0]}'; the inputs are {', '.join(inputs)}")
    for batch, size in DYNAMIC_SIZES if dynamic else ((1, 1),):
        sizes = _Sizes(batch, size, apart=apart)
        concrete = {name: shapes.get(name) or sizes.of(shape) for name, (_, shape) in inputs.items()}
        too_large = [name for name, shape in concrete.items() if math.prod(shape) > MOST_ELEMENTS]
        if too_large:
            raise InputError(
                f"input '{too_large[0]}' of shape {list(concrete[too_large[0]])} is too large to be made up"
            )
        for label, make in _MAKERS.items():
            if label in FAR and not far:
                continue
            feeds = {name: typed(make(random, concrete[name]), kind) for name, (kind, _) in inputs.items()}
            yield Case(label, f"{label}, batch {batch}", feeds)
    if samples is not None:
        missing = [name for name in inputs if name not in samples]
        if missing:
            raise InputError(f"the real samples lack the input '{missing[0]}'; give one array per input")
        feeds = {name: np.ascontiguousarray(samples[name]) for name in inputs}
        yield Case("real samples", "real samples", feeds)


class _Sizes:
    """What dynamic axes are set to: the first axis to the batch; of the others, equal names to equal sizes."""

    def __init__(self, batch: int, size: int, *, apart: bool) -> None:
        self._batch, self._size, self._step = batch, size, STEP if apart else 0
        self._named: dict[str, int] = {}
        self._count = 0

    def of(self, shape: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the sizes of an input."""
        return tuple(self._of(axis, have) for axis, have in enumerate(shape))

    def _of(self, axis: int, have: Any) -> int:
        if isinstance(have, int):
            return have
        if have in self._named:
            return self._named[have]
        size = self._batch
        if axis:
            size, self._count = self._size + self._step * self._count, self._count + 1
        if isinstance(have, str) and have:
            self._named[have] = size
        return size


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.standard_normal(shape)


def _bordered(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return values that are large on the border of the last two axes and small inside."""
    values = random.standard_normal(shape) * 0.1
    for axis in (-1, -2):
        if len(shape) >= 3 and shape[axis] > 2:
            index: list[Any] = [slice(None)] * len(shape)
            for edge in (0, -1):
                index[axis] = edge
                values[tuple(index)] += 3 * random.standard_normal(values[tuple(index)].shape)
    return values


def _flat(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, random.uniform(0.5, 1.5))


def _large(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return 100 * random.standard_normal(shape)


_MAKERS = {"random": _normal, "border-heavy": _bordered, "constant": _flat, "large": _large}
FAR = frozenset({"large"})
"""Inputs beyond the usual, such as pixels up to 255: each such case is held against its own scale."""

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


_INTEGERS: dict[type, tuple[int, int]] = {np.int8: (-128, 127), np.uint8: (0, 255)}


def typed(values: np.ndarray, kind: str) -> np.ndarray:
    """Return values as an input of a type, as ONNX Runtime writes it; whole numbers lie where indices do."""
    dtype = _TYPES.get(kind)
    if dtype is None:
        raise InputError(f"inputs of type {kind} cannot be made up; give real samples")
    if np.issubdtype(dtype, np.integer):
        low, high = _INTEGERS.get(dtype, (0, 100))  # the wider ones are mostly indices
        values = np.clip(values * 50 if low < 0 else np.abs(values) * 50, low, high)
    return np.asarray((values > 0) if dtype is np.bool_ else values.astype(dtype))
