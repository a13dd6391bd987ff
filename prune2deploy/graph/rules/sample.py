"""Operators that read each map where another input says: GridSample, RoiAlign, MaxRoiPool, ReverseSequence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prune2deploy.graph.fact import Fact, layout_key, make
from prune2deploy.graph.node import FLOATS, Node
from prune2deploy.graph.rules.base import Demand, Rule, View
from prune2deploy.graph.rules.channelwise import nothing_to_drop, same_layout_ties
from prune2deploy.graph.rules.pool import linear_window
from prune2deploy.graph.rules.sources import MOVED, computed, everything, expanded_axes, whole_key

Effect = Callable[[Node, Fact, object, View], Fact]


def _grid(node: Node, fact: Fact, signature: object, view: View) -> Fact:
    border = node.attribute("padding_mode", "zeros") == "zeros"
    return linear_window(fact, signature, border=border, view=view)


def _regions(node: Node, fact: Fact, signature: object, view: View) -> Fact:
    """Return the fact of means or maxima over regions, which hold 0 where they lie outside the map."""
    if node.op_type == "RoiAlign" and node.attribute("mode", "avg") == "avg":
        return linear_window(fact, signature, border=True, view=view)
    zero = fact.constant & (fact.shift == 0)
    number = view.numbers.of_facts(("regions", signature), fact)
    return make(number, np.where(zero, 0.0, 1.0), np.zeros(fact.shape))


def _reversed(node: Node, fact: Fact, signature: object, view: View) -> Fact:
    return linear_window(fact, signature, border=False, view=view)


def _fixed_axes(node: Node) -> set[int]:
    """Return the axes along which positions do not keep their meaning."""
    if node.op_type == "ReverseSequence":
        return {int(node.attribute("time_axis", 0)), int(node.attribute("batch_axis", 1))}
    return {axis for axis in range(node.inputs[0].rank or 0) if axis != 1}


def sampling_rule(effect: Effect, types: frozenset[str] = FLOATS) -> Rule:
    """Return the rule of an operator that moves the collapsed coordinates of its first input as the others say."""

    def facts(node: Node, view: View) -> list[Fact] | str:
        fact = view.of(node.inputs[0])
        if _fixed_axes(node) & set(expanded_axes(fact)):
            return "an axis other than the channels has positions"
        aside = tuple(whole_key(operand, view) for operand in node.inputs[1:] if operand.name)
        shape = node.inputs[0].shape or ()
        signature = (node.op_type, str(sorted(node.attributes.items())), aside, layout_key(shape, fact))
        return [effect(node, fact, signature, view)]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        assert outs[0] is not None
        slots = computed(node, range(1, len(node.inputs)))
        return {0: Demand(outs[0]), **{slot: everything(node.inputs[slot], view) for slot in slots}}

    return Rule(facts, live, same_layout_ties, nothing_to_drop, "movement", types=types)


GRID_SAMPLE = sampling_rule(_grid)
ROI = sampling_rule(_regions)
REVERSE_SEQUENCE = sampling_rule(_reversed, MOVED)
