"""The operands of an elementwise operator, brought to one layout and one domain.

A number names a function of its value's collapsed coordinates, in their order. Operands of different shapes have
different domains, and equal numbers may stand along different axes (``h[None] - h[:, None]``), so an operand that is
broadcast gets numbers of its own: functions on the output's domain.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.fact import Fact, Shape, constant, digest, expand, make
from prune2deploy.graph.node import Node, Operand
from prune2deploy.graph.rules.base import View


@dataclass(frozen=True, eq=False)
class Aligned:
    """The operands' facts with the output's rank and one layout; ``starts`` are the axes that each lacks in front."""

    facts: tuple[Fact, ...]
    starts: tuple[int, ...]
    layout: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Domain:
    """The output's collapsed axes that are not of size 1, and what tells this domain from others in a key."""

    axes: tuple[int, ...]
    key: Hashable


def align(node: Node, view: View) -> Aligned | None:
    """Return the operands' facts aligned, or None where shapes are unknown or contradict each other."""
    return view.once(node, "aligned", lambda: _align(node, view))


def aligned_shape(operand: Operand, rank: int) -> Shape:
    """Return an operand's shape with as many axes as the output."""
    assert operand.shape is not None
    return (1,) * (rank - len(operand.shape)) + operand.shape


def _align(node: Node, view: View) -> Aligned | None:
    output = node.outputs[0].shape
    if output is None or any(operand.shape is None or len(operand.shape) > len(output) for operand in node.inputs):
        return None
    rank = len(output)
    shapes = [aligned_shape(operand, rank) for operand in node.inputs]
    starts = tuple(rank - len(operand.shape or ()) for operand in node.inputs)
    raw = [_raw(operand, start, view) for operand, start in zip(node.inputs, starts, strict=True)]
    values = [slot for slot, operand in enumerate(node.inputs) if operand.is_value]
    layout = tuple(
        # what a constant alone spans (it times a computed scalar) has positions too
        max(fact.shape[axis] for slot, fact in enumerate(raw) if slot in values or _all_ones(shapes, values, axis))
        for axis in range(rank)
    )
    if not all(_agree(fact, layout, output) for fact in raw):
        return None
    axes = tuple(axis for axis in range(rank) if layout[axis] == 1 and output[axis] != 1)
    sizes = tuple(output[axis] for axis in axes)
    domain = Domain(axes, (sizes, node.index if None in sizes else None))
    found = []
    for slot, (operand, fact) in enumerate(zip(node.inputs, raw, strict=True)):
        if not operand.is_value:
            found.append(_constant(fact, layout, domain, view))
            continue
        fact = _expanded(fact, layout, shapes[slot], view)
        if not all(spans(node, [slot], axis) for axis in axes):
            fact = _broadcast(fact, tuple(shapes[slot][axis] for axis in axes), domain, view)
        found.append(fact.map(lambda array: np.broadcast_to(array, layout)))
    return Aligned(tuple(found), starts, layout)


def spans(node: Node, slots: Collection[int], axis: int) -> bool:
    """Whether these operands alone give the output its size along an axis, so that the others are broadcast there."""
    shape = node.outputs[0].shape
    assert shape is not None
    sizes = [aligned_shape(operand, len(shape))[axis] for operand in node.inputs]
    known = any(shape[axis] is not None and sizes[slot] == shape[axis] for slot in slots)
    return known or all(size == 1 for slot, size in enumerate(sizes) if slot not in slots)


def _all_ones(shapes: list[Shape], slots: list[int], axis: int) -> bool:
    return all(shapes[slot][axis] == 1 for slot in slots)


def _raw(operand: Operand, start: int, view: View) -> Fact:
    fact = view.of(operand) if operand.is_value else constant(np.asarray(operand.array))
    return fact.map(lambda array: array.reshape((1,) * start + array.shape))


def _agree(fact: Fact, layout: tuple[int, ...], output: Shape) -> bool:
    sizes = zip(fact.shape, layout, output, strict=True)
    return all(size == 1 or size == (want if want > 1 else out) for size, want, out in sizes)


def _expanded(fact: Fact, layout: tuple[int, ...], shape: Shape, view: View) -> Fact:
    """Expand a value to the layout; along a dimension of size 1 it is broadcast, which needs no positions."""
    for axis, size in enumerate(layout):
        if size > 1 and fact.shape[axis] == 1 and shape[axis] != 1:
            fact = expand(fact, axis, size, shape, view.numbers)
    return fact


def _broadcast(fact: Fact, own: Shape, domain: Domain, view: View) -> Fact:
    """Name the functions of a value whose sizes along the domain's axes are ``own`` on that domain."""
    mark = view.numbers.intern(("broadcast", own, domain.key))
    number = view.numbers.intern_all((mark, number) for number in fact.number.ravel().tolist())
    return make(number.reshape(fact.shape), fact.scale, fact.shift)


def _constant(fact: Fact, layout: tuple[int, ...], domain: Domain, view: View) -> Fact:
    """Fit a constant to the layout; where it varies along a collapsed axis it is a function keyed by its bits."""
    values = fact.shift
    varying = tuple(axis for axis in domain.axes if values.shape[axis] > 1)
    if not varying:
        return fact.map(lambda array: np.broadcast_to(array, layout))
    kept = [axis for axis in range(values.ndim) if axis not in varying]
    first = values[tuple(slice(0, 1) if axis in varying else slice(None) for axis in range(values.ndim))]
    uniform = (values == first).all(axis=varying, keepdims=True)
    rows = np.transpose(values, [*kept, *varying]).reshape(first.size, -1)
    mark = view.numbers.intern(("map", tuple(values.shape[axis] for axis in domain.axes), domain.key))
    number = view.numbers.intern_all((mark, digest(row)) for row in rows).reshape(first.shape)
    found = make(number, np.where(uniform, 0.0, 1.0), np.where(uniform, first, 0.0))
    return found.map(lambda array: np.broadcast_to(array, layout))
