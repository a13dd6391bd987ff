"""What operators share that take positions from one input: where each comes from, what that ties and demands."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np

from prune2deploy.graph.constraints import Constraint, Count, Implies, Positions
from prune2deploy.graph.fact import ONE, Fact, collapse
from prune2deploy.graph.node import FLOATS, Node, Operand
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View, freeze, tie_axes

INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})
MOVED = FLOATS | INTEGERS | {"bool"}
"""The types that movement covers: it computes nothing, so any whose values a fact holds exactly."""


def expanded_axes(fact: Fact) -> list[int]:
    """Return the axes along which a fact has positions."""
    return [axis for axis, size in enumerate(fact.shape) if size > 1]


def exact(array: np.ndarray) -> bool:
    """Whether facts can hold every element: finite, and no integer so large that a float64 rounds it."""
    if array.dtype.kind in "iu":
        return bool(array.size == 0 or max(abs(int(array.min())), abs(int(array.max()))) < 2**53)
    return array.dtype.kind == "b" or bool(np.isfinite(array.astype(np.float64)).all())


def whole_key(operand: Operand, view: View) -> Hashable:
    """Return what names all of an operand: its constant, or the function that all of it is."""
    if operand.array is not None:
        return (operand.array.shape, operand.array.tobytes())
    fact = view.of(operand)
    for axis in range(len(fact.shape)):
        fact = collapse(fact, axis, operand.shape or (), view.numbers)
    return (operand.shape, int(fact.number.ravel()[0]), float(fact.scale.ravel()[0]), float(fact.shift.ravel()[0]))


def everything(operand: Operand, view: View) -> Demand:
    """Return the demand for all of a value."""
    return Demand(np.ones(view.of(operand).shape, dtype=bool))


def computed(node: Node, slots: Iterable[int]) -> list[int]:
    """Return those of the slots that hold a computed value."""
    return [slot for slot in slots if slot < len(node.inputs) and node.inputs[slot].is_value]


def renumbered(kept: np.ndarray | None, wanted: np.ndarray) -> np.ndarray:
    """Return old positions as places among those that are kept."""
    return wanted if kept is None else np.asarray(np.searchsorted(kept, wanted))


def gather_if_needed(edit: Edit, slot: int, operand: Operand, axis: int, wanted: np.ndarray) -> None:
    """Select ``wanted`` old positions of an input, unless they are exactly those that are kept of it, in order."""
    kept = edit.kept(operand, axis)
    size = (operand.shape or ())[axis] if kept is None else len(kept)
    places = renumbered(kept, wanted)
    if len(places) != size or (places != np.arange(size)).any():
        edit.gather(slot, axis, places)


Sources = dict[int, np.ndarray]
"""Axis of the value -> the input position of each output position, -1 for padding."""


@dataclass(frozen=True, eq=False)
class Plan:
    """How an operator makes its output from its first input.

    Attributes:
        sources: for the axes whose positions move; along all others with positions the output is like the input.
        effect: what it does to the functions of the collapsed coordinates.
        fill: what padding holds.
        aside: the slots of computed inputs that say how the collapsed coordinates move.
    """

    sources: Sources
    effect: Callable[[Fact], Fact] = field(default=lambda fact: fact)
    fill: float = 0.0
    aside: tuple[int, ...] = ()


MakePlan = Callable[[Node, View], Plan | str]


def plan_of(make: MakePlan, node: Node, view: View) -> Plan:
    """Return the plan of a node that has one."""
    planned = view.once(node, "plan", lambda: make(node, view))
    assert isinstance(planned, Plan)
    return planned


def moved(array: np.ndarray, sources: Sources, fill: float) -> np.ndarray:
    """Apply the sources to an array of the input's layout."""
    for axis, source in sources.items():
        column = [1] * array.ndim
        column[axis] = len(source)
        taken = np.take(array, np.maximum(source, 0), axis=axis)
        array = np.where((source < 0).reshape(column), np.asarray(fill).astype(array.dtype), taken)
    return array


def spread_back(mask: np.ndarray, axis: int, source: np.ndarray, size: int) -> np.ndarray:
    """Return which of ``size`` positions any masked one comes from."""
    inside = np.flatnonzero(source >= 0)
    shape = list(mask.shape)
    shape[axis] = size
    wider = np.zeros(shape, dtype=bool)
    front = np.moveaxis(wider, axis, 0)  # a view
    np.logical_or.at(front, source[inside], np.moveaxis(mask, axis, 0)[inside])
    return wider


def sourced_rule(make: MakePlan, drop: Callable[[Node, Edit], None]) -> Rule:
    """Return the rule of an operator that takes positions from one input or from padding."""

    def facts(node: Node, view: View) -> list[Fact] | str:
        planned = view.once(node, "plan", lambda: make(node, view))
        if isinstance(planned, str):
            return planned
        sources, fill = planned.sources, planned.fill
        fact = planned.effect(view.of(node.inputs[0]))
        return [
            Fact(moved(fact.number, sources, ONE), moved(fact.scale, sources, 0.0), moved(fact.shift, sources, fill))
        ]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        planned = plan_of(make, node, view)
        assert outs[0] is not None
        mask = outs[0]
        layout = view.of(node.inputs[0]).shape
        for axis, source in planned.sources.items():
            mask = spread_back(mask, axis, source, layout[axis])
        return {0: Demand(mask), **{slot: everything(node.inputs[slot], view) for slot in planned.aside}}

    def ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
        planned = plan_of(make, node, view)
        output, operand = node.outputs[0], node.inputs[0]
        for axis in range(len(view.of(output).shape)):
            source = planned.sources.get(axis)
            if source is None:
                yield from tie_axes(positions, (output.name, axis), (operand.name, axis))
                continue
            out, into = positions.ids(output.name, axis), positions.ids(operand.name, axis)
            inside = source >= 0
            if out is None:  # a single position is left
                yield freeze(None if into is None else into[source[inside]])
            elif into is not None:
                yield Implies(out[inside], into[source[inside]])
            if out is not None and not inside.all():
                yield Count((out[inside][None],), always=True)  # padding alone has nothing to be put around

    return Rule(facts, live, ties, drop, "movement", types=MOVED)
