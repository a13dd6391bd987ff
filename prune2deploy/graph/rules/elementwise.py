"""Add, Sub and Mul with broadcasting, of two computed values or of one and a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import Fact, Shape, constant, digest, expand, make
from prune2deploy.graph.node import Node, Operand
from prune2deploy.graph.rules.base import Axis, Demand, Edit, Part, Rule, View, tie_axes

Combine = Callable[[Node, Fact, Fact, View], Fact]


@dataclass(frozen=True, eq=False)
class Aligned:
    """The two operands with the output's rank and one layout; ``starts`` are the axes that each lacks in front."""

    facts: tuple[Fact, Fact]
    starts: tuple[int, int]


def align(node: Node, view: View) -> Aligned | None:
    """Return the operands' facts aligned, or None where a rank is unknown."""
    ranks = [operand.rank for operand in node.inputs]
    if len(ranks) != 2 or any(rank is None for rank in ranks):
        return None
    rank = max(r for r in ranks if r is not None)
    starts = tuple(rank - (r or 0) for r in ranks)
    shapes = [(1,) * start + (operand.shape or ()) for operand, start in zip(node.inputs, starts, strict=True)]
    raw = [_raw(operand, start, view) for operand, start in zip(node.inputs, starts, strict=True)]
    values = [fact for operand, fact in zip(node.inputs, raw, strict=True) if operand.is_value]
    layout = tuple(max(fact.shape[axis] for fact in values) for axis in range(rank))
    found = [
        _spread(fact, layout, shape, view) if operand.is_value else _constant(fact, layout, view)
        for operand, fact, shape in zip(node.inputs, raw, shapes, strict=True)
    ]
    return Aligned((found[0], found[1]), (starts[0], starts[1]))


def _raw(operand: Operand, start: int, view: View) -> Fact:
    fact = view.of(operand) if operand.is_value else constant(np.asarray(operand.array))
    return fact.map(lambda array: array.reshape((1,) * start + array.shape))


def _spread(fact: Fact, layout: tuple[int, ...], shape: Shape, view: View) -> Fact:
    """Expand a value to the layout; along a dimension of size 1 it is broadcast, which needs nothing."""
    for axis, size in enumerate(layout):
        if size > 1 and fact.shape[axis] == 1 and shape[axis] != 1:
            fact = expand(fact, axis, size, shape, view.numbers)
    return fact.map(lambda array: np.broadcast_to(array, layout))


def _constant(fact: Fact, layout: tuple[int, ...], view: View) -> Fact:
    """Fit a constant to the layout; where it varies along a collapsed axis it is a function keyed by its bits."""
    values = fact.shift
    axes = tuple(axis for axis, size in enumerate(layout) if size == 1 and values.shape[axis] > 1)
    if not axes:
        return fact.map(lambda array: np.broadcast_to(array, layout))
    first = values[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(values.ndim))]
    if (values == first).all():
        return constant(np.broadcast_to(first, layout))
    kept = [axis for axis in range(values.ndim) if axis not in axes]
    rows = np.transpose(values, [*kept, *axes]).reshape([values.shape[axis] for axis in kept] + [-1])
    numbers = [
        view.numbers.intern(("map", tuple(values.shape[axis] for axis in axes), axes, digest(row)))
        for row in rows.reshape(-1, rows.shape[-1])
    ]
    number = np.broadcast_to(np.array(numbers, dtype=np.int64).reshape(first.shape), layout)
    return Fact(number, np.ones(layout), np.zeros(layout))


def _sum(sign: float) -> Combine:
    def combine(node: Node, a: Fact, b: Fact, view: View) -> Fact:
        scale_b, shift = sign * b.scale, a.shift + sign * b.shift
        first = np.where(a.scale == 0, b.number, a.number)
        one = (a.scale == 0) | (b.scale == 0) | (a.number == b.number)  # a single function is left
        low, high = np.minimum(a.number, b.number), np.maximum(a.number, b.number)
        swap = a.number > b.number
        keyed = (
            Fact(low, np.where(swap, scale_b, a.scale), shift),
            Fact(high, np.where(swap, a.scale, scale_b), shift),
        )
        number = np.where(one, first, view.numbers.of_facts(("sum",), *keyed, shift=False))
        return make(number, np.where(one, a.scale + scale_b, 1.0), shift)

    return combine


