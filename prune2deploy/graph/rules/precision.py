"""What constants become in the type in which the graph computes, and how far its kernels may be from them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from prune2deploy.graph.node import FLOATS, Operand

INTEGERS = frozenset({"int8", "uint8", "int32", "int64"})
BOOL = frozenset({"bool"})
COVERED = FLOATS | INTEGERS | BOOL
"""The types of which the elementwise rules know how they compute."""

EXACT = 2.0**53
"""Integers up to here are exact in the float64 of facts."""

NEAR = 64
"""Units in the last place within which a constant that the graph computes lies of its fact; below 1, of 1."""


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float64 values as a type holds them: rounded; NaN for an integer that it cannot hold.

    For + - * / and the square root this is what the runtime computes, bit for bit: float64 has enough digits that
    rounding twice is rounding once. Its other functions are within some units in the last place of it.
    """
    if dtype in FLOATS:
        with np.errstate(all="ignore"):
            return np.asarray(values.astype(np.dtype(dtype)).astype(np.float64))
    if dtype in BOOL:
        return np.asarray(values != 0).astype(np.float64)
    limits = np.iinfo(dtype)
    held = (values == np.rint(values)) & (np.abs(values) <= EXACT)
    return np.where(held & (values >= limits.min) & (values <= limits.max), values, np.nan)


def margin(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return how far from its fact a constant may be computed: nothing for integers, and for 0.

    Zero weights and factors give 0 in every kernel. A difference that cancels may not (the mean of a constant, less
    that constant), but a 0 behind a step is far more often a silenced channel; `verify` would see the other.
    """
    if dtype not in FLOATS:
        return np.zeros(values.shape)
    unit = float(ml_dtypes.finfo(np.dtype(dtype)).eps)  # type: ignore[no-untyped-call]
    return np.where(values == 0, 0.0, NEAR * unit * np.maximum(np.abs(values), 1.0))


def unfit(operand: Operand) -> str | None:
    """Return why the elementwise rules do not cover an operand, or None where they do."""
    if operand.dtype not in COVERED:
        return f"an input is of type {operand.dtype}"
    if operand.array is None:
        return None if operand.is_value else "an input is missing"
    values = operand.array.astype(np.float64)
    if not values.size:
        return "a constant input is empty"
    if not np.isfinite(values).all():
        return "a constant input is not finite"
    return "a constant input is too large" if operand.dtype in INTEGERS and np.abs(values).max() > EXACT else None
