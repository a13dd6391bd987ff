"""The rule of elementwise operators of one or more inputs that are broadcast; `arithmetic` says what each computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import Fact, make
from prune2deploy.graph.node import FLOATS, Node
from prune2deploy.graph.rules.align import Aligned, align, spans
from prune2deploy.graph.rules.base import Axis, Demand, Edit, Part, Rule, View, sliced, tie_axes
from prune2deploy.graph.rules.precision import COVERED, margin, rounded, unfit

Facts = tuple[Fact, ...]
Combine = Callable[[Node, Facts, View], Fact | str]
Constants = dict[int, np.ndarray]
"""Slot -> the operand's values where they are known."""


@dataclass(frozen=True)
class Operator:
    """What the rule of an elementwise operator has to know of it.

    Attributes:
        evaluate: the operator on float64 arrays.
        combine: the facts of floating results, where more is known than that equal operands give equal results.
        any_type: whether ``combine`` holds for integers and bools too, whose sums wrap.
        neutral: an operand that changes nothing, in any slot from ``neutral_from`` on.
        absorbing: an operand that decides the result alone.
        matters: where each operand can change the result, given the facts of all; without it, `absorbing` says.
        passes: the slot that is the result, given constant operands as they will be written.
        steps: whether it jumps: a constant near a jump is then none, since the runtime's own may lie beyond it.
        variadic: whether it may have any number of inputs.
        refuses: why a node is not covered.
        kind: word for reports.
        types: the types that its output may have.
    """

    evaluate: Callable[[Node, Sequence[np.ndarray]], np.ndarray]
    combine: Combine | None = None
    any_type: bool = False
    neutral: float | None = None
    neutral_from: int = 0
    absorbing: float | None = None
    matters: Callable[[Facts], list[np.ndarray]] | None = None
    passes: Callable[[Constants], int | None] = field(default=lambda constants: None)
    steps: bool = False
    variadic: bool = False
    refuses: Callable[[Node], str | None] = field(default=lambda node: None)
    kind: str = "elementwise"
    types: frozenset[str] = COVERED


def elementwise(operator: Operator) -> Rule:
    """Return the rule of an elementwise operator."""

    def facts(node: Node, view: View) -> list[Fact] | str:
        return _facts(operator, node, view)

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        aligned = align(node, view)
        assert aligned is not None
        assert outs[0] is not None
        matters = _matters(operator, node, aligned.facts)
        cut = _cut_slots(node, aligned, matters, outs[0])
        return {
            slot: Demand(_own_layout(outs[0] & matters[slot], slot, node, aligned, view))
            for slot in node.value_slots
            if slot not in cut
        }

    def drop(node: Node, edit: Edit) -> None:
        _drop(operator, node, edit)

    return Rule(facts, live, _ties, drop, operator.kind, _parts, types=operator.types, constant_first=True)


# --- facts ------------------------------------------------------------------------------------------------------------


def _facts(operator: Operator, node: Node, view: View) -> list[Fact] | str:
    reasons = (operator.refuses(node), *(unfit(operand) for operand in node.inputs))
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        return reason
    aligned = align(node, view)
    if aligned is None:
        return "the shapes of its inputs are not known"
    floating = node.outputs[0].dtype in FLOATS
    if operator.combine is not None and (floating or operator.any_type):
        found = operator.combine(node, aligned.facts, view)
    else:
        found = keyed(operator, node, aligned.facts, view)
    if isinstance(found, str):
        return found
    shift = np.where(found.constant, rounded(found.shift, node.outputs[0].dtype), found.shift)
    return [make(found.number, found.scale, shift)] if np.isfinite(shift).all() else "a constant is out of range"


def keyed(operator: Operator, node: Node, facts: Facts, view: View) -> Fact:
    """Return the facts where nothing more is known than this: equal operands give equal results."""
    value, sure = evaluated(operator, node, facts)
    number = view.numbers.of_facts(signature(node), *facts)
    scale = np.where(sure, 0.0, 1.0)
    shift = np.where(sure, value, 0.0)
    if operator.absorbing is not None:
        decided = np.logical_or.reduce([_is(fact, operator.absorbing) for fact in facts])
        scale, shift = np.where(decided, 0.0, scale), np.where(decided, operator.absorbing, shift)
    if operator.neutral is not None:
        for slot, fact in enumerate(facts):
            others = [i for i in range(len(facts)) if i != slot]
            if any(i < operator.neutral_from for i in others):
                continue
            alone = np.logical_and.reduce([~fact.constant, *(_is(facts[i], operator.neutral) for i in others)])
            number, scale, shift = (
                np.where(alone, own, found)
                for own, found in ((fact.number, number), (fact.scale, scale), (fact.shift, shift))
            )
    return make(number, scale, shift)


def signature(node: Node) -> str:
    """Return what a key must hold of an operator besides the facts of its operands."""
    return str((node.op_type, sorted(node.attributes.items()), node.outputs[0].dtype))