def _product(node: Node, a: Fact, b: Fact, view: View) -> Fact:
    held, other = np.where(a.scale == 0, a.shift, b.shift), a.scale == 0
    single = (a.scale == 0) | (b.scale == 0)
    number = np.where(other, b.number, a.number)
    scale = held * np.where(other, b.scale, a.scale)
    shift = held * np.where(other, b.shift, a.shift)
    plain = ~single & (a.shift == 0) & (b.shift == 0)  # (s X)(s' Y) = s s' (X Y)
    swap = a.number > b.number
    parts = [(a, b), (b, a)]
    keyed = tuple(
        Fact(
            np.where(swap, second.number, first.number),
            np.where(plain, 1.0, np.where(swap, second.scale, first.scale)),
            np.where(swap, second.shift, first.shift),
        )
        for first, second in parts
    )
    both = view.numbers.of_facts(("product",), *keyed)
    return make(
        np.where(single, number, both),
        np.where(single, scale, np.where(plain, a.scale * b.scale, 1.0)),
        np.where(single, shift, 0.0),
    )


def _covers(operand: Operand, output: Operand) -> bool:
    """Whether an operand alone has the output's shape, so that the other may shrink to a constant."""
    if operand.shape is None or output.shape is None or len(operand.shape) != len(output.shape):
        return False
    return all(a is not None and a == b for a, b in zip(operand.shape, output.shape, strict=True))


def _cut_slots(node: Node, aligned: Aligned, live: np.ndarray) -> set[int]:
    """Return the computed operand that is constant on all live positions and can be replaced by that constant."""
    values = node.value_slots
    covering = [slot for slot in values if _covers(node.inputs[1 - slot], node.outputs[0])]
    if len(values) < 2 or not covering:
        return set()
    if not live.any():  # only the shape matters, which the other one has
        return {covering[-1]}
    constant = [bool(fact.constant[live].all()) for fact in aligned.facts]
    if all(constant):  # the readers will see to it
        return set()
    return {slot for slot in covering if constant[slot]}


def _own_layout(mask: np.ndarray, slot: int, node: Node, aligned: Aligned, view: View) -> np.ndarray:
    """Return a mask of the common layout in an operand's own layout."""
    layout = view.of(node.inputs[slot]).shape
    start = aligned.starts[slot]
    mask = np.asarray(mask.any(axis=tuple(range(start))))
    axes = tuple(axis for axis, size in enumerate(layout) if size == 1)
    return np.asarray(mask.any(axis=axes, keepdims=True))


