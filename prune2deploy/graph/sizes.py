"""Sizes of axes as they are known before run time: a number, a name, or what numbers and names make together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx

Size = int | str | None
"""A number or a name; None where nothing is known."""
Shape = list[Size]
BY = " x "


def read_shape(kind: onnx.TypeProto) -> Shape | None:
    """Return the shape that a tensor's type gives, or None where it gives none."""
    if not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims]


def is_open(size: Size) -> bool:
    """Whether nothing is known of a size: it has no name, or only the symbol that onnx made up for it."""
    return size is None or (isinstance(size, str) and "unk__" in size)


def product(sizes: Iterable[Size]) -> Size:
    """Return what sizes make together, as a number or as a name such as ``4 x batch``; None where that is not known."""
    number, names = 1, Counter[str]()
    for size in sizes:
        if size is None:
            return None
        factor, own = _factors(size)
        number, names = number * factor, names + own
    return _size(number, names)


def quotient(whole: Size, part: Size) -> Size:
    """Return the size that makes ``whole`` together with ``part``, or None where none is known to."""
    if whole is None or part is None:
        return None
    (number, names), (divisor, own) = _factors(whole), _factors(part)
    if not number or not divisor or number % divisor or own - names:
        return None
    return _size(number // divisor, names - own)


def _factors(size: int | str) -> tuple[int, Counter[str]]:
    if isinstance(size, int):
        return size, Counter()
    first, *rest = size.split(BY)
    return (int(first), Counter(rest)) if rest and first.isdecimal() else (1, Counter([first, *rest]))


def _size(number: int, names: Counter[str]) -> int | str:
    if not names or not number:
        return number
    return BY.join([*([str(number)] if number != 1 else []), *sorted(names.elements())])
