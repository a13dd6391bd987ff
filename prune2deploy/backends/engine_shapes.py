"""The shapes an engine is built for: of each dynamic input the smallest, the one it is tuned for, and the largest."""

from collections.abc import Mapping

from prune2deploy.errors import InputError

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]
"""The smallest shape an engine takes, the one it is tuned for, and the largest."""

Batch = tuple[int, int, int]
"""The same of a batch."""


def shape_ranges(
    declared: Mapping[str, Shape], batch: Batch, given: Mapping[str, ShapeRange], model: str
) -> dict[str, ShapeRange]:
    """Return the ranges of the inputs that have dynamic axes.

    Args:
        declared: input name -> the graph's shape, with -1 for a dynamic axis.
        batch: for inputs whose only dynamic axis is the first.
        given: input name -> range, for the others.
        model: what the inputs belong to, for messages.

    Raises:
        InputError: if a dynamic input has no range, a range does not fit its input, or there is no such input.
    """
    unknown = sorted(set(given) - set(declared))
    if unknown:
        raise InputError(f"'{model}' has no input '{unknown[0]}' to give shapes for; its inputs are {sorted(declared)}")
    wanted = {name: given.get(name) or _batched(name, shape, batch, model) for name, shape in declared.items()}
    for name, shape in declared.items():
        _require_fit(name, shape, wanted[name])
    return {name: wanted[name] for name, shape in declared.items() if -1 in shape}


def _batched(name: str, shape: Shape, batch: Batch, model: str) -> ShapeRange:
    if -1 in shape[1:]:
        raise InputError(
            f"input '{name}' of '{model}' is {list(shape)}, dynamic beyond the batch; give its smallest, tuned-for and "
            "largest shape"
        )
    if -1 not in shape:
        return shape, shape, shape
    smallest, tuned, largest = batch
    return (smallest, *shape[1:]), (tuned, *shape[1:]), (largest, *shape[1:])


def _require_fit(name: str, declared: Shape, wanted: ShapeRange) -> None:
    fits = all(len(shape) == len(declared) for shape in wanted) and all(
        1 <= low <= tuned <= high and (size == -1 or low == size == high)
        for size, low, tuned, high in zip(declared, *wanted, strict=True)
    )
    if not fits:
        raise InputError(
            f"the shapes {[list(shape) for shape in wanted]} do not fit input '{name}' {list(declared)}: each size is "
            "1 or more, does not fall from smallest to tuned-for to largest, and is the graph's where that is not -1"
        )
