"""Shape and Size: they read sizes, no values; an axis whose size is read keeps its positions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import Fact, unknown
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Rule, View, freeze
from prune2deploy.graph.rules.channelwise import nothing_to_drop


def _facts(node: Node, view: View) -> list[Fact]:
    rank = 1 if node.op_type == "Shape" else 0
    return [unknown(view.numbers, rank, ("sizes", node.index))]


def _live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    return {0: Demand(np.zeros(view.of(node.inputs[0]).shape, dtype=bool))}


def _ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    operand = node.inputs[0]
    for axis in range(len(view.of(operand).shape)):
        if node.sizes_read is None or axis in node.sizes_read:
            yield freeze(positions.ids(operand.name, axis))


SHAPE = Rule(_facts, _live, _ties, nothing_to_drop, "shape", types=frozenset({"int64"}))