def elementwise(combine: Combine, *, absorbing_zero: bool) -> Rule:
    """Return the rule of a binary operator; with ``absorbing_zero`` a zero operand makes the other one irrelevant."""

    def facts(node: Node, view: View) -> list[Fact] | None:
        aligned = align(node, view)
        if aligned is None or any(
            operand.array is not None and not np.isfinite(operand.array.astype(np.float64)).all()
            for operand in node.inputs
        ):
            return None
        a, b = aligned.facts
        fact = combine(node, a, b, view)
        grown = (b.constant & ~a.constant & (not _keeps_domain(node, 0))) | (
            a.constant & ~b.constant & (not _keeps_domain(node, 1))
        )
        if grown.any():  # what passes through is broadcast: it is a function of more coordinates now
            number = view.numbers.of_facts((node.op_type, *(operand.shape for operand in node.inputs)), a, b)
            grown = np.asarray(grown & ~fact.constant)
            fact = make(
                np.where(grown, number, fact.number),
                np.where(grown, 1.0, fact.scale),
                np.where(grown, 0.0, fact.shift),
            )
        return [fact]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        aligned = align(node, view)
        assert aligned is not None
        assert outs[0] is not None
        cut = _cut_slots(node, aligned, outs[0])
        demands: dict[int, Demand] = {}
        for slot in node.value_slots:
            if slot in cut:
                continue
            mask: np.ndarray = outs[0]
            if absorbing_zero:
                other = aligned.facts[1 - slot]
                zero = [fact.constant & (fact.shift == 0) for fact in (aligned.facts[slot], other)]
                # A zero may itself be a difference that cancels: where both are, one of them is kept right.
                mask = np.asarray(mask & ~(zero[1] & ~(zero[0] if slot == 0 else False)))
            demands[slot] = Demand(_own_layout(mask, slot, node, aligned, view))
        return demands

    def ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
        output = node.outputs[0]
        rank = len(view.of(output).shape)
        for slot in sorted(needed):
            operand = node.inputs[slot]
            assert operand.shape is not None
            start = rank - len(operand.shape)
            for axis in range(rank):
                if axis >= start and operand.shape[axis - start] != 1:
                    yield from tie_axes(positions, (output.name, axis), (operand.name, axis - start))

    def drop(node: Node, edit: Edit) -> None:
        for slot, operand in enumerate(node.inputs):
            if operand.array is not None:
                _drop_constant(node, edit, slot)
        cut = [slot for slot in node.value_slots if slot not in edit.needed]
        for slot in cut:
            aligned = align(node, edit.view)
            assert aligned is not None
            _drop_cut(node, edit, slot, aligned)

    def parts(node: Node, view: View) -> list[Part]:
        output = node.outputs[0]
        layout = view.of(output).shape
        found = []
        for slot, operand in enumerate(node.inputs):
            if operand.array is None:
                continue
            start = len(layout) - operand.array.ndim
            found += [
                Part(slot, axis, "constant", Axis(output.name, axis + start), np.arange(size))
                for axis, size in enumerate(operand.array.shape)
                if size > 1 and layout[axis + start] == size
            ]
        return found

    return Rule(facts, live, ties, drop, "elementwise", parts, constant_first=True)


def _keeps_domain(node: Node, slot: int) -> bool:
    """Whether the other operand cannot broadcast this one along a collapsed axis."""
    operand, other = node.inputs[slot], node.inputs[1 - slot]
    if other.array is None:
        return _covers(operand, node.outputs[0])
    assert operand.shape is not None
    if other.array.ndim > len(operand.shape):
        return False
    tail = operand.shape[len(operand.shape) - other.array.ndim :]
    return all(size in (1, have) for size, have in zip(other.array.shape, tail, strict=True))


def _drop_constant(node: Node, edit: Edit, slot: int) -> None:
    """Slice a constant operand along the output's kept axes; where it has size 1 it stays."""
    array = node.inputs[slot].array
    assert array is not None
    output = node.outputs[0]
    start = len(edit.view.of(output).shape) - array.ndim
    sliced = array
    for axis, size in enumerate(array.shape):
        kept = edit.kept(output, axis + start)
        if kept is not None and size > 1:
            sliced = np.take(sliced, kept, axis=axis)
    if sliced is not array:
        edit.set_constant(slot, sliced)


def _drop_cut(node: Node, edit: Edit, slot: int, aligned: Aligned) -> None:
    """Replace a constant operand that is computed by its values; adding zero or multiplying by one goes altogether."""
    fact = aligned.facts[slot]
    output = node.outputs[0]
    dtype = node.inputs[1 - slot].dtype
    values = np.where(fact.constant, fact.shift, 0.0)
    for axis in range(values.ndim):
        kept = edit.kept(output, axis)
        if kept is not None and values.shape[axis] > 1:
            values = np.take(values, kept, axis=axis)
    neutral = {"Add": (0.0, (0, 1)), "Sub": (0.0, (1,)), "Mul": (1.0, (0, 1))}[node.op_type]
    if slot in neutral[1] and (values == neutral[0]).all():
        edit.bypass(1 - slot)
        return
    edit.set_constant(slot, values.astype(dtype))


ADD = elementwise(_sum(1.0), absorbing_zero=False)
SUB = elementwise(_sum(-1.0), absorbing_zero=False)
MUL = elementwise(_product, absorbing_zero=True)
