"""The inputs for a comparison: one set that every model under comparison takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prune2deploy.backends.base import InputInfo
from prune2deploy.errors import InputError


def common_inputs(inputs: Mapping[str, Sequence[InputInfo]]) -> tuple[InputInfo, ...]:
    """Return the inputs that all arms take; an axis is dynamic only where it is in every arm.

    Raises:
        InputError: if names, types, ranks or fixed sizes differ.
    """
    (first, expected), *others = inputs.items()
    for name, found in others:
        signatures = [{info.name: (info.dtype, len(info.shape)) for info in one} for one in (expected, found)]
        if signatures[0] != signatures[1]:
            raise InputError(
                f"'{first}' takes ({_list_inputs(expected)}) but '{name}' takes ({_list_inputs(found)}); "
                "compare models with the same inputs"
            )
    merged = []
    for info in expected:
        shapes = {name: next(one.shape for one in found if one.name == info.name) for name, found in inputs.items()}
        axes = [{size for size in sizes if isinstance(size, int)} for sizes in zip(*shapes.values(), strict=True)]
        if any(len(fixed) > 1 for fixed in axes):
            listing = ", ".join(f"{list(shape)} in '{name}'" for name, shape in shapes.items())
            raise InputError(f"input '{info.name}' has the shape {listing}; compare models with the same input shapes")
        shape = tuple(next(iter(fixed)) if fixed else size for fixed, size in zip(axes, info.shape, strict=True))
        merged.append(InputInfo(info.name, shape, info.dtype))
    return tuple(merged)


def random_feeds(
    inputs: Sequence[InputInfo], *, batch: int | None, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return standard normal inputs; bytes over their whole range, other integers and booleans 0 or 1, like indices.

    Raises:
        InputError: if an axis other than the first is dynamic and ``shapes`` does not give it, or a shape does not fit.
    """
    unknown = sorted(set(shapes) - {info.name for info in inputs})
    if unknown:
        raise InputError(f"there is no input '{unknown[0]}'; the inputs are {', '.join(info.name for info in inputs)}")
    return {info.name: _random_array(info.dtype, _concrete(info, batch, shapes.get(info.name)), rng) for info in inputs}


def _random_array(dtype: np.dtype[Any], shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.itemsize == 1 and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, size=shape, dtype=dtype, endpoint=True)
    return rng.integers(0, 2, size=shape).astype(dtype)


def _concrete(info: InputInfo, batch: int | None, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the shape to feed an input with."""
    wanted: list[int | str] = list(info.shape if given is None else given)
    if given is None and wanted and isinstance(wanted[0], str):
        wanted[0] = batch or 1
    fits = len(wanted) == len(info.shape) and all(
        isinstance(size, str) or size == want for size, want in zip(info.shape, wanted, strict=True)
    )
    if not fits:
        raise InputError(f"input '{info.name}' has the shape {list(info.shape)}, which {wanted} does not fit")
    if batch is not None and wanted and wanted[0] != batch:
        raise InputError(
            f"input '{info.name}' has the first axis fixed at {wanted[0]}, so batch {batch} cannot be run; "
            "leave the batch out, or export the model with a dynamic one"
        )
    sizes = [size for size in wanted if isinstance(size, int)]
    if len(sizes) < len(wanted) or min(sizes, default=1) < 1:
        raise InputError(
            f"input '{info.name}' has the shape {wanted}: give every dynamic axis a size of at least 1, "
            f"as shape {info.name}:1x3x224x224"
        )
    return tuple(sizes)


def _list_inputs(inputs: Sequence[InputInfo]) -> str:
    return ", ".join(f"{info.name}: {info.dtype}{list(info.shape)}" for info in inputs)