def evaluated(operator: Operator, node: Node, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Return the results of constant operands, and where they are sure: all constant, and far from any jump."""
    sure = np.logical_and.reduce([fact.constant for fact in facts])
    with np.errstate(all="ignore"):
        value = operator.evaluate(node, [fact.shift for fact in facts])
        if not operator.steps or not sure.any():
            return value, sure
        margins = [margin(fact.shift, operand.dtype) for fact, operand in zip(facts, node.inputs, strict=True)]
        reach = 4 * sum(margins)
        for signs in itertools.product((-1, 1), repeat=len(facts)):
            moved = [fact.shift + sign * by for fact, sign, by in zip(facts, signs, margins, strict=True)]
            sure &= ~(np.abs(operator.evaluate(node, moved) - value) > reach)
    return value, sure


def _is(fact: Fact, value: float) -> np.ndarray:
    return np.asarray(fact.constant & (fact.shift == value))


# --- liveness and ties ------------------------------------------------------------------------------------------------


def _matters(operator: Operator, node: Node, facts: Facts) -> list[np.ndarray]:
    """Return where each operand can change the result.

    A zero factor may itself be a difference that cancels, so where several absorb, one of them is kept right.
    """
    if operator.matters is not None:
        return operator.matters(facts)
    if operator.absorbing is None:
        return [np.ones(facts[0].shape, dtype=bool)] * len(facts)
    decided = np.zeros(facts[0].shape, dtype=bool)
    found = [decided] * len(facts)
    for slot in sorted(range(len(facts)), key=lambda slot: node.inputs[slot].is_value):
        own = _is(facts[slot], operator.absorbing) & ~decided
        found[slot] = own
        decided = decided | own
    return [own | ~decided for own in found]


def covers(node: Node, slots: Collection[int], carried: Sequence[int] = ()) -> bool:
    """Whether these operands alone give the output its shape; so do positions that the others leave as constants."""
    shape = node.outputs[0].shape
    assert shape is not None
    layout = carried or [1] * len(shape)
    if not carried and max(node.inputs[slot].rank or 0 for slot in slots) < len(shape):
        return False
    return all(layout[axis] > 1 or spans(node, slots, axis) for axis in range(len(shape)))


def _cut_slots(node: Node, aligned: Aligned, matters: list[np.ndarray], live: np.ndarray) -> set[int]:
    """Return the computed operands that are constant, or do not matter, wherever the result is live.

    Each is replaced by that constant, if the operands that are left have the output's shape.
    """
    values = node.value_slots
    settled = {slot for slot in values if (aligned.facts[slot].constant | ~matters[slot])[live].all()}
    if settled == set(values) and live.any():  # the result is a constant: its readers see to it
        return set()
    left = set(range(len(node.inputs)))
    for slot in reversed(values):
        rest = left - {slot}
        if slot in settled and rest & set(values) and covers(node, rest, aligned.layout):
            left = rest
    return set(values) - left


def _own_layout(mask: np.ndarray, slot: int, node: Node, aligned: Aligned, view: View) -> np.ndarray:
    """Return a mask of the common layout in an operand's own layout."""
    layout = view.of(node.inputs[slot]).shape
    start = aligned.starts[slot]
    mask = np.asarray(mask.any(axis=tuple(range(start))))
    axes = tuple(axis for axis, size in enumerate(layout) if size == 1)
    return np.asarray(mask.any(axis=axes, keepdims=True))


def _ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    output = node.outputs[0]
    rank = len(view.of(output).shape)
    for slot in sorted(needed):
        operand = node.inputs[slot]
        assert operand.shape is not None
        start = rank - len(operand.shape)
        for axis in range(rank):
            if axis >= start and operand.shape[axis - start] != 1:
                yield from tie_axes(positions, (output.name, axis), (operand.name, axis - start))


def _parts(node: Node, view: View) -> list[Part]:
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


# --- rewriting --------------------------------------------------------------------------------------------------------


def _drop(operator: Operator, node: Node, edit: Edit) -> None:
    """Slice constant operands, write down those that were cut, and leave out what changes nothing by now."""
    aligned = align(node, edit.view)
    assert aligned is not None
    constants: Constants = {}
    for slot, operand in enumerate(node.inputs):
        if operand.array is not None:
            constants[slot] = sliced(operand.array, node.outputs[0], edit)
        elif slot not in edit.needed:
            fact = aligned.facts[slot]
            filler = 0.0 if operator.neutral is None or slot < operator.neutral_from else operator.neutral
            values = np.where(fact.constant, fact.shift, filler)
            constants[slot] = sliced(values, node.outputs[0], edit).astype(np.dtype(operand.dtype))
    left = _left(operator, node, constants)
    if len(left) == 1 < len(node.inputs) and node.inputs[left[0]].dtype == node.outputs[0].dtype:
        edit.bypass(left[0])
        return
    for slot, array in constants.items():
        if slot in left or not operator.variadic:
            edit.set_constant(slot, array)
    if operator.variadic:
        edit.keep_inputs(left)


def _left(operator: Operator, node: Node, constants: Constants) -> list[int]:
    """Return the operands that are left when those go that change neither values nor shape."""
    every = list(range(len(node.inputs)))
    passed = operator.passes(constants)
    if passed is not None and passed not in constants and covers(node, [passed]):
        return [passed]
    left = every
    for slot, array in constants.items():
        rest = [i for i in left if i != slot]
        is_neutral = operator.neutral is not None and slot >= operator.neutral_from
        if is_neutral and bool((array == operator.neutral).all()) and covers(node, rest):
            left = rest if any(i not in constants for i in rest) else left
    return left
