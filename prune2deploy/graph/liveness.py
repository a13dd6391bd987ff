"""Liveness, backward: one sweep that reads facts and stores, for every live position, the reader that needs it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.fact import fit_mask
from prune2deploy.graph.facts import Known
from prune2deploy.graph.node import Node, Tables
from prune2deploy.graph.rules.base import Demand

NOBODY = -1
GRAPH_OUTPUT = -2
STAND_IN = 8.0
"""A live alias stands for its class if its multiple is at most this many times smaller than the largest one."""


@dataclass(frozen=True, eq=False)
class Liveness:
    """Which positions are live, and why.

    Attributes:
        live: value -> bool in the layout of its fact. A value that is not here is needed by nobody.
        reader: value -> int32 in that layout: index of the node that needs the position, `GRAPH_OUTPUT` or `NOBODY`.
        needed: node index -> the input slots that the node still reads; nodes that are not here are dead.
        constants: the values that are constant wherever they are live: each is written down, and its producer is dead.
    """

    live: dict[str, np.ndarray]
    reader: dict[str, np.ndarray]
    needed: dict[int, frozenset[int]]
    constants: frozenset[str]


def live_channels(
    tables: Tables,
    known: Known,
    forced: Set[tuple[int, ...]] = frozenset(),
    risky: Mapping[tuple[int, int], np.ndarray] | None = None,
    *,
    cut_constants: bool = True,
) -> Liveness:
    """Return which positions can still change an output through a reader that cannot absorb them.

    ``forced`` are (node index, slot) pairs that count as needed even where their reader wants none of their positions;
    ``risky`` are positions that count as live there. Without ``cut_constants`` what is constant is computed too.
    """
    facts = known.view.facts
    demands: dict[str, list[tuple[int, Demand]]] = {}
    for operand in tables.outputs:
        if operand.name in facts:
            whole = np.ones(facts[operand.name].shape, dtype=bool)
            demands.setdefault(operand.name, []).append((GRAPH_OUTPUT, Demand(whole)))

    live: dict[str, np.ndarray] = {}
    reader: dict[str, np.ndarray] = {}
    needed: dict[int, frozenset[int]] = {}
    constants: set[str] = set()

    def settle(value: str) -> np.ndarray | None:
        if value in demands:
            live[value], reader[value] = _settled(demands.pop(value), facts[value].shape)
        return live.get(value)

    for node in reversed(tables.nodes):
        outs = [settle(operand.name) if operand.name else None for operand in node.outputs]
        if cut_constants and _is_constant(node, outs, known, tables):
            constants.add(node.outputs[0].name)
            continue
        if all(mask is None for mask in outs):
            continue
        wanted = _demands(node, outs, known)
        for slot in node.value_slots:
            if (node.index, slot) in forced and slot not in wanted:
                wanted[slot] = Demand(np.zeros(facts[node.inputs[slot].name].shape, dtype=bool))
            if (node.index, slot) in (risky or {}) and slot in wanted:
                demand = wanted[slot]
                wanted[slot] = Demand(demand.live | (risky or {})[node.index, slot], demand.choices)
        needed[node.index] = frozenset(wanted)
        for slot, demand in wanted.items():
            demands.setdefault(node.inputs[slot].name, []).append((node.index, demand))
        for name in node.captured:
            if name in facts:
                everything = Demand(np.ones(facts[name].shape, dtype=bool))
                demands.setdefault(name, []).append((node.index, everything))
    for operand in tables.inputs:
        settle(operand.name)
    return Liveness(live, reader, needed, frozenset(constants))


def _is_constant(node: Node, outs: list[np.ndarray | None], known: Known, tables: Tables) -> bool:
    """Whether a node's result can be written down, and is not: constant on all live positions, of a known shape."""
    rule = known.rules[node.index]
    if rule is None or rule.kind == "constant" or len(outs) != 1 or outs[0] is None:
        return False
    output = node.outputs[0]
    if not known.view.of(output).constant[outs[0]].all() or output.shape is None:
        return False
    return all(isinstance(size, int) or size in tables.dimensions for size in output.shape)


def _demands(node: Node, outs: list[np.ndarray | None], known: Known) -> dict[int, Demand]:
    rule = known.rules[node.index]
    if rule is not None:
        return rule.live(node, outs, known.view)
    return {
        slot: Demand(np.ones(known.view.of(node.inputs[slot]).shape, dtype=bool))
        for slot in node.value_slots
        if node.inputs[slot].name in known.view.facts
    }


def _settled(demands: list[tuple[int, Demand]], layout: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the live positions of a value once all its readers have spoken, and who needs each."""
    live = np.zeros(layout, dtype=bool)
    reader = np.full(layout, NOBODY, dtype=np.int32)
    for index, demand in demands:
        mask = fit_mask(demand.live, layout)
        reader[mask & ~live] = index
        live |= mask
    for index, demand in demands:
        alive = ~fit_mask(~live, demand.live.shape) if demand.choices else live
        for choice in demand.choices:
            strong = choice.positions[choice.weights * STAND_IN >= choice.weights.max()]
            if not alive.flat[strong].any():
                best = int(choice.positions[np.argmax(choice.weights)])
                alive.flat[best] = True
                mask = fit_mask(_only(best, alive.shape), layout)  # its reader may not see all of its axes
                reader[mask & ~live] = index
                live |= mask
    return live, reader


def _only(position: int, layout: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(layout, dtype=bool)
    mask.flat[position] = True
    return mask
