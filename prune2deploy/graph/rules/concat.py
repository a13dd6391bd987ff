"""Concat: along its axis the inputs' positions stand side by side; along all others they go together."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Implies, Positions
from prune2deploy.graph.fact import ONE, Fact, digest, expand, make
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View, freeze, tie_axes
from prune2deploy.graph.rules.sources import MOVED, exact, expanded_axes, gather_if_needed


def _axis(node: Node) -> int:
    return int(node.attribute("axis", 1)) % len(node.inputs[0].shape or (1,))


def _slots(node: Node) -> list[int]:
    """Return the slots of the inputs that hold something."""
    axis = _axis(node)
    return [slot for slot, operand in enumerate(node.inputs) if (operand.shape or ())[axis] != 0]


def _inputs(node: Node, view: View) -> list[Fact] | str:
    """Return the facts of the inputs that hold something in one layout, expanded wherever one of them is."""
    if any(operand.shape is None for operand in node.inputs):
        return "the rank of an input is not known"
    axis, slots = _axis(node), _slots(node)
    values = [view.of(node.inputs[slot]) for slot in slots if node.inputs[slot].is_value]
    wanted = sorted({a for fact in values for a in expanded_axes(fact)})
    found = []
    for slot in slots:
        operand = node.inputs[slot]
        assert operand.shape is not None
        if operand.array is not None:
            if not exact(operand.array):
                return "a constant input is not finite or too large"
            found.append(_constant(operand.array, wanted, view))
            continue
        fact = view.of(operand)
        for a in wanted:
            size = operand.shape[a] if a == axis else max(value.shape[a] for value in values)
            if not isinstance(size, int):
                return "the size of an input along its axis is not known"
            fact = expand(fact, a, size, operand.shape, view.numbers)
        found.append(fact)
    return found or "all its inputs are empty"


def _constant(array: np.ndarray, wanted: list[int], view: View) -> Fact:
    """Return the fact of a constant with positions along ``wanted``: where it varies it is a function of its own."""
    others = [axis for axis in range(array.ndim) if axis not in wanted]
    sizes = [array.shape[axis] for axis in others]
    rows = np.transpose(array, [*wanted, *others]).reshape(-1, int(np.prod(sizes)))
    same = (rows == rows[:, :1]).all(axis=1)
    number = np.array(
        [
            ONE if plain else view.numbers.intern(("map", tuple(sizes), tuple(others), digest(row)))
            for plain, row in zip(same.tolist(), rows, strict=True)
        ],
        dtype=np.int64,
    )
    layout = [array.shape[axis] if axis in wanted else 1 for axis in range(array.ndim)]
    parts = (number, np.where(same, 0.0, 1.0), np.where(same, rows[:, 0].astype(np.float64), 0.0))
    return make(*(part.reshape(layout) for part in parts))


def _facts(node: Node, view: View) -> list[Fact] | str:
    facts = view.once(node, "inputs", lambda: _inputs(node, view))
    if isinstance(facts, str):
        return facts
    axis = _axis(node)
    if any(fact.shape[axis] > 1 for fact in facts):
        parts = [[fact.number, fact.scale, fact.shift] for fact in facts]
        return [Fact(*(np.concatenate(column, axis=axis) for column in zip(*parts, strict=True)))]
    if len(facts) == 1:
        return facts
    same = np.logical_and.reduce([fact.constant & (fact.shift == facts[0].shift) for fact in facts])
    signature = ("Concat", axis, tuple(node.inputs[slot].shape for slot in _slots(node)))
    number = view.numbers.of_facts(signature, *facts)
    return [make(number, np.where(same, 0.0, 1.0), np.where(same, facts[0].shift, 0.0))]


def _spans(node: Node, view: View) -> dict[int, slice]:
    """Return by slot the span of the output's axis that the input fills; all of the axis where that is collapsed."""
    axis = _axis(node)
    spans: dict[int, slice] = {}
    start = 0
    collapsed = view.of(node.outputs[0]).shape[axis] == 1
    for slot in _slots(node):
        size = (node.inputs[slot].shape or ())[axis]
        if collapsed or not isinstance(size, int):
            spans[slot] = slice(None)
        else:
            spans[slot] = slice(start, start + size)
            start += size
    return spans


def _live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    axis = _axis(node)
    assert outs[0] is not None
    collapsed = view.of(node.outputs[0]).shape[axis] == 1
    demands = {}
    for slot, span in _spans(node, view).items():
        mask = outs[0][(slice(None),) * axis + (span,)]
        if node.inputs[slot].is_value and (collapsed or mask.any()):
            demands[slot] = Demand(mask)
    return demands


def _ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    axis, output = _axis(node), node.outputs[0]
    along = positions.ids(output.name, axis)
    for slot, span in _spans(node, view).items():
        operand = node.inputs[slot]
        if not operand.is_value:
            continue
        if slot not in needed:  # left out; if one of its places must be kept for another's sake, it comes back
            if along is not None:
                yield Implies(along[span], np.full(span.stop - span.start, positions.tripwire(node.index, slot)))
            continue
        for other in range(len(view.of(output).shape)):
            if other != axis:
                yield from tie_axes(positions, (output.name, other), (operand.name, other))
        source = positions.ids(operand.name, axis)
        if along is None:
            yield freeze(source)
        elif source is not None:  # of an input without positions of its own, the graph's input say, any part is taken
            yield Implies(along[span], source)


def _drop(node: Node, edit: Edit) -> None:
    axis = _axis(node)
    kept = edit.kept(node.outputs[0], axis)
    stay = []
    for slot, span in _spans(node, edit.view).items():
        operand = node.inputs[slot]
        wanted = None if kept is None else kept[(kept >= span.start) & (kept < span.stop)] - span.start
        if wanted is not None and not len(wanted):
            continue
        stay.append(slot)
        if operand.array is not None:
            _drop_constant(node, edit, slot, axis, wanted)
        elif wanted is not None:
            gather_if_needed(edit, slot, operand, axis, wanted)
    edit.keep_inputs(stay)
    if len(stay) == 1 < len(node.inputs) and node.inputs[stay[0]].is_value:
        edit.bypass(0)


def _drop_constant(node: Node, edit: Edit, slot: int, axis: int, wanted: np.ndarray | None) -> None:
    array = node.inputs[slot].array
    assert array is not None
    for other in range(array.ndim):
        kept = wanted if other == axis else edit.kept(node.outputs[0], other)
        if kept is not None and len(kept) < array.shape[other]:
            array = np.take(array, kept, axis=other)
    if array is not node.inputs[slot].array:
        edit.set_constant(slot, array)


CONCAT = Rule(_facts, _live, _ties, _drop, "movement", types=MOVED, constant_first=True)
