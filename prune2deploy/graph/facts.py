"""Facts, forward: one sweep over the nodes in topological order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.fact import Fact, Numbers, unknown
from prune2deploy.graph.node import FLOATS, Node, Operand, Tables
from prune2deploy.graph.rules import rule_for
from prune2deploy.graph.rules.base import Rule, View
from prune2deploy.graph.rules.precision import rounded


@dataclass(frozen=True, eq=False)
class Known:
    """What the forward sweep found: the facts of every value, each node's rule, and why a node has none."""

    view: View
    rules: tuple[Rule | None, ...]
    opaque: dict[int, str]


def channel_facts(tables: Tables) -> Known:
    """Return the facts of every value of the graph."""
    numbers = Numbers()
    facts: dict[str, Fact] = {
        operand.name: unknown(numbers, operand.rank or 0, ("input", operand.name)) for operand in tables.inputs
    }
    view = View(facts, numbers)
    rules: list[Rule | None] = []
    opaque: dict[int, str] = {}
    for node in tables.nodes:
        rule = rule_for(node)
        found = _found(node, rule, view)
        made: list[Fact] = []
        if isinstance(found, str):
            opaque[node.index], rule = found, None
        else:
            made = found
        rules.append(rule)
        for slot, operand in enumerate(node.outputs):
            if not operand.name:
                continue
            if slot < len(made):
                facts[operand.name] = made[slot]
            else:
                facts[operand.name] = unknown(numbers, operand.rank or 0, ("opaque", node.index, slot))
    numbers.end_rows()
    return Known(view, tuple(rules), opaque)


def _found(node: Node, rule: Rule | None, view: View) -> list[Fact] | str:
    """Return a node's facts, or why it is opaque."""
    if node.captured:
        return "it holds a graph of its own"
    if rule is None:
        return "no rule covers this operator"
    values = [operand for operand in node.inputs if operand.is_value]
    if not values:
        return "it reads nothing that is computed"
    if any(operand.rank is None or operand.name not in view.facts for operand in values):
        return "the rank of an input is not known"
    strange = next((out.dtype for out in node.outputs if out.name and out.dtype not in rule.types), None)
    if strange is not None:
        return f"its result is of type {strange}"
    if not (rule.constant_first or node.inputs[0].is_value):
        return "its first input is a constant"
    found = rule.facts(node, view)
    if found is None:
        return "this form of the operator is not covered"
    if isinstance(found, str):
        return found
    found = [_in_type(fact, out) for fact, out in zip(found, node.outputs, strict=False)]
    return found if _fits(found, node) else "its shapes contradict each other or its constants are not finite"


def _in_type(fact: Fact, operand: Operand) -> Fact:
    """Return a fact whose constants are what the value's own type holds, so that equal ones cancel to 0."""
    if operand.dtype not in FLOATS or not fact.constant.any():
        return fact
    return Fact(fact.number, fact.scale, np.where(fact.constant, rounded(fact.shift, operand.dtype), fact.shift))


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
