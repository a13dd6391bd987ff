"""Facts, forward: one sweep over the nodes in topological order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.fact import Fact, Numbers, unknown
from prune2deploy.graph.node import Node, Tables
from prune2deploy.graph.rules import rule_for
from prune2deploy.graph.rules.base import Rule, View

CONSTANT_FIRST = frozenset({"Add", "Sub", "Mul", "Concat", "MatMul"})
"""Operators whose first input may be the constant one."""


@dataclass(frozen=True, eq=False)
class Known:
    """What the forward sweep found: the facts of every value, and each node's rule (None: the node is opaque)."""

    view: View
    rules: tuple[Rule | None, ...]


def channel_facts(tables: Tables) -> Known:
    """Return the facts of every value of the graph."""
    numbers = Numbers()
    facts: dict[str, Fact] = {
        operand.name: unknown(numbers, operand.rank or 0, ("input", operand.name)) for operand in tables.inputs
    }
    view = View(facts, numbers)
    rules: list[Rule | None] = []
    for node in tables.nodes:
        rule = _applicable(node, view)
        found = None if rule is None else rule.facts(node, view)
        if found is not None and not _fits(found, node):
            found = None
        rules.append(rule if found is not None else None)
        for slot, operand in enumerate(node.outputs):
            if not operand.name:
                continue
            if found is not None and slot < len(found):
                facts[operand.name] = found[slot]
            else:
                facts[operand.name] = unknown(numbers, operand.rank or 0, ("opaque", node.index, slot))
    return Known(view, tuple(rules))


def _applicable(node: Node, view: View) -> Rule | None:
    rule = rule_for(node)
    values = [operand for operand in node.inputs if operand.is_value]
    if rule is None or not values or any(operand.rank is None or operand.name not in view.facts for operand in values):
        return None
    return rule if node.inputs[0].is_value or node.op_type in CONSTANT_FIRST else None


def _fits(found: list[Fact], node: Node) -> bool:
    """Whether the facts agree with the shapes that onnx inferred; a graph that contradicts itself stays opaque."""
    for fact, operand in zip(found, node.outputs, strict=False):
        if operand.shape is None or len(operand.shape) != len(fact.shape):
            return False
        sizes = zip(fact.shape, operand.shape, strict=True)
        if any(size > 1 and isinstance(have, int) and have != size for size, have in sizes):
            return False
        if not (np.isfinite(fact.scale).all() and np.isfinite(fact.shift).all()):
            return False
    return True
